"""Brain encoding: which sites of a brain are predicted best by vision and language together.

Paper: Subramaniam et al., "Revealing Vision-Language Integration in the Brain with Multimodal Networks", ICML 2024, arXiv 2406.14481.
Official code: github.com/vsubramaniam851/brain-multimodal, without the comparisons and without the data; those are written here from the paper.

Idea: fit linear maps from the features of a network to what each site did while pictures and words were seen and heard. A site integrates if a
vision-language network predicts it better than vision alone, than language alone, than both side by side in one linear map, and than the same network
with random weights. Nothing is trained but the maps.

Equations (sections 3 and 4; `diptych.evaluation.encoding` has them):
    W = (X'X + alpha I)^-1 X'y on the training blocks;  score = mean over folds of Pearson's r in half of the held-out block, at the alpha that
        is best in the other half
    95 % interval of validation r over sorted resamples of the events: where its lower end is above 0, a bin is looked at
    p = (1 + #{resamples without an advantage}) / (1 + resamples), q by Benjamini and Hochberg over the sites of a comparison

What differs: the p-value is ours, the published one was not released. Events are what is resampled, and bins of a site stay together, so overlapping
windows do not inflate it; `block` draws neighbouring events together. The intercept is not penalised, which no correlation notices. "Multimodal"
features of a dual encoder are image and text embedding and their products, number by number. Sites need not be in a brain: responses may be voxels,
ratings or the units of another network. Dissimilarities of stimuli are a second readout, by representational similarity with its noise ceiling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64

from diptych.claims.claim import Arm, Claim, Control, Part, Trial
from diptych.claims.measures import gains_less_than_half
from diptych.claims.sites import Sites, shifted, simulate_sites, smooth_order, smooth_walk
from diptych.data.bundles import bundle_file
from diptych.data.openmoji import openmoji
from diptych.data.responses import Responses, read_dissimilarities, read_responses
from diptych.data.sources import AbstractSource, Subset, open_source
from diptych.errors import ConfigError, EvaluationError
from diptych.evaluation.encoding import (
    ALPHAS,
    Comparison,
    Resampled,
    compare,
    contiguous_folds,
    encode,
    encode_resampled,
    shuffled_folds,
    sorted_resamples,
)
from diptych.evaluation.similarity import Similarity, compare_dissimilarities, dissimilarities
from diptych.evaluation.stats import bootstrap
from diptych.models.dual import DualEncoder
from diptych.models.layers import Positions, fresh_twin, jl_dimension, layer_features, sparse_projection
from diptych.models.weights import load
from diptych.types import Interval, Report
from diptych.verbs import AbstractProbe

Features = Mapping[str, Float[np.ndarray, "n _d"]]
OPPONENTS = ("vision", "language", "side by side", "random weights")
"""What the multimodal features must beat at a site."""


@dataclass(frozen=True)
class Config:
    """Settings of the probe.

    Attributes:
        responses: File of responses, one row per sample in the order of the source; see `read_responses`. None for none.
        dissimilarities: File of dissimilarity matrices of the samples; see `read_dissimilarities`. None for none.
        vision_layer: Module that gives the vision features; a tower gives its pooled vector. The paper takes the best layer by validation.
        text_layer: Module that gives the language features.
        positions: What is made of tokens and patches of other layers; the paper takes all, along sparse random directions.
        components: Principal components that are kept of each part of the features, None for all. A short cut: found without the responses.
        alphas: Penalties of the ridge, above 0; 0.1 to 100,000.
        folds: Blocks of time that are held out in turn; 5.
        resamples: 1,000.
        block: Neighbouring events that are drawn together; 1 in the paper. More where what is left unexplained is alike over time.
        min_bins: Bins of a site that must be predicted for it to be compared; 10 of 161 in the paper. All where there are fewer.
        level: Share of false ones among the sites found, in expectation; 0.05.
        seed: Of resamples, random weights and directions.
    """

    responses: Path | None = None
    dissimilarities: Path | None = None
    vision_layer: str = "vision"
    text_layer: str = "text"
    positions: Positions = "mean"
    components: int | None = None
    alphas: tuple[float, ...] = ALPHAS
    folds: int = 5
    resamples: int = 1000
    block: int = 1
    min_bins: int = 10
    level: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Battery:
    """Which sites integrate.

    Attributes:
        comparisons: Of the multimodal features with each opponent.
        multimodal: Sites where they beat every opponent.
        reverse: Of random weights with the trained ones: how often chance wins, a gauge of false positives.
    """

    comparisons: Mapping[str, Comparison]
    multimodal: Bool[np.ndarray, " s"]
    reverse: Comparison


def model_features(
    model: DualEncoder, source: AbstractSource, config: Config
) -> dict[str, Float64[np.ndarray, "n _d"]]:
    """Return the features of each sample: vision; where all samples have texts, also language, both side by side, multimodal, and random weights.

    Without texts, random weights are those of the vision features.

    Args:
        model: Any.
        source: Samples in the order of the events.
        config: Names the layers.
    """
    spoken = all(source.texts(row) for row in range(len(source)))
    own, twin = (_layers(one, source, config, spoken=spoken) for one in (model, fresh_twin(model, seed=config.seed)))
    if not spoken:
        return {"vision": own["vision"], "random weights": twin["vision"]}
    beside = np.concatenate([own["vision"], own["language"]], 1)
    return {**own, "side by side": beside, "random weights": twin["multimodal"]}


def _layers(
    model: DualEncoder, source: AbstractSource, config: Config, *, spoken: bool
) -> dict[str, Float64[np.ndarray, "n _d"]]:
    heads = ("image_head", "text_head") if spoken else ()
    names = (config.vision_layer, *((config.text_layer, *heads) if spoken else ()))
    found = layer_features(model, source, names, positions=config.positions)
    if config.positions == "flatten":
        dim = jl_dimension(len(source))
        found = {name: sparse_projection(x, dim, seed=config.seed) for name, x in found.items()}
    parts = {name: x.double().numpy() for name, x in found.items()}
    vision = principal(parts[config.vision_layer], config.components)
    if not spoken:
        return {"vision": vision}
    image, text = (parts[head] / np.linalg.norm(parts[head], axis=1, keepdims=True) for head in heads)
    joint = (np.concatenate([image, text], 1), image * text)
    return {
        "vision": vision,
        "language": principal(parts[config.text_layer], config.components),
        "multimodal": np.concatenate([principal(part, config.components) for part in joint], 1),
    }


def principal(features: Float[np.ndarray, "n d"], count: int | None) -> Float64[np.ndarray, "n k"]:
    """Return the first `count` principal components of standardised features; the features themselves when None or where there are no more."""
    if count is None or count >= min(features.shape):
        return features
    spread = features.std(0)
    standard = (features - features.mean(0)) * np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)
    left, size, _ = np.linalg.svd(standard, full_matrices=False)
    components: np.ndarray = left[:, :count] * size[:count]
    return components


def score_features(features: Features, responses: Responses, config: Config) -> dict[str, Resampled]:
    """Return the scores of every set of features, all on the same resamples."""
    resamples = sorted_resamples(len(responses.values), config.resamples, block=config.block, seed=config.seed)
    return {
        name: encode_resampled(x, responses.targets, resamples, folds=config.folds, alphas=config.alphas)
        for name, x in features.items()
    }


def run_battery(
    scores: Mapping[str, Resampled], sites: int, config: Config, *, opponents: Sequence[str] = OPPONENTS
) -> Battery:
    """Return which sites the multimodal features predict better than every opponent.

    Args:
        scores: Of all sets of features.
        sites: How many there are.
        config: Gives level and number of bins.
        opponents: Sets to beat.

    Source: section 4.
    """
    bins = min(config.min_bins, scores["multimodal"].test.shape[1] // sites)
    found = {name: compare(scores["multimodal"], scores[name], sites, min_bins=bins) for name in opponents}
    won = np.all([comparison.significant(config.level) for comparison in found.values()], axis=0)
    return Battery(found, won, compare(scores["random weights"], scores["multimodal"], sites, min_bins=bins))


class Probe(AbstractProbe):
    """Asks which sites integrate vision and language, and whether the model finds the same stimuli alike."""

    def __init__(self, config: Config) -> None:
        if config.responses is None and config.dissimilarities is None:
            raise ConfigError("There is nothing to compare the model with. Set responses or dissimilarities to a file.")
        self.config = config

    def measure(self, model: DualEncoder, data: AbstractSource) -> Report:
        """Return r of every set of features, the shares of sites that pass each test, and rank correlations of dissimilarities.

        Raises:
            EvaluationError: If responses do not fit the samples, or samples have no texts.
        """
        config = self.config
        features = model_features(model, data, config)
        metrics: dict[str, Interval] = {}
        notes: list[str] = []
        if config.responses is not None:
            responses = read_responses(config.responses)
            _check_rows(len(responses.values), data)
            if "multimodal" not in features:
                raise EvaluationError(
                    f"Samples of {data.name} without texts: integration needs a text for every image."
                )
            scores = score_features(features, responses, config)
            found = run_battery(scores, len(responses.sites), config)
            metrics |= _metrics(scores, found, config)
            named = [name for name, won in zip(responses.sites, found.multimodal, strict=True) if won]
            notes.append(f"{len(named)} of {len(responses.sites)} sites integrate: {', '.join(named) or 'none'}.")
        if config.dissimilarities is not None:
            measured = read_dissimilarities(config.dissimilarities)
            _check_rows(len(next(iter(measured.values()))), data)
            for name, x in features.items():
                similar = compare_dissimilarities(dissimilarities(x), list(measured.values()), seed=config.seed)
                metrics[f"similarity, {name}"] = similar.correlation
            low, high = similar.ceiling
            notes.append(f"Noise ceiling of {len(measured)} matrices: {low:.3f} to {high:.3f}.")
        settings = {
            "samples": len(data),
            "resamples": config.resamples,
            "block": config.block,
            "folds": config.folds,
            "seed": config.seed,
        }
        return Report(f"Brain encoding of {data.name}", metrics, settings, tuple(notes))


def _metrics(scores: Mapping[str, Resampled], found: Battery, config: Config) -> dict[str, Interval]:
    means = {name: score.test.mean(1) for name, score in scores.items()}
    r = {
        f"r, {name}": Interval(float(mean.mean()), *np.percentile(mean, [2.5, 97.5]).tolist())
        for name, mean in means.items()
    }
    beats = {
        f"sites, multimodal beats {name}": comparison.significant(config.level)
        for name, comparison in found.comparisons.items()
    }
    chance = {"sites, random weights beat multimodal": found.reverse.significant(config.level)}
    sites = beats | chance | {"sites that integrate": found.multimodal}
    return r | {name: bootstrap(won.astype(np.float64), seed=config.seed) for name, won in sites.items()}


def _check_rows(count: int, data: AbstractSource) -> None:
    if count != len(data):
        raise EvaluationError(f"There must be one row per sample of {data.name}, {len(data)}; there are {count}.")


def mini() -> Config:
    """Return settings for some hundred events and some dozen sites of few bins: 200 resamples, 24 principal components of each part."""
    return Config(components=24, resamples=200, min_bins=3)


_PAPER = "12.9 % of 1,090 electrodes integrate (141); trained networks predict better than random ones (abstract)."
EVENTS = 800


@lru_cache(maxsize=1)
def _stimuli() -> tuple[dict[str, Float64[np.ndarray, "n _d"]], Float64[np.ndarray, "n d"]]:
    """Return features of drawn emoji with their names, once per process, and the products that integrating sites are made of."""
    source = openmoji("train")
    source = Subset(source, np.random.default_rng(0).permutation(len(source))[:EVENTS].tolist(), "emoji")
    model = load("lite0-minilm", offline=True)
    features = model_features(model, source, mini())
    heads = layer_features(model, source, ("image_head", "text_head"))
    image, text = (torch.nn.functional.normalize(head, dim=-1).double().numpy() for head in heads.values())
    return features, principal(image * text, 24)


@lru_cache(maxsize=8)
def _simulated(seed: int, split: str, lag: int = 0) -> tuple[Sites, dict[str, Resampled]]:
    """Return simulated sites and the scores of every set of features; arms of one trial share them."""
    features, fused = _stimuli()
    rng = np.random.default_rng([seed, split == "test"])
    order = smooth_order(features["side by side"], rng)
    features = {name: x[order] for name, x in features.items()}
    sites = simulate_sites(features["vision"], features["language"], fused[order], rng)
    sites = shifted(sites, lag)
    return sites, score_features(features, sites.responses, mini())


def _recovery(
    trial: Trial, *, opponents: Sequence[str] = OPPONENTS, lag: int = 0, additive_only: bool = False
) -> float:
    """Return the share of integrating sites that is found, minus the share of others that is."""
    sites, scores = _simulated(trial.seed, trial.split, lag)
    if additive_only:
        scores = {**scores, "multimodal": scores["side by side"]}
    found = run_battery(scores, len(sites.kinds), mini(), opponents=opponents).multimodal
    for kind in dict.fromkeys(sites.kinds):
        trial.note(f"found, {kind}", float(found[sites.of(kind)].mean()))
    true = sites.of("integrating")
    trial.note("false among found", float(found[~true].sum() / max(1, found.sum())))
    return float(found[true].mean() - found[~true].mean())


def _trained(trial: Trial, *, features: str, lag: int = 0) -> float:
    """Return mean test r at the sites that see or hear."""
    sites, scores = _simulated(trial.seed, trial.split, lag)
    signal = sites.of("vision") | sites.of("language") | sites.of("both")
    return float(scores[features].test.mean(0).reshape(len(sites.kinds), -1)[signal].mean())


def _leak(trial: Trial, *, shuffled: bool, smooth: bool = True) -> float:
    """Return mean test r of smooth features at sites of smooth noise: there is nothing to predict."""
    rng = np.random.default_rng([trial.seed, trial.split == "test"])
    features = smooth_walk(EVENTS, 24, rng)
    targets = smooth_walk(EVENTS, 60, rng) if smooth else rng.normal(size=(EVENTS, 60))
    folds = shuffled_folds(EVENTS, seed=trial.seed) if shuffled else contiguous_folds(EVENTS)
    return float(encode(features, targets, folds).test.mean())


@lru_cache(maxsize=8)
def _objects(seed: int, *, random: bool) -> Float64[np.ndarray, "92 92"]:
    model = load("lite0-minilm", offline=True)
    model = fresh_twin(model, seed=seed) if random else model
    source = open_source(bundle_file("brain-92-objects", "stimuli.csv").parent / "images")
    return dissimilarities(layer_features(model, source, ["vision"])["vision"].double().numpy())


def _alike(trial: Trial, *, random: bool = False, permuted: bool = False) -> float:
    """Return the rank correlation with the inferior temporal cortex of three people, on 60 of 92 objects drawn anew for each seed."""
    measured = read_dissimilarities(bundle_file("brain-92-objects", "rdms.npz"))
    rng = np.random.default_rng([trial.seed, trial.split == "test"])
    chosen = rng.permutation(92)[:60]
    rows: Int64[np.ndarray, " n"] = rng.permutation(chosen) if permuted else chosen
    model = _objects(trial.seed if random else 0, random=random)[np.ix_(rows, rows)]
    people = [matrix[np.ix_(chosen, chosen)] for name, matrix in measured.items() if name.startswith("human_IT")]
    found: Similarity = compare_dissimilarities(model, people, seed=trial.seed)
    trial.note("ceiling, low", found.ceiling[0])
    trial.note("ceiling, high", found.ceiling[1])
    return found.correlation.value


def _finds_nothing(values: Mapping[Part, Sequence[float]]) -> bool:
    return abs(fmean(values["control"])) < 0.05


def claim() -> tuple[Claim, ...]:
    """Return four claims: planted integration is found, trained features predict, shuffled folds leak, and trained layers resemble a brain."""
    simulated = (
        f"{EVENTS} drawn emoji with their names in smoothed random order; 60 simulated sites of 9 bins: 15 linear in vision, 15 in language, 10 in "
        "both, 10 in products of both that no linear map of both gives, 10 noise; features of lite0-minilm, 200 resamples."
    )
    recovery = Claim(
        slug="brain_encoding",
        name="recovery",
        claim=_PAPER,
        setting=simulated,
        metric="share of integrating sites found minus share of others found",
        arms=(
            Arm("multimodal beats random weights", "baseline", partial(_recovery, opponents=("random weights",))),
            Arm("and vision, language, both side by side", "method", _recovery),
            Arm("responses shifted by 97 events", "control", partial(_recovery, lag=97)),
            Arm(
                "multimodal beats vision and language", "further", partial(_recovery, opponents=("vision", "language"))
            ),
            Arm("both side by side taken for multimodal", "further", partial(_recovery, additive_only=True)),
        ),
        control=Control("Shifted responses find nothing: 0 within 0.05.", _finds_nothing),
    )
    trained = Claim(
        slug="brain_encoding",
        name="trained",
        claim="Trained networks predict systematically better than randomly initialised ones (abstract).",
        setting=f"{simulated} Mean r at the sites that see or hear.",
        metric="mean test r",
        arms=(
            Arm("random weights", "baseline", partial(_trained, features="random weights")),
            Arm("trained weights", "method", partial(_trained, features="multimodal")),
            Arm("trained weights, responses shifted", "control", partial(_trained, features="multimodal", lag=97)),
            Arm("vision and language side by side", "further", partial(_trained, features="side by side")),
        ),
        control=Control("Shifted responses gain less than half as much.", gains_less_than_half),
    )
    leak = Claim(
        slug="brain_encoding",
        name="leak",
        claim="Events in time are held out in blocks, without shuffling (released code; no figure).",
        setting=f"{EVENTS} events; 24 smooth features and 60 smooth noise sites that have nothing to do with each other.",
        metric="mean test r where there is nothing to predict",
        arms=(
            Arm("blocks of time", "baseline", partial(_leak, shuffled=False)),
            Arm("shuffled events", "method", partial(_leak, shuffled=True)),
            Arm("shuffled events, noise that is not smooth", "control", partial(_leak, shuffled=True, smooth=False)),
        ),
        control=Control("Noise that is not smooth gains less than half as much.", gains_less_than_half),
    )
    objects = Claim(
        slug="brain_encoding",
        name="objects",
        claim="Trained networks predict systematically better than randomly initialised ones (abstract).",
        setting="60 of 92 object photos, drawn for each seed; dissimilarities of EfficientNet-Lite0 and of the inferior temporal cortex of "
        "three people.",
        metric="rank correlation of dissimilarities",
        arms=(
            Arm("random weights", "baseline", partial(_alike, random=True)),
            Arm("trained weights", "method", _alike),
            Arm("trained weights, photos permuted", "control", partial(_alike, permuted=True)),
        ),
        control=Control("Permuted photos gain less than half as much.", gains_less_than_half),
        sources=("brain-92-objects",),
    )
    return recovery, trained, leak, objects
