"""RS-M-CLIP: multilingual contrastive training with self-distillation between views, for overhead photos.

Paper: Silva, Magalhães, Tuia and Martins, "Multilingual Vision-Language Pre-training for the Remote Sensing Domain", ACM SIGSPATIAL
2024, arXiv 2410.23370.

Idea: captions of overhead photos are few and English, so each is translated into nine languages, and a step draws one caption in
one language per image. Besides finding its text, an image must look the same to the model from near and from afar: what a slowly
moving teacher says of a global view, the student must say of every other view of the same image, small local ones included. Teacher
and distillation head are dropped after training; what remains is a plain dual encoder.

Equations, with g views of large crops that the teacher sees too, and v views in all:
    L = mean over global views of InfoNCE(view, text) + weight * L_sd
    L_sd = mean over pairs (global x, other view y) of -P_t(x) . log P_s(y)
    P_t = softmax((teacher logits - centre) / teacher temperature),  P_s = softmax(student logits / student temperature)
    after each step: teacher <- m teacher + (1 - m) student,  centre <- c centre + (1 - c) mean teacher logits
Logits are cosines between K unit prototypes and the output of a small MLP on the tower's pooled vector.

What is the paper's and what is ours: the authors published weights but no training code, and the paper names the form of the
distillation without all of its constants. Languages, multi-crop, EMA teacher and the sum of the two losses are theirs. Centring,
temperatures and head sizes are those of DINO (Caron et al. 2021, arXiv 2104.14294), whose loss this is; the teacher's momentum stays
constant and every global view meets the text, as in SILC (Naeem et al. 2023, arXiv 2310.13355). The weight of 1, fewer prototypes,
learning rates, and what to do with repeated captions are our choices. The paper starts from a pretrained multilingual CLIP and
translates with a language model; here translations are whatever texts of role `translation` the data has.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.claims.claim import Arm, Claim, Control, Part, Trial
from diptych.data.loader import LoaderConfig, TextColumn
from diptych.data.openmoji import openmoji
from diptych.data.sources import AbstractSource, Listed
from diptych.data.tokenizer import TextPolicy
from diptych.data.transforms import Augment, ImagePolicy
from diptych.errors import ConfigError
from diptych.evaluation.languages import evaluate_languages
from diptych.losses.contrastive import info_nce, shared_positives
from diptych.losses.distill import cross_entropy_of_views, moved_centre, teacher_distribution, used_share, warmed_up
from diptych.models.build import DualConfig
from diptych.models.dual import DualEncoder, normalise
from diptych.models.teacher import Teacher
from diptych.models.vision import VisionConfig
from diptych.training.optim import OptimizerConfig
from diptych.training.prepare import hold_out
from diptych.training.recipe import ModelConfig, Recipe
from diptych.types import Batch, Encoded, Losses, Role, TowerOutput
from diptych.verbs import AbstractObjective

COLLAPSED_SHARE, COLLAPSED_SPREAD, SETTLED = 0.1, 1e-3, 100
"""Less of the outputs in use, or embeddings closer together than this, is a collapse, once so many steps have moved the centre."""


@dataclass(frozen=True)
class Config:
    """Settings of the objective. Values without a source are DINO's.

    Attributes:
        distillation_weight: Of L_sd; ours, as is the sum without other factors. 0 leaves out teacher, head and local views: CLIP.
        num_global: How many of the views, counted from the first, are global; the teacher and the text see only these. SILC: 2.
        duplicates: Samples with one group or one text are `positive` of each other, or their cells are left out (`mask`), or they
            are negatives as in the paper as far as known (`none`).
        prototypes: Outputs K of the head; DINO has 65,536, ours is for small data.
        hidden: Width of the head's MLP.
        bottleneck: Its output, in which prototypes live.
        student_temperature: Of P_s.
        teacher_temperature: Of P_t.
        warmup_temperature: Of P_t before the first step; it goes to `teacher_temperature` in a straight line.
        warmup_steps: Steps that this takes; 0 for none.
        centre_momentum: Decay per step of the centre.
        teacher_momentum: Decay per step of the teacher, constant. SILC.
    """

    distillation_weight: float = 1.0
    num_global: int = 2
    duplicates: Literal["positive", "mask", "none"] = "positive"
    prototypes: int = 4096
    hidden: int = 2048
    bottleneck: int = 256
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    warmup_temperature: float = 0.04
    warmup_steps: int = 0
    centre_momentum: float = 0.9
    teacher_momentum: float = 0.996

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("num_global", "prototypes", "hidden", "bottleneck")}
        heats = {name: getattr(self, f"{name}_temperature") for name in ("student", "teacher", "warmup")}
        momenta = {"centre": self.centre_momentum, "teacher": self.teacher_momentum}
        wrong = [f"{name} must be at least 1, not {value}" for name, value in counts.items() if value < 1]
        wrong += [f"{name}_temperature must be above 0, not {value}" for name, value in heats.items() if not value > 0]
        wrong += [f"{n}_momentum must be in [0, 1], not {value}" for n, value in momenta.items() if not 0 <= value <= 1]
        if not self.distillation_weight >= 0:
            wrong.append(f"distillation_weight must be at least 0, not {self.distillation_weight}")
        if self.prototypes == 1:
            wrong.append("prototypes must be at least 2, or there is nothing to tell apart")
        if wrong:
            raise ConfigError(f"{'; '.join(wrong)}.")


class DistillationHead(nn.Module):
    """From the pooled vector of a tower to K cosines: MLP of three layers, unit norm, unit prototypes, as in DINO."""

    def __init__(self, width: int, config: Config) -> None:
        super().__init__()
        sizes = (width, config.hidden, config.hidden, config.bottleneck)
        linears = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        # DINO's std of 0.02 is this one at its width; at smaller widths vectors would shrink, and gradients of the norm explode.
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        self.mlp = nn.Sequential(linears[0], nn.GELU(), linears[1], nn.GELU(), linears[2])
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, config.bottleneck))

    def forward(self, pooled: Float[Tensor, "b w"]) -> Float[Tensor, "b k"]:
        """Return fp32 cosines: in bf16, divided by a temperature of 0.04, they would be off by a tenth."""
        point = normalise(self.mlp(pooled))
        with torch.autocast(pooled.device.type, enabled=False):
            return point @ F.normalize(self.prototypes.float(), dim=-1).T


@dataclass(frozen=True)
class Distilled(Encoded):
    """What self-distillation leaves of each sample.

    Attributes:
        loss: L_sd.
        teacher_logits: Mean over global views, for the centre.
        target: Mean of P_t over global views, to see a collapse.
    """

    loss: Float[Tensor, " b"]
    teacher_logits: Float[Tensor, "b k"]
    target: Float[Tensor, "b k"]


@dataclass(frozen=True)
class ViewEmbeddings(Encoded):
    """Embeddings of the global views and of the text; None for distillation that is switched off."""

    images: tuple[Float[Tensor, "b d"], ...]
    text: Float[Tensor, "b d"]
    distilled: Distilled | None


class Objective(AbstractObjective[ViewEmbeddings]):
    """InfoNCE over global views plus self-distillation over all views.

    Attributes:
        head: Of the student; None when distillation is switched off, as are `teacher`, and the buffers.
        teacher: Image tower and head.
        centre: Subtracted from the teacher's logits.
        temperature: Of the teacher, now.
    """

    centre: Tensor
    temperature: Tensor

    def __init__(self, model: DualEncoder, config: Config) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.head: DistillationHead | None = None
        self.teacher: Teacher[nn.ModuleList] | None = None
        self._seen: list[
            tuple[Tensor, Tensor, Tensor]
        ] = []  # mean logits, outputs used, spread: per loss since the last step
        if config.distillation_weight > 0:
            self.head = DistillationHead(model.vision.width, config)
            self.teacher = Teacher(nn.ModuleList([model.vision, self.head]))
            start = warmed_up(0, config.warmup_temperature, config.teacher_temperature, config.warmup_steps)
            self.register_buffer("centre", torch.zeros(config.prototypes))
            self.register_buffer("temperature", torch.tensor(start))

    def encode(self, batch: Batch) -> ViewEmbeddings:
        """Return embeddings and each sample's L_sd.

        Raises:
            ConfigError: If there are fewer views than `num_global`, or nothing to distil between.
        """
        count, distil = self.config.num_global, self.head is not None
        if len(batch.images) < max(count, 1 + distil):
            raise ConfigError(
                f"{count} global views{' and at least two in all' if distil else ''} are needed; data.views makes {len(batch.images)}."
            )
        shown = batch.images if distil else batch.images[:count]
        views = [view if isinstance(view, TowerOutput) else self.model.pixels(view) for view in shown]
        towers = [_ask(self.model.vision, view) for view in views]
        images = tuple(normalise(self.model.image_head(tower)) for tower in towers[:count])
        distilled = self._distil([tower.pooled for tower in towers], views[:count]) if distil else None
        return ViewEmbeddings(images, self.model.encode_text(batch.texts[0]), distilled)

    def _distil(self, pooled: Sequence[Tensor], global_views: Sequence[Tensor | TowerOutput]) -> Distilled:
        assert self.head is not None and self.teacher is not None
        student = torch.stack([self.head(vector) for vector in pooled], dim=1)
        tower, head = self.teacher.eval().module  # no dropout, no batch statistics: a target hangs on its image alone
        with torch.no_grad():
            logits = torch.stack([head(_ask(tower, view).pooled) for view in global_views], dim=1)
        target = teacher_distribution(logits, self.centre, self.temperature)
        loss = cross_entropy_of_views(student, target, self.config.student_temperature)
        return Distilled(loss, logits.mean(1), target.mean(1))

    def loss(self, encoded: ViewEmbeddings, batch: Batch) -> Losses:
        """Return InfoNCE plus weighted distillation; log n + weight * log K at chance."""
        same = shared_positives(batch.group, batch.texts[0].key) if self.config.duplicates != "none" else None
        ignored = None
        if same is not None and self.config.duplicates == "mask":
            ignored, same = same.matrix().fill_diagonal_(False), None
        per_view = [
            info_nce(image, encoded.text, self.model.scale, positives=same, ignored=ignored) for image in encoded.images
        ]
        contrastive = torch.stack(per_view).mean()
        if encoded.distilled is None:
            return Losses(contrastive, {"contrastive": contrastive})
        distillation, used = encoded.distilled.loss.mean(), used_share(encoded.distilled.target)
        if self.training:
            spread = encoded.images[0].std(0, correction=0).mean()
            self._seen.append((encoded.distilled.teacher_logits.detach().mean(0), used.detach(), spread.detach()))
        total = contrastive + self.config.distillation_weight * distillation
        return Losses(total, {"contrastive": contrastive, "distillation": distillation, "outputs_used": used})

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move teacher, centre and temperature."""
        if self.teacher is None or self.head is None:
            return
        config = self.config
        self.teacher.follow(nn.ModuleList([self.model.vision, self.head]), config.teacher_momentum)
        if self._seen:
            logits, used, spread = (torch.stack(values).mean(0) for values in zip(*self._seen, strict=True))
            self.centre.copy_(moved_centre(self.centre, logits, config.centre_momentum))
            self._seen.clear()
            if step > SETTLED:
                warn_of_collapse(used.item(), spread.item())
        self.temperature.fill_(
            warmed_up(step, config.warmup_temperature, config.teacher_temperature, config.warmup_steps)
        )


