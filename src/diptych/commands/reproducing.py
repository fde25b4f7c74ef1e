"""`reproduce`: a paper's claim beside its baseline and a control."""

from pathlib import Path
from typing import Literal

import torch
from tyro.conf import Positional

from diptych.claims.arms import update_arms
from diptych.claims.ledger import Result, update_readme, write_results
from diptych.claims.plot import plot_results
from diptych.claims.reproduce import reproduce_method
from diptych.claims.verdict import over_seeds
from diptych.commands.records import versions
from diptych.commands.terminal import CONSOLE, say
from diptych.errors import ConfigError, DiptychError, MissingExtraError
from diptych.methods import METHODS, load_method
from diptych.threads import usable_cores


def reproduce(
    slug: Positional[str | None] = None,
    *,
    seeds: int | None = None,
    profile: Literal["mini", "full"] = "mini",
    all: bool = False,
    processes: int | None = None,
    out: Path = Path("results"),
    log: Path = Path("runs/claims"),
) -> tuple[Result, ...]:
    """Run a method's claim against a baseline and a control over seeds, and say whether it holds here.

    Trials that are done are in a log: called again, the command goes on where it stopped. The result is `out`/<slug>.json with a plot beside
    it, a row in the ledger of the README.md beside `out`, and tables of all arms there and in docs/claims.md, where these have their comments.

    Args:
        slug: Method whose claim is run; `diptych methods` lists them.
        seeds: How many, at least three; as many as the claim says when absent.
        profile: `mini` is what claims are stated for, some ten minutes on two cores; `full` says what the paper's own setting needs.
        all: Run the claims of all methods that have one.
        processes: Trials at the same time, each with its share of the processors. As many as there are cores when absent, four at most; one
            where there is a GPU, which trials would share.
        out: Folder of results.
        log: Folder with one file per method and one line per finished trial; remove a file to run its trials again.

    Raises:
        PlannedMethodError: If there is no code for the method yet.
        ConfigError: If the method states no claim, or has none of that profile.
        TrainingError: If a trial breaks down.
    """
    if (slug is None) != all:
        raise ConfigError("Name one method, as in `diptych reproduce SLUG`, or say --all.")
    if slug is not None:
        return _reproduce(slug, seeds, profile, processes, out, log)
    results, failures = list[Result](), list[str]()
    for each in _with_claim():
        try:
            results += _reproduce(each, seeds, profile, processes, out, log)
        except DiptychError as error:  # the other methods need not wait for this one
            say(f"{each}: {error}")
            failures.append(each)
    if failures:
        raise ConfigError(
            f"Could not be run: {', '.join(failures)}. Each says why above; the results of others are in {out}."
        )
    return tuple(results)


def _reproduce(
    slug: str, seeds: int | None, profile: Literal["mini", "full"], processes: int | None, out: Path, log: Path
) -> tuple[Result, ...]:
    """Run the claims of one method, write what they found, and print it."""
    module = load_method(slug)
    if not hasattr(module, "claim"):
        raise ConfigError(
            f"{slug} states no claim that could be run. Methods that do: {', '.join(_with_claim()) or 'none'}."
        )
    if profile == "full" and not hasattr(module, "recipe"):
        raise ConfigError(
            f"The claim of {slug} is stated for profile mini only, and there is no recipe to train by hand."
        )
    if profile == "full":
        full = module.recipe()
        raise ConfigError(
            f"The claim of {slug} is stated for profile mini only. The paper's setting needs the paper's data and its hours of GPU: train "
            f"the recipe of {slug} ({full.epochs} epochs, batches of {full.data.batch_size * full.accumulate}, model {full.model.start}) with "
            f"`diptych train DATA --method {slug}`, the baseline likewise, over several seeds, and compare with `diptych evaluate --against`."
        )
    results = reproduce_method(
        slug,
        load_method,
        log=log / f"{slug}.jsonl",
        command=f"diptych reproduce {slug}" + (f" --seeds {seeds}" if seeds is not None else ""),
        versions=versions(),
        console=CONSOLE,
        seeds=seeds,
        processes=_own_processes() if processes is None else processes,
    )
    place = write_results(results, out)
    try:
        plot_results(results, place.with_suffix(".png"))
        say(f"Results are in {place}, the plot beside it.")
    except MissingExtraError as error:
        say(f"Results are in {place}. There is no plot: {error}")
    update_readme(out.parent / "README.md", out)
    for page in (out.parent / "README.md", out.parent / "docs" / "claims.md"):
        update_arms(page, out)
    for result in results:
        _print_result(result)
    return results


def _own_processes() -> int:
    return 1 if torch.cuda.is_available() else min(4, usable_cores())


def _with_claim() -> list[str]:
    """Return the methods that state a claim."""
    return [m.slug for m in METHODS.values() if m.state != "planned" and hasattr(load_method(m.slug), "claim")]


def _print_result(result: Result) -> None:
    say(f"{result.slug}, {result.name}: {result.verdict}")
    say(f"  the paper says: {result.claim}")
    for key, values in result.arms.items():
        part = key if key in ("baseline", "method", "control") else "further"
        seeds = ", ".join(f"{value:.3f}" for value in values)
        shown = f"  {result.samples[key]:,} samples shown" if result.samples[key] else ""
        say(f"  {part:9} {result.names[key]:32} {sum(values) / len(values):.3f}  ({seeds}){shown}")
        if noted := [f"{name} {over_seeds(arms[key])}" for name, arms in result.noted.items() if key in arms]:
            say(f"            {', '.join(noted)}")
    direction = "higher" if result.higher_is_better else "lower"
    say(
        f"  method minus baseline, paired over {len(result.seeds)} seeds: {result.difference} {result.metric} ({direction} is better)"
    )
    say(f"  control {'as' if result.control_check.passed else 'NOT as'} expected: {result.control_check.expected}")
