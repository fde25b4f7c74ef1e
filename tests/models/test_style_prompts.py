import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from diptych.data.sources import Listed
from diptych.errors import DataError
from diptych.models.seen import labels_of
from diptych.models.statistics import layer_statistics
from diptych.models.style_prompts import (
    AbstractStylePrompts,
    Projector,
    Prompted,
    StyleClassifier,
    prompted,
    read_style_classifier,
    without_style,
)


def test_prompts_do_not_depend_on_where_things_are():
    layers = [torch.randn(2, 197, width, generator=torch.Generator().manual_seed(width)) for width in (4, 6)]
    projector = Projector([4, 6], 8, AbstractStylePrompts())
    order = torch.randperm(197, generator=torch.Generator().manual_seed(0))
    plain, moved = (projector(layer_statistics(each)) for each in (layers, [layer[:, order] for layer in layers]))
    torch.testing.assert_close(plain, moved, rtol=1e-4, atol=1e-5)
    assert plain.vectors.shape == (2, projector.slots, 8) and projector.slots == 2 * 2 + 4
    assert torch.equal(plain.vectors[:, :2], plain.domain) and torch.equal(plain.vectors[:, 2:4], plain.domain)
    assert all(torch.equal(plain.vectors[:, 4], plain.vectors[:, slot]) for slot in range(5, 8))


def test_without_style_all_images_have_equal_style_vectors():
    layers = [torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))]
    projector = Projector([4], 8, AbstractStylePrompts())
    found = without_style(projector)(layer_statistics(layers))
    assert not found.domain.any() and torch.equal(
        found.vectors[:, 2:], projector(layer_statistics(layers)).vectors[:, 2:]
    )
    assert projector.style_out[0].weight.any()  # the original stays


def test_style_and_content_vectors_by_hand():
    config = AbstractStylePrompts(hidden=1, image_tokens=1, domain_repeats=1)
    projector = Projector([1, 1], 1, config)
    with torch.no_grad():
        for weight, module in ((2.0, projector.style_in), (3.0, projector.style_out), (5.0, projector.content)):
            for layer in module:
                layer.weight.fill_(weight)
                layer.bias.zero_()
        projector.over_layers.weight.copy_(torch.tensor([[1.0, 10.0]]))
        projector.over_layers.bias.zero_()
    layers = [torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[0.0], [8.0]]])]  # means 2 and 4, deviations 1 and 4
    found = projector(layer_statistics(layers))
    assert found.domain[0, :, 0].tolist() == [6 * 1.5, 6 * 4.0]
    assert found.vectors[0, :, 0].tolist() == [9.0, 24.0, 5 * 2 + 10 * 5 * 4]


def test_each_image_is_compared_with_the_texts_of_its_own_prompt():
    said = Prompted(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]), torch.zeros(2, 1, 2))
    logits = said.logits(torch.tensor([[0.6, 0.8], [0.6, 0.8]]), 10.0)
    torch.testing.assert_close(logits, torch.tensor([[6.0, 8.0], [8.0, 6.0]]))


def test_names_have_slots_and_prompts_of_one_look_are_equal(make_model):
    model = make_model().requires_grad_(False).eval()
    config = AbstractStylePrompts(hidden=4, image_tokens=1, domain_repeats=1, template="a {}")
    projector = Projector([8], model.text.width, config)
    names = projector.names_of(model, ("red_circle", "square"))
    assert names.ids.shape[1] == max(model.tokenizer.lengths(["a red circle", "a square"])) + 2
    layers = [torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1)]
    said = prompted(model, names, projector, layer_statistics(layers), "fp32")
    assert said.texts.shape[:2] == (2, 2)
    torch.testing.assert_close(said.texts[0], said.texts[1])
    torch.testing.assert_close(said.texts.norm(dim=-1), torch.ones(2, 2))


@dataclass(frozen=True)
class Settings(AbstractStylePrompts):
    method: ClassVar[str] = "ours"
    rate: float = 0.5


@pytest.fixture
def shapes(drawings) -> Listed:
    """Return more drawings than the prompts of which are read at once, labelled."""
    found = [replace(s, label=s.texts[0].text.split()[2]) for s in drawings(36)]
    return Listed(found, "shapes")


@pytest.fixture
def classifier(make_model) -> StyleClassifier:
    model = make_model().requires_grad_(False).eval()
    config = Settings(hidden=4, image_tokens=1, domain_repeats=1, precision="fp32", rate=0.25)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        projector = Projector([16], model.text.width, config)
    return StyleClassifier(model, projector, ("circle", "square"))


def test_a_classifier_is_right_where_its_logits_are(classifier, shapes):
    exam = classifier.exam(shapes)
    assert torch.equal(exam.label, labels_of(shapes, classifier.classes)) and len(exam) == 36
    logits = classifier.logits(exam.seen)
    said = prompted(classifier.model, classifier.names, classifier.projector, exam.seen.statistics, "fp32")
    torch.testing.assert_close(logits, said.logits(exam.seen.embedding, classifier.model.scale), rtol=1e-4, atol=1e-5)
    assert classifier.correct(exam).tolist() == (logits.argmax(1) == exam.label).double().tolist()
    with pytest.raises(DataError, match="known: circle, square"):
        classifier.exam(Listed([replace(shapes[0], label="star")], "odd"))


def test_a_classifier_is_saved_with_its_settings_and_read_again(classifier, shapes, make_model, tmp_path):
    classifier.save(tmp_path / "learnt")
    found = read_style_classifier(tmp_path / "learnt", make_model(), Settings)
    assert json.loads((tmp_path / "learnt" / "adapter.json").read_text())["method"] == "ours"
    assert found.projector.config == classifier.projector.config and found.classes == classifier.classes
    seen = classifier.exam(shapes).seen
    assert torch.equal(found.logits(seen), classifier.logits(seen))


def test_without_style_a_classifier_ignores_deviations(classifier, shapes):
    seen = classifier.exam(shapes).seen
    other = replace(
        seen, statistics=replace(seen.statistics, deviations=tuple(3 * d for d in seen.statistics.deviations))
    )
    plain = classifier.without_style()
    assert torch.equal(plain.logits(seen), plain.logits(other))
    assert not torch.equal(classifier.logits(seen), classifier.logits(other))
