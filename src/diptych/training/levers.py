"""What makes a training step cheaper: exact levers, and two approximations that are off unless asked for."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from diptych.data.loader import Loader
from diptych.errors import ConfigError
from diptych.models.compiling import compiled
from diptych.models.dual import DualEncoder
from diptych.models.modes import is_frozen
from diptych.models.vision import dropping_patches
from diptych.training import distributed
from diptych.training.step import to_device
from diptych.types import Batch, TowerOutput


@dataclass(frozen=True)
class SpeedConfig:
    """What makes a step cheaper. The first two are exact: they change results by rounding only.

    Attributes:
        texts_by_length: Encode texts in groups of similar length, and equal texts once, where that saves time (on a CPU).
        compile: Put the towers through torch.compile, which takes its time at the start. Without a compiler the run goes on without. Off, since
            on a CPU steps of the demo's model in bf16 were no faster (0.95 to 1.07 of the time, ten steps).
        patch_dropout: APPROXIMATION. Share of the patches that our vision transformer leaves out in training, at random, in [0, 1); evaluation
            sees all. Source: Li et al. 2023 (FLIP), section 3.
        resolutions: APPROXIMATION. Sides of the images in the first phases of the run, pixels; the last phase is at full size. All phases
            have equally many steps; views that are smaller anyway stay as they are. Source: Li et al. 2023 (CLIPA).
    """

    texts_by_length: bool = True
    compile: bool = False
    patch_dropout: float = 0.0
    resolutions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.patch_dropout < 1:
            raise ConfigError(
                f"speed.patch_dropout is a share of the patches, at least 0 and below 1, not {self.patch_dropout}."
            )
        if any(side < 1 for side in self.resolutions):
            raise ConfigError(f"speed.resolutions are sides of images in pixels, at least 1, not {self.resolutions}.")


@contextmanager
def levers(
    model: DualEncoder,
    config: SpeedConfig,
    loader: Loader,
    autocast: AbstractContextManager[None],
    *,
    say: Callable[[str], None],
) -> Iterator[None]:
    """Put a model in the state that a configuration asks for while the context is open, and say what that is.

    Args:
        model: On its device, in the modes of its training.
        config: Smaller sizes of images are only checked here; `shrink` makes them.
        loader: Not iterated over; what is compiled is tried on its next batch.
        autocast: Precision of the towers.
        say: Told one sentence per choice.

    Raises:
        ConfigError: If the image tower cannot do what is asked for, or sharded towers are to be compiled.
    """
    sharded = distributed.is_sharded(model)
    if sharded and config.compile:
        raise ConfigError("Sharded towers cannot be compiled. Set speed.compile to False, or sharding to none.")
    approximations = [name for name in ("patch_dropout", "resolutions") if getattr(config, name)]
    if approximations and is_frozen(model.vision):
        raise ConfigError(
            f"speed.{approximations[0]} makes training the image tower cheaper, and here that tower is frozen. Leave it out, or set "
            "model.vision_mode to full."
        )
    for side in config.resolutions:
        _check_side(model, side)
    # All processes must call a sharded tower equally often; how many groups of texts there are depends on the texts.
    model.texts_by_length = config.texts_by_length and not sharded
    with ExitStack() as opened:
        opened.enter_context(dropping_patches(model.vision, config.patch_dropout))
        if config.patch_dropout:
            say(f"APPROXIMATION: {config.patch_dropout:.0%} of the patches of an image are left out in training.")
        if config.resolutions:
            sides = " then ".join(map(str, (*config.resolutions, model.image_policy.size)))
            say(f"APPROXIMATION: images are of {sides} pixels, for equally many steps each.")
        if config.compile:
            _, batch = loader.maker[next(loader.requests())]
            opened.enter_context(compiled(model, to_device(batch, model.device), autocast, say=say))
        yield


def side_at(step: int, total: int, resolutions: tuple[int, ...]) -> int | None:
    """Return the largest side of an image at step 1 to `total`, None for no bound: phases of equal length, the last one without."""
    return (*resolutions, None)[(step - 1) * (len(resolutions) + 1) // total]


def shrink(batch: Batch, side: int | None) -> Batch:
    """Return a batch whose views are at most `side` pixels wide and high; what a tower made of views before stays as it is."""
    if side is None:
        return batch
    return replace(batch, images=tuple(_shrunk(view, side) for view in batch.images))


def _shrunk(view: Tensor | TowerOutput, side: int) -> Tensor | TowerOutput:
    if isinstance(view, TowerOutput) or max(view.shape[2:]) <= side:
        return view
    small = F.interpolate(view.float(), (side, side), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(view.dtype)


def _check_side(model: DualEncoder, side: int) -> None:
    """Raise if the image tower does not take images of this size."""
    size = model.image_policy.size
    if side >= size:
        raise ConfigError(
            f"speed.resolutions are smaller than the full {size} pixels of the model, which come last; {side} is not."
        )
    modes = [(module, module.training) for module in model.vision.modules()]
    try:
        with torch.no_grad():
            model.vision.eval()(model.pixels(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=model.device)))
    except Exception as error:  # each library has its own
        raise ConfigError(
            f"speed.resolutions has {side}, and the image tower takes no such images: {error} Choose other sizes, or leave them out."
        ) from error
    finally:
        for module, mode in modes:
            module.training = mode
