"""AdamW with warm-up and cosine, and the running average of the weights."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) with linear warm-up and cosine decay to zero.

    Attributes:
        lr: Peak learning rate.
        tower_lr_factor: Towers learn at lr times this; below 1 for pretrained towers, whose heads are new.
        betas: Decay rates of the two moments.
        epsilon: Added to the root of the second moment.
        weight_decay: Decoupled; never on biases, norms, temperature, or anything else of one dimension.
        warmup_rate: Share of all steps spent warming up.
        clip_norm: Gradients are scaled down to this norm, or None.
        ema_decay: Decay per step of the averaged weights, which are then what is evaluated and saved; None for no average.
    """

    lr: float = 1e-3
    tower_lr_factor: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-6
    weight_decay: float = 0.2
    warmup_rate: float = 0.05
    clip_norm: float | None = 1.0
    ema_decay: float | None = None


def make_optimizer(module: nn.Module, towers: Iterable[nn.Module], config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over the parameters that want gradients, in up to four groups: tower or not, decayed or not."""
    in_tower = {id(parameter) for tower in towers for parameter in tower.parameters()}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [p for p in trained if (id(p) in in_tower) == tower and (p.ndim > 1) == decayed],
            "weight_decay": config.weight_decay if decayed else 0.0,
            "peak": config.lr * (config.tower_lr_factor if tower else 1.0),
        }
        for tower in (True, False)
        for decayed in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.epsilon, fused=True)


def schedule(step: int, total: int, warmup_rate: float) -> float:
    """Return the factor on the peak learning rate at `step` of `total`: 0 to 1 linearly, then a half cosine down to 0."""
    warmup = max(1, round(total * warmup_rate))
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to its peak times `factor`; return the highest."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return float(max(group["lr"] for group in optimizer.param_groups))


class WeightAverage:
    """Exponential moving average of the trained parameters: average = decay * average + (1 - decay) * weight.

    The decay is capped at (1 + step) / (10 + step), so that the random start is forgotten early.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the weights of `module`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in module.named_parameters():
            if name in self.average:
                self.average[name].lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the weights of `module` with the average; calling it twice changes nothing."""
        parameters = dict(module.named_parameters())
        for name, average in self.average.items():
            weight: Tensor = parameters[name].detach().clone()
            parameters[name].copy_(average)
            average.copy_(weight)
