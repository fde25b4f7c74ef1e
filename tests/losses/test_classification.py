import json
import math

import pytest
import torch
from torch.nn.functional import normalize

from diptych.losses.classification import class_cross_entropy


@pytest.mark.parametrize("case", ["ce_ls02", "ce_ls0"])
def test_official_numbers(golden, case):
    numbers = golden("zscl", case)
    logits = torch.from_numpy(numbers["logits"]).requires_grad_()
    classes = torch.eye(logits.shape[1], dtype=torch.float64)  # so that scale * image @ classes^T is the logits
    smoothing = json.loads(str(numbers["settings"]))["label_smoothing"]
    found = class_cross_entropy(logits, classes, torch.from_numpy(numbers["labels"]), 1.0, label_smoothing=smoothing)
    found.backward()
    torch.testing.assert_close(found.item(), float(numbers["loss"]), rtol=1e-8, atol=0)
    torch.testing.assert_close(logits.grad, torch.from_numpy(numbers["grad_logits"]), rtol=1e-8, atol=1e-12)


def test_equals_a_naive_loop_and_teaches_both_sides():
    generator = torch.Generator().manual_seed(0)
    image = normalize(torch.randn(5, 6, generator=generator, dtype=torch.float64), dim=-1).requires_grad_()
    classes = normalize(torch.randn(3, 6, generator=generator, dtype=torch.float64), dim=-1).requires_grad_()
    label = torch.tensor([0, 2, 2, 1, 0])
    found = class_cross_entropy(image, classes, label, 10.0)
    naive = -sum((10 * classes @ x).log_softmax(0)[y] for x, y in zip(image, label, strict=True)) / 5
    torch.testing.assert_close(found, naive)
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(found, (image, classes)))


def test_log_k_at_chance():
    image = normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    found = class_cross_entropy(image, image[:3], torch.tensor([0, 1, 2, 0]), 0.0, label_smoothing=0.2)
    assert found.item() == pytest.approx(math.log(3))
