"""Rewrites of captions as more texts for training: made in batches, judged one by one, each with its verdict.

A run can be stopped at any moment: finished batches stand in a journal beside the output, `<name>.part`, and the same command goes on
behind them to the same result. The output is written whole at the end, then the journal is removed.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from diptych.config import fingerprint
from diptych.curate.language_model import LanguageModelConfig, open_language_model
from diptych.curate.normalise import NO_TEXT
from diptych.curate.prompts import STYLES, FewShot, style
from diptych.curate.reasons import kept, with_column, with_reason
from diptych.curate.source_table import check_ending, source_table, write_table
from diptych.curate.wording import QualityConfig, fault
from diptych.curate.writers import AbstractWriter, PromptedWriter, RuleWriter
from diptych.data.columns import Columns, role_of, sniff
from diptych.data.sources import AbstractSource, TableSource
from diptych.errors import ColumnError, ConfigError, DataError, nearest
from diptych.verbs import AbstractCurator

OWN_CAPTIONS = "captions"
"""The style whose examples are captions of one image each, taken from the table itself (that of MS COCO in the paper)."""
_MOST_EXAMPLES = 200


@dataclass(frozen=True)
class RewriteConfig:
    """What is rewritten, and how.

    Attributes:
        column: Captions, strings or lists of strings; found by its name when absent.
        styles: One rewrite of each; `captions` needs rows with several captions.
        captions: How many of a row's captions are rewritten, from the first; None for all.
        shots: Examples per prompt; 3 in the paper.
        official: The official prompts and their reading, with all quirks.
        batch_size: Captions per call of the model.
        seed: Of examples and draws.
        quality: What a rewrite must be to be kept.
    """

    column: str | None = None
    styles: tuple[str, ...] = ("reworded", "short")
    captions: int | None = 1
    shots: int = 3
    official: bool = False
    batch_size: int = 16
    seed: int = 0
    quality: QualityConfig = field(default_factory=QualityConfig)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.captions is not None and self.captions < 1) or not self.styles:
            raise ConfigError(f"batch_size and captions must be >= 1, and there must be a style; this is {self}.")


@dataclass(frozen=True)
class Job:
    """One caption to be rewritten in one style.

    Attributes:
        row: Of the table.
        caption: As it stands there.
        style: Asked for.
    """

    row: int
    caption: str
    style: str


class Rewriter(AbstractCurator):
    """Adds the columns `rewrite` (texts that passed) and `verdict` (what became of each), null for rows that nothing was written for.

    A row stays, with its captions, whatever becomes of its rewrites; one without a caption has the reason `no text`. A `rewrite` column that the
    table has already is extended. Batches hold captions of one style and follow from table and settings alone, so a run that was stopped ends
    with the texts of one that was not, if the writer repeats itself.
    """

    def __init__(
        self,
        writer: AbstractWriter,
        config: RewriteConfig,
        *,
        journal: Path | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        """Make the curator.

        Args:
            writer: Makes the texts.
            config: Settings.
            journal: File that keeps finished batches; removed by whoever has saved the result.
            advance: Told how many rewrites are done since the last call.

        Raises:
            ConfigError: If the writer does not know a style.
        """
        writer.check(config.styles)
        self.writer, self.config, self.journal, self.advance = writer, config, journal, advance

    def curate(self, table: pa.Table) -> pa.Table:
        """Return the table with rewrites, verdicts and reasons.

        Raises:
            ColumnError: If there is no column of captions.
            ConfigError: If the journal belongs to another table or other settings.
        """
        captions, alive = row_captions(table, self.config.column), kept(table)
        table = with_reason(table, np.array([not texts for texts in captions], np.bool_), NO_TEXT)
        captions = [texts if stays else [] for texts, stays in zip(captions, alive, strict=True)]
        batches = list(self._batches(captions))
        written = self._write(batches)
        found: list[list[str]] = _texts_of(table, "rewrite")
        verdicts: list[list[str]] = [[] for _ in captions]
        for job, text in sorted(
            (
                (job, text)
                for jobs, texts in zip(batches, written, strict=True)
                for job, text in zip(jobs, texts, strict=True)
            ),
            key=lambda pair: pair[0].row,
        ):
            known = tuple(caption for caption in captions[job.row] if caption != job.caption) + tuple(found[job.row])
            wrong = fault(job.caption, text, others=known, config=self.config.quality)
            if wrong is None:
                found[job.row].append(text)
            quoted = f" ({text!r})" if wrong is not None and text else ""
            verdicts[job.row].append(f"{job.style}: {wrong or 'kept'}{quoted}")
        said = pa.array([". ".join(of_row) or None for of_row in verdicts], pa.string())
        return with_column(with_column(table, "rewrite", pa.array(found, pa.list_(pa.string()))), "verdict", said)

    def _batches(self, captions: list[list[str]]) -> Iterator[list[Job]]:
        size = self.config.batch_size
        for name in self.config.styles:
            jobs = [
                Job(row, text, name) for row, texts in enumerate(captions) for text in texts[: self.config.captions]
            ]
            yield from (jobs[start : start + size] for start in range(0, len(jobs), size))

    def _write(self, batches: list[list[Job]]) -> list[list[str]]:
        identity = fingerprint([self.writer.name, self.config, batches])
        written = [] if self.journal is None else read_journal(self.journal, identity)
        if self.advance is not None:
            self.advance(sum(map(len, written)))
        for number, jobs in enumerate(batches[len(written) :], len(written)):
            texts = self.writer.write(
                [job.caption for job in jobs], jobs[0].style, seed=self.config.seed + 1000 * number
            )
            written.append(texts)
            if self.journal is not None:
                append_line(self.journal, texts)
            if self.advance is not None:
                self.advance(len(jobs))
        return written


def rewrite_source(
    source: AbstractSource,
    out: Path,
    *,
    config: RewriteConfig = RewriteConfig(),
    model: LanguageModelConfig | None = LanguageModelConfig(),
    limit: int | None = None,
    offline: bool = False,
    device: str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> pa.Table:
    """Rewrite the captions of a source, write it as a table with the columns of `Rewriter`, and return that.

    Args:
        source: Anything with captions.
        out: A .parquet or .jsonl file; the same call goes on where an earlier one was stopped.
        config: What is rewritten, and how.
        model: Language model; None for rules (`RuleWriter`), whose styles are `framed`, `reordered` and `both`.
        limit: Only the first rows.
        offline: Never touch the network.
        device: Where a local model runs.
        advance: Progress.
    """
    check_ending(out)
    table = source_table(source, out.parent)[:limit]
    if config.column is None and isinstance(source, TableSource):
        config = RewriteConfig(**{**vars(config), "column": next(iter(source.columns.texts), None)})
    prompts = {} if model is None else prompts_for(config, table)
    writer = (
        RuleWriter()
        if model is None
        else PromptedWriter(open_language_model(model, offline=offline, device=device), prompts, model)
    )
    journal = out.with_name(f"{out.name}.part")
    found = Rewriter(writer, config, journal=journal, advance=advance).curate(table)
    write_table(found, out)
    journal.unlink()
    return found


def prompts_for(config: RewriteConfig, table: pa.Table) -> dict[str, FewShot]:
    """Return the examples of each style asked for.

    Raises:
        ConfigError: If a style is unknown, or `captions` is asked for and too few rows have several.
    """
    found = {}
    for name in config.styles:
        if name == OWN_CAPTIONS:
            several = [texts for texts in row_captions(table, config.column) if len(texts) > 1][:_MOST_EXAMPLES]
            if len(several) < config.shots:
                raise ConfigError(
                    f"The style {name!r} takes its examples from rows with several captions; only {len(several)} have them."
                )
            found[name] = FewShot(several, drawn=True, shots=config.shots, official=config.official)
        elif name in STYLES:
            found[name] = style(name, shots=config.shots, official=config.official)
        else:
            raise ConfigError(f"There is no style {name!r}. {nearest(name, [*STYLES, OWN_CAPTIONS])}")
    return found


def row_captions(table: pa.Table, column: str | None = None) -> list[list[str]]:
    """Return the captions of each row that are not blank.

    Raises:
        ColumnError: If there is no such column, or no column of captions.
    """
    known = sniff(table, Columns(texts=() if column is None else (column,))).texts
    name = next((text for text in known if column is not None or role_of(text)[0] == "caption"), None)
    if name is None:
        raise ColumnError(f"No column holds captions. Name it with `column`. Known: {', '.join(table.column_names)}.")
    return _texts_of(table, name)


def align_lines(rows: Sequence[tuple[str, str]], rewrites: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return [caption, rewrite 1, rewrite 2, ...] of each image row, from files with one rewrite per line, as the authors release them.

    Rows that name no .png, .jpg or .jpeg (a title row, other files) are left out and have no line. The rows may repeat: then the captions of the
    first pass are everybody's.

    Args:
        rows: (image name, caption), as in the csv file.
        rewrites: Lines of each rewrite file.

    Raises:
        DataError: If the files differ in length, or the images are no multiple of it; names both counts.
    """
    captions = [caption for name, caption in rows if name.endswith((".png", ".jpg", ".jpeg"))]
    counts = sorted({len(lines) for lines in rewrites})
    if len(counts) != 1 or counts[0] == 0 or len(captions) % counts[0] or not captions:
        raise DataError(
            f"{len(captions)} rows name a .png, .jpg or .jpeg, and the rewrite files have {' and '.join(map(str, counts)) or 'no'} lines: there "
            "must be one line per such row, in their order."
        )
    first = [[caption, *lines] for caption, *lines in zip(captions[: counts[0]], *rewrites, strict=True)]
    return [first[row % counts[0]] for row in range(len(captions))]


def read_journal(path: Path, identity: str) -> list[list[str]]:
    """Return the finished batches of a journal, and start it if there is none. A line that a kill has cut is dropped.

    Raises:
        ConfigError: If it belongs to another run.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        append_line(path, identity)
    whole = path.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    lines = [json.loads(line) for line in kept.splitlines()]
    if lines[:1] not in ([], [identity]):
        raise ConfigError(
            f"{path} was begun with another table, model or settings. Repeat those to go on, or remove the file to begin anew."
        )
    if len(kept) < len(whole):
        os.truncate(path, len(kept))
    if not lines:
        append_line(path, identity)
    return lines[1:]


def append_line(path: Path, value: object) -> None:
    """Add one JSON line to a file and see it on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _texts_of(table: pa.Table, column: str) -> list[list[str]]:
    if column not in table.column_names:
        return [[] for _ in range(table.num_rows)]
    values = (value if isinstance(value, list) else [value] for value in table[column].to_pylist())
    return [[text for text in texts if text and text.strip()] for texts in values]
