import pytest
import torch
from torch.nn import functional as F

from diptych.errors import ConfigError, DataError
from diptych.losses.contrastive import info_nce
from diptych.models.modes import set_mode
from diptych.models.supervision import Supervision
from diptych.types import Batch

PROMPTS = ("a red circle", "a blue square", "a green circle")


def batch_of(model, texts) -> Batch:
    n = len(texts)
    return Batch(tuple(map(str, range(n))), (), (model.tokenizer(texts),), torch.arange(n))


def images(n: int, model) -> torch.Tensor:
    return F.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_classes_are_compared_with_every_image(make_model):
    model = make_model()
    found = Supervision(model, PROMPTS, label_smoothing=0.1)
    batch = batch_of(model, [PROMPTS[2], PROMPTS[0], PROMPTS[2], PROMPTS[1]])
    assert found.labels(batch).tolist() == [2, 0, 2, 1] and found.encode_text(model, batch) == ()
    logits = model.scale * images(4, model) @ model.encode_text(model.tokenizer(PROMPTS)).T
    expected = F.cross_entropy(logits, torch.tensor([2, 0, 2, 1]), label_smoothing=0.1)
    loss = found.loss(model, images(4, model), (), batch)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.text_head.linear.weight.grad.abs().sum() > 0


def test_pairs_are_compared_with_each_other(make_model):
    model = make_model()
    batch = batch_of(model, PROMPTS)
    found = Supervision(model, label_smoothing=0.1)
    texts = found.encode_text(model, batch)
    expected = info_nce(images(3, model), model.encode_text(batch.texts[0]), model.scale)
    torch.testing.assert_close(found.loss(model, images(3, model), texts, batch), expected)


def test_a_frozen_text_tower_is_asked_once(make_model):
    trained, frozen = make_model(), make_model()
    set_mode(frozen.text, "frozen")
    one, two = Supervision(trained, PROMPTS), Supervision(frozen, PROMPTS)
    assert one.tokens.output is None and two.tokens.output is not None
    assert torch.equal(one.class_embeddings(trained), two.class_embeddings(frozen))
    calls = []
    frozen.text.register_forward_hook(lambda *_: calls.append(1))
    two.class_embeddings(frozen)
    assert not calls


def test_what_cannot_be_learnt_is_refused(make_model):
    model = make_model()
    with pytest.raises(ConfigError, match="two classes or more, each with a prompt of its own"):
        Supervision(model, ("a cat", "a  cat"))
    with pytest.raises(DataError, match="main text of '1' is none of the 3 prompts"):
        Supervision(model, PROMPTS).labels(batch_of(model, [PROMPTS[0], "a dog"]))
