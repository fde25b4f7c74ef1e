"""A teacher: a copy of a module that follows it slowly and is never trained itself."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class Teacher(nn.Module, Generic[M]):
    """Exponential moving average of another module: teacher = momentum * teacher + (1 - momentum) * student.

    Its parameters want no gradients; call `follow` in `AbstractObjective.after_step`. It is part of the objective's state, so a
    resumed run finds it as it was.

    Attributes:
        module: The copy.

    Source: Tarvainen and Valpola 2017, equation 1; He et al. 2020, equation 2.
    """

    def __init__(self, student: M) -> None:
        super().__init__()
        self.module: M = copy.deepcopy(student).requires_grad_(False)

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: float, *, buffers: bool = True) -> None:
        """Move towards the student.

        Args:
            student: Of the same architecture.
            momentum: In [0, 1]; 1 never moves, 0 copies.
            buffers: Copy buffers (running statistics), which have no average of their own; False leaves them as they were.
        """
        for own, other in zip(self.module.parameters(), student.parameters(), strict=True):
            own.lerp_(other.detach(), 1 - momentum)
        if buffers:
            for kept, now in zip(self.module.buffers(), student.buffers(), strict=True):
                kept.copy_(now)
