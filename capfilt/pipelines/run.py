"""Do what a spec says: one function for each kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, overload

from capfilt.spec import BootstrapSpec, CurateSpec, EvaluateSpec, ExportSpec, IngestSpec, RunSpec, TrainSpec

if TYPE_CHECKING:
    from capfilt.export.driver import ExportSummary
    from capfilt.pipelines.bootstrap import BootstrapSummary
    from capfilt.pipelines.curate import Summary
    from capfilt.pipelines.evaluate import Report
    from capfilt.pipelines.ingest import IngestSummary
    from capfilt.pipelines.train import TrainSummary

    Outcome: TypeAlias = Summary | TrainSummary | Report | BootstrapSummary | ExportSummary | IngestSummary


@overload
def run(spec: CurateSpec, **options: Any) -> Summary: ...
@overload
def run(spec: TrainSpec, **options: Any) -> TrainSummary: ...
@overload
def run(spec: EvaluateSpec, **options: Any) -> Report: ...
@overload
def run(spec: BootstrapSpec, **options: Any) -> BootstrapSummary: ...
@overload
def run(spec: IngestSpec, **options: Any) -> IngestSummary: ...
@overload
def run(spec: ExportSpec, **options: Any) -> ExportSummary: ...
def run(spec: RunSpec, **options: Any) -> Outcome:
    """Run a spec; imports only what its kind needs."""
    if isinstance(spec, CurateSpec):
        from capfilt.pipelines.curate import curate

        return curate(spec, **options)
    if isinstance(spec, TrainSpec):
        from capfilt.pipelines.train import train

        return train(spec, **options)
    if isinstance(spec, EvaluateSpec):
        from capfilt.pipelines.evaluate import evaluate

        return evaluate(spec, **options)
    if isinstance(spec, IngestSpec):
        from capfilt.pipelines.ingest import ingest

        return ingest(spec, **options)
    if isinstance(spec, ExportSpec):
        from capfilt.export.driver import export

        return export(spec, **options)
    from capfilt.pipelines.bootstrap import bootstrap

    return bootstrap(spec, **options)
