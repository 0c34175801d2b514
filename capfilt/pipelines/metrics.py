"""Metrics of a run for Prometheus, through Ray's agent on each machine.

The driver counts what is accounted for, a fragment at a time; each worker what meets its models, a batch at a time.
Ray adds `ray_` to every name, `_total` to counters', and labels for the machine and the process. Its agent comes with
ray[default] (`pip install 'capfilt[cluster]'`); where it is not installed nothing is counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, Literal

from capfilt.dataset import ShardCommit
from capfilt.pipelines.watching import Watcher
from capfilt.receipts import Receipt
from capfilt.schema import ERRORS, Status
from capfilt.throughput import Throughput


@dataclass(frozen=True)
class Metric:
    """What is exported under a name. `labels` come after `run`, which all have."""

    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


METRICS = {
    "capfilt_rows": Metric("counter", "Rows accounted for, those of an interrupted run included.", ("status",)),
    "capfilt_errors": Metric("counter", "Rows in error.", ("reason",)),
    "capfilt_shards": Metric("counter", "Shards committed, and files that cannot be curated.", ("outcome",)),
    "capfilt_stage_seconds": Metric("counter", "Seconds by stage and fragment, summed over workers.", ("stage",)),
    "capfilt_rows_waiting": Metric("gauge", "Rows known or estimated that are not accounted for yet."),
    "capfilt_device_busy": Metric(
        "gauge", "Part of the workers' time in which their models computed, this run so far."
    ),
    "capfilt_images": Metric("counter", "Images that met the models, by worker and batch; rate() is images/s."),
    "capfilt_model_seconds": Metric("counter", "Seconds on the models, by worker and batch; rate() is how busy it is."),
    "capfilt_batch_seconds": Metric(
        "histogram", "Seconds that a batch takes; a worker's.", boundaries=(0.1, 0.3, 1, 3, 10, 30, 100, 300)
    ),
}


def exported() -> bool:
    """Whether Ray's agent, which exports what is counted, is installed here."""
    from ray._private.utils import get_dashboard_dependency_error

    return get_dashboard_dependency_error() is None


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


class DriverMetrics(Watcher):
    """What the driver counts; nothing without Ray, or without its agent.

    Args:
        asked: whether the spec's Ray is one that is watched; then a missing agent is told of, once.
        tell: takes a line for people.
    """

    def __init__(self, run: str, asked: bool, tell: Callable[[str], None]) -> None:
        self._meters = Meters(run)
        self._asked, self._tell = asked, tell
        self._throughput = Throughput()
        self._expected = self._rows = 0
        self._exported: bool | None = None  # not known before Ray is there

    def _on(self) -> bool:
        if self._exported is None and (ray := sys.modules.get("ray")) and ray.is_initialized():
            self._exported = exported()
            if self._asked and not self._exported:
                self._tell("metrics are not exported: Ray's agent is not installed; pip install 'capfilt[cluster]'")
        return bool(self._exported)

    def expect(self, rows: int) -> None:
        """Rows the run is known or estimated to have."""
        self._expected = rows
        if self._on():
            self._waiting()

    def adopt(self, receipt: Receipt) -> None:
        """Rows by status and errors by reason, of a fragment that is finished, by whichever run."""
        if not self._on():
            return
        self._rows += receipt.counts.rows
        for status, rows in zip(Status, astuple(receipt.counts), strict=True):
            self._meters.add("capfilt_rows", rows, status=str(status))
        for reason, rows in receipt.reasons.items():
            if reason in ERRORS:
                self._meters.add("capfilt_errors", rows, reason=str(reason))
        self._waiting()

    def _waiting(self) -> None:
        self._meters.add("capfilt_rows_waiting", max(0, self._expected - self._rows))

    def update(self, receipt: Receipt) -> None:
        """And, of one that this run finished, where its time went."""
        self.adopt(receipt)
        if not self._on():
            return
        self._throughput.add(receipt.worker, receipt.seconds, receipt.on_models)
        for stage, seconds in receipt.seconds.items():
            self._meters.add("capfilt_stage_seconds", seconds, stage=stage)
        if self._throughput.busy is not None:
            self._meters.add("capfilt_device_busy", self._throughput.busy)

    def failed(self, *_: object) -> None:
        """A file that cannot be curated."""
        if self._on():
            self._meters.add("capfilt_shards", 1, outcome="failed")

    def committed(self, shards: list[ShardCommit], _: float, /) -> None:
        """Shards that are part of the dataset."""
        if self._on():
            self._meters.add("capfilt_shards", len(shards), outcome="committed")


def count_batches(run: str) -> Callable[[int, float], None]:
    """In a worker: takes images and seconds of each batch that was on the models."""
    if not exported():
        return lambda *_: None
    meters = Meters(run)

    def count(images: int, seconds: float) -> None:
        meters.add("capfilt_images", images)
        meters.add("capfilt_model_seconds", seconds)
        meters.add("capfilt_batch_seconds", seconds)

    return count
