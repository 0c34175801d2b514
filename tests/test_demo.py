"""What the repository ships for `make demo`: its spec, its cards and the checkpoints that were trained for it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from capfilt.pipelines.curate import curate, in_process
from capfilt.quality import measure_quality
from capfilt.spec import Quality, Truth, load_curate_spec
from capfilt.toyweb import render

ROOT = Path(__file__).parent.parent


def test_the_shipped_models_tell_true_texts_from_others(tmp_path: Path) -> None:
    """On a web that neither they nor the demo have seen."""
    web = render(tmp_path / "web", images=300, shards=2, seed=2026)
    paths = {"input.paths": web.directory / "shards", "output": tmp_path / "out"}
    spec = load_curate_spec(ROOT / "pipelines" / "demo.yaml", [f"{name}={path}" for name, path in paths.items()])
    curate(spec, execute=in_process, console=Console(file=io.StringIO()))
    found = measure_quality(Quality(dataset=spec.output, truth=Truth(toyweb=str(web.directory))))
    web_texts, synthetic = found.sources["web"], found.sources["synthetic"]
    assert web_texts.noise_before == pytest.approx(0.45, abs=0.1)
    assert found.noise_after is not None
    assert found.noise_after < 0.05
    for source, precision, recall in ((web_texts, 0.97, 0.85), (synthetic, 0.95, 0.85)):
        assert source.precision is not None
        assert source.recall is not None
        assert source.precision > precision
        assert source.recall > recall
