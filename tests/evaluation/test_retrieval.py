import pytest
import torch
from torch.nn.functional import normalize

from diptych.errors import EvaluationError
from diptych.evaluation.ranking import TIE
from diptych.evaluation.retrieval import KS, Direction, retrieval


def random_embeddings(n: int, dim: int = 6, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def values(direction: Direction) -> dict[int, float]:
    return {k: interval.value for k, interval in direction.recall.items()}


def test_equals_a_naive_double_loop():
    images, texts = random_embeddings(25), random_embeddings(75, seed=1)
    owner = torch.arange(75) % 25
    found = retrieval(images, texts, owner)
    scores = images @ texts.T
    for k in KS:
        forward = [any(owner[j] == i for j in scores[i].argsort(descending=True)[:k]) for i in range(25)]
        backward = [owner[j] in scores[:, j].argsort(descending=True)[:k] for j in range(75)]
        assert found.image_to_text.hits(k).tolist() == forward
        assert found.text_to_image.hits(k).tolist() == backward
        assert values(found.image_to_text)[k] == pytest.approx(sum(forward) / 25)
        assert values(found.text_to_image)[k] == pytest.approx(sum(backward) / 75)


def test_orthonormal_embeddings_find_everything():
    found = retrieval(torch.eye(12), torch.eye(12).repeat_interleave(2, 0), torch.arange(12).repeat_interleave(2))
    for direction in (found.image_to_text, found.text_to_image):
        assert all((i.value, i.low, i.high) == (1, 0.025 ** (1 / 12), 1) for i in direction.recall.values())


def test_constant_embeddings_find_nothing():
    same = random_embeddings(1, dim=50)
    found = retrieval(same.expand(20, -1), same.expand(60, -1), torch.arange(60) // 3)
    for direction in (found.image_to_text, found.text_to_image):
        assert all((i.value, i.low, i.high) == (0, 0, 1 - 0.025 ** (1 / 20)) for i in direction.recall.values())
    assert set(found.image_to_text.ranks) == {57} and set(found.text_to_image.ranks) == {19}


def test_hand_computed_two_by_two():
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    texts = torch.tensor([[0.8, 0.6], [0.0, 1.0]])  # cosines [[0.8, 0], [0.96, 0.8]]
    found = retrieval(images, texts, torch.tensor([0, 1]))
    assert found.image_to_text.ranks.tolist() == [0, 1]
    assert found.text_to_image.ranks.tolist() == [1, 0]


def test_one_caption_of_several_is_enough():
    images = torch.eye(4)
    texts = torch.stack([images[0], images[1], images[1], images[0], images[2], images[3]])
    owner = torch.tensor([0, 0, 1, 1, 2, 3])  # one caption of images 0 and 1 each describes the other
    found = retrieval(images, texts, owner)
    assert found.image_to_text.ranks.tolist() == [1, 1, 0, 0]  # the stray caption ties, and goes first
    assert found.text_to_image.ranks.tolist() == [0, 3, 0, 3, 0, 0]


def test_captions_that_are_the_same_are_right_for_every_image_that_has_them():
    images = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    texts = images[[0, 0, 2]]  # images 0 and 1 have the same caption
    owner = torch.arange(3)
    apart, shared = (retrieval(images, texts, owner, text_group=g) for g in (None, torch.tensor([8, 8, 9])))
    assert apart.image_to_text.ranks.tolist() == [1, 1, 0]
    assert shared.image_to_text.ranks.tolist() == [0, 0, 0]
    assert apart.text_to_image.ranks.tolist() == [0, 1, 0]
    assert shared.text_to_image.ranks.tolist() == [0, 0, 0]


def test_sharing_one_caption_does_not_share_the_others():
    images = torch.eye(3)
    owner = torch.tensor([0, 0, 1, 1, 2])
    text_group = torch.tensor([0, 1, 0, 2, 3])
    texts = images[[2, 1, 2, 0, 2]]  # image 0's own caption lies on image 1, and the other way round
    found = retrieval(images, texts, owner, text_group=text_group)
    assert found.text_to_image.ranks.tolist()[1] == 2  # image 1 scores 1 and is wrong, image 2 ties at 0
    assert found.image_to_text.ranks.tolist()[:2] == [2, 2]


def test_images_of_one_group_share_their_captions_and_are_drawn_together():
    images, texts = torch.eye(3), torch.eye(3)[[1, 0, 2]]
    found = retrieval(images, texts, torch.arange(3), image_group=torch.tensor([5, 5, 2]))
    assert values(found.image_to_text)[1] == values(found.text_to_image)[1] == 1.0
    assert found.image_to_text.cluster.tolist() == found.text_to_image.cluster.tolist() == [1, 1, 0]


def test_captions_of_one_image_are_drawn_together():
    found = retrieval(torch.eye(3), torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 2]))
    assert found.text_to_image.cluster.tolist() == [0, 0, 1, 2]


def test_random_embeddings_score_chance():
    images, texts = random_embeddings(600, dim=40), random_embeddings(1800, dim=40, seed=1)
    found = retrieval(images, texts, torch.arange(1800) // 3)
    assert found.image_to_text.chance[10] == pytest.approx(1 - 0.98346, abs=1e-4)  # about 10 * 3 / 1800
    assert found.text_to_image.chance[10] == pytest.approx(10 / 600)
    for direction in (found.image_to_text, found.text_to_image):
        interval = direction.recall[10]
        assert interval.low <= direction.chance[10] <= interval.high


def test_with_fewer_candidates_than_k_recall_is_trivially_one():
    found = retrieval(random_embeddings(4), random_embeddings(4, seed=2), torch.arange(4))
    assert values(found.image_to_text)[5] == 1.0 and found.image_to_text.chance[5] == 1.0
    assert found.image_to_text.candidates == 4


def test_near_equal_captions_of_other_images_count_as_ties():
    images = torch.eye(2)
    texts = torch.stack([images[0], images[0] + torch.tensor([-0.2 * TIE, 0.0])])
    assert retrieval(images, texts, torch.arange(2)).image_to_text.ranks.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("images", "texts", "owner", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0, 2), [], "there are 0 and 0"),
        (torch.eye(2), torch.zeros(0, 2), [], "there are 2 and 0"),
        (torch.full((2, 2), torch.nan), torch.eye(2), [0, 1], "not finite"),
        (torch.eye(2), torch.eye(2), [0, 0], "2 owners name 1 images"),
        (torch.eye(2), torch.eye(2), [0, 2], "owner among the 2 images"),
        (torch.eye(2), torch.eye(2), [0, 1, 1], "2 texts needs an owner"),
    ],
)
def test_undefined_input_is_refused(images, texts, owner, message):
    # The lengths of the last case are outside the annotated shapes, which only tests check.
    function = getattr(retrieval, "__wrapped__", retrieval)
    with pytest.raises(EvaluationError, match=message):
        function(images, texts, torch.tensor(owner, dtype=torch.int64))
