"""Segmenters and dense features: the stand-ins by closed forms, SAM and DINO of transformers from tiny folders on the disk."""

import json

import pytest
import torch
from torch.nn import functional as F

from diptych.data.transforms import ImagePolicy
from diptych.errors import CheckpointError, ConfigError
from diptych.models.dense_features import layer_features, load_self_supervised, tower_features
from diptych.models.foreign import TimmConfig, TimmTower
from diptych.models.sam import load_sam
from diptych.models.segmenters import ColourSegmenter, Prompts, inside_square, into_square, out_of_square
from diptych.models.vision import VisionConfig, VisionTransformer
from other_libraries import IMAGENET, save_dino, save_sam


def picture(height: int = 24, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def two_squares() -> torch.Tensor:
    """Return a blue picture with two red squares that do not touch."""
    image = torch.zeros(3, 32, 48, dtype=torch.uint8)
    image[2] = 200
    for left in (6, 30):
        image[:, 8:20, left : left + 12] = torch.tensor([220, 10, 10], dtype=torch.uint8)[:, None, None]
    return image


# --- maps in squares ---


def test_maps_go_into_a_square_and_come_out_again():
    assert inside_square(48, 64, 256) == (192, 256) and inside_square(10, 3000, 64) == (1, 64)
    ramp = torch.linspace(0, 1, 12)[None, :, None].expand(2, 12, 16)
    square = into_square(ramp, 64)
    assert square.shape == (2, 64, 64) and not square[:, 48:].any() and square[:, 47].min() > 0.9
    torch.testing.assert_close(out_of_square(square, (12, 16))[:, 1:-1], ramp[:, 1:-1], rtol=0, atol=1e-6)


# --- colours ---


def test_places_attend_to_like_colours_nearby():
    looked = ColourSegmenter(cells=12)(two_squares())
    attention = looked.attention
    assert attention.grid == (8, 12) and attention.value.shape == (1, 96, 3) and looked.mask_side == 256
    every = attention.rows(0, 96)
    torch.testing.assert_close(every.sum(-1), torch.ones(1, 96))
    torch.testing.assert_close(torch.cat([attention.rows(a, a + 24) for a in range(0, 96, 24)], 1), every)
    row = every[0, 3 * 12 + 2].view(8, 12)  # inside the left square
    assert row[2:5, 2:4].sum() > 0.9 and row[2:5, 8:10].sum() < row[2:5, 2:4].sum() / 100
    value = F.normalize(attention.value[0], dim=-1)
    assert value[3 * 12 + 2] @ value[3 * 12 + 8] > 0.99 and value[3 * 12 + 2] @ value[0] < 0


def test_a_rough_mask_becomes_the_square_that_the_point_is_in():
    image = two_squares()
    rough = torch.zeros(1, 32, 48)
    rough[:, 6:18, 4:16] = 0.9  # shifted by two pixels
    rough[:, 8:20, 30:42] = 0.9
    prompts = Prompts(
        torch.tensor([[10.0, 12.0], [35.0, 12.0]]),
        torch.tensor([[3.0, 5.0, 20.0, 22.0], [28.0, 6.0, 43.0, 22.0]]),
        into_square(rough, 256)[0],
    )
    masks = ColourSegmenter()(image).answer(prompts)
    expected = torch.zeros(2, 32, 48, dtype=torch.bool)
    expected[0, 8:20, 6:18] = expected[1, 8:20, 30:42] = True
    assert torch.equal(masks.logits > 0, expected) and (masks.quality > 0.8).all()


def test_noise_is_not_trusted():
    rough = torch.zeros(1, 24, 32)
    rough[:, 4:20, 4:28] = 0.5
    prompts = Prompts(torch.tensor([[10.0, 10.0]]), torch.tensor([[4.0, 4.0, 27.0, 19.0]]), into_square(rough, 256)[0])
    masks = ColourSegmenter()(picture()).answer(prompts)
    assert masks.logits.shape == (1, 24, 32) and masks.logits[0, 10, 10] > 0 and masks.quality[0] < 0.8


# --- SAM ---


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory):
    pytest.importorskip("transformers")
    return save_sam(tmp_path_factory.mktemp("sam"))


def test_attention_of_sam_is_that_of_its_last_block(sam_folder):
    import transformers

    sam, image = load_sam(sam_folder), picture(30, 64)
    looked = sam(image)
    assert looked.attention.grid == (4, 8) and looked.mask_side == 32
    eager = transformers.SamModel.from_pretrained(sam_folder, attn_implementation="eager").eval()
    pixels = F.interpolate(image[None].float() / 255, (32, 64), mode="bilinear", antialias=True)
    pixels = F.pad((pixels - sam.mean) / sam.std, (0, 0, 0, 32))
    seen = []
    eager.vision_encoder.layers[-1].attn.register_forward_hook(lambda module, given, out: seen.append(out[1]))
    with torch.inference_mode():
        eager.vision_encoder(pixels)
    valid = torch.arange(64).view(8, 8)[:4].flatten()
    expected = seen[0].view(2, 64, 64)[:, valid][..., valid]
    found = torch.cat([looked.attention.rows(start, start + 8) for start in range(0, 32, 8)], 1)
    torch.testing.assert_close(found, expected)
    assert looked.attention.value.shape == (2, 32, 8)
    assert not sam.model.vision_encoder.layers[-1].attn._forward_pre_hooks


