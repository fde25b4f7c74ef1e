"""Image and text towers, ours and those of timm and transformers."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.errors import CheckpointError, ConfigError, TextError
from diptych.models.foreign import HFTextConfig, HFTextTower, TimmConfig, TimmTower, load_source
from diptych.models.text import TextConfig, TextTransformer
from diptych.models.vision import VisionConfig, VisionTransformer, cut_patches, dropping_patches, keep_patches

VISION = VisionConfig(image_size=12, patch_size=4, width=16, depth=2, heads=2, mlp_width=24)
TEXT = TextConfig(vocabulary=50, length=8, width=16, depth=2, heads=2, mlp_width=24)


def image_tower(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(replace(VISION, **changes)).eval()


def text_tower(**changes) -> TextTransformer:
    torch.manual_seed(0)
    tower = TextTransformer(replace(TEXT, **changes)).eval()
    torch.nn.init.normal_(tower.position)  # as drawn, positions hardly differ from each other
    torch.nn.init.normal_(tower.token_embedding.weight)
    return tower


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tokens(*lengths: int, pad: int = 0, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random ids of texts of these lengths, and their mask; equal lengths, equal ids, whatever the padding."""
    ids = torch.randint(1, 50, (len(lengths), 20), generator=torch.Generator().manual_seed(0))[
        :, : width or max(lengths)
    ]
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    return ids.where(mask, pad), mask


# --- our image tower ---


def test_class_token_is_pooled_and_left_out_of_the_patches():
    tower = image_tower(pool="class")
    with torch.no_grad():
        out = tower(pixels(2, 3, 12, 12), layers=(0, 1), attention=(1,))
        normed = tower.norm_after(out.layers[1])
    assert out.layers[0].shape == (2, 1 + 9, 16) and out.attention[0].shape == (2, 2, 10, 10)
    assert torch.equal(out.pooled, normed[:, 0]) and torch.equal(out.tokens, normed[:, 1:])
    assert out.grid == (3, 3) and out.mask is None


def test_mean_and_attention_pool_all_patches():
    with torch.no_grad():
        out = image_tower(pool="mean")(pixels(2, 3, 12, 12))
        torch.testing.assert_close(out.pooled, out.tokens.mean(1))
        tower = image_tower(pool="attention")
        out = tower(pixels(2, 3, 12, 12))
        torch.testing.assert_close(out.pooled, tower.attention_pool(out.tokens))
    assert out.tokens.shape == (2, 9, 16)


