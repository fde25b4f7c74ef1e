from itertools import permutations
from math import comb

import pytest
import torch
from torch.nn.functional import normalize

from diptych.errors import EvaluationError
from diptych.evaluation.ranking import TIE, chance_recall, check_finite, ranks


def pairs(*rows: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_rank_counts_the_wrong_candidates_before_the_best_right_one():
    query = torch.tensor([[1.0, 0.0]])
    candidates = normalize(torch.tensor([[1.0, 0.0], [4.0, 1.0], [2.0, 1.0], [1.0, 1.0], [0.0, 1.0]]), dim=-1)
    found, right = ranks(query, candidates, torch.tensor([0]), torch.arange(5), pairs((0, 2), (0, 4)))
    assert found.tolist() == [2]
    assert right.tolist() == [2]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_do_not_matter(chunk):
    generator = torch.Generator().manual_seed(0)
    queries, candidates = (normalize(torch.randn(n, 8, generator=generator), dim=-1) for n in (30, 40))
    query_id, candidate_id = torch.arange(30) % 6, torch.arange(40) % 5
    right = pairs(*((i, (i * 2) % 5) for i in range(6)), (3, 0))
    found, number = ranks(queries, candidates, query_id, candidate_id, right, chunk=chunk)
    for i in range(30):
        own = [j for j in range(40) if [i % 6, j % 5] in right.tolist()]
        scores = queries[i] @ candidates.T
        before = [j for j in range(40) if j not in own and scores[j] > max(scores[own])]
        assert (found[i], number[i]) == (len(before), len(own))


@pytest.mark.parametrize(("gap", "rank"), [(0.1 * TIE, 1), (10 * TIE, 0)])
def test_a_tie_goes_against_the_model_and_a_clear_lead_does_not(gap, rank):
    candidates = torch.tensor([[0.5 + gap, 0.0], [0.5, 0.0]])
    found, _ = ranks(torch.tensor([[1.0, 0.0]]), candidates, torch.tensor([0]), torch.arange(2), pairs((0, 0)))
    assert found.tolist() == [rank]


@pytest.mark.parametrize("dim", [3, 64, 511])
def test_rounding_does_not_break_the_ties_of_a_constant_model(dim):
    same = normalize(torch.randn(dim, generator=torch.Generator().manual_seed(dim)), dim=0).expand(77, dim)
    everyone = torch.arange(77)
    assert ranks(same, same, everyone, everyone, torch.stack([everyone, everyone], 1))[0].tolist() == [76] * 77


def test_chance_is_the_mean_over_all_orders():
    right = [1, 3, 5]
    for k in (1, 2, 3, 9):
        orders = list(permutations(range(5)))
        hits = [sum(any(place < r for place in order[:k]) for order in orders) / len(orders) for r in right]
        assert chance_recall(torch.tensor(right), 5, k) == pytest.approx(sum(hits) / 3)


def test_chance_equals_its_closed_form():
    assert chance_recall(torch.tensor([1]), 1000, 10) == pytest.approx(0.01)
    assert chance_recall(torch.tensor([5]), 5000, 10) == pytest.approx(1 - comb(4995, 10) / comb(5000, 10))


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(EvaluationError, match="not finite"):
        check_finite(torch.zeros(2), torch.tensor([1.0, float("inf")]))
