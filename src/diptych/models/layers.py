"""What any module of a model makes of samples: the features of a layer, by the module's qualified name."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.data.sources import AbstractSource
from diptych.errors import ConfigError, TextError, nearest
from diptych.models.build import build
from diptych.models.dual import DualEncoder
from diptych.models.embedding import evaluation_view, inference
from diptych.types import TowerOutput, map_tensors

Positions = Literal["mean", "first", "flatten"]
"""How tokens, patches or places become one vector: their mean, the first of them (a class token), or all in a row."""


def layer_features(
    model: DualEncoder,
    source: AbstractSource,
    names: Sequence[str],
    *,
    positions: Positions = "mean",
    batch_size: int = 64,
) -> dict[str, Float[Tensor, "n _d"]]:
    """Return the output of modules for each sample, fp32, on the CPU. A tower gives its pooled vector, without its head.

    Texts are encoded with others of their length, so that padding is in no mean.

    Args:
        model: Any.
        source: Samples whose images can all be read, and whose first texts are taken where a module of the text side is asked for.
        names: Qualified names of modules, such as `vision`, `vision.transformer.blocks.2`, `text`, `text_head`.
        positions: What is made of a sequence or a feature map.
        batch_size: Samples per forward pass.

    Raises:
        ConfigError: If there is no such module; names the nearest.
        ImageError: If an image is missing or cannot be decoded.
        TextError: If a text is needed and missing.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or name.partition(".")[0] not in _SIDES:
            known = [known for known in modules if known.partition(".")[0] in _SIDES]
            raise ConfigError(f"The model has no layer {name!r}. {nearest(name, known)}")
    found: dict[str, Tensor] = {}
    for side in ("image", "text"):
        own = {name: modules[name] for name in names if _SIDES[name.partition(".")[0]] == side}
        if own:
            run = _images if side == "image" else _texts
            found |= run(model, source, own, positions, batch_size)
    return {name: found[name] for name in names}


def fresh_twin(model: DualEncoder, *, seed: int = 0) -> DualEncoder:
    """Return the same architecture with random weights: what a layer says by its wiring alone."""
    torch.manual_seed(seed)
    twin = build(model.config, model.tokenizer, text_record=getattr(model.text, "record", None))
    return twin.to(model.device).eval()


def jl_dimension(count: int, eps: float = 0.1) -> int:
    """Return how many random directions keep all distances of `count` points within 1 - eps and 1 + eps, with a good chance.

    k = floor(4 ln count / (eps^2 / 2 - eps^3 / 3))

    Source: Dasgupta and Gupta 2003, theorem 2.1.
    """
    return math.floor(4 * math.log(count) / (eps**2 / 2 - eps**3 / 3))


def sparse_projection(features: Float[Tensor, "n d"], dim: int, *, seed: int = 0) -> Float[Tensor, "n k"]:
    """Return features along `dim` sparse random directions, which keep distances in expectation; as they are where they have no more.

    Each direction has 1 of sqrt(d) entries that is not 0: +1 or -1, scaled. Long layers become short enough for ridge regression.

    Args:
        features: One row per sample.
        dim: Directions; see `jl_dimension`.
        seed: Of the directions.

    Source: Li, Hastie and Church 2006, "Very Sparse Random Projections".
    """
    width = features.shape[1]
    if dim >= width:
        return features
    rng, density = torch.Generator().manual_seed(seed), width**-0.5
    draws = torch.rand(width, dim, generator=rng)
    signs = (draws < density / 2).to(features.dtype) - (draws > 1 - density / 2).to(features.dtype)
    return features @ signs / (density * dim) ** 0.5  # type: ignore[no-any-return]


_SIDES = {"vision": "image", "image_head": "image", "text": "text", "text_head": "text"}


@contextmanager
def _watching(modules: dict[str, nn.Module], positions: Positions) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what modules return while open, one tensor per forward pass."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, given, output: seen[name].append(_vectors(output, positions))

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _vectors(output: object, positions: Positions) -> Float[Tensor, "b d"]:
    while not isinstance(output, Tensor):
        output = output.pooled if isinstance(output, TowerOutput) else output[0]  # type: ignore[index]
    if output.ndim == 4:  # a map of convolutions, channels first
        output = output.flatten(2).transpose(1, 2)
    if output.ndim == 3:
        output = {"mean": output.mean(1), "first": output[:, 0], "flatten": output.flatten(1)}[positions]
    return output.float().cpu()


def _images(
    model: DualEncoder, source: AbstractSource, modules: dict[str, nn.Module], positions: Positions, batch_size: int
) -> dict[str, Tensor]:
    with inference(model), _watching(modules, positions) as seen:
        for start in range(0, len(source), batch_size):
            rows = range(start, min(start + batch_size, len(source)))
            pixels = torch.stack([evaluation_view(model, source[row]) for row in rows])
            model.encode_image(pixels.to(model.device))
    return {name: torch.cat(parts).clone() for name, parts in seen.items()}


def _texts(
    model: DualEncoder, source: AbstractSource, modules: dict[str, nn.Module], positions: Positions, batch_size: int
) -> dict[str, Tensor]:
    texts = [next((text.text for text in source.texts(row)), None) for row in range(len(source))]
    if None in texts:
        raise TextError(
            f"Sample {texts.index(None)} of {source.name} has no text, and a layer of the text side needs one."
        )
    distinct = list(dict.fromkeys(map(str, texts)))
    lengths = model.tokenizer.lengths(distinct)
    order = sorted(range(len(distinct)), key=lambda place: lengths[place])
    by_length, model.texts_by_length = model.texts_by_length, False  # one call of the tower per batch
    try:
        with inference(model), _watching(modules, positions) as seen:
            for batch in _even(order, lengths, batch_size):
                tokens = model.tokenizer([distinct[place] for place in batch])
                model.encode_text(map_tensors(lambda tensor: tensor.to(model.device), tokens))
    finally:
        model.texts_by_length = by_length
    row = {distinct[place]: number for number, place in enumerate(order)}
    rows = torch.tensor([row[str(text)] for text in texts])
    return {name: torch.cat(parts)[rows].clone() for name, parts in seen.items()}


def _even(order: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield places in runs of one length, each at most so long."""
    run: list[int] = []
    for place in order:
        if run and (lengths[place] != lengths[run[0]] or len(run) == most):
            yield run
            run = []
        run.append(place)
    yield run
