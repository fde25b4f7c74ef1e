"""How often a change of the images turns right answers into wrong ones, beside random noise of the same size.

Attack success rate counts what was right on clean images only: |right before and wrong after| / |right before|. A model that never was right
cannot be attacked, and one that was right by luck loses that luck to any noise; hence clean scores and random noise always stand beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from diptych.data.sources import AbstractSource
from diptych.errors import EvaluationError
from diptych.evaluation.run import Evaluation, evaluate_model, measure_retrieval, measure_zeroshot
from diptych.evaluation.stats import bootstrap, paired_difference
from diptych.models.dual import DualEncoder
from diptych.models.embedding import Change, ProgressBar, embed_source_images
from diptych.models.perturbation import AbstractPerturbation, sign_noise
from diptych.models.precision import Precision
from diptych.types import Interval

LEAST_CLEAN = 0.6
"""Below this score on clean images a success rate rests on few answers, and a note says so."""


@dataclass(frozen=True)
class Hits:
    """Which answers were right, for one number of an evaluation.

    Attributes:
        right: Per question, 1.0 or 0.0.
        cluster: Questions with one id are drawn together by the bootstrap.
    """

    right: Float[np.ndarray, " n"]
    cluster: Int64[np.ndarray, " n"]


@dataclass(frozen=True)
class AttackReport:
    """One model on one source: clean, under random noise, and under the perturbation.

    Attributes:
        clean: Scores on the images as they are.
        noise: Under `sign_noise` of the same eps.
        attacked: Under the perturbation.
        eps: Bound of both, in levels of 255.
        seed: Of the bootstrap and of the noise.
    """

    clean: Evaluation
    noise: Evaluation
    attacked: Evaluation
    eps: float
    seed: int

    def names(self) -> list[str]:
        """Return the names of the numbers in which something was right before."""
        return [name for name, hits in hits_of(self.clean).items() if hits.right.any()]

    def success(self) -> dict[str, Interval]:
        """Return the perturbation's success rate for each of `names`."""
        return self._successes(self.attacked)

    def noise_success(self) -> dict[str, Interval]:
        """Return the success rate of random noise for each of `names`."""
        return self._successes(self.noise)

    def beyond_noise(self) -> dict[str, Interval]:
        """Return success rate minus that of random noise, paired over the answers that were right before."""
        before, noise, after = (hits_of(part) for part in (self.clean, self.noise, self.attacked))
        found = {}
        for name in self.names():
            rows = before[name].right > 0
            sides = (1 - part[name].right[rows] for part in (noise, after))
            found[name] = paired_difference(*sides, cluster=before[name].cluster[rows], seed=self.seed)
        return found

    def lines(self) -> list[str]:
        """Return every number and note in a line, for a terminal."""
        clean, noise, attacked = (part.headline() for part in (self.clean, self.noise, self.attacked))
        success, by_noise = self.success(), self.noise_success()
        lines = [
            f"{name:24} clean {clean[name].value:.3f}, noise {noise[name].value:.3f}, attacked {attacked[name].value:.3f}"
            + (f"; lost to noise {by_noise[name]}, to the attack {success[name]}" if name in success else "")
            for name in clean
        ]
        return [*lines, *self.notes()]

    def notes(self) -> tuple[str, ...]:
        """Return what the reader of the numbers must know."""
        first = [n for n in self.clean.headline() if n.endswith(("recall@1", "top1"))]
        low = {name: self.clean.headline()[name].value for name in first}
        return self.clean.notes + tuple(
            f"{name} is {value:.2f} on clean images: a success rate over so few right answers says little."
            for name, value in low.items()
            if value < LEAST_CLEAN
        )

    def to_json(self) -> dict[str, Any]:
        """Return all numbers."""
        rows = {"success": self.success(), "noise_success": self.noise_success(), "beyond_noise": self.beyond_noise()}
        return {
            "eps": self.eps,
            "clean": self.clean.to_json(),
            "noise": _plain(self.noise.headline()),
            "attacked": _plain(self.attacked.headline()),
            **{name: _plain(values) for name, values in rows.items()},
            "notes": self.notes(),
        }

    def _successes(self, after: Evaluation) -> dict[str, Interval]:
        pairs = hits_of(self.clean), hits_of(after)
        return {
            name: attack_success(
                pairs[0][name].right, pairs[1][name].right, cluster=pairs[0][name].cluster, seed=self.seed
            )
            for name in self.names()
        }


