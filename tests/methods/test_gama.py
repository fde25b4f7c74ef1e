import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diptych.data.sources import Listed
from diptych.errors import CheckpointError, ConfigError, DataError
from diptych.methods.gama import (
    Attack,
    Config,
    Features,
    Generator,
    attack_loss,
    attention_loss,
    co_occurrence,
    features,
    image_loss,
    least_related,
    objects_of,
    pair_prompts,
    read,
    text_loss,
)
from diptych.models.perturbation import as_floats, project
from diptych.types import Region, Sample, Text

CLOSE = {"rtol": 1e-8, "atol": 1e-12}
TINY = Config(steps=3, batch_size=4, lr=1e-3, width=2, blocks=1, dropout=0.0, candidates=3, middle=0)
OFFICIAL = (
    ("layers.0.1", "block1.1"),
    ("layers.0.2", "block1.2"),
    ("layers.0.3", "block1.3"),
    *((f"layers.{n}.{part}", f"block{n + 1}.{part}") for n in (1, 2) for part in (0, 1, 2)),
    *((f"layers.{n + 3}.block.{part}", f"resblock{n + 1}.block.{part}") for n in range(6) for part in (1, 2, 3, 6, 7)),
    *((f"layers.{n + 9}.{part}", f"upsampl{n + 1}.{part}") for n in (0, 1) for part in (0, 1, 2)),
    ("layers.11.1", "blockf.1"),
)
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float64))


def official(numbers: dict[str, np.ndarray]) -> Generator:
    """Return the generator of the official numbers, in float64."""
    generator = Generator(2, 6, 0.0).double()
    state = generator.state_dict()
    names = dict(OFFICIAL)
    for name in state:
        module, _, kind = name.rpartition(".")
        if kind != "num_batches_tracked":
            state[name] = tensor(numbers[f"param.{names[module]}.{kind}"])
    generator.load_state_dict(state)
    return generator


@pytest.mark.data
def test_official_generator(golden):
    numbers = golden("gama", "generator")
    generator = official(numbers)
    for mode in ("eval", "train"):
        pixels = tensor(numbers["images"]).requires_grad_()
        found = generator.train(mode == "train")(pixels)
        (found * tensor(numbers["cotangent"])).sum().backward()
        torch.testing.assert_close(found.detach(), tensor(numbers[f"out_{mode}"]), **CLOSE)
        torch.testing.assert_close(pixels.grad, tensor(numbers[f"grad_{mode}"]), **CLOSE)


@pytest.mark.data
@pytest.mark.parametrize("case", ["contrastive", "contrastive_near", "contrastive_all_equal"])
def test_official_text_loss(golden, case):
    numbers = golden("gama", case)
    adversarial = tensor(numbers["adv_deep"]).requires_grad_()
    loss = text_loss(adversarial, tensor(numbers["clean_deep"]), tensor(numbers["text"]), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(numbers["loss"], rel=1e-8)
    assert adversarial.grad.isfinite().all()
    if "grad_adv" in numbers:
        torch.testing.assert_close(adversarial.grad, tensor(numbers["grad_adv"]), **CLOSE)


@pytest.mark.data
def test_official_choice_of_texts(golden):
    numbers = golden("gama", "select")
    bank, images = tensor(numbers["text_bank"]), tensor(numbers["clip_img"])
    drawn = bank[torch.from_numpy(numbers["sampled_rows"])]
    chosen = least_related(drawn, images)
    assert chosen.tolist() == numbers["chosen_candidate"].tolist()
    torch.testing.assert_close(drawn[chosen], tensor(numbers["text"]), **CLOSE)


@pytest.mark.data
def test_official_prompts(golden):
    numbers = golden("gama", "pairs")
    together = torch.from_numpy(numbers["adjacency"]) > 0
    assert pair_prompts(numbers["classes"].tolist(), together) == tuple(numbers["prompts"].tolist())
    assert len(numbers["prompts"]) == int(together.sum())


class Toy:
    """Surrogate and guide of the official numbers."""

    def __init__(self, numbers: dict[str, np.ndarray]) -> None:
        self.first, self.second = tensor(numbers["surrogate_w1"]), tensor(numbers["surrogate_w2"])
        self.weight = tensor(numbers["clip_W"])

    def features(self, normalised: torch.Tensor) -> Features:
        middle = F.conv2d(normalised, self.first, stride=2, padding=1).relu()
        deep = F.conv2d(middle, self.second, stride=2, padding=1).relu().mean((2, 3))
        return Features(deep, middle.flatten(2).transpose(1, 2))

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(normalise(pixels, CLIP), 2).flatten(1) @ self.weight.T


def normalise(pixels: torch.Tensor, policy: tuple[tuple[float, ...], ...]) -> torch.Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in policy)
    return (pixels - mean) / std


