"""What a vision transformer knows patch by patch: what its attention is made of, attention mixed in other ways, embeddings of patches.

Models of open_clip and transformers are read into our towers (`models/openclip.py`, `models/huggingface.py`), so all of this is theirs as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diptych.errors import ConfigError
from diptych.models.dual import DualEncoder, Images
from diptych.models.embedding import inference
from diptych.models.transformer import Block, HeadVectors, attend
from diptych.models.vision import AbstractVisionTower, VisionTransformer
from diptych.types import TowerOutput

Mix = Callable[[HeadVectors], Float[Tensor, "b heads s c"]]
"""How attention makes new values of queries, keys and values."""


@dataclass(frozen=True)
class AttentionInputs:
    """What the attention of one block starts from.

    Attributes:
        block: Its number, 0 for the first.
        heads: Queries, keys and values of the patches in row order; no class token.
        grid: (rows, columns) of the patches.
    """

    block: int
    heads: HeadVectors
    grid: tuple[int, int]


def query_key_attention(heads: HeadVectors) -> Float[Tensor, "b heads s c"]:
    """Return softmax(q k^T / sqrt(c)) v, which is what blocks do."""
    return attend(heads.query, heads.key, heads.value, None)


def value_attention(heads: HeadVectors) -> Float[Tensor, "b heads s c"]:
    """Return softmax(v v^T / sqrt(c)) v: a position looks where the values are like its own, most of all at itself.

    Source: Li et al. 2023, "CLIP Surgery" (arXiv 2304.05653), section 3; Deng et al. 2023 (AnoVL).
    """
    return attend(heads.value, heads.value, heads.value, None)


def given_affinity(affinity: Float[Tensor, "b heads_or_1 s s"]) -> Mix:
    """Return a mix that weights values with rows of an affinity, such as one of another model; rows should sum to 1."""
    return lambda heads: affinity.to(heads.value.dtype) @ heads.value


def attention_inputs(
    tower: AbstractVisionTower, pixels: Float[Tensor, "b 3 h w"], blocks: Sequence[int] = (-1,)
) -> tuple[AttentionInputs, ...]:
    """Return queries, keys and values of the patches in some blocks, in the order asked; negative numbers count from the last.

    Raises:
        ConfigError: If the tower is no vision transformer of ours, or has no such block.
    """
    vit = vision_transformer(tower)
    depth, grid = len(vit.transformer.blocks), vit.grid_of(pixels)
    wanted = [block % depth for block in blocks if -depth <= block < depth]
    if len(wanted) < len(blocks):
        raise ConfigError(f"This tower has blocks 0 to {depth - 1}; asked for were {tuple(blocks)}.")
    stream, found = vit.embed(pixels), dict[int, HeadVectors]()
    for number, block in enumerate(_blocks(vit)[: max(wanted, default=-1) + 1]):
        if number in wanted:
            normed = block.norm_attention(stream)
            found[number] = _patches(block.attention.project(normed, normed), grid)
        stream = block(stream)
    return tuple(AttentionInputs(number, found[number], grid) for number in wanted)


def attention_update(tower: AbstractVisionTower, inputs: AttentionInputs, mix: Mix) -> Float[Tensor, "b p w"]:
    """Return what the attention of a block adds to its patches when it mixes them in another way: no residual, no MLP, no norm after.

    `tower.norm_after` makes tokens of it, as a TowerOutput has them.
    """
    return _blocks(vision_transformer(tower))[inputs.block].attention.join(mix(inputs.heads))


def values_on_grid(inputs: AttentionInputs, grid: tuple[int, int]) -> AttentionInputs:
    """Return inputs whose values are resized (bilinear) to a grid, for mixes that ask for values alone: queries and keys are the values too."""
    if grid == inputs.grid:
        return inputs
    heads = inputs.heads.value.shape[1]
    maps = inputs.heads.value.mT.flatten(1, 2).unflatten(2, inputs.grid)
    value = F.interpolate(maps, grid, mode="bilinear").flatten(2).unflatten(1, (heads, -1)).mT
    return replace(inputs, heads=HeadVectors(value, value, value), grid=grid)


def local_output(
    tower: AbstractVisionTower, pixels: Float[Tensor, "b 3 h w"], mix: Mix = value_attention
) -> TowerOutput:
    """Return the tower's output with the patches of a second stream, which gathers what attention would add if it mixed in another way.

    z_0 = x_0; z_l+1 = z_l + OutProj(mix(q, k, v of x_l)). The stream x_l is the tower's own and nothing of z gets into it, so the pooled
    vector is what it always is. z has no MLPs. With values for queries and keys, patches keep to what they show, where the tokens of an
    image-text model have gathered what the whole image shows.

    Args:
        tower: A vision transformer of ours, in eval mode.
        pixels: Normalised.
        mix: Sees all positions, class token first where there is one.

    Raises:
        ConfigError: If the tower is no vision transformer of ours.

    Source: Deng et al. 2023 (arXiv 2308.15939), section 3, "training-free adaptation", all blocks as in the official code.
    """
    vit = vision_transformer(tower)
    grid, stream = vit.grid_of(pixels), vit.embed(pixels)
    local = stream
    for block in _blocks(vit):
        normed = block.norm_attention(stream)
        local = local + block.attention.join(mix(block.attention.project(normed, normed)))
        stream = block(stream)
    return replace(vit.read(stream, grid), tokens=vit.norm_after(local)[:, -grid[0] * grid[1] :])


def patch_embeddings(model: DualEncoder, tokens: Float[Tensor, "b p w"]) -> Float[Tensor, "b p d"]:
    """Return the embedding of each patch as if it were all that the tower had seen, not normalised.

    Where pooling takes the class token or a mean, that is the head of the patch; an attention pool (SigLIP) looks at the one patch.

    Args:
        model: Gives pooling and head.
        tokens: Of its image tower, as `TowerOutput.tokens`.
    """
    alone = tokens.flatten(0, 1)
    pooled = alone
    if isinstance(model.vision, VisionTransformer) and model.vision.attention_pool is not None:
        pooled = model.vision.attention_pool(alone[:, None])
    found: Tensor = model.image_head(TowerOutput(pooled, alone[:, None], grid=(1, 1)))
    return found.unflatten(0, tokens.shape[:2])  # type: ignore[no-any-return]


def vision_transformer(tower: AbstractVisionTower) -> VisionTransformer:
    """Return the tower as what it must be.

    Raises:
        ConfigError: If it has no attention that we know.
    """
    if isinstance(tower, VisionTransformer):
        return tower
    raise ConfigError(
        f"This needs the attention of a vision transformer, and the image tower is a {type(tower).__name__}. "
        "Take a model with diptych's VisionConfig, or a ViT of open_clip or transformers."
    )


def _blocks(vit: VisionTransformer) -> list[Block]:
    return [block for block in vit.transformer.blocks if isinstance(block, Block)]


def _patches(heads: HeadVectors, grid: tuple[int, int]) -> HeadVectors:
    count = grid[0] * grid[1]
    return HeadVectors(heads.query[:, :, -count:], heads.key[:, :, -count:], heads.value[:, :, -count:])


TokensTaken = Literal["local", "ordinary"]
TokensAsked = Literal["auto", "local", "ordinary"]


def choose_tokens(model: DualEncoder, asked: TokensAsked = "auto") -> TokensTaken:
    """Return which tokens say what a patch shows: `auto` is those of `local_output` where the tower has attention, else the tower's ordinary ones."""
    if asked == "auto":
        return "local" if isinstance(model.vision, VisionTransformer) else "ordinary"
    return asked


@dataclass(frozen=True)
class EmbeddedPatches:
    """What a tower makes of images, in the space of embeddings, not normalised.

    Attributes:
        patches: One vector per patch.
        pooled: One per image.
        grid: (rows, columns) of the patches.
    """

    patches: Float[Tensor, "b p d"]
    pooled: Float[Tensor, "b d"]
    grid: tuple[int, int]


def embedded_patches(model: DualEncoder, images: Images, tokens: TokensTaken) -> EmbeddedPatches:
    """Return embeddings of patches and of whole images, without gradient; they can be trained on.

    Raises:
        ConfigError: If the tower gives no patches, or local ones are asked of a tower without attention.
    """
    with inference(model):
        pixels = model.pixels(images)
        output = local_output(model.vision, pixels) if tokens == "local" else model.vision(pixels)
        if output.tokens is None or output.grid is None:
            raise ConfigError(f"Maps need patches, and this image tower ({type(model.vision).__name__}) gives none.")
        patches, pooled = patch_embeddings(model, output.tokens).float(), model.image_head(output).float()
    return EmbeddedPatches(
        patches.clone(), pooled.clone(), output.grid
    )  # clones can be trained on, tensors of inference mode cannot
