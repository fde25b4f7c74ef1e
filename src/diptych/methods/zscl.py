"""ZSCL: learn task after task without losing the zero-shot skill that none of them trains.

Paper: Zheng et al., "Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models", ICCV 2023,
arXiv 2303.06628. Official code: github.com/Thunderbeee/ZSCL.

Idea: the pre-training data are gone, but what the original model made of any images and sentences can still be asked. While a task is learnt,
the image tower must keep the original model's similarities between unlabelled reference images and a pool of sentences that need not
belong to them. In weight space, the model stays near the start of the task, and what is kept is the mean of its weights along the way.

Equations (section 3; x images, t texts, bar = original model, s the scale, T the temperature):
    Z     = s X_ref Tbar^T,  Zbar = s Xbar_ref Tbar^T                                       both with the original model's texts
    kd    = -T^2 mean_i sum_j softmax(Zbar_i / T)_j log softmax(Z_i / T)_j
    L     = CE(s X C^T, y) + w_i kd(Zbar, Z) + w_t kd(Zbar^T, Z^T) + w_2 sum_p (theta_p - theta_start,p)^2
    theta = mean of the start and of a snapshot every I steps (`optimizer.mean_every`)

What differs from the official code: the texts of the pool are encoded once and not at every step (the same numbers). Each sample of a batch
brings one reference image, drawn by the sample's key and the number of the step, so that chunks, processes and a resumed run see the same
ones; there they come shuffled from a second loader. The mean of the weights has its first snapshot after step I, there after the first.

The baselines are settings: all weights 0 is sequential fine-tuning; no reference and the model before the task as teacher is LwF (Li and Hoiem
2016) with the prompts of the task's classes as its outputs; `l2_weight` alone is weight consolidation; `ewc_weight` alone is EWC (Kirkpatrick et
al. 2017), the old task being what the model as it starts makes of the reference. It has the data of earlier tasks there, if those are named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from diptych.claims.claim import Arm, Claim, Control, Part, Trial
from diptych.claims.measures import gains_less_than_half
from diptych.claims.task_stream import (
    ORDERS,
    RATES,
    REFERENCE,
    SOURCES,
    START,
    Training,
    from_start,
    run_tasks,
)
from diptych.config import override
from diptych.data.loader import LoaderConfig
from diptych.data.tokenizer import hash_strings
from diptych.errors import ConfigError
from diptych.losses.consolidation import diagonal_fisher, weighted_distance
from diptych.losses.distill import AbstractDistillation, check_settings, soft_cross_entropy
from diptych.models.dual import DualEncoder, Images
from diptych.models.modes import is_frozen
from diptych.models.reference import (
    AT_ONCE,
    image_embeddings,
    reference_pixels,
    reference_texts,
    text_embeddings,
    tower_outputs,
)
from diptych.models.supervision import Supervision
from diptych.models.teacher import Frozen, shuffled
from diptych.models.weights import load
from diptych.training.optim import OptimizerConfig
from diptych.training.recipe import ModelConfig, Recipe
from diptych.types import Batch, Losses, PairEmbeddings, map_tensors
from diptych.verbs import AbstractObjective

SENTENCES = 256
"""At most so many of the sentences take part where EWC asks what depends on which weight."""


@dataclass(frozen=True)
class Config(AbstractDistillation):
    """Settings of the objective; the defaults are those of MTIL.

    Attributes:
        classes: Prompts of the task's classes, one each; the main text of a sample must be one of them. Empty for image-text pairs, which are
            learnt with CLIP's loss.
        label_smoothing: Of the classes; 0.2.
        teacher: What knows what must not be lost, as `load` takes it: the original model, in every task. None for the model as it is when
            training starts.
        reference: Source of images whose similarities are kept, as `open_source` takes it. None for the task's own images.
        reference_texts: Source of the sentences they are compared with. None for the texts of the reference; without one, for the prompts of
            the classes, or the texts of the batch.
        reference_count: Images drawn from the reference at random, all of them held in memory; None for all.
        image_weight: w_i; 1, and 5 in class-incremental learning.
        text_weight: w_t; 1, and 5 in class-incremental learning.
        temperature: T; 2.
        l2_weight: w_2; 1. The sum runs over all trained parameters.
        ewc_weight: Of EWC's penalty, a baseline; 0. It needs a reference with sentences.
        seed: Of the drawing of reference images.
        control: For claims. `misplaced` gives each image what the teacher says of another one, `grey` makes all reference images one grey
            image, `random` takes a teacher that knows nothing.
    """

    classes: tuple[str, ...] = ()
    label_smoothing: float = 0.2
    teacher: str | None = None
    reference: str | None = None
    reference_texts: str | None = None
    reference_count: int | None = None
    l2_weight: float = 1.0
    ewc_weight: float = 0.0
    seed: int = 0
    control: Literal["misplaced", "grey", "random"] | None = None

    def __post_init__(self) -> None:
        weights = (self.image_weight, self.text_weight, self.l2_weight, self.ewc_weight)
        check_settings(weights, self.temperature, self.label_smoothing)
        if self.ewc_weight > 0 and self.reference is None:
            raise ConfigError(
                "EWC asks which weights the answers about a reference depend on, and there is none. Name one in objective.reference."
            )


@dataclass(frozen=True)
class DistilledEmbeddings(PairEmbeddings):
    """Embeddings of the task, and of the images whose similarities are kept; all empty when nothing is distilled.

    Attributes:
        student: One tensor: what the model makes of those images.
        teacher: One tensor: what the teacher makes of them.
        teacher_texts: What the teacher makes of the samples' texts, where no other sentences are given.
    """

    student: tuple[Float[Tensor, "m d"], ...] = ()
    teacher: tuple[Float[Tensor, "m d"], ...] = ()
    teacher_texts: tuple[Float[Tensor, "b d"], ...] = ()


@dataclass(frozen=True)
class Reference:
    """Images that are shown to the student, and what the teacher makes of them.

    Attributes:
        images: Pixels, or outputs of the student's image tower if it is frozen.
        teacher: Embeddings by the teacher.
    """

    images: Images
    teacher: Float[Tensor, "m d"]

    def draw(self, keys: Sequence[str], step: int, seed: int) -> Int64[Tensor, " b"]:
        """Return one row per sample, evenly drawn with replacement; equal keys and steps, equal rows."""
        return hash_strings(f"{seed} {step} {key}" for key in keys).to(self.teacher.device) % len(self.teacher)


def squared_distance(module: nn.Module, start: nn.Module) -> Float[Tensor, ""]:
    """Return sum_p (theta_p - theta_start,p)^2 over the trained parameters; 0 at the start, and P c^2 if all P numbers moved by c.

    Source: section 3.3; a plain sum, as in the official code.
    """
    distances = [(own - before).square().sum() for own, before in zip(*trained_weights(module, start), strict=True)]
    return torch.stack(distances).sum()


def trained_weights(module: nn.Module, start: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters that are trained, and the same of the start."""
    pairs = [pair for pair in zip(module.parameters(), start.parameters(), strict=True) if pair[0].requires_grad]
    return [own for own, _ in pairs], [before for _, before in pairs]


