import math
from dataclasses import replace

import pytest
import torch

from diptych.models.build import build
from diptych.models.dual import DualEncoder, ScaleConfig, normalise

WORDS = ["a red circle", "a blue square and a circle"]


@pytest.fixture
def model(make_model) -> DualEncoder:
    return make_model().eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_embeddings_are_unit_vectors_in_full_precision(model):
    tokens = model.tokenizer(WORDS)
    with torch.no_grad():
        plain = model.encode_image(images()), model.encode_text(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            assert model.image_head(model.vision(model.pixels(images()))).dtype == torch.bfloat16
            half = model.encode_image(images()), model.encode_text(tokens)
    for exact, rounded in zip(plain, half, strict=True):
        for found in (exact, rounded):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
        assert ((exact * rounded).sum(1) > 0.99).all()


def test_an_embedding_is_the_head_of_the_tower_scaled_to_length_1(model):
    with torch.no_grad():
        raw = model.image_head.linear(model.vision(model.pixels(images())).pooled)
        torch.testing.assert_close(model.encode_image(images()), raw / raw.square().sum(1, keepdim=True).sqrt())
    assert torch.equal(normalise(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.6, 0.8]]))


def test_bytes_and_floats_in_0_1_are_the_same_image(model):
    with torch.no_grad():
        assert torch.equal(model.encode_image(images()), model.encode_image(images().float() / 255))


def test_pixels_are_normalised_by_the_policy(make_model):
    model = make_model()
    policy = replace(model.image_policy, mean=(0.2, 0.4, 0.6), std=(0.5, 0.25, 0.1))
    model = build(replace(model.config, image_policy=policy), model.tokenizer)
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    torch.testing.assert_close(model.pixels(white)[0, :, 3, 5], torch.tensor([1.6, 2.4, 4.0]))


def test_gradients_reach_the_pixels_and_point_uphill(model):
    text = model.encode_text(model.tokenizer(WORDS)).detach()
    pixels = (images().float() / 255).requires_grad_()

    def cosines() -> torch.Tensor:
        return (model.encode_image(pixels) * text).sum(1)

    before = cosines()
    before.sum().backward()
    assert (pixels.grad.abs().amax((1, 2, 3)) > 0).all()
    with torch.no_grad():
        pixels += 1e-3 * pixels.grad.sign()
    predicted = 1e-3 * pixels.grad.abs().sum((1, 2, 3))
    torch.testing.assert_close(cosines().detach() - before.detach(), predicted, rtol=0.2, atol=0)


def test_the_scale_stops_at_100(make_model):
    model = make_model()
    assert model.scale.item() == pytest.approx(1 / 0.07)
    model.scale.backward()
    assert model.log_scale.grad.item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.log_scale.fill_(math.log(1000))
    assert model.scale.item() == pytest.approx(100)


def test_siglip_starts_from_its_own_scale_and_bias(make_model):
    clip = make_model()
    model = build(replace(clip.config, scale=ScaleConfig(math.log(10), -10.0)), clip.tokenizer)
    assert model.scale.item() == pytest.approx(10)
    assert model.bias.item() == -10 and model.bias.requires_grad
    assert clip.bias is None and "bias" not in clip.state_dict() and "bias" in model.state_dict()


def test_normalisation_is_no_weight(model):
    assert {"mean", "std"}.isdisjoint(model.state_dict())
    assert model.device == torch.device("cpu")
