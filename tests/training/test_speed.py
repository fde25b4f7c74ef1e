import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diptych.models.by_length import encode_by_length
from diptych.training.levers import SpeedConfig
from diptych.training.speed import choices, counting, matmul_peak


def test_products_are_counted_forward_and_backward():
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    with counting() as found:
        (a @ b).sum().backward()
    assert found.count == 3 * 2 * 3 * 5 * 7  # the product, and one for each side's gradient


def test_counting_can_be_off():
    with counting(on=False) as found:
        torch.randn(3, 5) @ torch.randn(5, 7)
    assert found.count == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_is_one_that_a_processor_can_have(precision):
    peak = matmul_peak(torch.device("cpu"), precision)
    assert 0.1 < peak < 1e6
    assert matmul_peak(torch.device("cpu"), precision) == peak


def test_fused_attention_counts_like_the_products_it_stands_for():
    counts = []
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        q, k, v = (torch.randn(2, 3, size, 4, requires_grad=True) for size in (5, 7, 7))
        with counting() as found, sdpa_kernel(kernel):
            nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
        counts.append(found.count)
    product = 2 * (2 * 3) * 5 * 7 * 4
    # Two products forward and four backward; the fused kernel also computes q k again on its way back.
    assert counts == [7 * product, 6 * product]


def test_texts_by_length_count_for_what_they_computed(make_model):
    tower = make_model().text
    ids, mask = torch.ones(6, 12, dtype=torch.int64), torch.arange(12) < torch.tensor([[3]] * 5 + [[12]])
    counts = []
    for encode in (tower, lambda *texts: encode_by_length(tower, *texts, group_cost=0)):
        with torch.no_grad(), counting() as found:
            encode(ids, mask)
        counts.append(found.count)
    linear, attention = (
        2 * (4 * 16 * 16 + 2 * 16 * 32),
        2 * 2 * 16,
    )  # per token; per pair of positions: q k and the mean of v
    assert counts == [sum(linear * t + attention * t * t for t in lengths) for lengths in ([12] * 6, [3, 12])]


def test_every_choice_is_said(make_model):
    model = make_model()
    lines = list(choices(model, "bf16", SpeedConfig(texts_by_length=False), 123.4))
    assert lines[0].startswith(f"Threads: {torch.get_num_threads()}; a large matrix product reaches 123 GFLOP/s")
    assert lines[1:] == [
        *(
            f"Attention of the {tower} tower: two matrix products up to 256 positions, which is faster in bf16 on a CPU."
            for tower in ("image", "text")
        ),
        "Compile: off, unless speed.compile asks for it.",
        "Texts of a batch are padded to the longest, since speed.texts_by_length is off.",
    ]
    model.vision = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    lines = list(choices(model, "fp32", SpeedConfig(compile=True), 1.0))
    assert lines[1:] == [
        "Memory format: channels_last, since the image tower is one of convolutions.",
        "Attention of the text tower: fused.",
    ]
