"""What the numbers were measured on."""

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diptych.training.speed import matmul_peak

PACKAGES = ("diptych", "torch", "torchvision", "timm", "numpy", "pillow", "tokenizers", "usearch")


def machine() -> dict[str, Any]:
    """Return processor, memory, load, and the measured matmul peaks in GFLOP/s by precision."""
    device = torch.device("cpu")
    return {
        "date": date.today().isoformat(),
        "processor": _from("/proc/cpuinfo", "model name") or platform.machine(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "peak_gflops": {"fp32": matmul_peak(device, "fp32"), "bf16": matmul_peak(device, "bf16")},
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that take part, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _from(path: str, key: str) -> str | None:
    """Return the value of a `key : value` line."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:  # no Linux
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)
