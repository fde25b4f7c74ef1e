from dataclasses import replace

import pytest
import torch

from diptych.data.sources import Listed
from diptych.errors import DataError
from diptych.evaluation.classifier import Classifier, measure_classifier
from diptych.evaluation.zeroshot import class_embeddings, read_prompts
from diptych.models.embedding import embed_images, embed_texts


class Told:
    """Knows the answers by heart; `wrong` ones it gets wrong."""

    classes = ("circle", "square")

    def __init__(self, source: Listed, wrong: set[str]) -> None:
        self.answers = {s.key: (s.label == "square") != (s.key in wrong) for s in source}

    def __call__(self, batch):
        assert batch.images[0].dtype == torch.uint8 and len(batch) == len(batch.images[0])
        return torch.nn.functional.one_hot(torch.tensor([int(self.answers[key]) for key in batch.keys]), 2).float()

    def save(self, folder):
        raise AssertionError


@pytest.fixture
def pictures(drawings) -> Listed:
    samples = [
        replace(s, label=("circle", "square")[row % 2], domain="ab"[row // 5]) for row, s in enumerate(drawings(10))
    ]
    return Listed(samples, "pictures")


def test_both_are_measured_on_the_same_images(make_model, pictures, monkeypatch):
    monkeypatch.setattr("diptych.evaluation.classifier.AT_ONCE", 4)  # 10 images are cut into parts
    model, told = make_model().eval(), Told(pictures, {"s0", "s7", "s8"})
    assert isinstance(told, Classifier)
    seen = []
    report = measure_classifier(told, model, pictures, advance=seen.append)
    assert seen == [4, 4, 2]
    vectors = class_embeddings(lambda texts: embed_texts(model, texts), told.classes, read_prompts("photo"))
    plain = (embed_images(model, pictures) @ vectors.T).argmax(1) == torch.arange(10) % 2
    values = {name: interval.value for name, interval in report.metrics.items()}
    assert values == pytest.approx(
        {
            "zero-shot": plain.double().mean().item(),
            "learnt": 0.7,
            "learnt minus zero-shot": 0.7 - plain.double().mean().item(),
            "zero-shot, a": plain[:5].double().mean().item(),
            "learnt, a": 0.8,
            "learnt minus zero-shot, a": 0.8 - plain[:5].double().mean().item(),
            "zero-shot, b": plain[5:].double().mean().item(),
            "learnt, b": 0.6,
            "learnt minus zero-shot, b": 0.6 - plain[5:].double().mean().item(),
        }
    )


def test_without_domains_there_is_one_row_of_each_and_unknown_classes_are_refused(make_model, pictures):
    model = make_model().eval()
    plain = Listed([replace(s, domain=None) for s in pictures], "pictures")
    assert set(measure_classifier(Told(plain, set()), model, plain).metrics) == {
        "zero-shot",
        "learnt",
        "learnt minus zero-shot",
    }
    with pytest.raises(DataError, match="label of 's0' in pictures is 'star'; known: circle, square"):
        odd = Listed([replace(s, label="star") if s.key == "s0" else s for s in pictures], "pictures")
        measure_classifier(Told(pictures, set()), model, odd)
