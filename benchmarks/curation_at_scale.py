"""What curating texts costs per million pairs here, and what a large run would then take: `diptych.curate.forecast` after two small runs.

Captions are those of the bundle raw-captions (`DIPTYCH_DATA`), as jsonl. Both runs take the default steps in one process, and CPU time is counted, so
a busy machine changes little; what is loaded once is in both, and cancels. Writes benchmarks/results/curation_at_scale.json and .md, and the
table in docs/curate.md.

    python benchmarks/curation_at_scale.py [--pairs 40000 120000] [--large 10000000000]
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from diptych.bench.curate import endless
from diptych.config import to_json
from diptych.curate.entries import word_lists
from diptych.curate.forecast import Seen, Stage, forecast
from diptych.curate.pipeline import CurateConfig, curate_source
from diptych.curate.shards import count_kept
from diptych.files import replace_between

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "curate.md"
PASSES = {"pass 1 of 3": "keys", "pass 2 of 3": "counts", "pass 3 of 3": "draws", "writing shards": "shards"}
START = "<!-- scale: written by benchmarks/curation_at_scale.py, not by hand -->"


def run(folder: Path, pairs: int) -> tuple[Seen, np.ndarray]:
    """Return what a run over so many captions has cost, and in how many pairs each entry stood."""
    source, out = folder / f"{pairs}.jsonl", folder / f"out-{pairs}"
    with source.open("w") as file:
        file.writelines(
            json.dumps({"id": f"p{i}", "caption": text}) + "\n" for i, text in enumerate(islice(endless(), pairs))
        )
    clock: dict[str, float] = {}
    size: dict[str, int] = {}
    found: dict[str, np.ndarray | int] = {}

    def look(title: str, total: int, done: int) -> None:
        """Note time and sizes when a pass begins: the one before has just ended."""
        del total, done
        if title in clock:
            return
        clock[title] = time.process_time()
        for number, before in enumerate(PASSES.values()):
            left = out / "work" / f"pass-{number}"
            if before not in size and left.exists() and title != list(PASSES)[number]:
                surveys = sum(path.stat().st_size for path in left.glob("*.survey.parquet"))
                size[f"{before} survey"] = surveys
                size[before] = sum(path.stat().st_size for path in left.glob(f"{'[0-9]' * 6}.parquet"))
                if before == "keys":
                    found["repeated"] = pq.read_table(left / "merged.parquet").num_rows
                if before == "counts":
                    found["matched"] = sum(count_kept(path) for path in left.glob(f"{'[0-9]' * 6}.parquet"))
                    found["counts"] = pq.read_table(left / "merged.parquet")["count"].to_numpy()

    summary = curate_source(str(source), out, CurateConfig(), advance=look)
    times = [*clock.values(), time.process_time()]
    seconds = dict(zip(PASSES.values(), np.diff(times).tolist(), strict=True))
    written = sum(path.stat().st_size for name in ("pairs", "reasons") for path in (out / name).iterdir())
    assert summary.pairs == pairs
    left = tuple(size[name] for name in ("keys", "counts", "draws"))
    seen = Seen(
        pairs,
        int(found["repeated"]),
        int(found["matched"]),
        source.stat().st_size,
        left,
        size["keys survey"],
        size["counts survey"],
        written,
        sum(map(len, word_lists(CurateConfig().match).values())),
        seconds,
    )
    return seen, np.asarray(found["counts"])


def table(seen: Seen, million: tuple[Stage, ...], large: tuple[Stage, ...], pairs: int) -> str:
    """Return both forecasts as Markdown."""
    total = sum(stage.core_hours for stage in large)
    lines = [
        f"Measured on {seen.pairs:,} captions ({seen.source / seen.pairs:.0f} bytes each), default steps, one core: "
        f"{sum(seen.seconds.values()) / seen.pairs * 1e6:.0f} CPU seconds per million pairs. Forecast for {pairs:,}:",
        "",
        "| pass | s per million | core-hours | workers read | and write | main process reads | and holds | each worker is told |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one, stage in zip(million, large, strict=True):
        sizes = (stage.read, stage.written, stage.gathered, stage.main_memory, stage.told)
        lines.append(
            f"| {stage.name} | {one.core_hours * 3600:.1f} | {stage.core_hours:,.0f} | {' | '.join(map(amount, sizes))} |"
        )
    moved = (sum(getattr(stage, name) for stage in large) for name in ("read", "written", "gathered"))
    lines.append(
        f"| all | {sum(stage.core_hours for stage in million) * 3600:.1f} | {total:,.0f} | {' | '.join(map(amount, moved))} | | |"
    )
    return "\n".join(lines)


def amount(size: float) -> str:
    """Return bytes in a unit that fits."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.3g} {unit}" if size < 1000 * factor else f"{size / factor:,.0f} {unit}"
    return f"{size:.0f} B" if size else "-"


def main() -> None:
    """Measure, and write both files and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs=2, default=[40_000, 120_000])
    parser.add_argument("--large", type=int, default=10_000_000_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (few, _), (many, counts) = (run(Path(folder), pairs) for pairs in given.pairs)
    more = many.pairs - few.pairs
    seconds = {name: (many.seconds[name] - few.seconds[name]) * many.pairs / more for name in many.seconds}
    seen = replace(many, seconds=seconds)
    million, large = (forecast(seen, counts, pairs) for pairs in (1_000_000, given.large))
    text = table(seen, million, large, given.large)
    record = {
        "seen": to_json(seen),
        "entries with matches": len(counts),
        "million": to_json(million),
        "pairs": given.large,
        "large": to_json(large),
    }
    (RESULTS / "curation_at_scale.json").write_text(json.dumps(record, indent=2) + "\n")
    (RESULTS / "curation_at_scale.md").write_text(text + "\n")
    replace_between(PAGE, START, "<!-- end of scale -->", text)
    print(text)


if __name__ == "__main__":
    main()
