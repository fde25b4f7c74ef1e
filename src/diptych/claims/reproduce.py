"""Runs a method's claims: choose every arm's grid point on the validation split, then arms x seeds on the test split, then the verdict.

Arms are on equal terms: grids of one size, chosen with the same seed and the same number of tries; the same seeds after that. The test
split is not touched before every arm has its point. Trials run in this process or in several, where one runs the arms of a seed, which may
share what they train.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from diptych.claims.claim import Arm, Claim, Part
from diptych.claims.ledger import ControlCheck, Hashes, Result, Search
from diptych.claims.trials import Bench, Log, Outcome, Split
from diptych.claims.verdict import decide, paired_over_seeds
from diptych.claims.workers import Job, Run, open_workers, spread
from diptych.config import fingerprint
from diptych.errors import ConfigError, TrainingError

LEAST_SEEDS = 3
PARTS: tuple[Part, ...] = ("baseline", "method", "control")

Point = Mapping[str, Any]
Plan = tuple[Claim, tuple[int, ...]]
"""A claim and its seeds."""
Measure = Callable[[Run, Claim, Arm, int, Split, Point], Outcome]
"""Takes a trial from the log, or has it run."""


@dataclass(frozen=True)
class ArmRuns:
    """What one arm did.

    Attributes:
        arm: Which one.
        tried: Every point of its grid on the validation split; empty where there was nothing to choose.
        point: The chosen one.
        tested: The trials that count, in the order of the seeds.
    """

    arm: Arm
    tried: list[Outcome]
    point: Point
    tested: list[Outcome]

    @property
    def key(self) -> str:
        """Return what the arm is called in a result."""
        return self.arm.name if self.arm.part == "further" else self.arm.part

    @property
    def numbers(self) -> list[float]:
        """Return the metric, one number per seed. A test trial that breaks down raises, so none is missing."""
        return [outcome.value for outcome in self.tested if outcome.value is not None]


def reproduce_method(
    slug: str,
    modules: Callable[[str], ModuleType],
    *,
    log: Path,
    command: str,
    versions: Mapping[str, str],
    console: Console,
    seeds: int | None = None,
    processes: int = 1,
) -> tuple[Result, ...]:
    """Return the result of each claim of a method. Trials that are in `log` are not run again.

    Args:
        slug: Of the method, whose module has `claim()`.
        modules: Returns the module of a method by its slug.
        log: File with one line per finished trial; made when absent.
        command: For the record.
        versions: Of packages, for the record; a logged trial of other versions is run again.
        console: Where progress is shown.
        seeds: How many; those of each claim when absent, and the next whole numbers behind them where it has fewer.
        processes: That run trials at the same time. 1 runs them in this process; more are begun anew (`spawn`), need a `modules` that can be
            pickled, and share the processors, so that numbers differ by the rounding of fewer threads.

    Raises:
        ConfigError: If the claims are not stated as they must be, `seeds` is less than three, or `processes` less than one.
        TrainingError: If a trial breaks down on the test split, or all tries of an arm do on the validation split.
    """
    if processes < 1:
        raise ConfigError(f"Trials need at least one process, not {processes}.")
    claims: tuple[Claim, ...] = modules(slug).claim()
    check(claims, slug)
    plans = [(claim, seeds_of(claim, seeds)) for claim in claims]
    bench, done, turn = Bench(modules, versions), Log(log), Lock()
    with _display(slug, sum(_trials(*plan) for plan in plans), console) as screen:

        def measure(run: Run, claim: Claim, arm: Arm, seed: int, split: Split, point: Point) -> Outcome:
            screen.start(claim, arm, seed, split)
            with turn:  # two threads must not parse code at once: CPython 3.11 mixes up how deep they are
                outcome = done.find(claim, arm, seed, split, point)
                logged = outcome is not None and bench.holds(outcome, claim)
            if outcome is None or not logged:
                outcome = run(claim, arm, seed, split, point)
                with turn:
                    done.keep(outcome)
            screen.done(outcome, logged=logged)
            return outcome

        if processes == 1:
            runs = _run_arms(plans, measure, lambda jobs: [job(bench.run) for job in jobs])
        else:
            with open_workers(processes, slug, modules, versions) as workers:
                runs = _run_arms(plans, measure, partial(spread, workers=workers))
    return tuple(_result(*plan, own, command, versions) for plan, own in zip(plans, runs, strict=True))


def check(claims: Sequence[Claim], slug: str) -> None:
    """Raise ConfigError unless the arms of every claim are what they must be, and on equal terms."""
    if not claims or len({claim.name for claim in claims}) < len(claims):
        raise ConfigError(f"claim() of {slug} must return claims of different names; it returned {len(claims)}.")
    for claim in claims:
        where = f"The claim {claim.name!r} of {slug}"
        parts, names = [arm.part for arm in claim.arms], [arm.name for arm in claim.arms]
        sizes = {arm.name: len(arm.grid) for arm in claim.arms}
        if claim.slug != slug:
            raise ConfigError(f"{where} says that it is of {claim.slug!r}.")
        for part in PARTS:
            if parts.count(part) != 1:
                raise ConfigError(f"{where} needs one arm that is its {part}; it has {parts.count(part)}.")
        further = {arm.name for arm in claim.arms if arm.part == "further"}
        if len(set(names)) < len(names) or further & set(PARTS):
            raise ConfigError(
                f"{where} needs arms of different names, no further one called {', '.join(PARTS)}; it has {names}."
            )
        if len(set(sizes.values())) > 1 or not min(sizes.values()):
            raise ConfigError(f"{where} must give every arm as many points to choose from; the grids hold {sizes}.")
        for arm in claim.arms:
            if len(set(map(fingerprint, arm.grid))) < len(arm.grid):
                raise ConfigError(f"{where} has a point twice in the grid of {arm.name}: that is one try, not two.")
        if len(set(claim.seeds)) < max(LEAST_SEEDS, len(claim.seeds)):
            raise ConfigError(f"{where} needs at least {LEAST_SEEDS} different seeds; it has {claim.seeds}.")


def seeds_of(claim: Claim, count: int | None) -> tuple[int, ...]:
    """Return the first `count` seeds of a claim, and whole numbers behind its largest where it has fewer; all of its own when None.

    Raises:
        ConfigError: If `count` is less than three.
    """
    if count is None:
        return claim.seeds
    if count < LEAST_SEEDS:
        raise ConfigError(f"A verdict needs at least {LEAST_SEEDS} seeds, not {count}.")
    behind = max(claim.seeds) + 1
    return (*claim.seeds, *range(behind, behind + count))[:count]


def _trials(claim: Claim, seeds: tuple[int, ...]) -> int:
    tries = len(claim.arms[0].grid)
    return len(claim.arms) * ((tries if tries > 1 else 0) + len(seeds))


def _run_arms(
    plans: Sequence[Plan], measure: Measure, do: Callable[[Sequence[Job]], list[list[Outcome]]]
) -> list[list[ArmRuns]]:
    """Return what the arms of every claim did, in the order baseline, method, control, further.

    First the grids, an arm at a time; then the tests, a seed at a time, so that pairs are close in time.
    """
    grids = [(claim, arm, seeds[0]) for claim, seeds in plans for arm in claim.arms]
    tried = do([partial(_try_grid, *grid, measure) for grid in grids])
    chosen = {
        (claim.name, arm.name): (outcomes, _best(claim, arm, outcomes))
        for (claim, arm, _), outcomes in zip(grids, tried, strict=True)
    }
    rounds = [(claim, seed) for claim, seeds in plans for seed in seeds]
    points = {key: point for key, (_, point) in chosen.items()}
    tested = do([partial(_test_arms, claim, seed, points, measure) for claim, seed in rounds])
    runs = []
    for claim, _ in plans:
        by_seed = [outcomes for (asked, _), outcomes in zip(rounds, tested, strict=True) if asked is claim]
        own = [
            ArmRuns(arm, *chosen[claim.name, arm.name], list(outcomes))
            for arm, outcomes in zip(claim.arms, zip(*by_seed, strict=True), strict=True)
        ]
        runs.append(sorted(own, key=lambda run: (*PARTS, "further").index(run.arm.part)))
    return runs


def _result(
    claim: Claim, seeds: tuple[int, ...], runs: Sequence[ArmRuns], command: str, versions: Mapping[str, str]
) -> Result:
    numbers = {run.key: run.numbers for run in runs}
    difference = paired_over_seeds(numbers["baseline"], numbers["method"])
    passed = bool(claim.control.passed({part: numbers[part] for part in PARTS}))
    everything = [outcome for run in runs for outcome in (*run.tried, *run.tested)]
    return Result(
        slug=claim.slug,
        name=claim.name,
        claim=claim.claim,
        setting=claim.setting,
        metric=claim.metric,
        higher_is_better=claim.higher_is_better,
        seeds=seeds,
        arms=numbers,
        names={run.key: run.arm.name for run in runs},
        difference=difference,
        control_check=ControlCheck(claim.control.expected, passed),
        verdict=decide(difference, control_passed=passed, higher_is_better=claim.higher_is_better),
        search=Search(
            seed=seeds[0],
            tries=len(claim.arms[0].grid),
            chosen={run.key: dict(run.point) for run in runs},
            scores={run.key: [outcome.value for outcome in run.tried] for run in runs},
        ),
        samples={run.key: round(sum(outcome.samples for outcome in run.tested) / len(seeds)) for run in runs},
        minutes=round(sum(outcome.seconds for outcome in everything) / 60, 2),
        command=command,
        versions=dict(versions),
        hashes=Hashes(
            code={slug: version for outcome in everything for slug, version in outcome.code.items()},
            recipes={run.key: sorted({recipe for outcome in run.tested for recipe in outcome.recipes}) for run in runs},
            data={run.key: sorted({data for outcome in run.tested for data in outcome.data}) for run in runs},
            sources=dict(everything[0].sources),
        ),
        noted=_noted(runs),
        ours=claim.ours,
    )


def _noted(runs: Sequence[ArmRuns]) -> dict[str, dict[str, list[float]]]:
    """Return the further numbers that every trial of an arm noted."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for name in run.tested[0].noted:
            if all(name in outcome.noted for outcome in run.tested):
                found.setdefault(name, {})[run.key] = [outcome.noted[name] for outcome in run.tested]
    return found


