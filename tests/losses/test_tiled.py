"""The tiled losses are the plain ones: values and gradients, whatever the size, the block, the positives, the scale."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diptych.losses import contrastive, tiled
from diptych.losses.contrastive import info_nce, shared_positives, sigmoid_loss
from diptych.losses.positives import Positives
from diptych.losses.tiled import tiled_info_nce, tiled_sigmoid_loss

SCALE, BIAS = 14.3, -9.0


def embeddings(n: int, d: int = 16, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2))
    return image.to(dtype), text.to(dtype)


def some_positives(n: int, kinds: int, seed: int = 1) -> Positives | None:
    generator = torch.Generator().manual_seed(seed)
    group, key = (torch.randint(kinds, (n,), generator=generator) for _ in range(2))
    return shared_positives(group, key)


def run(loss, image: Tensor, text: Tensor, *numbers: float, positives=None) -> list[Tensor]:
    """Return the loss and its gradients with respect to everything."""
    inputs = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    inputs += [torch.tensor(number, dtype=image.dtype, requires_grad=True) for number in numbers]
    value = loss(*inputs, positives)
    (3 * value).backward()
    return [value.detach(), *(x.grad for x in inputs)]


def dense_info_nce(image, text, scale, positives):
    return info_nce(image, text, scale, positives=None if positives is None else positives.matrix())


def dense_sigmoid(image, text, scale, bias, positives):
    matrix = torch.eye(len(image), dtype=torch.bool) if positives is None else positives.matrix()
    return sigmoid_loss(image, text, scale, bias, positives=matrix)


CASES = [(tiled_info_nce, dense_info_nce, (SCALE,)), (tiled_sigmoid_loss, dense_sigmoid, (SCALE, BIAS))]


@pytest.fixture(autouse=True)
def dense_stays_dense(monkeypatch):
    monkeypatch.setattr(contrastive, "TILED_FROM", {"cpu": 10**9})


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize(("ours", "naive", "numbers"), CASES)
@pytest.mark.parametrize(("n", "block"), [(1, 4), (7, 4), (8, 4), (33, 8), (50, 64)])
@pytest.mark.parametrize("kinds", [None, 1, 3, 40])
def test_values_and_gradients_in_fp64(ours, naive, numbers, n, block, kinds, monkeypatch):
    monkeypatch.setattr(tiled, "BLOCK", block)
    positives = None if kinds is None else some_positives(n, kinds)
    image, text = embeddings(n)
    expected = run(naive, image, text, *numbers, positives=positives)
    assert_equal(run(ours, image, text, *numbers, positives=positives), expected, 1e-10)


def opposite(n: int) -> tuple[Tensor, Tensor]:
    image, _ = embeddings(n)
    return image, -image


def all_alike(n: int) -> tuple[Tensor, Tensor]:
    image, text = embeddings(n)
    return image[:1].repeat(n, 1), text[:1].repeat(n, 1)


def one_far_off(n: int) -> tuple[Tensor, Tensor]:
    image, _ = embeddings(n)
    text = image.clone()
    text[0] = -image.mean(0) / image.mean(0).norm()
    return image, text


@pytest.mark.parametrize(("ours", "naive", "numbers"), CASES)
@pytest.mark.parametrize("made", [embeddings, opposite, all_alike, one_far_off])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_fp32_is_within_1e_5_of_fp64_even_when_it_is_hard(ours, naive, numbers, made, scale, monkeypatch):
    monkeypatch.setattr(tiled, "BLOCK", 128)
    image, text = made(600)
    numbers = (scale, *numbers[1:])
    expected = run(naive, image, text, *numbers)
    found = run(ours, image.float(), text.float(), *numbers)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and one.isfinite().all()
        norm = max(other.norm().item(), scale if made is all_alike else 0.0)  # theirs is 0: terms of that size cancel
        assert (one.double() - other).norm().item() <= 1e-5 * norm


def test_long_vectors_overflow_nowhere():
    image, text = (300 * x for x in embeddings(40))
    for ours, naive, numbers in CASES:
        expected = run(naive, image, text, *numbers)
        found = run(ours, image.float(), text.float(), *numbers)
        assert all(x.isfinite().all() for x in found)
        torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=0)


def test_the_jacobian(monkeypatch):
    monkeypatch.setattr(tiled, "BLOCK", 3)
    image, text = embeddings(5, 4)
    inputs = [x.requires_grad_() for x in (image, text, torch.tensor(2.0).double(), torch.tensor(-1.0).double())]
    positives = some_positives(5, 3)
    assert torch.autograd.gradcheck(lambda i, t, s: tiled_info_nce(i, t, s, positives), inputs[:3])
    assert torch.autograd.gradcheck(lambda i, t, s, b: tiled_sigmoid_loss(i, t, s, b, positives), inputs)


@pytest.mark.parametrize("positives", [None, some_positives(100, 30)])
def test_large_batches_take_it_and_objectives_do_not_notice(positives, monkeypatch):
    image, text = embeddings(100, dtype=torch.float32)
    expected = (info_nce(image, text, SCALE, positives=positives), sigmoid_loss(image, text, SCALE, BIAS))
    monkeypatch.setattr(contrastive, "TILED_FROM", {"cpu": 100})
    seen = []
    monkeypatch.setattr(contrastive, "tiled_info_nce", lambda *a: seen.append("info_nce") or tiled_info_nce(*a))
    monkeypatch.setattr(contrastive, "tiled_sigmoid_loss", lambda *a: seen.append("sigmoid") or tiled_sigmoid_loss(*a))
    with torch.autocast("cpu", torch.bfloat16):
        found = (info_nce(image, text, SCALE, positives=positives), sigmoid_loss(image, text, SCALE, BIAS))
    assert seen == ["info_nce", "sigmoid"]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


MEMORY = """
import resource, torch
from torch.nn.functional import normalize
from diptych.losses.tiled import tiled_info_nce, tiled_sigmoid_loss
torch.manual_seed(0)
image, text = (normalize(torch.randn(6000, 64), dim=-1).requires_grad_() for _ in range(2))
(image[:64] @ text[:64].T).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tiled_info_nce(image, text, torch.tensor(14.3), None).backward()
tiled_sigmoid_loss(image, text, torch.tensor(14.3), torch.tensor(-9.0), None).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_a_few_blocks_where_the_matrix_would_be_many():
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert (
        int(result.stdout) / 1024 < 70
    )  # megabytes; one 6000 x 6000 matrix in fp32 has 144, and the plain loss holds six


def test_positives_count_each_pair_once():
    positives = some_positives(60, 8)
    assert torch.equal(positives.counts, positives.matrix().sum(1))
    row, column = positives.cells(slice(0, 60), slice(0, 60))
    assert torch.equal(torch.stack([row, column], 1), positives.matrix().nonzero())


def test_distinct_samples_need_no_positives():
    assert shared_positives(torch.arange(5), torch.arange(5)) is None
