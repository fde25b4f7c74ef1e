"""CLIP and SigLIP of transformers, read into our towers and written back (extra `hf`)."""

import json
import re
import string
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Regex, normalizers
from tokenizers import Tokenizer as Engine

from diptych.data.tokenizer import TextPolicy, Tokenizer
from diptych.data.transforms import ImagePolicy, Interpolation
from diptych.errors import CheckpointError, OfflineError
from diptych.files import atomic_folder
from diptych.models.build import DualConfig, build
from diptych.models.dual import DualEncoder, ScaleConfig
from diptych.models.exchange import Entry, export_weights, fused, import_weights, pair
from diptych.models.heads import LinearHeadConfig
from diptych.models.text import TextConfig
from diptych.models.transformer import Activation
from diptych.models.vision import VisionConfig

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_INTERPOLATIONS: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def from_huggingface(
    name: str, *, offline: bool = False, tokenizer: Tokenizer | None = None, image_policy: ImagePolicy | None = None
) -> DualEncoder:
    """Return a CLIP or SigLIP model of transformers in our modules; transformers itself is not needed.

    Args:
        name: A local folder, or a name on the hub; the local cache is looked at before the network.
        offline: Never touch the network.
        tokenizer: Used instead of the folder's, with the text policy it carries.
        image_policy: Used instead of the folder's preprocessing.

    Raises:
        CheckpointError: If it is neither CLIP nor SigLIP, or lacks a tokenizer and none was given.

    Warns:
        UserWarning: If the folder has no preprocessing and none was given; the defaults of transformers are taken.
        OfflineError: If it would have to be downloaded.
    """
    folder = _local_folder(name, offline)
    settings = _read(folder / "config.json")
    family = settings.get("model_type")
    if family not in ("clip", "siglip"):
        raise CheckpointError(
            f"{name} is a {family!r} model; diptych reads the CLIP and SigLIP families of transformers."
        )
    tokenizer = tokenizer or _tokenizer(folder, settings, name)
    config = _config(settings, tokenizer.policy)
    model = build(replace(config, image_policy=image_policy or _image_policy(folder, config, family)), tokenizer)
    if not (folder / "model.safetensors").exists():
        raise CheckpointError(f"{folder} has no model.safetensors; pickled weights are never loaded.")
    import_weights(model, load_file(folder / "model.safetensors"), entries(config))
    return model.eval()


def to_huggingface(model: DualEncoder, folder: Path) -> None:
    """Write a folder that `CLIPModel.from_pretrained` or `SiglipModel.from_pretrained` reads.

    Raises:
        CheckpointError: If transformers has no such architecture.
    """
    config = model.config
    if family_of(config) == "clip" and config.text_policy.end == 2:
        raise CheckpointError(
            "transformers' CLIP reads texts elsewhere when the end token has id 2 (a sign of its first release). "
            "Train with another tokenizer, or convert to open_clip."
        )
    weights = export_weights(model, entries(config))
    with atomic_folder(folder) as target:
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps(_their_config(config), indent=2))
        (target / "preprocessor_config.json").write_text(
            json.dumps(_their_preprocessing(config.image_policy), indent=2)
        )
        _write_tokenizer(model.tokenizer, target)


def family_of(config: DualConfig) -> str:
    """Return `clip` or `siglip`.

    Raises:
        CheckpointError: If the architecture is neither.
    """
    vision, text = config.vision, config.text
    linear = isinstance(config.image_head, LinearHeadConfig) and isinstance(config.text_head, LinearHeadConfig)
    if linear and isinstance(vision, VisionConfig) and isinstance(text, TextConfig):
        clip_vision = vision.pool == "class" and vision.norm_before and not vision.patch_bias
        if clip_vision and text.causal and text.pool == "end":
            return "clip"
        siglip_vision = vision.pool == "attention" and not vision.norm_before and vision.patch_bias
        if siglip_vision and not text.causal and text.attend_padding and text.pool == "last":
            return "siglip"
    raise CheckpointError(
        "Only models of the CLIP form (class token, norm before, causal text read at its end) or of the SigLIP form "
        "(attention pooling, bidirectional text read at its last position), with linear heads, exist in other libraries; this one is neither."
    )


