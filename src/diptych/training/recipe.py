"""A training run as one frozen tree of settings. What a run directory keeps as `recipe.json`."""

from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from diptych.data.loader import LoaderConfig
from diptych.errors import ConfigError
from diptych.models.build import DualConfig
from diptych.models.dual import TowerMode
from diptych.models.pgd import PGDConfig
from diptych.models.precision import Precision
from diptych.training.distributed import Sharding
from diptych.training.levers import SpeedConfig
from diptych.training.optim import OptimizerConfig
from diptych.training.step import StepKind

Writer = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained, and what of it.

    Attributes:
        start: `new` for random weights and a tokenizer learnt from the training texts; anything `diptych.load` takes
            (`lite0-minilm`, `mini`, a run directory, `open_clip:...`, `hf:...`); or `auto`, which is lite0-minilm where its
            packages are installed, else mini.
        architecture: The model that `new` makes; unused otherwise.
        vocabulary: Ids of the tokenizer that `new` learns; unused otherwise.
        vision_mode: What of the image tower is trained. Heads and temperature always are.
        text_mode: What of the text tower is trained.
    """

    start: str = "auto"
    architecture: DualConfig = field(default_factory=DualConfig)
    vocabulary: int = 4096
    vision_mode: TowerMode = "full"
    text_mode: TowerMode = "full"


C = TypeVar("C")


@dataclass(frozen=True)
class Recipe(Generic[C]):
    """Everything about a run but the data's place and the output folder.

    Attributes:
        method: Slug of the objective; `diptych methods` lists them.
        objective: The method's own settings.
        model: What is trained.
        data: How samples become batches.
        optimizer: How weights move.
        epochs: Passes over the training samples.
        accumulate: Batches per optimiser step.
        step: `accumulated` takes the mean of their losses, each batch contrasting its own samples; `cached` takes one loss over the samples of
            all of them, as one large batch would, for the memory of one batch and the time of one more forward pass.
        sharding: `full` cuts the towers that train over the processes: each holds its part of weights, gradients, moments and average, and writes
            its part of the checkpoint. `none` keeps all in every process. The result is the same.
        held_out: Share of the samples kept out of training for evaluation when the source has no split of its own; samples of one group stay
            together.
        evaluate_every: Epochs between evaluations on held-out samples; the last epoch is always evaluated. 0 for the last only.
        save_every: Steps between checkpoints; the last step is always saved.
        log_every: Steps between log rows.
        precision: `auto` takes bf16 autocast where the processor has it.
        speed: What makes steps cheaper.
        harden: Where its eps is above 0, steps are taken on images moved by at most so many levels of 255, against the loss (adversarial
            training). Each step then costs 1 + `harden.steps` of them.
        device: `auto` takes a GPU if there is one.
        seed: Of weights, order and augmentation.
        writers: Further places for the log; metrics.jsonl is always written.
    """

    method: str
    objective: C
    model: ModelConfig = field(default_factory=ModelConfig)
    data: LoaderConfig = field(default_factory=LoaderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    epochs: int = 10
    accumulate: int = 1
    step: StepKind = "accumulated"
    sharding: Sharding = "none"
    held_out: float = 0.1
    evaluate_every: int = 1
    save_every: int = 200
    log_every: int = 10
    precision: Precision = "auto"
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    harden: PGDConfig = field(default_factory=lambda: PGDConfig(steps=3, step_size=0.5))
    device: str = "auto"
    seed: int = 0
    writers: tuple[Writer, ...] = ()

    def __post_init__(self) -> None:
        counts = ("epochs", "accumulate", "save_every", "log_every")
        if min(getattr(self, name) for name in counts) < 1 or self.evaluate_every < 0:
            given = ", ".join(f"{name} {getattr(self, name)}" for name in (*counts, "evaluate_every"))
            raise ConfigError(
                f"A run takes epochs, accumulate, save_every and log_every of 1 or more, and evaluate_every of 0 or more, not {given}. To save or "
                "log at the end only, give a number above that of all steps."
            )


def repeats(recipe: Recipe[Any]) -> int | None:
    """Return the `repeat` that a loader needs for the recipe's kind of step."""
    return recipe.accumulate if recipe.step == "cached" else None