def _ask(tower: nn.Module, view: Tensor | TowerOutput) -> TowerOutput:
    """Return what a tower makes of pixels. What a frozen student made of them before, its teacher, a copy that never moves, makes too."""
    return view if isinstance(view, TowerOutput) else tower(view)


def warn_of_collapse(used: float, spread: float) -> None:
    """Warn if the teacher gives all images the same few outputs, or if all embeddings are the same.

    Args:
        used: From `used_share`.
        spread: Standard deviation of embeddings over a batch, mean over dimensions.
    """
    if used < COLLAPSED_SHARE or spread < COLLAPSED_SPREAD:
        warnings.warn(
            f"Self-distillation collapses: the outputs' entropy is {used:.1%} of its maximum, embeddings have a standard deviation "
            f"of {spread:.1e}. Lower optimizer.lr or objective.distillation_weight, or raise objective.teacher_temperature.",
            stacklevel=2,
        )


EVERY_LANGUAGE = TextColumn(("caption", "translation"), by="language")
"""One language per image and step, uniformly among those that the image has."""


def views(local: int, *, size: int, global_scale: tuple[float, float] = (0.4, 1.0)) -> tuple[Augment, ...]:
    """Return two global views and `local` views of `size` pixels that keep 5 to 40 % of the area (SILC).

    No view is flipped: captions speak of left and right. Photos from above whose captions do not can be flipped.
    """
    return (Augment(crop_scale=global_scale),) * 2 + (Augment(crop_scale=(0.05, 0.4), size=size),) * local


