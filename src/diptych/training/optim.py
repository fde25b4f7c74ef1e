"""AdamW with warm-up and cosine, and averages of weights: along a run, and between two models."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diptych.errors import ConfigError


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
        mean_every: Steps between the snapshots whose plain mean, that of the start included, is evaluated and saved instead; None for none.
    """

    lr: float = 1e-3
    tower_lr_factor: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-6
    weight_decay: float = 0.2
    warmup_rate: float = 0.05
    clip_norm: float | None = 1.0
    ema_decay: float | None = None
    mean_every: int | None = None

    def __post_init__(self) -> None:
        shares = (self.warmup_rate, *self.betas, *(() if self.ema_decay is None else (self.ema_decay,)))
        if self.lr < 0 or self.epsilon < 0 or self.weight_decay < 0 or not all(0 <= share <= 1 for share in shares):
            raise ConfigError(
                f"The optimizer needs lr, epsilon and weight_decay >= 0, and warmup_rate, betas and ema_decay from 0 to 1; it has {self}."
            )
        if self.mean_every is not None and (self.ema_decay is not None or self.mean_every < 1):
            raise ConfigError(
                f"optimizer.mean_every is a number of steps, 1 or more, and takes the place of ema_decay; they are {self.mean_every} and "
                f"{self.ema_decay}. Set one of them to None."
            )


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
    """A running mean of the trained parameters: average = average + share(step) (weight - average).

    Attributes:
        average: Of each trained parameter, by name; at the start its value then.
        share: How far the average goes towards the weights after a step, in [0, 1]; from `exponential` or `uniform`.
    """

    def __init__(self, module: nn.Module, share: Callable[[int], float]) -> None:
        self.share = share
        self.average = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the weights of `module`, after step number `step`."""
        if share := self.share(step):
            for name, parameter in module.named_parameters():
                if name in self.average:
                    self.average[name].lerp_(parameter.detach(), share)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the weights of `module` with the average; calling it twice changes nothing."""
        parameters = dict(module.named_parameters())
        for name, average in self.average.items():
            weight: Tensor = parameters[name].detach().clone()
            parameters[name].copy_(average)
            average.copy_(weight)


def make_average(module: nn.Module, config: OptimizerConfig) -> WeightAverage | None:
    """Return the average of weights that a configuration asks for, if it does."""
    if config.mean_every is not None:
        return WeightAverage(module, uniform(config.mean_every))
    return None if config.ema_decay is None else WeightAverage(module, exponential(config.ema_decay))


def exponential(decay: float) -> Callable[[int], float]:
    """Return the share of an exponential moving average: average = decay * average + (1 - decay) * weight.

    The decay is capped at (1 + step) / (10 + step), so that the random start is forgotten early.
    """
    return lambda step: 1 - min(decay, (1 + step) / (10 + step))


def uniform(every: int) -> Callable[[int], float]:
    """Return the share that makes the average the mean of the start and of the weights after steps every, 2 every, 3 every, ...

    With n snapshots the average is (n * average + weight) / (n + 1).

    Source: Zheng et al. 2023 (ZSCL), section 3.3, weight ensemble.
    """
    return lambda step: 0.0 if step % every else 1 / (step // every + 1)


@torch.no_grad()
def blend(module: nn.Module, other: nn.Module, share: float) -> None:
    """Make the weights of a module (1 - share) of its own and `share` of another one's, in place.

    Args:
        module: Changed.
        other: Of the same architecture; not changed.
        share: 0 changes nothing, 1 copies.

    Source: Wortsman et al. 2022 (WiSE-FT), equation 2.
    """
    for own, theirs in zip(module.parameters(), other.parameters(), strict=True):
        own.lerp_(theirs, share)
