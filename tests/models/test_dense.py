from dataclasses import replace

import pytest
import torch
from torch.nn.functional import interpolate

from diptych.errors import ConfigError
from diptych.models.codebook import CodebookHeadConfig
from diptych.models.dense import (
    attention_inputs,
    attention_update,
    given_affinity,
    local_output,
    patch_embeddings,
    query_key_attention,
    value_attention,
    values_on_grid,
)
from diptych.models.foreign import TimmConfig, TimmTower
from diptych.models.heads import LinearHead, LinearHeadConfig
from diptych.models.huggingface import from_huggingface
from diptych.models.transformer import HeadVectors
from diptych.models.vision import VisionConfig, VisionTransformer
from diptych.types import TowerOutput

VISION = VisionConfig(image_size=12, patch_size=4, width=16, depth=3, heads=2, mlp_width=24)


def tower(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    made = VisionTransformer(replace(VISION, **changes)).eval().double()
    with torch.no_grad():
        for parameter in made.parameters():  # off zero biases and unit norms
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("pool", ["class", "mean", "attention"])
@torch.no_grad()
def test_inputs_of_a_block_give_its_attention_back(pool):
    vit, image = tower(pool=pool), pixels(2, 3, 12, 8)
    last, first = attention_inputs(vit, image, (-1, 0))
    assert (last.block, first.block, last.grid) == (2, 0, (3, 2)) and last.heads.value.shape == (2, 2, 6, 8)
    before = vit(image, layers=(1,)).layers[0]
    block = vit.transformer.blocks[2]
    normed = block.norm_attention(before)
    torch.testing.assert_close(last.heads.value, block.attention.split(block.attention.value(normed))[:, :, -6:])
    if pool != "class":  # without a class token, the patches are all there is
        torch.testing.assert_close(
            attention_update(vit, last, query_key_attention), block.attention(normed, normed), rtol=1e-12, atol=1e-12
        )


@torch.no_grad()
def test_a_given_affinity_replaces_the_mixing():
    vit = tower()
    (inputs,) = attention_inputs(vit, pixels(2, 3, 12, 12))
    alone = attention_update(vit, inputs, given_affinity(torch.eye(9).expand(2, 1, 9, 9)))
    torch.testing.assert_close(alone, vit.transformer.blocks[2].attention.join(inputs.heads.value))
    mean = attention_update(vit, inputs, given_affinity(torch.full((2, 1, 9, 9), 1 / 9)))
    torch.testing.assert_close(mean, alone.mean(1, keepdim=True).expand_as(mean))


def test_values_on_another_grid_are_resized_head_by_head():
    vit = tower()
    (inputs,) = attention_inputs(vit, pixels(2, 3, 12, 20))
    assert values_on_grid(inputs, inputs.grid) is inputs
    finer = values_on_grid(inputs, (6, 10))
    value = inputs.heads.value  # 2 images, 2 heads, 15 patches, 8 channels
    for head in range(2):
        maps = value[:, head].mT.unflatten(2, (3, 5))
        expected = interpolate(maps, (6, 10), mode="bilinear").flatten(2).mT
        torch.testing.assert_close(finer.heads.value[:, head], expected)
    assert finer.grid == (6, 10) and finer.block == inputs.block


def test_value_attention_is_the_naive_softmax_and_tends_to_the_identity():
    v = pixels(1, 2, 4, 8)
    other = HeadVectors(pixels(1, 2, 4, 8, seed=1), pixels(1, 2, 4, 8, seed=2), v)
    expected = torch.empty_like(v)
    for head in range(2):
        for i in range(4):
            weight = torch.tensor([float(v[0, head, i] @ v[0, head, j]) / 8**0.5 for j in range(4)]).double().exp()
            expected[0, head, i] = (weight[:, None] * v[0, head]).sum(0) / weight.sum()
    torch.testing.assert_close(value_attention(other), expected)
    apart = 100 * torch.eye(4, 8, dtype=torch.float64).expand(1, 1, 4, 8)
    torch.testing.assert_close(value_attention(HeadVectors(apart, apart, apart)), apart)


@pytest.mark.parametrize("pool", ["class", "mean", "attention"])
@torch.no_grad()
def test_the_local_stream_leaves_the_tower_as_it_is(pool):
    vit, image = tower(pool=pool), pixels(2, 3, 12, 12)
    plain, found = vit(image), local_output(vit, image)
    assert torch.equal(found.pooled, plain.pooled) and found.grid == plain.grid == (3, 3)
    assert not torch.allclose(found.tokens, plain.tokens)
    embedded = vit.norm_after(vit.embed(image))[:, -9:]
    for block in vit.transformer.blocks:
        block.attention.out.bias.zero_()
    nothing = local_output(vit, image, lambda heads: torch.zeros_like(heads.value))
    torch.testing.assert_close(nothing.tokens, embedded)


@torch.no_grad()
def test_the_local_stream_is_the_sum_of_the_updates_of_all_blocks():
    """Without a class token the updates of patches alone are all there is to add up."""
    vit, image = tower(pool="mean"), pixels(2, 3, 12, 12)
    updates = [attention_update(vit, inputs, value_attention) for inputs in attention_inputs(vit, image, range(3))]
    torch.testing.assert_close(local_output(vit, image).tokens, vit.norm_after(vit.embed(image) + sum(updates)))


@torch.no_grad()
def test_the_official_streams(golden):
    case = golden("anovl", "tower")
    vit = VisionTransformer(
        VisionConfig(image_size=16, patch_size=4, width=16, depth=12, heads=2, mlp_width=32, activation="gelu")
    ).double()
    weights = {
        name.removeprefix("param."): torch.from_numpy(a).double() for name, a in case.items() if "param." in name
    }
    vit.load_state_dict(official(weights))
    image = torch.from_numpy(case["image"]).double()
    head = LinearHead(16, LinearHeadConfig(8)).double()
    head.linear.weight.copy_(weights["proj"].T)
    found = local_output(vit, image)
    exact = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(found.tokens, vit.norm_after(torch.from_numpy(case["local_stream"]))[:, 1:], **exact)
    torch.testing.assert_close(head.linear(found.tokens), torch.from_numpy(case["patch_tokens"]), **exact)
    torch.testing.assert_close(head(found), torch.from_numpy(case["image_embed"]), **exact)
    layers = vit(image, layers=(11,)).layers
    torch.testing.assert_close(layers[0], torch.from_numpy(case["ordinary_stream"]), **exact)


def official(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of an official tower under our names."""
    ours = {
        "class_token": theirs["class_embedding"],
        "position": theirs["positional_embedding"],
        "patch_embedding.weight": theirs["conv1.weight"],
    }
    names = {"ln_1": "norm_attention", "ln_2": "norm_mlp", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
    names["attn.out_proj"] = "attention.out"
    for kind in ("weight", "bias"):
        ours |= {f"norm_before.{kind}": theirs[f"ln_pre.{kind}"], f"norm_after.{kind}": theirs[f"ln_post.{kind}"]}
        for i in range(12):
            block, prefix = f"transformer.resblocks.{i}", f"transformer.blocks.{i}"
            for name, part in zip(
                ("query", "key", "value"), theirs[f"{block}.attn.in_proj_{kind}"].chunk(3), strict=True
            ):
                ours[f"{prefix}.attention.{name}.{kind}"] = part
            ours |= {f"{prefix}.{new}.{kind}": theirs[f"{block}.{old}.{kind}"] for old, new in names.items()}
    return ours


@torch.no_grad()
def test_values_of_a_model_of_transformers(tmp_path):
    """What a hook on transformers' own layer sees is what we give."""
    from transformers import CLIPConfig, CLIPModel

    from diptych.data.tokenizer import Tokenizer

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    theirs = CLIPModel(
        CLIPConfig(
            text_config={**sizes, "vocab_size": 300, "max_position_embeddings": 16, "eos_token_id": 3},
            vision_config={**sizes, "image_size": 12, "patch_size": 4},
            projection_dim=8,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 12}}')
    ours = from_huggingface(str(tmp_path), tokenizer=Tokenizer.train(["a cat"], vocabulary=300, length=16))
    image, seen = pixels(2, 3, 12, 12).float(), []
    layer = theirs.vision_model.encoder.layers[-1].self_attn.v_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    theirs.get_image_features(pixel_values=image)
    (inputs,) = attention_inputs(ours.vision, image)
    torch.testing.assert_close(inputs.heads.value.transpose(1, 2).flatten(2), seen[0][:, 1:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_embeddings_of_patches(make_model):
    model = make_model()
    out = model.vision(model.pixels(torch.rand(2, 3, 16, 16)))
    found = patch_embeddings(model, out.tokens)
    assert found.shape == (2, 4, 8)
    torch.testing.assert_close(found[:, 1], model.image_head(TowerOutput(out.tokens[:, 1])))
    model.vision = tower(pool="attention").float()
    tokens = torch.randn(2, 4, 16)
    alone = model.image_head(TowerOutput(model.vision.attention_pool(tokens[1, 2:3][None])))
    torch.testing.assert_close(patch_embeddings(model, tokens)[1, 2], alone[0])


@torch.no_grad()
def test_heads_that_look_at_tokens_embed_patches_too(make_model):
    from diptych.models.codebook import codebook_heads

    model = make_model()
    config = CodebookHeadConfig(codes=6, dim=5)
    model.image_head = codebook_heads(16, config, 16, config)[0]
    assert patch_embeddings(model, torch.randn(2, 4, 16)).shape == (2, 4, 5)


def test_what_cannot_be_given_is_an_error():
    with pytest.raises(ConfigError, match="blocks 0 to 2; asked for were \\(3,\\)"):
        attention_inputs(tower(), pixels(1, 3, 12, 12), (3,))
    with pytest.raises(
        ConfigError, match="needs the attention of a vision transformer, and the image tower is a TimmTower"
    ):
        local_output(TimmTower(TimmConfig("tf_efficientnet_lite0")), torch.zeros(1, 3, 64, 64))
