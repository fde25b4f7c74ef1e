"""Everything a run needs to go on exactly where it was, saved in one atomic replacement.

`checkpoint/` holds the model (as `diptych.load` reads it) and, beside it, what only training needs: the moments of the optimiser, raw
weights when the saved ones are averages, the position of the loader and the state of the random generators. Tensors are
safetensors; nothing is pickled.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.data.loader import Loader, Position
from diptych.errors import CheckpointError, TrainingError
from diptych.files import atomic_folder, surviving, sweep
from diptych.models.checkpoint import write_model
from diptych.models.weights import CHECKPOINT
from diptych.training import distributed
from diptych.training.optim import WeightAverage
from diptych.types import Encoded
from diptych.verbs import AbstractObjective


@dataclass(frozen=True)
class RunState:
    """What changes while a run is on.

    Attributes:
        objective: Holds the model and its own parameters.
        optimizer: With its moments.
        average: Averaged weights, if the recipe asks for them.
        loader: With its position.
    """

    objective: AbstractObjective[Encoded]
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    loader: Loader

    @contextmanager
    def final_weights(self) -> Iterator[None]:
        """Give the objective the weights that count, in eval mode, while the context is open: the averaged ones if there are any."""
        modes = {module: module.training for module in self.objective.modules()}
        self.objective.eval()
        self.adopt_final_weights()
        try:
            yield
        finally:
            self.adopt_final_weights()
            for module, mode in modes.items():
                module.training = mode

    def adopt_final_weights(self) -> None:
        """Exchange raw and averaged weights; nothing to do without an average."""
        if self.average is not None:
            self.average.swap(self.objective)

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of whatever may change in a run, by name: weights, buffers, moments, averages, generator states.

        Moments that do not exist yet, before the first step, are zeros. Frozen parameters of the model are left out: they are in its
        own file. Those outside of the model are kept, since an objective may move them itself, as it does a teacher's.
        """
        trained = {name: p for name, p in self.objective.named_parameters() if p.requires_grad}
        still = {name for name, _ in self.objective.model.named_parameters(prefix="model")} - set(trained)
        found = {f"weight.{name}": value for name, value in self.objective.state_dict().items() if name not in still}
        for name, parameter in trained.items():
            moments = self.optimizer.state[parameter] or _zero_moments(parameter)
            found |= {f"{moment}.{name}": value for moment, value in moments.items()}
        if self.average is not None:
            found |= {f"average.{name}": value for name, value in self.average.average.items()}
        found |= _generator_states()
        return {name: value.clone() for name, value in found.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` returned."""
        own = self.objective.state_dict()
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "weight":
                own[rest].copy_(value)
            elif kind == "average" and self.average is not None:
                self.average.average[rest].copy_(value)
        for name, parameter in self.objective.named_parameters():
            if parameter.requires_grad:
                self.optimizer.state[parameter] = {
                    moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in _zero_moments(parameter)
                }
        rank = distributed.part()[0]
        if (state := tensors.get(f"generator.cpu.{rank}")) is not None:
            torch.set_rng_state(state)
        if (state := tensors.get(f"generator.cuda.{rank}")) is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state)


def _generator_states() -> dict[str, Tensor]:
    """Return the states of the random generators of all processes, which draw different dropout."""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    everyone = distributed.gather_objects(own)
    return {f"generator.{kind}.{rank}": state for rank, states in enumerate(everyone) for kind, state in states.items()}


def _zero_moments(parameter: Tensor) -> dict[str, Tensor]:
    """Return what AdamW keeps for one parameter, as it is before the first step."""
    return {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _shape(tensors: dict[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def save(state: RunState, folder: Path, step: int) -> None:
    """Replace the checkpoint of a run directory; killed at any moment, the old one or the new one is there, whole.

    Of several processes the first one writes; all must call this.

    Raises:
        TrainingError: If it cannot be written, for example because the disk is full; the old one stays.
    """
    tensors = state.tensors()
    if not distributed.is_first():
        return
    try:
        with atomic_folder(folder / CHECKPOINT) as target:
            with state.final_weights():
                write_model(state.objective.model, target)
            save_file(tensors, target / "training.safetensors")
            record = {"step": step, "position": asdict(state.loader.position), "skipped": state.loader.skipped}
            (target / "training.json").write_text(json.dumps(record))
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"The checkpoint of step {step} could not be written to {folder}: {error}. "
            "The one before it is whole: make room on the disk, then resume."
        ) from error


def restore(state: RunState, folder: Path) -> int:
    """Put a saved state back; return its step, 0 when there is no checkpoint yet.

    Raises:
        CheckpointError: If the checkpoint belongs to other parameters, or is damaged.
    """
    source = surviving(folder / CHECKPOINT)
    if distributed.is_first():
        sweep(folder / CHECKPOINT)
    if not (source / "training.json").exists():
        return 0
    try:
        saved = load_file(source / "training.safetensors")
        record = json.loads((source / "training.json").read_text())
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be read: {error}. Start a new run in another folder.") from error
    expected = state.tensors()
    # A machine with a GPU has one generator more than one without.
    names = {name for name in {*saved, *expected} if not name.startswith("generator.")}
    strange = sorted(name for name in names if _shape(saved, name) != _shape(expected, name))
    if strange:
        raise CheckpointError(
            f"{source} was saved by a run with other parameters (first difference: {strange[0]}). "
            "Resume with the recipe.json of that run, or start a new run in another folder."
        )
    state.load(saved)
    state.loader.position, state.loader.skipped = Position(**record["position"]), record["skipped"]
    return int(record["step"])