def recipe() -> Recipe[Config]:
    """Return fine-tuning of pretrained towers, heads faster than towers.

    The paper starts from OpenCLIP's xlm-roberta-base ViT-B/32; its batch size, epochs and learning rates are not public, so those
    here are ours. The text tower of `auto` knows English best: for a multilingual one, set model.start to `new` and
    model.architecture.text to the folder of a transformers model.
    """
    return Recipe(
        "rs_m_clip",
        Config(),
        model=ModelConfig(start="auto", vision_mode="full", text_mode="full"),
        data=LoaderConfig(batch_size=128, texts=(EVERY_LANGUAGE,), views=views(8, size=96)),
        optimizer=OptimizerConfig(lr=5e-4, tower_lr_factor=0.05, weight_decay=0.1, warmup_rate=0.1),
        epochs=10,
    )


def mini() -> Recipe[Config]:
    """Return a run from scratch on 48-pixel drawings with names in fourteen languages; the teacher is faster, since steps are few."""
    architecture = DualConfig(
        vision=VisionConfig(image_size=48), image_policy=ImagePolicy(size=48), text_policy=TextPolicy(length=24)
    )
    return Recipe(
        "rs_m_clip",
        Config(prototypes=512, hidden=256, bottleneck=64, teacher_momentum=0.98),
        model=ModelConfig(start="new", architecture=architecture),
        data=LoaderConfig(batch_size=64, texts=(EVERY_LANGUAGE,), views=views(4, size=24, global_scale=(0.6, 1.0))),
        optimizer=OptimizerConfig(lr=1.5e-3, weight_decay=0.2, ema_decay=0.98),
        epochs=10,
        evaluate_every=5,
    )


