"""What the benchmarks share: the machine, its matrix product's rate, and how a spread is written."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def machine(device: str = "cpu") -> dict[str, Any]:
    """The processor, its cores and what they can do, the load at this moment, the GPU if it is used, versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    found = {"cpu": (models or [platform.processor()])[0], "cores": os.cpu_count(), "load": os.getloadavg()}
    found["simd"] = torch.backends.cpu.get_cpu_capability()
    found["versions"] = {name: version(name) for name in ("torch", "transformers")}
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def wait(device: str) -> None:
    """For all that was asked of the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def matrix_product_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of square matrices of side 2,048 (cuda: 8,192), 2 for a multiply and add; median of five."""
    side, products = (8192, 10) if device == "cuda" else (2048, 1)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for repeat in range(6):
        wait(device)
        begin = time.perf_counter()
        for _ in range(products):
            a @ b
        wait(device)
        if repeat:  # the first warms up
            seconds.append((time.perf_counter() - begin) / products)
    return 2 * side**3 / statistics.median(seconds)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(ratio: dict[str, float]) -> str:
    """A spread of ratios, to read."""
    return f"{ratio['median']:.2f} x ({ratio['min']:.2f} to {ratio['max']:.2f})"
