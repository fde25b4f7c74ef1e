from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diptych.models.dual import DualEncoder
from diptych.models.text import AbstractTextTower
from diptych.types import Batch, Tokens, TowerOutput


class MeanOfTokens(AbstractTextTower):
    """The text tower of the official numbers of continual methods: the mean of the rows of a table."""

    by_row = False

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.width = table.shape[1]
        self.table = nn.Parameter(torch.from_numpy(table.copy()))

    def forward(self, ids, mask, *, layers=(), attention=()):
        del mask, layers, attention
        return TowerOutput(self.table[ids % len(self.table)].mean(1))


@pytest.fixture
def toy(make_model, monkeypatch) -> Callable[..., DualEncoder]:
    """Return a function that makes the linear dual encoder of the official numbers, in float64: images are vectors, given as `seen`."""
    monkeypatch.setattr("diptych.models.dual.normalise", lambda x: F.normalize(x, dim=-1))

    def make(numbers: dict[str, np.ndarray], prefix: str = "start") -> DualEncoder:
        model = make_model().double()
        model.vision.requires_grad_(False)
        weights = {"image_head": numbers[f"{prefix}_W_img"], "text_head": numbers[f"{prefix}_W_txt"]}
        for name, weight in weights.items():
            getattr(model, name).linear.weight = nn.Parameter(torch.from_numpy(weight.copy()))
        if f"{prefix}_table" in numbers:
            model.text = MeanOfTokens(numbers[f"{prefix}_table"])
        scale = f"{prefix}_logit_scale" if f"{prefix}_logit_scale" in numbers else f"{prefix}_log_scale"
        model.log_scale = nn.Parameter(torch.tensor(float(numbers[scale]), dtype=torch.float64))
        return model

    return make


@pytest.fixture
def tokens() -> Callable[..., Tokens]:
    """Return a function that makes tokens of ids whose keys are their row numbers."""

    def make(ids: np.ndarray) -> Tokens:
        return Tokens(torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.bool), torch.arange(len(ids)))

    return make


@pytest.fixture
def seen() -> Callable[..., Batch]:
    """Return a function that makes a batch of what an image tower saw, with the class of each as key of its text."""

    def make(images: np.ndarray, labels: Sequence[int]) -> Batch:
        n = len(images)
        text = Tokens(
            torch.zeros(n, 1, dtype=torch.int64), torch.ones(n, 1, dtype=torch.bool), torch.tensor([*map(int, labels)])
        )
        return Batch(tuple(map(str, range(n))), (TowerOutput(torch.from_numpy(images)),), (text,), torch.arange(n))

    return make
