import numpy as np
import pytest
import torch

from diptych.claims import domains
from diptych.claims.claim import Trial
from diptych.claims.domains import DOMAINS, Fence, accuracies, learnt, owned, weighted
from diptych.evaluation.protection import ownership, protection
from diptych.models.seen import Labelled, Seen
from diptych.models.statistics import LayerStatistics

COUNT = 8


class Judge:
    """Right on images whose only number is at most `up_to`."""

    def __init__(self, up_to: float, own: Labelled, others: Labelled) -> None:
        self.up_to, self.own, self.others = up_to, own, others

    def exam(self, source):
        raise NotImplementedError

    def correct(self, data: Labelled) -> np.ndarray:
        return (data.seen.embedding[:, 0] <= self.up_to).double().numpy()


@pytest.fixture(autouse=True)
def numbered(monkeypatch):
    """Let the images of the n-th domain be n + 0, n + 1/8, ...; of the test split 100 less, with a mark 0.5 more."""

    def numbers(name: str, split: str, change=iter) -> Labelled:
        images = (
            DOMAINS.index(name) + torch.arange(COUNT) / COUNT + 0.5 * (change is not iter) - 100 * (split == "test")
        )
        return Labelled(Seen(images[:, None], LayerStatistics((), ())), torch.zeros(COUNT, dtype=torch.int64))

    monkeypatch.setattr(domains, "domain", numbers)
    yield
    accuracies.cache_clear()
    learnt.cache_clear()


def up_to(limit: float) -> Fence:
    return Fence(lambda own, others, seed: (Judge(limit, own, others), 10 + seed))


def trial(split="validation"):
    noted, images = {}, []
    return Trial(3, split, {}, pytest.fail, pytest.fail, images.append, noted.__setitem__), noted, images


def test_accuracies_are_those_of_every_domain_and_of_marked_photos():
    found, count = accuracies("photo", up_to(1.5), 0, "validation")
    assert found == {"photo": 1.0, "art_painting": 5 / 8, "cartoon": 0.0, "sketch": 0.0, "marked": 1.0} and count == 10
    assert set(accuracies("sketch", up_to(1.5), 0, "validation")[0]) == set(DOMAINS)
    assert set(accuracies("sketch", up_to(1.5), 0, "test")[0].values()) == {1.0}


def test_a_domain_is_weighed_against_each_other_one():
    asked, noted, images = trial()
    found = weighted(asked, authorised=("photo",), plain=up_to(9.0), fence=up_to(1.5))
    assert found == pytest.approx(np.mean([protection(1, 1, 1, share).weighted for share in (5 / 8, 0, 0)]))
    assert noted["photo: A_a"] == 1 and noted["photo: D_u art_painting"] == 3 / 8
    assert images == [13]  # of the fence alone
    each = [weighted(asked, authorised=(name,), plain=up_to(9.0), fence=up_to(1.5)) for name in DOMAINS]
    assert weighted(asked, authorised=DOMAINS, plain=up_to(9.0), fence=up_to(1.5)) == pytest.approx(np.mean(each))


def test_ownership_is_that_of_photos():
    asked, noted, images = trial()
    found = owned(asked, plain=up_to(1.1), fence=up_to(0.5))
    assert found == pytest.approx(ownership(5 / 8, 5 / 8, 1 / 8))
    assert noted == {"A_u, unprotected": 5 / 8, "A_a": 5 / 8, "A_u": 1 / 8} and images == [13]


def numbers_of(data: Labelled) -> list[float]:
    return data.seen.embedding[:, 0].tolist()


def test_what_a_fence_learns_from():
    judge, _ = learnt("cartoon", up_to(0.0), 0)
    assert 2 <= min(numbers_of(judge.own)) <= max(numbers_of(judge.own)) < 3
    assert len(judge.others) == 3 * COUNT and not any(2 <= number < 3 for number in numbers_of(judge.others))
    changed = Fence(up_to(0.0).learn, change=reversed)
    assert numbers_of(learnt("cartoon", changed, 0)[0].others) == [n + 0.5 for n in numbers_of(judge.own)]


def test_mixed_domains_are_all_there_once():
    judge, _ = learnt("cartoon", Fence(up_to(0.0).learn, shuffled=True), 0)
    assert len(judge.own) == COUNT and len({int(number) for number in numbers_of(judge.own)}) > 1
    assert sorted(numbers_of(judge.own) + numbers_of(judge.others)) == (torch.arange(4 * COUNT) / COUNT).tolist()


def test_what_is_spoilt_was_learnt_before():
    calls = []

    def learn(own, others, seed):
        calls.append(seed)
        return Judge(9.0, own, others), 1

    def spoil(judge):
        return Judge(-1.0, judge.own, judge.others)

    assert accuracies("photo", Fence(learn), 0, "validation")[0]["photo"] == 1
    assert accuracies("photo", Fence(learn, spoil=spoil), 0, "validation")[0]["photo"] == 0
    assert calls == [0]
