import torch

from diptych.models.bank import fill_bank


def embeddings(count: int) -> torch.Tensor:
    return torch.eye(count)


def sure(*pairs: tuple[int, float]) -> torch.Tensor:
    """Return probabilities over three classes: each row's class, and how sure it is."""
    rows = torch.stack([torch.full((3,), (1 - p) / 2).index_fill(0, torch.tensor([label]), p) for label, p in pairs])
    return rows


def test_the_surest_features_of_each_class_stay():
    probabilities = sure((0, 0.6), (0, 0.9), (1, 0.7), (0, 0.5), (0, 0.8))
    bank = fill_bank(embeddings(5), probabilities, size=2)
    assert bank.filled.tolist() == [2, 1, 0]
    assert {int(row.argmax()) for row in bank.features[0]} == {1, 4}
    torch.testing.assert_close(bank.confidence[0].sort().values, torch.tensor([0.8, 0.9]))


def test_prototypes_count_empty_slots():
    bank = fill_bank(embeddings(3), sure((1, 0.7), (1, 0.6), (2, 0.9)), size=5)
    expected = torch.tensor([[0.0, 0, 0], [0.2, 0.2, 0], [0, 0, 0.2]])
    torch.testing.assert_close(bank.prototypes, expected)


def test_where_classes_are_known_only_right_features_count():
    probabilities = sure((0, 0.9), (0, 0.7), (1, 0.8))
    bank = fill_bank(embeddings(3), probabilities, torch.tensor([2, 0, 1]), size=2)
    assert bank.filled.tolist() == [1, 1, 0] and int(bank.features[0, 0].argmax()) == 1


def test_an_equal_confidence_changes_nothing():
    bank = fill_bank(embeddings(3), sure((0, 0.75), (0, 0.75), (0, 0.75)), size=1)
    assert int(bank.features[0, 0].argmax()) == 0


def test_nothing_more_is_looked_at_once_all_are_sure_enough():
    probabilities = torch.tensor([[0.995, 0.005], [0.005, 0.995], [0.999, 0.001]])
    assert int(fill_bank(embeddings(3), probabilities, size=1).features[0, 0].argmax()) == 0
    assert int(fill_bank(embeddings(3), probabilities, size=1, enough=1.0).features[0, 0].argmax()) == 2
