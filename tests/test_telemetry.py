"""Traces and metrics over OTLP, to a receiver on this machine; and nothing where no one asked for them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeSpec, jpeg, write_shard
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from rich.console import Console
from test_recurate import Stop, dying_after, run

from capfilt.pipelines.telemetry import telemetry
from capfilt.pipelines.watching import Watcher


class Receiver(ThreadingHTTPServer):
    """Keeps what is sent to it, by path."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[tuple[str, bytes]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def spans(self) -> list[Any]:
        requests = [ExportTraceServiceRequest.FromString(body) for path, body in self.received if path == "/v1/traces"]
        return [
            span
            for request in requests
            for of_resource in request.resource_spans
            for scope in of_resource.scope_spans
            for span in scope.spans
        ]

    def metrics(self) -> dict[str, dict[tuple[str, ...], float]]:
        """The newest value of each, by its labels but for `run`."""
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for path, body in self.received:
            if path == "/v1/metrics":
                request = ExportMetricsServiceRequest.FromString(body)
                for of_resource in request.resource_metrics:
                    for scope in of_resource.scope_metrics:
                        for metric in scope.metrics:
                            for point in (metric.sum if metric.HasField("sum") else metric.gauge).data_points:
                                labels = tuple(a.value.string_value for a in point.attributes if a.key != "run")
                                value = point.as_double if point.HasField("as_double") else point.as_int
                                found.setdefault(metric.name, {})[labels] = value
        return found


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def about(span: Any) -> dict[str, Any]:
    return {a.key.removeprefix("capfilt."): getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


@pytest.fixture
def web(tmp_path: Path) -> Path:
    for s in range(2):
        write_shard(tmp_path / "in" / f"{s}.parquet", [*(jpeg(100 * s + i) for i in range(59)), b"<html>"])
    (tmp_path / "in" / "broken.parquet").write_bytes(b"PAR1")
    return tmp_path / "in"


@pytest.mark.usefixtures("web")
def test_a_run_is_sent_as_spans_and_metrics(
    make_spec: MakeSpec, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    summary = run(make_spec(max_error_fraction=0.9))
    spans = receiver.spans()
    named = {span.span_id: span for span in spans}
    (whole,) = [span for span in spans if span.name == "run"]
    assert about(whole)["run"] == summary.run
    assert about(whole)["outcome"] == "done"
    shards = {about(span)["shard"]: span for span in spans if span.name == "shard"}
    assert {name.rpartition("-")[0] for name in shards} == {"0", "1", "broken"}
    fragments = [span for span in spans if span.name == "caption"]
    assert len(fragments) == 6
    for span in fragments:
        own = about(span)
        assert own["kept"] + own["dropped"] + own["errors"] == own["stop"] - own["start"]
        assert own["seconds.model"] > 0
        assert named[span.parent_span_id].name == "shard"
        assert named[named[span.parent_span_id].parent_span_id] is whole
        assert span.start_time_unix_nano < span.end_time_unix_nano <= named[span.parent_span_id].end_time_unix_nano
    assert sum(about(span)["kept"] for span in shards.values() if "kept" in about(span)) == summary.counts.kept
    (broken,) = [span for name, span in shards.items() if name.startswith("broken")]
    assert broken.status.code == 2
    assert "broken.parquet" in broken.status.message
    assert [span.name for span in spans].count("commit") >= 1
    metrics = receiver.metrics()
    assert metrics["capfilt_rows"] == {
        ("kept",): summary.counts.kept,
        ("dropped",): summary.counts.dropped,
        ("error",): 2,
    }
    assert metrics["capfilt_errors"] == {("not_an_image",): 2}
    assert metrics["capfilt_shards"] == {("committed",): 2, ("failed",): 1}
    assert metrics["capfilt_rows_waiting"] == {(): 0}
    assert metrics["capfilt_stage_seconds"][("model",)] > 0


@pytest.mark.usefixtures("web")
def test_a_run_that_fails_says_so(make_spec: MakeSpec, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{receiver.endpoint}/v1/traces")
    with pytest.raises(Stop):
        run(make_spec(), execute=dying_after(1))
    spans = receiver.spans()
    (whole,) = [span for span in spans if span.name == "run"]
    assert (whole.status.code, about(whole)["outcome"]) == (2, "Stop: ")
    assert any(span.name == "shard" and span.status.message == "not committed" for span in spans)
    assert {path for path, _ in receiver.received} == {"/v1/traces"}  # metrics have no endpoint
    receiver.received.clear()
    run(make_spec(max_error_fraction=0.9))
    assert [event.name for span in receiver.spans() for event in span.events] == 2 * ["fragment taken over"]


@pytest.mark.usefixtures("web")
@pytest.mark.parametrize(
    "off",
    [{}, {"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none"}],
    ids=str,
)
def test_nothing_is_sent_unless_asked_for(
    make_spec: MakeSpec, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, off: dict[str, str]
) -> None:
    for name, value in off.items():
        monkeypatch.setenv(name, value)
    if off:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    said = io.StringIO()
    with telemetry("run", "output", Console(file=said).print) as told:
        assert type(told) is Watcher
    run(make_spec(max_error_fraction=0.9))
    assert (receiver.received, said.getvalue()) == ([], "")


ABSENT = """
import sys
from capfilt.pipelines.telemetry import telemetry
with telemetry("run", "output", print) as told:
    print(type(told).__name__)
"""


@pytest.mark.parametrize("asked", [True, False])
def test_it_is_told_that_the_extra_is_not_installed(tmp_path: Path, asked: bool) -> None:
    fake = tmp_path / "opentelemetry"
    fake.mkdir()
    (fake / "__init__.py").write_text("print('loaded'); raise ImportError")
    env = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    env |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), env.get("PYTHONPATH", "")])}
    env |= {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"} if asked else {}
    done = subprocess.run([sys.executable, "-c", ABSENT], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = ["Watcher"]
    if asked:
        message = "OTEL_EXPORTER_OTLP_ENDPOINT is set and nothing is sent: pip install 'capfilt[otel]', or unset it"
        expected = ["loaded", message, "Watcher"]
    assert done.stdout.splitlines() == expected


@pytest.mark.slow
@pytest.mark.usefixtures("web")
def test_a_collector_that_does_not_answer_is_no_failure_of_the_run(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    assert run(make_spec(max_error_fraction=0.9)).outcome == "done"
