"""Do what a spec says: one function for each kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from capfilt.spec import CurateSpec, RunSpec, TrainSpec

if TYPE_CHECKING:
    from capfilt.pipelines.curate import Summary
    from capfilt.pipelines.train import TrainSummary

    Outcome = Summary | TrainSummary


def run(spec: RunSpec, **options: Any) -> Outcome:
    """Run a spec; imports only what its kind needs."""
    if isinstance(spec, CurateSpec):
        from capfilt.pipelines.curate import curate

        return curate(spec, **options)
    if isinstance(spec, TrainSpec):
        from capfilt.pipelines.train import train

        return train(spec, **options)
    raise NotImplementedError(spec.kind)