class Objective(AbstractObjective[DistilledEmbeddings]):
    """The loss of a task, and what keeps the model from forgetting. The scale is not trained.

    Attributes:
        start: The model as it was when training started, where that is asked for.
        importance: What depends on each trained weight, for EWC; empty otherwise.
        teacher: The teacher, where the task's own images are distilled.
        texts: Embeddings by the teacher of the sentences, None for those of each batch.
        step: Number of the last optimiser step.
    """

    step: Int64[Tensor, ""]

    def __init__(self, model: DualEncoder, config: Config) -> None:
        super().__init__()
        self.model, self.config = model, config
        model.log_scale.requires_grad_(False)
        self.supervision = Supervision(model, config.classes, label_smoothing=config.label_smoothing)
        self.start = Frozen(model) if config.l2_weight > 0 or config.ewc_weight > 0 else None
        self.importance = importance_of(model, config) if config.ewc_weight > 0 else []
        self.teacher: Frozen[DualEncoder] | None = None
        self.reference: Reference | None = None
        self.register_buffer("step", torch.tensor(0))
        self.texts: Tensor | None = None
        if config.distils:
            teacher = teacher_of(model, config.teacher)
            if config.control == "random":
                teacher = shuffled(teacher, torch.Generator().manual_seed(config.seed))
            self.texts = read_sentences(teacher, config)
            if config.reference is None:
                self.teacher = Frozen(teacher)
            else:
                self.reference = read_reference(model, teacher, config)

    def encode(self, batch: Batch) -> DistilledEmbeddings:
        """Return the embeddings of the task, and those of the images that are distilled, one per sample."""
        image = self.model.encode_image(batch.images[0])
        own = self.supervision.encode_text(self.model, batch)
        if self.reference is not None:
            rows = self.reference.draw(batch.keys, int(self.step), self.config.seed)
            shown = map_tensors(lambda tensor: tensor[rows], self.reference.images)
            student = self.model.encode_image(shown)
            return DistilledEmbeddings((image,), own, (student,), (self.reference.teacher[rows],))
        if self.teacher is None:
            return DistilledEmbeddings((image,), own)
        with torch.no_grad():
            teacher = self.teacher.module
            texts = () if self.texts is not None else (teacher.encode_text(batch.texts[0]),)
            return DistilledEmbeddings((image,), own, (image,), (teacher.encode_image(batch.images[0]),), texts)

    def loss(self, encoded: DistilledEmbeddings, batch: Batch) -> Losses:
        """Return the loss of the task plus the weighted parts that are switched on.

        At chance log k for k classes (log n for n pairs), plus w_i T^2 log m for m sentences, plus w_t T^2 log n.
        """
        config = self.config
        total = self.supervision.loss(self.model, encoded.images[0], encoded.texts, batch)
        parts = {"task": total}
        if encoded.teacher:
            texts = self.texts if self.texts is not None else encoded.teacher_texts[0]
            taught = encoded.teacher[0].roll(1, 0) if config.control == "misplaced" else encoded.teacher[0]
            student, teacher = (self.model.scale * images @ texts.T for images in (encoded.student[0], taught))
            parts["distil_image"] = soft_cross_entropy(student, teacher, config.temperature)
            parts["distil_text"] = soft_cross_entropy(student.T, teacher.T, config.temperature)
            total = total + config.image_weight * parts["distil_image"] + config.text_weight * parts["distil_text"]
        if self.start is not None and config.l2_weight > 0:
            parts["l2"] = squared_distance(self.model, self.start.module)
            total = total + config.l2_weight * parts["l2"]
        if self.start is not None and config.ewc_weight > 0:
            weights, anchors = trained_weights(self.model, self.start.module)
            parts["ewc"] = weighted_distance(weights, anchors, self.importance)
            total = total + config.ewc_weight * parts["ewc"]
        return Losses(total, parts)

    def after_step(self, step: int) -> None:
        """Remember the number of the step, which other reference images belong to."""
        self.step.fill_(step)