def entries(config: DualConfig) -> Iterator[Entry]:
    """Yield where each tensor of transformers goes.

    Raises:
        CheckpointError: If transformers has no such architecture.
    """
    family, vision, text = family_of(config), config.vision, config.text
    assert isinstance(vision, VisionConfig) and isinstance(text, TextConfig)
    yield Entry("vision_model.embeddings.patch_embedding.weight", ("vision.patch_embedding.weight",))
    yield Entry("vision_model.embeddings.position_embedding.weight", ("vision.position",))
    for side, depth in (("vision", vision.depth), ("text", text.depth)):
        for i in range(depth):
            yield from _block(f"{side}_model.encoder.layers.{i}", f"{side}.transformer.blocks.{i}")
    yield from pair("vision_model.post_layernorm", "vision.norm_after")
    yield Entry("text_model.embeddings.token_embedding.weight", ("text.token_embedding.weight",))
    yield Entry("text_model.embeddings.position_embedding.weight", ("text.position",))
    yield from pair("text_model.final_layer_norm", "text.norm_after")
    if family == "clip":
        yield Entry("logit_scale", ("log_scale",))
        yield Entry("vision_model.embeddings.class_embedding", ("vision.class_token",))
        yield from pair("vision_model.pre_layrnorm", "vision.norm_before")
        yield Entry("visual_projection.weight", ("image_head.linear.weight",))
        yield Entry("text_projection.weight", ("text_head.linear.weight",))
        return
    yield Entry("logit_scale", ("log_scale",), leading=1)
    yield Entry("logit_bias", ("bias",), leading=1)
    yield Entry("vision_model.embeddings.patch_embedding.bias", ("vision.patch_embedding.bias",))
    yield from pair("text_model.head", "text_head.linear")
    pool, theirs = "vision.attention_pool", "vision_model.head"
    yield Entry(f"{theirs}.probe", (f"{pool}.probe",), leading=2)
    yield from fused(f"{theirs}.attention.in_proj", f"{pool}.attention", ("query", "key", "value"), joint="_")
    yield from pair(f"{theirs}.attention.out_proj", f"{pool}.attention.out")
    yield from pair(f"{theirs}.layernorm", f"{pool}.norm")
    yield from pair(f"{theirs}.mlp.fc1", f"{pool}.mlp.up")
    yield from pair(f"{theirs}.mlp.fc2", f"{pool}.mlp.down")


def _block(theirs: str, ours: str) -> Iterator[Entry]:
    yield from pair(f"{theirs}.layer_norm1", f"{ours}.norm_attention")
    for name, part in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out")):
        yield from pair(f"{theirs}.self_attn.{name}", f"{ours}.attention.{part}")
    yield from pair(f"{theirs}.layer_norm2", f"{ours}.norm_mlp")
    yield from pair(f"{theirs}.mlp.fc1", f"{ours}.mlp.up")
    yield from pair(f"{theirs}.mlp.fc2", f"{ours}.mlp.down")


