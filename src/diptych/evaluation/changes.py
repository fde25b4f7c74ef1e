"""What an audit does to images: noise, attacks, words, corruptions. Equal seeds and keys give equal images, whatever the other samples are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from diptych.data.corruptions import corrupt
from diptych.data.tokenizer import hash_strings
from diptych.data.typography import overlay
from diptych.evaluation.attack import Hits
from diptych.models.dual import DualEncoder
from diptych.models.embedding import eval_mode
from diptych.models.perturbation import LEVELS, AbstractPerturbation, as_floats, project
from diptych.models.pgd import PGDConfig, Views, ascend, random_start

Pixels = UInt8[Tensor, "n 3 h w"] | Float[Tensor, "n 3 h w"]
"""Images as the model sees them: 0 to 255, or in [0, 1]."""


@dataclass(frozen=True)
class Question:
    """What the images are asked.

    Attributes:
        answers: Captions, or names of classes.
        embeddings: Of the answers, normalised.
        right: Which answers are right for which image; there may be images without one.
        ask: From embeddings of the images to which of them get a right answer, by the name of the metric.
    """

    answers: tuple[str, ...]
    embeddings: Float[Tensor, "m d"]
    right: Bool[Tensor, "n m"]
    ask: Callable[[Float[Tensor, "n d"]], Mapping[str, Hits]]

    def wrong(self, row: int, rng: np.random.Generator) -> str:
        """Return a wrong answer for one image, each as likely as the others."""
        return self.answers[int(rng.choice(np.flatnonzero(~self.right[row].numpy())))]


@dataclass(frozen=True)
class Images:
    """What an audit changes.

    Attributes:
        pixels: As evaluation shows them.
        keys: Of the samples.
        seed: Of all that is random; with a key it says what is done to that image.
    """

    pixels: UInt8[Tensor, "n 3 h w"]
    keys: tuple[str, ...]
    seed: int

    def rng(self, row: int, stream: str) -> np.random.Generator:
        """Return the generator of one image for one purpose."""
        return np.random.default_rng(int(hash_strings([f"{self.seed}\n{stream}\n{self.keys[row]}"])[0]) % 2**63)

    def each(self, change: Callable[[int, np.ndarray], np.ndarray]) -> UInt8[Tensor, "n 3 h w"]:
        """Return the images, changed one by one as uint8 [h, w, 3]."""
        arrays = self.pixels.permute(0, 2, 3, 1).numpy()
        changed = np.stack([change(row, image) for row, image in enumerate(arrays)])
        return torch.from_numpy(changed).permute(0, 3, 1, 2).contiguous()


def with_noise(images: Images, question: Question, *, eps: float) -> Pixels:
    """Return images with eps up or down for each value by chance: the largest change that eps allows."""
    del question
    shape = images.pixels.shape[1:]
    signs = [images.rng(row, "noise").integers(2, size=shape) * 2 - 1 for row in range(len(images.keys))]
    clean = as_floats(images.pixels)
    return project(clean + eps / LEVELS * torch.from_numpy(np.stack(signs)).to(clean), clean, eps)


def attacked(
    images: Images, question: Question, *, model: DualEncoder, config: PGDConfig, batch_size: int
) -> Float[Tensor, "n 3 h w"]:
    """Return images whose `margin` is smaller: PGD from a random start, the model in eval mode."""
    clean, found = as_floats(images.pixels), list[Tensor]()
    embeddings = question.embeddings.to(model.device)
    for start in range(0, len(clean), batch_size):
        part = slice(start, start + batch_size)
        views, right = (clean[part].to(model.device),), question.right[part].to(model.device)

        def loss(moved: Views, right: Tensor = right) -> Tensor:
            return -margin(model.encode_image(moved[0]), embeddings, right).sum()

        with eval_mode(model):
            begun = random_start(views, images.keys[part], str(images.seed)) if config.eps else None
            found.append(ascend(loss, views, config, start=begun)[0].cpu())
    return torch.cat(found)


def margin(
    images: Float[Tensor, "n d"], answers: Float[Tensor, "m d"], right: Bool[Tensor, "n m"]
) -> Float[Tensor, " n"]:
    """Return the cosine of each image with its best right answer minus that with the best wrong one, above 0 where a right one is nearest.

    Source: Carlini and Wagner 2017, "Towards Evaluating the Robustness of Neural Networks", f_6 in section V-A, with cosines for logits.
    """
    cosines = images @ answers.T
    return cosines.masked_fill(~right, -2).amax(1) - cosines.masked_fill(right, -2).amax(1)


def perturbed(images: Images, question: Question, *, perturbation: AbstractPerturbation) -> Pixels:
    """Return images as an attack has learnt to change them."""
    del question
    with torch.no_grad():
        return perturbation.apply(as_floats(images.pixels))


def written_over(images: Images, question: Question, *, written: bool) -> Pixels:
    """Return images with wrong words in a box, or with the empty box."""

    def cover(row: int, image: np.ndarray) -> np.ndarray:
        words = question.wrong(row, images.rng(row, "words")).replace("_", " ")
        return overlay(image, words, images.rng(row, "box"), written=written)

    return images.each(cover)


def corrupted(images: Images, question: Question, *, kind: str, severity: int) -> Pixels:
    """Return images with one corruption."""
    del question
    return images.each(lambda row, image: corrupt(image, kind, severity, images.rng(row, f"{kind} {severity}")))
