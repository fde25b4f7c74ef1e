"""What commands say and show while they work: on the error stream, results go to the output."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from diptych.models.embedding import Advance
from diptych.training.prepare import choose_start

Item = TypeVar("Item")

CONSOLE = Console(stderr=True, soft_wrap=True, emoji=False)
"""Progress and remarks go to the error stream, results to the output. No emoji codes: `flickr8k:train:` is a name."""


def say(sentence: str) -> None:
    """Say a sentence as it stands."""
    CONSOLE.print(sentence, highlight=False, markup=False)


def chosen(model: str) -> str:
    """Return which model `auto` is here, and say so."""
    start, reason = choose_start(model)
    if start != model:
        say(reason)
    return start


def bars() -> Progress:
    """Return bars that are shown on a terminal and not in a file."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=CONSOLE, disable=not CONSOLE.is_terminal, transient=True)


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Show a bar on a terminal, nothing in a file."""
    with bars() as bar:
        task = bar.add_task(title, total=total or None)
        yield lambda done: bar.advance(task, done)


def advancing(items: Iterable[Item], advance: Advance) -> Iterator[Item]:
    """Yield items, moving a progress bar by one after each."""
    for item in items:
        yield item
        advance(1)
