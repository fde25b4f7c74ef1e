"""The four domains of PACS as the frozen towers of `lite0-minilm` see them: photos, paintings, cartoons and sketches of seven things."""

from collections.abc import Mapping
from functools import lru_cache
from statistics import fmean

from diptych.claims.claim import Trial
from diptych.claims.task_stream import START, parts
from diptych.data.bundles import class_names
from diptych.data.image_changes import ImageChange
from diptych.evaluation.protection import protection
from diptych.models.dual import DualEncoder
from diptych.models.seen import Labelled, labels_of, see, shown
from diptych.models.weights import load

DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
"""20, 8 and 12 images a class in the parts for training, validation and test."""


@lru_cache(maxsize=1)
def frozen_start() -> DualEncoder:
    """Return the model; not to be changed."""
    return load(START, offline=True).requires_grad_(False).eval()


@lru_cache(maxsize=1)
def domain_classes() -> tuple[str, ...]:
    """Return the names of the classes."""
    return class_names(parts(f"pacs:{DOMAINS[0]}")["train"])


@lru_cache
def domain(name: str, split: str, change: ImageChange = iter) -> Labelled:
    """Return a part of a domain, its images changed; the tower is asked once per process.

    Args:
        name: One of `DOMAINS`.
        split: `train`, `validation` or `test`.
        change: Of the images as evaluation shows them; a function of a module, as what was seen is remembered by it.
    """
    model, source = frozen_start(), parts(f"pacs:{name}")[split]
    return see(model, change(shown(model, source)), labels_of(source, domain_classes()))


def noted_protection(trial: Trial, authorised: str, plain: Mapping[str, float], found: Mapping[str, float]) -> float:
    """Return the mean W_ua of a domain against each other one, and note what it is made of.

    Args:
        trial: Of a claim.
        authorised: Domain in which the protected model works.
        plain: Accuracy of the model without protection in every domain.
        found: And of the protected one.
    """
    own = plain[authorised], found[authorised]
    pairs = {name: protection(own[0], plain[name], own[1], found[name]) for name in DOMAINS if name != authorised}
    trial.note(f"{authorised}: A_a", found[authorised])
    trial.note(f"{authorised}: D_a", fmean(pair.authorised_drop for pair in pairs.values()))
    for name, pair in pairs.items():
        trial.note(f"{authorised}: D_u {name}", pair.unauthorised_drop)
        trial.note(f"{authorised}: W_ua {name}", pair.weighted)
    return fmean(pair.weighted for pair in pairs.values())
