"""Raw pairs of any number to a training set, and a reason for every pair that is not in it.

    read -> normalise -> keys -> language -> rules -> match -> balance -> duplicates -> scores -> text in images -> evaluation sets -> write

The source is cut into parts. A pass takes each part through the steps up to the next one that must have seen all rows (`AbstractSurveyor`), and
leaves its pairs, without images, and what that step surveys in two files. What is surveyed is merged, and the next pass goes on from there. The last
one reads the source again and writes shards. Every file is there whole or not at all, and a part whose file is there is not done again: so
a run can be killed at any moment, goes on when it is started again, and ends in the same bytes, in any number of processes.

Memory: some batches per process, the word lists, and what a surveyor's `merge` holds.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diptych.config import fingerprint, from_json, to_json
from diptych.curate.decontaminate import Decontamination, DecontaminationConfig
from diptych.curate.duplicates import ImageDuplicates, ImageDuplicatesConfig, TextDuplicates, TextDuplicatesConfig
from diptych.curate.engine import AbstractEngine, LocalEngine
from diptych.curate.entries import Balance, BalanceConfig, MatchConfig, Matching, thresholds_of, word_lists
from diptych.curate.in_image_text import TextInImage, TextInImageConfig
from diptych.curate.language import LanguageConfig, LanguageFilter
from diptych.curate.metadata import Metadata
from diptych.curate.normalise import NormaliseConfig, Normaliser
from diptych.curate.pairs import PAIRS, beside, read_pairs, with_images
from diptych.curate.parts import Layout, Part, find_layout, find_parts
from diptych.curate.rules import Rules, RulesConfig
from diptych.curate.scores import ScoreConfig, ScoreFilter
from diptych.curate.shards import ShardWriter, WriteConfig, count_kept, samples_of, without_images_dropped
from diptych.curate.summary import Summary, Tally, encode_json, merge_tallies
from diptych.curate.unique import UniqueConfig, UniqueKeys
from diptych.data.columns import Columns
from diptych.errors import ConfigError
from diptych.files import atomic_file, write_text
from diptych.verbs import AbstractCurator, AbstractSurveyor

Step = AbstractCurator | AbstractSurveyor

_SLICE = 512  # source rows whose images are in memory together while shards are written


@dataclass(frozen=True)
class CurateConfig:
    """The steps, in their order. Each has `on`.

    Attributes:
        normalise: One spelling for captions.
        unique: Keys that earlier rows have.
        language: Which languages are kept.
        rules: What a caption must be.
        match: Entries of a word list.
        balance: Fewer captions of frequent entries.
        text_duplicates: Captions that are nearly an earlier one.
        image_duplicates: Images that are nearly an earlier one.
        score: How well caption and image fit, by a model.
        text_in_image: Captions that only repeat what is written in the image.
        decontaminate: Pairs that are in evaluation sets.
        write: Form of the shards.
        part_bytes: Larger parquet and jsonl files are cut into parts of this size.
    """

    normalise: NormaliseConfig = field(default_factory=NormaliseConfig)
    unique: UniqueConfig = field(default_factory=UniqueConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    rules: RulesConfig = field(default_factory=RulesConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    text_duplicates: TextDuplicatesConfig = field(default_factory=TextDuplicatesConfig)
    image_duplicates: ImageDuplicatesConfig = field(default_factory=ImageDuplicatesConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    text_in_image: TextInImageConfig = field(default_factory=TextInImageConfig)
    decontaminate: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    write: WriteConfig = field(default_factory=WriteConfig)
    part_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if self.balance.on and not self.match.on:
            raise ConfigError(
                "Balancing counts the entries that matching finds. Set match.on, or leave balance.on unset."
            )


def curate_source(
    source: str,
    out: Path,
    config: CurateConfig = CurateConfig(),
    *,
    columns: Columns | None = None,
    engine: AbstractEngine = LocalEngine(),
    advance: Callable[[str, int, int], None] = lambda title, total, done: None,
) -> Summary:
    """Curate a source and write `pairs/` (shards to train on), `reasons/` (every pair with its reason) and summary.json; return the summary.

    The same call goes on where an earlier one was stopped; after the end it returns the summary again.

    Args:
        source: See `find_parts`.
        out: Folder.
        config: The steps.
        columns: What the columns of the source mean, where their names do not tell.
        engine: Who works.
        advance: Told the title and the number of parts of a pass, and how many more of them are done.

    Raises:
        ConfigError: If `out` holds a run of another source or other settings.
        DataError: If there is nothing to read.
        OSError: If the disk is full; everything done so far stays, and the same call goes on from there.
    """
    parts = find_parts(source, part_bytes=config.part_bytes)
    layout = find_layout(parts, columns)
    lists = word_lists(config.match) if config.match.on else {}
    _claim(out, source, config, parts, layout, lists)
    if (out / "summary.json").exists():
        return from_json(Summary, json.loads((out / "summary.json").read_text(encoding="utf-8")))
    _sweep(out)
    work = out / "work"
    last = _run_passes(build_steps(config, lists), parts, layout, work, engine, advance)
    groups = _groups([count_kept(path) for path in _files(last, len(parts))], config.write.shard_rows)
    sizes = {code: len(own) for code, own in lists.items()}
    task = WriteTask(tuple(parts), layout, last, out, tuple(groups), config.write, sizes)
    _run(engine, task, len(groups), "writing shards", advance)
    tallies = (json.loads(task.tally(number).read_text(encoding="utf-8")) for number in range(len(groups)))
    shards = sorted(path.name for path in (out / "pairs").glob(f"*.{config.write.format}"))
    summary = merge_tallies(
        tallies,
        (pq.read_table(task.entries(number)) for number in range(len(groups))),
        lists,
        source=source,
        parts=len(parts),
        shards=tuple(shards),
        notes=_notes(config, work),
    )
    write_text(out / "summary.json", encode_json(to_json(summary)))
    shutil.rmtree(work)
    return summary


def build_steps(config: CurateConfig, lists: dict[str, tuple[str, ...]]) -> list[Step]:
    """Return the steps that are on.

    Args:
        config: Of all.
        lists: Entries by language.
    """
    sizes = {code: len(own) for code, own in lists.items()}
    made: list[tuple[bool, Callable[[], Step]]] = [
        (config.normalise.on, lambda: Normaliser(config.normalise)),
        (config.unique.on, UniqueKeys),
        (config.language.on, lambda: LanguageFilter(config.language)),
        (config.rules.on, lambda: Rules(config.rules)),
        (config.match.on, lambda: Matching(lists, config.match)),
        (config.balance.on, lambda: Balance(sizes, config.balance, anchor=config.match.anchor)),
        (config.text_duplicates.on, lambda: TextDuplicates(config.text_duplicates)),
        (config.image_duplicates.on, lambda: ImageDuplicates(config.image_duplicates)),
        (config.score.on, lambda: ScoreFilter(config.score)),
        (config.text_in_image.on, lambda: TextInImage(config.text_in_image)),
        (config.decontaminate.on, lambda: Decontamination(config.decontaminate)),
    ]
    return [make() for on, make in made if on]


def split_passes(steps: Sequence[Step]) -> list[tuple[tuple[AbstractCurator, ...], AbstractSurveyor | None]]:
    """Return the curators up to each surveyor, with it, and those behind the last one with None."""
    found: list[tuple[tuple[AbstractCurator, ...], AbstractSurveyor | None]] = []
    held: list[AbstractCurator] = []
    for step in steps:
        if isinstance(step, AbstractSurveyor):
            found.append((tuple(held), step))
            held = []
        else:
            held.append(step)
    return [*found, (tuple(held), None)]


def _run_passes(
    steps: Sequence[Step],
    parts: Sequence[Part],
    layout: Layout,
    work: Path,
    engine: AbstractEngine,
    advance: Callable[[str, int, int], None],
) -> Path:
    """Take all parts through all passes; return the folder with the pairs of the last one."""
    passes, informed = split_passes(steps), tuple[AbstractCurator, ...]()
    folders = [work / f"pass-{number}" for number in range(len(passes))]
    for number, (curators, surveyor) in enumerate(passes):
        before = folders[number - 1] if number else None
        task = PassTask(tuple(parts), layout, before, folders[number], (*informed, *curators), surveyor)
        _run(engine, task, len(parts), f"pass {number + 1} of {len(passes)}", advance)
        if before is not None and number > 1:  # what the last but one left is not asked for any more
            shutil.rmtree(folders[number - 2], ignore_errors=True)
        if surveyor is not None:
            informed = (surveyor.informed(_merged(surveyor, folders[number], len(parts))),)
    return folders[-1]


def _merged(surveyor: AbstractSurveyor, folder: Path, parts: int) -> pa.Table:
    path = folder / "merged.parquet"
    if not path.exists():
        table = surveyor.merge(Surveys([_survey(folder, number) for number in range(parts)]))
        with atomic_file(path) as file:
            pq.write_table(table, file)
    return pq.read_table(path)


@dataclass(frozen=True)
class Surveys:
    """The surveys of all parts, read anew each time they are gone through."""

    paths: list[Path]

    def __iter__(self) -> Iterator[pa.Table]:
        for path in self.paths:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group)


@dataclass(frozen=True)
class PassTask:
    """Takes a part through the curators of one pass.

    Attributes:
        parts: All.
        layout: What their columns mean.
        before: Folder of the pass before; None reads the source.
        folder: Where pairs and surveys go.
        curators: One after another.
        surveyor: Looks at what is left; None in the last pass.
    """

    parts: tuple[Part, ...]
    layout: Layout
    before: Path | None
    folder: Path
    curators: tuple[AbstractCurator, ...]
    surveyor: AbstractSurveyor | None

    def done(self, number: int) -> Path:
        """Return the file that is there when a part is done."""
        return _pairs(self.folder, number)

    def __call__(self, number: int) -> None:
        """Do one part."""
        part = self.parts[number]
        tables = read_pairs(part, number, self.layout) if self.before is None else _stored(_pairs(self.before, number))
        steps: list[Step] = [*self.curators, *([self.surveyor] if self.surveyor else [])]
        if any(step.reads_images for step in steps):
            tables = with_images(tables, part, self.layout)
        # What is named first is there last: pairs without their survey would count as done.
        with atomic_file(self.done(number)) as pairs, atomic_file(_survey(self.folder, number)) as survey:
            with _Stream(pairs, PAIRS) as kept_pairs, _Stream(survey, None) as surveys:
                for table in tables:
                    for curator in self.curators:
                        table = _checked(curator, table)
                    if self.surveyor is not None:
                        surveys.write(self.surveyor.survey(table))
                    kept_pairs.write(table.drop_columns(["image"]) if "image" in table.column_names else table)


def _checked(curator: AbstractCurator, table: pa.Table) -> pa.Table:
    found = curator.curate(table)
    assert found["number"].equals(table["number"]), f"{type(curator).__name__} loses or moves rows"
    return found


class _Stream:
    """Writes tables into one parquet file, a row group each; all have the columns of the first."""

    def __init__(self, path: Path, schema: pa.Schema | None) -> None:
        self._path, self._schema = path, schema
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> "_Stream":
        return self

    def write(self, table: pa.Table) -> None:
        if self._writer is None:
            self._schema = pa.schema(
                [f.with_type(pa.string()) if pa.types.is_null(f.type) else f for f in table.schema]
            )
            self._writer = pq.ParquetWriter(self._path, self._schema)
        self._writer.write_table(table.cast(self._schema), row_group_size=max(1, table.num_rows))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writer is None and kind is None:  # a part without any rows
            self._writer = pq.ParquetWriter(self._path, self._schema or pa.schema([]))
        if self._writer is not None:
            self._writer.close()


@dataclass(frozen=True)
class WriteTask:
    """Writes the shards of one group of parts, the reasons of their pairs, and a tally.

    Attributes:
        parts: All.
        layout: What their columns mean.
        pairs: Folder of the last pass.
        out: Folder of the run.
        groups: First and last part of each group, exclusive.
        config: Form of the shards.
        sizes: Entries per language.
    """

    parts: tuple[Part, ...]
    layout: Layout
    pairs: Path
    out: Path
    groups: tuple[tuple[int, int], ...]
    config: WriteConfig
    sizes: dict[str, int] = field(default_factory=dict)

    def tally(self, number: int) -> Path:
        """Return the file that is there when a group is done."""
        return self.out / "work" / "tallies" / f"{number:06}.json"

    done = tally

    def entries(self, number: int) -> Path:
        """Return the file with the counts of the entries."""
        return self.tally(number).with_suffix(".parquet")

    def __call__(self, number: int) -> None:
        """Do one group."""
        tally = Tally(self.sizes)
        writer = ShardWriter(self.out / "pairs", f"{number:05}", self.config, self.layout)
        with atomic_file(self.out / "reasons" / f"{number:05}.parquet") as file, _Stream(file, None) as reasons:
            for place in range(*self.groups[number]):
                for table in self._part(place, writer, tally):
                    light = [n for n in table.column_names if n not in ("row", "place", "caption", "matches")]
                    reasons.write(table.select(light))
        writer.flush()
        with atomic_file(self.entries(number)) as file:
            pq.write_table(tally.entries(), file)
        write_text(self.tally(number), encode_json(tally.to_json()))

    def _part(self, place: int, writer: ShardWriter, tally: Tally) -> Iterator[pa.Table]:
        addresses = self.config.format == "parquet"
        step = _SLICE if self.layout.image else 1 << 30
        for block, whole, first in beside(_stored(_pairs(self.pairs, place)), self.parts[place]):
            cuts = np.searchsorted(whole["row"].to_numpy(), range(first, first + block.table.num_rows + step, step))
            for start, stop in pairwise(cuts.tolist()):
                table, images = without_images_dropped(
                    whole.slice(start, stop - start), block.table, first, self.layout, addresses=addresses
                )
                samples = samples_of(table, block.table, first, self.layout, images)
                writer.add(samples)
                tally.samples += samples.num_rows
                tally.add(table, images, first)
                yield table


def _groups(counts: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """Return runs of parts that hold about `rows` kept pairs or more; a part is never cut."""
    found, start, held = [], 0, 0
    for number, count in enumerate(counts):
        held += count
        if held >= rows or number == len(counts) - 1:
            found.append((start, number + 1))
            start, held = number + 1, 0
    return found


def _run(
    engine: AbstractEngine,
    task: "PassTask | WriteTask",
    count: int,
    title: str,
    advance: Callable[[str, int, int], None],
) -> None:
    left = [number for number in range(count) if not task.done(number).exists()]
    advance(title, count, count - len(left))
    engine.run(task, left, partial(advance, title, count))


def _claim(
    out: Path,
    source: str,
    config: CurateConfig,
    parts: Iterable[Part],
    layout: Layout,
    lists: Mapping[str, tuple[str, ...]],
) -> None:
    """Write down what is being done in a folder, or compare it with what stands there.

    Raises:
        ConfigError: If they differ.
    """
    files = [[part.path, *_state(Path(part.path))] for part in parts]
    chosen = config.language.chosen if config.language.on else None
    record = {
        "source": source,
        "config": to_json(config),
        "layout": to_json(layout),
        "files": fingerprint(files),
        "entries": {code: Metadata(own, ()).digest for code, own in lists.items()},
        "language detector": chosen,
    }
    path = out / "curation.json"
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        if differing := [name for name, value in record.items() if old.get(name) != value]:
            raise ConfigError(
                f"{out} holds the curation of another source or with other settings ({', '.join(differing)}). Repeat those to go on, or "
                "name another folder."
            )
        return
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty, and holds no curation to go on with. Name a new folder.")
    write_text(path, encode_json(record))


def _state(path: Path) -> tuple[int, int]:
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else (0, 0)


def _sweep(out: Path) -> None:
    """Remove what killed writers have left; nobody else may be at work in this folder."""
    for left in [*out.rglob(".????????.*")]:
        left.unlink()


def _notes(config: CurateConfig, work: Path) -> tuple[str, ...]:
    notes = []
    if config.language.on:
        by = {
            "cld2": "Languages are those that CLD2 says, where it is sure.",
            "scripts": "Languages are known by script alone, where a script has one language; English, German, Russian, Arabic or Chinese are "
            "unknown then. CLD2 tells them: pip install 'diptych[curate]'.",
        }
        notes.append(by[config.language.chosen])
    for path in sorted(work.glob("pass-*/merged.parquet")):
        table = pq.read_table(path)
        if "threshold" in table.column_names:
            each = ", ".join(f"{threshold:,.6g} ({code})" for code, threshold in thresholds_of(table).items())
            notes.append(f"Each entry keeps this many pairs in expectation: {each}.")
    return tuple(notes)


def _stored(path: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


def _pairs(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.parquet"


def _survey(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.survey.parquet"


def _files(folder: Path, count: int) -> list[Path]:
    return [_pairs(folder, number) for number in range(count)]
