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
    from diptych.models.perturbation import AbstractPerturbation

E = TypeVar("E", bound=Encoded)


class AbstractCurator(ABC):
    """Rewrites or filters a table of pairs.

    Rows stay where they are. The column `reason` (strings, made if absent) says what dropped a row and is null while the row is kept;
    rows that have a reason pass through untouched. So curators follow one another, and nothing is lost. As a step of `diptych curate`,
    which gives tables in pieces, what becomes of a row must follow from that row alone; what has to see all rows is a surveyor.

    Attributes:
        reads_images: Whether the table must have a column `image` (encoded bytes, null where there is none).
    """

    reads_images: bool = False

    @abstractmethod
    def curate(self, table: "pa.Table") -> "pa.Table":
        """Return the table with `reason`, and maybe with more columns or other texts."""


class AbstractSurveyor(ABC):
    """A curator that has to see all rows first: `survey` looks at each part, `merge` joins what was found, `informed` curates with it.

    Parts may be cut anywhere and come from any process; the result must not depend on that. Rows with a reason are not looked at.

    Attributes:
        reads_images: As a curator's, for `survey`; what `informed` returns has its own.
    """

    reads_images: bool = False

    @abstractmethod
    def survey(self, table: "pa.Table") -> "pa.Table":
        """Return what must be known of some rows, as a table of any columns; those of several parts are put one behind the other."""

    @abstractmethod
    def merge(self, surveys: "Iterable[pa.Table]") -> "pa.Table":
        """Return what must be known of all rows. `surveys` come in the order of the source and can be gone through several times."""

    @abstractmethod
    def informed(self, merged: "pa.Table") -> AbstractCurator:
        """Return the curator that knows about all rows."""


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
    """Makes a trained model fit for another use; may train nothing.

    Where it learns a classifier, the predictor is a `Classifier` (`evaluation/classifier.py`), which `diptych adapt` saves and measures.
    """

    @abstractmethod
    def fit(self, model: "DualEncoder", data: "AbstractSource") -> Callable[[Batch], object]:
        """Return a predictor for batches."""


class AbstractAttack(ABC):
    """Finds changes of images, and maybe a word for captions, that break a model, to audit it."""

    @abstractmethod
    def fit(self, model: "DualEncoder", data: "AbstractSource") -> "AbstractPerturbation":
        """Return the perturbation that was learnt from white-box access to a model, which is left as it was."""


class AbstractProbe(ABC):
    """Measures a property of a trained model."""

    @abstractmethod
    def measure(self, model: "DualEncoder", data: "AbstractSource") -> Report:
        """Return the numbers, each with its interval."""
