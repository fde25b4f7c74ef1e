"""How often a change of images or captions turns right answers into wrong ones, beside a random change of the same size.

Attack success rate counts what was right on clean images only: |right before and wrong after| / |right before|. A model that never was right
cannot be attacked, and one that was right by luck loses that luck to any noise; hence clean scores and random noise always stand beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from diptych.data.sources import AbstractSource
from diptych.data.words import Span, UniversalWord, random_word
from diptych.errors import EvaluationError
from diptych.evaluation.run import Evaluation, evaluate_model, measure_retrieval, measure_zeroshot
from diptych.evaluation.stats import bootstrap, paired_difference
from diptych.models.dual import DualEncoder
from diptych.models.embedding import Change, ProgressBar, embed_source_images, embed_texts
from diptych.models.perturbation import AbstractPerturbation, sign_noise
from diptych.models.precision import Precision
from diptych.models.words import attacked_places, reworded
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
class Rewording:
    """Captions under attack: a word in place of the one that matters most.

    Attributes:
        captions: As they are.
        places: Where the word goes, None where a caption has stop words only.
        word: The attack.
        by_chance: What stands in the same places for comparison.
    """

    captions: tuple[str, ...]
    places: tuple[Span | None, ...]
    word: UniversalWord
    by_chance: UniversalWord

    def texts(self, word: UniversalWord) -> list[str]:
        """Return the captions with a word in those places."""
        return reworded(self.captions, self.places, word)


@dataclass(frozen=True)
class AttackReport:
    """One model on one source: clean, under a random change, and under the attack.

    Attributes:
        clean: Scores on images and captions as they are.
        noise: Under the random change: `sign_noise` of the same eps, a random word in the same places, or both.
        attacked: Under the attack.
        eps: Bound of both noises, in levels of 255; 0 where only captions are changed.
        seed: Of the bootstrap and of the random change.
        by_chance: What the random change is.
    """

    clean: Evaluation
    noise: Evaluation
    attacked: Evaluation
    eps: float
    seed: int
    by_chance: str = "random noise"

    def names(self) -> list[str]:
        """Return the names of the numbers in which something was right before."""
        return [name for name, hits in hits_of(self.clean).items() if hits.right.any()]

    def success(self) -> dict[str, Interval]:
        """Return the perturbation's success rate for each of `names`."""
        return self._successes(self.attacked)

    def noise_success(self) -> dict[str, Interval]:
        """Return the success rate of the random change for each of `names`."""
        return self._successes(self.noise)

    def beyond_noise(self) -> dict[str, Interval]:
        """Return success rate minus that of the random change, paired over the answers that were right before."""
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
            f"{name:24} clean {clean[name].value:.3f}, {self.by_chance} {noise[name].value:.3f}, attacked {attacked[name].value:.3f}"
            + (f"; lost to {self.by_chance} {by_noise[name]}, to the attack {success[name]}" if name in success else "")
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


def reword(judge: DualEncoder, captions: Sequence[str], word: UniversalWord, *, seed: int = 0) -> Rewording:
    """Return captions under attack. They are the same for every victim.

    Args:
        judge: Says which word of a caption matters most, and lends the random word from its vocabulary: the model that was attacked.
        captions: Of `Evaluation.embedded`, for `measure_words`.
        word: The attack.
        seed: Of the random word.
    """
    places = tuple(attacked_places(judge, captions, word.language))
    return Rewording(tuple(captions), places, word, random_word(judge.tokenizer, word, seed=seed))


def measure_words(model: DualEncoder, report: AttackReport, rewording: Rewording) -> dict[str, AttackReport]:
    """Return what a word in the captions takes from retrieval: alone, and with the noise of a report.

    Captions that have become equal are still no right answers for each other, and the report's notes say how much a caption changed.

    Args:
        model: The victim.
        report: Of `measure_attack`, for this model.
        rewording: Of its captions.

    Raises:
        EvaluationError: If the captions are others, or there are none.
    """
    embedded, precision = report.clean.embedded, report.clean.settings["precision"]
    if report.clean.retrieval is None or rewording.captions != embedded.captions:
        raise EvaluationError(
            "A word is measured in captions, the same as in the report. Take samples with captions, and `reword(judge, "
            "report.clean.embedded.captions, word)`."
        )
    words = rewording.by_chance, rewording.word
    by_chance, attacked = (embed_texts(model, rewording.texts(word), precision=precision) for word in words)

    def with_texts(evaluation: Evaluation, texts: Float[Tensor, "m d"]) -> Evaluation:
        changed = replace(evaluation.embedded, texts=texts)
        found = measure_retrieval(changed, seed=report.seed)
        return replace(evaluation, retrieval=found, zeroshot=None, embedded=changed)

    cosines = [(embedded.texts * texts).sum(1).mean().item() for texts in (attacked, by_chance)]
    note = (
        f"Captions keep a mean cosine of {cosines[0]:.2f} to what they were with {rewording.word.word!r} in them, of {cosines[1]:.2f} with the "
        f"random word {rewording.by_chance.word!r}; {rewording.places.count(None)} of {len(rewording.places)} have no word to replace."
    )
    clean = replace(report.clean, zeroshot=None, notes=(*report.clean.notes, note))

    def told(by: Evaluation, of: Evaluation, eps: float, name: str) -> AttackReport:
        return AttackReport(clean, with_texts(by, by_chance), with_texts(of, attacked), eps, report.seed, name)

    return {
        "word": told(clean, clean, 0, "random word"),
        "noise and word": told(report.noise, report.attacked, report.eps, "random noise and word"),
    }


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
    return {name: value.to_json() for name, value in values.items()}
