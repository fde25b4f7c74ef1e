import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from diptych.errors import TrainingError
from diptych.losses import contrastive, tiled
from diptych.losses.contrastive import TILED_FROM, info_nce, sigmoid_loss
from diptych.losses.positives import Positives
from diptych.losses.tiled import tiled_info_nce, tiled_sigmoid_loss

LOSSES = ("info_nce", "sigmoid")


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def some_positives(n: int, seed: int = 0) -> Positives:
    """Return groups and texts that overlap without being nested."""
    generator = torch.Generator().manual_seed(seed)
    group, key = (torch.randint(0, max(1, int(0.7 * n)), (n,), generator=generator) for _ in range(2))
    return Positives(group * 1_000_003 - 7, key - 3)


def inputs(n: int, d: int, scale: float = 10.0, bias: float = -4.0) -> list[Tensor]:
    image = unit(n, d)
    return [
        image,
        normalize(image + unit(n, d, seed=1), dim=-1),
        torch.tensor(scale, dtype=torch.float64),
        torch.tensor(bias, dtype=torch.float64),
    ]


def gradients(
    loss: str, values: list[Tensor], positives: Positives | None, *, form: str, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Return the loss and its gradients, computed in the form and type asked for, as fp64."""
    leaves = [value.to(dtype, copy=True).requires_grad_() for value in values[: 3 if loss == "info_nce" else 4]]
    if form == "tiled":
        value = (tiled_info_nce if loss == "info_nce" else tiled_sigmoid_loss)(*leaves, positives)
    else:
        matrix = None if positives is None else positives.matrix()
        value = (info_nce if loss == "info_nce" else sigmoid_loss)(*leaves, positives=matrix)
    value.backward()
    assert value.dtype == dtype and all(leaf.grad.dtype == dtype for leaf in leaves)
    return [value.detach().double(), *(leaf.grad.double() for leaf in leaves)]


@pytest.fixture(autouse=True)
def plain_is_plain(monkeypatch):
    """Let the public functions take the plain form, whatever the size: what is compared must be the other one."""
    monkeypatch.setitem(TILED_FROM, "cpu", 10**9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("multiple", [False, True], ids=["diagonal", "multiple"])
@pytest.mark.parametrize("block", [1, 4, 7, 1024])
@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 1), (13, 5), (21, 8), (28, 16)])
def test_equals_the_plain_form_for_any_size_of_block(loss, multiple, block, n, d, monkeypatch):
    monkeypatch.setattr(tiled, "BLOCK", block)
    positives = some_positives(n) if multiple else None
    expected = gradients(loss, inputs(n, d), positives, form="plain")
    found = gradients(loss, inputs(n, d), positives, form="tiled")
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [3.0, 600.0], ids=["one shift", "maxima"])
@pytest.mark.parametrize("positives", [None, Positives(torch.tensor([1, 1, 2, 3, 4]), torch.tensor([1, 2, 2, 3, 4]))])
def test_gradients_are_the_derivatives(loss, scale, positives, monkeypatch):
    monkeypatch.setattr(tiled, "BLOCK", 2)
    values = [unit(5, 3), unit(5, 3, seed=1), torch.tensor(scale).double(), torch.tensor(-2.0).double()]
    values = [value.requires_grad_() for value in values[: 3 if loss == "info_nce" else 4]]
    function = tiled_info_nce if loss == "info_nce" else tiled_sigmoid_loss
    assert torch.autograd.gradcheck(lambda *x: function(*x, positives), values)


def hard(case: str, n: int = 300, d: int = 512) -> tuple[list[Tensor], Positives | None]:
    """Return an input that is hard for a form with a fixed shift, fp32, or many positives."""
    image, text, scale, bias = inputs(n, d, scale=100.0, bias=-10.0)
    alone = torch.arange(n)
    if case == "opposite":
        return [image, -image, scale, bias], None
    if case == "all opposite":
        image, text = (normalize(side + 0.05 * unit(n, d, seed=2), dim=-1) for side in (image[:1], -image[:1]))
        return [image, text, scale, bias], None
    if case == "random":
        return [image, unit(n, d, seed=2), scale, bias], None
    if case == "duplicates":
        image[n // 2 :] = image[: n - n // 2]
        return [image, unit(n, d, seed=2), scale, bias], None
    if case == "duplicates are positives":
        half = alone % (n // 2)
        return [image[half], normalize(image[half] + 2 * unit(n, d, seed=2), dim=-1), scale, bias], Positives(
            half, alone
        )
    if case == "a row with all positives":  # sample 0 shares its group with the first half, its text with the second
        first = alone < n // 2
        return (
            [image, text, scale, bias],
            Positives(torch.where(first, 0, alone), torch.where(first & (alone > 0), alone, n)),
        )
    if case == "one group":
        return [image, text, scale, bias], Positives(torch.zeros(n, dtype=torch.int64), alone)
    assert case == "not normalised"
    length = torch.linspace(0.1, 6, n, dtype=torch.float64)[:, None]
    return [image * length, unit(n, d, seed=2) * length.flip(0), scale / 4, bias], None


HARD = (
    "opposite",
    "all opposite",
    "random",
    "duplicates",
    "duplicates are positives",
    "a row with all positives",
    "one group",
    "not normalised",
)


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("product", ["default", "torch.mm"])
def test_fp32_is_within_a_hundred_thousandth_of_fp64_on_hard_inputs(loss, case, product, monkeypatch):
    monkeypatch.setattr(tiled, "BLOCK", 128)
    if product == "torch.mm":
        monkeypatch.setattr(tiled, "_onednn_is_faster", lambda x: False)
    values, positives = hard(case)
    values = [value.float() for value in values]
    expected = gradients(loss, values, positives, form="plain")
    found = gradients(loss, values, positives, form="tiled", dtype=torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("n", [512, 2048])
def test_fp32_is_within_a_hundred_thousandth_of_fp64_where_it_is_the_default(loss, case, n):
    """Fewer samples than 512 take the plain form on a CPU."""
    values, positives = hard(case, n)
    values = [value.float() for value in values]
    expected = gradients(loss, values, positives, form="plain")
    found = gradients(loss, values, positives, form="tiled", dtype=torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


@pytest.mark.parametrize(
    ("case", "needed"),
    [("all opposite", True), ("not normalised", True), ("opposite", False), ("random", False), ("one group", False)],
)
def test_maxima_are_kept_only_when_a_sum_may_be_lost(case, needed):
    values, positives = hard(case)
    with patch.object(tiled, "_power_sums_with_maxima", wraps=tiled._power_sums_with_maxima) as called:
        gradients("info_nce", values, positives, form="tiled", dtype=torch.float32)
    assert called.called == needed


def test_logits_beyond_the_range_of_fp32():
    """Rows at -1000 beside rows at 1000: no power of either is a number, all probabilities are."""
    values = [torch.tensor([[1.0], [-1.0], [0.5]]), torch.tensor([[1.0], [0.9], [0.2]]), torch.tensor(1000.0)]
    expected = gradients("info_nce", values, None, form="plain")
    torch.testing.assert_close(gradients("info_nce", values, None, form="tiled", dtype=torch.float32), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_nan_stays_nan(loss):
    values = inputs(4, 3)
    values[0][1, 1] = torch.nan
    assert gradients(loss, values, None, form="tiled")[0].isnan()


def test_softplus_sum_of_any_size_and_range():
    for n in (1, 2, 31, 33, 1000):
        x = torch.linspace(-95, 95, n)
        expected = torch.nn.functional.softplus(x.double(), threshold=1000).sum()
        torch.testing.assert_close(tiled._softplus_sum(x.clone()), expected, rtol=1e-6, atol=1e-12)
    far = torch.full((40, 25), -30.0)
    torch.testing.assert_close(tiled._softplus_sum(far).item(), 1000 * 9.357622968839299e-14, rtol=3e-6, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_changes_nothing(loss):
    values = [value.float() for value in inputs(40, 16)]
    expected = gradients(loss, values, None, form="tiled", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(loss, values, None, form="tiled", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_around_the_public_functions_changes_nothing(loss, monkeypatch):
    monkeypatch.setitem(TILED_FROM, "cpu", 0)
    image, text = unit(20, 8).bfloat16().requires_grad_(), unit(20, 8, seed=1).bfloat16().requires_grad_()
    rest = (torch.tensor(7.0),) if loss == "info_nce" else (torch.tensor(7.0), torch.tensor(-5.0))

    def run() -> tuple[Tensor, ...]:
        value = (info_nce if loss == "info_nce" else sigmoid_loss)(image, text, *rest)
        return value.detach(), *torch.autograd.grad(value, (image, text))

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    assert found[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_used_twice(loss, monkeypatch):
    """One pair of embeddings in two losses, the same tensor on both sides, and two backward passes through one graph."""
    monkeypatch.setattr(tiled, "BLOCK", 4)
    image, text, scale, bias = inputs(9, 4)
    rest = (scale,) if loss == "info_nce" else (scale, bias)
    function, plain = (tiled_info_nce, info_nce) if loss == "info_nce" else (tiled_sigmoid_loss, sigmoid_loss)
    found = []
    for one in (lambda *x: function(*x, None), plain):
        x, y = image.clone().requires_grad_(), text.clone().requires_grad_()
        total = one(x, y, *rest) + 3 * one(x, x, *rest)
        (once,) = torch.autograd.grad(total, x, retain_graph=True)
        total.backward()
        assert torch.equal(x.grad, once)
        found.append([total.detach(), x.grad, y.grad])
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_one_gradient_alone(loss, wanted):
    values = inputs(9, 4)[: 3 if loss == "info_nce" else 4]
    if wanted == len(values):
        pytest.skip("InfoNCE has no bias")
    expected = gradients(loss, values, None, form="plain")[1 + wanted]
    values[wanted].requires_grad_()
    (tiled_info_nce if loss == "info_nce" else tiled_sigmoid_loss)(*values, None).backward()
    torch.testing.assert_close(values[wanted].grad, expected, rtol=1e-11, atol=1e-13)
    assert all(value.grad is None for value in values if value is not values[wanted])


@pytest.mark.parametrize("loss", LOSSES)
def test_without_gradient_none_is_computed(loss):
    values = [value.requires_grad_() for value in inputs(9, 4)[: 3 if loss == "info_nce" else 4]]
    function = tiled_info_nce if loss == "info_nce" else tiled_sigmoid_loss
    expected = function(*values, None)
    assert expected.requires_grad
    with torch.no_grad(), patch.object(tiled.Gradients, "add") as add:
        found = function(*values, None)
    assert torch.equal(found, expected.detach()) and not found.requires_grad and not add.called


@pytest.mark.parametrize("function", [tiled_info_nce, tiled_sigmoid_loss])
def test_a_second_derivative_is_refused(function):
    values = [value.requires_grad_() for value in inputs(5, 3)[: 3 if function is tiled_info_nce else 4]]
    with pytest.raises(TrainingError, match="second derivatives"):
        torch.autograd.grad(function(*values, None), values[0], create_graph=True)


def test_rows_of_a_view_need_not_be_contiguous():
    values = inputs(9, 4)
    expected = gradients("info_nce", values, None, form="tiled")
    wide = torch.cat([values[0], values[0]], 1)[:, :4].requires_grad_()
    assert not wide.is_contiguous()
    tiled_info_nce(wide, values[1], values[2], None).backward()
    torch.testing.assert_close(wide.grad, expected[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_the_public_functions_choose_by_size(loss, monkeypatch):
    monkeypatch.setitem(TILED_FROM, "cpu", 12)
    public = info_nce if loss == "info_nce" else sigmoid_loss
    name = "tiled_info_nce" if loss == "info_nce" else "tiled_sigmoid_loss"
    rest = (7.0,) if loss == "info_nce" else (7.0, -3.0)
    for n, positives, taken in (
        (11, None, False),
        (12, None, True),
        (12, some_positives(12), True),
        (12, some_positives(12).matrix(), False),
    ):
        with patch.object(contrastive, name, wraps=getattr(contrastive, name)) as called:
            found = public(unit(n, 4).float(), unit(n, 4, seed=1).float(), *rest, positives=positives)
        assert called.called == taken
        matrix = positives.matrix() if isinstance(positives, Positives) else positives
        with patch.dict(TILED_FROM, clear=True):
            expected = public(unit(n, 4), unit(n, 4, seed=1), *rest, positives=matrix)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "option", [{"ignored": ~torch.eye(8, dtype=torch.bool)}, {"label_smoothing": 0.1}, {"candidate_gradient": False}]
)
def test_options_take_the_plain_form(option, monkeypatch):
    monkeypatch.setitem(TILED_FROM, "cpu", 0)
    with patch.object(contrastive, "tiled_info_nce") as called:
        info_nce(unit(8, 4), unit(8, 4, seed=1), 7.0, **option)
    assert not called.called


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_embeddings_and_a_learnt_scale(loss, monkeypatch):
    """As under bf16 autocast: the loss is fp32, and each gradient has the type of its leaf."""
    monkeypatch.setitem(TILED_FROM, "cpu", 0)
    image, text = unit(20, 8).bfloat16().requires_grad_(), unit(20, 8, seed=1).bfloat16()
    log_scale = torch.tensor(2.0, requires_grad=True)
    rest = () if loss == "info_nce" else (-5.0,)
    value = (info_nce if loss == "info_nce" else sigmoid_loss)(image, text, log_scale.exp(), *rest)
    value.backward()
    assert (value.dtype, image.grad.dtype, log_scale.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert log_scale.grad != 0


CHILD = """
import sys
import torch
from pathlib import Path
from diptych.losses.contrastive import TILED_FROM, info_nce, sigmoid_loss
from diptych.losses.positives import Positives

def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024

def run(n, d=64):
    image, text = torch.randn(2, n, d).div(d**0.5).unbind()
    group = torch.arange(n) // 2
    before = resident("VmRSS")
    rest = (torch.tensor(10.0), torch.tensor(-5.0))[: 1 if sys.argv[1] == "info_nce" else 2]
    loss = info_nce if sys.argv[1] == "info_nce" else sigmoid_loss
    loss(image.requires_grad_(), text.requires_grad_(), *rest, positives=Positives(group, torch.arange(n))).backward()
    return resident("VmHWM") - before

if len(sys.argv) > 2:
    run(512, 512)
    print(run(8192, 512))
else:
    for start in (0, 10**9):
        TILED_FROM["cpu"] = start
        run(512)
        print(run(4096))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("loss", LOSSES)
def test_memory(loss):
    """4096 x 4096 cells are 64 MB; the plain form holds several such matrices, the other one no more than a few blocks."""
    command = [sys.executable, "-c", CHILD, loss]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env={"OMP_NUM_THREADS": "1"})
    block_by_block, plain = map(float, found.stdout.split())
    assert block_by_block < 40
    assert plain > 250


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("loss", LOSSES)
def test_memory_of_a_large_batch(loss):
    """8192 x 8192 cells are 256 MB. Both gradients, 32 MB, are counted; the inputs are not."""
    command = [sys.executable, "-c", CHILD, loss, "large"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env={"OMP_NUM_THREADS": "1"})
    assert float(found.stdout) < 100


