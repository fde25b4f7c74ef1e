"""Trident: a class for every pixel of a picture, from words alone, with three frozen models.

Paper: Shi, Dong and Xu, "Harnessing Vision Foundation Models for High-Performance, Training-Free Open Vocabulary Segmentation", ICCV 2025,
arXiv 2411.09219. Official code: github.com/YuHengsss/Trident. Equations are the code's.

Idea: an image-text model sees little at once, so windows slide over a larger picture. Others classify each window and then put the maps
together; here the windows' features are put together first, then every place gathers what places of the whole picture that look alike say,
and only that is classified. Which places look alike says a self-supervised model (DINO) within a window and a promptable one (SAM) over the
picture; SAM may then also draw the outlines. Nothing is trained.

Equations, V the values of the image tower's last block, d features of a self-supervised model, v and A values and attention of SAM's last block:
    S_ij   = cos(d_i, d_j)                           in each window
    P_ij   = gamma (S_ij - beta mean S), dropped where < 0; the mean is over all windows of the picture
    y      = OutProj(softmax_j(P) V)                 Y: mean of y where windows overlap, resized to SAM's grid
    eps_i  = min(cos_factor mean_hj C^h_ij, 0.9)     C^h_ij = cos(v^h_i, v^h_j)
    M^h_ij = A^h_ij where C^h_ij > eps_i             W_ij = mean_h M^h_ij / sum_j mean_h M^h_ij
    f      = normalise(head(norm(W Y)))              p = softmax(40 f.t), t the words; of several words for background the best counts
Refinement: each connected region of a class becomes a point, a box and a mask for SAM; of masks that SAM is sure of,
R_c = max sigmoid(m) p_c, and the class is argmax_c R_c where there is one.

What differs from the official code: where no S_ij of a row is large enough, as in a picture of one colour, a place keeps its own value (the
official code gives NaN); settings that are None follow the size of the model; a picture is resized once, and one whose sides are no whole
patches is not padded; towers without attention can be used with their ordinary tokens; without other models, features are the tower's own tokens
and a segmenter of colours stands in for SAM (`models/segmenters.py`). No special pass for long pictures, as the official code has for
Cityscapes. Where no refined class is left, its score too is the coarse one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from diptych.claims.claim import Arm, Claim, Control, Trial
from diptych.claims.drawn_things import (
    TESTED,
    THINGS,
    TRAINED,
    Form,
    attending_anywhere,
    model_of_things,
    noted_miou,
    stage_of_lite0,
)
from diptych.data.sources import AbstractSource
from diptych.errors import ConfigError, EvaluationError
from diptych.evaluation.segmentation import Labelled, Vocabulary, labels_of, only_image, probabilities_of
from diptych.evaluation.zeroshot import class_embeddings, read_prompts
from diptych.models.dense import (
    attention_inputs,
    attention_update,
    given_affinity,
    patch_embeddings,
    values_on_grid,
    vision_transformer,
)
from diptych.models.dense_features import DenseFeatures, tower_features
from diptych.models.dual import DualEncoder
from diptych.models.embedding import embed_texts, inference
from diptych.models.precision import Precision
from diptych.models.segmenters import (
    ColourSegmenter,
    Looked,
    Prompts,
    Segmenter,
    SelfAttention,
    into_square,
    regions_of,
)
from diptych.models.tiles import Windows, resized_for_windows, whole
from diptych.models.vision import VisionTransformer
from diptych.types import Batch
from diptych.verbs import AbstractAdapter

BLOCK = 256
"""Rows of the affinity over the picture that are held at once."""


@dataclass(frozen=True)
class Config:
    """Settings of the labeller; the paper's for Pascal VOC with background.

    Attributes:
        prompts: File of templates that names are put into, see `evaluation/prompts`; the paper has 80 for photos.
        short_side: Of the picture that the image tower sees, pixels; None for 2 times the model's own side: 448 for 224.
        long_side: At most; 2048.
        crop: Side of the windows, pixels; None for 1.5 times the model's side: 336.
        stride: From window to window; None for the model's side: 224.
        beta: Share of the mean similarity that similarities must exceed; 1.2.
        gamma: Sharpness of the softmax over them; 3.
        cos_factor: Share of the mean cosine that cosines of values must exceed; 1.2 (0 for VOC without background, 3 for Cityscapes).
        most: Largest threshold for them; 0.9.
        negative: Threshold in place of a negative one; None keeps it (0.6 for ADE20k and Cityscapes, `refine_neg_cos` in the official code).
        scale: Of the cosines with texts; 40.
        least_probability: A pixel whose best class has less is background; 0.2.
        tokens: `values` are those of the last block's attention, `ordinary` the tower's own tokens, for any tower that gives patches. `auto`
            is `values` where the tower has attention.
        guided: Mix tokens within windows by the self-supervised features; else each keeps its own.
        splice: Put `features` of windows together, or their `logits`, as others do (segment, then splice).
        aggregate: Gather over the whole picture by the segmenter's attention.
        refine: Ask the segmenter for outlines.
        refine_threshold: Pixels whose best class has less make no region; 0.2 (0.05 for COCO-Stuff).
        least_area: Of a region, in pixels of the half-sized picture; 225.
        least_quality: Masks are taken above it; 0.8.
        mask_factor: Probabilities become a mask prompt by it; 0.005.
        precision: Of the image-text model and of features; fp16 in the official code. `auto` takes bf16 where the processor has it.
    """

    prompts: str = "photo"
    short_side: int | None = None
    long_side: int = 2048
    crop: int | None = None
    stride: int | None = None
    beta: float = 1.2
    gamma: float = 3.0
    cos_factor: float = 1.2
    most: float = 0.9
    negative: float | None = None
    scale: float = 40.0
    least_probability: float = 0.2
    tokens: Literal["auto", "values", "ordinary"] = "auto"
    guided: bool = True
    splice: Literal["features", "logits"] = "features"
    aggregate: bool = True
    refine: bool = True
    refine_threshold: float = 0.2
    least_area: int = 225
    least_quality: float = 0.8
    mask_factor: float = 0.005
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if self.aggregate and self.splice == "logits":
            raise ConfigError("Logits of windows are classified already: splice=logits needs aggregate=False.")
        shares = {name: getattr(self, name) for name in ("least_probability", "refine_threshold", "least_quality")}
        if wrong := {name: value for name, value in shares.items() if not 0 <= value <= 1}:
            raise ConfigError(f"These must be in [0, 1]: {wrong}.")
        if not (self.gamma >= 0 and self.scale > 0 and 0 <= self.most < 1 and self.least_area >= 1):
            raise ConfigError(
                f"Needed are gamma >= 0, scale > 0, most in [0, 1) and least_area >= 1, not {self.gamma}, {self.scale}, {self.most} and "
                f"{self.least_area}."
            )


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "voc21": {},
    "voc20": {"short_side": 336, "stride": 112, "least_probability": 0.0, "cos_factor": 0.0},
    "context60": {"short_side": 576, "least_probability": 0.15, "refine_threshold": 0.15},
    "context59": {"short_side": 576, "least_probability": 0.0, "refine_threshold": 0.15},
    "coco-object": {"least_probability": 0.25, "refine_threshold": 0.25},
    "coco-stuff": {"least_probability": 0.0, "refine_threshold": 0.05},
    "ade20k": {"short_side": 576, "least_probability": 0.0, "refine_threshold": 0.05, "negative": 0.6},
    "cityscapes": {
        "short_side": 688,
        "least_probability": 0.0,
        "refine_threshold": 0.1,
        "cos_factor": 3.0,
        "negative": 0.6,
    },
}
"""What the official code changes for each benchmark, for models of 224 pixels: training-free is not tuning-free."""


# --- within a window ---


def window_affinity(
    features: Float[Tensor, "k c rows columns"], *, beta: float, gamma: float
) -> Float[Tensor, "k n n"]:
    """Return softmax(P): how the places of each window look at each other; rows sum to 1.

    A row in which nothing is left, as where all features are equal and beta > 1, looks at itself alone.

    Args:
        features: Of all windows of one picture: their similarities share one mean.
        beta: At most 1 keeps something in every row.
        gamma: 0 averages what is left.
    """
    direction = F.normalize(features.flatten(2), dim=1)
    similarity = direction.mT @ direction
    logits = gamma * (similarity - beta * similarity.mean())
    kept = logits >= 0
    itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    kept = kept | (itself & ~kept.any(-1, keepdim=True))
    return logits.masked_fill(~kept, -torch.inf).softmax(-1)


def guided_values(
    model: DualEncoder,
    pixels: Float[Tensor, "k 3 height width"],
    affinity: Float[Tensor, "k n n"],
    grid: tuple[int, int],
) -> Float[Tensor, "k w rows columns"]:
    """Return y of windows; values are resized (bilinear) to the affinity's grid where that is another one than the tower's.

    Args:
        model: With a vision transformer.
        pixels: Normalised.
        affinity: From `window_affinity`.
        grid: (rows, columns) of its n places.
    """
    (inputs,) = attention_inputs(model.vision, pixels)
    inputs = values_on_grid(inputs, grid)
    mixed = attention_update(model.vision, inputs, given_affinity(affinity[:, None]))
    return mixed.mT.unflatten(2, grid)  # type: ignore[no-any-return]


# --- over the picture ---


def thresholds(
    cosine: Float[Tensor, "heads r n"], cos_factor: float, *, most: float = 0.9, negative: float | None = None
) -> Float[Tensor, " r"]:
    """Return eps of each row: `cos_factor` times its mean cosine, at most `most`, and `negative` in place of negative ones."""
    eps = (cos_factor * cosine.mean((0, 2))).clamp(max=most)
    return eps if negative is None else torch.where(eps < 0, negative, eps)


def masked_affinity(
    attention: Float[Tensor, "heads r n"],
    cosine: Float[Tensor, "heads r n"],
    eps: Float[Tensor, " r"],
    *,
    first: int = 0,
) -> Float[Tensor, "r n"]:
    """Return W: attention where values are alike, the mean over heads, rows scaled to sum 1.

    A place is always like itself, so no row is empty; one whose attention to itself is 0 and that is like no other looks at itself alone.

    Args:
        attention: Probabilities of places `first`, `first` + 1, ...
        cosine: Of their values with those of all places.
        eps: From `thresholds`.
        first: Number of the first row's place.
    """
    place = torch.arange(len(eps), device=eps.device)
    kept = cosine > eps[:, None]
    kept[:, place, place + first] = True
    weight = torch.where(kept, attention, 0).mean(0)
    empty = weight.sum(-1) == 0
    weight[place[empty], place[empty] + first] = 1
    return weight / weight.sum(-1, keepdim=True)


def aggregate(
    attention: SelfAttention,
    features: Float[Tensor, "n w"],
    *,
    cos_factor: float,
    most: float = 0.9,
    negative: float | None = None,
    block: int = BLOCK,
) -> Float[Tensor, "n w"]:
    """Return W Y, a block of rows at a time; the same whatever the block."""
    value, parts = F.normalize(attention.value, dim=-1), []
    for start in range(0, len(features), block):
        stop = min(start + block, len(features))
        cosine = value[:, start:stop] @ value.mT
        eps = thresholds(cosine, cos_factor, most=most, negative=negative)
        parts.append(masked_affinity(attention.rows(start, stop), cosine, eps, first=start).to(features) @ features)
    return torch.cat(parts)


# --- outlines ---


def refine(
    probabilities: Float[Tensor, "k h w"],
    labels: Int64[Tensor, "h w"],
    looked: Looked,
    config: Config,
) -> Labelled:
    """Return labels with the outlines of a segmenter.

    In a region whose mask is not taken, probabilities stay coarse; its labels may still become those of another class whose mask covers it, as
    in the official code.

    Args:
        probabilities: Coarse ones, in the picture's size.
        labels: The same.
        looked: What the segmenter knows of the picture.
        config: What makes a region, which masks are taken, and the factor of the mask prompt.
    """
    size = (labels.shape[0], labels.shape[1])
    small = (max(1, size[0] // 2), max(1, size[1] // 2))
    half = F.interpolate(probabilities[None], small, mode="bilinear")[0]
    half_labels = F.interpolate(labels[None, None].float(), small, mode="nearest")[0, 0].long()
    sure = half.amax(0) >= config.refine_threshold
    refined, rejected = torch.zeros_like(probabilities), torch.zeros_like(sure)
    for label, probability in enumerate(half):
        regions = regions_of((half_labels == label) & sure, probability, least_area=config.least_area)
        if not regions:
            continue
        square = into_square(probability[None], looked.mask_side)[0]
        prompts = Prompts(
            2.0 * torch.tensor([region.point for region in regions]),
            2.0 * torch.tensor([region.box for region in regions]),
            torch.where(square > config.refine_threshold, square, 0) * config.mask_factor,
        )
        masks = looked.answer(prompts)
        for region, quality in zip(regions, masks.quality.tolist(), strict=True):
            if quality <= config.least_quality:
                rejected |= region.mask
        if (good := masks.quality > config.least_quality).any():
            best = masks.logits[good].amax(0).to(probabilities)
            refined[label] = torch.where(best > 0, best.sigmoid() * probabilities[label], 0)
    drawn = refined.sum(0) > 0
    kept = F.interpolate(rejected[None, None].float(), size, mode="nearest")[0, 0] > 0
    return Labelled(torch.where(drawn, refined.argmax(0), labels), torch.where(drawn & ~kept, refined, probabilities))


# --- the whole ---


class Labeller:
    """Says which class every pixel of a picture shows.

    Attributes:
        model: The image-text model.
        vocabulary: The classes.
        texts: Embedding of each word.
        features: By which places within a window are alike.
        segmenter: By which places of the picture are, and which draws outlines.
        config: All settings.
        patch: Side of the tower's patches, pixels.
        tokens: What is mixed.
    """

    def __init__(
        self,
        model: DualEncoder,
        vocabulary: Vocabulary,
        features: DenseFeatures,
        segmenter: Segmenter,
        config: Config,
    ) -> None:
        self.model, self.vocabulary, self.config = model, vocabulary, config
        self.features, self.segmenter = features, segmenter
        embed: Callable[..., Tensor] = partial(embed_texts, model)
        self.texts = class_embeddings(embed, vocabulary.words, read_prompts(config.prompts)).to(model.device)
        own = model.image_policy.size
        self.patch = own // tower_features(model)(torch.zeros(1, 3, own, own, dtype=torch.uint8)).shape[2]
        self.crop, self.stride = (
            whole(length, self.patch) for length in (config.crop or 1.5 * own, config.stride or own)
        )
        self.short_side = config.short_side or 2 * own
        self.tokens = config.tokens
        if config.tokens == "auto":
            self.tokens = "values" if isinstance(model.vision, VisionTransformer) else "ordinary"
        if self.tokens == "values":
            vision_transformer(model.vision)  # or it says what is needed

    def __call__(self, batch: Batch) -> Labelled:
        """Return the labels of the one picture in a batch, in its own size.

        Raises:
            ConfigError: If there is more than one picture, or no pixels.
            EvaluationError: If a model gives numbers that are not finite.
        """
        return self.label(only_image(batch))

    @torch.no_grad()
    def label(self, image: UInt8[Tensor, "3 h w"]) -> Labelled:
        """Return the labels of a picture of any size."""
        config, size, image = self.config, (image.shape[1], image.shape[2]), image.to(self.model.device)
        looked = self.segmenter(image) if config.aggregate or config.refine else None
        with inference(self.model, config.precision):
            coarse = self._logits(image, looked).float()
        if not coarse.isfinite().all():
            raise EvaluationError("Scores of pixels are not finite: one of the models gives numbers that are not.")
        logits, words = F.interpolate(coarse[None], size, mode="bilinear")[0], len(self.vocabulary.background)
        probabilities = probabilities_of(logits, words, scale=config.scale)
        labels = labels_of(probabilities, background=words > 0, least=config.least_probability)
        said = Labelled(labels, probabilities)
        if config.refine and looked is not None:
            said = refine(probabilities, labels, looked, config)
        return Labelled(said.labels.cpu(), said.probabilities.cpu())

    def _logits(self, image: Tensor, looked: Looked | None) -> Float[Tensor, "q rows columns"]:
        """Return the cosine of every place with every word."""
        config = self.config
        resized = resized_for_windows(
            image, short_side=self.short_side, long_side=config.long_side, side=self.crop, patch=self.patch
        )
        windows = Windows(resized.shape[1], resized.shape[2], self.crop, self.stride)
        maps = self._see(windows.cut(resized))
        grid = windows.of_maps(self.patch, maps.shape[-1] * self.patch // self.crop)
        if config.splice == "logits":
            return grid.merge(torch.stack([self._classify(one) for one in maps]))
        spliced = grid.merge(maps)
        if not config.aggregate:
            return self._classify(spliced)
        assert looked is not None
        attention = looked.attention
        places = F.interpolate(spliced[None], attention.grid, mode="bilinear")[0].flatten(1).T
        gathered = aggregate(
            attention, places, cos_factor=config.cos_factor, most=config.most, negative=config.negative
        )
        return self._classify(gathered.T.unflatten(1, attention.grid))

    def _see(self, crops: UInt8[Tensor, "k 3 side side"]) -> Float[Tensor, "k w rows columns"]:
        """Return y of each window, on a grid that is the tower's or a whole number of times as fine."""
        config, pixels, own = self.config, self.model.pixels(crops), self.crop // self.patch
        if config.guided:
            features = self.features(crops).to(pixels)
            affinity = window_affinity(features, beta=config.beta, gamma=config.gamma)
            grid = (features.shape[2], features.shape[3])
        else:
            affinity, grid = torch.eye(own**2, device=pixels.device).expand(len(crops), -1, -1), (own, own)
        if self.tokens == "values":
            maps = guided_values(self.model, pixels, affinity, grid)
        else:
            tokens = F.interpolate(tower_features(self.model)(crops), grid, mode="bilinear")
            maps = (affinity @ tokens.flatten(2).mT).mT.unflatten(2, grid)
        side = own * max(1, round(maps.shape[-1] / own))
        return maps if maps.shape[-1] == side else F.interpolate(maps, (side, side), mode="bilinear")

    def _classify(self, maps: Float[Tensor, "w rows columns"]) -> Float[Tensor, "q rows columns"]:
        """Return the cosine of each place with each word."""
        tokens = maps.flatten(1).T[None]
        if self.tokens == "values":
            tokens = vision_transformer(self.model.vision).norm_after(tokens)
        embedded = F.normalize(patch_embeddings(self.model, tokens)[0].float(), dim=-1)
        return (self.texts @ embedded.T).unflatten(1, maps.shape[1:])  # type: ignore[no-any-return]


