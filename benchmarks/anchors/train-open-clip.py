"""A training step as open_clip_train.train.train_one_epoch takes it (accum_freq 1), with the optimiser that its main makes."""

import logging
import math
from itertools import cycle
from pathlib import Path

import open_clip
import torch
from open_clip_train.precision import get_autocast
from open_clip_train.train import backward, unwrap_model
from safetensors.torch import load_file

from diptych.bench.serve import serve


def make(folder: str, batch: int, tokens: str, precision: str, compiled: bool = False):
    assert tokens == "padded"
    torch.manual_seed(0)
    pairs = load_file(Path(folder) / "pairs.safetensors")
    batches = cycle(list(zip(pairs["pixels"].split(batch), pairs["ids"].split(batch), strict=True)))
    model = open_clip.create_model(f"local-dir:{folder}/openclip", load_weights=True, output_dict=True).train()
    loss = open_clip.ClipLoss()

    def undecayed(name: str, parameter: torch.Tensor) -> bool:
        return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if undecayed(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in named if not undecayed(n, p)], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.98), eps=1e-6)
    scaler = torch.amp.GradScaler(device="cpu") if precision == "amp" else None
    autocast = get_autocast(precision, device_type="cpu")
    if compiled:
        logging.getLogger("torch").setLevel(logging.ERROR)
        model = torch.compile(model)

    def step() -> float:
        pixels, ids = next(batches)
        optimizer.zero_grad()
        with autocast():
            total = sum(loss(**model(pixels, ids), output_dict=True).values())
        backward(total, scaler)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        with torch.no_grad():
            unwrap_model(model).logit_scale.clamp_(0, math.log(100))
        return float(total)

    return step


serve(make, ("open_clip_torch", "torch"))