# What each of two processes does: encode its rows, gather, and take the loss of all block by block.
GATHERED = """
import sys
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from diptych.losses import tiled
from diptych.losses.contrastive import TILED_FROM, info_nce, sigmoid_loss
from diptych.losses.positives import Positives
from diptych.training import distributed

class Towers(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.image, self.text, self.scale, self.bias = (torch.nn.Parameter(weights[name]) for name in
                                                        ("image_weight", "text_weight", "scale", "bias"))

folder, loss, form = sys.argv[1:]
TILED_FROM["cpu"], tiled.BLOCK = (0 if form == "tiled" else 10**9), 4
given = load_file(f"{folder}/given.safetensors")
with distributed.processes(torch.device("cpu")):
    rank, world = distributed.part()
    own = slice(0, None) if world == 1 else (slice(0, 8), slice(8, None))[rank]
    towers = Towers(given)
    pairs = [normalize(given[side][own] @ getattr(towers, side), dim=-1) for side in ("image", "text")]
    positives = distributed.gather(Positives(given["group"][own], given["text_key"][own]))
    rest = (towers.scale,) if loss == "info_nce" else (towers.scale, towers.bias)
    value = (info_nce if loss == "info_nce" else sigmoid_loss)(*map(distributed.gather, pairs), *rest, positives=positives)
    value.backward()
    distributed.average_gradients(towers)
    found = {name: p.grad for name, p in towers.named_parameters() if p.grad is not None} | {"loss": value.detach()}
    save_file(found, f"{folder}/{form}-{world}-{rank}.safetensors")
"""


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_have_the_gradients_of_one(loss, tmp_path):
    """Of all samples, gathered from parts of different sizes; one process with the plain form is the reference."""
    n, d = 13, 6
    made = some_positives(n)
    values = {
        "image": unit(n, d),
        "text": unit(n, d, seed=1),
        "image_weight": unit(d, 5, seed=2),
        "text_weight": unit(d, 5, seed=3),
        "scale": torch.tensor(9.0).double(),
        "bias": torch.tensor(-3.0).double(),
        "group": made.group,
        "text_key": made.text_key,
    }
    save_file(values, tmp_path / "given.safetensors")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", GATHERED, str(tmp_path), loss, form],
            env=shared | {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for form, world, rank in (("plain", 1, 0), ("tiled", 2, 0), ("tiled", 2, 1))
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], "\n".join(errors)
    expected = load_file(tmp_path / "plain-1-0.safetensors")
    assert set(expected) == {"image", "text", "scale", "loss", *(["bias"] if loss == "sigmoid" else [])}
    for rank in range(2):
        found = load_file(tmp_path / f"tiled-2-{rank}.safetensors")
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("loss", LOSSES)
def test_on_a_gpu(loss):
    values, positives = [x.cuda() for x in inputs(3000, 64, scale=50.0)], some_positives(3000)
    positives = Positives(positives.group.cuda(), positives.text_key.cuda())
    expected = gradients(loss, values, positives, form="plain")
    torch.testing.assert_close(
        gradients(loss, values, positives, form="tiled", dtype=torch.float32), expected, rtol=1e-4, atol=1e-7
    )
