import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from diptych.data.words import UniversalWord
from diptych.errors import ConfigError, InputError
from diptych.models.embedding import embed_images, embed_source_images, eval_mode, inference
from diptych.models.perturbation import (
    UniversalPerturbation,
    as_floats,
    check_eps,
    fit_size,
    load_perturbation,
    project,
    sign_noise,
)
from diptych.types import TowerOutput


def images(count: int = 2, side: int = 16) -> torch.Tensor:
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_bytes_as_floats_are_the_same_image_in_eval_and_in_training(make_model):
    model = make_model()
    everything = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    for mode in (True, False):
        model.train(mode)
        for pixels in (images(), everything):
            assert torch.equal(as_floats(pixels), pixels / 255)
            assert torch.equal(model.pixels(pixels), model.pixels(as_floats(pixels)))
            assert torch.equal(model.encode_image(pixels), model.encode_image(as_floats(pixels)))
    floats = as_floats(images())
    assert as_floats(floats) is floats
    with pytest.raises(ConfigError, match=r"data\.cache\.mode"):
        as_floats(TowerOutput(torch.ones(2, 3)))


def test_a_noise_is_added_and_cut_at_black_and_white():
    pixels = torch.tensor([0.0, 0.5, 1.0])[:, None, None].expand(1, 3, 2, 2)
    noise = UniversalPerturbation(torch.tensor([-10.0, 20.0, 20.0])[:, None, None].expand(3, 2, 2) / 255, 20)
    torch.testing.assert_close(noise.apply(pixels)[0, :, 0, 0], torch.tensor([0.0, 0.5 + 20 / 255, 1.0]))


def test_eps_0_changes_not_a_bit_of_an_embedding(make_model, drawings):
    model, source = make_model(), drawings(5)
    nothing = sign_noise(16, 0)
    assert torch.equal(nothing.apply(as_floats(images())), as_floats(images()))
    _, attacked = embed_source_images(model, source, change=nothing.apply)
    assert torch.equal(attacked, embed_images(model, source))
    _, attacked = embed_source_images(model, source, change=sign_noise(16, 64).apply)
    assert (attacked - embed_images(model, source)).abs().max() > 1e-4


def test_sign_noise_is_everywhere_eps_and_follows_from_its_seed():
    noise = sign_noise(32, 8, seed=3)
    torch.testing.assert_close(noise.delta.abs(), torch.full((3, 32, 32), 8 / 255))
    assert abs(noise.delta.sign().mean().item()) < 0.1  # 3072 signs: five deviations
    assert torch.equal(noise.delta, sign_noise(32, 8, seed=3).delta)
    assert not torch.equal(noise.delta, sign_noise(32, 8, seed=4).delta)


def test_a_noise_of_another_size_is_resized_and_does_not_grow():
    noise = sign_noise(8, 4)
    changed = noise.apply(torch.full((1, 3, 20, 12), 0.5)) - 0.5
    assert changed.shape == (1, 3, 20, 12)
    assert 0 < changed.abs().max() <= 4 / 255 + 1e-6
    flat = torch.full((1, 3, 4, 4), 0.01)
    torch.testing.assert_close(fit_size(flat, (7, 9)), torch.full((1, 3, 7, 9), 0.01))


def test_projection_is_the_nearest_allowed_value_and_stops_the_gradient_where_it_cuts():
    pixels = torch.tensor([0.5, 0.5, 0.5, 0.01, 0.99])
    changed = torch.tensor([0.52, 0.9, 0.1, -0.5, 1.5], requires_grad=True)
    found = project(changed, pixels, 25.5)
    torch.testing.assert_close(found, torch.tensor([0.52, 0.6, 0.4, 0.0, 1.0]))
    found.sum().backward()
    assert changed.grad.tolist() == [1, 0, 0, 0, 0]
    assert torch.equal(project(changed.detach(), pixels, 0), pixels)


def test_eps_is_said_in_levels():
    for fine in (0, 0.25, 8, 254.9):
        check_eps(fine)
    for wrong in (-1, 8 / 255, 255):
        with pytest.raises(ConfigError, match="8/255 is 8"):
            check_eps(wrong)
    with pytest.raises(ConfigError, match="more than eps"):
        UniversalPerturbation(torch.full((3, 2, 2), 9 / 255), 8)