@pytest.mark.data
@pytest.mark.parametrize("case", ["train_copy", "train_legacy"])
def test_four_official_steps(golden, case):
    """In the code's own run the attention term sees a clean image that was normalised twice; ours is the run with a copy."""
    numbers = golden("gama", "train_legacy")
    expected = golden("gama", case)
    settings = json.loads(str(numbers["settings"]))
    toy, generator, bank = Toy(numbers), official(numbers), tensor(numbers["text_bank"])
    optimizer = torch.optim.Adam(generator.parameters(), settings["lr"], betas=tuple(settings["betas"]))
    config = Config(lr=settings["lr"])
    for step in range(settings["steps"]):
        pixels = tensor(numbers["images"][step])
        seen = normalise(pixels, CLIP) if case == "train_legacy" else pixels
        deep = toy.features(normalise(pixels, IMAGENET)).deep
        clean = Features(deep, toy.features(normalise(seen, IMAGENET)).middle)
        adversarial = toy.features(normalise(project(generator(pixels), pixels, config.eps), IMAGENET))
        image, drawn = toy.image(pixels), bank[torch.from_numpy(numbers["sampled_rows"][step])]
        chosen = least_related(drawn, image)
        assert chosen.tolist() == expected["chosen"][step].tolist()
        parts = {
            "loss_txt": text_loss(adversarial.deep, clean.deep, drawn[chosen]),
            "loss_img": image_loss(adversarial.deep, image),
            "loss_att": attention_loss(adversarial.middle, clean.middle),
            "loss": attack_loss(adversarial, clean, image, drawn[chosen], config),
        }
        for name, value in parts.items():
            assert value.item() == pytest.approx(expected[name][step], rel=1e-6), (step, name)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
    weight = generator.layers[11][1].weight.detach()
    torch.testing.assert_close(weight, tensor(expected["after_blockf_weight"]), rtol=1e-6, atol=1e-9)
    bias = generator.layers[0][3].bias.detach()
    torch.testing.assert_close(bias, tensor(expected["after_block1_act_bias"]), rtol=1e-6, atol=1e-9)


def test_losses_by_hand():
    one = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    other = one.flip(0)
    assert text_loss(one, one, one).item() == pytest.approx(0.01)
    assert text_loss(one, other, one).item() == 0
    assert text_loss(one, one, -one).item() == pytest.approx(1 + 0.01)
    assert image_loss(one, one).item() == 0
    assert image_loss(one, other).item() == pytest.approx(-1)  # (1 + 1) / 2 dimensions
    assert image_loss(one, -one).item() == pytest.approx(-4 / 2)
    maps = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0))
    assert attention_loss(maps, maps).item() == pytest.approx(1)
    assert attention_loss(-2 * maps, maps).item() == pytest.approx(-1)


def test_unrelated_is_a_small_cosine_and_not_a_negative_one():
    cosines = torch.tensor([-0.9, 0.05, 0.4])
    texts = torch.stack([cosines, (1 - cosines**2).sqrt()], 1)
    assert least_related(texts, torch.tensor([[7.0, 0.0]])).tolist() == [1]


def described(*captions: str) -> Listed:
    image = np.random.default_rng(0).integers(256, size=(len(captions), 20, 20, 3), dtype=np.uint8)
    return Listed(
        [Sample(f"s{n}", image[n], (Text(caption),), f"s{n}") for n, caption in enumerate(captions)], "described"
    )


CAPTIONS = ("a cat and a dog", "a dog near a bus", "a cat", "a bus and a cat", "a tree")


