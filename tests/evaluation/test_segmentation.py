import numpy as np
import pytest
import torch

from diptych.data.class_masks import UNKNOWN
from diptych.data.sources import Listed
from diptych.errors import ConfigError, EvaluationError
from diptych.evaluation.segmentation import (
    Labelled,
    confusion,
    labels_of,
    measure_said,
    measure_segmentation,
    only_image,
    probabilities_of,
    segment_source,
)
from diptych.types import Batch, Region, Sample, TowerOutput


def drawn(count: int, classes: int, seed: int = 0, sides: tuple[int, int] = (5, 7)):
    """Return random truths, some of it unknown, and what is said, half of it right."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(UNKNOWN, classes, (count, *sides))
    said = np.where(rng.random(truth.shape) < 0.5, truth.clip(0), rng.integers(0, classes, truth.shape))
    return truth, said


def brute(truth: np.ndarray, said: np.ndarray, classes: int) -> list[float | None]:
    """Return IoU of each class pixel by pixel, as sets."""
    found = []
    for label in range(classes):
        is_it = {place for place in np.ndindex(truth.shape) if truth[place] == label}
        called = {place for place in np.ndindex(truth.shape) if said[place] == label and truth[place] != UNKNOWN}
        found.append(len(is_it & called) / len(is_it | called) if is_it | called else None)
    return found


def test_a_case_by_hand():
    truth = np.array([[0, 0, 1], [1, UNKNOWN, 2]])
    said = np.array([[0, 1, 1], [1, 0, 1]])
    counts = confusion(truth, said, 4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    found = measure_segmentation(counts[None], ("background", "cat", "dog", "cow"))
    assert found.iou["background"].value == pytest.approx(1 / 2) and found.iou["cat"].value == pytest.approx(2 / 4)
    assert found.iou["dog"].value == 0 and found.iou["cow"] is None
    assert found.miou.value == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert found.foreground_miou.value == pytest.approx((1 / 2 + 0) / 2)
    assert found.pixel_accuracy.value == pytest.approx(3 / 5) and found.images == 1
    assert set(found.headline()) == {"miou", "foreground_miou", "pixel_accuracy"}
    plain = measure_segmentation(counts[None], ("sky", "cat", "dog", "cow"))
    assert plain.foreground_miou is None and plain.miou == found.miou


def test_brute_force_over_images():
    truth, said = drawn(6, 4)
    counts = np.stack([confusion(*pair, 4) for pair in zip(truth, said, strict=True)])
    found = measure_segmentation(counts, ("a", "b", "c", "d"))
    expected = brute(truth, said, 4)
    assert [value.value for value in found.iou.values()] == pytest.approx(expected)
    assert found.miou.value == pytest.approx(np.mean(expected))
    known = truth != UNKNOWN
    assert found.pixel_accuracy.value == pytest.approx((truth == said)[known].mean())


def test_intervals_are_those_of_resampled_images():
    truth, said = drawn(8, 3, seed=1)
    counts = np.stack([confusion(*pair, 3) for pair in zip(truth, said, strict=True)])
    found = measure_segmentation(counts, ("a", "b", "c"), seed=5)
    draws = np.random.default_rng(5).multinomial(8, np.full(8, 1 / 8), size=2000)
    values = []
    for draw in draws[:200]:
        rows = np.repeat(np.arange(8), draw)
        values.append(np.mean(brute(truth[rows], said[rows], 3)))
    assert found.miou.low < found.miou.value < found.miou.high
    # the first 200 resamples by brute force are a sample of all 2,000
    inside = np.mean([found.miou.low <= value <= found.miou.high for value in values])
    assert 0.9 < inside < 0.99
    again = measure_segmentation(np.repeat(counts[:1], 4, 0), ("a", "b", "c"))
    assert again.miou.low == again.miou.value == again.miou.high  # equal images


def test_order_of_classes_changes_nothing():
    truth, said = drawn(4, 4, seed=2)
    order = np.array([2, 0, 3, 1])
    turned = np.where(truth == UNKNOWN, UNKNOWN, order[truth]), order[said]
    plain, other = (
        measure_segmentation(np.stack([confusion(*pair, 4) for pair in zip(*maps, strict=True)]), tuple("abcd"))
        for maps in ((truth, said), turned)
    )
    assert plain.miou.value == pytest.approx(other.miou.value) and plain.pixel_accuracy == other.pixel_accuracy


def test_chance_is_what_random_labels_get():
    rng = np.random.default_rng(0)
    truth = rng.choice(4, size=(20, 100, 100), p=[0.7, 0.2, 0.1, 0.0])
    said = rng.integers(0, 5, truth.shape)
    counts = np.stack([confusion(*pair, 5) for pair in zip(truth, said, strict=True)])
    found = measure_segmentation(counts, tuple("abcde"))
    assert found.miou.value == pytest.approx(found.chance, abs=0.002)
    assert found.iou["d"].value == found.iou["e"].value == 0  # said, and never shown


def test_what_cannot_be_measured():
    with pytest.raises(EvaluationError, match="no pixel of the masks has a known class"):
        measure_segmentation(np.zeros((2, 3, 3), dtype=np.int64), ("a", "b", "c"))
    with pytest.raises(EvaluationError, match="Classes count from 0 to 1; there are 0 to 2"):
        confusion(np.array([0, 1]), np.array([0, 2]), 2)


class TestSources:
    def pictures(self) -> Listed:
        left = np.zeros((4, 6), dtype=np.uint8)
        left[:, :3] = 1
        unknown = left.copy()
        unknown[0] = 255
        cat, dog = Region((0, 0, 3, 4), "a small cat", {"noun": "cat"}), Region((0, 0, 3, 4), "dog")
        pixels = np.zeros((4, 6, 3), dtype=np.uint8)
        return Listed(
            [
                Sample("a", pixels, (), "a", regions=(cat,), mask=left),
                Sample("b", pixels, (), "b", regions=(dog,), mask=unknown),
                Sample("c", pixels, (), "c"),
                Sample("d", b"broken", (), "d"),
            ]
        )

    def test_masks_count_where_there_are_any(self):
        def cats_left(batch):
            assert batch.images[0].shape == (1, 3, 4, 6)
            labels = torch.zeros(4, 6, dtype=torch.int64)
            labels[:, :3] = 1
            return Labelled(labels, torch.zeros(3, 4, 6))

        classes = ("background", "cat", "dog")
        skipped = []
        said = list(segment_source(cats_left, self.pictures(), classes, skip=skipped.append))
        assert [one.sample.key for one in said] == ["a", "b", "c"] and len(skipped) == 1 and "sample 3" in skipped[0]
        assert said[0].confusion.tolist() == [[12, 0, 0], [0, 12, 0], [0, 0, 0]]
        assert said[1].confusion.tolist() == [[9, 0, 0], [0, 0, 0], [0, 9, 0]] and said[2].confusion is None
        found = measure_said([one.confusion for one in said], classes)
        assert found.images == 2 and found.miou.value == pytest.approx((1 + 12 / 21 + 0) / 3)

    def test_without_background_only_what_is_named_counts(self):
        every = segment_source(
            lambda batch: Labelled(torch.zeros(4, 6, dtype=torch.int64), torch.zeros(2, 4, 6)),
            self.pictures(),
            ("cat", "cow"),
        )
        said = [one.confusion for one in every]
        assert said[0].tolist() == [[12, 0], [0, 0]] and said[1].sum() == 0
        assert measure_said(said, ("cat", "cow")).miou.value == 1

    def test_nothing_known_is_nothing_measured(self):
        assert measure_said([], ("a", "b")) is None
        assert measure_said([None, np.zeros((2, 2), dtype=np.int64)], ("a", "b")) is None

    def test_masks_of_another_size_are_refused(self):
        with pytest.raises(EvaluationError, match="mask of sample 0"):
            next(
                segment_source(
                    lambda batch: Labelled(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, 2)),
                    self.pictures(),
                    ("cat", "cow"),
                )
            )


def test_more_words_for_background_never_lower_it():
    torch.manual_seed(0)
    logits = torch.randn(5, 3, 4)
    fewer = probabilities_of(logits[1:], 2, scale=1.0)
    more = probabilities_of(logits, 3, scale=1.0)
    torch.testing.assert_close((more[0] / more[1]).clamp(min=fewer[0] / fewer[1]), more[0] / more[1])
    assert torch.equal(probabilities_of(logits, 0), (40 * logits).softmax(0))
    assert probabilities_of(logits, 1).shape == (5, 3, 4) and more.shape == (3, 3, 4)


def test_only_a_background_takes_what_is_not_sure():
    probabilities = torch.tensor([[[0.1, 0.3]], [[0.15, 0.6]], [[0.12, 0.1]]])
    assert labels_of(probabilities, background=True, least=0.2).tolist() == [[0, 1]]
    assert labels_of(probabilities, background=False, least=0.2).tolist() == [[1, 1]]


def test_the_one_image_of_a_batch():
    images, group = torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.arange(2)
    assert only_image(Batch(("a",), (images[:1],), (), group[:1])).shape == (3, 4, 5)
    seen = TowerOutput(torch.zeros(1, 8))
    for several in (Batch(("a", "b"), (images,), (), group), Batch(("a",), (seen,), (), group[:1])):
        with pytest.raises(ConfigError, match="one at a time"):
            only_image(several)
