import pytest
import torch

from diptych.losses.consolidation import diagonal_fisher, weighted_distance


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_fisher_of_logits_that_are_weights():
    weight = torch.tensor([[0.3, -1.0, 0.8]], dtype=torch.float64, requires_grad=True)
    share = weight.detach().softmax(-1)
    rounds = [diagonal_fisher(lambda: weight, [weight], generator(seed))[0] for seed in range(4000)]
    # Each draw is (1 - p)^2 with probability p and p^2 otherwise: p (1 - p) in the mean, and at most 1 / 4 in standard deviation.
    torch.testing.assert_close(torch.stack(rounds).mean(0), share * (1 - share), rtol=0, atol=0.012)


def test_one_pass_for_a_batch_is_the_sum_over_its_samples():
    torch.manual_seed(0)
    images, head = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    share = (images @ head).detach().softmax(-1)
    exact = torch.einsum("nd,nk->dk", images.square(), share * (1 - share))
    rounds = [diagonal_fisher(lambda: images @ head, [head], generator(seed))[0] for seed in range(4000)]
    found = torch.stack(rounds)
    error = found.std(0) / len(rounds) ** 0.5
    assert ((found.mean(0) - exact).abs() < 5 * error + 1e-9).all()


def test_what_the_answers_do_not_depend_on_has_no_importance():
    used, unused = torch.zeros(1, 3, requires_grad=True), torch.ones(2, requires_grad=True)
    found = diagonal_fisher(lambda: used * 2, [used, unused], generator())
    assert (found[0] > 0).all() and torch.equal(found[1], torch.zeros(2))


def test_by_hand_and_as_a_squared_distance():
    weights, anchors = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])], [torch.tensor([0.0, 2.0]), torch.tensor([1.0])]
    assert weighted_distance(weights, anchors, [torch.tensor([4.0, 9.0]), torch.tensor([0.5])]) == (4 + 0.5 * 4) / 2
    twice = [torch.full_like(weight, 2.0) for weight in weights]
    assert weighted_distance(weights, anchors, twice) == 1 + 4


@pytest.mark.parametrize("weight", [0.0, 0.5, 10.0])
def test_the_least_loss_on_a_quadratic_is_where_the_formula_says(weight):
    steep, goal = (
        torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64),
        torch.tensor([1.0, -1.0, 3.0], dtype=torch.float64),
    )
    anchor, importance = (
        torch.tensor([0.0, 2.0, 3.0], dtype=torch.float64),
        torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64),
    )
    found = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [found], max_iter=100, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        total = (steep / 2 * (found - goal).square()).sum() + weight * weighted_distance(
            [found], [anchor], [importance]
        )
        total.backward()
        return total

    optimizer.step(loss)
    firm = weight * importance
    torch.testing.assert_close(found.detach(), (steep * goal + firm * anchor) / (steep + firm), rtol=1e-6, atol=1e-8)


def test_anchors_get_no_gradient():
    weight, anchor = (torch.ones(2, requires_grad=True) for _ in range(2))
    weighted_distance([weight], [anchor], [torch.ones(2)]).backward()
    assert anchor.grad is None and weight.grad is not None
