"""The kernels beside the plain form in fp64: on a GPU, or with TRITON_INTERPRET=1 in the interpreter, which `test_fused.py` runs in a process
of its own, because Triton decides when it is imported."""

import os

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from diptych.errors import TrainingError
from diptych.losses import contrastive, fused
from diptych.losses.contrastive import TILED_FROM, info_nce, sigmoid_loss
from diptych.losses.fused import fused_info_nce, fused_sigmoid_loss
from diptych.losses.positives import Positives

LOSSES = ("info_nce", "sigmoid")
FUSED = {"info_nce": fused_info_nce, "sigmoid": fused_sigmoid_loss}
PLAIN = {"info_nce": info_nce, "sigmoid": sigmoid_loss}
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small blocks, of as many rows as columns nowhere; the plain form for comparison whatever the size."""
    for name, size in {"ROWS": 32, "COLUMNS": 16, "DEPTH": 64, "WIDTH": 64}.items():
        monkeypatch.setattr(fused, name, size)
    monkeypatch.setitem(TILED_FROM, DEVICE, 10**9)


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def some_positives(n: int) -> Positives:
    """Return groups and texts that overlap without being nested; one key is 0, which is also what lies beyond the end."""
    generator = torch.Generator().manual_seed(0)
    group, key = (torch.randint(0, max(1, int(0.7 * n)), (n,), generator=generator) for _ in range(2))
    return Positives(group * 10**12, key - 3)


def inputs(loss: str, n: int, d: int, scale: float = 10.0, bias: float = -4.0) -> list[Tensor]:
    image = unit(n, d)
    numbers = [torch.tensor(value, dtype=torch.float64) for value in (scale, bias)]
    text = normalize(image + unit(n, d, seed=1), dim=-1)
    return [image, text, *numbers][: 3 if loss == "info_nce" else 4]


def on(device: str, positives: Positives | None) -> Positives | None:
    return None if positives is None else Positives(positives.group.to(device), positives.text_key.to(device))


def found(loss: str, values: list[Tensor], positives: Positives | None) -> list[Tensor]:
    """Return the loss and its gradients by the kernels."""
    leaves = [value.to(DEVICE, torch.float32, copy=True).requires_grad_() for value in values]
    value = FUSED[loss](*leaves, on(DEVICE, positives))
    value.backward()
    assert value.dtype == torch.float32
    return [x.double().cpu() for x in (value.detach(), *(leaf.grad for leaf in leaves))]


def expected(loss: str, values: list[Tensor], positives: Positives | None) -> list[Tensor]:
    """Return the same in fp64, from the whole matrix, for the inputs that fp32 holds."""
    leaves = [value.float().double().requires_grad_() for value in values]
    value = PLAIN[loss](*leaves, positives=None if positives is None else positives.matrix())
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("multiple", [False, True], ids=["diagonal", "multiple"])
@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 1), (32, 48), (33, 100)])
def test_equals_the_plain_form(loss, multiple, n, d):
    """Fewer samples than a block, whole blocks, one more than that; dimensions that are no power of two, and more than a width."""
    positives = some_positives(n) if multiple else None
    values = inputs(loss, n, d)
    torch.testing.assert_close(
        found(loss, values, positives), expected(loss, values, positives), rtol=1e-5, atol=3e-8 * n
    )


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_the_blocks_that_are_the_default(loss, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(TILED_FROM, DEVICE, 10**9)
    values, positives = inputs(loss, 65, 260), some_positives(65)
    for one, other in zip(found(loss, values, positives), expected(loss, values, positives), strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


def hard(case: str, loss: str, n: int, d: int) -> tuple[list[Tensor], Positives | None]:
    """Return an input with logits up to 100 that is hard for fp32.

    With fewer samples "all opposite" is too hard for any form: at n = 40, d = 48 the plain one in fp32 is off by 2e-5.
    """
    image, text, *numbers = inputs(loss, n, d, scale=100.0, bias=-10.0)
    half = torch.arange(n) % (n // 2)
    if case == "opposite":
        return [image, -image, *numbers], None
    if case == "all opposite":
        image, text = (normalize(side + 0.05 * unit(n, d, seed=2), dim=-1) for side in (image[:1], -image[:1]))
        return [image, text, *numbers], None
    if case == "duplicates":
        return [image[half], unit(n, d, seed=2), *numbers], None
    if case == "duplicates are positives":
        return [image[half], normalize(image[half] + 2 * unit(n, d, seed=2), dim=-1), *numbers], Positives(
            half, torch.arange(n)
        )
    assert case == "one group"
    return [image, text, *numbers], Positives(torch.zeros(n, dtype=torch.int64), torch.arange(n))


CASES = ("opposite", "all opposite", "duplicates", "duplicates are positives", "one group")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("d", [48, pytest.param(512, marks=pytest.mark.slow)])
def test_within_a_hundred_thousandth_of_fp64_on_hard_inputs(loss, case, d, monkeypatch):
    for name, size in {"ROWS": 128, "COLUMNS": 64, "WIDTH": 512}.items():
        monkeypatch.setattr(fused, name, size)
    values, positives = hard(case, loss, 150, d)
    for one, other in zip(found(loss, values, positives), expected(loss, values, positives), strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


def test_the_gradient_of_the_scale_when_all_products_are_nearly_equal():
    """There the cells' gradients, which add up to 0, are multiplied by numbers near -1, and what rounding leaves of their sum would show."""
    values, _ = hard("all opposite", "info_nce", 40, 48)
    one, other = (results("info_nce", values, None)[3] for results in (found, expected))
    assert one.item() == pytest.approx(other.item(), rel=1e-5)


