"""GAMA: a network that draws what misleads, learnt on images of several objects. For audits: what needs no look at the victim.

Paper: Aich et al., "GAMA: Generative Adversarial Multi-Object Scene Attacks", NeurIPS 2022, arXiv 2209.09502 (not the "guided adversarial
margin attack" of the same name). Official code: github.com/abhishekaich27/GAMA-pytorch (commit 34ad80b). The text of the paper was not at
hand; what is said of it here follows its code.

Idea: an image-to-image network G is trained once against a surrogate. The changed image must look to it like the text of a pair of objects that
fits the clean image least, and like neither its own clean self nor what a CLIP says of it. Then one pass of G changes any image, for models that
it never saw.

Equations (a, r deep features of the changed and the clean image, v CLIP's embedding of the clean image, t of a text; hat: L2-normalised):
    adv    = clamp(min(max(G(x), x - eps), x + eps), 0, 1)
    t_i    = of some texts drawn from the bank, the one with the smallest |cos(t, v_i)|
    L_txt  = (mean_i |a_hat - t_hat|^2 + mean_i max(0, m - |a_hat - r_hat|)^2) / 4
    L_img  = -mean (a_hat - v_hat)^2, over images and dimensions
    L_att  = mean_i cos(A_i k(adv)_i, A_i k(x)_i),  A the mean over channels of a middle layer k(x)
    L      = (L_txt + L_img + L_att) / 3

What differs: surrogate and CLIP are dual encoders, and may be one. Deep features are the surrogate's embedding, or the mean over places of a layer
as wide as the guide's embeddings; the code takes layers that happen to be 512 wide. Objects are read from regions, else from captions. The code
normalises the clean batch in place and so compares with an image normalised twice; here it is normalised once. It never draws the first text
and lists 38 of COCO's 80 classes; here all count. Its hinge has no gradient where both features are equal; here the gradient is 0.

Uncertain: whether the paper has L_att, which its code took from "Beyond ImageNet Attack" (`attention_weight=0` leaves it out).
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice, product
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.claims.attacks import SCENES, drawings_model, lost_accuracy, lost_recall, random_like
from diptych.claims.claim import Arm, Claim, Control, Trial
from diptych.claims.measures import drawn_scenes, gains_less_than_half
from diptych.config import from_json, to_json
from diptych.curate.wording import nouns
from diptych.data.loader import Loader, LoaderConfig
from diptych.data.sources import AbstractSource
from diptych.errors import CheckpointError, ConfigError, DataError, TrainingError
from diptych.files import atomic_file
from diptych.losses.full import full
from diptych.models.dual import DualEncoder
from diptych.models.embedding import embed_texts, eval_mode
from diptych.models.perturbation import AbstractPerturbation, as_floats, check_eps, fit_size, project, sign_noise
from diptych.types import Sample
from diptych.verbs import AbstractAttack

TINY = 1e-24
"""Squared distances below are taken for it, so that the root has a gradient: 0."""


@dataclass(frozen=True)
class Config:
    """Settings of the attack. Values are the official code's.

    Attributes:
        eps: Bound of the change per channel, in levels of 255; 10.
        steps: Batches learnt from; 20 epochs of 11,540 images, 8 in a batch.
        batch_size: Images in a batch; 8.
        lr: Of Adam; 1e-4, betas 0.5 and 0.999.
        width: Channels of the generator's first layer; 64.
        blocks: Residual blocks; 6.
        dropout: Between their convolutions; 0.5.
        margin: m; 0.2.
        candidates: Texts drawn for a batch, of which each image takes one; the code draws as many as images, 8. None for all.
        text_weight: Of L_txt; 1.
        image_weight: Of L_img; 1.
        attention_weight: Of L_att; 1.
        deep: Layer whose mean over places is a and r, as wide as the guide's embedding; None for the surrogate's embedding.
        middle: Layer k; negative ones count from the last, the half is usual.
        template: Of a text, with the names of two objects.
        objects: At most so many, the most frequent.
        seed: Of the generator's weights, the order and the draws.
    """

    eps: float = 10
    steps: int = 28_850
    batch_size: int = 8
    lr: float = 1e-4
    width: int = 64
    blocks: int = 6
    dropout: float = 0.5
    margin: float = 0.2
    candidates: int | None = 8
    text_weight: float = 1.0
    image_weight: float = 1.0
    attention_weight: float = 1.0
    deep: int | None = None
    middle: int = -2
    template: str = "a photo depicts {} and {}"
    objects: int = 80
    seed: int = 0

    def __post_init__(self) -> None:
        check_eps(self.eps)
        if min(self.steps, self.batch_size, self.width, self.candidates or 1) < 1 or self.objects < 2:
            raise ConfigError(
                f"gama needs steps, batch_size, width and candidates >= 1 and objects >= 2; they are {self.steps}, {self.batch_size}, "
                f"{self.width}, {self.candidates} and {self.objects}."
            )


class BiasedLeak(nn.Module):
    """sqrt(2) leaky_relu(x + b) with a learnt bias per channel and slope 0.2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return activations."""
        return F.leaky_relu(x + self.bias, 0.2) * 2**0.5


def _norm(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), BiasedLeak(channels)]


class Residual(nn.Module):
    """x plus two convolutions of it."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, bias=False) for _ in range(2))
        pad = nn.ReflectionPad2d(1)
        before = [pad, first, *_norm(channels), nn.Dropout(dropout)]
        self.block = nn.Sequential(*before, pad, second, nn.BatchNorm2d(channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return maps of the same shape."""
        return x + self.block(x)  # type: ignore[no-any-return]


class Generator(nn.Module):
    """From an image to another of its size, both in [0, 1]; not yet bounded.

    Args:
        width: Channels of the first layer.
        blocks: Residual blocks.
        dropout: In them.
    """

    def __init__(self, width: int = 64, blocks: int = 6, dropout: float = 0.5) -> None:
        super().__init__()
        w = width
        self.layers = nn.Sequential(
            nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(3, w, 7, bias=False), *_norm(w)),
            nn.Sequential(nn.Conv2d(w, 2 * w, 3, 2, 1, bias=False), *_norm(2 * w)),
            nn.Sequential(nn.Conv2d(2 * w, 4 * w, 3, 2, 1, bias=False), *_norm(4 * w)),
            *(Residual(4 * w, dropout) for _ in range(blocks)),
            nn.Sequential(nn.ConvTranspose2d(4 * w, 2 * w, 3, 2, 1, 1, bias=False), *_norm(2 * w)),
            nn.Sequential(nn.ConvTranspose2d(2 * w, w, 3, 2, 1, 1, bias=False), *_norm(w)),
            nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(w, 3, 7)),
        )

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return images.

        Raises:
            ConfigError: If the sides are no multiples of 4.
        """
        height, width = pixels.shape[-2:]
        if height % 4 or width % 4:
            raise ConfigError(f"GAMA changes images whose sides are multiples of 4 pixels, not {width} x {height}.")
        return (self.layers(pixels).tanh() + 1) / 2  # type: ignore[no-any-return]


@dataclass(frozen=True)
class GeneratedPerturbation(AbstractPerturbation):
    """What a generator makes of an image, within eps of it.

    Attributes:
        generator: In eval mode.
        config: What it was learnt with.
        eps: Bound, in levels of 255.
    """

    generator: Generator
    config: Config
    eps: float

    def apply(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Return the generator's images, projected; each depends on its own image only."""
        return project(self.generator.to(pixels.device)(pixels), pixels, self.eps)

    def save(self, file: Path) -> None:
        """Write the generator as .safetensors.

        Raises:
            ConfigError: If the file has another ending.
        """
        if file.suffix != ".safetensors":
            raise ConfigError(f"A generator of perturbations is written as .safetensors, not as {file.name}.")
        about = {"method": "gama", "eps": repr(self.eps), "config": json.dumps(to_json(self.config))}
        with atomic_file(file) as path:
            save_file({k: v.contiguous() for k, v in self.generator.state_dict().items()}, path, metadata=about)


def read(file: Path, *, eps: float | None = None) -> GeneratedPerturbation:
    """Return what `GeneratedPerturbation.save` wrote.

    Args:
        file: Its file.
        eps: Another bound, in levels of 255; the one in the file when absent.

    Raises:
        CheckpointError: If there is nothing to read.
    """
    try:
        with safe_open(file, "pt") as archive:
            about = archive.metadata()
            state = {name: archive.get_tensor(name) for name in archive.keys()}
        config, stored = from_json(Config, json.loads(about["config"])), float(about["eps"])
        generator = Generator(config.width, config.blocks, config.dropout)
        generator.load_state_dict(state)
    except (OSError, SafetensorError, TypeError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file} holds no generator of gama that could be read: {error!r}") from error
    return GeneratedPerturbation(generator.eval(), config, stored if eps is None else eps)


@dataclass(frozen=True)
class Features:
    """What a surrogate says of images.

    Attributes:
        deep: One vector per image, not normalised.
        middle: A middle layer, places in row order.
    """

    deep: Float[Tensor, "b d"]
    middle: Float[Tensor, "b p c"]


def text_loss(
    adversarial: Float[Tensor, "b d"], clean: Float[Tensor, "b d"], text: Float[Tensor, "b d"], margin: float = 0.2
) -> Float[Tensor, ""]:
    """Return L_txt, at least 0: m^2 / 4 where all three are equal, 0 where `adversarial` is the text and at least m away from `clean`."""
    a, r, t = (F.normalize(full(x), dim=-1) for x in (adversarial, clean, text))
    away = (a - r).square().sum(-1).clamp(min=TINY).sqrt()
    return ((a - t).square().sum(-1).mean() + (margin - away).clamp(min=0).square().mean()) / 4


def image_loss(adversarial: Float[Tensor, "b d"], image: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Return L_img, from -4 / d to 0 for equal features."""
    a, v = (F.normalize(full(x), dim=-1) for x in (adversarial, image))
    return -(a - v).square().mean()


def attention_loss(adversarial: Float[Tensor, "b p c"], clean: Float[Tensor, "b p c"]) -> Float[Tensor, ""]:
    """Return L_att, in [-1, 1]: 1 for equal maps. Places where the clean map is strong count most.

    Source: Zhang et al. 2022, "Beyond ImageNet Attack", section 3.3.
    """
    clean, adversarial = full(clean).detach(), full(adversarial)
    attention = clean.mean(-1, keepdim=True)
    return F.cosine_similarity((attention * adversarial).flatten(1), (attention * clean).flatten(1)).mean()


def attack_loss(
    adversarial: Features,
    clean: Features,
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    config: Config,
) -> Float[Tensor, ""]:
    """Return L.

    Args:
        adversarial: Of the changed images.
        clean: Of the clean ones.
        image: The guide's embeddings of the clean ones.
        text: The guide's embedding of each image's text.
        config: Margin and weights.
    """
    parts = (
        config.text_weight * text_loss(adversarial.deep, clean.deep, text, config.margin),
        config.image_weight * image_loss(adversarial.deep, image),
        config.attention_weight * attention_loss(adversarial.middle, clean.middle),
    )
    return sum(parts[1:], parts[0]) / 3


def least_related(texts: Float[Tensor, "n d"], images: Float[Tensor, "b d"]) -> Int64[Tensor, " b"]:
    """Return, for each image, the row of the text with the smallest |cos|: unrelated, and not opposite."""
    return (F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T).abs().argmin(1)


def objects_of(sample: Sample) -> tuple[str, ...]:
    """Return the names of the things in an image, each once: of its regions if it has any, else the nouns of its captions (English)."""
    said = [region.phrase for region in sample.regions] or [t.text for t in sample.texts if t.role == "caption"]
    return tuple(dict.fromkeys(noun for text in said for noun in nouns(text)))


def co_occurrence(data: AbstractSource, most: int) -> tuple[tuple[str, ...], Bool[Tensor, "k k"]]:
    """Return names of things, and which two of them are seen in one image.

    Args:
        data: Samples with regions or captions.
        most: At most so many things, the most frequent.
    """
    images = [objects_of(data.without_image(row)) for row in range(len(data))]
    counts = Counter(name for names in images for name in names)
    classes = tuple(name for name, _ in counts.most_common(most))
    place = {name: number for number, name in enumerate(classes)}
    together = torch.zeros(len(classes), len(classes), dtype=torch.bool)
    for names in images:
        known = [place[name] for name in names if name in place]
        for one, other in product(known, known):
            together[one, other] |= one != other
    return classes, together


def pair_prompts(
    classes: Sequence[str], together: Bool[Tensor, "k k"], template: str = "a photo depicts {} and {}"
) -> tuple[str, ...]:
    """Return one text for every ordered pair of things that are seen together, row by row.

    Raises:
        DataError: If the matrix does not fit the names, or there is no pair.
    """
    if together.shape != (len(classes), len(classes)):
        raise DataError(f"{len(classes)} names need a square matrix of that side, not {list(together.shape)}.")
    pairs = together.nonzero().tolist()
    if not pairs:
        raise DataError(
            f"No two of the {len(classes)} things are seen in one image, so there are no pairs to name. GAMA needs images of several objects, with "
            "regions or with English captions that name them."
        )
    return tuple(template.format(classes[one], classes[other]) for one, other in pairs)


class Attack(AbstractAttack):
    """Learns a generator against a surrogate.

    Args:
        config: Settings.
        guide: Gives embeddings of texts and of clean images; the surrogate itself when absent.
    """

    def __init__(self, config: Config, guide: DualEncoder | None = None) -> None:
        self.config, self.guide = config, guide

    def fit(self, model: DualEncoder, data: AbstractSource) -> GeneratedPerturbation:
        """Return the generator; equal seeds, equal generators. The surrogate is left as it was.

        Args:
            model: Surrogate; its image tower must give layers.
            data: Images of several things, with regions or captions.

        Raises:
            ConfigError: If there is no such layer, or deep features are not as wide as the guide's embeddings.
            DataError: If no two things are seen in one image.
            TrainingError: If the loss is not finite; names the step.
        """
        config, guide = self.config, self.guide or model
        prompts = pair_prompts(*co_occurrence(data, config.objects), config.template)
        bank = embed_texts(guide, prompts).to(model.device)
        settings = LoaderConfig(config.batch_size, workers=0, texts=(), bad_samples="strict")
        batches = Loader(data, model.image_policy, model.tokenizer, settings, seed=config.seed)
        with torch.random.fork_rng(), eval_mode(model), eval_mode(guide):
            torch.manual_seed(config.seed)
            generator = Generator(config.width, config.blocks, config.dropout).to(model.device)
            optimizer = torch.optim.Adam(generator.parameters(), config.lr, betas=(0.5, 0.999))
            for number, batch in enumerate(islice(batches, config.steps if config.eps > 0 else 0)):
                pixels = as_floats(batch.images[0]).to(model.device)
                drawn = bank[torch.randperm(len(bank))[: config.candidates]]
                changed = project(generator(pixels), pixels, config.eps)
                loss = _loss(model, guide, changed, pixels, drawn, config)
                if not loss.isfinite():
                    raise TrainingError(f"the loss is {loss.item()} at step {number}. Lower lr, now {config.lr:g}.")
                optimizer.zero_grad()
                loss.backward(inputs=list(generator.parameters()))
                optimizer.step()
        return GeneratedPerturbation(generator.eval().requires_grad_(False), config, config.eps)


def _loss(
    model: DualEncoder,
    guide: DualEncoder,
    changed: Float[Tensor, "b 3 h w"],
    pixels: Float[Tensor, "b 3 h w"],
    texts: Float[Tensor, "n d"],
    config: Config,
) -> Float[Tensor, ""]:
    with torch.no_grad():
        clean = features(model, pixels, config)
        image = guide.encode_image(fit_size(pixels, (guide.image_policy.size,) * 2))
    adversarial, text = features(model, changed, config), texts[least_related(texts, image)]
    if adversarial.deep.shape != text.shape:
        raise ConfigError(
            f"Deep features have {adversarial.deep.shape[1]} dimensions and the guide's embeddings {text.shape[1]}. Choose a layer (deep) of that "
            "width, or a guide with embeddings as wide as the surrogate's."
        )
    return attack_loss(adversarial, clean, image, text, config)


def features(model: DualEncoder, pixels: Float[Tensor, "b 3 h w"], config: Config) -> Features:
    """Return what a surrogate says of pixels in [0, 1].

    Raises:
        ConfigError: If its image tower has no such layer.
    """
    depth = model.vision.depth
    wanted = [config.middle] if config.deep is None else [config.middle, config.deep]
    if not all(-depth <= layer < depth for layer in wanted):
        raise ConfigError(
            f"The image tower of the surrogate, a {type(model.vision).__name__}, gives {depth} layers; asked for were {wanted}. "
            "Choose others with middle and deep."
        )
    places = [layer % depth for layer in wanted]
    output = model.vision(model.pixels(pixels), layers=places)
    deep = model.image_head(output) if config.deep is None else output.layers[1].mean(1)
    return Features(deep, output.layers[0])


def mini() -> Config:
    """Return a small generator and few steps, each with a larger learning rate: against our small model about half a minute on one core."""
    return Config(steps=150, lr=1e-3, width=16, blocks=2, dropout=0.0)


def claim() -> tuple[Claim, ...]:
    """Return two claims: against the surrogate itself, and against towers and data that it never saw."""
    paper = "About 16 points more misclassification than the best earlier generator, with unknown model and unknown data (abstract)."
    control = Control("An untrained generator takes less than half as much.", gains_less_than_half)
    learnt = f"Learnt against our small model on {SCENES} drawn scenes of one to three things, eps 10, the model its own guide"
    drawings = Claim(
        slug="gama",
        name="drawings",
        claim=paper,
        setting=f"{learnt}; measured on the same model and 200 other scenes.",
        metric="share of right answers at 1 that are lost, mean of both directions",
        arms=(
            Arm("random noise", "baseline", partial(_on_drawings, change=_random)),
            Arm("GAMA", "method", partial(_on_drawings, change=_learnt)),
            Arm("an untrained generator", "control", partial(_on_drawings, change=_untrained)),
            Arm("attention term only", "further", partial(_on_drawings, change=_attention_only)),
            Arm("random guide", "further", partial(_on_drawings, change=_random_guide)),
        ),
        control=control,
    )
    photos = Claim(
        slug="gama",
        name="photos",
        claim=paper,
        setting=f"{learnt}; measured on EfficientNet-Lite0 and MiniLM with photos of PACS, seven classes.",
        metric="share of right zero-shot classes that are lost",
        arms=(
            Arm("random noise", "baseline", partial(_on_photos, change=partial(_random, side=224))),
            Arm("GAMA", "method", partial(_on_photos, change=_learnt)),
            Arm("an untrained generator", "control", partial(_on_photos, change=_untrained)),
            Arm("attention term only", "further", partial(_on_photos, change=_attention_only)),
        ),
        control=control,
        sources=("pacs",),
    )
    return drawings, photos


def _on_drawings(trial: Trial, *, change: Callable[[Trial], AbstractPerturbation]) -> float:
    return lost_recall(trial, change(trial).apply)


def _on_photos(trial: Trial, *, change: Callable[[Trial], AbstractPerturbation]) -> float:
    return lost_accuracy(trial, change(trial).apply)


def _random(trial: Trial, *, side: int = 64) -> AbstractPerturbation:
    return sign_noise(side, mini().eps, seed=trial.seed)


def _untrained(trial: Trial) -> AbstractPerturbation:
    config = replace(mini(), seed=trial.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        generator = Generator(config.width, config.blocks, config.dropout)
    return GeneratedPerturbation(generator.eval().requires_grad_(False), config, config.eps)


def _learnt(trial: Trial, **changes: float) -> AbstractPerturbation:
    config = replace(mini(), seed=trial.seed, **changes)  # type: ignore[arg-type]
    trial.shown(config.steps * config.batch_size)
    return _generator_of(config)


def _attention_only(trial: Trial) -> AbstractPerturbation:
    return _learnt(trial, text_weight=0.0, image_weight=0.0)


def _random_guide(trial: Trial) -> AbstractPerturbation:
    guide = random_like(drawings_model(), trial.seed)
    attack = Attack(replace(mini(), seed=trial.seed), guide)
    return attack.fit(drawings_model(), drawn_scenes("train", SCENES))


@lru_cache(maxsize=2)
def _generator_of(config: Config) -> GeneratedPerturbation:
    return Attack(config).fit(drawings_model(), drawn_scenes("train", SCENES))
