"""AnoVL: where is the fault in a picture, from words alone.

Paper: Deng et al., "AnoVL: Adapting Vision-Language Models for Unified Zero-shot Anomaly Localization", arXiv 2308.15939 (its second version
is called "Bootstrap Fine-Grained Vision-Language Alignment for Unified Zero-Shot Anomaly Localization", AnoCLIP and AnoCLIP+). Official
code: github.com/hq-deng/AnoVL. Equations are the code's.

Idea: compare every patch with "a flawless X" and "a damaged X". The tokens of an image-text model have gathered the whole image, so a second
stream, in which values attend to values, keeps patches to what they show. Then, for one image, a linear adapter learns for five steps from what
the patches say of themselves and from copies with noise, which count as abnormal.

Equations, P the embeddings of patches of the second stream (`models/dense.py`), t_k the mean embedding of the prompts of state k, normalised:
    q_k    = softmax_k(s cos(P, t_k)), s = 1                                map: q_abnormal; score of the image: the same of the pooled vector
    a(P)   = 0.5 P + 0.5 (W P / |P| + b)                                    for each image W and b start anew
    L      = mean H(q) + 0.5 mean(-log q'_abnormal - log q_normal)          q of a(P), q' of a(P + e), e ~ N(0, 0.055^2) drawn at every step
Wide images are two overlapping squares whose maps are averaged. In L cosines are resized and merged before the softmax, in the map after it.

What differs from the official code: the moments of AdamW start anew with each image too, so results do not depend on the order of images
(`carry_optimizer_state` is the official way); images of any proportions are cut into as many squares as they need, upright ones too;
towers without attention can be used with their ordinary tokens. Prompts are the official ones, compared as a set.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from statistics import fmean
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.claims.claim import Arm, Claim, Control, Part, Trial
from diptych.claims.measures import gains_less_than_half
from diptych.data.loader import LoaderConfig
from diptych.data.planted import PRODUCTS, kind_of, planted_defects
from diptych.data.sources import AbstractSource, Listed
from diptych.errors import ConfigError
from diptych.evaluation.anomaly import AnomalyMaps, class_means, detect, measure_found, within_faulty
from diptych.evaluation.zeroshot import anchors_of
from diptych.models.dense import EmbeddedPatches, TokensAsked, choose_tokens, embedded_patches
from diptych.models.dual import DualEncoder
from diptych.models.tiles import Tiles, upsampled
from diptych.models.vision import VisionConfig
from diptych.types import Batch
from diptych.verbs import AbstractAdapter

Kind = Literal["object", "texture"]
Pool = Literal["class", "attention"]

NORMAL = (
    "normal {}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
)
ABNORMAL = (
    "damaged {}",
    "abnormal {}",
    "imperfect {}",
    "blemished {}",
    "{} with flaw",
    "{} with defect",
    "{} with damage",
)
WORDINGS: dict[Kind, tuple[str, ...]] = {
    "object": ("industrial photo", "industrial image", "manufacturing image"),
    "texture": ("industrial photo", "textural photo", "surface picture"),
}
"""What a picture is called, by the kind of product."""


@dataclass(frozen=True)
class Config:
    """Settings of the detector.

    Attributes:
        product: What is shown, such as `bottle`.
        kind: Whether it is an object in front of something or a texture that fills the image; decides the wording of the prompts.
        wordings: What a picture is called, in place of `WORDINGS[kind]`, for other fields: `("x-ray image",)`.
        prompts: `domain` puts 7 states into 22 templates for each wording; `bare` takes "X" and "broken X".
        tokens: `local` are those of the second stream; `ordinary` the tower's own, for any tower that gives patches. `auto` is `local` where
            the tower has attention.
        scale: s; 1 in the official code, None for the model's own, which spreads probabilities between 0 and 1.
        steps: Of the adapter, for each image; 5 in the official code, 0 for the part that trains nothing.
        lr: Of AdamW; 1e-3.
        weight_decay: Of AdamW; 0.01.
        noise: Standard deviation of e; 0.05 x 1.1.
        mix: Share of the linear map in a(P); 0.5.
        hard_weight: Weight of the second term of L; 0.5.
        seed: Of adapter and noise; every image begins with it.
        carry_optimizer_state: Keep AdamW's moments from image to image, as the official code does by mistake. Results then depend on the order.
    """

    product: str = "object"
    kind: Kind = "object"
    wordings: tuple[str, ...] | None = None
    prompts: Literal["domain", "bare"] = "domain"
    tokens: TokensAsked = "auto"
    scale: float | None = 1.0
    steps: int = 5
    lr: float = 1e-3
    weight_decay: float = 0.01
    noise: float = 0.055
    mix: float = 0.5
    hard_weight: float = 0.5
    seed: int = 0
    carry_optimizer_state: bool = False

    def __post_init__(self) -> None:
        if not self.product.strip() or self.wordings == ():
            raise ConfigError("Prompts need the name of the product and at least one wording; one of them is empty.")
        if self.steps < 0 or not (math.isfinite(self.noise) and self.noise >= 0) or not 0 <= self.mix <= 1:
            raise ConfigError(
                f"steps and noise must be >= 0 and mix in [0, 1], not {self.steps}, {self.noise} and {self.mix}."
            )
        if self.scale is not None and not self.scale > 0:
            raise ConfigError(f"scale must be > 0, or None for the model's own, not {self.scale}.")


def templates(wording: str) -> tuple[str, ...]:
    """Return the 22 templates of a wording, such as "a dark industrial photo of the {}"."""
    article = "an" if wording[0] in "aeiou" else "a"
    looks = ("cropped", "close-up", "bright", "dark", "jpeg corrupted", "blurry")
    begin = [*(f"a {look} {wording}" for look in looks), f"{article} {wording}"]
    ends = ("", " for visual inspection", " for anomaly detection")
    plain = [f"{words} of {{the}} {{{{}}}}" for words in begin]
    sized = [f"{begin[-1]} of {{the}} {size} {{{{}}}}" for size in ("small", "large")]
    meant = [f"{begin[-1]} of {{the}} {{{{}}}}{end}" for end in ends[1:]]
    return tuple(text.format(the=the) for text in (*plain, *sized, *meant) for the in ("the", "a"))


def prompts(config: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what is said of a normal and of an abnormal product; 462 prompts each for three wordings."""
    if config.prompts == "bare":
        return (config.product,), (f"broken {config.product}",)
    every = [text for wording in config.wordings or WORDINGS[config.kind] for text in templates(wording)]
    normal, abnormal = (
        tuple(template.format(state.format(config.product)) for template in every for state in states)
        for states in (NORMAL, ABNORMAL)
    )
    return normal, abnormal


