import pytest
import torch

from diptych.claims.measures import auroc, drawn_scenes, gains_less_than_half, mean_recall
from diptych.data.sources import Listed


def test_auroc_by_hand():
    positive = torch.tensor([True, True, False, False])
    assert auroc(torch.tensor([3.0, 2.0, 1.0, 0.0]), positive) == 1.0
    assert auroc(torch.tensor([0.0, 1.0, 2.0, 3.0]), positive) == 0.0
    assert auroc(torch.tensor([1.0, 1.0, 1.0, 1.0]), positive) == 0.5
    assert auroc(torch.tensor([3.0, 1.0, 2.0, 1.0]), positive) == (1 + 1 + 0 + 0.5) / 4


@pytest.mark.parametrize(("control", "passed"), [(0.1, True), (0.24, True), (0.26, False), (0.5, False)])
def test_a_control_that_gains_half_has_failed(control, passed):
    assert gains_less_than_half({"baseline": [0.0, 0.4], "method": [0.3, 0.3], "control": [control, control]}) is passed


def test_recall_is_the_mean_of_both_directions(make_model, drawings):
    model = make_model()
    one = Listed(list(drawings(1)))
    assert mean_recall(model, one) == 1.0  # the only candidate
    with torch.no_grad():
        model.text_head.linear.weight.zero_()  # all texts are alike, and ties go against the model
    assert mean_recall(model, drawings(6)) == 0.0


def test_scenes_are_drawn_once_with_one_caption():
    source = drawn_scenes("validation", 3)
    assert source is drawn_scenes("validation", 3)
    assert [len(sample.texts) for sample in source] == [1, 1, 1] and source[0].mask is None
    assert len({sample.key for sample in source}) == 3
