"""A small curated dataset with hostile captions and broken images, for the tests of what is shown of one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from conftest import jpeg, write_shard
from rich.console import Console
from stubs import load_hash

from capfilt.pipelines.curate import Execute, Summary, curate, in_process
from capfilt.pipelines.job import LoadModels
from capfilt.spec import CaptionerCard, CurateSpec, FilterCard, Input, LocalCheckpoint

HOSTILE = {
    "script": "<script>document.title='owned'; fetch('https://evil.example/')</script>",
    "markup": "<img src=https://evil.example/x.png onerror=\"document.title='owned'\"><style>*{display:none}</style>",
    "ends": "</script></title></textarea>--><svg onload=document.title='owned'>{{ 7 * 7 }} ${7*7} &lt;b&gt;",
    "turned": "a cat \u202egnp.exe\u202c on \u2066the\u2069 mat\u200b",
    "long": "endless " * 1250,  # 10,000 characters
    "control": "a bell \x07 and a null \x00 and \x1b[31mred",
    "loop": "a man in a man in a man in a man in a field",
}
"""Web texts of the first rows."""

ROWS = 40  # few enough that a gallery holds nearly all of them
SHARDS = 3


def cards(root: Path, filters: int = 1) -> dict[str, Any]:
    """A captioner and filters whose checkpoints are there and are no models."""
    folder = root / "checkpoint"
    folder.mkdir(exist_ok=True)
    for name, content in (("config.json", "{}"), ("model.safetensors", "weights"), ("vocab.txt", "[PAD]")):
        (folder / name).write_text(content)
    card = {"checkpoint": LocalCheckpoint(path=str(folder)), "image_size": 16, "batch_size": 16}
    return {
        "captioners": (CaptionerCard(role="captioner", name="writer", **card),),
        "filters": tuple(FilterCard(role="filter", name=f"judge-{n}", **card) for n in range(filters)),
    }


def make_web(root: Path) -> Path:
    """The input: SHARDS files of ROWS rows."""
    for shard in range(SHARDS):
        images: list[bytes | None] = [jpeg(1000 * shard + n, 24 + 8 * (n % 3)) for n in range(ROWS)]
        texts: list[str | None] = [f"text {n % 20} of shard {shard}" for n in range(ROWS)]
        images[30], images[31], images[32] = None, b"no image", b""
        texts[35] = None
        if shard == 0:
            texts[: len(HOSTILE)] = list(HOSTILE.values())
        write_shard(root / "in" / f"part-{shard}.parquet", images, texts)
    return root / "in"


def curate_web(
    root: Path,
    execute: Execute = in_process,
    console: Console | None = None,
    load: LoadModels = load_hash,
    **fields: Any,
) -> tuple[CurateSpec, Summary]:
    """Curate it into `root/out` with models that cost nothing."""
    defaults: dict[str, Any] = {
        "kind": "curate",
        "input": Input(paths=(str(root / "in"),)),
        "output": str(root / "out"),
        "fragment_rows": 20,
        "max_error_fraction": 0.5,
        **cards(root),
    }
    spec = CurateSpec(**{**defaults, **fields})
    return spec, curate(spec, load=load, execute=execute, console=console or Console(file=io.StringIO()))
