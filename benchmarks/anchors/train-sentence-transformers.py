"""A training step of a CLIP in sentence-transformers, as its Trainer takes it: plain or cached symmetric ranking loss over images and texts."""

from itertools import cycle
from pathlib import Path

import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, losses
from sentence_transformers.base.modules.transformer import Transformer

from diptych.bench.serve import serve


def make(folder: str, batch: int, tokens: str, bf16: bool = False, chunk: int = 0):
    torch.manual_seed(0)
    pairs = load_file(Path(folder) / "pairs.safetensors")
    columns = zip(*(pairs[name].split(batch) for name in ("pixels", "ids", "mask")), strict=True)
    batches = cycle([features(*parts, trimmed=tokens == "trimmed") for parts in columns])
    model = SentenceTransformer(modules=[Transformer(f"{folder}/huggingface")], device="cpu").train()
    settings = {"scale": 1 / 0.07, "directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    loss = (
        losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=chunk, **settings)
        if chunk
        else losses.MultipleNegativesRankingLoss(model, **settings)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss([dict(side) for side in next(batches)], None)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        return float(value)

    return step


def features(pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, *, trimmed: bool) -> list[dict]:
    """Return what its processor makes of a batch of images and one of texts."""
    length = int(mask.sum(1).max()) if trimmed else ids.shape[1]
    texts = {"input_ids": ids[:, :length], "attention_mask": mask[:, :length]}
    return [{"pixel_values": pixels, "modality": "image"}, texts | {"modality": "text"}]


serve(make, ("sentence-transformers", "transformers", "torch"))
