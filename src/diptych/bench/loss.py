"""Contrastive losses block by block against the plain form that holds the n x n matrix, and against the tiling of Inf-CL, forward and backward."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest.mock import patch

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diptych.bench.process import Anchors, fresh
from diptych.bench.record import Bar, Column, Finding, Table
from diptych.bench.resident import resident
from diptych.bench.turns import Contender, Turn, ratio, take_turns, timed
from diptych.errors import DiptychError
from diptych.losses.contrastive import TILED_FROM, info_nce, shared_positives, sigmoid_loss

TOLERANCE = 1e-5
"""By how much values and gradients may differ, relative to the norm of the plain form's."""

INF_CL_TILE = 1024
"""Rows and columns of a tile of the anchor, as of ours."""

Form = Literal["plain", "tiled", "Inf-CL"]
Step = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Setting:
    """Sizes.

    Attributes:
        sizes: Pairs per loss.
        dims: Numbers per embedding.
        plain: The largest size that the plain form is tried at; above it a loss is computed once, in a process of its own.
        anchor: The largest size that Inf-CL is tried at.
        duplicates: The size that is measured with repeated samples too.
        turns: Per form, fewer at the largest sizes.
    """

    sizes: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 65536)
    dims: tuple[int, ...] = (128, 512)
    plain: int = 8192
    anchor: int = 8192
    duplicates: int = 4096
    turns: int = 7


QUICK = Setting(sizes=(256, 600), dims=(32,), plain=256, anchor=256, duplicates=256, turns=2)


def measure(setting: Setting, anchors: Anchors) -> Finding:
    """Return time and memory of each loss, size and width."""
    del anchors  # Inf-CL's own package needs CUDA; its mathematics is below
    cases = [
        (name, n, d)
        for d in setting.dims
        for n in setting.sizes
        for name in (
            "InfoNCE",
            "sigmoid",
            *(("InfoNCE, duplicates", "sigmoid, duplicates") if n == setting.duplicates else ()),
        )
    ]
    rows = tuple(row(name, n, d, setting) for name, n, d in cases)
    columns = (
        Column("loss", "loss"),
        Column("n", "n", ",d"),
        Column("d", "d", "d"),
        Column("tiled_over_plain", "time, tiled / plain"),
        Column("anchor_over_tiled", "Inf-CL / tiled"),
        Column("tiled_over_products", "tiled / 3 products"),
        Column("plain_over_products", "plain / 3 products"),
        Column("tiled_s", "s, tiled", ".3f"),
        Column("tiled_mb", "MB, tiled", ",.0f"),
        Column("plain_mb", "MB, plain", ",.0f"),
        Column("difference", "difference", ".0e"),
    )
    return Finding(
        "Value and gradients of a contrastive loss of n pairs with d numbers each, in fp32: block by block (`tiled`), with the n x n matrix "
        "(`plain`), and as Inf-CL tiles it. The three products are those of n x d and d x n that the plain form cannot do without, by torch.mm.",
        setting,
        (Table("Medians over turns", columns, rows),),
        bars(rows),
        (
            "Memory is the peak of a process of its own beyond its size with the inputs in memory; the gradients of the inputs are in it.",
            "The difference is the largest over value and gradients, relative to the plain form's norm, and is checked before anything is timed.",
            f"Above n = {setting.plain:,} a loss is computed once, after a small one, in the process that measures its memory.",
            f"Inf-CL (Cheng et al. 2024, arXiv 2410.17243, section 3) is our own writing of its equations in eager PyTorch, "
            f"tiles of {INF_CL_TILE}, once per direction; its package has a CUDA kernel only.",
        ),
    )


