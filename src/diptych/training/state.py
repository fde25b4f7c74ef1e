"""Everything a run needs to go on exactly where it was, saved in one atomic replacement.

`checkpoint/` holds the model (as `diptych.load` reads it) and, beside it, what only training needs: the moments of the optimiser, raw
weights when the saved ones are averages, the position of the loader and the state of the random generators. Tensors are
safetensors; nothing is pickled. Where towers are sharded, each process writes the parts that it has, and the checkpoint is replaced when all
are there; any number of processes, and a run that does not shard, can go on from it.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from diptych.data.loader import Loader, Position
from diptych.errors import CheckpointError, TrainingError
from diptych.files import atomic_file, atomic_folder, surviving, sweep
from diptych.models.checkpoint import load_model, saved_weights, write_model, write_record
from diptych.models.dual import DualEncoder
from diptych.models.shards import Shards, shard_name, shard_paths
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
        """Put back what `tensors` returned; of what is cut, the rows of this process."""
        own = self.objective.state_dict()
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "weight":
                distributed.own_part(own[rest]).copy_(value)
            elif kind == "average" and self.average is not None:
                distributed.own_part(self.average.average[rest]).copy_(value)
        for name, parameter in self.objective.named_parameters():
            if parameter.requires_grad:
                moments = self.optimizer.state[parameter] = _zero_moments(parameter)
                for moment, kept in moments.items():
                    distributed.own_part(kept).copy_(tensors[f"{moment}.{name}"])
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


def save(state: RunState, folder: Path, step: int) -> None:
    """Replace the checkpoint of a run directory; killed at any moment, the old one or the new one is there, whole.

    Of several processes the first one writes; where towers are sharded, each writes its parts. All must call this.

    Raises:
        TrainingError: If it cannot be written, for example because the disk is full; the old one stays.
    """
    write = _write_shards if distributed.is_sharded(state.objective) else _write_whole
    try:
        write(state, folder / CHECKPOINT, step)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"The checkpoint of step {step} could not be written to {folder}: {error}. "
            "The one before it is whole: make room on the disk, then resume."
        ) from error


def _write_whole(state: RunState, place: Path, step: int) -> None:
    tensors = state.tensors()
    if not distributed.is_first():
        return
    with atomic_folder(place) as target:
        with state.final_weights():
            write_model(state.objective.model, target)
        save_file(tensors, target / "training.safetensors")
        _write_progress(state, target, step)


def _write_shards(state: RunState, place: Path, step: int) -> None:
    """Let every process fill the first one's folder, which takes the place of the old one when all have said that they are done."""
    with state.final_weights():
        model = {name: value.clone() for name, value in saved_weights(state.objective.model).items()}
    content = {"model": model, "training": state.tensors()}
    with atomic_folder(place) if distributed.is_first() else nullcontext(Path()) as made:
        target: Path = distributed.gather_objects(made)[0]
        problem = None
        try:
            _write_parts(content, target)
            if distributed.is_first():
                write_record(state.objective.model, target, model)
                _write_progress(state, target, step)
        except (OSError, SafetensorError) as error:
            problem = str(error)
        for rank, other in enumerate(distributed.gather_objects(problem)):
            if other is not None:
                raise OSError(f"process {rank}: {other}")


def _write_parts(content: Mapping[str, dict[str, Tensor]], target: Path) -> None:
    """Write what this process has of each group of tensors; the first process also has those that are not cut."""
    if not target.is_dir():
        raise FileNotFoundError(f"{target} is not there. All processes must see the same disk")
    for stem, tensors in content.items():
        own = {
            name: distributed.own_part(tensor).contiguous().cpu()
            for name, tensor in tensors.items()
            if distributed.is_cut(tensor) or distributed.is_first()
        }
        with atomic_file(target / shard_name(stem, distributed.part())) as path:
            save_file(own, path)


def _write_progress(state: RunState, target: Path, step: int) -> None:
    record = {
        "step": step,
        "position": asdict(state.loader.position),
        "skipped": state.loader.skipped,
        "batch": _batch(state.loader),
    }
    (target / "training.json").write_text(json.dumps(record))


def _batch(loader: Loader) -> int:
    """Return the samples that one batch holds over all processes."""
    return loader.batch_size * distributed.part()[1]


def restore(state: RunState, folder: Path) -> int:
    """Put a saved state back; return its step, 0 when there is no checkpoint yet.

    Raises:
        CheckpointError: If the checkpoint belongs to other parameters or batches, or is damaged.
    """
    source = surviving(folder / CHECKPOINT)
    if distributed.is_first():
        sweep(folder / CHECKPOINT)
    if not (source / "training.json").exists():
        return 0
    try:
        saved = Shards(source, "training")
        record = json.loads((source / "training.json").read_text())
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be read: {error}. Start a new run in another folder.") from error
    expected = state.tensors()
    # A machine with a GPU has one generator more than one without, and each process its own.
    names = {name for name in {*saved.names, *expected} if not name.startswith("generator.")}
    strange = sorted(name for name in names if _saved_shape(saved, name) != _shape(expected, name))
    if strange:
        raise CheckpointError(
            f"{source} was saved by a run with other parameters (first difference: {strange[0]}). "
            "Resume with the recipe.json of that run, or start a new run in another folder."
        )
    if absent := [name for name in ("step", "position", "skipped", "batch") if name not in record]:
        raise CheckpointError(
            f"{source / 'training.json'} does not say {', '.join(absent)}: an older version of diptych wrote it. Its model can be used; start a "
            "new run from it in another folder."
        )
    if record["batch"] != _batch(state.loader):
        raise CheckpointError(
            f"{source} was saved by a run with batches of {record['batch']} over all processes; now they hold {_batch(state.loader)}. With "
            f"{distributed.part()[1]} processes, set data.batch_size to {record['batch'] / distributed.part()[1]:g}."
        )
    state.load(
        {
            name: saved.rows(name, *distributed.own_rows(value))
            for name, value in expected.items()
            if name in saved.names
        }
    )
    state.loader.position, state.loader.skipped = Position(**record["position"]), record["skipped"]
    return int(record["step"])


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


def _saved_shape(saved: Shards, name: str) -> tuple[int, ...] | None:
    return saved.shape(name) if name in saved.names else None


def join_shards(model: DualEncoder, folder: Path) -> None:
    """Make a sharded model whole again in every process, from the last checkpoint of its run; there, too, one file takes the place of shards."""
    source = surviving(folder / CHECKPOINT)
    if distributed.is_first():
        paths = shard_paths(source, "model")
        with atomic_file(source / "model.safetensors") as path:
            save_file(Shards(source, "model").whole(), path)
        for shard in paths:
            if shard.name != "model.safetensors":
                shard.unlink()
    distributed.wait()
    saved = load_model(source).to(model.device)
    for name in ("vision", "text"):
        if distributed.is_sharded(getattr(model, name)):
            setattr(model, name, getattr(saved, name))
    model.load_state_dict(saved.state_dict())