def _config(settings: dict[str, Any], text_policy: TextPolicy) -> DualConfig:
    """Return our configuration; defaults are those of transformers, whose config.json may leave them out."""
    siglip = settings["model_type"] == "siglip"
    vision, text = settings.get("vision_config") or {}, settings.get("text_config") or {}
    epsilon = 1e-6 if siglip else 1e-5
    vision_config = VisionConfig(
        image_size=vision.get("image_size", 224),
        patch_size=vision.get("patch_size", 16 if siglip else 32),
        width=vision.get("hidden_size", 768),
        depth=vision.get("num_hidden_layers", 12),
        heads=vision.get("num_attention_heads", 12),
        mlp_width=vision.get("intermediate_size", 3072),
        pool="attention" if siglip else "class",
        norm_before=not siglip,
        patch_bias=siglip,
        activation=_activation(vision, siglip),
        epsilon=vision.get("layer_norm_eps", epsilon),
    )
    text_config = TextConfig(
        vocabulary=text.get("vocab_size", 32000 if siglip else 49408),
        length=text.get("max_position_embeddings", 64 if siglip else 77),
        width=text.get("hidden_size", 768 if siglip else 512),
        depth=text.get("num_hidden_layers", 12),
        heads=text.get("num_attention_heads", 12 if siglip else 8),
        mlp_width=text.get("intermediate_size", 3072 if siglip else 2048),
        causal=not siglip,
        attend_padding=siglip,
        pool="last" if siglip else "end",
        activation=_activation(text, siglip),
        epsilon=text.get("layer_norm_eps", epsilon),
    )
    return DualConfig(
        vision=vision_config,
        text=text_config,
        image_head=LinearHeadConfig(None if siglip else settings.get("projection_dim", 512)),
        text_head=LinearHeadConfig(text.get("projection_size", text_config.width), bias=True)
        if siglip
        else LinearHeadConfig(settings.get("projection_dim", 512)),
        scale=ScaleConfig(bias=-10.0 if siglip else None),
        text_policy=text_policy,
    )


