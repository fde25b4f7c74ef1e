"""Where samples come from: anything with a length and random access."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

from diptych.types import Sample, Text


class AbstractSource(ABC):
    """Samples with random access; the same index always gives the same sample.

    Attributes:
        name: For logs and reports.
        notes: What was assumed when the source was opened, as plain sentences; shown to the user.
    """

    name: str
    notes: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Return one sample, its image not decoded.

        Raises:
            ImageError: If the image is missing.
        """

    @abstractmethod
    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the texts of one sample without touching its image."""

    @property
    def fingerprint(self) -> str:
        """Return a hash of length and texts, for the run's record of its data."""
        digest = hashlib.blake2b(f"{self.name}:{len(self)}".encode(), digest_size=8)
        for index in range(len(self)):
            digest.update("\x1f".join(text.text for text in self.texts(index)).encode())
        return digest.hexdigest()


class Subset(AbstractSource):
    """Some samples of another source, in the order given."""

    def __init__(self, source: AbstractSource, indices: Sequence[int], name: str) -> None:
        self.source = source
        self.indices = list(indices)
        self.name = name
        self.notes = source.notes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.indices[index]]

    def texts(self, index: int) -> tuple[Text, ...]:
        return self.source.texts(self.indices[index])
