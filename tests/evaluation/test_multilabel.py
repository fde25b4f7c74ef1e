import pytest
import torch

from diptych.errors import EvaluationError
from diptych.evaluation.multilabel import hamming_scores, predict_labels


@pytest.mark.data
@pytest.mark.parametrize("case", ["hamming", "hamming_very_negative"])
def test_official_scores(golden, case):
    numbers = golden("gama", case)
    predicted = predict_labels(torch.from_numpy(numbers["logits"]))
    assert torch.equal(predicted, torch.from_numpy(numbers["predicted"]).bool())
    score = hamming_scores(predicted, torch.from_numpy(numbers["labels"]).bool()).mean()
    assert 100 * score.item() == pytest.approx(numbers["hamming_percent"], rel=1e-6)


def test_scores_by_hand():
    true = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0]]).bool()
    predicted = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 1, 1]]).bool()
    torch.testing.assert_close(hamming_scores(predicted, true), torch.tensor([1, 1 / 3, 0]))


def test_a_prediction_is_never_empty_and_half_of_the_largest_is_too_little():
    assert predict_labels(torch.tensor([[-200.0, -300.0], [50.0, 50.0]])).tolist() == [[True, False], [True, True]]
    logits = torch.logit(torch.tensor([[0.8, 0.39, 0.41]], dtype=torch.float64))
    assert predict_labels(logits.float()).tolist() == [[True, False, True]]


def test_an_image_without_any_class_is_refused():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(EvaluationError, match="2 images"):
        hamming_scores(nothing, nothing)
