"""Results of claims: results/<slug>.json, one record per claim, and the table that the README shows of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from diptych.claims.verdict import Verdict
from diptych.config import from_json, read_json
from diptych.files import atomic_file, replace_between
from diptych.types import Interval

START = "<!-- claims ledger: written by `diptych reproduce` from results/, not by hand -->"
END = "<!-- end of the claims ledger -->"
_HEAD = (
    "method",
    "the paper says",
    "what is run here",
    "baseline",
    "method",
    "control",
    "method - baseline, paired over seeds, 95 % interval",
    "verdict",
    "minutes",
    "command",
)


@dataclass(frozen=True)
class ControlCheck:
    """How the control came out.

    Attributes:
        expected: What the claim says of it.
        passed: Whether it came out so.
    """

    expected: str
    passed: bool


@dataclass(frozen=True)
class Search:
    """How each arm's hyper-parameters were chosen: the best of its grid on the validation split, with one seed.

    Attributes:
        seed: The first of the claim.
        tries: Points of every arm's grid; with one point there was nothing to choose, and nothing was run.
        chosen: The point of each arm.
        scores: Metric of every point, in the order of the grid; None for a run that broke down.
    """

    seed: int
    tries: int
    chosen: Mapping[str, Mapping[str, Any]]
    scores: Mapping[str, list[float | None]]


@dataclass(frozen=True)
class Hashes:
    """What the numbers came from.

    Attributes:
        code: Of each method that took part, with all that it imports, by slug.
        recipes: Of each arm's training runs on the test split, seeds aside.
        data: Of what they were trained on.
        sources: Of the data sets that the claim names.
    """

    code: Mapping[str, str]
    recipes: Mapping[str, list[str]]
    data: Mapping[str, list[str]]
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Result:
    """One claim, run. The keys `baseline`, `method` and `control` stand for those arms; further arms go by their names.

    Attributes:
        slug: Of the method.
        name: Of the setting.
        claim: What the paper says.
        setting: What was run here.
        metric: Name of the numbers.
        higher_is_better: Its direction.
        seeds: In the order of the numbers.
        arms: One number per seed, on the test split.
        names: Of the arms.
        difference: Method minus baseline, paired over seeds.
        control_check: What was expected of the control, and whether it held.
        verdict: By the rule of `decide`.
        search: How hyper-parameters were chosen.
        samples: Shown in training per arm and seed, on average, repeats counted.
        minutes: Of all trials, those on the validation split included, as if one had followed the other.
        command: That runs it again.
        versions: Of packages.
        hashes: Of code, recipes and data.
        noted: Further numbers that arms noted: by name, for each arm, one per seed.
        ours: Whether the claim is ours and not the paper's.
    """

    slug: str
    name: str
    claim: str
    setting: str
    metric: str
    higher_is_better: bool
    seeds: tuple[int, ...]
    arms: Mapping[str, list[float]]
    names: Mapping[str, str]
    difference: Interval
    control_check: ControlCheck
    verdict: Verdict
    search: Search
    samples: Mapping[str, int]
    minutes: float
    command: str
    versions: Mapping[str, str]
    hashes: Hashes
    noted: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)
    ours: bool = False


def write_results(results: Sequence[Result], folder: Path) -> Path:
    """Write the results of one method to <slug>.json: a record, or a list of them where it has several claims."""
    records = [asdict(result) for result in results]
    path = folder / f"{results[0].slug}.json"
    with atomic_file(path) as file:
        content = records[0] if len(records) == 1 else records
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_results(path: Path) -> tuple[Result, ...]:
    """Return what `write_results` wrote.

    Raises:
        ConfigError: If the file cannot be read, or was written by another version.
    """
    content = read_json(path, "Run `diptych reproduce` again.")
    records = content if isinstance(content, list) else [content]
    return tuple(from_json(Result, record, where=f"{path}[{i}]") for i, record in enumerate(records))


def read_all(folder: Path) -> tuple[Result, ...]:
    """Return the results of every file in a folder, in the order of their names."""
    return tuple(result for path in sorted(folder.glob("*.json")) for result in read_results(path))


def state_of(results: Sequence[Result]) -> Literal["works", "reproduced", "not reproduced"]:
    """Return what the table of methods must say: `reproduced` if every claim is, `not reproduced` if any is not, else `works`.

    Claims that are ours and not the paper's do not count.
    """
    verdicts = {result.verdict for result in results if not result.ours}
    if "not reproduced" in verdicts:
        return "not reproduced"
    return "reproduced" if verdicts == {"reproduced"} else "works"


def table(folder: Path) -> str:
    """Return the ledger in Markdown: a row per claim of every file in a folder of results."""
    results = read_all(folder)
    return (
        markdown_table(_HEAD, [_row(result, folder) for result in results]) if results else "No claim has been run yet."
    )


def update_readme(readme: Path, folder: Path) -> bool:
    """Put the ledger between its two comments in a file; return whether the file has them."""
    return replace_between(readme, START, END, table(folder))


def _row(result: Result, folder: Path) -> list[str]:
    def mean(part: str) -> str:
        values = result.arms[part]
        return f"{result.names[part]}: {sum(values) / len(values):.3f}"

    plot = f"{folder.name}/{result.slug}.png"
    difference = result.difference
    direction = "" if result.higher_is_better else ", lower is better"
    return [
        f"`{result.slug}`",
        result.claim,
        f"{result.setting} Metric: {result.metric}{direction}; {len(result.seeds)} seeds.",
        mean("baseline"),
        mean("method"),
        f"{mean('control')} ({'as' if result.control_check.passed else 'not as'} expected)",
        difference.signed(),
        f"[{result.verdict}]({plot})" if (folder / f"{result.slug}.png").exists() else result.verdict,
        f"{result.minutes:.1f}",
        f"`{result.command}`",
    ]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; cells may hold any text."""
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "&#124;").split())
