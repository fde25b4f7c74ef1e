"""What a benchmark leaves behind: benchmarks/results/<area>.json, a Markdown table, and that table in the page on benchmarks."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.config import from_json, read_json, to_json
from diptych.files import replace_between, write_text


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: Of the rows.
        title: What the reader sees.
        format: Of its numbers, as for `format`.
    """

    key: str
    title: str
    format: str = ".2f"


@dataclass(frozen=True)
class Table:
    """Measured numbers.

    Attributes:
        title: What its rows are.
        columns: To be shown, in order; rows may hold more.
        rows: Texts, numbers, intervals, or None for what was not measured.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Bar:
    """What was to be shown, and what came.

    Attributes:
        claim: What the number is.
        bound: What was to be reached.
        at_least: Whether the number must not be below the bound; else not above it.
        came: The number; None where it could not be measured.
    """

    claim: str
    bound: float
    at_least: bool
    came: float | None

    @property
    def reached(self) -> bool | None:
        """Return whether the number is on the right side; None where there is none."""
        if self.came is None:
            return None
        return self.came >= self.bound if self.at_least else self.came <= self.bound


@dataclass(frozen=True)
class Finding:
    """What one area of the benchmark found.

    Attributes:
        what: What was compared with what, for the reader.
        setting: Sizes and repeats.
        tables: The numbers.
        bars: What was to be shown.
        notes: What the reader must know, in sentences.
    """

    what: str
    setting: Any
    tables: tuple[Table, ...]
    bars: tuple[Bar, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """A finding with where it comes from.

    Attributes:
        area: Name of the benchmark.
        finding: What it found.
        quick: Whether sizes were too small for the numbers to mean anything.
        minutes: It took.
        command: That runs it again.
        machine: Processor, memory, measured matmul peaks in GFLOP/s.
        versions: Of packages; those of anchors by anchor.
        missing: Which contenders took no part, and why.
    """

    area: str
    finding: Finding
    quick: bool
    minutes: float
    command: str
    machine: Mapping[str, Any]
    versions: Mapping[str, Any]
    missing: tuple[str, ...] = ()


def write_record(record: Record, folder: Path) -> Path:
    """Write <area>.json and <area>.md; return the first."""
    path = folder / f"{record.area}.json"
    write_text(path, json.dumps(to_json(record), indent=2, ensure_ascii=False) + "\n")
    write_text(folder / f"{record.area}.md", markdown(record) + "\n")
    return path


def read_record(path: Path) -> Record:
    """Return what `write_record` wrote.

    Raises:
        ConfigError: If the file cannot be read, or was written by another version.
    """
    return from_json(Record, read_json(path, f"Run `diptych bench {path.stem}` again."), where=path.name)


def markdown(record: Record) -> str:
    """Return a record as text for a page."""
    finding, machine = record.finding, record.machine
    parts = [finding.what]
    if record.quick:
        parts.append("**Made with `--quick`: a test that it runs. The numbers mean nothing.**")
    if finding.bars:
        parts.append(
            "\n".join(
                ["| what was to be shown | bar | came | reached |", "|---|---|---|---|", *map(_bar, finding.bars)]
            )
        )
    parts += [f"{table.title}:\n\n{_table(table)}" for table in finding.tables]
    if notes := [*finding.notes, *record.missing]:
        parts.append("\n".join(f"- {note}" for note in notes))
    peaks = " and ".join(f"{value:,.0f} ({name})" for name, value in machine["peak_gflops"].items())
    parts.append(
        f"`{record.command}`, {record.minutes:.1f} minutes, {machine['date']}. {machine['processor']} ({machine['vector']}), "
        f"{machine['threads']} threads on {machine['cores']} cores; a large matrix product reaches {peaks} GFLOP/s."
    )
    return "\n\n".join(parts)


def update_page(page: Path, folder: Path, area: str) -> None:
    """Put the record of an area between its two comments in a page; one made with `--quick` stays out of it."""
    path = folder / f"{area}.json"
    record = read_record(path) if path.is_file() else None
    plot = f"![{area}]({plot_link(area)})\n\n" if (page.parent / plot_link(area)).is_file() else ""
    text = "Not measured yet." if record is None or record.quick else f"{plot}{markdown(record)}"
    start = f"<!-- {area}: written by `diptych bench` from benchmarks/results/, not by hand -->"
    replace_between(page, start, f"<!-- end of {area} -->", text)


def plot_link(area: str) -> str:
    """Return where the plot of an area lies, as seen from the page."""
    return f"benchmarks/{area}.png"


def _bar(bar: Bar) -> str:
    sign = ">=" if bar.at_least else "<="
    came = "-" if bar.came is None else f"{bar.came:.3g}"
    reached = {True: "yes", False: "NO", None: "not measured"}[bar.reached]
    return f"| {bar.claim} | {sign} {bar.bound:g} | {came} | {reached} |"


def _table(table: Table) -> str:
    head = [column.title for column in table.columns]
    rows = [[cell(row.get(column.key), column.format) for column in table.columns] for row in table.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def cell(value: Any, form: str) -> str:
    """Return a value as a table shows it; intervals may come as JSON."""
    value = to_json(value)
    if value is None:
        return "-"
    if isinstance(value, str):
        return value.replace("|", "&#124;")
    if isinstance(value, Mapping):
        return f"{value['value']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"
    return format(value, form)
