"""What the images of a task are learnt from: prompts of its classes, compared with every image, or a text of each image's own."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diptych.errors import ConfigError, DataError
from diptych.losses.classification import class_cross_entropy
from diptych.losses.contrastive import info_nce, shared_positives
from diptych.models.dual import DualEncoder
from diptych.models.modes import is_frozen
from diptych.types import Batch, Tokens, map_tensors


class Supervision:
    """The loss of a task, for objectives that add something to it.

    With prompts it is classification whose classifier is the text tower, which goes on learning; the main text of each sample is the prompt
    of its class. Without any it is CLIP's loss over pairs.

    Attributes:
        tokens: Of the prompts, None without any. A frozen text tower is asked for them once.
    """

    def __init__(self, model: DualEncoder, prompts: Sequence[str] = (), *, label_smoothing: float = 0.0) -> None:
        """Take in the prompts.

        Args:
            model: As it starts.
            prompts: One per class, at least two and no two alike; none for pairs.
            label_smoothing: In [0, 1); of classes only.

        Raises:
            ConfigError: If there is only one class, or two have one prompt.
        """
        self.label_smoothing = label_smoothing
        self.tokens: Tokens | None = None
        if prompts:
            tokens = map_tensors(lambda tensor: tensor.to(model.device), model.tokenizer(prompts))
            if len(tokens.key.unique()) < max(2, len(prompts)):
                raise ConfigError(
                    f"A task needs two classes or more, each with a prompt of its own; it has {list(prompts)}."
                )
            if is_frozen(model.text):
                with torch.no_grad():
                    tokens = replace(tokens, output=model.text_output(tokens))
            self.tokens = tokens

    def encode_text(self, model: DualEncoder, batch: Batch) -> tuple[Float[Tensor, "b d"], ...]:
        """Return the embeddings of the samples' own texts, for `encode`; none where classes take their place."""
        return (model.encode_text(batch.texts[0]),) if self.tokens is None else ()

    def class_embeddings(self, model: DualEncoder) -> Float[Tensor, "k d"]:
        """Return the embeddings of the prompts, with gradient."""
        assert self.tokens is not None
        return model.encode_text(self.tokens)

    def labels(self, batch: Batch) -> Int64[Tensor, " n"]:
        """Return the class of each sample: whose prompt its main text is.

        Raises:
            DataError: If a text is no prompt.
        """
        assert self.tokens is not None
        same = batch.texts[0].key[:, None] == self.tokens.key
        if not same.any(1).all():
            row = int((~same.any(1)).nonzero()[0])
            raise DataError(
                f"The main text of {batch.keys[row]!r} is none of the {len(self.tokens.key)} prompts of objective.classes. "
                "Give every sample the prompt of its class, as `prompted` does, or leave objective.classes empty for pairs."
            )
        return same.int().argmax(1)

    def loss(
        self, model: DualEncoder, image: Float[Tensor, "n d"], texts: tuple[Float[Tensor, "n d"], ...], batch: Batch
    ) -> Float[Tensor, ""]:
        """Return the loss: log k at chance for k classes, log n for n pairs.

        Args:
            model: Gives class embeddings and scale.
            image: Embeddings.
            texts: What `encode_text` gave.
            batch: The same samples.
        """
        if self.tokens is None:
            return info_nce(image, texts[0], model.scale, positives=shared_positives(batch.group, batch.texts[0].key))
        classes = self.class_embeddings(model)
        return class_cross_entropy(
            image, classes, self.labels(batch), model.scale, label_smoothing=self.label_smoothing
        )
