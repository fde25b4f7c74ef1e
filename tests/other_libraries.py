"""What tests share of other libraries: small models with random weights, in folders as open_clip and transformers write them."""

import json
from pathlib import Path

import torch

from diptych.data.tokenizer import Tokenizer


def randomise(module: torch.nn.Module) -> None:
    """Move every parameter off its initial value, so that no bias or norm is trivially 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def hf_clip(activation: str):
    """Return a CLIP of transformers for 32-pixel images and 300 tokens."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": activation}
    text = {"hidden_size": 32, "vocab_size": 300, "max_position_embeddings": 16, **tower}
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    vision = {"hidden_size": 64, "image_size": 32, "patch_size": 8, **tower}
    return CLIPModel(CLIPConfig(text_config=text | ids, vision_config=vision, projection_dim=24)).eval()


def hf_siglip():
    """Return a SigLIP of transformers for 32-pixel images and 300 tokens."""
    from transformers import SiglipConfig, SiglipModel

    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 300, "max_position_embeddings": 16, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    vision = {"image_size": 32, "patch_size": 8}
    return SiglipModel(SiglipConfig(text_config=text | tower, vision_config=vision | tower)).eval()


def save_hf(model, folder: Path, tokenizer: Tokenizer) -> None:
    """Write one of these as a folder of the hub: weights, preprocessing, tokenizer."""
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    model.save_pretrained(folder)
    if "Siglip" in type(model).__name__:
        processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    else:
        processor = CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    special = {"bos_token": "<begin>", "eos_token": "<end>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def openclip_folder(folder: Path, model_cfg: dict, tokenizer: Tokenizer) -> None:
    """Write a model of open_clip with these settings as it keeps them on the hub."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if model_cfg.get("custom_text") else open_clip.CLIP
    model = kind(**{key: value for key, value in model_cfg.items() if key != "custom_text"})
    randomise(model)
    folder.mkdir()
    preprocess = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    record = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "tokenizer.json").write_text(tokenizer.to_json())


def vit_b_32_like(quick_gelu: bool) -> dict:
    """Return settings of open_clip for a CLIP of 32-pixel images and 300 tokens."""
    return {
        "embed_dim": 24,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 300,
            "width": 32,
            "heads": 2,
            "layers": 2,
            "eos_id": 1,
            "pool_type": "eos",
        },
    }


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def save_dino(folder: Path, family: str):
    """Write a model of a family that DINO is of, for 28-pixel images in patches of 7, and return it."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    if family == "vit":
        sizes["intermediate_size"] = 32
    model = AutoModel.from_config(AutoConfig.for_model(family, **sizes)).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGENET))
    return model


def save_sam(folder: Path) -> Path:
    """Write a SAM for 64-pixel images in patches of 8, and return the folder."""
    from transformers import SamConfig, SamModel

    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "output_channels": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "mlp_dim": 32,
        "num_pos_feats": 4,
        "window_size": 3,
        "global_attn_indexes": [1],
    }
    decoder = {
        "hidden_size": 8,
        "mlp_dim": 16,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 8,
        "num_hidden_layers": 1,
    }
    prompts = {"hidden_size": 8, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))
    with torch.no_grad():
        for parameter in model.parameters():  # off zero biases, positions and unit norms
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    record = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(record))
    return folder
