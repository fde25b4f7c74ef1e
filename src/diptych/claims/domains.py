"""The four domains of PACS as the frozen towers of `lite0-minilm` see them: photos, paintings, cartoons and sketches of seven things."""

from collections.abc import Callable, Iterable
from functools import lru_cache

from jaxtyping import UInt8
from torch import Tensor

from diptych.claims.task_stream import START, parts
from diptych.data.bundles import class_names
from diptych.models.dual import DualEncoder
from diptych.models.seen import Labelled, labels_of, see, shown
from diptych.models.weights import load

DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
"""20, 8 and 12 images a class in the parts for training, validation and test."""

Change = Callable[[Iterable[UInt8[Tensor, "3 h w"]]], Iterable[UInt8[Tensor, "3 h w"]]]
"""From images to others, one for one; a function of a module, as what was seen is remembered by it."""


@lru_cache(maxsize=1)
def frozen_start() -> DualEncoder:
    """Return the model; not to be changed."""
    return load(START, offline=True).requires_grad_(False).eval()


@lru_cache(maxsize=1)
def domain_classes() -> tuple[str, ...]:
    """Return the names of the classes."""
    return class_names(parts(f"pacs:{DOMAINS[0]}")["train"])


@lru_cache
def domain(name: str, split: str, change: Change = iter) -> Labelled:
    """Return a part of a domain, its images changed; the tower is asked once per process.

    Args:
        name: One of `DOMAINS`.
        split: `train`, `validation` or `test`.
        change: Of the images as evaluation shows them.
    """
    model, source = frozen_start(), parts(f"pacs:{name}")[split]
    return see(model, change(shown(model, source)), labels_of(source, domain_classes()))
