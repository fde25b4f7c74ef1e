"""A model on disk: a folder with `model.json`, `model.safetensors` and `tokenizer.json`. Nothing is ever unpickled.

`model.json` carries the preprocessing, because wrong preprocessing is the field's most common silent bug: weights without it do not
load.
"""

import json
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from diptych.config import from_json, to_json
from diptych.data.tokenizer import Tokenizer
from diptych.errors import CheckpointError
from diptych.files import atomic_folder, surviving
from diptych.models.build import DualConfig, build
from diptych.models.dual import DualEncoder
from diptych.models.foreign import HFTextConfig, HFTextTower, equals_source, load_source, source_tokenizer
from diptych.models.modes import is_frozen, merged_state
from diptych.models.shards import Shards

FORMAT = 1
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}


def save_model(model: DualEncoder, folder: Path, *, half: bool = False) -> None:
    """Write a model so that `folder` holds the old one or the new one, whole, whatever happens.

    Args:
        model: LoRA updates are merged into the weights that are written.
        folder: Replaced if it exists.
        half: Store fp16, half the size; weights above 65,504 would overflow.
    """
    with atomic_folder(folder) as target:
        write_model(model, target, half=half)


def write_model(model: DualEncoder, folder: Path, *, half: bool = False) -> None:
    """Write a model's files into an existing folder.

    Frozen towers that are as an installed package holds them are left out, and so is the tokenizer that comes with them.
    """
    weights = {
        name: (value.half() if half and value.is_floating_point() else value).contiguous().cpu()
        for name, value in saved_weights(model).items()
    }
    save_file(weights, folder / "model.safetensors")
    write_record(model, folder, weights)


def saved_weights(model: DualEncoder) -> dict[str, Tensor]:
    """Return the weights that a checkpoint holds, where they are, and cut where they are cut."""
    towers = {"vision": model.vision, "text": model.text}
    omitted = [name for name, tower in towers.items() if is_frozen(tower) and equals_source(tower)]
    return {name: value for name, value in merged_state(model).items() if name.partition(".")[0] not in omitted}


def write_record(model: DualEncoder, folder: Path, weights: Collection[str]) -> None:
    """Write what a checkpoint holds beside the weights of these names: `model.json` and `tokenizer.json`."""
    held = {name.partition(".")[0] for name in weights}
    omitted = [name for name in ("vision", "text") if name not in held]
    record = {"format": FORMAT, "diptych": version("diptych"), "omitted": omitted, "model": to_json(model.config)}
    if isinstance(model.text, HFTextTower) and "text" not in omitted:
        record["text"] = model.text.record  # the folder that it was made from may be gone when it is loaded
    if model.tokenizer.to_json() != _source_tokenizer(model.config, omitted):
        (folder / "tokenizer.json").write_text(model.tokenizer.to_json())
    (folder / "model.json").write_text(json.dumps(record, indent=2))


def load_model(folder: Path) -> DualEncoder:
    """Return the model in a folder, on the CPU, in eval mode.

    Raises:
        CheckpointError: If the folder holds no diptych model, or a damaged one.
    """
    folder = surviving(folder)
    if folder.suffix in PICKLES:
        raise CheckpointError(
            f"{folder} is a pickle file; loading one can run any code inside it, so diptych never does. "
            "Convert it to safetensors with the library that wrote it."
        )
    if not (folder / "model.json").is_file():
        raise CheckpointError(
            f"{folder} has no model.json. A diptych checkpoint is a folder with model.json (architecture and preprocessing), "
            "model.safetensors and tokenizer.json; weights without their preprocessing are not loaded."
        )
    try:
        record = json.loads((folder / "model.json").read_text())
    except ValueError as error:
        raise CheckpointError(f"{folder / 'model.json'} cannot be read: {error}. Use an earlier checkpoint.") from error
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has format {record.get('format')}; this diptych reads {FORMAT}. Update diptych."
        )
    config = from_json(DualConfig, record["model"])
    own = folder / "tokenizer.json"
    vocabulary = own.read_text() if own.exists() else _source_tokenizer(config, record["omitted"])
    if vocabulary is None:
        raise CheckpointError(f"{folder} has no tokenizer.json, and without it its text embeddings would be noise.")
    try:
        tokenizer = Tokenizer.from_json(vocabulary, config.text_policy)
    except Exception as error:  # the engine raises no finer kind
        raise CheckpointError(f"{own} cannot be read: {error}. Use an earlier checkpoint.") from error
    model = build(config, tokenizer, text_record=record.get("text"))
    for name in record["omitted"]:
        load_source(getattr(model, name))
    try:
        weights = Shards(folder, "model").whole()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{folder / 'model.safetensors'} cannot be read: {error}. Use an earlier checkpoint."
        ) from error
    _load_weights(model, weights, record["omitted"], folder)
    return model.eval()


def _source_tokenizer(config: DualConfig, omitted: list[str]) -> str | None:
    """Return the tokenizer that comes with an omitted text tower, in our engine's own spelling."""
    if "text" not in omitted or not isinstance(config.text, HFTextConfig):
        return None
    return source_tokenizer(config.text.path, config.text_policy).to_json()


def _load_weights(model: DualEncoder, weights: dict[str, Tensor], omitted: list[str], folder: Path) -> None:
    wanted = {name: value for name, value in model.state_dict().items() if name.partition(".")[0] not in omitted}
    problems = [f"lacks {name}" for name in wanted if name not in weights]
    problems += [f"has an unknown {name}" for name in weights if name not in wanted]
    problems += [
        f"has {name} of shape {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        raise CheckpointError(
            f"{folder / 'model.safetensors'} does not fit its model.json: it {problems[0]} "
            f"({len(problems)} differences). The two files belong to different models."
        )
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(weights[name])
