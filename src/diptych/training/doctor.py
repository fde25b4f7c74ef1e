"""The pre-flight check: what is wrong with the data, and can this model learn from them at all? Plain sentences, no jargon."""

import copy
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float

from diptych.data.images import decode
from diptych.data.loader import Loader
from diptych.data.sources import AbstractSource
from diptych.data.tokenizer import Tokenizer
from diptych.errors import ImageError
from diptych.models.modes import train_mode
from diptych.training.features import with_outputs
from diptych.training.step import accumulate_gradients, to_device
from diptych.types import Batch, Encoded, rows
from diptych.verbs import AbstractObjective

LIMIT = 2000
"""Images decoded at most; larger sources are sampled evenly."""
OVERFIT_SAMPLES, OVERFIT_STEPS = 32, 40

Level = Literal["good", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: `error` means that training makes no sense before it is mended.
        sentence: What was found, and what to do about it.
    """

    level: Level
    sentence: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings about a source, and about a model on it."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Return whether there is no error."""
        return all(finding.level != "error" for finding in self.findings)


def examine_source(source: AbstractSource, tokenizer: Tokenizer, batch_size: int) -> list[Finding]:
    """Return what is good and bad about the samples by themselves."""
    checked = np.unique(np.linspace(0, len(source) - 1, min(LIMIT, len(source))).round().astype(int)).tolist()
    part = "" if len(checked) == len(source) else f" (looked at {len(checked):,} of them)"
    findings = [Finding("good", f"{len(source):,} samples{part}.")]
    texts = [
        [text.text for text in source.texts(index) if text.role != "hard_negative" and tokenizer.clean(text.text)]
        for index in checked
    ]
    return findings + _examine_images(source, checked) + _examine_texts(texts, tokenizer, batch_size)


def _examine_images(source: AbstractSource, checked: Sequence[int]) -> list[Finding]:
    thumbnails, unreadable, tiny = [], [], 0
    for index in checked:
        try:
            sample = source[index]
            image = decode(sample.image if sample.image is not None else b"")
        except ImageError as error:
            unreadable.append(f"sample {index}: {error}")
            continue
        tiny += min(image.size) < 16
        thumbnails.append(np.asarray(image.resize((8, 8)), dtype=np.float32).ravel() / 255)
    findings = []
    if unreadable:
        level: Level = "error" if len(unreadable) > len(checked) / 2 else "warning"
        findings.append(
            Finding(level, f"{len(unreadable)} images cannot be read and will be skipped. First, {unreadable[0]}")
        )
    else:
        findings.append(Finding("good", "All images can be read."))
    if tiny:
        findings.append(
            Finding("warning", f"{tiny} images have a side under 16 pixels; little can be learnt from them.")
        )
    if thumbnails and (twins := near_identical(np.stack(thumbnails))):
        findings.append(
            Finding(
                "warning",
                f"{twins} images look almost like an earlier one. If their captions differ, each is a false negative.",
            )
        )
    return findings


def near_identical(thumbnails: Float[np.ndarray, "n p"], threshold: float = 0.01) -> int:
    """Return how many rows have an earlier row within `threshold` root mean square difference, pixels in [0, 1]."""
    squared = (thumbnails**2).mean(1)
    distance = squared[:, None] + squared - 2 * thumbnails @ thumbnails.T / thumbnails.shape[1]
    return int((np.tril(distance < threshold**2, -1)).any(1).sum())


def _examine_texts(texts: Sequence[Sequence[str]], tokenizer: Tokenizer, batch_size: int) -> list[Finding]:
    findings = []
    if without := sum(not group for group in texts):
        level: Level = "error" if without == len(texts) else "warning"
        findings.append(Finding(level, f"{without} samples have no text and will be skipped."))
    flat = [text for group in texts for text in group]
    if not flat:
        return findings
    longest = tokenizer.policy.length
    lengths = tokenizer.lengths(flat)
    if cut := sum(length > longest for length in lengths):
        findings.append(
            Finding(
                "warning",
                f"{cut} of {len(flat)} texts are longer than {longest} tokens (longest {max(lengths)}) and will be cut at the end.",
            )
        )
    else:
        findings.append(Finding("good", f"All texts fit: at most {max(lengths)} of {longest} tokens."))
    repeated = expected_repeats([group[0] for group in texts if group], batch_size)
    if repeated >= 1:
        findings.append(
            Finding(
                "warning",
                f"A batch of {batch_size} holds about {repeated:.0f} samples whose caption another one also has. "
                "They count as positives of each other.",
            )
        )
    return findings


def expected_repeats(captions: Iterable[str], batch_size: int) -> float:
    """Return how many samples of a random batch share their caption with another one in it, on average."""
    counts = Counter(captions)
    total = sum(counts.values())
    batch_size = min(batch_size, total)
    if total < 2:
        return 0.0
    # P(no other sample of the batch has my caption) = C(total - c, b - 1) / C(total - 1, b - 1)
    alone = {
        count: math.prod(max(0, total - count - i) / (total - 1 - i) for i in range(batch_size - 1))
        for count in set(counts.values())
    }
    return sum(count * (1 - alone[count]) for count in counts.values()) / total * batch_size


def examine_training(objective: AbstractObjective[Encoded], loader: Loader) -> list[Finding]:
    """Return whether a copy of the objective starts sanely and can learn one small batch by heart.

    The original and the position of the loader are left alone.
    """
    position = loader.position
    batch = to_device(next(iter(loader)), objective.model.device)
    loader.position = position
    findings = [_examine_start(objective, batch)]
    if len(batch) < 2:
        return [
            *findings,
            Finding("error", "A batch holds one sample, so there is nothing to contrast. Use a larger batch."),
        ]
    first, last = overfit(copy.deepcopy(objective), rows(batch, 0, min(OVERFIT_SAMPLES, len(batch))))
    if last < 0.7 * first or last < 0.1:
        findings.append(
            Finding(
                "good",
                f"One small batch can be learnt by heart: loss {first:.2f} to {last:.2f} in {OVERFIT_STEPS} steps.",
            )
        )
    else:
        findings.append(
            Finding(
                "warning",
                f"One small batch could not be learnt by heart (loss {first:.2f} to {last:.2f} in {OVERFIT_STEPS} steps). "
                "Are images and texts matched, and is anything trained (model.vision_mode, model.text_mode)?",
            )
        )
    return findings


def _examine_start(objective: AbstractObjective[Encoded], batch: Batch) -> Finding:
    """Return how the first loss and the spread of the first embeddings look."""
    objective.eval()
    with torch.inference_mode():
        loss = objective(batch).total.item()
        image = objective.model.encode_image(batch.images[0])
    train_mode(objective)
    similar = ((image @ image.T).sum() - len(image)) / max(1, len(image) * (len(image) - 1))
    if similar > 0.999 and len(image) > 1:
        return Finding(
            "error", f"All images get nearly the same embedding (mean cosine {similar:.4f}): the model has collapsed."
        )
    chance = math.log(len(batch))
    return Finding(
        "good", f"First loss {loss:.2f}; guessing at random gives ln({len(batch)}) = {chance:.2f} for CLIP's loss."
    )


def overfit(objective: AbstractObjective[Encoded], batch: Batch) -> tuple[float, float]:
    """Train on one batch; return the first and the last loss. Frozen towers are asked once."""
    train_mode(objective)
    batch = with_outputs(objective, batch, "fp32")
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0)
    losses = []
    for _ in range(OVERFIT_STEPS):
        optimizer.zero_grad()
        losses.append(accumulate_gradients(objective, [batch], 1, nullcontext())[0].total.item())
        optimizer.step()
    return losses[0], losses[-1]
