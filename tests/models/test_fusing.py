"""Convolution, norm and activation in one kernel: equal to the three in turn, or not used."""

import pytest
import torch
from torch import nn

from diptych.models.foreign import TimmConfig, TimmTower
from diptych.models.fusing import FusedConvolution, fuse, fused_images
from diptych.models.precision import FIRST


def trained(network: nn.Module) -> nn.Module:
    """Give batch norms statistics, weights and biases of their own."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
                (module.weight, 0.5, 1.5),
                (module.bias, -1, 1),
            ):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return network.eval()


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("padding", ["", "same"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Identity, nn.SiLU])
@pytest.mark.parametrize(("stride", "groups", "bias"), [(1, 1, True), (2, 4, False)])
def test_one_kernel_gives_what_three_steps_give(padding, activation, stride, groups, bias):
    timm = pytest.importorskip("timm")
    convolution = timm.layers.create_conv2d(4, 8, 3, stride=stride, groups=groups, bias=bias, padding=padding)
    norm = trained(timm.layers.BatchNormAct2d(8, act_layer=activation))
    x = pixels(2, 4, 11, 9)
    with torch.no_grad():
        torch.testing.assert_close(FusedConvolution(convolution, norm)(x), norm(convolution(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "left"), [("tf_efficientnet_lite0", 0), ("test_resnet", 1), ("mobilenetv3_small_050", 0)]
)  # ResNet-D's first norm follows a sequence of layers
def test_whole_networks_give_the_same(name, left):
    torch.manual_seed(0)
    network = trained(TimmTower(TimmConfig(name)).model)
    fused = fuse(network, "fp32")
    norms = [sum(isinstance(module, nn.BatchNorm2d) for module in each.modules()) for each in (network, fused)]
    assert norms[0] > 5 and norms[1] == left
    with torch.no_grad():
        expected, found = network(pixels(2, 3, 64, 96)), fused(pixels(2, 3, 64, 96))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bf16 of its own")
def test_in_bf16_all_but_the_first_are_rounded():
    network = trained(TimmTower(TimmConfig("tf_efficientnet_lite0")).model)
    fused = fuse(network, "bf16")
    formats = [module.weight.dtype for module in fused.modules() if isinstance(module, FusedConvolution)]
    assert formats == [torch.float32] * FIRST + [torch.bfloat16] * (len(formats) - FIRST) and len(formats) == 49
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = fused(pixels(2, 3, 64, 64))
    assert torch.cosine_similarity(found.float(), network(pixels(2, 3, 64, 64)), dim=1).min() > 0.99


class Strange(nn.Module):
    """Registers a norm behind a convolution, and calls it before."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(self.norm(x))


def test_a_network_that_calls_its_layers_in_another_order_is_left_alone():
    assert fuse(trained(Strange()), "fp32") is None


def test_a_tower_gets_its_own_network_back(make_model):
    model = make_model().eval()
    with fused_images(model, "fp32"):
        assert not any(isinstance(module, FusedConvolution) for module in model.modules())
    model.vision = trained(TimmTower(TimmConfig("test_resnet")))
    own, state = model.vision.model, list(model.state_dict())
    x = pixels(3, 3, 64, 64)
    with torch.no_grad():
        expected = model.vision(x)
        with pytest.raises(KeyError), fused_images(model, "fp32"):
            assert any(isinstance(module, FusedConvolution) for module in model.vision.modules())
            found = model.vision(x)
            raise KeyError
    assert model.vision.model is own and list(model.state_dict()) == state
    torch.testing.assert_close((found.pooled, found.tokens), (expected.pooled, expected.tokens), rtol=1e-3, atol=1e-4)
    model.train()
    with fused_images(model, "fp32"):  # in training norms look at the batch
        assert model.vision.model is own
