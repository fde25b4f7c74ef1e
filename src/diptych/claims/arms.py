"""Every arm of a result beside the method: what each version has more or less of. The verdict does not depend on it."""

from collections.abc import Sequence
from pathlib import Path

from diptych.claims.ledger import Result, markdown_table, read_all
from diptych.claims.verdict import over_seeds, paired_over_seeds
from diptych.files import replace_between
from diptych.types import Interval
from diptych.use.report import Comparison


def compare(result: Result) -> Comparison:
    """Return the method and then every other arm, with arm minus method, paired over seeds."""
    method = result.arms["method"]
    rows: list[tuple[str, Interval, Interval | None]] = [(result.names["method"], over_seeds(method), None)]
    for key, values in result.arms.items():
        if key != "method":
            rows.append((result.names[key], over_seeds(values), paired_over_seeds(method, values)))
    direction = "" if result.higher_is_better else ", lower is better"
    lead = (
        f"{result.setting} Metric: {result.metric}{direction}; mean over {len(result.seeds)} seeds, and the difference to "
        f'"{result.names["method"]}", paired over seeds, with 95 % intervals. {told_apart(rows, higher_is_better=result.higher_is_better)} '
        f"Command: {result.command}; {result.minutes:.0f} minutes."
    )
    return Comparison(f"{result.slug}, {result.name}", lead, rows)


def told_apart(rows: Sequence[tuple[str, Interval, Interval | None]], *, higher_is_better: bool = True) -> str:
    """Return in sentences which arms the intervals of their differences place below the method, which above, and which neither.

    Each interval is one of 95 %; of twenty versions that change nothing, one is placed by chance.
    """
    below, above, neither = list[str](), list[str](), list[str]()
    for name, _, difference in rows:
        if difference is not None:
            (below if difference.high < 0 else above if difference.low > 0 else neither).append(name)
    worse, better = (below, above) if higher_is_better else (above, below)
    found = (("Worse", worse), ("Better", better), ("Not told apart", neither))
    return " ".join(f"{word}: {'; '.join(names)}." for word, names in found if names)


def markdown(result: Result) -> str:
    """Return the comparison as text for a page."""
    comparison = compare(result)
    head = ("arm", result.metric, "difference to the method")
    rows = [
        (name, str(value), "" if difference is None else difference.signed())
        for name, value, difference in comparison.rows
    ]
    return f"**{comparison.title}.** {comparison.lead}\n\n{markdown_table(head, rows)}"


def update_arms(page: Path, folder: Path) -> None:
    """Put comparisons between their two comments in a page: those of one method by its slug, or of `all` claims that have further arms.

    Args:
        page: A page without such comments stays as it is.
        folder: Of results.
    """
    results = read_all(folder)
    wide = [result for result in results if len(result.arms) > 3]
    sections = {"all": wide} | {slug: [r for r in results if r.slug == slug] for slug in {r.slug for r in results}}
    for name, own in sections.items():
        start, end = marks(name)
        replace_between(page, start, end, "\n\n".join(map(markdown, own)) or "No claim has been run yet.")


def marks(name: str) -> tuple[str, str]:
    """Return the comments between which the comparisons of a method stand, or those of `all`."""
    start = f"<!-- arms of {name}: written by `diptych reproduce` from results/, not by hand -->"
    return start, f"<!-- end of the arms of {name} -->"
