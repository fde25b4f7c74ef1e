import pytest
import torch
from torch import nn

from diptych.models.precision import autocast, choose_precision, first_in_fp32, is_convolutional

CPU = torch.device("cpu")


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_what_was_asked_is_taken(asked):
    assert choose_precision(asked, CPU) == (asked, f"{asked}, as asked.")


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_follows_the_processor(monkeypatch, native, expected):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: not native)  # the other one must not be asked
    found, reason = choose_precision("auto", CPU)
    assert found == expected and reason.startswith(expected) and "cpu" in reason


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_follows_the_gpu(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: not native)
    found, reason = choose_precision("auto", torch.device("cuda"))
    assert found == expected and "cuda" in reason


def test_other_devices_get_fp32(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert choose_precision("auto", torch.device("mps"))[0] == "fp32"


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_are_computed_in_the_format(precision, dtype):
    x = torch.ones(2, 2)
    with autocast(precision, CPU):
        assert (x @ x).dtype == dtype
    assert (x @ x).dtype == torch.float32


def test_bf16_embeddings_are_close_to_fp32(make_model):
    model = make_model().eval()
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model.encode_image(images)
        with autocast("bf16", CPU):
            half = model.encode_image(images)
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert (half * full).sum(1).min() > 0.999


def tower_of_convolutions() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        layer for width in (3, 8, 8, 8) for layer in (nn.Conv2d(width, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    ]
    return nn.Sequential(*layers).eval()


def test_the_first_convolutions_can_stay_fp32():
    tower, pixels = tower_of_convolutions(), torch.randn(2, 3, 12, 12)
    formats: list[torch.dtype] = []
    for module in tower:
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: formats.append(output.dtype))
    with torch.no_grad(), autocast("bf16", CPU):
        with first_in_fp32(tower, count=2):
            tower(pixels)
        tower(pixels)
    full, half = torch.float32, torch.bfloat16
    assert formats == [full, full, half, half] + [half] * 4
    assert all("forward" not in vars(module) for module in tower)
    formats.clear()
    with torch.no_grad(), autocast("bf16", CPU), first_in_fp32(tower, on=False):
        tower(pixels)
    assert formats == [half] * 4


def test_only_towers_with_batch_norms_are_convolutional(make_model):
    assert is_convolutional(tower_of_convolutions())
    vision = make_model().vision
    assert not is_convolutional(vision)
    with first_in_fp32(vision):
        assert "forward" not in vars(vision.patch_embedding)
