"""Prompts made of an image's own look: a small projector turns what the layers of a frozen tower say of an image into vectors of a text.

A classifier under such prompts depends on the style of the image that it judges.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.config import from_json, to_json
from diptych.data.parts import prompt
from diptych.data.sources import AbstractSource
from diptych.models.attachment import read_attachment, save_attachment
from diptych.models.dual import DualEncoder
from diptych.models.embedding import inference
from diptych.models.precision import Precision, autocast, choose_precision
from diptych.models.prompting import prompted_texts, slotted
from diptych.models.seen import Labelled, Seen, look, see
from diptych.models.statistics import LayerStatistics
from diptych.types import Batch, Tokens, map_tensors

AT_ONCE = 32
"""Images whose prompts are read together; as many times the number of classes go through the text tower."""


@dataclass(frozen=True)
class AbstractStylePrompts:
    """Settings of such prompts, for the configuration of a method that learns them.

    Attributes:
        method: Slug of the method, for what is saved.
        hidden: Width between the two maps of the style; 256 in IP-CLIP.
        image_tokens: Times the content vector stands in the prompt; 4.
        domain_repeats: Times the style vectors do; 2.
        template: What follows them, `{}` for the class.
        precision: Of the towers.
    """

    method: ClassVar[str]
    hidden: int = 256
    image_tokens: int = 4
    domain_repeats: int = 2
    template: str = "{}."
    precision: Precision = "auto"


C = TypeVar("C", bound=AbstractStylePrompts)


@dataclass(frozen=True)
class Context:
    """Vectors of a prompt.

    Attributes:
        vectors: All of them, in their order.
        domain: The style vectors once, one per layer.
    """

    vectors: Float[Tensor, "b c w"]
    domain: Float[Tensor, "b l w"]


class Projector(nn.Module, Generic[C]):
    """From the statistics of an image's layers to the vectors of its prompt, linearly, with the shapes of IP-CLIP's official code.

    Style vectors v_l = A'_l A_l (mu_l + sigma_l) / 2, one per layer; one content vector w = sum_l c_l B_l mu_l.

    Attributes:
        config: All settings.
    """

    def __init__(self, widths: Sequence[int], text_width: int, config: C) -> None:
        """Draw the maps.

        Args:
            widths: Of the layers.
            text_width: Of the text tower's tokens.
            config: Gives the numbers of tokens.
        """
        super().__init__()
        self.config = config
        self.style_in = nn.ModuleList(nn.Linear(width, config.hidden) for width in widths)
        self.style_out = nn.ModuleList(nn.Linear(config.hidden, text_width) for _ in widths)
        self.content = nn.ModuleList(nn.Linear(width, text_width) for width in widths)
        self.over_layers = nn.Linear(len(widths), 1)

    @property
    def slots(self) -> int:
        """Return the number of vectors in a prompt."""
        return self.config.domain_repeats * len(self.content) + self.config.image_tokens

    def forward(self, statistics: LayerStatistics) -> Context:
        """Return the vectors of each image's prompt."""
        pairs = list(zip(statistics.means, statistics.deviations, strict=True))
        styles = [(mean + deviation) / 2 for mean, deviation in pairs]
        maps = zip(self.style_in, self.style_out, styles, strict=True)
        domain = torch.stack([last(first(style)) for first, last, style in maps], 1)
        contents = [project(mean) for project, (mean, _) in zip(self.content, pairs, strict=True)]
        image = self.over_layers(torch.stack(contents, -1)).mT  # [b 1 w]
        vectors = [domain] * self.config.domain_repeats + [image] * self.config.image_tokens
        return Context(torch.cat(vectors, 1), domain)

    def names_of(self, model: DualEncoder, classes: Sequence[str]) -> Tokens:
        """Return the names of classes with slots for the vectors, on the model's device."""
        texts = [prompt(name, self.config.template) for name in classes]
        return map_tensors(lambda tensor: tensor.to(model.device), slotted(model.tokenizer, texts, self.slots))


