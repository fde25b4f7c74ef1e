"""ALIP: two texts per image, the web's and a captioner's, each weighted by how well image, text and caption agree.

Paper: Yang et al., "ALIP: Adaptive Language-Image Pre-training with Synthetic Caption", ICCV 2023, arXiv 2308.08428.
Official code: github.com/deepglint/ALIP.

Idea: web texts are partly wrong, synthetic captions are coarse, so learn from both. How similar image x, text t and caption c are to each
other, in the model's own embeddings and relative to a running mean, says which sample to doubt and which pair of a doubted sample to trust.
No teacher, no parameters, nothing is filtered out.

Equations (section 3; S_tc = t . c and so on, H the running mean of S, moved before it is used):
    H   <- m H + (1 - m) mean(S)
    W_s  = min(1, exp(gamma_s (S_tc - H_tc)))                                       language consistency gate
    W_t  = exp(gamma_p (S_xt - H_xt)) if W_s < 1 else 1, W_c alike with S_xc        description consistency gates
    L    = mean_i W_s W_t l_i(x, t) + mean_i W_s W_c l_i(x, c),  l_i: what pair i adds to CLIP's loss

What differs from the paper: the loss is a mean, with half of each direction, as in the official code (sums in the paper). From that code
come m = 0.99 and the start of H at 1, which scales the first losses down (`history_start="one"`); starting at the first batch's
mean is for short runs. H is part of the checkpoint, and a W_s within rounding of 1 counts as 1 (`tolerance=0` is the official test). Samples
of one group, and samples with the very same text, are positives of each other. With accumulated steps, H moves once per batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diptych.claims.claim import Arm, Claim, Control, Part, Trial
from diptych.claims.measures import auroc, drawn_scenes, gains_less_than_half, mean_recall
from diptych.curate.captions import RegionCaptioner, add_captions
from diptych.curate.wording import nouns
from diptych.data.loader import LoaderConfig, TextColumn
from diptych.data.sources import AbstractSource, Listed, open_source
from diptych.data.texts import ShuffledTexts
from diptych.data.tokenizer import TextPolicy
from diptych.data.transforms import Augment
from diptych.errors import ConfigError
from diptych.losses.contrastive import shared_positives
from diptych.losses.per_sample import info_nce_per_sample
from diptych.models.build import DualConfig
from diptych.models.dual import DualEncoder
from diptych.models.embedding import embed_images, embed_texts
from diptych.models.vision import VisionConfig
from diptych.training.optim import OptimizerConfig
from diptych.training.prepare import hold_out
from diptych.training.recipe import ModelConfig, Recipe
from diptych.types import Batch, Losses, PairEmbeddings, Text
from diptych.verbs import AbstractObjective

Gate = Literal["sample", "text", "caption"]
TEXTS = (TextColumn(("caption",)), TextColumn(("synthetic",)))
"""The two text columns: what came with the image, and what a captioner said."""


@dataclass(frozen=True)
class Config:
    """Settings of the objective.

    Attributes:
        synthetic: Learn from synthetic captions too; False is CLIP.
        gates: Which weights are used: W_s, W_t, W_c. None of them is plain training on both texts (table 4 has all combinations).
        gamma_sample: Exponent of W_s; a literal 2 in the official code. 0 makes it 1.
        gamma_pair: Exponent of W_t and W_c; 2.
        momentum: m, share of the running means that is kept at each loss, in [0, 1); a literal 0.99 in the official code. 0.9 for runs of
            less than some 500 steps.
        history_start: Running means before the first batch: `one` as in the official code, or `first_batch`.
        tolerance: How far below 1 W_s must be for a sample to be doubted, >= 0; 0 as in the official code.
        multi_positive: Samples with one group or one text are positives. False: the diagonal only, as in the paper.
        misplaced: Give each weight to another sample of the batch. A control, for claims.
    """

    synthetic: bool = True
    gates: tuple[Gate, ...] = ("sample", "text", "caption")
    gamma_sample: float = 2.0
    gamma_pair: float = 2.0
    momentum: float = 0.99
    history_start: Literal["one", "first_batch"] = "one"
    tolerance: float = 1e-6
    multi_positive: bool = True
    misplaced: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"objective.momentum must be in [0, 1), not {self.momentum}; the official code has 0.99.")
        if min(self.gamma_sample, self.gamma_pair, self.tolerance) < 0:
            raise ConfigError(
                f"objective.gamma_sample, gamma_pair and tolerance must be >= 0, not {self.gamma_sample}, {self.gamma_pair} and "
                f"{self.tolerance}: a negative exponent would trust the pairs that agree least."
            )


@dataclass(frozen=True)
class GateWeights:
    """Weights of a batch, without gradient.

    Attributes:
        sample: W_s, in (0, 1].
        text: W_t; above 1 where a good pair is saved inside a doubted sample.
        caption: W_c, alike.
    """

    sample: Float[Tensor, " n"]
    text: Float[Tensor, " n"]
    caption: Float[Tensor, " n"]


def similarities(
    image: Float[Tensor, "n d"], text: Float[Tensor, "n d"], caption: Float[Tensor, "n d"]
) -> Float[Tensor, "3 n"]:
    """Return the cosines S_tc, S_xt and S_xc of normalised embeddings, in [-1, 1]."""
    return torch.stack([(a * b).sum(-1) for a, b in ((text, caption), (image, text), (image, caption))])


def gate_weights(similarity: Float[Tensor, "3 n"], history: Float[Tensor, "3"], config: Config) -> GateWeights:
    """Return W_s, W_t and W_c. All are 1 for samples whose text and caption agree better than they did so far.

    Args:
        similarity: S_tc, S_xt, S_xc.
        history: Running means of the three.
        config: Gives exponents and tolerance.

    Source: section 3, language and description consistency gates.
    """
    excess = similarity - history[:, None]
    unclipped = (config.gamma_sample * excess[0]).exp()
    doubted = unclipped < 1 - config.tolerance
    text, caption = torch.where(doubted, (config.gamma_pair * excess[1:]).exp(), 1.0)
    return GateWeights(torch.where(doubted, unclipped, 1.0), text, caption)


class ConsistencyGate(nn.Module):
    """Keeps the running means and turns similarities into weights.

    Attributes:
        history: Running means H_tc, H_xt, H_xc.
        seen: Whether they mean anything yet; until then all weights are 1.
    """

    history: Float[Tensor, "3"]
    seen: Bool[Tensor, ""]

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("history", torch.ones(3))
        self.register_buffer("seen", torch.tensor(config.history_start == "one"))

    @torch.no_grad()
    def forward(
        self, image: Float[Tensor, "n d"], text: Float[Tensor, "n d"], caption: Float[Tensor, "n d"]
    ) -> GateWeights:
        """Return the weights of a batch; in training the running means move first."""
        similarity = similarities(image, text, caption).to(self.history.dtype)
        if self.training:
            moved = self.history.lerp(similarity.mean(1), 1 - self.config.momentum)
            self.history.copy_(torch.where(self.seen, moved, similarity.mean(1)))
            self.seen.fill_(True)
        found = gate_weights(similarity, self.history, self.config)
        return GateWeights(*(torch.where(self.seen, w, 1.0) for w in (found.sample, found.text, found.caption)))


class Objective(AbstractObjective[PairEmbeddings]):
    """Two weighted InfoNCE losses that share the image, one with each text.

    Attributes:
        gate: With the running means, which are part of every checkpoint.
    """

    def __init__(self, model: DualEncoder, config: Config) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.gate = ConsistencyGate(config)

    def encode(self, batch: Batch) -> PairEmbeddings:
        """Return the embeddings of the main view, of the text and of the synthetic caption.

        Raises:
            ConfigError: If the batch has no second text column.
        """
        columns = batch.texts[: 1 + self.config.synthetic]
        if len(columns) < 1 + self.config.synthetic:
            raise ConfigError(
                "ALIP needs two text columns, the text and its synthetic caption; the batch has one. Set data.texts to two columns, the "
                "second with the role `synthetic`, or objective.synthetic to False."
            )
        return PairEmbeddings(
            (self.model.encode_image(batch.images[0]),), tuple(self.model.encode_text(column) for column in columns)
        )

    def loss(self, encoded: PairEmbeddings, batch: Batch) -> Losses:
        """Return the weighted losses of both texts; 2 log n at chance while the weights are 1. Mean weights are logged beside them."""
        image, text = encoded.images[0], encoded.texts[0]
        if not self.config.synthetic:
            loss = self._pairs(image, text, batch, 0).mean()
            return Losses(loss, {"text": loss})
        weights = self.gate(image, text, encoded.texts[1])
        used = {
            name: getattr(weights, name) if name in self.config.gates else torch.ones_like(weights.sample)
            for name in ("sample", "text", "caption")
        }
        if self.config.misplaced:
            used = {name: weight.roll(len(weight) // 2) for name, weight in used.items()}
        by_text = (used["sample"] * used["text"] * self._pairs(image, text, batch, 0)).mean()
        by_caption = (used["sample"] * used["caption"] * self._pairs(image, encoded.texts[1], batch, 1)).mean()
        means = {f"weight_{name}": weight.mean() for name, weight in used.items()}
        return Losses(by_text + by_caption, {"text": by_text, "caption": by_caption, **means})

    def _pairs(
        self, image: Float[Tensor, "n d"], text: Float[Tensor, "n d"], batch: Batch, column: int
    ) -> Float[Tensor, " n"]:
        positives = shared_positives(batch.group, batch.texts[column].key) if self.config.multi_positive else None
        return info_nce_per_sample(image, text, self.model.scale, positives=positives)


def recipe() -> Recipe[Config]:
    """Return the default for captions with synthetic ones beside them: pretrained towers stay as they are, heads and temperature learn.

    Running means that follow fast, from the first batch on, suit runs of some hundred steps. The paper trains from scratch on YFCC15M: 32
    epochs in batches of 4,096, AdamW with lr 1e-3 and weight decay 0.2, crops of 70 to 100 % of the area.
    """
    return Recipe(
        "alip",
        Config(momentum=0.9, history_start="first_batch"),
        model=ModelConfig(start="auto", vision_mode="frozen", text_mode="frozen"),
        data=LoaderConfig(
            batch_size=128,
            texts=TEXTS,
            views=(Augment(crop_scale=(0.7, 1.0), crop_ratio=(0.8, 1.25), flip_rate=0.5),),
        ),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, ema_decay=0.99),
        epochs=10,
    )


def mini() -> Recipe[Config]:
    """Return a small model from scratch on 64-pixel drawings with 16 patches."""
    architecture = DualConfig(vision=VisionConfig(patch_size=16), text_policy=TextPolicy(length=32))
    return Recipe(
        "alip",
        Config(momentum=0.9, history_start="first_batch"),
        model=ModelConfig(start="new", architecture=architecture, vocabulary=1024),
        data=LoaderConfig(batch_size=128, texts=TEXTS),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, ema_decay=0.99),
        epochs=10,
        evaluate_every=0,
    )


_PAPER = "COCO image-to-text R@1 on YFCC15M: CLIP 20.8, both texts without gates 45.1, with gates 46.8 (table 4)."


def claim() -> tuple[Claim, ...]:
    """Return three claims: what the second text brings, what the gates add to it, and whether the weights know which texts are wrong."""
    scenes_setting = (
        "2,000 scenes from scratch, 10 epochs; 40 % of the detailed captions belong to other images, the synthetic ones name the objects only; "
        "tested on 500 scenes with their own detailed captions."
    )
    photos_setting = (
        "480 photos of flickr8k-1k, heads on frozen towers, 20 epochs; half of the captions belong to other photos, the nouns of another "
        "person's caption stand for the synthetic one; tested on 100 others with five captions each."
    )
    metric, sources = "R@1, mean of both directions", ("flickr8k-1k:train", "flickr8k-1k:dev")
    captions = Claim(
        slug="alip",
        name="captions",
        claim=_PAPER,
        setting=scenes_setting,
        metric=metric,
        arms=(
            Arm("captions only", "baseline", partial(_on_scenes, slug="clip")),
            Arm("both texts, gated", "method", _on_scenes),
            Arm("synthetic captions of other images", "control", partial(_on_scenes, wrong_synthetic=True)),
            Arm("both texts, no gates", "further", partial(_on_scenes, gates=())),
            Arm("synthetic captions only", "further", partial(_on_scenes, slug="clip", column=TEXTS[1])),
            Arm("weights of other samples", "further", partial(_on_scenes, misplaced=True)),
        ),
        control=Control("Synthetic captions of other images gain less than half as much.", gains_less_than_half),
    )
    gates = Claim(
        slug="alip",
        name="gates",
        claim=_PAPER,
        setting=photos_setting,
        metric=metric,
        arms=(
            Arm("both texts, no gates", "baseline", partial(_on_photos, gates=())),
            Arm("both texts, gated", "method", _on_photos),
            Arm("weights of other samples", "control", partial(_on_photos, misplaced=True)),
            Arm("captions only", "further", partial(_on_photos, slug="clip")),
            *(
                Arm(f"{name}, {share:.0%} wrong", "further", partial(_on_photos, share=share, **settings))
                for share in (0.0, 0.25)
                for name, settings in _GATED.items()
            ),
        ),
        control=Control("Weights that belong to other samples gain less than half as much.", gains_less_than_half),
        sources=sources,
    )
    detection = Claim(
        slug="alip",
        name="detection",
        claim="The weights are lower for wrong pairs (no figure in the paper).",
        setting=f"{photos_setting} Here 160 of the training captions are sorted into right and wrong by W_s W_t, for CLIP by its cosine.",
        metric="AUROC of the wrong captions",
        arms=(
            Arm("cosine of CLIP", "baseline", partial(_detection, slug="clip")),
            Arm("weights", "method", _detection),
            Arm("weights of other samples", "control", partial(_detection, misplaced=True)),
        ),
        control=Control("Weights that belong to other samples know nothing: 0.5 within 0.06.", _is_at_chance),
        sources=sources,
    )
    return captions, gates, detection


_GATED: Mapping[str, Mapping[str, Any]] = {"no gates": {"gates": ()}, "gated": {}}


def _on_scenes(trial: Trial, *, wrong_synthetic: bool = False, **settings: Any) -> float:
    source: AbstractSource = add_captions(drawn_scenes("train", 2000), RegionCaptioner())
    source = ShuffledTexts(source, 0.4, seed=trial.seed)
    if wrong_synthetic:
        source = ShuffledTexts(source, 1.0, seed=trial.seed + 1, roles=("synthetic",))
    model = trial.train(_arm(trial, trial.mini("alip"), **settings), source)
    return mean_recall(model, drawn_scenes(trial.split, 500))


def _on_photos(trial: Trial, *, share: float = 0.5, **settings: Any) -> float:
    source, test = _photos(trial, share)
    return mean_recall(trial.train(_arm(trial, _PHOTOS, **settings), source), test)


def _detection(trial: Trial, *, slug: str = "alip", misplaced: bool = False) -> float:
    source, _ = _photos(trial, 0.5)
    model = trial.train(_arm(trial, _PHOTOS, slug=slug, misplaced=misplaced), source)
    sorted_out = [source[index] for index in range(160)]
    texts = ([sample.texts[column].text for sample in sorted_out] for column in (0, 1))
    image, text, caption = embed_images(model, sorted_out), *(embed_texts(model, some) for some in texts)
    similarity = similarities(image, text, caption)
    weights = gate_weights(similarity, similarity.mean(1), Config())
    scores = similarity[1] if slug != "alip" else weights.sample * weights.text
    return auroc(-(scores.roll(len(scores) // 2) if misplaced else scores), torch.tensor(source.moved[:160]))


_PHOTOS = replace(recipe(), data=LoaderConfig(batch_size=96, texts=TEXTS), epochs=20)
"""No augmentation, so that the towers look at every photo once."""


def _arm(
    trial: Trial, settings: Recipe[Any], *, slug: str = "alip", column: TextColumn = TEXTS[0], **changes: Any
) -> Recipe[Any]:
    """Return the settings with changes of the objective, or for a method with one text."""
    if slug == "alip":
        return replace(settings, objective=replace(settings.objective, **changes, **trial.changes))
    data = replace(settings.data, texts=(column,))
    return replace(settings, method=slug, objective=trial.mini(slug).objective, data=data)


def _photos(trial: Trial, share: float) -> tuple[ShuffledTexts, AbstractSource]:
    """Return photos with one caption, wrong for a share of them, and the nouns of another caption; and photos to test on."""
    train, validation = hold_out(open_source("flickr8k-1k:train"), 0.2, seed=0)
    samples = []
    for sample in train:
        first, second, *_ = (text.text for text in sample.texts)
        samples.append(replace(sample, texts=(Text(first), Text(", ".join(nouns(second)) or second, "synthetic"))))
    test = open_source("flickr8k-1k:dev") if trial.split == "test" else validation
    return ShuffledTexts(Listed(samples, train.name), share, seed=trial.seed), test


def _is_at_chance(values: Mapping[Part, Sequence[float]]) -> bool:
    return abs(fmean(values["control"]) - 0.5) < 0.06