@pytest.mark.parametrize("pool", ["class", "mean", "attention"])
@pytest.mark.parametrize(("row", "column"), [(0, 2), (2, 0), (1, 2)])
def test_patches_come_in_row_order(pool, row, column):
    tower, image = image_tower(pool=pool), pixels(1, 3, 12, 12)
    other = image.clone()
    other[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    with torch.no_grad():
        change = (tower(image).tokens - tower(other).tokens).abs().sum(-1)[0]
    assert int(change.argmax()) == 3 * row + column


def test_position_and_norm_before_the_blocks():
    tower, image = image_tower(pool="mean", depth=1), pixels(1, 3, 12, 12)
    plain = image_tower(pool="mean", depth=1, norm_before=False)
    plain.load_state_dict(tower.state_dict(), strict=False)
    with torch.no_grad():
        embedded = tower.patch_embedding(image).flatten(2).transpose(1, 2) + tower.position
        for model, stream in ((plain, embedded), (tower, tower.norm_before(embedded))):
            torch.testing.assert_close(model(image).tokens, model.norm_after(model.transformer(stream)[0]))


def test_images_of_a_batch_do_not_meet():
    tower, images = image_tower(), pixels(3, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(tower(images).pooled[1:2], tower(images[1:2]).pooled)


@pytest.mark.parametrize("bias", [False, True])
def test_a_matrix_product_of_patches_is_the_convolution(bias):
    torch.manual_seed(0)
    convolution, images = torch.nn.Conv2d(3, 5, 4, 4, bias=bias).double(), pixels(2, 3, 8, 12).double()
    images.requires_grad_()
    product = torch.nn.functional.linear(cut_patches(images, 4), convolution.weight.flatten(1), convolution.bias)
    expected = convolution(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(product, expected, atol=1e-12, rtol=0)
    wanted = (images, *convolution.parameters())
    weights = torch.randn_like(expected)
    for found, right in zip(
        torch.autograd.grad(product, wanted, weights), torch.autograd.grad(expected, wanted, weights), strict=True
    ):
        torch.testing.assert_close(found, right, atol=1e-12, rtol=0)


def test_patches_come_in_the_precision_of_autocast():
    images = pixels(2, 3, 8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cut_patches(images, 4), cut_patches(images.bfloat16(), 4))


def test_an_image_must_be_a_whole_number_of_patches():
    with pytest.raises(ConfigError, match="image_size 13 must be a multiple of patch_size 4"):
        image_tower(image_size=13)
    with pytest.raises(ConfigError, match="12 x 10 pixels cannot be cut into patches of 4"):
        image_tower()(pixels(1, 3, 10, 12))


def test_images_of_its_own_size_get_the_learnt_positions_to_the_bit():
    tower = image_tower()
    assert tower.positions((3, 3)) is tower.position


@pytest.mark.parametrize("pool", ["class", "mean"])
@pytest.mark.parametrize("grid", [(2, 2), (6, 6), (3, 5)])
def test_positions_of_another_grid_lie_between_the_learnt_ones(pool, grid):
    tower = image_tower(pool=pool)
    with torch.no_grad():
        tower.position[-9:] = torch.arange(9.0).view(9, 1)  # a slope: 3 per row, 1 per column
        positions = tower.positions(grid)
    first, (rows, columns) = int(pool == "class"), grid
    assert torch.equal(positions[:first], tower.position[:first])
    square = positions[first:].reshape(rows, columns, -1)
    torch.testing.assert_close(square.mean((0, 1)), torch.full((16,), 4.0))  # the middle stays where it is
    assert (square.diff(dim=0) > 0).all() and (square.diff(dim=1) > 0).all()  # and the slope goes the same ways


@pytest.mark.parametrize("pool", ["class", "mean", "attention"])
def test_images_of_another_size(pool):
    tower = image_tower(pool=pool)
    out = tower(pixels(2, 3, 8, 20))
    assert out.grid == (2, 5) and out.tokens.shape == (2, 10, 16) and out.pooled.shape == (2, 16)
    out.pooled[:, 0].sum().backward()  # one channel: the sum of all is constant behind a LayerNorm
    assert (tower.position.grad.abs().sum(1) > 0).all()


def test_a_larger_image_of_the_same_patches_gives_nearly_the_same_vector():
    """Each patch is repeated where it was: only attention over equal patches and the interpolation of positions are new."""
    tower = image_tower(pool="mean", depth=1)
    with torch.no_grad():
        tower.position.zero_()
        image = pixels(1, 3, 12, 12)
        blocks = image.unflatten(2, (3, 4)).unflatten(4, (3, 4))  # b c rows 4 columns 4
        doubled = blocks.repeat_interleave(2, 2).repeat_interleave(2, 4).flatten(4, 5).flatten(2, 3)
        torch.testing.assert_close(tower(doubled).pooled, tower(image).pooled)


# --- our text tower ---


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pool", ["end", "mean", "first"])
def test_padding_changes_nothing(pool, causal):
    tower = text_tower(pool=pool, causal=causal)
    with torch.no_grad():
        short = tower(*tokens(5, 2, 5)).pooled
        for pad in (0, 7):
            torch.testing.assert_close(tower(*tokens(5, 2, 5, width=8, pad=pad)).pooled, short)
        torch.testing.assert_close(tower(*(part[1:2, :2] for part in tokens(5, 2, 5))).pooled, short[1:2])


def test_padding_counts_where_it_is_looked_at():
    tower = text_tower(pool="last", causal=False, attend_padding=True)
    with torch.no_grad():
        found = [tower(*tokens(3, width=8, pad=pad)).pooled for pad in (0, 7)]
    assert (found[0] - found[1]).abs().max() > 0.1


@pytest.mark.parametrize(("pool", "positions"), [("end", (4, 1)), ("last", (4, 4)), ("first", (0, 0))])
def test_which_token_is_pooled(pool, positions):
    with torch.no_grad():
        out = text_tower(pool=pool)(*tokens(5, 2))
    assert torch.equal(out.pooled, torch.stack([out.tokens[0, positions[0]], out.tokens[1, positions[1]]]))


def test_mean_is_over_real_tokens():
    with torch.no_grad():
        out = text_tower(pool="mean")(*tokens(5, 2))
    torch.testing.assert_close(out.pooled[1], out.tokens[1, :2].mean(0))


@pytest.mark.parametrize("causal", [True, False])
def test_causal_texts_do_not_look_ahead(causal):
    tower, (ids, mask) = text_tower(causal=causal), tokens(6)
    other = ids.clone()
    other[0, 3] = (ids[0, 3] + 1) % 50
    with torch.no_grad():
        change = (tower(ids, mask).tokens - tower(other, mask).tokens).abs().amax(-1)[0]
    assert (change[3:] > 1e-4).all()
    assert not change[:3].any() if causal else (change[:3] > 1e-4).all()


def test_order_of_words_counts():
    tower, (ids, mask) = text_tower(pool="mean", causal=False), tokens(6)
    with torch.no_grad():
        assert (tower(ids, mask).pooled - tower(ids.flip(1), mask).pooled).abs().max() > 0.1


def test_a_context_takes_the_place_of_words():
    tower, (ids, mask) = text_tower(), tokens(6, 6)
    with torch.no_grad():
        plain = tower(ids, mask)
        same = tower(ids, mask, context=tower.token_embedding(ids[:, 1:4]))
        swapped = tower(ids, mask, context=tower.token_embedding(ids.flip(0)[:, 1:4]))
        expected = tower(torch.cat([ids[:, :1], ids.flip(0)[:, 1:4], ids[:, 4:]], 1), mask)
        front = tower(ids, mask, context=tower.token_embedding(ids.flip(0)[:, :4]), context_start=0)
        expected_front = tower(torch.cat([ids.flip(0)[:, :4], ids[:, 4:]], 1), mask)
    torch.testing.assert_close(same.tokens, plain.tokens)
    torch.testing.assert_close(swapped.tokens, expected.tokens)
    torch.testing.assert_close(front.tokens, expected_front.tokens)


def test_embeddings_of_tokens_in_place_of_tokens_change_nothing(bert):
    for tower in (text_tower(), hf_tower(bert[1])):
        ids, mask = tokens(6, 4)
        with torch.no_grad():
            found = tower(ids, mask, context=tower.token_embeddings(ids), context_start=0)
            torch.testing.assert_close(found.tokens[mask], tower(ids, mask).tokens[mask])
            torch.testing.assert_close(found.pooled, tower(ids, mask).pooled)


def test_an_encoder_that_takes_no_vectors_says_so(tmp_path):
    from transformers import CLIPTextConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    CLIPTextConfig(vocab_size=50, max_position_embeddings=16, **sizes).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="takes inputs_embeds, and CLIPTextModel does not"):
        HFTextTower(HFTextConfig(str(tmp_path))).token_embeddings(tokens(6)[0])


def test_layers_and_attention_of_texts():
    tower = text_tower()
    with torch.no_grad():
        out = tower(*tokens(5, 2), layers=(1, 0), attention=(0,))
        torch.testing.assert_close(tower.norm_after(out.layers[0]), out.tokens)
    assert not torch.equal(out.layers[0], out.layers[1])
    assert not out.attention[0].triu(1).any()  # the causal mask
    torch.testing.assert_close(out.attention[0].sum(-1), torch.ones(2, 2, 5))


def test_too_long_a_text_is_refused():
    with pytest.raises(TextError, match="at most 8 tokens, these texts have 9"):
        text_tower()(*tokens(9))
    assert text_tower()(*tokens(8)).pooled.shape == (1, 16)


# --- patches left out in training ---


def test_a_random_share_of_the_patches_is_kept_in_order_and_what_comes_first_stays():
    stream = torch.arange(5 * 13.0).view(5, 13, 1)
    torch.manual_seed(0)
    found = keep_patches(stream, 0.5, first=1)[..., 0] - stream[:, :1, 0]
    assert found.shape == (5, 1 + 6) and not found[:, 0].any()
    assert (found.diff() > 0).all() and found.max() <= 12
    assert len({tuple(row.tolist()) for row in found}) == 5  # another draw for each sample
    counts = torch.zeros(13)
    for _ in range(400):
        counts += torch.bincount((keep_patches(stream[:1], 0.75, first=1)[0, 1:, 0]).long(), minlength=13)
    assert counts[0] == 0 and (counts[1:] / 400 - 0.25).abs().max() < 0.1  # 4.6 standard deviations of 0.0217
    assert keep_patches(stream, 0.99, first=1).shape[1] == 2


def test_gradients_reach_the_kept_patches_only():
    stream = torch.randn(2, 9, 4, requires_grad=True)
    keep_patches(stream, 0.5, first=0).sum().backward()
    assert stream.grad.sum((1, 2)).tolist() == [16, 16] and set(stream.grad.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("pool", ["class", "mean", "attention"])
def test_patches_are_left_out_in_training_mode_only(pool):
    tower, images = image_tower(pool=pool), pixels(2, 3, 12, 12)
    with torch.no_grad():
        plain = tower(images)
        with dropping_patches(tower, 0.5):
            assert torch.equal(tower(images).pooled, plain.pooled)
            tower.train()
            dropped = tower(images)
        assert torch.equal(tower(images).pooled, plain.pooled)
        with dropping_patches(tower, 0.0):
            assert torch.equal(tower(images).pooled, plain.pooled)
    assert dropped.tokens.shape == (2, 4, 16) and dropped.grid is None and plain.grid == (3, 3)
    assert not torch.allclose(dropped.pooled, plain.pooled)


def test_kept_patches_carry_the_positions_of_the_whole_image():
    tower, images = image_tower(pool="mean", depth=1, norm_before=False).train(), pixels(1, 3, 12, 12)
    block = tower.transformer.blocks[0]
    with torch.no_grad():
        for linear in (block.attention.out, block.mlp.down):  # patches do not see one another then
            linear.weight.zero_()
        whole = tower(images).tokens[0]
        with dropping_patches(tower, 0.5):
            kept = tower(images).tokens[0]
    for patch in kept:
        assert (whole - patch).abs().sum(1).min() == 0


def test_towers_that_cannot_leave_patches_out_are_refused():
    with (
        pytest.raises(ConfigError, match="a TimmTower cannot leave patches out"),
        dropping_patches(TimmTower(TimmConfig("test_resnet")), 0.5),
    ):
        pass
    with pytest.raises(ConfigError, match="below 1, not 1"), dropping_patches(image_tower(), 1.0):
        pass


# --- timm ---


def test_convolutions_look_at_a_few_images_at_a_time_and_give_the_same(monkeypatch):
    tower, images = TimmTower(TimmConfig("test_resnet")), pixels(5, 3, 64, 64)
    sizes: list[int] = []
    next(m for m in tower.modules() if isinstance(m, torch.nn.Conv2d)).register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0]))
    )
    with torch.no_grad():
        whole = tower.eval()(images)
        monkeypatch.setattr("diptych.models.foreign.PART_PIXELS", 2 * 64 * 64)
        parts = tower(images)
    assert sizes == [5, 2, 2, 1]
    torch.testing.assert_close((parts.pooled, parts.tokens), (whole.pooled, whole.tokens))
    tower.train()(images)  # batch norms look at the whole batch
    assert sizes[4:] == [5]


