"""Teachers: copies of a module that are never trained themselves. One follows the module slowly, the other stays as it was."""

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


@torch.no_grad()
def shuffled(module: M, generator: torch.Generator) -> M:
    """Return a copy that knows nothing: the numbers of each parameter in random order, so that its size stays. For controls.

    Args:
        module: Of any architecture.
        generator: On the CPU.
    """
    copied = copy.deepcopy(module)
    for parameter in copied.parameters():
        order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return copied


class Frozen(nn.Module, Generic[M]):
    """Another module as it was when the copy was made, in eval mode always; what a model knew before it learns something new.

    Made when an objective is, it is the model as the stage before left it. It is part of the objective's state, so a resumed run finds it.

    Attributes:
        module: The copy.
    """

    def __init__(self, module: M) -> None:
        super().__init__()
        self.module: M = copy.deepcopy(module).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "Frozen[M]":
        """Stay in eval mode: no dropout, no moving statistics."""
        del mode
        return super().train(False)
