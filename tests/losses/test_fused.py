"""When the kernels are chosen, that they compile for GPUs, and `fused_cases.py`, which compares their numbers."""

import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from diptych.errors import MissingExtraError
from diptych.losses import contrastive
from diptych.losses.contrastive import FUSED_FROM, TILED_FROM, choose_form, info_nce, sigmoid_loss

CASES = Path(__file__).with_name("fused_cases.py")
NO_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="needs the extra triton")
INTERPRETED, COMPILED = {"TRITON_INTERPRET": "1"}, {"TRITON_INTERPRET": "0"}


@NO_TRITON
@pytest.mark.parametrize(
    ("environment", "marks"),
    [
        pytest.param(INTERPRETED, "not slow", id="interpreter"),
        pytest.param(INTERPRETED, "slow", id="interpreter, more", marks=pytest.mark.slow),
        pytest.param(
            COMPILED,
            "slow or not slow",
            id="gpu",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ),
    ],
)
def test_the_kernels_give_the_numbers_of_the_plain_form(environment, marks):
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, str(CASES)]
    done = subprocess.run(
        command, cwd=CASES.parents[2], env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


@NO_TRITON
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus(capability, tmp_path, monkeypatch):
    """To machine code, with the blocks that are the default: in 48 kB of shared memory, which every GPU has, without TF32 or atomics."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as to_machine_code

    fused = importlib.import_module("diptych.losses.fused")
    sizes = {name: getattr(fused, name) for name in ("ROWS", "COLUMNS", "DEPTH", "WIDTH")}
    types = {"n": "i32", "d": "i32", "group": "*i64", "key": "*i64", **dict.fromkeys(sizes, "constexpr")}
    for kernel in (fused._power_sums, fused._info_nce_gradient, fused._softplus_sums, fused._sigmoid_gradient):
        signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
        blocks = {name: size for name, size in sizes.items() if name in signature}
        made = to_machine_code(
            ASTSource(kernel, signature, constexprs=blocks),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 8, "num_stages": 1},
        )
        assert made.asm["cubin"]
        assert made.metadata.shared <= 48 * 1024
        assert "fma.rn.f32" in made.asm["ptx"]
        assert not re.search(r"tf32|\b(atom|red)\.", made.asm["ptx"])


def test_off_by_default():
    assert FUSED_FROM is None
    assert choose_form(10**6, torch.device("cuda"), torch.float32)[0] == "tiled"


@pytest.mark.parametrize(
    ("n", "device", "dtype", "form", "why"),
    [
        (1000, "cuda", torch.float32, "fused", "FUSED_FROM = 1000"),
        (999, "cuda", torch.float32, "plain", "TILED_FROM = 8192"),
        (8192, "cuda", torch.float64, "tiled", "TILED_FROM = 8192"),
        (1000, "cpu", torch.float32, "tiled", "TILED_FROM = 512"),
        (511, "cpu", torch.float32, "plain", "TILED_FROM = 512"),
        (10**6, "mps", torch.float32, "plain", "on mps"),
    ],
)
def test_what_is_chosen_and_why(n, device, dtype, form, why, monkeypatch):
    monkeypatch.setattr(contrastive, "FUSED_FROM", 1000)
    found, reason = choose_form(n, torch.device(device), dtype)
    assert found == form
    assert why in reason


def test_on_a_cpu_the_setting_changes_nothing(monkeypatch):
    monkeypatch.setattr(contrastive, "FUSED_FROM", 1)
    monkeypatch.setitem(TILED_FROM, "cpu", 4)
    monkeypatch.setattr(contrastive, "_fused", lambda: pytest.fail("the kernels were asked for"))
    image = torch.eye(4)
    info_nce(image, image, 1.0)
    sigmoid_loss(image, image, 1.0, 0.0)


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid_loss"])
def test_without_triton_the_command_that_installs_it(loss, monkeypatch):
    monkeypatch.setattr(contrastive, "choose_form", lambda n, device, dtype: ("fused", "for the test"))
    monkeypatch.setitem(sys.modules, "triton", None)
    numbers = (1.0,) if loss == "info_nce" else (1.0, 0.0)
    with pytest.raises(MissingExtraError, match=r"pip install 'diptych\[triton\]'"):
        getattr(contrastive, loss)(torch.eye(3), torch.eye(3), *numbers)
