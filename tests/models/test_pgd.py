import pytest
import torch

from diptych.errors import ConfigError
from diptych.models.pgd import PGDConfig, ascend, random_start

KEYS = ("a", "b", "c")


@pytest.fixture
def pixels():
    """Return pixels between 0.2 and 0.8, so that 8 levels are never cut."""
    return 0.2 + 0.6 * torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def test_one_step_is_the_exact_maximum_of_a_linear_loss(pixels):
    weights = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1))
    (found,) = ascend(lambda views: (weights * views[0]).sum(), (pixels,), PGDConfig(8.0, 1, 1.0))
    torch.testing.assert_close(found, pixels + 8 / 255 * weights.sign())
    gained = (weights * (found - pixels)).sum()
    torch.testing.assert_close(gained, 8 / 255 * weights.abs().sum())  # the dual norm: no change within eps gains more


def test_any_number_of_steps_from_anywhere_ends_at_that_maximum(pixels):
    weights = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1))
    start = random_start((pixels,), KEYS, "0")
    (found,) = ascend(lambda views: (weights * views[0]).sum(), (pixels,), PGDConfig(8.0, 9, 0.25), start=start)
    torch.testing.assert_close(found, pixels + 8 / 255 * weights.sign())


def test_pixels_stay_within_eps_and_between_0_and_1():
    pixels = torch.tensor([0.0, 0.01, 0.5, 0.99, 1.0]).repeat(1, 3, 2, 1)
    found, other = ascend(
        lambda views: views[0].sum() - views[1].square().sum(), (pixels, pixels), PGDConfig(16.0, 5, 0.5)
    )
    torch.testing.assert_close(
        found[0, 0, 0], torch.tensor([16, 0, 0, 0, 0]) / 255 + torch.tensor([0, 0.01 + 16 / 255, 0.5 + 16 / 255, 1, 1])
    )
    torch.testing.assert_close(other[0, 0, 0], torch.tensor([0, 0, 0.5 - 16 / 255, 0.99 - 16 / 255, 1 - 16 / 255]))


def test_a_view_that_the_loss_does_not_see_stays(pixels):
    found, unseen = ascend(lambda views: views[0].sum(), (pixels, pixels.clone()), PGDConfig(8.0, 2, 0.5))
    assert torch.equal(unseen, pixels) and not torch.equal(found, pixels)


def test_eps_0_gives_the_images_back(pixels):
    called = []
    assert ascend(lambda views: called.append(views), (pixels,), PGDConfig(0.0))[0] is pixels  # type: ignore[arg-type]
    assert called == []


def test_no_parameter_gets_a_gradient_and_no_number_is_drawn(pixels):
    layer = torch.nn.Linear(5, 2)
    layer.weight.grad = torch.ones_like(layer.weight)
    state = torch.get_rng_state()
    start = random_start((pixels,), KEYS, "0")
    with torch.no_grad():
        (found,) = ascend(lambda views: layer(views[0]).square().sum(), (pixels,), PGDConfig(8.0), start=start)
        assert layer(found).square().sum() > layer(pixels).square().sum()
    assert torch.equal(layer.weight.grad, torch.ones_like(layer.weight)) and layer.bias.grad is None
    assert torch.equal(torch.get_rng_state(), state) and not found.requires_grad


def test_the_start_follows_from_seed_key_and_view_alone(pixels):
    views = (pixels, pixels)
    first, second = random_start(views, KEYS, "0")
    assert first.abs().max() <= 1 and not torch.equal(first, second)
    assert torch.equal(random_start((pixels[1:2],), ("b",), "0")[0], first[1:2])
    assert not torch.equal(random_start(views, KEYS, "1")[0], first)
    assert first.mean().abs() < 0.2 and first.std().item() == pytest.approx(3**-0.5, abs=0.1)


@pytest.mark.parametrize(
    "settings", [{"eps": 8 / 255}, {"eps": -1.0}, {"eps": 255.0}, {"steps": 0}, {"step_size": 0.0}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError):
        PGDConfig(**settings)