def as_towers_see(images: torch.Tensor) -> torch.Tensor:
    """Return the images in the layout of memory that timm towers ask for: in another one convolutions may round otherwise."""
    return images.contiguous(memory_format=torch.channels_last)


def test_feature_maps_of_timm_become_patches_in_row_order():
    torch.manual_seed(0)
    tower, images = TimmTower(TimmConfig("test_resnet")).eval(), pixels(2, 3, 160, 96)
    with torch.no_grad():
        out, maps = tower(images), tower.model.forward_features(as_towers_see(images))
    assert out.grid == (5, 3) and tower.width == out.pooled.shape[1] == 96
    assert torch.equal(out.tokens[:, 3 * 4 + 1], maps[:, :, 4, 1])
    torch.testing.assert_close(out.pooled, out.tokens.mean(1))


def test_timm_models_with_channels_last_are_turned():
    torch.manual_seed(0)
    tower, images = TimmTower(TimmConfig("swin_tiny_patch4_window7_224")).eval(), pixels(1, 3, 224, 224)
    with torch.no_grad():
        out, maps = tower(images), tower.model.forward_features(as_towers_see(images))
    assert out.grid == (7, 7) and maps.shape == (1, 7, 7, 768)
    assert torch.equal(out.tokens[:, 7 * 4 + 1], maps[:, 4, 1])