def teacher_of(model: DualEncoder, spec: str | None) -> DualEncoder:
    """Return the teacher: a model that was named, on the device of the student, or the student as it is.

    Raises:
        ConfigError: If the two do not take the same pixels and the same token ids.
    """
    if spec is None:
        return model
    teacher = load(spec).to(model.device)
    if teacher.image_policy != model.image_policy or teacher.tokenizer.to_json() != model.tokenizer.to_json():
        raise ConfigError(
            f"The teacher must take images and texts as the model does; the preprocessing of {spec!r} differs. "
            "Name the model that training starts from, or set objective.teacher to None."
        )
    return teacher


def read_reference(model: DualEncoder, teacher: DualEncoder, config: Config) -> Reference:
    """Return the reference images as the model takes them, and what the teacher makes of them."""
    assert config.reference is not None
    pixels = reference_pixels(config.reference, model.image_policy, count=config.reference_count, seed=config.seed)
    if config.control == "grey":
        pixels = torch.full_like(pixels[:1], 128)
    images = tower_outputs(model, pixels) if is_frozen(model.vision) else pixels.to(model.device)
    return Reference(images, image_embeddings(teacher, pixels))


def importance_of(model: DualEncoder, config: Config) -> list[Tensor]:
    """Return how much the answers of the model about the reference, images over sentences, depend on each trained weight."""
    assert config.reference is not None
    pixels = reference_pixels(config.reference, model.image_policy, count=config.reference_count, seed=config.seed)
    images = tower_outputs(model, pixels) if is_frozen(model.vision) else pixels.to(model.device)
    sentences = sentences_of(config)
    tokens = map_tensors(
        lambda tensor: tensor.to(model.device), model.tokenizer(sentences[:: -(-len(sentences) // SENTENCES)])
    )
    if is_frozen(model.text):
        with torch.no_grad():
            tokens = replace(tokens, output=model.text_output(tokens))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator(model.device).manual_seed(config.seed)

    def answers(at: int) -> Tensor:
        part = map_tensors(lambda tensor: tensor[at : at + AT_ONCE], images)
        return model.scale * model.encode_image(part) @ model.encode_text(tokens).T

    starts = range(0, len(pixels), AT_ONCE)
    found = [diagonal_fisher(partial(answers, at), weights, generator) for at in starts]
    return [torch.stack(each).sum(0) / len(pixels) for each in zip(*found, strict=True)]


def read_sentences(teacher: DualEncoder, config: Config) -> Float[Tensor, "m d"] | None:
    """Return the teacher's embeddings of the sentences that images are compared with; None for the texts of each batch."""
    sentences = sentences_of(config)
    return text_embeddings(teacher, sentences) if sentences else None


def sentences_of(config: Config) -> tuple[str, ...]:
    """Return the sentences that images are compared with; none for the texts of each batch.

    Raises:
        ConfigError: If a reference has no texts and none are named.
    """
    source = config.reference_texts or config.reference
    sentences = (reference_texts(source) if source is not None else ()) or config.classes
    if source is not None and not sentences:
        raise ConfigError(
            f"The reference {source!r} has no texts. Name a source that has some in objective.reference_texts."
        )
    return sentences


def recipe() -> Recipe[Config]:
    """Return the settings of MTIL for one task (table 1, official scripts), with both towers trained.

    There, a task has 1,000 steps of 64 images, 100 of them warm-up; lr 5e-5 for Aircraft and MNIST. Say `objective.reference` and the
    task's `objective.classes`; without a reference the images and texts of the task are distilled.
    """
    return Recipe(
        "zscl",
        Config(),
        data=LoaderConfig(batch_size=64),
        optimizer=OptimizerConfig(
            lr=1e-5, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0, warmup_rate=0.1, clip_norm=None, mean_every=100
        ),
        epochs=10,
    )


def mini() -> Recipe[Config]:
    """Return one short task on frozen pretrained towers whose heads are trained: seconds on two cores."""
    base = recipe()
    return replace(
        base,
        model=ModelConfig(start=START, vision_mode="frozen", text_mode="frozen"),
        optimizer=replace(base.optimizer, lr=1e-3, mean_every=5),
        epochs=6,
        evaluate_every=0,
    )


OFF = {"image_weight": 0.0, "text_weight": 0.0, "l2_weight": 0.0}
"""Sequential fine-tuning."""

L2_WEIGHT = 1.0
EWC_WEIGHT = 1000.0

LWF = {"l2_weight": 0.0}
"""The model before the task says what it makes of the task's images, over the task's prompts."""


def on_tasks(
    trial: Trial,
    start: str,
    order: str,
    objective: Mapping[str, Any],
    *,
    mean_every: int | None = None,
    training: Training = "in turn",
    keep: float = 0.0,
) -> float:
    """Return the mean accuracy over all stages and tasks of the small benchmark."""
    changes = {"objective": objective, "optimizer": {"mean_every": mean_every}}
    recipe = override(override(from_start(mini(), start), changes), trial.changes)
    return run_tasks(trial, order, recipe, training=training, keep=keep).summary["average"]


def claim() -> tuple[Claim, ...]:
    """Return the paper's table in miniature: six data sets in two orders, from two models, with the baselines of the paper."""
    gain = "A teacher that speaks of other images leaves less than half of the gain."
    paper = {
        "I": "Average over stages and tasks 75.4 against 55.9 % for fine-tuning (MTIL, order I, ViT-B/16); transfer 68.1 against 44.6 %.",
        "II": "Average over stages and tasks 74.5 against 56.2 % for fine-tuning (MTIL, order II, ViT-B/16); transfer 64.2 against 46.6 %.",
    }
    heads = (
        "Six image sets in turn (20 images a class), heads of lite0-minilm on frozen towers, 300 ImageNet photos as reference; zero-shot "
        "accuracy on every set after every stage."
    )
    looks = (
        "Six new looks of emoji in turn (100 emoji each), all weights of the small model of emoji, the same reference; retrieval of unseen emoji "
        "in every look after every stage."
    )
    return tuple(
        Claim(
            "zscl",
            f"{name}_{order}",
            paper[order],
            setting,
            metric,
            _arms(start, order),
            Control(gain, gains_less_than_half),
            sources=SOURCES,
        )
        for start, name, setting, metric in (
            (START, "order", heads, "accuracy, mean over stages and tasks"),
            ("mini", "looks", looks, "R@1, mean over stages and looks"),
        )
        for order in ORDERS
    )


def _arms(start: str, order: str) -> tuple[Arm, ...]:
    """Return fine-tuning, ZSCL, its controls, and the other baselines."""
    reference = {"reference": REFERENCE, "reference_count": 300}
    whole = {"teacher": start, **reference, "l2_weight": L2_WEIGHT}

    def arm(name: str, part: Part, objective: Mapping[str, Any], **settings: Any) -> Arm:
        return Arm(name, part, lambda trial: on_tasks(trial, start, order, objective, **settings), RATES[start])

    extra = (
        arm("grey reference", "further", {**whole, "control": "grey"}, mean_every=5),
        arm("random teacher", "further", {**whole, "control": "random"}, mean_every=5),
    )
    return (
        arm("fine-tuning", "baseline", OFF),
        arm("ZSCL", "method", whole, mean_every=5),
        arm("teacher of other images", "control", {**whole, "control": "misplaced"}, mean_every=5),
        *(extra if order == "I" else ()),
        arm("LwF", "further", LWF),
        arm("L2", "further", {**OFF, "l2_weight": L2_WEIGHT}),
        arm("EWC", "further", {**OFF, **reference, "ewc_weight": EWC_WEIGHT}),
        arm("WiSE-FT", "further", OFF, keep=0.5),
        arm("jointly", "further", OFF, training="jointly"),
        arm("zero-shot", "further", OFF, training="none"),
    )
