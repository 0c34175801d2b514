"""JPEG bytes -> 384 x 384 RGB: capfilt against Pillow, one thread, both in one run.

    python benchmarks/decode.py [--json FILE] [--threads N]

Rows: ours (capfilt.images.decode + capfilt.models.preprocess.resize), Pillow (open, convert, bicubic resize),
libjpeg-turbo's decode alone (simplejpeg; what is left to win), and OpenCV (area) where it is installed. The rows
take turns image by image; the number is the median over repeats. Photographs: scikit-image's, three crops of each,
short side resized to 512 or 1024 px, quality 85, 88 or 90. Target: 2.5 x Pillow at 512 px, within 2 grey levels.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
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


def photographs(short_side: int) -> list[bytes]:
    """24 JPEGs: whole, landscape (3:2) and portrait (2:3) of each photograph."""
    left, right, _ = skimage.data.stereo_motorcycle()
    names = ("astronaut", "coffee", "chelsea", "rocket", "retina", "hubble_deep_field")
    qualities = cycle((85, 88, 90))
    jpegs = []
    for array in (left, right, *(getattr(skimage.data, name)() for name in names)):
        photo = Image.fromarray(array)
        width, height = photo.size
        wide, tall = min(width, height * 3 // 2), min(height, width * 3 // 2)
        for box in ((width, height), (wide, wide * 2 // 3), (tall * 2 // 3, tall)):
            scale = short_side / min(box)
            image = photo.resize((round(box[0] * scale), round(box[1] * scale)), BICUBIC, (0, 0, *box))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=next(qualities))
            jpegs.append(buffer.getvalue())
    return jpegs


def ours(data: bytes) -> torch.Tensor:
    return resize(decode(data, LIMITS).rgb, SIZE)


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
        image = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        return cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)

    return run


def grey_levels(jpegs: list[bytes], reference: Callable[[bytes], Image.Image]) -> dict[str, float]:
    """Largest and mean absolute difference between ours and a reference."""
    gaps = [
        np.abs(ours(data).permute(1, 2, 0).numpy().astype(int) - np.asarray(reference(data), dtype=int))
        for data in jpegs
    ]
    return {"max": int(max(gap.max() for gap in gaps)), "mean": round(float(np.mean([g.mean() for g in gaps])), 4)}


def measure(jpegs: list[bytes], repeats: int, threads: int) -> dict[str, float]:
    """Median images/s of each row over repeats; the rows alternate image by image, so that all meet the same noise."""
    rows: dict[str, Callable[[bytes], Any]] = {"ours": ours, "Pillow": pillow, "libjpeg-turbo, decode only": turbo}
    if area := opencv():
        rows["OpenCV, area"] = area
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for repeat in range(repeats + 1):
        seconds = dict.fromkeys(rows, 0.0)
        for data in jpegs:
            for name, row in rows.items():
                start = time.perf_counter()
                row(data)
                seconds[name] += time.perf_counter() - start
        if repeat:  # the first warms up
            for name, spent in seconds.items():
                rates[name].append(len(jpegs) / spent)
    if threads > 1:
        name = f"ours, {threads} threads"
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(repeats):
                start = time.perf_counter()
                list(pool.map(ours, jpegs))
                rates.setdefault(name, []).append(len(jpegs) / (time.perf_counter() - start))
    return {name: round(statistics.median(values), 1) for name, values in rates.items()}


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
    parser.add_argument("--repeats", type=int, default=9, help="timed repeats (default 9)")
    parser.add_argument("--threads", type=int, default=1, help="above 1: a further row, ours in a pool of threads")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = {name: version(name) for name in ("pillow", "simplejpeg", "torch", "numpy")}
    result: dict[str, Any] = {"machine": machine(), "versions": versions, "sizes": {}}
    print(result["machine"], versions)
    for side in (512, 1024):
        jpegs = photographs(side)
        rates = measure(jpegs, arguments.repeats, arguments.threads)
        ratio = round(rates["ours"] / rates["Pillow"], 2)
        levels = {"rows first": grey_levels(jpegs, pillow_rows_first), "installed": grey_levels(jpegs, pillow)}
        result["sizes"][side] = {"images": len(jpegs), "images_per_s": rates, "ratio": ratio, "grey_levels": levels}
        print(f"\n{side} px, {len(jpegs)} images, mean {sum(map(len, jpegs)) // len(jpegs) // 1024} KiB")
        for name, rate in rates.items():
            print(f"  {name:28}{rate:8.1f} images/s")
        print(f"  ours / Pillow {ratio} x")
        for name, gap in levels.items():
            print(f"  grey levels from Pillow, {name}: max {gap['max']}, mean {gap['mean']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
