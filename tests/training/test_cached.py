"""The cached step is one large batch: same loss, same gradients, also with dropout, LoRA and chunks of different sizes."""

import math
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diptych.data.loader import Loader, LoaderConfig
from diptych.data.sources import Listed
from diptych.data.transforms import Augment
from diptych.errors import TrainingError
from diptych.methods import clip, siglip
from diptych.training import step
from diptych.training.step import accumulate_gradients, cached_gradients
from diptych.types import Batch, Encoded, Losses, PairEmbeddings, Text, concatenate, rows
from diptych.verbs import AbstractObjective

CONFIG = LoaderConfig(batch_size=4, views=(Augment(crop_scale=(0.5, 1.0), flip_rate=0.5),))


@pytest.fixture(params=["clip", "siglip"])
def objective(request, make_model) -> AbstractObjective:
    model = make_model()
    if request.param == "clip":
        return clip.Objective(model, clip.Config())
    model.bias = nn.Parameter(torch.tensor(-2.0))
    return siglip.Objective(model, siglip.Config())


def loader(objective: AbstractObjective, source: Listed, repeat: int | None, config: LoaderConfig = CONFIG) -> Loader:
    return Loader(source, objective.model.image_policy, objective.model.tokenizer, config, repeat=repeat)


def gradients(objective: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected) and expected
    largest = max(value.abs().max().item() for value in expected.values())  # that of a key's bias is 0 but for rounding
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * largest)


def at_once(objective: AbstractObjective, batches: list[Batch]) -> float:
    """Take the gradient of the whole batch in the plain way: every graph is kept."""
    encoded = concatenate([objective.encode(batch) for batch in batches])
    losses = objective.loss(encoded, concatenate([replace(batch, images=()) for batch in batches]))
    losses.total.backward()
    return losses.total.item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("count", [1, 3])
def test_it_equals_one_large_batch(objective, drawings, dtype, tolerance, count, monkeypatch):
    if dtype == torch.float64:  # pixels and embeddings are fp32 by contract; lifted here to see the arithmetic
        monkeypatch.setattr("diptych.models.dual.normalise", lambda x: nn.functional.normalize(x, dim=-1))
        monkeypatch.setattr(type(objective.model), "pixels", lambda self, images: images.double() / 255 - self.mean)
        objective.double()
    source = drawings(12)
    large = next(iter(loader(objective, source, None, replace(CONFIG, batch_size=4 * count))))
    objective(large).total.backward()
    expected = gradients(objective)
    chunks = [rows(large, 4 * i, 4 * i + 4) for i in range(count)]
    (found,) = cached_gradients(objective, chunks + chunks, count, nullcontext())
    assert found.total.item() == pytest.approx(objective(large).total.item(), rel=tolerance)
    assert_close(gradients(objective), expected, tolerance)


def test_the_loader_repeats_what_the_step_needs(objective, drawings):
    plain = [batch for batch in islice(loader(objective, drawings(12), None), 6)]
    expected_loss = at_once(objective, plain[:3])
    expected = gradients(objective)
    repeating = loader(objective, drawings(12), 3)
    batches = iter(repeating)
    (found,) = cached_gradients(objective, batches, 3, nullcontext())
    assert found.total.item() == pytest.approx(expected_loss, rel=1e-6)
    assert_close(gradients(objective), expected, 1e-6)
    assert repeating.given == 12 and (repeating.position.epoch, repeating.position.cursor) == (1, 0)
    assert next(batches).keys == plain[3].keys


class Noisy(AbstractObjective[PairEmbeddings]):
    """Dropout on both sides, and running statistics in `encode`."""

    def __init__(self, plain: AbstractObjective) -> None:
        super().__init__()
        self.model, self.plain, self.dropout = plain.model, plain, nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(()))

    def encode(self, batch: Batch) -> PairEmbeddings:
        self.seen += len(batch)
        encoded = self.plain.encode(batch)
        return PairEmbeddings((self.dropout(encoded.images[0]),), (self.dropout(encoded.texts[0]),))

    def loss(self, encoded: PairEmbeddings, batch: Batch) -> Losses:
        return self.plain.loss(encoded, batch)


def test_dropout_is_replayed_and_statistics_move_once(objective, drawings):
    noisy = Noisy(objective)
    batches = list(islice(loader(objective, drawings(12), None), 3))
    torch.manual_seed(3)
    loss = at_once(noisy, batches)
    expected, after, noisy.seen = gradients(noisy), torch.rand(1), torch.zeros(())
    torch.manual_seed(3)
    (found,) = cached_gradients(noisy, batches + batches, 3, nullcontext())
    assert found.total.item() == pytest.approx(loss, rel=1e-6)
    assert_close(gradients(noisy), expected, 1e-5)
    assert torch.rand(1) == after and noisy.seen == 12


