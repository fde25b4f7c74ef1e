"""Contrastive vision-language learning, from raw image-text pairs to an audited model in use.

Importing this package imports nothing heavy: every public name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diptych import methods as methods
    from diptych.commands import convert as convert
    from diptych.commands import demo as demo
    from diptych.commands import doctor as doctor
    from diptych.commands import embed as embed
    from diptych.commands import evaluate as evaluate
    from diptych.commands import reproduce as reproduce
    from diptych.commands import rewrite as rewrite
    from diptych.commands import search as search
    from diptych.commands import train as train
    from diptych.data.sources import AbstractSource as AbstractSource
    from diptych.data.sources import Columns as Columns
    from diptych.data.sources import open_source as open_source
    from diptych.errors import DiptychError as DiptychError
    from diptych.evaluation.run import compare as compare
    from diptych.evaluation.run import evaluate_model as evaluate_model
    from diptych.methods import METHODS as METHODS
    from diptych.methods import load_method as load_method
    from diptych.models.build import DualConfig as DualConfig
    from diptych.models.build import build as build
    from diptych.models.dual import DualEncoder as DualEncoder
    from diptych.models.embedding import embed_images as embed_images
    from diptych.models.embedding import embed_texts as embed_texts
    from diptych.models.weights import load as load
    from diptych.training.recipe import Recipe as Recipe
    from diptych.types import Batch as Batch
    from diptych.types import Encoded as Encoded
    from diptych.types import Interval as Interval
    from diptych.types import Losses as Losses
    from diptych.types import PairEmbeddings as PairEmbeddings
    from diptych.types import Sample as Sample
    from diptych.types import Text as Text
    from diptych.types import Tokens as Tokens
    from diptych.verbs import AbstractObjective as AbstractObjective

_HOME = {
    "diptych.commands": ("convert", "demo", "doctor", "embed", "evaluate", "reproduce", "rewrite", "search", "train"),
    "diptych.data.sources": ("AbstractSource", "Columns", "open_source"),
    "diptych.errors": ("DiptychError",),
    "diptych.evaluation.run": ("compare", "evaluate_model"),
    "diptych.methods": ("METHODS", "load_method"),
    "diptych.models.build": ("DualConfig", "build"),
    "diptych.models.dual": ("DualEncoder",),
    "diptych.models.embedding": ("embed_images", "embed_texts"),
    "diptych.models.weights": ("load",),
    "diptych.training.recipe": ("Recipe",),
    "diptych.types": ("Batch", "Encoded", "Interval", "Losses", "PairEmbeddings", "Sample", "Text", "Tokens"),
    "diptych.verbs": ("AbstractObjective",),
}

__all__ = sorted(["methods", *(name for names in _HOME.values() for name in names)])


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name == "methods":
        return import_module("diptych.methods")
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'diptych' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