def test_things_are_read_from_regions_or_else_from_captions():
    captioned = Sample("a", None, (Text("two red cats near a dog"), Text("a cat", "label")), "a")
    assert objects_of(captioned) == ("cat", "dog")
    assert objects_of(replace(captioned, regions=(Region((0, 0, 1, 1), "a small bus"),))) == ("bus",)
    classes, together = co_occurrence(described(*CAPTIONS), 3)
    assert classes == ("cat", "dog", "bus")
    assert together.tolist() == [[False, True, True], [True, False, True], [True, True, False]]
    assert pair_prompts(classes, together, "{} with {}")[:2] == ("cat with dog", "cat with bus")


def test_data_without_pairs_are_refused(make_model):
    with pytest.raises(DataError, match="no pairs to name"):
        Attack(TINY).fit(make_model(), described("a cat", "a dog"))
    with pytest.raises(DataError, match="square matrix"):
        pair_prompts(["cat"], torch.ones(2, 2, dtype=torch.bool))


def test_features_are_the_embedding_or_the_mean_of_a_layer(make_model):
    model = make_model().eval()
    pixels = as_floats(torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8))
    found = features(model, pixels, TINY)
    torch.testing.assert_close(F.normalize(found.deep, dim=-1), model.encode_image(pixels))
    layer = model.vision(model.pixels(pixels), layers=(0,)).layers[0]
    assert torch.equal(found.middle, layer)
    assert torch.equal(features(model, pixels, replace(TINY, deep=-1)).deep, layer.mean(1))
    with pytest.raises(ConfigError, match="gives 1 layers"):
        features(model, pixels, replace(TINY, middle=1))


def test_what_does_not_fit_is_said(make_model):
    with pytest.raises(ConfigError, match="16 dimensions and the guide's embeddings 8"):
        Attack(replace(TINY, deep=0)).fit(make_model(), described(*CAPTIONS))
    with pytest.raises(ConfigError, match="multiples of 4 pixels, not 6 x 8"):
        Generator(2, 1)(torch.rand(1, 3, 8, 6))
    for wrong in ({"steps": 0}, {"objects": 1}, {"width": 0}):
        with pytest.raises(ConfigError, match="gama needs"):
            replace(TINY, **wrong)


def test_a_guide_of_its_own_is_asked_for_texts_and_clean_images(make_model):
    data, surrogate = described(*CAPTIONS), make_model(0)
    by_itself = Attack(TINY).fit(surrogate, data).generator.state_dict()
    guided = Attack(TINY, make_model(1)).fit(surrogate, data).generator.state_dict()
    same = Attack(TINY, make_model(0)).fit(surrogate, data).generator.state_dict()
    assert all(torch.equal(by_itself[name], same[name]) for name in same)
    assert not all(torch.equal(by_itself[name], guided[name]) for name in guided)
    alone = replace(TINY, text_weight=0.0, image_weight=0.0)
    assert torch.equal(
        Attack(alone, make_model(1)).fit(surrogate, data).generator.state_dict()["layers.0.1.weight"],
        Attack(alone).fit(surrogate, data).generator.state_dict()["layers.0.1.weight"],
    )


def test_each_image_is_changed_by_itself_and_within_eps(make_model):
    changes = Attack(TINY).fit(make_model(), described(*CAPTIONS))
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    changed = changes.apply(pixels)
    assert (changed - pixels).abs().max() <= 10 / 255 + 1e-6
    assert 0 <= changed.min() and changed.max() <= 1
    torch.testing.assert_close(changes.apply(pixels[1:2]), changed[1:2])


def test_a_file_that_is_no_generator_is_refused(tmp_path, make_model):
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no generator of gama"):
        read(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"not as noise\.png"):
        Attack(TINY).fit(make_model(), described(*CAPTIONS)).save(tmp_path / "noise.png")


@pytest.mark.slow
def test_the_example_runs(tmp_path, capsys):
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "gama.py"))
    example["main"](tmp_path / "network.safetensors", steps=2, count=24)
    assert read(tmp_path / "network.safetensors").eps == 10
    assert "eps  2 image_to_text/recall@1: lost" in capsys.readouterr().out