def claim() -> tuple[Claim, ...]:
    """Return two claims on drawings with their names in fourteen languages; all arms of a claim take the same number of steps."""
    plain, english = partial(_run, distillation_weight=0.0), ("en",)
    metric = "mean recall (R@1, R@5 and R@10, both ways)"
    sources = ("openmoji:train", "openmoji:test")
    distillation = Claim(
        slug="rs_m_clip",
        name="distillation",
        claim="Self-distillation between local and global views improves multilingual retrieval; no figure could be read.",
        setting="Emoji and their names in 14 languages, from scratch, 5 epochs; retrieval among 500 unseen emoji.",
        metric=f"{metric}, mean over 14 languages",
        arms=(
            Arm("no distillation, same global views", "baseline", plain),
            Arm("self-distillation", "method", _run),
            Arm("frozen random teacher", "control", partial(_run, teacher_momentum=1.0)),
            Arm("English names only", "further", partial(plain, roles=("caption",))),
            Arm("translations of other emoji", "further", partial(plain, mixed_up=True)),
        ),
        control=Control("A teacher that never moves gains less than half as much.", _gains_less_than_half),
        sources=sources,
    )
    translations = Claim(
        slug="rs_m_clip",
        name="english",
        claim="Translated captions help even for English queries; no figure could be read.",
        setting="As `distillation`, but without it; retrieval with English names.",
        metric=f"{metric} in English",
        arms=(
            Arm("English names only", "baseline", partial(plain, languages=english, roles=("caption",))),
            Arm("names in 14 languages", "method", partial(plain, languages=english)),
            Arm("translations of other emoji", "control", partial(plain, languages=english, mixed_up=True)),
        ),
        control=Control("Translations of other emoji gain less than half as much.", _gains_less_than_half),
        sources=sources,
    )
    return distillation, translations


def _run(
    trial: Trial,
    *,
    languages: tuple[str, ...] | None = None,
    roles: tuple[Role, ...] = EVERY_LANGUAGE.roles,
    mixed_up: bool = False,
    **settings: float,
) -> float:
    """Train with these settings of the objective; return the mean recall over languages."""
    training, validation = hold_out(openmoji("train"), 0.15, seed=0)
    mini = trial.mini("rs_m_clip")
    objective = replace(mini.objective, **settings, **trial.changes)
    seen = mini.data.views if objective.distillation_weight else mini.data.views[: objective.num_global]
    data = replace(mini.data, views=seen, texts=(replace(EVERY_LANGUAGE, roles=roles),))
    source = with_wrong_translations(training, seed=0) if mixed_up else training
    model = trial.train(replace(mini, objective=objective, data=data, epochs=5), source)
    return evaluate_languages(
        model, validation if trial.split == "validation" else openmoji("test"), languages
    ).mean.value


def with_wrong_translations(source: AbstractSource, *, seed: int) -> Listed:
    """Return the samples, each with the translations of another one in place of its own; captions stay."""
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    samples = []
    for index, other in zip(order, order[1:] + order[:1], strict=True):
        kept = [text for text in source.texts(index) if text.role != "translation"]
        wrong = [text for text in source.texts(other) if text.role == "translation"]
        samples.append(replace(source[index], texts=(*kept, *wrong)))
    return Listed(samples, f"{source.name}, translations mixed up")


def _gains_less_than_half(values: Mapping[Part, Sequence[float]]) -> bool:
    means = {part: float(np.mean(numbers)) for part, numbers in values.items()}
    return means["control"] - means["baseline"] < (means["method"] - means["baseline"]) / 2
