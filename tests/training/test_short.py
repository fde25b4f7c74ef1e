import pytest
import torch
from torch import nn

from diptych.errors import TrainingError
from diptych.training.optim import OptimizerConfig, schedule
from diptych.training.short import minimise, shuffled
from diptych.types import Losses, PairEmbeddings

PLAIN = OptimizerConfig(lr=0.1, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0, warmup_rate=0.25, clip_norm=None)


def square(module: nn.Linear):
    def losses(batch: torch.Tensor) -> Losses:
        loss = (module(batch) - 1).square().mean()
        return Losses(loss, {"square": loss})

    return losses


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_it_is_adam_with_a_warm_up_and_a_cosine():
    batches = [torch.randn(4, 3, generator=torch.Generator().manual_seed(step)) for step in range(10)]
    ours, theirs = linear(), linear()
    minimise(ours, square(ours), batches, 8, PLAIN)
    adam = torch.optim.Adam(theirs.parameters(), lr=0.1)
    for step, batch in enumerate(batches[:8]):
        adam.param_groups[0]["lr"] = 0.1 * schedule(step, 8, 0.25)
        adam.zero_grad()
        square(theirs)(batch).total.backward()
        adam.step()
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_not_finite_stops_it():
    module = linear()
    batches = [torch.ones(1, 3), torch.full((1, 3), torch.inf)]
    with pytest.raises(TrainingError, match=r"at step 1 \(square = nan\)\. Lower optimizer\.lr"):
        minimise(module, square(module), batches, 2, PLAIN)


def test_every_row_comes_once_before_any_comes_again():
    data = PairEmbeddings((torch.arange(7)[:, None].float(),), (torch.arange(7)[:, None].float() + 10,))
    batches = shuffled(data, 3, torch.Generator().manual_seed(0))
    taken = [next(batches) for _ in range(4)]
    rows = [batch.images[0][:, 0].tolist() for batch in taken]
    assert all(len(set(rows[epoch] + rows[epoch + 1])) == 6 for epoch in (0, 2)) and rows[:2] != rows[2:]
    assert all(torch.equal(batch.texts[0], batch.images[0] + 10) for batch in taken)
    again = shuffled(data, 3, torch.Generator().manual_seed(0))
    assert torch.equal(next(again).images[0], taken[0].images[0])
