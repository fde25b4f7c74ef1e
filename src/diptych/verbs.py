"""The five verbs. A method is one class that implements one of them.

The seam that pays for everything is `encode` | `loss` of `AbstractObjective`: `encode` is per sample and may be cut into chunks,
`loss` sees the whole global batch. Accumulation, gradient caching, gathering across processes and tests on hand-written
embeddings all attach there.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import nn

from diptych.types import Batch, Encoded, Losses, Report

if TYPE_CHECKING:
    import pyarrow as pa

    from diptych.data.sources import AbstractSource
    from diptych.models.dual import DualEncoder

E = TypeVar("E", bound=Encoded)


class AbstractCurator(ABC):
    """Rewrites or filters a table of pairs."""

    @abstractmethod
    def curate(self, table: "pa.Table") -> "pa.Table":
        """Return the table with a `reason` column that says what happened to each row."""


class AbstractObjective(nn.Module, ABC, Generic[E]):
    """Something to train for. It owns the model, so one `nn.Module` goes to DDP, the optimiser, the EMA and the checkpoint.

    Attributes:
        model: The dual encoder that is evaluated and saved.
    """

    model: "DualEncoder"

    @abstractmethod
    def encode(self, batch: Batch) -> E:
        """Return what `loss` needs, sample by sample: no sample may look at another one here."""

    @abstractmethod
    def loss(self, encoded: E, batch: Batch) -> Losses:
        """Return the loss of the global batch. `batch` holds the same samples as `encoded`."""

    def forward(self, batch: Batch) -> Losses:
        """Return `loss(encode(batch), batch)`, for Lightning or Trainer users and for plain steps."""
        return self.loss(self.encode(batch), batch)

    def after_step(self, step: int) -> None:
        """Do what must follow optimiser step number `step`, such as moving an EMA teacher. Nothing by default."""
        del step


class AbstractAdapter(ABC):
    """Makes a trained model fit for another use; may train nothing."""

    @abstractmethod
    def fit(self, model: "DualEncoder", data: "AbstractSource") -> Callable[[Batch], object]:
        """Return a predictor for batches."""


class AbstractAttack(ABC):
    """Finds inputs that break a model, to audit it."""

    @abstractmethod
    def fit(self, model: "DualEncoder", data: Iterable[Batch]) -> None:
        """Learn the perturbation from white-box access to `model`."""

    @abstractmethod
    def perturb(self, batch: Batch) -> Batch:
        """Return the batch with the learnt perturbation applied."""


class AbstractProbe(ABC):
    """Measures a property of a trained model."""

    @abstractmethod
    def measure(self, model: "DualEncoder", data: "AbstractSource") -> Report:
        """Return the numbers, each with its interval."""
