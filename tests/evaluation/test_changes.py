import pytest
import torch
from torch import nn

from diptych.evaluation.changes import (
    Images,
    Question,
    attacked,
    corrupted,
    margin,
    perturbed,
    with_noise,
    written_over,
)
from diptych.models.dual import DualEncoder, normalise
from diptych.models.perturbation import as_floats, sign_noise
from diptych.models.pgd import PGDConfig

SIDE = 8


def images(count: int = 40, seed: int = 0, rng: int = 5) -> Images:
    """Return grey noise far from black and white, so that 8 levels are never cut."""
    pixels = torch.randint(60, 190, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(rng))
    return Images(pixels.byte(), tuple(f"key {row}" for row in range(count)), seed)


def some(first: Images, start: int, stop: int) -> Images:
    return Images(first.pixels[start:stop], first.keys[start:stop], first.seed)


class Linear(DualEncoder):
    """A tower that says (w . x - b, 1), normalised; with answers (1, 0) and (-1, 0) the margin is of the sign of w . x - b."""

    def __init__(self, weight: torch.Tensor, bias: float) -> None:
        nn.Module.__init__(self)
        self.weight, self.shift, self.log_scale = weight, bias, nn.Parameter(torch.zeros(()))

    def encode_image(self, pixels):
        said = (as_floats(pixels) * self.weight).sum((1, 2, 3)) - self.shift
        return normalise(torch.stack([said, torch.ones_like(said)], 1))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.float() - other.float()).abs().mean().item()


def question(labels: torch.Tensor) -> Question:
    right = torch.stack([labels, ~labels], 1)
    return Question(("left", "right"), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), right, lambda seen: {})


def test_pgd_finds_exactly_those_images_of_a_linear_tower_that_can_be_moved_across():
    shown = images(200)
    weight = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    said = (as_floats(shown.pixels) * weight).sum((1, 2, 3))
    model = Linear(weight, said.median().item())
    labels = said > model.shift
    for eps in (0.5, 2.0, 5.0):
        reach = eps / 255 * weight.abs().sum()  # no change within eps moves w . x by more
        movable = (said - model.shift).abs() < reach
        config = PGDConfig(eps, 10, 0.25)
        found = attacked(shown, question(labels), model=model, config=config, batch_size=64)
        right = margin(model.encode_image(found), question(labels).embeddings, question(labels).right) > 0
        sure = ((said - model.shift).abs() - reach).abs() > 1e-4
        assert torch.equal(right[sure], ~movable[sure])
        assert 5 < movable.sum() < 195


def test_margin_is_best_right_minus_best_wrong():
    answers = normalise(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    seen = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    right = torch.tensor([[True, True, False], [False, False, True]])
    torch.testing.assert_close(margin(seen, answers, right), torch.tensor([0.8 + 0.6, -1 - 1.0]))


def test_eps_0_gives_the_clean_pixels_bit_for_bit():
    shown, clean = images(4), as_floats(images(4).pixels)
    asked = question(torch.ones(4, dtype=torch.bool))
    assert torch.equal(with_noise(shown, asked, eps=0.0), clean)
    model = Linear(torch.ones(3, SIDE, SIDE), 0.0)
    assert torch.equal(attacked(shown, asked, model=model, config=PGDConfig(), batch_size=3), clean)
    assert torch.equal(perturbed(shown, asked, perturbation=sign_noise(SIDE, 0.0)), clean)


def test_noise_moves_every_value_by_eps_up_or_down():
    shown = images()
    asked, clean = question(torch.ones(40, dtype=torch.bool)), as_floats(shown.pixels)
    moved = (with_noise(shown, asked, eps=4.0) - clean) * 255
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 4.0), rtol=0, atol=1e-3)
    assert (moved > 0).float().mean().item() == pytest.approx(0.5, abs=0.03)  # 7,680 draws
    assert not torch.equal(moved[0].round(), moved[1].round())
    one = (perturbed(shown, asked, perturbation=sign_noise(SIDE, 4.0)) - clean) * 255
    assert torch.equal(one[0].round(), one[1].round())


@pytest.mark.parametrize("change", ["noise", "attack", "words", "corruption"])
def test_what_is_done_to_an_image_follows_from_seed_and_key(change):
    model = Linear(torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)), 0.0)

    def changed(shown: Images):
        asked = question(torch.ones(len(shown.keys), dtype=torch.bool))
        return {
            "noise": lambda: with_noise(shown, asked, eps=4.0),
            "attack": lambda: attacked(shown, asked, model=model, config=PGDConfig(8.0, 1, 0.5), batch_size=2),
            "words": lambda: written_over(shown, asked, written=True),
            "corruption": lambda: corrupted(shown, asked, kind="gaussian_noise", severity=1),
        }[change]()

    whole = changed(images(9))
    torch.testing.assert_close(changed(some(images(9), 3, 6)), whole[3:6], rtol=0, atol=0)
    if change != "words":  # one of two answers, in a box that covers all of such a small picture
        assert not torch.equal(changed(images(9, seed=1)), whole)


def test_words_are_wrong_ones_and_box_and_words_cover_the_same(monkeypatch):

    def overlay(image, words, rng, *, written: bool):
        record.append((words, written, rng.integers(1000)))
        return image

    record = list[tuple[str, bool, int]]()
    monkeypatch.setattr("diptych.evaluation.changes.overlay", overlay)
    right = torch.eye(4, dtype=torch.bool).repeat(10, 1)
    asked = Question(("a_b", "c", "d", "e"), torch.zeros(4, 2), right, lambda seen: {})
    for on in (False, True):
        written_over(images(), asked, written=on)
    boxes, words = record[:40], record[40:]
    assert [(w, place) for w, _, place in boxes] == [(w, place) for w, _, place in words]
    assert {on for _, on, _ in boxes} == {False} and {on for _, on, _ in words} == {True}
    names = ("a b", "c", "d", "e")
    assert all(said != names[row % 4] for row, (said, _, _) in enumerate(words))
    assert {said for said, _, _ in words} == set(names)


def test_corruptions_differ_between_images_and_severities():
    shown = Images(images(1).pixels.repeat(2, 1, 1, 1), ("a", "b"), 0)
    weak, strong = (
        corrupted(shown, question(torch.ones(2, dtype=torch.bool)), kind="gaussian_noise", severity=s) for s in (1, 5)
    )
    assert not torch.equal(weak[0], weak[1])
    assert distance(strong, shown.pixels) > distance(weak, shown.pixels) > 0