class Adapter(AbstractAdapter):
    """Makes a labeller of a model and words. No training, no masks.

    Attributes:
        config: All settings.
        vocabulary: The classes.
        features: By which places within a window are alike, such as `load_self_supervised`; the tower's own tokens when absent.
        segmenter: Such as `load_sam`; colours when absent.
    """

    def __init__(
        self,
        config: Config,
        vocabulary: Vocabulary,
        *,
        features: DenseFeatures | None = None,
        segmenter: Segmenter | None = None,
    ) -> None:
        self.config, self.vocabulary = config, vocabulary
        self.features, self.segmenter = features, segmenter or ColourSegmenter()

    def fit(self, model: DualEncoder, data: AbstractSource | None = None) -> Labeller:
        """Return the labeller. Nothing is trained, so `data` is not used."""
        del data
        return Labeller(model, self.vocabulary, self.features or tower_features(model), self.segmenter, self.config)


def mini() -> Config:
    """Return the settings for small models and pictures: names alone are the prompts, and small regions make prompts for the segmenter too."""
    return Config(prompts="name", least_area=40)


_PAPER = (
    "Mean IoU over eight benchmarks 48.6 with a ViT-H/14 (before: 44.4), on VOC with background 67.1 with a ViT-B/16. Putting features together "
    "and gathering over the picture before classifying beats classifying windows first."
)
_GRID = tuple({"least_probability": least} for least in (0.2, 0.4, 0.6))
"""How sure a pixel must be not to be background; the paper chooses it for each benchmark too."""


