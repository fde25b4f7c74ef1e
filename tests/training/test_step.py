from contextlib import nullcontext

import pytest
import torch
from torch import nn

from diptych.data.loader import Loader, LoaderConfig
from diptych.errors import TrainingError
from diptych.methods.clip import Config, Objective
from diptych.training.step import accumulate_gradients, clip_gradients, to_device
from diptych.types import Batch, Losses, PairEmbeddings
from diptych.verbs import AbstractObjective


@pytest.fixture
def objective(make_model) -> Objective:
    return Objective(make_model(), Config())


@pytest.fixture
def batches(drawings, objective) -> list[Batch]:
    model = objective.model
    loader = Loader(drawings(12), model.image_policy, model.tokenizer, LoaderConfig(batch_size=4))
    return [batch for batch, _ in zip(loader, range(3), strict=False)]


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def by_autograd(objective: Objective, batch: Batch) -> list[torch.Tensor]:
    return list(torch.autograd.grad(objective(batch).total, list(objective.parameters())))


def test_one_batch_is_plain_autograd(objective, batches):
    (losses,) = accumulate_gradients(objective, batches[:1], 1, nullcontext())
    assert losses.total.item() == objective(batches[0]).total.item()
    assert not losses.total.requires_grad and not losses.parts["contrastive"].requires_grad
    for found, expected in zip(gradients(objective), by_autograd(objective, batches[0]), strict=True):
        assert torch.equal(found, expected)


def test_several_batches_give_the_mean_of_their_gradients(objective, batches):
    losses = accumulate_gradients(objective, batches, 3, nullcontext())
    assert [loss.total.item() for loss in losses] == [objective(batch).total.item() for batch in batches]
    each = [by_autograd(objective, batch) for batch in batches]
    for found, parts in zip(gradients(objective), zip(*each, strict=True), strict=True):
        torch.testing.assert_close(found, sum(parts) / 3)


def test_gradients_are_added_to_what_is_there(objective, batches):
    accumulate_gradients(objective, batches[:1], 1, nullcontext())
    once = gradients(objective)
    accumulate_gradients(objective, batches[:1], 1, nullcontext())
    for found, expected in zip(gradients(objective), once, strict=True):
        torch.testing.assert_close(found, 2 * expected)


def test_autocast_covers_the_towers_and_not_the_loss(objective, batches):
    seen = []

    class Watching(AbstractObjective[PairEmbeddings]):
        def __init__(self) -> None:
            super().__init__()
            self.model = objective.model

        def encode(self, batch: Batch) -> PairEmbeddings:
            seen.append(torch.is_autocast_enabled("cpu"))
            return objective.encode(batch)

        def loss(self, encoded: PairEmbeddings, batch: Batch) -> Losses:
            seen.append(torch.is_autocast_enabled("cpu"))
            assert batch.images == () and batch.keys  # pixels are not needed any more
            return objective.loss(encoded, batch)

    accumulate_gradients(Watching(), batches[:2], 2, torch.autocast("cpu", torch.bfloat16))
    assert seen == [True, False, True, False]


class Constant(AbstractObjective[PairEmbeddings]):
    """An objective whose loss is a given number."""

    def __init__(self, objective: Objective, value: float) -> None:
        super().__init__()
        self.model, self.value = objective.model, value

    def encode(self, batch: Batch) -> PairEmbeddings:
        return PairEmbeddings((), ())

    def loss(self, encoded: PairEmbeddings, batch: Batch) -> Losses:
        total = self.model.log_scale * 0 + self.value
        return Losses(total, {"first": total, "second": torch.tensor(2.5)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_stops_and_names_parts_and_sample(objective, batches, value):
    with pytest.raises(TrainingError) as caught:
        accumulate_gradients(Constant(objective, value), batches, 3, nullcontext())
    message = str(caught.value)
    assert f"the loss is {value} (first = {value:g}, second = 2.5; first sample {batches[0].keys[0]!r})" in message
    assert "optimizer.lr" in message
    assert gradients(objective) == []


def three_four() -> nn.Linear:
    """Return a layer whose gradient is (3, 4), of norm 5."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    return layer


def test_gradients_are_scaled_to_the_norm_and_the_norm_before_is_returned():
    layer = three_four()
    assert clip_gradients(layer, 2.0) == pytest.approx(5)
    assert layer.weight.grad.tolist()[0] == pytest.approx([1.2, 1.6])


@pytest.mark.parametrize("norm", [None, 7.0])
def test_small_gradients_stay_as_they_are(norm):
    layer = three_four()
    assert clip_gradients(layer, norm) == pytest.approx(5)
    assert layer.weight.grad.tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_stops(value, norm):
    layer = three_four()
    layer.weight.grad[0, 0] = value
    with pytest.raises(TrainingError, match=f"gradient norm is {value}.*optimizer.lr"):
        clip_gradients(layer, norm)


def test_a_batch_moves_with_all_its_tensors(batches):
    moved = to_device(batches[0], torch.device("meta"))
    tensors = (moved.images[0], moved.texts[0].ids, moved.texts[0].mask, moved.texts[0].key, moved.group)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.keys == batches[0].keys