@pytest.mark.parametrize(("ending", "eps"), [(".safetensors", 12.5), (".npy", 12.5), (".png", 12.0)])
def test_a_noise_comes_back_from_its_file(tmp_path, ending, eps):
    delta = torch.linspace(-eps, eps, 3 * 4 * 5).view(3, 4, 5) / 255
    UniversalPerturbation(delta, eps).save(tmp_path / f"noise{ending}")
    found = load_perturbation(tmp_path / f"noise{ending}")
    assert found.eps == pytest.approx(eps, rel=1e-6)
    torch.testing.assert_close(found.delta, delta, rtol=0, atol=0.501 / 255 if ending == ".png" else 0)
    cut = load_perturbation(tmp_path / f"noise{ending}", eps=4)
    assert cut.eps == 4
    torch.testing.assert_close(cut.delta, found.delta.clamp(-4 / 255, 4 / 255))


def test_noises_of_others_are_read(tmp_path):
    levels = np.arange(-6, 6, dtype=np.int64).reshape(2, 2, 3)
    np.save(tmp_path / "levels.npy", levels)
    expected = torch.from_numpy(levels / 255).permute(2, 0, 1).float()
    assert torch.equal(load_perturbation(tmp_path / "levels.npy").delta, expected)
    save_file({"uap": expected[None].contiguous()}, tmp_path / "one.safetensors")
    assert torch.equal(load_perturbation(tmp_path / "one.safetensors").delta, expected)
    Image.new("RGB", (3, 2), (128, 138, 118)).save(tmp_path / "grey.png")
    assert load_perturbation(tmp_path / "grey.png").delta[:, 1, 2].tolist() == pytest.approx([0, 10 / 255, -10 / 255])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: np.save(file, np.full((3, 2, 2), 8.0)), "Divide levels by 255"),
        (lambda file: np.save(file, np.full((4, 2, 2), 0.1)), r"has \[4, 2, 2\]"),
        (lambda file: np.save(file, np.full((3, 2, 2), np.nan)), "finite"),
        (lambda file: np.save(file, np.array([{}]), allow_pickle=True), "cannot be read"),
        (lambda file: file.write_bytes(b"no array"), "cannot be read"),
        (lambda file: None, "cannot be read"),
    ],
)
def test_what_is_no_noise_is_refused(tmp_path, make, message):
    make(tmp_path / "noise.npy")
    with pytest.raises(InputError, match=message):
        load_perturbation(tmp_path / "noise.npy")


def test_a_file_of_many_tensors_is_refused(tmp_path):
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match="not one tensor `delta`"):
        load_perturbation(tmp_path / "two.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(json.dumps({}).encode())
    with pytest.raises(InputError, match="cannot be read"):
        load_perturbation(tmp_path / "broken.safetensors")


def test_a_word_is_kept_beside_the_noise(tmp_path):
    noise = replace(sign_noise(4, 8), word=UniversalWord("vélo", "fr"))
    noise.save(tmp_path / "pair.safetensors")
    found = load_perturbation(tmp_path / "pair.safetensors", eps=4)
    assert found.word == noise.word and found.eps == 4
    assert torch.equal(found.delta, noise.delta / 2)
    for name in ("pair.npy", "pair.png"):
        with pytest.raises(ConfigError, match=f"holds both; not as {name}"):
            noise.save(tmp_path / name)
        assert not (tmp_path / name).exists()


def test_files_without_a_word_are_read_as_before(tmp_path):
    sign_noise(4, 8).save(tmp_path / "old.safetensors")
    with safe_open(tmp_path / "old.safetensors", "pt") as archive:
        assert archive.metadata() == {"eps": "8"}
    assert load_perturbation(tmp_path / "old.safetensors").word is None
    about = {"eps": "8", "word": "two words", "language": "en"}
    save_file({"delta": sign_noise(4, 8).delta}, tmp_path / "broken.safetensors", metadata=about)
    with pytest.raises(InputError, match="cannot be read"):
        load_perturbation(tmp_path / "broken.safetensors")


def test_a_noise_is_not_written_as_something_else(tmp_path):
    for name, noise in (("noise.txt", sign_noise(2, 8)), ("noise.png", sign_noise(2, 200))):
        with pytest.raises(ConfigError, match=f"not as {name}"):
            noise.save(tmp_path / name)
        assert list(tmp_path.iterdir()) == []


def test_eval_mode_keeps_gradients_and_gives_modes_back(make_model):
    model = make_model().train()
    model.text.eval()
    modes = [part.training for part in model.modules()]
    with eval_mode(model):
        assert not any(part.training for part in model.modules())
        pixels = as_floats(images()).requires_grad_()
        model.encode_image(pixels).sum().backward(inputs=[pixels])
        assert pixels.grad is not None and all(p.grad is None for p in model.parameters())
    assert [part.training for part in model.modules()] == modes
    with pytest.raises(ZeroDivisionError), inference(model):
        _ = 1 / 0
    assert [part.training for part in model.modules()] == modes
