"""Prompts made of an image's own look: a small projector turns what the layers of a frozen tower say of an image into vectors of a text.

A classifier under such prompts depends on the style of the image that it judges.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.data.parts import prompt
from diptych.models.dual import DualEncoder
from diptych.models.precision import Precision, autocast, choose_precision
from diptych.models.prompting import prompted_texts, slotted
from diptych.models.statistics import LayerStatistics
from diptych.types import Tokens, map_tensors


@dataclass(frozen=True)
class AbstractStylePrompts:
    """Settings of such prompts, for the configuration of a method that learns them.

    Attributes:
        hidden: Width between the two maps of the style; 256 in IP-CLIP.
        image_tokens: Times the content vector stands in the prompt; 4.
        domain_repeats: Times the style vectors do; 2.
        template: What follows them, `{}` for the class.
    """

    hidden: int = 256
    image_tokens: int = 4
    domain_repeats: int = 2
    template: str = "{}."


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