def test_tokens_of_timm_lose_their_class_token():
    torch.manual_seed(0)
    tower, images = TimmTower(TimmConfig("test_vit")).eval(), pixels(1, 3, 160, 160)
    with torch.no_grad():
        out, features = tower(images), tower.model.forward_features(as_towers_see(images))
        torch.testing.assert_close(out.pooled, tower.model(images))
    assert out.grid == (10, 10) and torch.equal(out.tokens, features[:, 1:])


def test_a_wider_pooled_vector_of_timm_stands_alone():
    tower = TimmTower(TimmConfig("test_mambaout")).eval()
    with torch.no_grad():
        out = tower(pixels(1, 3, 160, 160))
    assert tower.width == out.pooled.shape[1] == 256 and out.tokens is None and out.grid is None


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_vit"])
def test_layers_of_timm_are_its_levels_of_features(name):
    torch.manual_seed(0)
    tower, images = TimmTower(TimmConfig(name)).eval(), pixels(5, 3, 160, 160)
    with torch.no_grad():
        plain, found = tower(images), tower(images, layers=(tower.depth - 1, 0))
        last, first = tower.model.forward_intermediates(images, indices=[0, tower.depth - 1], intermediates_only=True)[
            ::-1
        ]
    torch.testing.assert_close(found.pooled, plain.pooled)
    torch.testing.assert_close(found.tokens, plain.tokens)
    assert plain.layers == () and found.layers[0].shape == (5, last.shape[2] * last.shape[3], last.shape[1])
    torch.testing.assert_close(found.layers[1], first.flatten(2).mT)
    torch.testing.assert_close(found.layers[0], last.flatten(2).mT)


