import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from by_hand import embeddings, pairs
from diptych.losses.contrastive import info_nce, info_nce_of_views, shared_positives, sigmoid_loss


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def test_info_nce_of_two_orthonormal_pairs_by_hand():
    eye = torch.eye(2, dtype=torch.float64)
    # Each row is softmax((s, 0)): loss = log(1 + exp(-s)).
    assert info_nce(eye, eye, 3.0).item() == pytest.approx(math.log1p(math.exp(-3)), abs=1e-12)


def test_info_nce_is_log_n_when_all_embeddings_are_equal():
    same = unit(1, 8).expand(6, 8)
    assert info_nce(same, same, 50.0).item() == pytest.approx(math.log(6))


def test_info_nce_of_one_pair_is_zero():
    assert info_nce(unit(1, 4), unit(1, 4, seed=1), 10.0).item() == 0


def test_multi_positive_equals_a_double_loop():
    image, text, scale = unit(5, 7), unit(5, 7, seed=1), 4.0
    positives = torch.eye(5, dtype=torch.bool)
    positives[0, 3] = positives[3, 0] = positives[1, 2] = True  # not symmetric: row 1 has two, row 2 has one
    logits = (scale * image @ text.T).numpy()

    def one_way(s: np.ndarray, p: np.ndarray) -> float:
        rows = []
        for i in range(5):
            log_z = math.log(sum(math.exp(s[i, j]) for j in range(5)))
            hits = [j for j in range(5) if p[i, j]]
            rows.append(-sum(s[i, j] - log_z for j in hits) / len(hits))
        return sum(rows) / 5

    p = positives.numpy()
    expected = (one_way(logits, p) + one_way(logits.T, p.T)) / 2
    assert info_nce(image, text, scale, positives=positives).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("multi", [False, True])
def test_ignored_cells_take_no_part(multi):
    image, text, scale = unit(5, 7), unit(5, 7, seed=1), 4.0
    ignored = torch.zeros(5, 5, dtype=torch.bool)
    ignored[0, 3] = ignored[2, 0] = ignored[2, 4] = True  # not symmetric
    logits = (scale * image @ text.T).numpy()

    def one_way(s: np.ndarray, left_out: np.ndarray) -> float:
        return -sum(
            s[i, i] - math.log(sum(math.exp(s[i, j]) for j in range(5) if not left_out[i, j])) for i in range(5)
        )

    expected = (one_way(logits, ignored.numpy()) + one_way(logits.T, ignored.T.numpy())) / 10
    image.requires_grad_()
    positives = torch.eye(5, dtype=torch.bool) if multi else None
    found = info_nce(image, text, scale, positives=positives, ignored=ignored)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    found.backward()
    assert image.grad.isfinite().all()


def test_diagonal_positives_are_the_plain_loss():
    image, text = unit(6, 5), unit(6, 5, seed=1)
    plain = info_nce(image, text, 9.0)
    assert info_nce(image, text, 9.0, positives=torch.eye(6, dtype=torch.bool)).item() == pytest.approx(plain.item())


def test_smoothing_spreads_a_share_of_the_target_over_all_candidates():
    image, text = unit(6, 5), unit(6, 5, seed=1)
    positives = torch.eye(6, dtype=torch.bool)
    positives[0, 3] = positives[3, 0] = True
    for given in (None, positives):
        share = torch.eye(6).double() if given is None else given / given.sum(1, keepdim=True).double()
        target = 0.8 * share + 0.2 / 6  # symmetric, so the same both ways
        ways = [-(target * (9 * a @ b.T).log_softmax(1)).sum(1).mean() for a, b in ((image, text), (text, image))]
        found = info_nce(image, text, 9.0, positives=given, label_smoothing=0.2)
        assert found.item() == pytest.approx((ways[0] + ways[1]).item() / 2, abs=1e-12)
    same = unit(1, 8).expand(6, 8)
    assert info_nce(same, same, 50.0, label_smoothing=0.2).item() == pytest.approx(math.log(6))