def test_it_adds_negatives_where_accumulation_does_not(drawings, make_model):
    objective = clip.Objective(make_model(), clip.Config())
    batches = list(islice(loader(objective, drawings(12), None), 3))
    mean = sum(loss.total.item() for loss in accumulate_gradients(objective, batches, 3, nullcontext())) / 3
    (one,) = cached_gradients(objective, batches + batches, 3, nullcontext())
    assert mean == pytest.approx(math.log(4), abs=0.7) and one.total.item() == pytest.approx(math.log(12), abs=0.7)
    assert one.total.item() > mean + 0.5


def test_chunks_may_differ_in_samples_and_in_length_of_texts(objective, drawings):
    samples = [replace(s, texts=(Text("a" * (1 + i % 5)),)) for i, s in enumerate(drawings(12))]
    samples[3] = replace(samples[3], image=b"broken")
    batches = list(islice(loader(objective, Listed(samples), None), 3))
    assert len({len(batch) for batch in batches}) == 2 and len({b.texts[0].ids.shape[1] for b in batches}) > 1
    loss = at_once(objective, batches)
    expected = gradients(objective)
    (found,) = cached_gradients(objective, batches + batches, 3, nullcontext())
    assert found.total.item() == pytest.approx(loss, rel=1e-6)
    assert_close(gradients(objective), expected, 1e-5)


@dataclass(frozen=True)
class TokensToo(Encoded):
    image: Tensor
    text: Tensor
    tokens: Tensor
    mask: Tensor
    own: Tensor


class WithTokens(AbstractObjective[TokensToo]):
    """Sends token outputs and a loss of each sample through the seam."""

    def __init__(self, plain: AbstractObjective) -> None:
        super().__init__()
        self.model, self.plain = plain.model, plain

    def encode(self, batch: Batch) -> TokensToo:
        pair = self.plain.encode(batch)
        tokens = batch.texts[0]
        output = self.model.text(tokens.ids, tokens.mask)
        own = output.pooled.square().mean(1)
        return TokensToo(pair.images[0], pair.texts[0], output.tokens, tokens.mask, own)

    def loss(self, encoded: TokensToo, batch: Batch) -> Losses:
        pair = self.plain.loss(PairEmbeddings((encoded.image,), (encoded.text,)), batch).total
        norms = (encoded.tokens.norm(dim=-1) * encoded.mask).sum(1)
        spread = norms.std() + encoded.own.mean()  # needs the whole batch
        return Losses(pair + spread, {"pair": pair, "spread": spread})


def test_any_record_goes_through(objective, drawings):
    with_tokens = WithTokens(objective)
    samples = [replace(s, texts=(Text("a" * (1 + i % 5)),)) for i, s in enumerate(drawings(12))]
    batches = list(islice(loader(objective, Listed(samples), None), 3))
    loss = at_once(with_tokens, batches)
    expected = gradients(with_tokens)
    (found,) = cached_gradients(with_tokens, batches + batches, 3, nullcontext())
    assert found.total.item() == pytest.approx(loss, rel=1e-6)
    assert_close(gradients(with_tokens), expected, 1e-5)


def test_images_of_one_chunk_at_a_time_are_in_memory(objective, drawings):
    alive: list[weakref.ref] = []
    most = 0

    def counted():
        nonlocal most
        for batch in loader(objective, drawings(12), 3):
            most = max(most, sum(image() is not None for image in alive))
            alive.append(weakref.ref(batch.images[0]))
            yield batch
            del batch

    cached_gradients(objective, counted(), 3, nullcontext())
    assert most <= 2  # the one being encoded, and the one before it


def test_a_broken_loss_is_named(objective, drawings):
    batches = list(islice(loader(objective, drawings(12), None), 3))
    with torch.no_grad():
        objective.model.log_scale.fill_(math.nan)
    with pytest.raises(TrainingError, match="the loss is nan"):
        cached_gradients(objective, batches + batches, 3, nullcontext())


class CountConversions(TorchDispatchMode):
    """Counts how often a tensor becomes bf16."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("take", [cached_gradients, accumulate_gradients])
def test_weights_are_converted_once_and_no_number_changes(objective, drawings, monkeypatch, take):
    repeat = 3 if take is cached_gradients else None
    batches = list(islice(loader(objective, drawings(12), repeat), 3 * (repeat is not None) + 3))
    found, counts = [], []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(step, "_converting_once", lambda objective: nullcontext())
        with CountConversions() as mode:
            take(objective, batches, 3, torch.autocast("cpu", torch.bfloat16))
        found.append(gradients(objective))
        counts.append(mode.count)
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items()) and found[1]
    assert counts[0] < counts[1]