@dataclass(frozen=True)
class Prompted:
    """What the prompts of images say.

    Attributes:
        texts: L2-normalised embedding of each class under each image's prompt.
        domain: Style vectors in it.
    """

    texts: Float[Tensor, "b k d"]
    domain: Float[Tensor, "b l w"]

    def logits(self, embedding: Float[Tensor, "b d"], scale: Float[Tensor, ""] | float) -> Float[Tensor, "b k"]:
        """Return s <f, t_c>, each image with the texts of its own prompt."""
        return scale * torch.einsum("bd,bkd->bk", embedding, self.texts)


def prompted(
    model: DualEncoder, names: Tokens, projector: Projector[C], statistics: LayerStatistics, precision: Precision
) -> Prompted:
    """Return what the prompts of images say. The text tower is asked for every class of every image.

    Args:
        model: Frozen.
        names: From `Projector.names_of`.
        projector: Gets gradients.
        statistics: Of the images' layers.
        precision: Of the text tower.
    """
    context = projector(statistics)
    chosen, _ = choose_precision(precision, model.device)
    with autocast(chosen, model.device):
        texts = prompted_texts(model, names, context.vectors)
    return Prompted(texts, context.domain)


def without_style(projector: Projector[C]) -> Projector[C]:
    """Return a copy whose style vectors are zeros: what is left is the same prompt for every look."""
    copy = deepcopy(projector)
    for layer in copy.style_out:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    return copy


class StyleClassifier(nn.Module, Generic[C]):
    """Classifies images by prompts that are made of the images themselves.

    Attributes:
        model: Frozen.
        projector: What was learnt.
        classes: Names, in the order of the logits.
        names: Their tokens, with slots.
    """

    def __init__(self, model: DualEncoder, projector: Projector[C], classes: Sequence[str]) -> None:
        super().__init__()
        self.model, self.projector, self.classes = model, projector, tuple(classes)
        self.names = projector.names_of(model, self.classes)

    def forward(self, batch: Batch) -> Float[Tensor, "b k"]:
        """Return logits over the classes for the main view of a batch."""
        with inference(self.model, self.projector.config.precision):
            seen = look(self.model, batch.images[0])
        return self.logits(map_tensors(torch.clone, seen))

    def logits(self, seen: Seen) -> Float[Tensor, "n k"]:
        """Return logits of images that the tower has seen."""
        found, precision = [], self.projector.config.precision
        with inference(self.model):
            for rows in torch.arange(len(seen.embedding)).split(AT_ONCE):
                part = map_tensors(partial(torch.index_select, dim=0, index=rows.to(self.model.device)), seen)
                said = prompted(self.model, self.names, self.projector, part.statistics, precision)
                found.append(said.logits(part.embedding, self.model.scale))
        return torch.cat(found)

    def correct(self, data: Labelled) -> Float[np.ndarray, " n"]:
        """Return 1.0 for every image whose class is nearest, else 0.0."""
        return (self.logits(data.seen).argmax(1) == data.label).double().cpu().numpy()

    def exam(self, source: AbstractSource) -> Labelled:
        """Return what the tower says of labelled samples, for `correct`; see `see`.

        Raises:
            DataError: If a sample has none of the classes.
            ImageError: If no image can be read.
        """
        return see(self.model, source, self.classes, precision=self.projector.config.precision)

    def without_style(self) -> "StyleClassifier[C]":
        """Return a classifier whose style vectors are zeros, see `without_style`."""
        return StyleClassifier(self.model, without_style(self.projector), self.classes)

    def save(self, folder: Path) -> None:
        """Write what was learnt, without the towers."""
        record = {
            "method": self.projector.config.method,
            "config": to_json(self.projector.config),
            "classes": self.classes,
            "widths": [layer.in_features for layer in self.projector.content],
        }
        save_attachment(folder, self.projector, record, self.model)


def read_style_classifier(folder: Path, model: DualEncoder, config: type[C]) -> StyleClassifier[C]:
    """Return what `StyleClassifier.save` wrote.

    Args:
        folder: Where it is.
        model: The one that it was learnt on; it is frozen and put in eval mode.
        config: Type of the projector's settings.

    Raises:
        CheckpointError: If there is nothing to read, or it was learnt on another model.
    """
    record, weights = read_attachment(folder, model, needs=("config", "classes", "widths"))
    projector = Projector(record["widths"], model.text.width, from_json(config, record["config"]))
    projector.load_state_dict(weights)
    return StyleClassifier(model.requires_grad_(False).eval(), projector.to(model.device), record["classes"])
