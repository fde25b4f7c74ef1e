import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diptych.losses.contrastive import info_nce
from diptych.losses.supervised import pair_margin, supervised_contrastive


def numbers(data, slug, case):
    with np.load(data.parent / "golden" / f"{slug}.npz") as archive:
        return {k.removeprefix(f"{case}/"): torch.from_numpy(archive[k]) for k in archive if k.startswith(f"{case}/")}


@pytest.mark.data
@pytest.mark.parametrize("case", ["supcon_pairs", "supcon_singletons"])
def test_official_supervised_contrastive(data, case):
    golden = numbers(data, "clippings", case)
    z = golden["embeddings"].requires_grad_()
    loss = supervised_contrastive(z, golden["labels"], 1 / golden["temperature"].item())
    loss.backward()
    torch.testing.assert_close(loss, golden["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z.grad, golden["grad"], rtol=1e-4, atol=1e-5)


@pytest.mark.data
def test_official_margin(data):
    golden = numbers(data, "clippings", "margin")
    z = golden["embeddings"].requires_grad_()
    positive, negative = golden["margins"].tolist()
    loss = pair_margin(z, golden["labels"], positive=positive, negative=negative)
    loss.backward()
    torch.testing.assert_close(loss, golden["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z.grad, golden["grad"], rtol=1e-4, atol=1e-5)


@pytest.mark.data
def test_the_official_slip_is_clip_and_this_loss_of_two_views(data):
    golden = numbers(data, "brain_encoding", "slip")
    image, text = (F.normalize(golden[f"{name}_embed"], dim=-1) for name in ("image", "text"))
    views = torch.cat([golden["aug1_embed"], golden["aug2_embed"]])
    label = torch.arange(5).repeat(2)
    torch.testing.assert_close(supervised_contrastive(views, label, 10.0), golden["ssl_loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(info_nce(image, text, golden["logit_scale"]), golden["clip_loss"], rtol=1e-5, atol=1e-5)
    assert golden["loss"].item() == pytest.approx((golden["clip_loss"] + golden["ssl_loss"]).item(), abs=1e-5)


def test_naive_double_loop():
    z = F.normalize(torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    label = torch.tensor([0, 0, 1, 2, 1, 0, 3])
    terms = []
    for i in range(7):
        others = [a for a in range(7) if a != i]
        norm = math.log(sum(math.exp(4 * float(z[i] @ z[a])) for a in others))
        positives = [a for a in others if label[a] == label[i]]
        if positives:
            terms.append(-sum(4 * float(z[i] @ z[p]) - norm for p in positives) / len(positives))
    assert len(terms) == 5
    assert supervised_contrastive(z, label, 4.0).item() == pytest.approx(sum(terms) / 5, rel=1e-12)


def test_equal_vectors_of_one_label_give_log_n_minus_1():
    assert supervised_contrastive(torch.ones(6, 3), torch.zeros(6, dtype=torch.int64), 10.0).item() == pytest.approx(
        math.log(5)
    )


@pytest.mark.parametrize("n", [1, 4])
def test_labels_that_occur_once_give_0_and_no_gradient(n):
    z = torch.randn(n, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = supervised_contrastive(z, torch.arange(n), 10.0)
    loss.backward()
    assert loss == 0 and torch.equal(z.grad, torch.zeros_like(z))


def test_the_margin_is_computed_by_hand():
    z = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]).requires_grad_()  # the first two are one point of the circle
    label = torch.tensor([0, 0, 1])
    assert pair_margin(z, label, negative=1.0) == 0  # their distance is 0, that of the others sqrt 2
    assert pair_margin(z, label, negative=1.5).item() == pytest.approx(1.5 - 2**0.5, abs=1e-6)
    other = pair_margin(z, torch.tensor([0, 1, 1]), negative=0.5)
    assert other.item() == pytest.approx(2**0.5 + 0.5, abs=1e-6)  # distance of 1 and 2; 0 and 1 lie on each other
    other.backward()
    assert z.grad.isfinite().all()


def test_gradients():
    z = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    label = torch.tensor([0, 1, 0, 1, 2, 2])
    assert torch.autograd.gradcheck(lambda x: supervised_contrastive(x, label, 3.0), z)
    assert torch.autograd.gradcheck(lambda x: pair_margin(x, label, negative=1.2), z)
