from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych.data.sources import Listed
from diptych.data.transforms import ImagePolicy
from diptych.errors import EvaluationError
from diptych.evaluation.anomaly import (
    AnomalyMaps,
    Found,
    aupro,
    class_means,
    detect,
    image_ap,
    image_auroc,
    measure_anomaly,
    measure_found,
    pixel_auroc,
    resample,
    within_faulty,
)
from diptych.evaluation.stats import RESAMPLES
from diptych.types import Batch, Sample


def drawn(count: int = 6, seed: int = 0, *, ties: bool = False):
    """Return maps and masks of different sizes that agree a little; some images are normal."""
    rng, maps, masks = np.random.default_rng(seed), [], []
    for i in range(count):
        mask = np.zeros((9 + i, 12), dtype=bool)
        if i % 3:
            mask[1:4, 2:5], mask[6, 7:11] = True, True
            mask[7, 11] = i % 2 == 0
        found = mask * 0.5 + rng.random(mask.shape)
        maps.append(torch.from_numpy(found.round(1) if ties else found))
        masks.append(torch.from_numpy(mask))
    return maps, masks


def abnormal(masks) -> np.ndarray:
    return np.array([bool(mask.any()) for mask in masks])


def brute_aupro(maps, masks, counts, max_fpr=0.3, steps=200) -> float:
    """Threshold by threshold, region by region, pixel by pixel; an image counts as often as it was drawn."""
    from scipy.ndimage import label

    low, high = min(float(m.min()) for m in maps), max(float(m.max()) for m in maps)
    points = []
    for k in range(steps):
        threshold, overlaps, called, normal = low + k * (high - low) / steps, [], 0, 0
        for scores, mask, count in zip(maps, masks, counts, strict=True):
            above, regions = scores.numpy() > threshold, label(mask.numpy(), np.ones((3, 3)))
            for number in range(1, regions[1] + 1):
                overlaps += [above[regions[0] == number].mean()] * int(count)
            called, normal = (
                called + int(count) * (above & ~mask.numpy()).sum(),
                normal + int(count) * (~mask.numpy()).sum(),
            )
        if called / normal < max_fpr:
            points.append((called / normal, float(np.mean(overlaps))))
    points.sort()
    x, y = np.array(points).T
    x = (x - x.min()) / (x.max() - x.min())
    return float(((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2).sum())


def test_image_numbers_by_hand():
    scores, kinds = torch.tensor([0.9, 0.5, 0.5, 0.1]), np.array([True, True, False, False])
    draws = resample(kinds)
    assert image_auroc(scores, kinds, draws).value == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert image_ap(scores, kinds, draws).value == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert image_auroc(-scores, kinds, draws).value == pytest.approx(1 - 3.5 / 4)


@pytest.mark.parametrize("ties", [False, True])
def test_scikit_learn_gives_the_same(ties):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    scores, kinds = rng.random(60), rng.random(60) < 0.4
    scores = (scores + 0.2 * kinds).round(1 if ties else 9)
    draws = resample(kinds)
    found = torch.from_numpy(scores)
    assert image_auroc(found, kinds, draws).value == pytest.approx(metrics.roc_auc_score(kinds, scores))
    assert image_ap(found, kinds, draws).value == pytest.approx(metrics.average_precision_score(kinds, scores))
    maps, masks = drawn(ties=ties)
    flat = [torch.cat([x.flatten() for x in part]).numpy() for part in (masks, maps)]
    found = pixel_auroc(maps, masks, resample(abnormal(masks)))
    assert found.value == pytest.approx(metrics.roc_auc_score(*flat))


def test_resamples_are_what_repeating_images_gives():
    metrics = pytest.importorskip("sklearn.metrics")
    maps, masks = drawn(ties=True)
    kinds, scores = abnormal(masks), torch.tensor([0.3, 0.3, 0.8, 0.5, 0.1, 0.9])
    draws = resample(kinds)
    values = {"auroc": [], "ap": [], "pixel": [], "aupro": []}
    for counts in draws[:300].astype(int):
        rows = np.repeat(np.arange(6), counts)
        values["auroc"].append(metrics.roc_auc_score(kinds[rows], scores.numpy()[rows]))
        values["ap"].append(metrics.average_precision_score(kinds[rows], scores.numpy()[rows]))
        flat = [torch.cat([part[row].flatten() for row in rows]).numpy() for part in (masks, maps)]
        values["pixel"].append(metrics.roc_auc_score(*flat))
    few = draws[:300]
    found = {
        "auroc": image_auroc(scores, kinds, few),
        "ap": image_ap(scores, kinds, few),
        "pixel": pixel_auroc(maps, masks, few),
    }
    for name, interval in found.items():
        assert [interval.low, interval.high] == pytest.approx(np.percentile(values[name], [2.5, 97.5])), name


@pytest.mark.parametrize("ties", [False, True])
def test_aupro_is_that_of_brute_force(ties):
    maps, masks = drawn(4, ties=ties)
    draws = resample(abnormal(masks))[:3]
    found = aupro(maps, masks, draws)
    assert found.value == pytest.approx(brute_aupro(maps, masks, np.ones(4)))
    every = [brute_aupro(maps, masks, counts) for counts in draws]
    assert [found.low, found.high] == pytest.approx(np.percentile(every, [2.5, 97.5]))


def test_the_official_aupro(golden):
    case = golden("anovl", "aupro")
    maps = list(torch.from_numpy(case["maps"]))
    masks = list(torch.from_numpy(case["masks"]) > 0)
    found = aupro(maps, masks, resample(abnormal(masks)), max_fpr=float(case["max_fpr"]), steps=int(case["steps"]))
    assert found.value == pytest.approx(float(case["aupro"]), rel=1e-6)


def test_perfect_reversed_and_random_maps():
    _, masks = drawn(30)
    perfect = measure_anomaly(torch.tensor(abnormal(masks)).float(), [m.float() for m in masks], masks)
    assert all(value.value == value.low == value.high == 1 for value in (perfect.image_auroc, perfect.image_ap))
    assert perfect.pixel_auroc is not None and perfect.pixel_auroc.value == 1
    assert perfect.aupro is not None and perfect.aupro.value == perfect.aupro.low == 1  # no pixel is called by mistake
    smooth = [m + 0.1 * torch.rand(m.shape, generator=torch.Generator().manual_seed(0)) for m in masks]
    found = measure_anomaly(torch.rand(30), smooth, masks)
    assert found.aupro is not None and found.aupro.value == 1
    reverse = measure_anomaly(torch.rand(30), [-m for m in smooth], masks)
    assert reverse.pixel_auroc is not None and reverse.pixel_auroc.value == 0
    rng = np.random.default_rng(0)
    noise = [torch.from_numpy(rng.random(m.shape)) for m in masks]
    chance = measure_anomaly(torch.from_numpy(rng.random(30)), noise, masks)
    assert chance.pixel_auroc is not None and abs(chance.pixel_auroc.value - 0.5) < 0.05
    assert chance.aupro is not None and abs(chance.aupro.value - 0.15) < 0.04
    assert chance.pixel_auroc.low < 0.5 < chance.pixel_auroc.high
    assert (chance.normal, chance.abnormal) == (10, 20)


def test_resamples_keep_both_kinds():
    kinds = np.array([True, False, False])
    counts = resample(kinds)
    assert counts.shape == (RESAMPLES, 3) and (counts[:, 0] == 1).all() and (counts[:, 1:].sum(1) == 2).all()


def test_what_cannot_be_measured_is_left_out_or_an_error():
    maps, masks = drawn(3)
    only = measure_anomaly(torch.rand(2), maps[1:], masks[1:])
    assert only.image_auroc is None and only.image_ap is None and only.pixel_auroc is not None
    nothing = [torch.zeros_like(mask) for mask in masks]
    assert measure_anomaly(torch.rand(3), maps, nothing).headline() == {}
    kinds = abnormal(masks)
    with pytest.raises(EvaluationError, match=r"All maps are constant, 0\.0"):
        aupro([torch.zeros_like(x) for x in maps], masks, resample(kinds))
    with pytest.raises(EvaluationError, match=r"below 0\.3 at none of 2 thresholds"):
        aupro([1 - mask.float() for mask in masks[1:]], masks[1:], resample(kinds[1:]), steps=2)
    with pytest.raises(EvaluationError, match="3 of 3 are abnormal"):
        image_auroc(torch.rand(3), np.ones(3, dtype=bool), resample(kinds))
    with pytest.raises(EvaluationError, match="Map 1 has \\(10, 11\\) pixels, its mask \\(10, 12\\)"):
        pixel_auroc([maps[0], maps[1][:, 1:]], masks[:2], resample(kinds[:2]))
    with pytest.raises(EvaluationError, match="1 of 108 scores are not finite"):
        maps[0][0, 0] = torch.nan
        measure_anomaly(torch.rand(3), maps, masks)
    with pytest.raises(EvaluationError, match="there are 2, 3 and 3"):
        measure_anomaly(torch.rand(2), maps, masks)


def sample(key: str, shape: tuple[int, int], *, mask: bool | None = None, domain: str | None = None) -> Sample:
    marked = None if mask is None else np.zeros(shape, dtype=np.uint8)
    if mask:
        marked[: shape[0] // 2] = 1
    pixels = np.full((*shape, 3), 200 if mask else 50, dtype=np.uint8)
    return Sample(key, pixels, (), key, domain=domain, mask=marked)


class TestDetect:
    def test_each_sample_has_its_detector_and_maps_have_the_size_of_masks(self):
        source = Listed(
            [
                sample("a", (20, 30), mask=True, domain="pear"),
                sample("b", (40, 20), mask=False, domain="bell"),
                replace(sample("c", (9, 9)), image=b"nothing"),
                replace(sample("d", (9, 9)), image=None),
                sample("e", (16, 16)),
            ]
        )
        seen, asked = [], []

        def detector(one: Sample):
            asked.append(one.key)

            def predict(batch: Batch) -> AnomalyMaps:
                seen.append(tuple(batch.images[0].shape))
                ramp = torch.linspace(1, 0, batch.images[0].shape[2])[:, None]
                return AnomalyMaps(ramp.expand(batch.images[0].shape[2:])[None], batch.images[0].float().mean()[None])

            return predict

        found = detect(detector, source, ImagePolicy(size=16))
        assert asked == ["a", "b", "e"] and seen == [(1, 3, 16, 24), (1, 3, 32, 16), (1, 3, 16, 16)]
        assert found.rows == (0, 1, 4) and found.classes == ("pear", "bell", None)
        assert [tuple(m.shape) for m in found.maps] == [(20, 30), (40, 20), (16, 16)]
        assert found.scores.tolist() == [200, 50, 50] and found.masks[2] is None
        assert (
            len(found.skipped) == 2 and "sample 2 of listed" in found.skipped[0] and "there is none" in found.skipped[1]
        )
        measured = measure_found(found)
        assert list(measured) == ["pear", "bell"]
        assert measured["pear"].pixel_auroc.value == 1 and measured["bell"].headline() == {}
        assert class_means(measured) == {"pixel_auroc": 1.0, "aupro": 1.0}

    def test_nothing_to_look_at(self):
        found = detect(lambda one: None, Listed([]), ImagePolicy(size=16))
        assert found.rows == () and found.scores.shape == (0,) and measure_found(found) == {}


def test_values_at_chance():
    maps, masks = drawn(6)
    found = measure_anomaly(torch.rand(6), maps, masks)
    assert [found.chance(name) for name in found.headline()] == [0.5, 4 / 6, 0.5, 0.15]


def test_within_faulty_images_only_the_place_counts():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 0] = True
    flat, right = torch.ones(4, 4), mask.float()
    none, other = torch.zeros_like(mask), ~mask
    maps, masks = (
        (flat, 0 * flat, right),
        (mask, none, mask),
    )  # the first knows that there is a fault, the last also where
    found = Found((0, 1, 2), ("a", "a", "b"), torch.zeros(3), maps, masks, ())
    assert within_faulty(found, "a") == 0.5 and within_faulty(found, "b") == 1.0
    assert within_faulty(Found((0,), ("a",), torch.zeros(1), (right,), (other,), ()), "a") == 0.0
