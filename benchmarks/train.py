"""One training step of the same CLIP with the same weights and the same batch in memory: ours, open_clip's, transformers'.

Contenders take turns, step by step, so that a busy machine slows all of them alike; what is reported are medians of ratios. Before
anything is timed, all must give the same loss. Writes benchmarks/results/train.json and train.md.

    python benchmarks/train.py [--steps 200] [--batch 64]
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import numpy as np
import open_clip
import torch
from transformers import CLIPModel

from diptych.data.tokenizer import TextPolicy, Tokenizer, hash_strings
from diptych.data.transforms import ImagePolicy
from diptych.methods import clip
from diptych.models.build import DualConfig, build
from diptych.models.dual import DualEncoder
from diptych.models.heads import LinearHeadConfig
from diptych.models.huggingface import to_huggingface
from diptych.models.openclip import to_openclip
from diptych.models.text import TextConfig
from diptych.models.vision import VisionConfig
from diptych.training.optim import OptimizerConfig, make_optimizer
from diptych.training.speed import matmul_peak
from diptych.training.step import accumulate_gradients
from diptych.types import Batch, Tokens

RESULTS = Path(__file__).parent / "results"
SKIP = 20
Step = Callable[[], float]


def made_model(length: int = 32) -> DualEncoder:
    """Return a CLIP of about 14 million parameters: ViT-S/32 of half depth, a text tower of width 256."""
    words = [f"word{i} thing{i % 50}" for i in range(2000)]
    tokenizer = Tokenizer.train(words, vocabulary=4096, length=length)
    torch.manual_seed(0)
    return build(
        DualConfig(
            VisionConfig(image_size=224, patch_size=32, width=384, depth=6, heads=6, mlp_width=1536),
            TextConfig(vocabulary=tokenizer.size, length=length, width=256, depth=4, heads=4, mlp_width=1024),
            LinearHeadConfig(256),
            LinearHeadConfig(256),
            image_policy=ImagePolicy(size=224),
            text_policy=TextPolicy(length=length),
        ),
        tokenizer,
    )


def made_batch(model: DualEncoder, size: int) -> Batch:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(256, size=(size, 3, 224, 224), dtype=np.uint8))
    tokens = model.tokenizer([f"word{i} thing{i % 50} in row {i}" for i in range(size)])
    full = torch.full((size, model.config.text_policy.length), model.config.text_policy.pad)
    mask = torch.zeros(full.shape, dtype=torch.bool)
    full[:, : tokens.ids.shape[1]], mask[:, : tokens.ids.shape[1]] = tokens.ids, tokens.mask
    return Batch(
        tuple(map(str, range(size))), (images,), (Tokens(full, mask, tokens.key),), hash_strings(map(str, range(size)))
    )


def ours(model: DualEncoder, batch: Batch, *, bf16: bool) -> Step:
    objective = clip.Objective(model.train(), clip.Config())
    optimizer = make_optimizer(objective, (model.vision, model.text), OptimizerConfig())

    def step() -> float:
        optimizer.zero_grad()
        (losses,) = accumulate_gradients(objective, [batch], 1, torch.autocast("cpu", torch.bfloat16, enabled=bf16))
        optimizer.step()
        return losses.total.item()

    return step


def of_openclip(folder: Path, batch: Batch, pixels: torch.Tensor, *, bf16: bool) -> Step:
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=True).train()
    criterion = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            image, text, scale = model(pixels, batch.texts[0].ids)[:3]
            loss = criterion(image, text, scale)
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def of_transformers(folder: Path, batch: Batch, pixels: torch.Tensor, *, bf16: bool) -> Step:
    model = CLIPModel.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    tokens = batch.texts[0]

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            output = model(
                input_ids=tokens.ids, attention_mask=tokens.mask.long(), pixel_values=pixels, return_loss=True
            )
        output.loss.backward()
        optimizer.step()
        return float(output.loss)

    return step


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--batch", type=int, default=64)
    given = arguments.parse_args()
    model = made_model()
    batch = made_batch(model, given.batch)
    pixels = model.pixels(batch.images[0])
    with tempfile.TemporaryDirectory() as folder:
        to_openclip(model, Path(folder) / "openclip")
        to_huggingface(model, Path(folder) / "hf")
        steps: dict[str, Step] = {
            "open_clip, fp32": of_openclip(Path(folder) / "openclip", batch, pixels, bf16=False),
            "open_clip, bf16 autocast": of_openclip(Path(folder) / "openclip", batch, pixels, bf16=True),
            "transformers, fp32": of_transformers(Path(folder) / "hf", batch, pixels, bf16=False),
            "transformers, bf16 autocast": of_transformers(Path(folder) / "hf", batch, pixels, bf16=True),
            "diptych, fp32": ours(made_model(), batch, bf16=False),
            "diptych, as chosen here (bf16 autocast)": ours(made_model(), batch, bf16=True),
        }
        first = {name: step() for name, step in steps.items()}
        losses = [loss for name, loss in first.items() if "fp32" in name]
        assert max(losses) - min(losses) < 1e-3, first
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(SKIP + given.steps):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                if turn >= SKIP:
                    seconds[name].append(time.perf_counter() - began)
    own = seconds["diptych, as chosen here (bf16 autocast)"]
    ratios = {
        name: statistics.median(theirs / mine for theirs, mine in zip(times, own, strict=True))
        for name, times in seconds.items()
    }
    record = {
        "what": "seconds of one training step, forward, loss, backward, AdamW; ratio = their step / ours, median over turns",
        "batch": given.batch,
        "steps": given.steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "first_loss": first,
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio": ratios,
        "matmul_peak_gflops": {p: matmul_peak(torch.device("cpu"), p) for p in ("fp32", "bf16")},
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "transformers")},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "train.json").write_text(json.dumps(record, indent=2) + "\n")
    lines = ["| step of | median seconds | times ours |", "|---|---|---|"]
    lines += [f"| {name} | {record['median_seconds'][name]:.3f} | {ratio:.2f} |" for name, ratio in ratios.items()]
    (RESULTS / "train.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