def claim() -> tuple[Claim, ...]:
    """Return two claims: on a tower of CLIP's form, and on one of SigLIP's that went through a folder of transformers."""
    setting = (
        f"{TRAINED:,} scenes in 64 pixels of one or two of {len(THINGS.labels)} drawn things, with captions, every sixth of them the ground alone, "
        f"and a small {{}} from scratch, 20 epochs; tested on {TESTED} other scenes of two to four things in 256 pixels. Features are those of an "
        "EfficientNet-Lite0 trained on ImageNet, a segmenter of colours stands in for SAM. All arms of a seed use one model."
    )
    pooled = "ViT with attention pooling (the form of SigLIP), written for transformers and read back"
    forms: tuple[tuple[str, Form, str], ...] = (
        ("scenes", "class", "ViT with a class token"),
        ("loaded", "attention", pooled),
    )
    return tuple(
        Claim("trident", name, _PAPER, setting.format(tower), _METRIC, _arms(form), _AT_CHANCE)
        for name, form, tower in forms
    )


_METRIC = "mIoU over 12 classes and background"
_AT_CHANCE = Control(
    "Where every place gathers from anywhere, no place is known: mIoU below 0.1.",
    lambda values: max(values["control"]) < 0.1,
)


def _arms(form: Form) -> tuple[Arm, ...]:
    run = partial(_on_scenes, form=form)
    alone = partial(run, aggregate=False, crop=64, stride=64, short_side=64)
    return (
        Arm("segment, then splice", "baseline", partial(run, splice="logits", aggregate=False), _GRID),
        Arm("splice, gather, then segment", "method", run, _GRID),
        Arm("gather from anywhere", "control", partial(run, anywhere=True), _GRID),
        Arm("splice, then segment", "further", partial(run, aggregate=False), _GRID),
        Arm("one window", "further", alone, _GRID),
        Arm("one window, tokens of the tower", "further", partial(alone, tokens="ordinary", guided=False), _GRID),
        Arm("with outlines", "further", partial(run, refine=True), _GRID),
    )


def _on_scenes(trial: Trial, *, form: Form, anywhere: bool = False, **settings: Any) -> float:
    """Return the mIoU; pixel accuracy and the mIoU without background are noted beside it."""
    config = replace(mini(), **{"refine": False, **settings, **trial.changes})
    colours = ColourSegmenter(cells=32)
    segmenter = attending_anywhere(colours, trial.seed) if anywhere else colours
    model = model_of_things(trial, trial.mini("clip"), form)
    return noted_miou(trial, Adapter(config, THINGS, features=stage_of_lite0(), segmenter=segmenter).fit(model))
