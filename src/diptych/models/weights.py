"""One function that loads any model, one that writes it for other libraries. Local first; nothing is downloaded when `offline`."""

from importlib.resources import files
from pathlib import Path
from typing import Literal

from diptych.data.tokenizer import Tokenizer
from diptych.data.transforms import ImagePolicy
from diptych.errors import CheckpointError, nearest
from diptych.files import surviving
from diptych.models.checkpoint import load_model, save_model
from diptych.models.dual import DualEncoder
from diptych.models.huggingface import from_huggingface, to_huggingface
from diptych.models.openclip import from_openclip, to_openclip

SHIPPED = ("mini", "lite0-minilm")
CHECKPOINT = "checkpoint"
"""The folder inside a run directory that holds its model."""

FORMS = "a run directory, a checkpoint folder, mini, lite0-minilm, open_clip:NAME/PRETRAINED-or-path, hf:NAME-or-path"


def load(
    spec: str | Path,
    *,
    offline: bool = False,
    tokenizer: Tokenizer | None = None,
    image_policy: ImagePolicy | None = None,
) -> DualEncoder:
    """Return a model in eval mode on the CPU.

    Args:
        spec: A run directory or checkpoint folder; `mini`, our small model, shipped with the package; `lite0-minilm`, pretrained
            towers from pip packages (extra `pretrained`) with our heads; `open_clip:NAME/PRETRAINED`, where PRETRAINED is a tag or a
            local file; `hf:NAME`, a local folder or a name on the hub (CLIP and SigLIP families).
        offline: Never touch the network; otherwise local folders and caches are still looked at first.
        tokenizer: For `open_clip:` and `hf:` models that come without theirs.
        image_policy: For `hf:` models that come without their preprocessing.

    Raises:
        CheckpointError: If nothing can be loaded from `spec`.
        OfflineError: If it would have to be downloaded.
        MissingExtraError: If an optional package is needed.
    """
    text = str(spec)
    if text.startswith("open_clip:"):
        return from_openclip(text.removeprefix("open_clip:"), offline=offline, tokenizer=tokenizer)
    if text.startswith("hf:"):
        return from_huggingface(
            text.removeprefix("hf:"), offline=offline, tokenizer=tokenizer, image_policy=image_policy
        )
    if text in SHIPPED and not Path(text).exists():
        return load_model(Path(str(files("diptych.models") / "shipped" / text)))
    path = Path(spec)
    for folder in (path / CHECKPOINT, path):
        if (surviving(folder) / "model.json").exists():
            return load_model(folder)
    if path.exists():
        return load_model(path)  # says what is missing
    raise CheckpointError(f"There is no model {text!r}. {nearest(text, SHIPPED)} A model is {FORMS}.")


def convert(model: DualEncoder, folder: Path, to: Literal["open_clip", "hf", "diptych"]) -> None:
    """Write a model for another library, into `folder`, with its tokenizer and preprocessing.

    Raises:
        CheckpointError: If the other library has no such architecture.
    """
    {"open_clip": to_openclip, "hf": to_huggingface, "diptych": save_model}[to](model, folder)
