"""Trials, and the log of those that are done: one that still holds is not run again."""

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from diptych.claims import train
from diptych.claims.claim import Arm, Claim, Trial
from diptych.claims.version import code_version
from diptych.config import fingerprint, from_json
from diptych.data.sources import AbstractSource, open_source
from diptych.errors import ConfigError, TrainingError
from diptych.files import write_text
from diptych.models.dual import DualEncoder
from diptych.training.log import read_rows
from diptych.training.recipe import Recipe

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Outcome:
    """One finished trial, a line of the log.

    Attributes:
        slug: Of the method that the claim is about.
        claim: Name of the setting.
        arm: Name of the arm.
        seed: Of the trial.
        split: What was measured on.
        changes: The point of the arm's grid.
        value: The metric; None for a training run that broke down.
        seconds: Of the whole trial, data and evaluation included.
        samples: Shown in training, repeats counted.
        code: Version of the code of each method that took part, by slug.
        sources: Fingerprint of each data set that the claim names.
        versions: Of packages.
        recipes: Fingerprints of the recipes that were trained, seeds aside.
        data: Fingerprints of what they were trained on.
        noted: Further numbers of the trial, by name.
    """

    slug: str
    claim: str
    arm: str
    seed: int
    split: Split
    changes: Mapping[str, Any]
    value: float | None
    seconds: float
    samples: int
    code: Mapping[str, str]
    sources: Mapping[str, str]
    versions: Mapping[str, str]
    recipes: tuple[str, ...]
    data: tuple[str, ...]
    noted: Mapping[str, float] = field(default_factory=dict)

    @property
    def question(self) -> tuple[object, ...]:
        """Return what was asked; equal questions have equal answers as long as code, data and packages stay as they are."""
        return self.slug, self.claim, self.arm, self.seed, self.split, fingerprint(self.changes)


class Bench:
    """Runs trials.

    Args:
        modules: Returns the module of a method by its slug.
        versions: Of packages, for the record.
    """

    def __init__(self, modules: Callable[[str], ModuleType], versions: Mapping[str, str]) -> None:
        self._modules, self._versions = modules, dict(versions)
        self._code = cache(self._code_of)
        self._source = cache(lambda spec: open_source(spec).fingerprint)
        self._trained = dict[tuple[str, int, int], tuple[AbstractSource, DualEncoder, int]]()

    def holds(self, outcome: Outcome, claim: Claim) -> bool:
        """Return whether a trial would be the same today: code, named data and packages are what they were."""
        return (
            outcome.versions == self._versions
            and outcome.sources == self._sources(claim)
            and all(self._code(slug) == version for slug, version in outcome.code.items())
        )

    def run(self, claim: Claim, arm: Arm, seed: int, split: Split, changes: Mapping[str, Any]) -> Outcome:
        """Run one trial.

        Raises:
            TrainingError: If a trial on the test split breaks down. On the validation split that is an answer: the point is no good.
        """
        # Versions are taken before the work, while the files are most likely still those that were imported.
        code = {claim.slug: self._code(claim.slug)}
        recipes, data, samples, noted = list[str](), list[str](), 0, dict[str, float]()

        def mini(slug: str) -> Recipe[Any]:
            code[slug] = self._code(slug)
            recipe: Recipe[Any] = self._modules(slug).mini()
            return recipe

        def train_one(
            recipe: Recipe[Any], source: AbstractSource, model: DualEncoder | None = None, *, shared: bool = False
        ) -> DualEncoder:
            nonlocal samples
            code[recipe.method] = self._code(recipe.method)
            if shared:
                trained, shown = self._shared(recipe, source, seed)
            else:
                module = self._modules(recipe.method)
                trained, shown = train.train_quietly(recipe, source, module, seed=seed, model=model)
            recipes.append(fingerprint(replace(recipe, seed=0)))
            data.append(source.fingerprint)
            samples += shown
            return trained

        def shown(count: int) -> None:
            nonlocal samples
            samples += count

        began = time.perf_counter()
        value = _measure(arm, Trial(seed, split, changes, mini, train_one, shown, noted.__setitem__))
        return Outcome(
            claim.slug,
            claim.name,
            arm.name,
            seed,
            split,
            dict(changes),
            value,
            round(time.perf_counter() - began, 3),
            samples,
            code,
            self._sources(claim),
            self._versions,
            tuple(recipes),
            tuple(data),
            noted,
        )

    def _shared(self, recipe: Recipe[Any], source: AbstractSource, seed: int) -> tuple[DualEncoder, int]:
        """Return a copy of what a recipe made of this very source with a seed, and how many samples it was shown; trained when first asked.

        The latest two are kept: arms of one seed follow one another.
        """
        asked = (fingerprint(replace(recipe, seed=0)), id(source), seed)  # kept sources keep their ids
        if asked not in self._trained:
            module = self._modules(recipe.method)
            self._trained[asked] = (source, *train.train_quietly(recipe, source, module, seed=seed))
            while len(self._trained) > 2:
                del self._trained[next(iter(self._trained))]
        _, model, shown = self._trained[asked]
        return copy.deepcopy(model), shown

    def _sources(self, claim: Claim) -> dict[str, str]:
        return {spec: self._source(spec) for spec in claim.sources}

    def _code_of(self, slug: str) -> str:
        file = self._modules(slug).__file__
        assert file is not None
        return code_version(Path(file), Path(train.__file__))


class Log:
    """Trials that are done, one line each, in a file that is made when the first is kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        rows = read_rows(path)
        if path.exists():  # a line cut short by a kill would spoil the one after it
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._found = {outcome.question: outcome for outcome in map(_read, rows) if outcome is not None}

    def find(self, claim: Claim, arm: Arm, seed: int, split: Split, changes: Mapping[str, Any]) -> Outcome | None:
        """Return the latest trial that answered this question, whatever has changed since."""
        return self._found.get((claim.slug, claim.name, arm.name, seed, split, fingerprint(changes)))

    def keep(self, outcome: Outcome) -> None:
        """Write down a trial."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        self._found[outcome.question] = outcome


def _measure(arm: Arm, trial: Trial) -> float | None:
    """Return the metric, or None for a validation trial that broke down."""
    where = f"{arm.name}, seed {trial.seed}, {trial.split}"
    try:
        value = float(arm.run(trial))
        if not math.isfinite(value):
            raise TrainingError(f"the metric is {value}.")
    except TrainingError as error:
        if trial.split == "validation":
            return None
        raise TrainingError(f"The trial {where} broke down: {error}") from error
    return value


def _read(row: Mapping[str, Any]) -> Outcome | None:
    """Return a line of the log; None for one that another version of this file wrote."""
    try:
        return from_json(Outcome, row)
    except ConfigError:
        return None