def row(name: str, n: int, d: int, setting: Setting) -> dict[str, Any]:
    """Return one row of the table."""
    found: dict[str, Any] = {"loss": name, "n": n, "d": d}
    if n > setting.plain:
        found["tiled_s"], found["tiled_mb"] = fresh(time_and_memory, name, n, d, "tiled")
        return found
    forms: list[Form] = ["plain", "tiled"]
    if name == "InfoNCE" and n <= setting.anchor:
        forms.append("Inf-CL")
    steps = {form: make_step(name, n, d, form) for form in forms}
    found["difference"] = max(largest_difference(steps["plain"], steps[form]) for form in forms)
    turns = max(2, setting.turns if n < 8192 else setting.turns // 2)
    seconds = take_turns([*(timed(form, steps[form]) for form in forms), products(n, d)], turns)
    found["tiled_over_plain"] = ratio(seconds["tiled"], seconds["plain"])
    if "Inf-CL" in seconds:
        found["anchor_over_tiled"] = ratio(seconds["Inf-CL"], seconds["tiled"])
    for form in ("plain", "tiled"):
        found[f"{form}_over_products"] = ratio(seconds[form], seconds["products"]).value
        found[f"{form}_s"] = statistics.median(seconds[form])
        found[f"{form}_mb"] = fresh(time_and_memory, name, n, d, form)[1]
    return found


def bars(rows: tuple[dict[str, Any], ...]) -> tuple[Bar, ...]:
    """Return what was to be shown at n = 8,192 and 65,536 with d = 512."""
    by_case = {(r["loss"], r["n"], r["d"]): r for r in rows}
    found = []
    for name in ("InfoNCE", "sigmoid"):
        at, large = by_case.get((name, 8192, 512), {}), by_case.get((name, 65536, 512), {})
        over = at.get("tiled_over_plain")
        found += [
            Bar(f"{name}, n = 8,192, d = 512: tiled / plain, time", 1.15, False, over and over.value),
            Bar(f"{name}, n = 8,192, d = 512: extra MB, tiled", 100, False, at.get("tiled_mb")),
            Bar(f"{name}, n = 65,536, d = 512: extra MB, tiled", 1500, False, large.get("tiled_mb")),
        ]
    return tuple(found)


def make_step(name: str, n: int, d: int, form: Form) -> Step:
    """Return a function that gives a loss of n pairs and its gradients; of every ten samples with duplicates, two are one group."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(n, d, generator=generator), dim=-1)
    text = F.normalize(image + 4 * F.normalize(torch.randn(n, d, generator=generator), dim=-1), dim=-1)
    scale, bias = torch.tensor(30.0), torch.tensor(-10.0)
    inputs = [image, text, scale, bias][: 3 if "InfoNCE" in name else 4]
    for value in inputs:
        value.requires_grad_()
    group, key = torch.arange(n), torch.arange(n)
    if "duplicates" in name:
        group = torch.where(group % 10 == 9, group - 1, group)

    def step() -> list[Tensor]:
        if form == "Inf-CL":
            value = inf_cl(image, text, scale)
        else:
            with forced(form):
                loss = info_nce if "InfoNCE" in name else sigmoid_loss
                value = loss(*inputs, positives=shared_positives(group, key))
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    return step


@contextmanager
def forced(form: Form) -> Iterator[None]:
    """Compute losses in one form whatever their size while the context is open."""
    with patch.dict(TILED_FROM, clear=True) if form == "plain" else patch.dict(TILED_FROM, cpu=0):
        yield


def largest_difference(plain: Step, other: Step) -> float:
    """Return the largest relative difference between two forms, over the loss and each gradient as a whole.

    Raises:
        DiptychError: If it is more than rounding.
    """
    difference = max(float((a - b).norm() / a.norm()) for a, b in zip(plain(), other(), strict=True))
    if difference > TOLERANCE:
        raise DiptychError(
            f"Two forms of a loss differ by {difference:.1e}, more than {TOLERANCE:.0e}: one of them is wrong."
        )
    return difference


def products(n: int, d: int) -> Contender:
    """Return a contender that takes the time of three n x n x d products, from one of at most 2048 x 2048 x d."""
    side = min(n, 2048)
    a, b, out = torch.randn(side, d), torch.randn(d, side), torch.empty(side, side)
    one = timed("products", lambda: torch.mm(a, b, out=out))

    def step() -> Turn:
        turn = one.step()
        return replace(turn, seconds=3 * turn.seconds * (n / side) ** 2)

    return Contender("products", step)


def time_and_memory(name: str, n: int, d: int, form: Form) -> tuple[float, float]:
    """Return seconds of one step and the megabytes it takes beyond its inputs; only right in a fresh process."""
    make_step(name, 1024, d, form)()
    step = make_step(name, n, d, form)
    before = resident("VmRSS")
    began = time.perf_counter()
    step()
    return time.perf_counter() - began, resident("VmHWM") - before


def inf_cl(image: Float[Tensor, "n d"], text: Float[Tensor, "n d"], scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return CLIP's loss with the log-sum-exp of each row collected tile by tile, once for images and once for texts."""
    diagonal = scale * (image * text).sum(1)
    rows: Tensor = _TiledRows.apply(image, text, scale)
    columns: Tensor = _TiledRows.apply(text, image, scale)
    return ((rows + columns) / 2 - diagonal).mean()


class _TiledRows(torch.autograd.Function):
    """Log-sum-exp of each row of scale * queries @ candidates^T.

    Forward: l <- l + log(1 + exp(l_tile - l)), tile after tile. Backward: every tile again, its softmax exp(x - l).
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, candidates: Tensor, scale: Tensor) -> Tensor:
        collected = []
        for rows in queries.split(INF_CL_TILE):
            found = rows.new_full((len(rows),), -torch.inf)
            for columns in candidates.split(INF_CL_TILE):
                found = torch.logaddexp(found, (scale * rows @ columns.T).logsumexp(1))
            collected.append(found)
        result = torch.cat(collected)
        ctx.save_for_backward(queries, candidates, scale, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        queries, candidates, scale, found = ctx.saved_tensors
        to_queries, to_candidates, to_scale = (
            torch.zeros_like(queries),
            torch.zeros_like(candidates),
            torch.zeros_like(scale),
        )
        for i in range(0, len(queries), INF_CL_TILE):
            rows = slice(i, i + INF_CL_TILE)
            for j in range(0, len(candidates), INF_CL_TILE):
                columns = slice(j, j + INF_CL_TILE)
                cosines = queries[rows] @ candidates[columns].T
                share = (scale * cosines - found[rows, None]).exp_().mul_(gradient[rows, None])
                to_scale += (share * cosines).sum()
                to_queries[rows] += scale * share @ candidates[columns]
                to_candidates[columns] += scale * share.T @ queries[rows]
        return to_queries, to_candidates, to_scale
