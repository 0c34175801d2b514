"""Metrics of a run for Prometheus, through Ray's agent on each machine.

The driver counts what is accounted for, a fragment at a time; each worker what meets its models, a batch at a time.
Ray adds `ray_` to every name, `_total` to counters', and labels for the machine and the process. Its agent comes with
ray[default] (`pip install 'capfilt[cluster]'`); where it is not installed nothing is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from capfilt.receipts import Receipt
from capfilt.schema import Reason, Status
from capfilt.throughput import Throughput


@dataclass(frozen=True)
class Metric:
    """What is exported under a name. `labels` come after `run`, which all have."""

    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


METRICS = {
    "capfilt_rows": Metric("counter", "Rows accounted for, those taken over from an earlier run included.", ("status",)),
    "capfilt_errors": Metric("counter", "Rows in error.", ("reason",)),
    "capfilt_shards": Metric("counter", "Shards committed, and files that could not be curated.", ("outcome",)),
    "capfilt_stage_seconds": Metric("counter", "Seconds by stage, summed over workers and threads.", ("stage",)),
    "capfilt_rows_waiting": Metric("gauge", "Rows known or estimated that are not accounted for yet."),
    "capfilt_device_busy": Metric("gauge", "Part of the workers' time in which their models computed, 0 to 1."),
    "capfilt_images": Metric("counter", "Images that met the models; by worker, as they do."),
    "capfilt_model_seconds": Metric("counter", "Seconds on the models; by worker, as they pass."),
    "capfilt_batch_seconds": Metric(
        "histogram", "Seconds that a batch was on the models.", boundaries=(0.1, 0.3, 1, 3, 10, 30, 100, 300)
    ),
}


def exported() -> bool:
    """Whether this process is in a Ray whose agent would export what it counts."""
    import ray
    from ray._private.utils import get_dashboard_dependency_error

    return bool(ray.is_initialized()) and get_dashboard_dependency_error() is None


class Meters:
    """A run's metrics, made in this process as they are first used."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._made: dict[str, Any] = {}

    def add(self, name: str, amount: float, **labels: str) -> None:
        """Add to a counter, set a gauge, or observe in a histogram."""
        metric = METRICS[name]
        if name not in self._made:
            self._made[name] = self._make(name, metric)
        made, labels = self._made[name], {"run": self._run, **labels}
        if metric.kind == "gauge":
            made.set(amount, tags=labels)
        elif metric.kind == "histogram":
            made.observe(amount, tags=labels)
        elif amount > 0:  # Ray refuses to add nothing
            made.inc(amount, tags=labels)

    def _make(self, name: str, metric: Metric) -> Any:
        from ray.util import metrics

        kinds = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}
        more = {"boundaries": list(metric.boundaries)} if metric.kind == "histogram" else {}
        return kinds[metric.kind](name, description=metric.meaning, tag_keys=("run", *metric.labels), **more)


class DriverMetrics:
    """What the driver counts, as the display is told. Ray may start after it: what goes before the start is kept."""

    def __init__(self, run: str) -> None:
        self._meters = Meters(run)
        self._throughput = Throughput()
        self._expected = self._rows = 0
        self._shards: dict[str, int] = {}
        self._exported: bool | None = None

    def expect(self, rows: int) -> None:
        """Rows the run is known or estimated to have."""
        self._expected = rows

    def adopt(self, receipt: Receipt) -> None:
        """Count a fragment that an earlier run finished."""
        if self._off():
            return
        self._rows += receipt.counts.rows
        counts = {Status.KEPT: receipt.counts.kept, Status.DROPPED: receipt.counts.dropped}
        for status, count in {**counts, Status.ERROR: receipt.counts.errors}.items():
            self._meters.add("capfilt_rows", count, status=str(status))
        for reason in Reason:
            if reason in _ERRORS:
                self._meters.add("capfilt_errors", receipt.reasons.get(reason, 0), reason=str(reason))
        self._meters.add("capfilt_rows_waiting", max(0, self._expected - self._rows))

    def update(self, receipt: Receipt) -> None:
        """Count one finished fragment."""
        if self._off():
            return
        self.adopt(receipt)
        self._throughput.add(receipt.worker, receipt.seconds, receipt.on_models)
        for stage, seconds in receipt.seconds.items():
            self._meters.add("capfilt_stage_seconds", seconds, stage=stage)
        if self._throughput.busy is not None:
            self._meters.add("capfilt_device_busy", self._throughput.busy)
