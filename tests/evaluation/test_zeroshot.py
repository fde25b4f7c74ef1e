import json
from hashlib import blake2b
from importlib.resources import files

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from diptych.errors import ConfigError, EvaluationError
from diptych.evaluation.zeroshot import Prompts, class_embeddings, read_prompts, zero_shot

PROMPTS = Prompts("two", ("a {}.", "the {}."), "0")
NAMES = tuple("abcdefgh")


def random_embeddings(n: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_every_prompt_file_is_usable_and_its_hash_is_that_of_its_bytes():
    folder = files("diptych.evaluation") / "prompts"
    names = sorted(entry.name.removesuffix(".json") for entry in folder.iterdir())
    assert names == ["name", "overhead", "photo", "style"]
    for name in names:
        content = (folder / f"{name}.json").read_bytes()
        prompts = read_prompts(name)
        assert prompts.digest == blake2b(content, digest_size=8).hexdigest()
        assert prompts.templates == tuple(json.loads(content)["templates"])
        assert all(template.count("{}") == 1 for template in prompts.templates)
        assert len(set(prompts.templates)) == len(prompts.templates)


def test_an_unknown_prompt_file_names_the_nearest():
    with pytest.raises(ConfigError, match=r"Did you mean 'photo'\? Known: name, overhead, photo, style"):
        read_prompts("photos")


def test_a_class_is_the_normalised_mean_of_its_prompts():
    asked: list[str] = []

    def embed(texts):
        asked.extend(texts)
        return torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])

    found = class_embeddings(embed, ["fire_truck", "cat {x}"], PROMPTS)
    assert asked == ["a fire truck.", "the fire truck.", "a cat {x}.", "the cat {x}."]
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]]))


def test_accuracies_equal_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    images, vectors = random_embeddings(60, 0), random_embeddings(8, 1)
    labels = torch.arange(60) ** 2 % 8  # classes of very different sizes, some empty
    found = zero_shot(images, vectors, labels, NAMES, PROMPTS)
    scores = (images @ vectors.T).numpy()
    guesses = scores.argmax(1)
    top5 = metrics.top_k_accuracy_score(labels, scores, k=5, labels=np.arange(8))
    assert found.top1.value == pytest.approx(metrics.accuracy_score(labels, guesses))
    assert found.top5 is not None and found.top5.value == pytest.approx(top5)
    assert found.mean_per_class.value == pytest.approx(
        np.mean([(guesses == c)[labels == c].mean() for c in set(labels.tolist())])
    )
    assert found.correct.tolist() == (guesses == labels.numpy()).tolist()


def test_a_perfect_model_however_unequal_the_classes():
    found = zero_shot(
        torch.eye(3)[[0] * 20 + [1] * 2 + [2]], torch.eye(3), torch.tensor([0] * 20 + [1, 1, 2]), NAMES[:3], PROMPTS
    )
    for interval, count in ((found.top1, 23), (found.mean_per_class, 3)):
        assert (interval.value, interval.low, interval.high) == (1, 0.025 ** (1 / count), 1)
    assert found.top5 is None


def test_equal_class_vectors_score_nothing():
    vectors = random_embeddings(1, 0).expand(4, -1)
    assert zero_shot(random_embeddings(9, 1), vectors, torch.arange(9) % 4, NAMES[:4], PROMPTS).top1.value == 0


def test_domains_are_measured_apart():
    images, labels = torch.eye(2)[[0, 1, 0, 0]], torch.tensor([0, 1, 0, 1])
    found = zero_shot(images, torch.eye(2), labels, NAMES[:2], PROMPTS, domains=("photo", "photo", "sketch", "sketch"))
    assert {name: interval.value for name, interval in found.by_domain.items()} == {"photo": 1.0, "sketch": 0.5}
    assert zero_shot(images, torch.eye(2), labels, NAMES[:2], PROMPTS).by_domain == {}


def test_undefined_input_is_refused():
    with pytest.raises(EvaluationError, match="at least two classes"):
        zero_shot(torch.eye(2), torch.eye(2)[:1], torch.tensor([0, 0]), ["cat"], PROMPTS)
    with pytest.raises(EvaluationError, match="not finite"):
        zero_shot(torch.full((2, 2), torch.nan), torch.eye(2), torch.tensor([0, 1]), ["cat", "dog"], PROMPTS)
