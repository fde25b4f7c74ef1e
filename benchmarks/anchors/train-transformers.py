"""A training step of CLIPModel as transformers' Trainer takes it: autocast, loss, clipping to norm 1, fused AdamW, schedule."""

from itertools import cycle
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPModel, get_scheduler

from diptych.bench.serve import serve


def make(folder: str, batch: int, tokens: str, bf16: bool = False, compiled: bool = False):
    assert tokens == "padded"
    torch.manual_seed(0)
    pairs = load_file(Path(folder) / "pairs.safetensors")
    columns = (pairs[name].split(batch) for name in ("pixels", "ids", "mask"))
    names = ("pixel_values", "input_ids", "attention_mask")
    batches = cycle([dict(zip(names, parts, strict=True)) for parts in zip(*columns, strict=True)])
    model = CLIPModel.from_pretrained(f"{folder}/huggingface").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    schedule = get_scheduler("constant", optimizer)
    run = torch.compile(model) if compiled else model

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = run(**next(batches), return_loss=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.zero_grad()
        return float(loss)

    return step


serve(make, ("transformers", "torch"))
