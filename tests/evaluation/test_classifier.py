from dataclasses import replace

import pytest
import torch

from diptych.data.sources import Listed
from diptych.errors import DataError, ImageError
from diptych.evaluation.classifier import Classifier, measure_classifier
from diptych.evaluation.run import evaluate_model
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


def test_an_image_that_cannot_be_read_is_left_out_as_evaluation_leaves_it_out(make_model, pictures):
    model = make_model().eval()
    broken = Listed([replace(s, image=b"no image") if s.key == "s7" else s for s in pictures], "pictures")
    found = measure_classifier(Told(pictures, {"s0", "s7", "s8"}), model, broken)
    rest = Listed([s for s in pictures if s.key != "s7"], "pictures")
    assert found.metrics == measure_classifier(Told(pictures, {"s0", "s8"}), model, rest).metrics
    evaluated = evaluate_model(model, broken, tasks=("zeroshot",), precision="fp32")
    assert found.metrics["zero-shot"].value == evaluated.zeroshot.top1.value
    assert found.notes == evaluated.notes and "1 images could not be read and were left out" in found.notes[0]
    for name, count in (("samples", 9), ("skipped", 1)):
        assert found.settings[name] == count
    assert (evaluated.settings["images"], evaluated.settings["skipped"]) == (9, 1)
    nothing = Listed([replace(s, image=b"no image") for s in pictures], "pictures")
    with pytest.raises(ImageError, match=r"None of the 10 images of pictures can be read\. First: 0: 's0'"):
        measure_classifier(Told(pictures, set()), model, nothing)


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