def attack_success(
    before: Float[np.ndarray, " n"],
    after: Float[np.ndarray, " n"],
    *,
    cluster: Int64[np.ndarray, " n"] | None = None,
    seed: int = 0,
) -> Interval:
    """Return |right before and wrong after| / |right before| with its 95 % interval; 0 when nothing changed, 1 when no right answer survived.

    Args:
        before: 1.0 where an answer was right on clean images, else 0.0.
        after: The same on changed ones.
        cluster: See `bootstrap`.
        seed: Of the bootstrap.

    Raises:
        EvaluationError: If nothing was right before.

    Source: Fang et al. 2025, section 4.1; answers that were wrong before do not count.
    """
    rows = before > 0
    if not rows.any():
        raise EvaluationError(
            "No answer was right on clean images, so there is nothing to attack. Take a model that knows these data, or fewer candidates."
        )
    return bootstrap(1 - after[rows], cluster=None if cluster is None else cluster[rows], seed=seed)


def measure_attack(
    model: DualEncoder,
    source: AbstractSource,
    perturbation: AbstractPerturbation,
    *,
    prompts: str = "photo",
    batch_size: int = 64,
    seed: int = 0,
    progress: ProgressBar | None = None,
    name: str = "",
    precision: Precision = "auto",
) -> AttackReport:
    """Return what a model does on a source: clean, under random noise, under a perturbation. Retrieval and zero-shot, as the samples allow.

    Args:
        model: The victim; it may be another than the one that the perturbation was learnt on.
        source: Samples that it was not learnt on.
        perturbation: Any.
        prompts: Name of the prompt file for zero-shot.
        batch_size: Images per forward pass.
        seed: Of the bootstrap and of the noise.
        progress: Shows progress.
        name: Of the model, for the record.
        precision: Of the towers.

    Raises:
        EvaluationError: If the samples have neither captions nor labels.
    """
    clean = evaluate_model(
        model,
        source,
        prompts=prompts,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        name=name,
        precision=precision,
    )
    baseline = sign_noise(model.image_policy.size, perturbation.eps, seed=seed)
    noise, attacked = (
        evaluate_changed(model, source, clean, change.apply, batch_size=batch_size, progress=progress)
        for change in (baseline, perturbation)
    )
    return AttackReport(clean, noise, attacked, perturbation.eps, seed)


def evaluate_changed(
    model: DualEncoder,
    source: AbstractSource,
    clean: Evaluation,
    change: Change,
    *,
    batch_size: int = 64,
    progress: ProgressBar | None = None,
) -> Evaluation:
    """Return retrieval and zero-shot on changed images, as far as `clean` has them; everything else is as there.

    Args:
        model: The one that `clean` is about.
        source: Its samples.
        clean: Of `evaluate_model`.
        change: Of pixels in [0, 1].
        batch_size: Images per forward pass.
        progress: Shows progress.
    """
    precision, seed = clean.settings["precision"], clean.settings["seed"]
    _, images = embed_source_images(
        model, source, batch_size=batch_size, progress=progress, precision=precision, change=change
    )
    embedded = replace(clean.embedded, images=images)
    zeroshot = clean.zeroshot and measure_zeroshot(
        model, embedded, prompts=clean.zeroshot.prompts.name, seed=seed, precision=precision
    )
    retrieval = clean.retrieval and measure_retrieval(embedded, seed=seed)
    return replace(clean, retrieval=retrieval, zeroshot=zeroshot, embedded=embedded)


def hits_of(evaluation: Evaluation) -> dict[str, Hits]:
    """Return which answers were right, for each number of retrieval and zero-shot, by its name in `headline`."""
    found: dict[str, Hits] = {}
    if evaluation.retrieval is not None:
        for name in ("image_to_text", "text_to_image"):
            side = getattr(evaluation.retrieval, name)
            found |= {f"{name}/recall@{k}": Hits(side.hits(k), side.cluster) for k in side.recall}
    if evaluation.zeroshot is not None:
        correct = evaluation.zeroshot.correct
        found["zeroshot/top1"] = Hits(correct, np.arange(correct.size))
    return found


def _plain(values: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {name: {"value": v.value, "low": v.low, "high": v.high} for name, v in values.items()}
