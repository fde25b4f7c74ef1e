"""`curate` and `rewrite`: better pairs and better texts before training."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.progress import TaskID
from tyro.conf import Positional

from diptych.commands.terminal import bars, progress, say
from diptych.curate.engine import LocalEngine, RayEngine
from diptych.curate.language_model import LanguageModelConfig
from diptych.curate.pipeline import CurateConfig, curate_source
from diptych.curate.rewrite import RewriteConfig, rewrite_source
from diptych.curate.summary import Summary, markdown
from diptych.data.sources import Columns, open_source
from diptych.files import write_text
from diptych.use.curation import curation_page


def curate(
    source: Positional[str],
    *,
    out: Path,
    steps: Annotated[CurateConfig, tyro.conf.arg(name="")] = CurateConfig(),
    engine: Literal["local", "ray"] = "local",
    processes: int | None = None,
    address: str | None = None,
    columns: Columns = Columns(),
) -> Summary:
    """Choose what to train on, with a reason for every pair that is left out; the same command goes on where it was stopped.

    Args:
        source: A parquet, jsonl, csv or tar file, a folder of them, a pattern, the output of img2dataset, or a named data set.
        out: Folder for `pairs` (shards to train on), `reasons` (every pair with its reason), report.html and report.md.
        steps: What is done.
        engine: `ray` works on a Ray cluster (extra `ray`); the output is the same.
        processes: How many work at the same time; 1, or all of the Ray cluster, unless said otherwise.
        address: Of the Ray cluster, such as ray://head:10001; one is started on this machine without.
        columns: What the columns of the source mean.
    """
    worker = RayEngine(address, processes) if engine == "ray" else LocalEngine(processes or 1)
    tasks: dict[str, TaskID] = {}
    with bars() as bar:

        def advance(title: str, total: int, done: int) -> None:
            if title not in tasks:
                tasks[title] = bar.add_task(title, total=total)
            bar.advance(tasks[title], done)

        summary = curate_source(source, out, steps, columns=columns, engine=worker, advance=advance)
    for name, text in (("report.md", markdown(summary)), ("report.html", curation_page(summary))):
        write_text(out / name, text)
    for one in summary.reasons:
        say(f"{one.count:>14,}  {one.reason}")
    page = out / "report.html"
    say(
        f"{summary.kept:,} of {summary.pairs:,} pairs are kept, as {summary.samples:,} samples in {len(summary.shards):,} shards. "
        + (
            f"Look at {page}, then: diptych train {out / 'pairs'}"
            if summary.kept
            else f"{page} says why: change the step that drops them."
        )
    )
    return summary


def rewrite(
    source: Positional[str],
    *,
    out: Path,
    rewriting: RewriteConfig = RewriteConfig(),
    model: LanguageModelConfig = LanguageModelConfig(),
    rules: bool = False,
    limit: int | None = None,
    columns: Columns = Columns(),
    offline: bool = False,
) -> Path:
    """Rewrite captions with a language model, each rewrite with a verdict why it was kept or not; the same command goes on where it was stopped.

    Args:
        source: Samples with captions.
        out: A .parquet or .jsonl file, with the columns of the source and `rewrite`, `verdict` and `reason`, null unless a row has no caption.
        rewriting: What is rewritten, and how.
        model: Language model; SmolLM2-135M-Instruct from its pip package (extra `llm`) unless said otherwise.
        rules: Rewrite by rules instead, without a language model; styles are then `framed`, `reordered` and `both`.
        limit: Only the first rows.
        columns: What the columns of a table mean.
        offline: Never touch the network.
    """
    samples = open_source(source, columns=columns)
    with progress("rewriting captions", 0) as advance:
        table = rewrite_source(
            samples,
            out,
            config=rewriting,
            model=None if rules else model,
            limit=limit,
            offline=offline,
            advance=advance,
        )
    kept = sum(len(texts or ()) for texts in table["rewrite"].to_pylist())
    say(
        f"{kept:,} rewrites of {table.num_rows:,} rows are in {out}. Train with them: diptych train {out} --method laclip"
    )
    return out
