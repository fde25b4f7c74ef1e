"""`rewrite`: better texts before training."""

from pathlib import Path

from tyro.conf import Positional

from diptych.commands.terminal import progress, say
from diptych.curate.language_model import LanguageModelConfig
from diptych.curate.rewrite import RewriteConfig, rewrite_source
from diptych.data.sources import Columns, open_source


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
    """Rewrite captions with a language model, each with a reason why it was kept or not; the same command goes on where it was stopped.

    Args:
        source: Samples with captions.
        out: A .parquet or .jsonl file, with the columns of the source and the columns `rewrite` and `reason`.
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
