"""JPEG bytes -> 384 x 384 RGB: capfilt against Pillow, one thread, both in one run.

    python benchmarks/decode.py [--json FILE] [--threads N]

Rows: ours (capfilt.images.decode + capfilt.models.preprocess.resize), Pillow (open, convert, bicubic resize),
libjpeg-turbo's decode alone (simplejpeg; what is left to win), and OpenCV (area) where it is installed. The rows take
turns; the number is the median over repeats, in images per second of CPU time. Photographs: scikit-image's, three crops
of each, long or short side resized to 512 px, or short side to 1024, quality 85, 88 or 90. Target: 2.5 x Pillow at
512 px, within 2 grey levels.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import skimage.data
import torch
from PIL import Image

from capfilt.images import decode
from capfilt.models.preprocess import resize
from capfilt.spec import Images

SIZE = 384
LIMITS = Images()
BICUBIC = Image.Resampling.BICUBIC


class Here(threading.local):
    def __init__(self) -> None:
        self.scratch = np.empty(12 * 2**20, np.uint8)
        self.between = torch.empty(4 * 2**20, dtype=torch.uint8)
        self.slot = torch.empty((SIZE, SIZE, 3), dtype=torch.uint8)


here = Here()


def photographs(pixels: int, side: Callable[[tuple[int, int]], int]) -> list[bytes]:
    """24 JPEGs: whole, landscape (3:2) and portrait (2:3) of each photograph; `side` (min or max) is `pixels` long."""
    left, right, _ = skimage.data.stereo_motorcycle()
    names = ("astronaut", "coffee", "chelsea", "rocket", "retina", "hubble_deep_field")
    qualities = cycle((85, 88, 90))
    jpegs = []
    for array in (left, right, *(getattr(skimage.data, name)() for name in names)):
        photo = Image.fromarray(array)
        width, height = photo.size
        wide, tall = min(width, height * 3 // 2), min(height, width * 3 // 2)
        for box in ((width, height), (wide, wide * 2 // 3), (tall * 2 // 3, tall)):
            scale = pixels / side(box)
            image = photo.resize((round(box[0] * scale), round(box[1] * scale)), BICUBIC, (0, 0, *box))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=next(qualities))
            jpegs.append(buffer.getvalue())
    return jpegs


def ours(data: bytes) -> torch.Tensor:
    """As the worker does it."""
    return resize(decode(data, LIMITS, here.scratch).rgb, SIZE, here.slot, here.between)


def pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB").resize((SIZE, SIZE), BICUBIC)


def pillow_rows_first(data: bytes) -> Image.Image:
    """Pillow's order of passes up to version 12, whichever is installed."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return image.resize((SIZE, image.height), BICUBIC).resize((SIZE, SIZE), BICUBIC)


def turbo(data: bytes) -> Any:
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)


def opencv() -> Callable[[bytes], Any] | None:
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(1)

    def run(data: bytes) -> Any:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert image is not None
        return cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)

    return run


def grey_levels(jpegs: list[bytes], reference: Callable[[bytes], Image.Image]) -> dict[str, float]:
    """Largest and mean absolute difference between ours and a reference."""
    gaps = [
        np.abs(ours(data).permute(1, 2, 0).numpy().astype(int) - np.asarray(reference(data), dtype=int))
        for data in jpegs
    ]
    return {"max": int(max(gap.max() for gap in gaps)), "mean": round(float(np.mean([g.mean() for g in gaps])), 4)}


def measure(jpegs: list[bytes], repeats: int) -> dict[str, float]:
    """Median images per second of one thread's CPU time; within a repeat the rows take turns, each over all images.

    CPU time, not the wall's: on a shared machine the latter measures the neighbours.
    """
    rows: dict[str, Callable[[bytes], Any]] = {"ours": ours, "Pillow": pillow, "libjpeg-turbo, decode only": turbo}
    if area := opencv():
        rows["OpenCV, area"] = area
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for repeat in range(repeats + 1):
        for name, row in rows.items():
            start = time.thread_time()
            for data in jpegs:
                row(data)
            if repeat:  # the first warms up
                rates[name].append(len(jpegs) / (time.thread_time() - start))
    return {name: round(statistics.median(values), 1) for name, values in rates.items()}


def scaling(jpegs: list[bytes], threads: int, repeats: int) -> float:
    """How many times faster, by the wall clock, a pool of threads is than one thread: what the GIL leaves."""

    def seconds(count: int) -> float:
        with ThreadPoolExecutor(count) as pool:
            start = time.perf_counter()
            list(pool.map(ours, jpegs))
            return time.perf_counter() - start

    return round(statistics.median(seconds(1) / seconds(threads) for _ in range(repeats)), 2)


def machine() -> dict[str, Any]:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = models[0] if models else model
    return {"cpu": model, "cores": os.cpu_count(), "simd": torch.backends.cpu.get_cpu_capability()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--repeats", type=int, default=15, help="timed repeats (default 15)")
    parser.add_argument("--threads", type=int, default=1, help="above 1: also how ours scales to a pool of threads")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = {name: version(name) for name in ("pillow", "simplejpeg", "torch", "numpy")}
    result: dict[str, Any] = {"machine": machine(), "versions": versions, "sizes": {}}
    print(result["machine"], versions)
    for name, pixels, side in (("long", 512, max), ("short", 512, min), ("short", 1024, min)):
        jpegs = photographs(pixels, side)
        rates = measure(jpegs, arguments.repeats)
        ratio = round(rates["ours"] / rates["Pillow"], 2)
        levels = {"rows first": grey_levels(jpegs, pillow_rows_first), "installed": grey_levels(jpegs, pillow)}
        result["sizes"][f"{pixels} {name} side"] = {
            "images": len(jpegs),
            "images_per_s": rates,
            "ratio": ratio,
            "grey_levels": levels,
        }
        print(f"\n{pixels} px {name} side, {len(jpegs)} images, mean {sum(map(len, jpegs)) // len(jpegs) // 1024} KiB")
        for row, rate in rates.items():
            print(f"  {row:28}{rate:8.1f} images/s")
        print(f"  ours / Pillow {ratio} x")
        if arguments.threads > 1:
            times = result["sizes"][f"{pixels} {name} side"]["scaling"] = scaling(jpegs, arguments.threads, 5)
            print(f"  ours, {arguments.threads} threads: {times} x one thread")
        for order, gap in levels.items():
            print(f"  grey levels from Pillow, {order}: max {gap['max']}, mean {gap['mean']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
