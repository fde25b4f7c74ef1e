"""A small module that was learnt beside a frozen model, in a folder of its own, without the model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diptych.errors import CheckpointError
from diptych.files import atomic_folder, surviving
from diptych.models.dual import DualEncoder

RECORD, WEIGHTS = "adapter.json", "adapter.safetensors"


def save_attachment(folder: Path, module: nn.Module, record: Mapping[str, Any], model: DualEncoder) -> None:
    """Write a module and what is needed to build it again, bound to the model that it was learnt on.

    Args:
        folder: Replaced as a whole.
        module: Its weights and buffers.
        record: JSON values.
        model: Is not written; the record keeps its fingerprint.
    """
    with atomic_folder(folder) as temporary:
        save_file(module.state_dict(), temporary / WEIGHTS)
        content = json.dumps({**record, "model": model.fingerprint}, indent=2)
        (temporary / RECORD).write_text(content + "\n", encoding="utf-8")


def read_attachment(
    folder: Path, model: DualEncoder, *, needs: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return record and weights that `save_attachment` wrote.

    Args:
        folder: Where they are.
        model: The one that they were learnt on.
        needs: Keys that the record must have.

    Raises:
        CheckpointError: If there is nothing to read, or it was learnt on another model.
    """
    folder = surviving(folder)
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
        made_for, *_ = [record[name] for name in ("model", *needs)]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no adapter that could be read: {error!r}") from error
    if made_for != model.fingerprint:
        raise CheckpointError(
            f"The adapter in {folder} was learnt on another model. Load the one that it was learnt on."
        )
    return record, weights