@pytest.mark.parametrize("asked", [{"layers": (5,)}, {"layers": (-1,)}, {"attention": (0,)}], ids=str)
def test_timm_says_which_layers_it_has(asked):
    tower = TimmTower(TimmConfig("test_resnet"))
    with pytest.raises(ConfigError, match=r"test_resnet of timm gives 5 layers, .* no attention maps.*VisionConfig"):
        tower(pixels(1, 3, 160, 160), **asked)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite9", "efficientnet-lite0", "efficientnetlite0"])
def test_an_unknown_timm_model_names_the_nearest(name):
    with pytest.raises(ConfigError, match=rf"no model '{name}'\. Closest: .*efficientnet_lite0"):
        TimmTower(TimmConfig(name))


def test_weights_of_timm_from_a_file(tmp_path):
    torch.manual_seed(0)
    donor = TimmTower(TimmConfig("test_resnet"))
    save_file({**donor.model.state_dict(), "fc.weight": torch.ones(2, 2)}, tmp_path / "weights.safetensors")
    tower = TimmTower(TimmConfig("test_resnet", str(tmp_path / "weights.safetensors")))
    load_source(tower)
    for name, value in donor.model.state_dict().items():
        assert torch.equal(tower.model.state_dict()[name], value), name
    save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"lack \d+ tensors of the tower, first 'conv1"):
        load_source(tower)