def _try_grid(claim: Claim, arm: Arm, seed: int, measure: Measure, run: Run) -> list[Outcome]:
    """Return the outcome of every point of an arm's grid on the validation split; none where there is nothing to choose."""
    if len(arm.grid) == 1:
        return []
    return [measure(run, claim, arm, seed, "validation", point) for point in arm.grid]


def _test_arms(
    claim: Claim, seed: int, points: Mapping[tuple[str, str], Point], measure: Measure, run: Run
) -> list[Outcome]:
    """Return the outcome of every arm at its point on the test split."""
    return [measure(run, claim, arm, seed, "test", points[claim.name, arm.name]) for arm in claim.arms]


def _best(claim: Claim, arm: Arm, tried: Sequence[Outcome]) -> Point:
    """Return the point with the best outcome, the first of equals.

    Raises:
        TrainingError: If every try broke down.
    """
    if not tried:
        return arm.grid[0]
    sign = 1.0 if claim.higher_is_better else -1.0
    scores = [-math.inf if outcome.value is None else sign * outcome.value for outcome in tried]
    if max(scores) == -math.inf:
        raise TrainingError(f"All {len(tried)} tries of {arm.name} ({claim.slug}, {claim.name}) broke down.")
    return arm.grid[scores.index(max(scores))]


class _Display:
    """One bar over all trials of a method that says what is running, and a line for each that is done."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def start(self, claim: Claim, arm: Arm, seed: int, split: Split) -> None:
        """Say what is running."""
        self._progress.update(self._task, description=f"{claim.slug}, {claim.name}: {arm.name}, seed {seed}, {split}")

    def done(self, outcome: Outcome, *, logged: bool) -> None:
        """Say what came out."""
        point = f" {dict(outcome.changes)}" if outcome.changes else ""
        value = "broke down" if outcome.value is None else f"{outcome.value:.4f}"
        self._progress.console.print(
            f"  {outcome.claim}: {outcome.arm}{point}, seed {outcome.seed}, {outcome.split}: {value} "
            f"({'from the log' if logged else f'{outcome.seconds:.1f} s'})",
            highlight=False,
            markup=False,
        )
        self._progress.advance(self._task)


@contextmanager
def _display(title: str, total: int, console: Console) -> Iterator[_Display]:
    """Show a progress bar over `total` trials while the context is open."""
    description = TextColumn("{task.description}", markup=False)
    columns = (description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield _Display(progress, progress.add_task(title, total=total))