def _activation(settings: dict[str, Any], siglip: bool) -> Activation:
    name = settings.get("hidden_act", "gelu_pytorch_tanh" if siglip else "quick_gelu")
    if name not in _ACTIVATIONS:
        raise CheckpointError(f"The activation {name!r} is not known here. Known: {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


def _image_policy(folder: Path, config: DualConfig, family: str) -> ImagePolicy:
    """Return the folder's preprocessing."""
    if not (folder / "preprocessor_config.json").exists():
        warnings.warn(
            f"{folder} has no preprocessor_config.json: images are prepared as transformers does by default for {family}. "
            "If the model was trained otherwise its embeddings are spoilt; save the right record beside it, or name an image_policy.",
            stacklevel=4,
        )
    record, siglip = _read(folder / "preprocessor_config.json"), family == "siglip"
    assert isinstance(config.vision, VisionConfig)
    size = config.vision.image_size
    wanted = record.get("size", size)
    side = wanted if isinstance(wanted, int) else wanted.get("shortest_edge", wanted.get("height", size))
    crop = record.get("do_center_crop", not siglip)
    if side != size and not crop:
        raise CheckpointError(f"The preprocessing makes {side} pixels but the tower takes {size}.")
    if record.get("resample", 3) not in _INTERPOLATIONS:
        raise CheckpointError(
            f"The preprocessing resizes with Pillow's filter {record['resample']}, which is not known here."
        )
    default = ImagePolicy()
    half = (0.5, 0.5, 0.5)
    return ImagePolicy(
        size=size,
        resize="crop" if crop else "squash",
        crop_fraction=size / side,
        interpolation=_INTERPOLATIONS[record.get("resample", 3)],
        mean=tuple(record.get("image_mean", half if siglip else default.mean)),
        std=tuple(record.get("image_std", half if siglip else default.std)),
    )


def _tokenizer(folder: Path, settings: dict[str, Any], name: str) -> Tokenizer:
    """Return the folder's own tokenizer with the policy of its family."""
    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(
            f"{name} has no tokenizer.json, and without the right tokenizer its text embeddings would be noise. "
            "Save one beside it with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    engine = Engine.from_file(str(folder / "tokenizer.json"))
    special = _read(folder / "tokenizer_config.json")
    text = settings.get("text_config") or {}
    siglip = settings["model_type"] == "siglip"

    def number(key: str) -> int | None:
        token = special.get(key)
        content = token["content"] if isinstance(token, dict) else token
        return None if content is None else engine.token_to_id(content)

    end = number("eos_token")
    pad = number("pad_token")
    policy = TextPolicy(
        length=text.get("max_position_embeddings", 64 if siglip else 77),
        clean="canonicalize" if siglip else "whitespace",
        begin=None if siglip else number("bos_token"),
        end=end,
        pad=pad if pad is not None else end or 0,
        pad_to="length" if siglip else "longest",
    )
    return Tokenizer(engine, policy)


def _local_folder(name: str, offline: bool) -> Path:
    """Return a folder with the model's files: local, else cached, else downloaded unless `offline`."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name} is no folder with a transformers model (config.json, model.safetensors, tokenizer.json)."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=True))
    except LocalEntryNotFoundError as error:
        if offline:
            raise OfflineError(
                f"{name!r} is neither a local folder nor in the local cache, and offline forbids a download. "
                "Download it once with `hf download`, or give a folder."
            ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # the hub client raises many kinds: network, name, permission
        raise CheckpointError(f"{name!r} could not be downloaded: {error}") from error


def _their_config(config: DualConfig) -> dict[str, Any]:
    family, vision, text = family_of(config), config.vision, config.text
    assert isinstance(vision, VisionConfig) and isinstance(text, TextConfig)
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}

    def tower(part: VisionConfig | TextConfig) -> dict[str, Any]:
        return {
            "model_type": f"{family}_{'vision' if isinstance(part, VisionConfig) else 'text'}_model",
            "hidden_size": part.width,
            "intermediate_size": part.mlp_width,
            "num_hidden_layers": part.depth,
            "num_attention_heads": part.heads,
            "hidden_act": names[part.activation],
            "layer_norm_eps": part.epsilon,
        }

    policy = config.text_policy
    return {
        "model_type": family,
        "architectures": ["CLIPModel" if family == "clip" else "SiglipModel"],
        "projection_dim": config.image_head.dim if family == "clip" else text.width,
        "vision_config": tower(vision) | {"image_size": vision.image_size, "patch_size": vision.patch_size},
        "text_config": tower(text)
        | {
            "vocab_size": text.vocabulary,
            "max_position_embeddings": text.length,
            "projection_size": config.text_head.dim,
            "bos_token_id": policy.begin,
            "eos_token_id": policy.end,
            "pad_token_id": policy.pad,
        },
    }


def _their_preprocessing(policy: ImagePolicy) -> dict[str, Any]:
    if policy.resize == "pad":
        raise CheckpointError("transformers' CLIP preprocessing cannot pad to a square.")
    crop, numbers = policy.resize == "crop", {name: number for number, name in _INTERPOLATIONS.items()}
    short = round(policy.size / policy.crop_fraction)
    square = {"height": policy.size, "width": policy.size}
    return {
        "image_processor_type": "CLIPImageProcessor" if crop else "SiglipImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": short} if crop else square,
        "do_center_crop": crop,
        "crop_size": square,
        "resample": numbers[policy.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(policy.mean),
        "image_std": list(policy.std),
        "do_convert_rgb": True,
    }


def _write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json with the special tokens put around every text, as transformers expects."""
    from tokenizers.processors import TemplateProcessing

    engine, policy = Engine.from_str(tokenizer.to_json()), tokenizer.policy
    engine.normalizer = _cleaning(policy, engine.normalizer)
    begin, end, pad = (None if i is None else engine.id_to_token(i) for i in (policy.begin, policy.end, policy.pad))
    special = [(token, i) for token, i in ((begin, policy.begin), (end, policy.end)) if token is not None]
    template = " ".join(part for part in (begin, "$A", end) if part is not None)
    engine.post_processor = TemplateProcessing(single=template, special_tokens=special)
    engine.save(str(folder / "tokenizer.json"))
    record = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": policy.length,
        **{name: token for name, token in (("bos_token", begin), ("eos_token", end), ("pad_token", pad)) if token},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(record, indent=2))


def _cleaning(policy: TextPolicy, normalizer: Any) -> Any:
    """Return a normaliser that also does what our policy does before the engine is asked."""
    steps = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if policy.clean != "whitespace":
        steps.append(normalizers.Lowercase())
    if policy.clean == "canonicalize":
        no_punctuation = normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), "")
        steps = [normalizers.Replace("_", " "), no_punctuation, *steps]
    return normalizers.Sequence([*steps, normalizer] if normalizer is not None else steps)


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON file, or an empty record when it is not there."""
    return json.loads(path.read_text()) if path.exists() else {}
