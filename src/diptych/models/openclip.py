"""ViT models of open_clip, CLIP and SigLIP, read into our towers and written back (extra `openclip`)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine
from tokenizers.models import BPE
from torch import nn

from diptych.config import from_json, to_json
from diptych.data.tokenizer import TextPolicy, Tokenizer
from diptych.data.transforms import ImagePolicy
from diptych.errors import CheckpointError, OfflineError, nearest, require
from diptych.files import atomic_folder
from diptych.models.build import DualConfig, build
from diptych.models.dual import DualEncoder, ScaleConfig
from diptych.models.exchange import Entry, export_weights, fused, import_weights, pair
from diptych.models.heads import LinearHeadConfig
from diptych.models.huggingface import family_of
from diptych.models.text import TextConfig
from diptych.models.transformer import Activation
from diptych.models.vision import VisionConfig

_RESIZE = {"shortest": "crop", "squash": "squash", "longest": "pad"}


def from_openclip(spec: str, *, offline: bool = False, tokenizer: Tokenizer | None = None) -> DualEncoder:
    """Return a ViT model of open_clip in our modules.

    Args:
        spec: `NAME/TAG` (as in `open_clip.list_pretrained()`), `NAME/file.safetensors`, or a folder with open_clip_config.json.
        offline: Never touch the network.
        tokenizer: Used instead of the model's own, with the text policy it carries.

    Raises:
        CheckpointError: If the name, the tag or the architecture is not supported, or the file is a pickle.
        OfflineError: If it would have to be downloaded.
        MissingExtraError: If open_clip is not installed.
    """
    open_clip = require("open_clip", "openclip")
    if Path(spec).is_dir():
        source = f"local-dir:{spec}"
        theirs = open_clip.create_model(source, load_weights=True)
        record = json.loads((Path(spec) / "open_clip_config.json").read_text())
        settings = record["model_cfg"]
        tokenizer = tokenizer or _tokenizer(open_clip, settings, Path(spec), record.get("diptych_text_policy"))
    else:
        name, _, pretrained = spec.partition("/")
        theirs = _create(open_clip, name, pretrained, offline)
        settings = open_clip.get_model_config(name)
        tokenizer = tokenizer or _tokenizer(open_clip, settings)
    config = _config(theirs, settings, tokenizer.policy)
    model = build(config, tokenizer)
    import_weights(model, dict(theirs.state_dict()), entries(config, timm=_is_timm(theirs)))
    return model.eval()


def to_openclip(model: DualEncoder, folder: Path) -> None:
    """Write a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` reads.

    Raises:
        CheckpointError: If open_clip has no such architecture.
    """
    config = model.config
    weights = export_weights(model, entries(config, timm=family_of(config) == "siglip"))
    with atomic_folder(folder) as target:
        save_file(weights, target / "open_clip_model.safetensors", metadata={"format": "pt"})
        record = {
            "model_cfg": _their_config(config),
            "preprocess_cfg": _their_preprocessing(config.image_policy),
            "diptych_text_policy": to_json(config.text_policy),  # open_clip has no place for it and looks past it
        }
        (target / "open_clip_config.json").write_text(json.dumps(record, indent=2))
        (target / "tokenizer.json").write_text(model.tokenizer.to_json())


def entries(config: DualConfig, *, timm: bool) -> Iterator[Entry]:
    """Yield where each tensor of open_clip goes; `timm` when its image tower is timm's, as for SigLIP."""
    vision, text = config.vision, config.text
    assert isinstance(vision, VisionConfig) and isinstance(text, TextConfig)
    assert isinstance(config.text_head, LinearHeadConfig)
    yield Entry("logit_scale", ("log_scale",))
    if config.scale.bias is not None:
        yield Entry("logit_bias", ("bias",))
    yield from _timm_tower(vision) if timm else _clip_tower(vision)
    prefix = "text." if timm else ""
    yield Entry(f"{prefix}positional_embedding", ("text.position",))
    yield Entry(f"{prefix}token_embedding.weight", ("text.token_embedding.weight",))
    for i in range(text.depth):
        yield from _block(f"{prefix}transformer.resblocks.{i}", f"text.transformer.blocks.{i}")
    yield from pair(f"{prefix}ln_final", "text.norm_after")
    if config.text_head.bias:
        yield from pair(f"{prefix}text_projection", "text_head.linear")
    else:
        yield Entry(f"{prefix}text_projection", ("text_head.linear.weight",), transpose=True)


def _clip_tower(vision: VisionConfig) -> Iterator[Entry]:
    yield Entry("visual.class_embedding", ("vision.class_token",))
    yield Entry("visual.positional_embedding", ("vision.position",))
    yield Entry("visual.conv1.weight", ("vision.patch_embedding.weight",))
    yield from pair("visual.ln_pre", "vision.norm_before")
    for i in range(vision.depth):
        yield from _block(f"visual.transformer.resblocks.{i}", f"vision.transformer.blocks.{i}")
    yield from pair("visual.ln_post", "vision.norm_after")
    yield Entry("visual.proj", ("image_head.linear.weight",), transpose=True)


def _timm_tower(vision: VisionConfig) -> Iterator[Entry]:
    trunk, pool = "visual.trunk", "vision.attention_pool"
    yield Entry(f"{trunk}.pos_embed", ("vision.position",), leading=1)
    yield from pair(f"{trunk}.patch_embed.proj", "vision.patch_embedding")
    for i in range(vision.depth):
        theirs, ours = f"{trunk}.blocks.{i}", f"vision.transformer.blocks.{i}"
        yield from pair(f"{theirs}.norm1", f"{ours}.norm_attention")
        yield from fused(f"{theirs}.attn.qkv", f"{ours}.attention", ("query", "key", "value"))
        yield from pair(f"{theirs}.attn.proj", f"{ours}.attention.out")
        yield from pair(f"{theirs}.norm2", f"{ours}.norm_mlp")
        yield from pair(f"{theirs}.mlp.fc1", f"{ours}.mlp.up")
        yield from pair(f"{theirs}.mlp.fc2", f"{ours}.mlp.down")
    yield from pair(f"{trunk}.norm", "vision.norm_after")
    yield Entry(f"{trunk}.attn_pool.latent", (f"{pool}.probe",), leading=2)
    yield from pair(f"{trunk}.attn_pool.q", f"{pool}.attention.query")
    yield from fused(f"{trunk}.attn_pool.kv", f"{pool}.attention", ("key", "value"))
    yield from pair(f"{trunk}.attn_pool.proj", f"{pool}.attention.out")
    yield from pair(f"{trunk}.attn_pool.norm", f"{pool}.norm")
    yield from pair(f"{trunk}.attn_pool.mlp.fc1", f"{pool}.mlp.up")
    yield from pair(f"{trunk}.attn_pool.mlp.fc2", f"{pool}.mlp.down")


def _block(theirs: str, ours: str) -> Iterator[Entry]:
    yield from pair(f"{theirs}.ln_1", f"{ours}.norm_attention")
    yield from fused(f"{theirs}.attn.in_proj", f"{ours}.attention", ("query", "key", "value"), joint="_")
    yield from pair(f"{theirs}.attn.out_proj", f"{ours}.attention.out")
    yield from pair(f"{theirs}.ln_2", f"{ours}.norm_mlp")
    yield from pair(f"{theirs}.mlp.c_fc", f"{ours}.mlp.up")
    yield from pair(f"{theirs}.mlp.c_proj", f"{ours}.mlp.down")


def _create(open_clip: Any, name: str, pretrained: str, offline: bool) -> nn.Module:
    """Return open_clip's own model with its weights: a local file, the local cache, or a download unless `offline`."""
    if name not in open_clip.list_models():
        raise CheckpointError(f"open_clip has no model {name!r}. {nearest(name, open_clip.list_models())}")
    file = Path(pretrained)
    if file.suffix and file.exists():
        if file.suffix != ".safetensors":
            raise CheckpointError(
                f"{file} is a pickle file; loading one can run any code inside it. Use a safetensors file."
            )
        return open_clip.create_model(name, pretrained=str(file))  # type: ignore[no-any-return]
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags:
        raise CheckpointError(f"{pretrained!r} is neither a file nor a tag of {name}. {nearest(pretrained, tags)}")
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True  # open_clip has no argument for it
    try:
        return open_clip.create_model(name, pretrained=pretrained)  # type: ignore[no-any-return]
    except Exception as error:  # not in the cache; open_clip raises many kinds
        if offline:
            raise OfflineError(
                f"{name}/{pretrained} is not in the local cache, and offline forbids a download. Load it once without offline."
            ) from error
    finally:
        constants.HF_HUB_OFFLINE = before
    try:
        return open_clip.create_model(name, pretrained=pretrained)  # type: ignore[no-any-return]
    except Exception as error:
        raise CheckpointError(f"{name}/{pretrained} could not be downloaded: {error}") from error


def _is_timm(theirs: Any) -> bool:
    return hasattr(theirs.visual, "trunk")


def _config(theirs: Any, settings: dict[str, Any], text_policy: TextPolicy) -> DualConfig:
    """Return our configuration, read off the live model, since names alone leave much implicit."""
    timm = _is_timm(theirs)
    vision = _timm_config(theirs.visual.trunk) if timm else _clip_config(theirs.visual)
    tower = theirs.text if hasattr(theirs, "text") else theirs
    block = tower.transformer.resblocks[0]
    bias = isinstance(tower.text_projection, nn.Linear)
    causal = tower.attn_mask is not None
    text = TextConfig(
        vocabulary=tower.token_embedding.num_embeddings,
        length=tower.positional_embedding.shape[0],
        width=tower.positional_embedding.shape[1],
        depth=len(tower.transformer.resblocks),
        heads=block.attn.num_heads,
        mlp_width=block.mlp.c_fc.out_features,
        causal=causal,
        attend_padding=not causal,
        pool="end" if causal else "last",
        activation=_activation(block.mlp.gelu),
        epsilon=tower.ln_final.eps,
    )
    dim = settings["embed_dim"]
    logit_bias = getattr(theirs, "logit_bias", None)
    return DualConfig(
        vision=vision,
        text=text,
        image_head=LinearHeadConfig(None if timm else dim),
        text_head=LinearHeadConfig(dim, bias=bias),
        scale=ScaleConfig(bias=None if logit_bias is None else float(logit_bias.detach())),
        image_policy=_image_policy(theirs.visual.preprocess_cfg, vision.image_size),
        text_policy=text_policy,
    )


def _clip_config(visual: Any) -> VisionConfig:
    if not hasattr(visual, "class_embedding") or visual.attn_pool is not None or visual.pool_type != "tok":
        raise CheckpointError(
            "Of open_clip's own image towers only ViT with a class token is read (no ResNet, CoCa, pooling)."
        )
    block = visual.transformer.resblocks[0]
    return VisionConfig(
        image_size=visual.image_size[0],
        patch_size=visual.patch_size[0],
        width=visual.conv1.out_channels,
        depth=len(visual.transformer.resblocks),
        heads=block.attn.num_heads,
        mlp_width=block.mlp.c_fc.out_features,
        activation=_activation(block.mlp.gelu),
        epsilon=visual.ln_post.eps,
    )


def _timm_config(trunk: Any) -> VisionConfig:
    if getattr(trunk, "cls_token", None) is not None or getattr(trunk, "attn_pool", None) is None:
        raise CheckpointError("Of open_clip's timm image towers only ViT with attention pooling (SigLIP) is read.")
    block = trunk.blocks[0]
    return VisionConfig(
        image_size=trunk.patch_embed.img_size[0],
        patch_size=trunk.patch_embed.patch_size[0],
        width=trunk.embed_dim,
        depth=len(trunk.blocks),
        heads=block.attn.num_heads,
        mlp_width=block.mlp.fc1.out_features,
        pool="attention",
        norm_before=False,
        patch_bias=True,
        activation=_activation(block.mlp.act),
        epsilon=trunk.norm.eps,
    )


def _activation(module: nn.Module) -> Activation:
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    tanh = getattr(module, "approximate", "none") == "tanh" or type(module).__name__ == "GELUTanh"
    return "gelu_tanh" if tanh else "gelu"


def _image_policy(record: dict[str, Any], size: int) -> ImagePolicy:
    return ImagePolicy(
        size=size,
        resize=_RESIZE[record.get("resize_mode", "shortest")],  # type: ignore[arg-type]
        interpolation=record.get("interpolation", "bicubic"),
        mean=tuple(record["mean"]),
        std=tuple(record["std"]),
    )


def _tokenizer(
    open_clip: Any, settings: dict[str, Any], folder: Path | None = None, policy: dict[str, Any] | None = None
) -> Tokenizer:
    """Return the model's tokenizer in our engine; `policy` is the record that `to_openclip` left."""
    text = settings["text_cfg"]
    length = text.get("context_length", 77)
    if folder is not None and (folder / "tokenizer.json").exists():
        engine = Engine.from_file(str(folder / "tokenizer.json"))
        return Tokenizer(engine, from_json(TextPolicy, policy) if policy else _policy_of(engine, text, length))
    if "hf_tokenizer_name" in text:
        raise CheckpointError(
            f"This model needs the tokenizer {text['hf_tokenizer_name']!r}, which is not in its folder. "
            "Load it through hf: instead, or save its tokenizer.json beside the weights."
        )
    return clip_tokenizer(open_clip, length)


def _policy_of(engine: Engine, text: dict[str, Any], length: int) -> TextPolicy:
    """Return the policy of a tokenizer.json that lies beside the weights: SigLIP's, CLIP's, or one made by `Tokenizer.train`."""
    if text.get("no_causal_mask"):
        end = engine.token_to_id("</s>")
        return TextPolicy(length=length, clean="canonicalize", begin=None, end=end, pad=end or 0, pad_to="length")
    if engine.token_to_id("<|startoftext|>") is not None:
        begin, end = engine.token_to_id("<|startoftext|>"), engine.token_to_id("<|endoftext|>")
        return TextPolicy(length=length, clean="lower", begin=begin, end=end, pad=0)
    return TextPolicy(length=length)


def clip_tokenizer(open_clip: Any, length: int = 77) -> Tokenizer:
    """Return OpenAI's BPE, from the vocabulary inside open_clip, in our engine; same ids as open_clip's own.

    Only `ftfy`'s repair of broken encodings is left out, beyond its straightening of quotes, so that ids do not depend on which
    packages are installed.
    """
    theirs = open_clip.SimpleTokenizer(context_length=length)
    merges = [pair for pair, _ in sorted(theirs.bpe_ranks.items(), key=lambda item: item[1])]
    engine = Engine(BPE(theirs.encoder, merges, end_of_word_suffix="</w>"))
    engine.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    special = ["<start_of_text>", "<end_of_text>"]
    engine.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    begin, end = (engine.token_to_id(token) for token in special)
    return Tokenizer(engine, TextPolicy(length=length, clean="lower", begin=begin, end=end, pad=0))


def _their_config(config: DualConfig) -> dict[str, Any]:
    family, vision, text = family_of(config), config.vision, config.text
    assert isinstance(vision, VisionConfig) and isinstance(text, TextConfig)
    record: dict[str, Any] = {
        "embed_dim": config.text_head.dim,
        "text_cfg": {
            "context_length": text.length,
            "vocab_size": text.vocabulary,
            "width": text.width,
            "heads": text.heads,
            "layers": text.depth,
            "mlp_ratio": text.mlp_width / text.width,
            "pad_id": config.text_policy.pad,
            "norm_kwargs": {"eps": text.epsilon},
            **({"act_kwargs": {"approximate": "tanh"}} if text.activation == "gelu_tanh" else {}),
        },
    }
    if family == "siglip":
        record["custom_text"], record["init_logit_bias"] = True, config.scale.bias
        record["text_cfg"] |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
        record["vision_cfg"] = {
            "image_size": vision.image_size,
            "timm_model_name": _timm_name(vision),
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        }
        return record
    if vision.activation != text.activation or "gelu_tanh" in (vision.activation, text.activation):
        raise CheckpointError("open_clip's CLIP takes one activation for both towers, gelu or quick_gelu.")
    record["quick_gelu"] = vision.activation == "quick_gelu"
    # open_clip finds the end of a text as its largest id unless told the id.
    record["text_cfg"] |= {"pool_type": "eos", "eos_id": config.text_policy.end}
    record["vision_cfg"] = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "width": vision.width,
        "layers": vision.depth,
        "head_width": vision.width // vision.heads,
        "mlp_ratio": vision.mlp_width / vision.width,
        "norm_kwargs": {"eps": vision.epsilon},
    }
    return record


def _timm_name(vision: VisionConfig) -> str:
    """Return the SigLIP image tower of timm that has these sizes; open_clip builds them by name only."""
    import timm

    wanted = (vision.width, vision.depth, vision.heads, vision.mlp_width, vision.activation)
    for name in timm.list_models(f"vit_*_patch{vision.patch_size}_siglip_{vision.image_size}"):
        with torch.device("meta"):
            trunk = timm.create_model(name, num_classes=0)
        found = _timm_config(trunk)
        if (found.width, found.depth, found.heads, found.mlp_width, found.activation) == wanted:
            return str(name)
    raise CheckpointError(
        "timm has no SigLIP image tower of this size, so open_clip cannot build it. Use hf, which takes any."
    )


def _their_preprocessing(policy: ImagePolicy) -> dict[str, Any]:
    if policy.resize == "crop" and policy.crop_fraction != 1:
        raise CheckpointError(
            f"open_clip's preprocessing cannot cut out the inner {policy.crop_fraction:.3g} of an image. Use hf, which can."
        )
    names = {ours: theirs for theirs, ours in _RESIZE.items()}
    return {
        "size": policy.size,
        "mean": list(policy.mean),
        "std": list(policy.std),
        "interpolation": policy.interpolation,
        "resize_mode": names[policy.resize],
    }