def test_logits_beyond_the_range_of_fp32():
    """Rows at -1000 beside rows at 1000: no power of either is a number, all probabilities are."""
    values = [torch.tensor([[1.0], [-1.0], [0.5]]), torch.tensor([[1.0], [0.9], [0.2]]), torch.tensor(1000.0)]
    torch.testing.assert_close(found("info_nce", values, None), expected("info_nce", values, None))


@pytest.mark.parametrize("size", [0.0, 3.0, 16.0, 60.0])
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_sigmoid_of_any_size(size, right):
    """All logits right, or all wrong, by this much: also where e^-size is below the step of fp32 at 1."""
    eye = torch.eye(20, dtype=torch.float64)
    sign = 1.0 if right else -1.0
    values = [eye, eye, torch.tensor(2 * size * sign).double(), torch.tensor(-size * sign).double()]
    for one, other in zip(found("sigmoid", values, None), expected("sigmoid", values, None), strict=True):
        assert float((one - other).norm()) <= 3e-6 * float(other.norm())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("loss", LOSSES)
def test_nan_stays_nan(loss):
    values = inputs(loss, 4, 3)
    values[0][1, 1] = torch.nan
    assert found(loss, values, None)[0].isnan()


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_changes_nothing(loss):
    values = inputs(loss, 20, 16)
    before = found(loss, values, None)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert all(map(torch.equal, before, found(loss, values, None)))


@pytest.mark.parametrize("loss", LOSSES)
def test_used_twice(loss):
    """The same tensor on both sides, two losses of it, and two backward passes through one graph, which give equal bits."""
    results = []
    for dtype, function in ((torch.float32, FUSED[loss]), (torch.float64, PLAIN[loss])):
        image, text, *rest = (value.to(DEVICE, dtype) for value in inputs(loss, 20, 16))
        rest = [*rest, None] if function is FUSED[loss] else rest
        image.requires_grad_()
        total = function(image, text, *rest) + 3 * function(image, image, *rest)
        (once,) = torch.autograd.grad(total, image, retain_graph=True)
        total.backward()
        assert torch.equal(image.grad, once)
        results.append(once.double())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("loss", "wanted"), [(loss, i) for loss in LOSSES for i in range(len(inputs(loss, 1, 1)))])
def test_one_gradient_alone(loss, wanted):
    values = inputs(loss, 20, 16)
    leaves = [value.to(DEVICE, torch.float32) for value in values]
    leaves[wanted].requires_grad_()
    FUSED[loss](*leaves, None).backward()
    torch.testing.assert_close(
        leaves[wanted].grad.double().cpu(), expected(loss, values, None)[1 + wanted], rtol=1e-5, atol=1e-6
    )
    assert all(leaf.grad is None for leaf in leaves if leaf is not leaves[wanted])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_second_derivative_is_refused(loss):
    leaves = [value.to(DEVICE, torch.float32).requires_grad_() for value in inputs(loss, 5, 3)]
    with pytest.raises(TrainingError, match="second derivatives"):
        torch.autograd.grad(FUSED[loss](*leaves, None), leaves[0], create_graph=True)


def test_rows_need_not_be_contiguous():
    values = inputs("info_nce", 20, 16)
    image, text, scale = (value.to(DEVICE, torch.float32) for value in values)
    wide = torch.cat([image, image], 1)[:, :16].requires_grad_()
    assert not wide.is_contiguous()
    fused_info_nce(wide, text, scale, None).backward()
    torch.testing.assert_close(wide.grad.double().cpu(), expected("info_nce", values, None)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_public_functions_call_them(loss, monkeypatch):
    """As under bf16 autocast, with a learnt scale: the loss is fp32, and each gradient has the type of its leaf."""
    monkeypatch.setattr(contrastive, "choose_form", lambda n, device, dtype: ("fused", "for the test"))
    called = []
    monkeypatch.setattr(fused, "_launch", lambda *x, launch=fused._launch, **y: (called.append(x[0]), launch(*x, **y)))
    image, text = (x.to(DEVICE, torch.bfloat16).requires_grad_() for x in inputs(loss, 20, 8)[:2])
    log_scale = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    rest = () if loss == "info_nce" else (-5.0,)
    value = PLAIN[loss](image, text, log_scale.exp(), *rest, positives=on(DEVICE, some_positives(20)))
    value.backward()
    assert len(called) == (4 if loss == "info_nce" else 3)
    assert (value.dtype, image.grad.dtype, log_scale.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    values = [image.detach().double().cpu(), text.detach().double().cpu(), torch.tensor(2.0).exp().double()]
    values += [torch.tensor(x).double() for x in rest]
    monkeypatch.setattr(contrastive, "choose_form", lambda n, device, dtype: ("plain", "for the test"))
    reference = expected(loss, values, some_positives(20))
    torch.testing.assert_close(value.double().cpu(), reference[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(log_scale.grad.double().cpu(), reference[3] * log_scale.exp().item(), rtol=1e-5, atol=0)
