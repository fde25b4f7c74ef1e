"""A source cut into the tasks of a stream: by class, by domain, or into slices of time."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from diptych.data.sources import AbstractSource, Joined, Subset
from diptych.errors import ConfigError, DataError, nearest
from diptych.types import Sample, Text


class Prompted(AbstractSource):
    """The samples of another source with one text each, the prompt of their class."""

    def __init__(self, source: AbstractSource, template: str = "a photo of a {}.") -> None:
        self.source, self.template = source, template
        self.name, self.notes, self.chances = source.name, source.notes, source.chances
        self.order, self.run_length = source.order, source.run_length

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return self._prompted(self.source[index])

    def without_image(self, index: int) -> Sample:
        """Return one sample without its image."""
        return self._prompted(self.source.without_image(index))

    def texts(self, index: int) -> tuple[Text, ...]:
        """Return the prompt of one sample's class."""
        return self.without_image(index).texts

    def _prompted(self, sample: Sample) -> Sample:
        if sample.label is None:
            raise DataError(f"{sample.key!r} of {self.name} has no label. Name the column with columns.label.")
        return replace(sample, texts=(Text(prompt(sample.label, self.template), "label"),))


def prompt(label: str, template: str = "a photo of a {}.") -> str:
    """Return the template with the name of a class in it, underscores as spaces."""
    return template.format(label.replace("_", " "))


def by_class(source: AbstractSource, groups: Sequence[Sequence[str]]) -> tuple[Subset, ...]:
    """Return one source per group of classes: the tasks of class-incremental learning.

    Raises:
        ConfigError: If a class is in two groups, or has no sample.
    """
    labels = [source.without_image(index).label for index in range(len(source))]
    names = [name for group in groups for name in group]
    if strange := sorted({name for name in names if names.count(name) > 1 or name not in labels}):
        raise ConfigError(
            f"Each class is in one group and has samples in {source.name}; these are not: {', '.join(strange)}."
        )
    return tuple(
        Subset(source, [row for row, label in enumerate(labels) if label in group], f"{source.name} (part {number})")
        for number, group in enumerate(map(set, groups), 1)
    )


def by_domain(source: AbstractSource) -> dict[str, Subset]:
    """Return the samples of each domain, sorted by its name: the tasks of domain-incremental learning.

    Raises:
        DataError: If no sample has a domain.
    """
    domains = [source.without_image(index).domain for index in range(len(source))]
    names = sorted({domain for domain in domains if domain is not None})
    if not names:
        raise DataError(f"{source.name} has no domains. Name the column that holds them with columns.domain.")
    return {
        name: Subset(source, [row for row, domain in enumerate(domains) if domain == name], f"{source.name}:{name}")
        for name in names
    }


def one_domain(source: AbstractSource, name: str) -> Subset:
    """Return the samples of one domain.

    Raises:
        DataError: If no sample has a domain.
        ConfigError: If there is no such domain; names the nearest.
    """
    found = by_domain(source)
    if name not in found:
        raise ConfigError(f"{source.name} has no domain {name!r}. {nearest(name, found)}")
    return found[name]


def one_against_others(
    source: AbstractSource, one: str, others: Sequence[str] = ()
) -> tuple[AbstractSource, AbstractSource]:
    """Return the samples of one domain, and those of others; all others when none are named.

    Raises:
        DataError: If no sample has a domain.
        ConfigError: If a domain has no samples, or is on both sides, or there is no other.
    """
    found = by_domain(source)
    wanted = tuple(others) or tuple(name for name in found if name != one)
    if not wanted or one in wanted or {one, *wanted} - set(found):
        raise ConfigError(
            f"{one} against {', '.join(wanted) or 'nothing'}: {source.name} has the domains {', '.join(found)}, and one of them is set against "
            "others."
        )
    return found[one], Joined([found[name] for name in wanted])


def slices(source: AbstractSource, count: int) -> tuple[Subset, ...]:
    """Return contiguous slices whose sizes differ by one at most, in the order of the source: a stream of pairs in time.

    Raises:
        ConfigError: If there are fewer samples than slices.
    """
    if not 1 <= count <= len(source):
        raise ConfigError(
            f"{source.name} has {len(source)} samples, which make 1 to {len(source)} slices, not {count}."
        )
    ends = [len(source) * number // count for number in range(count + 1)]
    return tuple(
        Subset(source, range(start, end), f"{source.name} (slice {number})")
        for number, (start, end) in enumerate(pairwise(ends), 1)
    )
