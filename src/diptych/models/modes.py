"""What of a tower is trained: nothing, everything, or low-rank updates of its attention."""

from typing import Any

import torch
from torch import Tensor, nn

from diptych.errors import ConfigError, require
from diptych.models.dual import DualEncoder, TowerMode

LORA_TARGETS = {"query", "key", "value", "out", "q_proj", "k_proj", "v_proj", "out_proj", "qkv", "proj"}
"""Names of attention projections: ours, then those of transformers and timm."""


def set_mode(tower: nn.Module, mode: TowerMode, *, rank: int = 8) -> None:
    """Make a tower `frozen`, `full` or `lora`, in place.

    Args:
        tower: Image or text tower.
        mode: `frozen` also keeps the tower in eval mode, so that dropout and batch statistics do not move.
        rank: Of the updates W + B A that `lora` learns, B = 0 at the start; scaled by 2.

    Raises:
        ConfigError: If `lora` finds no attention projection.
        MissingExtraError: If `lora` is asked for without peft.
    """
    tower.requires_grad_(mode == "full")
    if mode == "frozen":
        tower.eval()
    if mode == "lora":
        peft = require("peft", "hf")
        targets = [
            name
            for name, module in tower.named_modules()
            if name.rpartition(".")[2] in LORA_TARGETS and isinstance(module, nn.Linear)
        ]
        if not targets:
            raise ConfigError(f"{type(tower).__name__} has no attention projections for LoRA. Use mode full or frozen.")
        peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), tower)


def is_frozen(tower: nn.Module) -> bool:
    """Return whether nothing of a tower is trained."""
    return not any(parameter.requires_grad for parameter in tower.parameters())


def train_mode(module: nn.Module) -> None:
    """Put a module in training mode, except frozen towers, which stay in eval mode."""
    module.train()
    for model in module.modules():
        if isinstance(model, DualEncoder):
            for tower in (model.vision, model.text):
                if is_frozen(tower):
                    tower.eval()


def merged_state(model: DualEncoder) -> dict[str, Tensor]:
    """Return the state dict as if LoRA had never been: low-rank updates added to the weights they update."""
    state = model.state_dict()
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for name, module in adapted.items():
        layer: Any = module
        merged = layer.base_layer.weight.detach() + layer.get_delta_weight("default").detach()
        state = {key: value for key, value in state.items() if not key.startswith(f"{name}.lora_")}
        state = {key.replace(f"{name}.base_layer.", f"{name}."): value for key, value in state.items()}
        state[f"{name}.weight"] = merged.to(torch.float32)
    return state
