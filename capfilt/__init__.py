"""capfilt: noisy web image-text pairs in, clean ones out, by BLIP's CapFilt.

    import capfilt

    spec = capfilt.load_spec("pipelines/demo.yaml")
    summary = capfilt.run(spec)
    pairs = capfilt.open_dataset(spec.output).pairs()   # a pyarrow dataset

Importing this package loads neither torch nor ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capfilt.dataset import CuratedDataset
    from capfilt.pipelines.run import Outcome
    from capfilt.spec import RunSpec

__all__ = ["load_spec", "open_dataset", "run"]


def load_spec(path: str, overrides: list[str] | None = None) -> RunSpec:
    """Read a run spec; see capfilt.spec.load_spec."""
    from capfilt import spec

    return spec.load_spec(path, overrides or ())


def run(spec: RunSpec, **options: Any) -> Outcome:
    """Do what a spec says; see the function of its kind in capfilt.pipelines for the options and errors."""
    from capfilt.pipelines.run import run

    return run(spec, **options)


def open_dataset(output: str, storage_options: Mapping[str, Any] | None = None) -> CuratedDataset:
    """Open a curated dataset for reading; see capfilt.dataset.CuratedDataset."""
    from capfilt.dataset import CuratedDataset

    return CuratedDataset.for_reading(output, storage_options or {})
