"""Embeddings of other libraries' models and of ours must agree, whichever way weights travel."""

import warnings
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn.functional import normalize

from diptych.data.tokenizer import Tokenizer
from diptych.data.transforms import ImagePolicy
from diptych.errors import CheckpointError, OfflineError
from diptych.models.build import DualConfig, build
from diptych.models.codebook import CodebookHeadConfig
from diptych.models.heads import LinearHeadConfig
from diptych.models.huggingface import from_huggingface, to_huggingface
from diptych.models.openclip import clip_tokenizer, from_openclip, to_openclip
from diptych.models.text import TextConfig
from diptych.models.vision import VisionConfig
from other_libraries import hf_clip, hf_siglip, openclip_folder, randomise, save_hf, vit_b_32_like

TEXTS = ["a red cat", "two dogs & a tree", "it's THE 42nd   day", "naïve café 猫 🐈"]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, vocabulary=300, length=16)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, normalize(theirs.float(), dim=-1), rtol=0, atol=1e-5)


# --- transformers ---


def hf_embeddings(model, pixels: torch.Tensor, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    siglip = "Siglip" in type(model).__name__
    with torch.no_grad():
        image = model.get_image_features(pixel_values=pixels)
        text = model.get_text_features(input_ids=tokens.ids, attention_mask=None if siglip else tokens.mask.long())
    return tuple(getattr(part, "pooler_output", part) for part in (image, text))


@pytest.mark.parametrize("make", [lambda: hf_clip("quick_gelu"), lambda: hf_clip("gelu"), hf_siglip])
def test_transformers_to_us_and_back(make, tmp_path, tokenizer, pixels):
    theirs = make()
    randomise(theirs)
    save_hf(theirs, tmp_path / "theirs", tokenizer)
    ours = from_huggingface(str(tmp_path / "theirs"), offline=True)
    tokens = ours.tokenizer(TEXTS)
    with torch.no_grad():
        image, text = ours.encode_image(pixels), ours.encode_text(tokens)
    their_image, their_text = hf_embeddings(theirs, ours.pixels(pixels), tokens)
    assert_same(image, their_image)
    assert_same(text, their_text)
    assert float(ours.log_scale.detach()) == pytest.approx(theirs.logit_scale.item())

    to_huggingface(ours, tmp_path / "back")
    again = type(theirs).from_pretrained(tmp_path / "back").eval()
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    third = from_huggingface(str(tmp_path / "back"), offline=True)
    assert third.config == ours.config


def test_our_new_model_loads_in_transformers(tmp_path, tokenizer):
    from transformers import AutoTokenizer, CLIPModel

    torch.manual_seed(0)
    model = build(DualConfig(text=TextConfig(vocabulary=tokenizer.size, length=16)), tokenizer).eval()
    to_huggingface(model, tmp_path / "out")
    theirs = CLIPModel.from_pretrained(tmp_path / "out").eval()
    tokens = tokenizer(TEXTS)
    pixels = torch.rand(2, 3, 64, 64)
    their_image, their_text = hf_embeddings(theirs, model.pixels(pixels), tokens)
    with torch.no_grad():
        assert_same(model.encode_image(pixels), their_image)
        assert_same(model.encode_text(tokens), their_text)
    theirs_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text, row, mask in zip(TEXTS, tokens.ids, tokens.mask, strict=True):
        assert theirs_tokenizer(text)["input_ids"] == row[mask].tolist()


def test_missing_tokenizer_other_family_and_offline(tmp_path, tokenizer):
    hf_clip("gelu").save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        from_huggingface(str(tmp_path / "bare"), offline=True)
    with pytest.warns(UserWarning, match=r"no preprocessor_config\.json"):
        bare = from_huggingface(str(tmp_path / "bare"), offline=True, tokenizer=tokenizer)
    assert bare.image_policy == ImagePolicy(size=32)
    named = from_huggingface(
        str(tmp_path / "bare"), offline=True, tokenizer=tokenizer, image_policy=ImagePolicy(size=32, resize="pad")
    )
    assert named.image_policy.resize == "pad"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(CheckpointError, match="blip"):
        from_huggingface(str(tmp_path / "other"), offline=True)
    with pytest.raises(OfflineError, match="cache"):
        from_huggingface("nobody/no-such-model-anywhere", offline=True)


# --- open_clip ---


@pytest.fixture
def tiny_siglip() -> dict:
    """Return the settings of a SigLIP whose image tower timm knows by name, as it knows the real ones."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model("vit_tiny_patch8_siglip_32"):

        def vit_tiny_patch8_siglip_32(pretrained: bool = False, **kwargs) -> VisionTransformer:
            for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
                kwargs.pop(key, None)
            sizes = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False}
            model = VisionTransformer(**{"img_size": 32, **sizes, "global_pool": "map", **kwargs})
            model.pretrained_cfg = model.default_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
            return model

        vit_tiny_patch8_siglip_32.__module__ = "timm.models.vision_transformer"
        timm.models.register_model(vit_tiny_patch8_siglip_32)
    return {
        "embed_dim": 32,
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {
            "image_size": 32,
            "timm_model_name": "vit_tiny_patch8_siglip_32",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 300,
            "width": 32,
            "heads": 2,
            "layers": 2,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
    }


@pytest.mark.parametrize("kind", ["gelu", "quick_gelu", "siglip"])
def test_openclip_to_us_and_back(kind, tmp_path, tokenizer, tiny_siglip):
    import open_clip

    settings = tiny_siglip if kind == "siglip" else vit_b_32_like(kind == "quick_gelu")
    openclip_folder(tmp_path / "theirs", settings, tokenizer)
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'theirs'}", load_weights=True).eval()
    ours = from_openclip(str(tmp_path / "theirs"), offline=True)
    pixels = torch.rand(3, 3, 32, 32)
    tokens = ours.tokenizer(TEXTS)
    assert ours.image_policy.mean == (0.5, 0.4, 0.3)
    ids = torch.nn.functional.pad(tokens.ids, (0, 16 - tokens.ids.shape[1]))
    with torch.no_grad():
        assert_same(ours.encode_image(pixels), theirs.encode_image(ours.pixels(pixels)))
        assert_same(ours.encode_text(tokens), theirs.encode_text(ids))
    assert (ours.bias is None) == (kind != "siglip")

    to_openclip(ours, tmp_path / "back")
    again = open_clip.create_model(f"local-dir:{tmp_path / 'back'}", load_weights=True)
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert from_openclip(str(tmp_path / "back"), offline=True).config == ours.config


def test_our_new_model_loads_in_openclip(tmp_path, tokenizer):
    import open_clip

    torch.manual_seed(0)
    model = build(DualConfig(text=TextConfig(vocabulary=tokenizer.size, length=16)), tokenizer).eval()
    to_openclip(model, tmp_path / "out")
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    theirs.eval()
    tokens, pixels = tokenizer(TEXTS), torch.rand(2, 3, 64, 64)
    ids = torch.nn.functional.pad(tokens.ids, (0, 16 - tokens.ids.shape[1]))
    with torch.no_grad():
        assert_same(model.encode_image(pixels), theirs.encode_image(model.pixels(pixels)))
        assert_same(model.encode_text(tokens), theirs.encode_text(ids))


def test_an_architecture_that_others_lack_is_refused(tmp_path, tokenizer):
    config = DualConfig(
        vision=VisionConfig(pool="mean"), text=TextConfig(vocabulary=300, length=16), text_head=LinearHeadConfig(128)
    )
    codebook = CodebookHeadConfig(codes=8, dim=4)
    with_codebook = replace(config, vision=VisionConfig(), image_head=codebook, text_head=codebook)
    for write, strange in product((to_openclip, to_huggingface), (config, with_codebook)):
        with pytest.raises(CheckpointError, match="CLIP form"):
            write(build(strange, tokenizer), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_clip_token_ids_equal_those_of_openclip():
    import open_clip

    hard = [
        *TEXTS,
        "a photo of a cat.",
        "Don't   stop!! #42 — “quoted” &amp; escaped <b>tags</b>",
        "x" * 200,
        "the the the " * 40,
        "مرحبا 漢字 emoji 👩‍🚀🏳️‍🌈 \n tabs\tand newlines",
        "we'll they've I'd",
    ]
    tokens = clip_tokenizer(open_clip)(hard)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = open_clip.get_tokenizer("ViT-B-32")(hard)
    width = tokens.ids.shape[1]
    assert torch.equal(tokens.ids, theirs[:, :width])
    assert not theirs[:, width:].any()


def test_unknown_openclip_names_and_pickles(tmp_path):
    with pytest.raises(CheckpointError, match="ViT-B-32"):
        from_openclip("ViT-B-33/openai", offline=True)
    with pytest.raises(CheckpointError, match="laion2b_s34b_b79k"):
        from_openclip("ViT-B-32/laion2b_s34b", offline=True)
    (tmp_path / "weights.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="pickle"):
        from_openclip(f"ViT-B-32/{tmp_path / 'weights.pt'}", offline=True)
    with pytest.raises(OfflineError, match="cache"):
        from_openclip("ViT-B-32/laion2b_s34b_b79k", offline=True)
