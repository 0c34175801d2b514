"""A run's traces and metrics for OpenTelemetry, over OTLP/HTTP, where the environment says to whom.

It is OpenTelemetry's own variables that say so (OTEL_EXPORTER_OTLP_ENDPOINT, or that of traces or metrics; headers,
timeout, certificates, OTEL_SERVICE_NAME, ...). Without an endpoint nothing is loaded, counted or sent. The driver
sends, by what it is told of: a span for the run, in it one for each shard from its first fragment to its commit, in
that one for each fragment with the seconds of its stages; and the driver's metrics of capfilt.pipelines.metrics.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from capfilt.dataset import ShardCommit
from capfilt.pipelines.metrics import METRICS, DriverMetrics, Meters
from capfilt.pipelines.watching import Watcher, Watchers
from capfilt.receipts import Receipt
from capfilt.records import outcome_of
from capfilt.redaction import redacted

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.trace import Span

_SIGNALS = ("TRACES", "METRICS")
_FLUSH_SECONDS = 10
"""For what is left at a run's end; a collector that does not answer costs no more."""


@contextmanager
def telemetry(run: str, output: str, tell: Callable[[str], None]) -> Iterator[Watcher]:
    """Yields who is to be told of a run, so that it is sent; no one where the environment names no endpoint.

    Args:
        tell: takes a line for people: that nothing can be sent, and why.
    """
    signals = [signal for signal in _SIGNALS if _wanted(signal)]
    if not signals:
        yield Watcher()
        return
    try:
        senders = _senders(run, output, signals)
    except ImportError:
        tell("OTEL_EXPORTER_OTLP_ENDPOINT is set and nothing is sent: pip install 'capfilt[otel]', or unset it")
        yield Watcher()
        return
    outcome = "done"
    try:
        yield Watchers(*senders)
    except BaseException as error:
        outcome = outcome_of(error)
        raise
    finally:
        for sender in senders:
            sender.end(outcome)


def _senders(run: str, output: str, signals: list[str]) -> list[_Traces | _Metrics]:
    from opentelemetry.sdk.resources import Resource

    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "capfilt"), "capfilt.run": run})
    senders: list[_Traces | _Metrics] = []
    if "TRACES" in signals:
        senders.append(_Traces(run, output, resource))
    if "METRICS" in signals:
        senders.append(_Metrics(run, resource))
    return senders


def _wanted(signal: str) -> bool:
    """Whether the environment wants traces or metrics sent."""
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    none = os.environ.get(f"OTEL_{signal}_EXPORTER", "otlp") != "otlp"
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    return not (off or none) and any(os.environ.get(name) for name in endpoints)


class _Traces(Watcher):
    """The run as spans."""

    def __init__(self, run: str, output: str, resource: Resource) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("capfilt")
        self._run = self._tracer.start_span("run", attributes={"capfilt.run": run, "capfilt.output": redacted(output)})
        self._shards: dict[str, Span] = {}  # those begun and not committed

    def update(self, receipt: Receipt) -> None:
        """A fragment: its time is that of its stages but for decoding, which runs beside them, up to now."""
        end = time.time_ns()
        begin = end - int(1e9 * sum(spent for stage, spent in receipt.seconds.items() if stage != "decode"))
        shard = self._shard(receipt, begin)
        about: dict[str, Any] = {"start": receipt.start, "stop": receipt.stop, "worker": receipt.worker}
        about |= {**asdict(receipt.counts), "captions": receipt.captions, "images": receipt.images}
        about |= {f"seconds.{stage}": spent for stage, spent in receipt.seconds.items()}
        span = self._in(shard, str(receipt.stage), begin, about)
        span.end(end)

    def adopt(self, receipt: Receipt) -> None:
        """One that an earlier run finished."""
        taken = {"start": receipt.start, "stop": receipt.stop, "run": receipt.provenance.run}
        self._shard(receipt, time.time_ns()).add_event("fragment taken over", _named(taken))

    def failed(self, shard: str, message: str, /) -> None:
        """A file that cannot be curated."""
        span = self._shards.pop(shard, None) or self._in(self._run, "shard", time.time_ns(), {"shard": shard})
        self._end(span, redacted(message))

    def committed(self, shards: list[ShardCommit], seconds: float, /) -> None:
        """Shards that are part of the dataset, by one commit."""
        end = time.time_ns()
        self._in(self._run, "commit", end - int(1e9 * seconds), {"shards": len(shards)}).end(end)
        for shard in shards:
            if span := self._shards.pop(shard.shard, None):
                span.set_attributes(_named(asdict(shard.counts)))
                span.end(end)

    def end(self, outcome: str) -> None:
        """The run is over: what is left is sent."""
        for span in self._shards.values():
            self._end(span, "not committed")
        self._run.set_attribute("capfilt.outcome", redacted(outcome))
        if outcome == "done":
            self._run.end()
        else:
            self._end(self._run, redacted(outcome))
        self._provider.force_flush(1000 * _FLUSH_SECONDS)
        self._provider.shutdown()

    def _shard(self, receipt: Receipt, begin: int) -> Span:
        if receipt.shard not in self._shards:
            about = {"shard": receipt.shard, "rows": receipt.file_rows}
            self._shards[receipt.shard] = self._in(self._run, "shard", begin, about)
        return self._shards[receipt.shard]

    def _in(self, parent: Span, name: str, begin: int, about: dict[str, Any]) -> Span:
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(parent)
        return self._tracer.start_span(name, context, attributes=_named(about), start_time=begin)

    def _end(self, span: Span, why: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        span.set_status(Status(StatusCode.ERROR, why))
        span.end()


def _named(about: dict[str, Any]) -> dict[str, Any]:
    return {f"capfilt.{name}": value for name, value in about.items()}


class _OtelMeters(Meters):
    """A run's metrics, as OpenTelemetry has them."""

    def __init__(self, run: str, meter: Any) -> None:
        super().__init__(run)
        self._meter = meter

    def add(self, name: str, amount: float, **labels: str) -> None:
        """Add to a counter, or set a gauge."""
        metric = METRICS[name]
        if name not in self._made:
            make = self._meter.create_gauge if metric.kind == "gauge" else self._meter.create_counter
            self._made[name] = make(name, description=metric.meaning)
        made, own = self._made[name], {"run": self._run, **labels}
        made.set(amount, own) if metric.kind == "gauge" else made.add(amount, own)


class _Metrics(DriverMetrics):
    """What the driver counts, sent now and then (OTEL_METRIC_EXPORT_INTERVAL) and at the end."""

    def __init__(self, run: str, resource: Resource) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        super().__init__(run, False, lambda _: None)
        reader = PeriodicExportingMetricReader(OTLPMetricExporter())
        self._provider = MeterProvider([reader], resource, shutdown_on_exit=False)
        self._meters = _OtelMeters(run, self._provider.get_meter("capfilt"))

    def _on(self) -> bool:
        return True

    def end(self, _: str) -> None:
        """The run is over: what is left is sent."""
        with suppress(Exception):  # a collector that does not answer is no failure of the run's; the SDK has logged it
            self._provider.shutdown(1000 * _FLUSH_SECONDS)
