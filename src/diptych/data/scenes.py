"""Placeholder while being written."""

from diptych.data.sources import AbstractSource


def scenes(split: str) -> AbstractSource:
    """X."""
    raise NotImplementedError