def test_masks_of_sam_are_those_of_its_model(sam_folder):
    sam, image = load_sam(sam_folder), picture(30, 60, seed=1)
    looked = sam(image)
    prompt = torch.zeros(32, 32)
    prompt[2:8, 3:9] = 0.004
    points, boxes = (
        torch.tensor([[10.0, 8.0], [40.0, 20.0]]),
        torch.tensor([[4.0, 4.0, 20.0, 16.0], [30.0, 10, 58, 28]]),
    )
    masks = looked.answer(Prompts(points, boxes, prompt))
    assert masks.logits.shape == (2, 30, 60) and masks.quality.shape == (2,)
    pixels = F.interpolate(image[None].float() / 255, (32, 64), mode="bilinear", antialias=True)
    pixels = F.pad((pixels - sam.mean) / sam.std, (0, 0, 0, 32))
    for i in range(2):  # one prompt at a time, from the pixels
        with torch.inference_mode():
            said = sam.model(
                pixel_values=pixels,
                input_points=(points[i] * torch.tensor([64 / 60, 32 / 30]))[None, None, None],
                input_boxes=(boxes[i] * torch.tensor([64 / 60, 32 / 30] * 2))[None, None],
                input_masks=prompt[None, None],
                multimask_output=False,
            )
        expected = F.interpolate(said.pred_masks[0, :, :, :16], (30, 60), mode="bilinear")[0, 0]
        torch.testing.assert_close(masks.logits[i], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(masks.quality[i], said.iou_scores[0, 0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "change", "complaint"),
    [
        ("config.json", {"model_type": "clip"}, "holds a 'clip' model; needed is one of sam"),
        ("preprocessor_config.json", {"image_mean": None}, "image_mean and image_std"),
        ("model.safetensors", None, "no model.safetensors"),
        ("config.json", None, "config.json"),
    ],
)
def test_folders_that_are_no_sam(sam_folder, tmp_path, file, change, complaint):
    for path in sam_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if change is None:
        (tmp_path / file).unlink()
    else:
        record = json.loads((tmp_path / file).read_text()) | change
        (tmp_path / file).write_text(json.dumps({name: value for name, value in record.items() if value is not None}))
    with pytest.raises(CheckpointError, match=complaint):
        load_sam(tmp_path)


def test_a_sam_whose_last_block_sees_windows_only(sam_folder, tmp_path):
    for path in sam_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    record = json.loads((tmp_path / "config.json").read_text())
    record["vision_config"]["global_attn_indexes"] = [0]
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="attends to windows"):
        load_sam(tmp_path)


# --- dense features ---


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers", "vit"])
def test_features_of_self_supervised_models(tmp_path, family):
    pytest.importorskip("transformers")
    model = save_dino(tmp_path, family)
    features = load_self_supervised(tmp_path)
    images = torch.stack([picture(28, 28), picture(28, 28, seed=1)])
    found = features(images)
    assert found.shape == (2, 16, 4, 4)
    mean, std = (torch.tensor(IMAGENET[name])[:, None, None] for name in ("image_mean", "image_std"))
    pixels = (images.float() / 255 - mean) / std
    with torch.inference_mode():
        tokens = model(pixels).last_hidden_state
    before = 5 if family == "dinov2_with_registers" else 1  # class token and four registers
    torch.testing.assert_close(found.flatten(2).mT, tokens[:, before:], rtol=1e-4, atol=1e-5)
    assert features(images[..., :-2, :-2]).shape == (2, 16, 4, 4)  # 26 pixels: the next whole patches are 28
    assert features(torch.stack([picture(42, 42)])).shape == (1, 16, 6, 6)


def test_other_models_are_no_features(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="holds a 'bert' model"):
        load_self_supervised(tmp_path)


def test_tokens_of_a_tower_are_features(make_model):
    model, images = make_model(), torch.stack([picture(16, 16), picture(16, 16, seed=1)])
    with torch.inference_mode():
        tokens = model.vision(model.pixels(images)).tokens
    found = tower_features(model)(images)
    torch.testing.assert_close(found[1, :, 1, 0], tokens[1, 2])
    assert found.shape == (2, 16, 2, 2)
    model.vision = TimmTower(TimmConfig("mobilenetv3_small_050"))  # pools into a wider vector
    with pytest.raises(ConfigError, match="gives none"):
        tower_features(model)(torch.stack([picture(32, 32)]))


def test_layers_of_towers_are_features():
    torch.manual_seed(0)
    policy, images = ImagePolicy(), torch.stack([picture(32, 32)])
    stage = layer_features(TimmTower(TimmConfig("tf_efficientnet_lite0")), 2, policy)(images)
    assert stage.shape == (1, 40, 4, 4)
    vit = VisionTransformer(VisionConfig(image_size=16, width=16, depth=2, heads=2, mlp_width=32))
    found = layer_features(vit, 0, policy)(images)
    pixels = (images.float() / 255 - torch.tensor(policy.mean)[:, None, None]) / torch.tensor(policy.std)[:, None, None]
    with torch.inference_mode():
        (stream,) = vit(pixels, layers=(0,)).layers
    torch.testing.assert_close(found.flatten(2).mT, stream[:, 1:])