def cosines(vectors: Float[Tensor, "*n d"], anchors: Float[Tensor, "2 d"]) -> Float[Tensor, "*n 2"]:
    """Return how similar vectors are to the two states, in [-1, 1]."""
    return F.normalize(vectors, dim=-1) @ anchors.T


def adaptation_loss(
    clean: Float[Tensor, "2 ..."], corrupted: Float[Tensor, "2 ..."], *, hard_weight: float = 0.5
) -> Float[Tensor, ""]:
    """Return L, the entropy of the clean map plus how badly clean and corrupted ones are told apart; 2 log 2 at chance.

    Args:
        clean: Log-probabilities of normal and abnormal of the image as it is.
        corrupted: Of its copy with noise.
        hard_weight: Of the second term.
    """
    soft = -(clean.exp() * clean).sum(0).mean()
    return soft + hard_weight * (-corrupted[1] - clean[0]).mean()


class NoiseAdapter(nn.Module):
    """a(P) = (1 - mix) P + mix (W P / |P| + b)."""

    def __init__(self, dim: int, mix: float) -> None:
        super().__init__()
        self.linear, self.mix = nn.Linear(dim, dim), mix

    def reset(self, generator: torch.Generator) -> None:
        """Draw W and b as a new Linear does."""
        bound = self.linear.in_features**-0.5
        with torch.no_grad():
            for parameter in self.linear.parameters():
                drawn = torch.rand(parameter.shape, generator=generator)
                parameter.copy_(bound * (2 * drawn - 1))

    def forward(self, patches: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Return adapted patches."""
        return (1 - self.mix) * patches + self.mix * self.linear(F.normalize(patches, dim=-1))  # type: ignore[no-any-return]


def adapt(
    adapter: NoiseAdapter,
    optimizer: torch.optim.Optimizer,
    patches: Float[Tensor, "tiles p d"],
    noise: Sequence[Float[Tensor, "tiles p d"]],
    logits: Callable[[Tensor], Tensor],
    *,
    hard_weight: float = 0.5,
) -> list[float]:
    """Train an adapter on one image, one step per noise; return the loss before each step.

    Args:
        adapter: Changed in place.
        optimizer: Of its parameters.
        patches: Fixed.
        noise: e of each step.
        logits: From patches to the scaled cosines of every pixel, [2 h w].
        hard_weight: Of the second term of the loss.
    """
    losses = []
    for e in noise:
        clean, corrupted = (logits(adapter(x)).log_softmax(0) for x in (patches, patches + e))
        loss = adaptation_loss(clean, corrupted, hard_weight=hard_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def anomaly_map(probabilities: Float[Tensor, "tiles p"], grid: tuple[int, int], tiles: Tiles) -> Float[Tensor, "h w"]:
    """Return the map of an image: the mean over 3 x 3 patches, the border repeated, then `upsampled`."""
    square = F.pad(probabilities.unflatten(1, grid)[:, None], (1, 1, 1, 1), mode="replicate")
    return upsampled(F.avg_pool2d(square, 3, 1).flatten(2).transpose(1, 2), grid, tiles)[0]


class Detector:
    """Says of batches where they are abnormal. Images of a batch are of one size, any size whose short side the tower takes.

    Attributes:
        see: From pixels to patches.
        anchors: t_normal and t_abnormal.
        config: All settings.
        scale: s.
    """

    def __init__(
        self, see: Callable[[Tensor], EmbeddedPatches], anchors: Float[Tensor, "2 d"], config: Config, scale: float
    ) -> None:
        self.see, self.anchors, self.config, self.scale = see, anchors, config, scale
        self._adapter = NoiseAdapter(anchors.shape[1], config.mix).to(anchors)
        self._optimizer = self._fresh_optimizer()

    def __call__(self, batch: Batch) -> AnomalyMaps:
        """Return maps and scores, both in (0, 1) and 0.5 where a thing is as near to one state as to the other."""
        images = batch.images[0]
        if not isinstance(images, Tensor):
            raise ConfigError("Anomaly maps need pixels, and the batch holds outputs of a frozen tower.")
        found = [self._one(image.to(self.anchors.device)) for image in images]
        maps, scores = zip(*found, strict=True)
        return AnomalyMaps(torch.stack(maps).cpu(), torch.stack(scores).cpu())

    def _one(self, image: Tensor) -> tuple[Tensor, Tensor]:
        tiles = Tiles(*image.shape[-2:])
        seen = self.see(tiles.cut(image))
        patches = seen.patches
        if self.config.steps:
            self._learn(seen, tiles)
            with torch.no_grad():
                patches = self._adapter(patches)
        probability = self._abnormal(patches)
        return anomaly_map(probability, seen.grid, tiles), self._abnormal(seen.pooled).mean()

    def _abnormal(self, vectors: Tensor) -> Tensor:
        return (self.scale * cosines(vectors, self.anchors)).softmax(-1)[..., 1]

    def _learn(self, seen: EmbeddedPatches, tiles: Tiles) -> None:
        generator = torch.Generator().manual_seed(self.config.seed)
        self._adapter.reset(generator)
        if not self.config.carry_optimizer_state:
            self._optimizer = self._fresh_optimizer()
        shape = (self.config.steps, *seen.patches.shape)
        noise = self.config.noise * torch.randn(shape, generator=generator).to(seen.patches)

        def logits(patches: Tensor) -> Tensor:
            return upsampled(self.scale * cosines(patches, self.anchors), seen.grid, tiles)

        adapt(
            self._adapter,
            self._optimizer,
            seen.patches,
            list(noise),
            logits,
            hard_weight=self.config.hard_weight,
        )

    def _fresh_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self._adapter.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay)


class Adapter(AbstractAdapter):
    """Makes a detector of a model and the name of a product. No training images, no masks."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def fit(self, model: DualEncoder, data: AbstractSource | None = None) -> Detector:
        """Return the detector. Nothing is trained before there is an image to look at, so `data` is not used."""
        del data
        config = self.config
        scale = model.scale.item() if config.scale is None else config.scale
        tokens = choose_tokens(model, config.tokens)
        see = partial(embedded_patches, model, tokens=tokens)
        return Detector(see, anchors_of(model, *prompts(config)), config, scale)


def mini() -> Config:
    """Return the settings for small models; they are the paper's."""
    return Config()


_PAPER = (
    "Pixel AUROC / AUPRO on MVTec AD: 89.9 / 77.6 (re-run by a third party); WinCLIP 85.1 / 64.6 at equal detection. The second stream, the "
    "prompts of the domain and adaptation each add to it."
)
_METRIC = "pixel AUROC within faulty images, mean over 12 products"
"""Over good images too, as the protocol has it, a map that only knows which images are faulty is well above 0.5."""
_WORDING = ("photo",)
"""What the captions of planted defects call a picture: the domain's own word here."""
_COUNT, _TESTED = 2400, 480


def claim() -> tuple[Claim, ...]:
    """Return four claims: the second stream on two kinds of towers, the prompts, the adaptation."""
    setting = (
        f"{_COUNT:,} drawings of 12 products, half of them with a planted fault, and captions that tell the state but not the place; a small {{}} "
        f"from scratch, 12 epochs; tested on {_TESTED} other drawings with masks. All arms of a seed use one model."
    )
    class_tower, pooled_tower = "ViT with a class token", "ViT with attention pooling (the form of SigLIP)"
    at_chance = Control("Patches that change places know nothing: 0.5 within 0.05.", _is_at_chance)

    def streams(pool: Pool) -> tuple[Arm, ...]:
        run = partial(_localise, pool=pool, steps=0)
        return (
            Arm("tokens of the tower", "baseline", partial(run, tokens="ordinary")),
            Arm("tokens of the second stream", "method", run),
            Arm("second stream, patches change places", "control", partial(run, shuffled=True)),
            Arm("second stream, normal and abnormal exchanged", "further", partial(run, exchanged=True)),
        )

    run = partial(_localise, pool="class")
    return (
        Claim("anovl", "stream", _PAPER, setting.format(class_tower), _METRIC, streams("class"), at_chance),
        Claim("anovl", "pooled", _PAPER, setting.format(pooled_tower), _METRIC, streams("attention"), at_chance),
        Claim(
            "anovl",
            "prompts",
            _PAPER,
            setting.format(class_tower),
            _METRIC,
            (
                Arm("X and broken X", "baseline", partial(run, steps=0, prompts="bare")),
                Arm("states and templates of the domain", "method", partial(run, steps=0)),
                Arm("every other state on the wrong side", "control", partial(run, steps=0, mixed=True)),
                Arm("wording of another domain", "further", partial(run, steps=0, wordings=WORDINGS["object"])),
            ),
            Control("States of which half are on the wrong side gain less than half as much.", gains_less_than_half),
        ),
        Claim(
            "anovl",
            "adaptation",
            _PAPER,
            setting.format(class_tower),
            _METRIC,
            (
                Arm("no adapter", "baseline", partial(run, steps=0)),
                Arm("adapter of five steps", "method", run),
                Arm("adapter that never learns", "control", partial(run, lr=0.0)),
                Arm("tokens of the tower, adapter", "further", partial(run, tokens="ordinary")),
            ),
            Control("An adapter as it was drawn gains less than half as much.", gains_less_than_half),
        ),
    )


@lru_cache(maxsize=1)
def _drawings() -> Listed:
    """Return the training samples, drawn once per process, so that arms share what is trained on them."""
    source = planted_defects("train", count=_COUNT)
    return Listed(list(source), source.name)


@lru_cache(maxsize=2)
def _tested(split: str) -> Listed:
    source = planted_defects(split, count=_TESTED)
    return Listed(list(source), source.name)


def _model(trial: Trial, pool: Pool) -> DualEncoder:
    """Return a small model whose texts know states; the same for all arms of a seed."""
    base = trial.mini("clip")
    own_class = pool == "class"
    vision = VisionConfig(pool=pool, norm_before=own_class, patch_bias=not own_class)
    architecture = replace(base.model.architecture, vision=vision)
    settings = replace(
        base,
        model=replace(base.model, architecture=architecture, vocabulary=512),
        data=LoaderConfig(batch_size=128),
        epochs=12,
        evaluate_every=0,
    )
    return trial.train(settings, _drawings(), shared=True)


def _localise(
    trial: Trial, *, pool: Pool, shuffled: bool = False, exchanged: bool = False, mixed: bool = False, **settings: Any
) -> float:
    """Return the pixel AUROC within faulty images, the mean over products; the numbers of the protocol are noted beside it."""
    model = _model(trial, pool)
    generator = torch.Generator().manual_seed(trial.seed)

    def moved(seen: EmbeddedPatches) -> EmbeddedPatches:
        """Give every patch the place of another one."""
        return replace(seen, patches=seen.patches[:, torch.randperm(seen.patches.shape[1], generator=generator)])

    @cache
    def of_product(product: str) -> Detector:
        config = Config(**{"product": product, "kind": kind_of(product), "wordings": _WORDING, **settings})
        made = Adapter(config).fit(model)
        if mixed:
            made.anchors = _mixed_anchors(model, config)
        if exchanged:
            made.anchors = made.anchors.flip(0)
        if shuffled:
            plain, made.see = made.see, lambda images: moved(plain(images))
        return made

    found = detect(lambda sample: of_product(sample.domain or ""), _tested(trial.split), model.image_policy)
    for name, mean in class_means(measure_found(found)).items():
        trial.note(name, mean)
    return fmean(within_faulty(found, product) for product in PRODUCTS)


def _mixed_anchors(model: DualEncoder, config: Config) -> Tensor:
    """Return anchors of which every other prompt is one of the other side."""
    normal, abnormal = prompts(config)
    exchanged = [(b, a) if i % 2 else (a, b) for i, (a, b) in enumerate(zip(normal, abnormal, strict=True))]
    return anchors_of(model, *(tuple(side) for side in zip(*exchanged, strict=True)))


def _is_at_chance(values: Mapping[Part, Sequence[float]]) -> bool:
    return abs(fmean(values["control"]) - 0.5) < 0.05