# --- transformers ---


def hf_tower(folder, pool="mean") -> HFTextTower:
    tower = HFTextTower(HFTextConfig(str(folder), pool)).eval()
    load_source(tower)
    return tower


def test_a_text_tower_of_transformers_gives_what_transformers_gives(bert):
    theirs, folder = bert
    ids, mask = tokens(5, 2)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        out = hf_tower(folder)(ids, mask, layers=(1, 0))
        first = hf_tower(folder, "first")(ids, mask)
    hidden = expected.last_hidden_state
    torch.testing.assert_close(out.tokens, hidden)
    torch.testing.assert_close(out.pooled, torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)]))
    torch.testing.assert_close(first.pooled, hidden[:, 0])
    torch.testing.assert_close(out.layers, (expected.hidden_states[2], expected.hidden_states[1]))


def test_a_context_takes_the_place_of_words_in_transformers_too(bert):
    tower, (ids, mask) = hf_tower(bert[1]), tokens(6, 4)
    with torch.no_grad():
        context = tower.model.get_input_embeddings()(ids.flip(0)[:, 1:3])
        found = tower(ids, mask, context=context)
        expected = tower(torch.cat([ids[:, :1], ids.flip(0)[:, 1:3], ids[:, 3:]], 1), mask)
        front = tower(ids, mask, context=context, context_start=0)
        expected_front = tower(torch.cat([ids.flip(0)[:, 1:3], ids[:, 2:]], 1), mask)
    torch.testing.assert_close(found.tokens, expected.tokens)
    torch.testing.assert_close(front.tokens, expected_front.tokens)


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_padding_changes_nothing_in_transformers_either(bert, pool):
    tower = hf_tower(bert[1], pool)
    with torch.no_grad():
        torch.testing.assert_close(tower(*tokens(5, 2, width=9, pad=7)).pooled, tower(*tokens(5, 2)).pooled)


def test_every_parameter_of_a_text_tower_is_used(bert):
    tower = hf_tower(bert[1])
    tower(*tokens(5, 2)).pooled[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())


def test_attention_of_transformers_must_be_switched_on(bert):
    tower = hf_tower(bert[1])
    with pytest.raises(ConfigError, match=r"set_attn_implementation\('eager'\)"):
        tower(*tokens(5, 2), attention=(0,))
    tower.model.set_attn_implementation("eager")
    with torch.no_grad():
        (found,) = tower(*tokens(5, 2), attention=(0,)).attention
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 5))
    assert not found[1, :, :, 2:].any()


def test_weights_with_a_prefix_or_with_gaps(bert, tmp_path):
    folder = bert[1]
    weights = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({f"bert.{name}": value for name, value in weights.items()}, tmp_path / "model.safetensors")
    ids, mask = tokens(5, 2)
    with torch.no_grad():
        torch.testing.assert_close(hf_tower(tmp_path)(ids, mask).tokens, hf_tower(folder)(ids, mask).tokens)
    weights.pop("encoder.layer.1.output.dense.bias")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"lack 1 tensors of the tower, first 'encoder.layer.1.output.dense.bias'"
    ):
        hf_tower(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json of a transformers model; '.*' has none"):
        HFTextTower(HFTextConfig(str(tmp_path)))