def test_candidates_without_gradient_leave_the_value_and_half_of_the_gradient():
    image, text = unit(6, 5).requires_grad_(), unit(6, 5, seed=1).requires_grad_()
    asked = info_nce(image, text, 9.0, candidate_gradient=False)
    assert asked.item() == pytest.approx(info_nce(image, text, 9.0).item(), abs=1e-12)
    asked.backward()
    for query, candidate in ((image, text), (text, image)):
        leaf = query.detach().requires_grad_()
        logits = 9 * leaf @ candidate.detach().T
        (cross_entropy(logits, torch.arange(6)) / 2).backward()
        torch.testing.assert_close(query.grad, leaf.grad, rtol=1e-12, atol=1e-14)


def test_sigmoid_loss_equals_a_double_loop():
    image, text, scale, bias = unit(4, 3), unit(4, 3, seed=1), 10.0, -4.0
    total = 0.0
    for i in range(4):
        for j in range(4):
            z = 1 if i == j else -1
            total += math.log1p(math.exp(-z * (scale * float(image[i] @ text[j]) + bias)))
    assert sigmoid_loss(image, text, scale, bias).item() == pytest.approx(total / 4, abs=1e-12)


def test_sigmoid_loss_is_n_log_2_at_zero_logits():
    assert sigmoid_loss(unit(5, 3), unit(5, 3), 0.0, 0.0).item() == pytest.approx(5 * math.log(2))


@pytest.mark.parametrize("loss", [lambda i, t, s, b: info_nce(i, t, s), sigmoid_loss])
def test_gradients_in_float64(loss):
    inputs = [
        unit(3, 4),
        unit(3, 4, seed=1),
        torch.tensor(5.0, dtype=torch.float64),
        torch.tensor(-2.0, dtype=torch.float64),
    ]
    assert torch.autograd.gradcheck(lambda *x: loss(*x), [x.clone().requires_grad_() for x in inputs])


def test_losses_are_computed_in_fp32_under_autocast():
    image, text = unit(64, 32).float(), unit(64, 32, seed=1).float()
    expected = info_nce(image, text, 100.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert info_nce(image, text, 100.0).item() == expected.item()


def test_shared_positives():
    group, key = torch.tensor([1, 2, 3, 1]), torch.tensor([7, 8, 8, 9])
    expected = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
    assert torch.equal(shared_positives(group, key).matrix(), expected)
    assert shared_positives(torch.arange(4), torch.arange(4)) is None


@pytest.mark.data
@pytest.mark.parametrize("case", ["loss_f64", "loss_f32"])
def test_official_value_and_gradients(golden, case):
    """LaCLIP's released loss is plain CLIP on un-normalised embeddings."""
    record = {key: torch.from_numpy(value) for key, value in golden("laclip", case).items()}
    image, text = record["image_embed"].requires_grad_(), record["text_embed"].requires_grad_()
    scale = record["logit_scale"].requires_grad_()
    loss = info_nce(normalize(image, dim=-1), normalize(text, dim=-1), scale)
    loss.backward()
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if case == "loss_f64" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(loss.detach(), record["loss"], **tolerance)
    torch.testing.assert_close(image.grad, record["grad_image_embed"], **tolerance)
    torch.testing.assert_close(text.grad, record["grad_text_embed"], **tolerance)
    torch.testing.assert_close(scale.grad, record["grad_logit_scale"], **tolerance)


def test_reference_is_torch_cross_entropy():
    image, text = unit(8, 4), unit(8, 4, seed=1)
    logits = 20 * image @ text.T
    target = torch.arange(8)
    expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    assert info_nce(image, text, 20.0).item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("multi_positive", [True, False])
def test_each_text_column_has_its_own_positives_and_the_mean_is_returned(multi_positive):
    encoded, batch = embeddings(4), pairs([0, 1, 2, 0], [5, 6, 6, 7], [1, 2, 3, 4])
    image, one, two = encoded.images[0], encoded.texts[0], embeddings(5).texts[0][:4]
    shared = [torch.eye(4, dtype=torch.bool) for _ in range(2)]
    if multi_positive:
        for positives in shared:
            positives[0, 3] = positives[3, 0] = True
        shared[0][1, 2] = shared[0][2, 1] = True
    first, second = (info_nce(image, text, 7.0, positives=p) for text, p in zip((one, two), shared, strict=True))
    found = info_nce_of_views((image,), (one, two), batch, 7.0, multi_positive=multi_positive)
    torch.testing.assert_close(found, (first + second) / 2)
    alone = info_nce_of_views((image,), (one,), batch, 7.0, multi_positive=multi_positive)
    torch.testing.assert_close(alone, first)  # columns that are not given do not count
