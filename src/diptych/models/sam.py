"""SAM of transformers as a promptable segmenter (extra `hf`): what its last block attends to, and masks for points, boxes and a mask."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.errors import CheckpointError, require
from diptych.models.segmenters import Looked, Masks, Prompts, SelfAttention, out_of_square


def load_sam(folder: str | Path) -> "Sam":
    """Return the segmenter in a folder of transformers; nothing is downloaded.

    Raises:
        CheckpointError: If it is no SAM whose last block attends to the whole image, or lacks weights or preprocessing.
        MissingExtraError: Without transformers.
    """
    folder = Path(folder)
    vision = read_settings(folder, ("sam",)).get("vision_config", {})
    if vision.get("num_hidden_layers", 12) - 1 not in vision.get("global_attn_indexes", (2, 5, 8, 11)):
        raise CheckpointError(f"The last block of {folder} attends to windows; this needs one over the whole image.")
    record = preprocessing(folder)
    model = require("transformers", "hf").SamModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return Sam(model.eval(), record["image_mean"], record["image_std"])


def read_settings(folder: Path, families: tuple[str, ...]) -> dict[str, Any]:
    """Return the config.json of a folder of transformers that must be of one of these families.

    Raises:
        CheckpointError: If it is not there, or of another family.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"A folder with the config.json of a transformers model is needed; {folder} has none.")
    settings: dict[str, Any] = json.loads(file.read_text())
    if settings.get("model_type") not in families:
        raise CheckpointError(
            f"{folder} holds a {settings.get('model_type')!r} model; needed is one of {', '.join(families)}."
        )
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"{folder} has no model.safetensors; pickled weights are never loaded.")
    return settings


def preprocessing(folder: Path) -> dict[str, Any]:
    """Return the preprocessor_config.json of a folder.

    Raises:
        CheckpointError: If it is not there or says no mean and standard deviation: features would be silently spoilt.
    """
    file = folder / "preprocessor_config.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if not {"image_mean", "image_std"} <= set(record):
        raise CheckpointError(
            f"{folder} must say image_mean and image_std in preprocessor_config.json; save the model's own record there."
        )
    return record


class Sam:
    """Looks at images with a SamModel. The image is resized, its longer side to the encoder's, to whole patches, and padded with zeros."""

    def __init__(self, model: Any, mean: list[float], std: list[float]) -> None:
        self.model = model
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    @torch.inference_mode()
    def __call__(self, image: UInt8[Tensor, "3 h w"]) -> Looked:
        """Return attention over the valid part of the grid, and masks for prompts; the encoder is asked once."""
        vision = self.model.config.vision_config
        side, patch = int(vision.image_size), int(vision.patch_size)
        height, width = image.shape[1:]
        rows, columns = (-(-length * side // max(height, width) // patch) for length in (height, width))
        size = (rows * patch, columns * patch)
        pixels = F.interpolate(image[None].float() / 255, size, mode="bilinear", antialias=True)[0]
        pixels = ((pixels.cpu() - self.mean) / self.std).to(self.model.device)
        padded = F.pad(pixels, (0, side - size[1], 0, side - size[0]))[None]
        last = self.model.vision_encoder.layers[-1].attn
        embedding, stream = _seen(lambda: self.model.vision_encoder(padded).last_hidden_state, last)
        scale = (size[1] / width, size[0] / height)
        answer = partial(self._answer, embedding, scale, (height, width))
        return Looked(_attention(last, stream, (rows, columns)), answer, 4 * side // patch)

    @torch.inference_mode()
    def _answer(self, embedding: Tensor, scale: tuple[float, float], size: tuple[int, int], prompts: Prompts) -> Masks:
        points = prompts.points.to(embedding) * torch.tensor(scale).to(embedding)
        boxes = prompts.boxes.to(embedding) * torch.tensor(scale * 2).to(embedding)
        said = self.model(
            image_embeddings=embedding,
            input_points=points[None, :, None],
            input_labels=torch.ones(1, len(points), 1, dtype=torch.long, device=embedding.device),
            input_boxes=boxes[None],
            input_masks=prompts.mask.to(embedding)[None, None],
            multimask_output=False,
        )
        return Masks(out_of_square(said.pred_masks[0, :, 0].float(), size), said.iou_scores[0, :, 0].float())


def _seen(look: Callable[[], Tensor], attention: nn.Module) -> tuple[Tensor, Float[Tensor, "1 h w c"]]:
    """Return what a pass gives, and what an attention in it was given."""
    given: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        del module
        given.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        return look(), given[0]
    finally:
        handle.remove()


def _attention(attention: Any, stream: Tensor, grid: tuple[int, int]) -> SelfAttention:
    """Return the attention of SAM over the valid part of its padded grid; probabilities are over all of it, as its own are."""
    _, height, width, _ = stream.shape
    heads = attention.num_attention_heads
    query, key, value = attention.qkv(stream).view(height * width, 3, heads, -1).permute(1, 2, 0, 3)
    valid = torch.arange(height * width, device=stream.device).view(height, width)[: grid[0], : grid[1]].flatten()
    shift: Callable[[Tensor], Tensor] = lambda places: query.new_zeros(())  # noqa: E731
    if attention.use_rel_pos:
        down = attention.get_rel_pos(height, height, attention.rel_pos_h)
        across = attention.get_rel_pos(width, width, attention.rel_pos_w)

        def shift(places: Tensor) -> Tensor:
            by_row = torch.einsum("hrc,rkc->hrk", query[:, places], down[places // width])
            by_column = torch.einsum("hrc,rkc->hrk", query[:, places], across[places % width])
            return (by_row[..., :, None] + by_column[..., None, :]).flatten(2)

    @torch.inference_mode()
    def rows(start: int, stop: int) -> Tensor:
        places = valid[start:stop]
        logits = (query[:, places] * attention.scale) @ key.mT + shift(places)
        return logits.float().softmax(-1)[..., valid]  # type: ignore[no-any-return]

    return SelfAttention(rows, value[:, valid].float(), grid)
