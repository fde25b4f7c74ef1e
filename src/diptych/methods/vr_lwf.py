"""VR-LwF: learn something new and keep what the model said of the new images about sentences drawn from its own vocabulary.

Paper: Ding et al., "Don't Stop Learning: Towards Continual Learning for the CLIP Model", arXiv 2207.09248. There is no official code;
values and details are those of a re-implementation in github.com/Thunderbeee/ZSCL, where it is called LwF-VR.

Idea: learning without forgetting asks the old model what it would have said, and a classifier has a head of old classes to say it with. CLIP has
none: its classes are all sentences. So a head is made up: sentences of random tokens, embedded by the model as it was before the update.
Nothing is stored, neither images nor texts.

Equations (s the scale, T the temperature, E embeddings of V random sentences by the old model, bar = old model):
    P     = s X E^T,  Pbar = s Xbar E^T                                                        X: the new task's own images
    kd    = -T^2 mean_i sum_v softmax(Pbar_i / T)_v log softmax(P_i / T)_v
    L     = CE(s X C^T, y) + w_i kd(Pbar, P) + w_t kd(Pbar^T, P^T)

What differs from that code: special tokens are not drawn (`special_tokens`), which would cut a sentence short; the images that are distilled are
those of the batch, not a second batch of the same task. A head whose sentences are embedded almost alike distils nothing, and is warned of.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.claims.claim import Arm, Claim, Control, Part, Trial
from diptych.claims.measures import gains_less_than_half
from diptych.claims.task_stream import ORDERS, RATES, SOURCES, START, Training, from_start, run_tasks
from diptych.config import override
from diptych.data.loader import LoaderConfig
from diptych.data.tokenizer import Tokenizer
from diptych.errors import ConfigError
from diptych.losses.distill import AbstractDistillation, check_settings, soft_cross_entropy
from diptych.models.dual import DualEncoder
from diptych.models.supervision import Supervision
from diptych.models.teacher import Frozen
from diptych.training.optim import OptimizerConfig
from diptych.training.recipe import ModelConfig, Recipe
from diptych.types import Batch, Losses, PairEmbeddings, Tokens, map_tensors
from diptych.verbs import AbstractObjective

ALIKE = 0.98
"""Mean cosine between the sentences of a head above which it is warned of."""


@dataclass(frozen=True)
class Config(AbstractDistillation):
    """Settings of the objective; the defaults are those of the re-implementation for whole data sets as tasks.

    Attributes:
        classes: Prompts of the task's classes, one each; the main text of a sample must be one of them. Empty for image-text pairs, which are
            learnt with CLIP's loss.
        label_smoothing: Of the classes; 0.2.
        count: V, how many random sentences; 1000.
        length: Random tokens in each; 10.
        sentences: In place of random ones.
        special_tokens: Draw special tokens too, as the re-implementation does.
        image_weight: w_i; 1, and 5 in class-incremental learning.
        text_weight: w_t; 1, and 5 in class-incremental learning. 0 leaves the paper's own loss.
        temperature: T; 2.
        student_text: Let the model embed the sentences itself, so that its text tower is taught too.
        seed: Of the sentences. Another one for every task.
        control: For claims. `misplaced` gives each image what the old model says of another one.
    """

    classes: tuple[str, ...] = ()
    label_smoothing: float = 0.2
    count: int = 1000
    length: int = 10
    sentences: tuple[str, ...] = ()
    special_tokens: bool = False
    student_text: bool = False
    seed: int = 0
    control: Literal["misplaced"] | None = None

    def __post_init__(self) -> None:
        weights = (self.image_weight, self.text_weight)
        check_settings(weights, self.temperature, self.label_smoothing)
        if (len(self.sentences) or self.count) < 2:
            raise ConfigError(
                f"A head of one sentence tells no images apart. objective.count is {self.count}, and there are "
                f"{len(self.sentences)} sentences; give at least two."
            )


@dataclass(frozen=True)
class TaughtEmbeddings(PairEmbeddings):
    """Embeddings of the task, and by the old model of its images.

    Attributes:
        teacher: One tensor, none when nothing is distilled.
    """

    teacher: tuple[Float[Tensor, "b d"], ...] = ()


def random_sentences(
    tokenizer: Tokenizer, count: int, length: int, generator: torch.Generator, *, special_tokens: bool = False
) -> Tokens:
    """Return sentences of random tokens, independent and evenly drawn, between the tokens that every text has at its ends.

    Args:
        tokenizer: Of the model.
        count: Sentences.
        length: Random tokens in each.
        generator: On the CPU; equal states, equal sentences.
        special_tokens: Draw them too: a sentence with an end in its middle may be cut there.

    Raises:
        ConfigError: If the sentences are longer than the text tower takes.
    """
    policy = tokenizer.policy
    begin, end = ([] if token is None else [token] for token in (policy.begin, policy.end))
    if length < 1 or length + len(begin) + len(end) > policy.length:
        raise ConfigError(
            f"A sentence has from 1 to {policy.length - len(begin) - len(end)} random tokens with this text tower; "
            f"objective.length is {length}."
        )
    special = {*begin, *end, policy.pad, *tokenizer.engine.get_added_tokens_decoder()}
    allowed = torch.tensor([token for token in range(tokenizer.size) if special_tokens or token not in special])
    drawn = allowed[torch.randint(len(allowed), (count, length), generator=generator)]
    return tokenizer.pad([begin + row + end for row in drawn.tolist()], torch.arange(count))


def spread(head: Float[Tensor, "v d"]) -> Float[Tensor, ""]:
    """Return the mean cosine between different sentences of a head: 0 for random directions, 1 if all are embedded alike."""
    total = head.sum(0).square().sum() - head.square().sum()
    return total / (len(head) * (len(head) - 1))


class Objective(AbstractObjective[TaughtEmbeddings]):
    """The loss of a task, and what the model said before of its images. The scale is not trained.

    Attributes:
        teacher: The model as it was when training started.
        head: Embeddings of the sentences by it.
        tokens: The sentences.
    """

    head: Float[Tensor, "v d"]

    def __init__(self, model: DualEncoder, config: Config) -> None:
        super().__init__()
        self.model, self.config = model, config
        model.log_scale.requires_grad_(False)
        self.supervision = Supervision(model, config.classes, label_smoothing=config.label_smoothing)
        self.teacher: Frozen[DualEncoder] | None = None
        if config.distils:
            self.teacher = Frozen(model)
            tokens = _sentences(model.tokenizer, config)
            self.tokens = map_tensors(lambda tensor: tensor.to(model.device), tokens)
            with torch.no_grad():
                self.register_buffer("head", self.teacher.module.encode_text(self.tokens))
            if (alike := spread(self.head).item()) > ALIKE:
                warnings.warn(
                    f"The {len(self.head)} sentences of the head are embedded almost alike (mean cosine {alike:.3f}), so images "
                    "are hardly told apart by them. Name sentences of your own in objective.sentences, or another objective.length.",
                    stacklevel=2,
                )

    def encode(self, batch: Batch) -> TaughtEmbeddings:
        """Return the embeddings of the task, and those of its images by the old model."""
        image = self.model.encode_image(batch.images[0])
        own = self.supervision.encode_text(self.model, batch)
        if self.teacher is None:
            return TaughtEmbeddings((image,), own)
        with torch.no_grad():
            return TaughtEmbeddings((image,), own, (self.teacher.module.encode_image(batch.images[0]),))

    def loss(self, encoded: TaughtEmbeddings, batch: Batch) -> Losses:
        """Return the loss of the task plus the weighted parts of the head.

        At chance log k for k classes (log n for n pairs), plus w_i T^2 log V, plus w_t T^2 log n.
        """
        config = self.config
        total = self.supervision.loss(self.model, encoded.images[0], encoded.texts, batch)
        parts = {"task": total}
        if encoded.teacher:
            taught = encoded.teacher[0].roll(1, 0) if config.control == "misplaced" else encoded.teacher[0]
            head = self.model.encode_text(self.tokens) if config.student_text else self.head
            student, teacher = self.model.scale * encoded.images[0] @ head.T, self.model.scale * taught @ self.head.T
            parts["distil_image"] = soft_cross_entropy(student, teacher, config.temperature)
            parts["distil_text"] = soft_cross_entropy(student.T, teacher.T, config.temperature)
            total = total + config.image_weight * parts["distil_image"] + config.text_weight * parts["distil_text"]
        return Losses(total, parts)


def _sentences(tokenizer: Tokenizer, config: Config) -> Tokens:
    if config.sentences:
        return tokenizer(config.sentences)
    generator = torch.Generator().manual_seed(config.seed)
    return random_sentences(tokenizer, config.count, config.length, generator, special_tokens=config.special_tokens)


def recipe() -> Recipe[Config]:
    """Return the settings of one task in the re-implementation, with both towers trained: 1,000 steps of 64 images, 100 of them warm-up.

    Say the task's `objective.classes`; without any, image-text pairs are learnt.
    """
    return Recipe(
        "vr_lwf",
        Config(),
        data=LoaderConfig(batch_size=64),
        optimizer=OptimizerConfig(
            lr=1e-5, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0, warmup_rate=0.1, clip_norm=None
        ),
        epochs=10,
    )


def mini() -> Recipe[Config]:
    """Return one short task on frozen pretrained towers whose heads are trained: seconds on two cores."""
    base = recipe()
    return replace(
        base,
        objective=Config(count=256),
        model=ModelConfig(start=START, vision_mode="frozen", text_mode="frozen"),
        optimizer=replace(base.optimizer, lr=1e-3),
        epochs=6,
        evaluate_every=0,
    )


def on_tasks(
    trial: Trial,
    start: str,
    order: str,
    recipe: Recipe[Any],
    objective: Mapping[str, Any],
    *,
    training: Training = "in turn",
) -> float:
    """Return how well tasks are solved that were not trained yet, in the small benchmark."""
    changes = {"objective": objective, "optimizer": {"mean_every": None}}
    changed = override(override(from_start(recipe, start), changes), trial.changes)
    return run_tasks(trial, order, changed, training=training).summary["transfer"]


def claim() -> tuple[Claim, ...]:
    """Return the claim that zero-shot skill is kept without any stored or foreign data, beside LwF and fine-tuning."""
    paper = {
        "I": "Transfer 57.2 against 44.6 % for fine-tuning and 56.9 % for LwF (MTIL, order I, ViT-B/16, in the ZSCL paper's repository).",
        "II": "Transfer 53.1 against 46.6 % for fine-tuning and 53.2 % for LwF (MTIL, order II, ViT-B/16, in the ZSCL paper's repository).",
    }
    heads = (
        "Six image sets in turn (20 images a class), heads of lite0-minilm on frozen towers, 256 random sentences a task; zero-shot accuracy on "
        "every set before it is trained."
    )
    looks = (
        "Six new looks of emoji in turn (100 emoji each), all weights of the small model of emoji, 256 random sentences a task; retrieval of "
        "unseen emoji in every look before it is trained."
    )
    return tuple(
        Claim(
            "vr_lwf",
            f"{name}_{order}",
            paper[order],
            setting,
            metric,
            _arms(start, order),
            Control("A teacher that speaks of other images leaves less than half of the gain.", gains_less_than_half),
            sources=SOURCES,
        )
        for start, name, setting, metric in (
            (START, "order", heads, "accuracy on tasks not trained yet"),
            ("mini", "looks", looks, "R@1 in looks not trained yet"),
        )
        for order in ORDERS
    )


def _arms(start: str, order: str) -> tuple[Arm, ...]:
    """Return fine-tuning, VR-LwF, its controls, and LwF, which is a setting of another method."""
    off = {"image_weight": 0.0, "text_weight": 0.0}
    alike = {"sentences": ("a photo.",) * 2, "text_weight": 0.0}

    def arm(name: str, part: Part, objective: Mapping[str, Any], **settings: Any) -> Arm:
        run = lambda trial: on_tasks(trial, start, order, mini(), objective, **settings)  # noqa: E731
        return Arm(name, part, run, RATES[start])

    return (
        arm("fine-tuning", "baseline", off),
        arm("VR-LwF", "method", {}),
        arm("teacher of other images", "control", {"control": "misplaced"}),
        arm("one sentence, twice", "further", alike),
        Arm(
            "LwF",
            "further",
            lambda trial: on_tasks(trial, start, order, trial.mini("zscl"), {"l2_weight": 0.0}),
            RATES[start],
        ),
        arm("zero-shot", "further", off, training="none"),
    )
