"""Metrics: what is counted, what it costs where no one would read it, and a scrape of a real Ray."""

from __future__ import annotations

import inspect
import json
import re
import socket
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeSpec, jpeg, write_shard

from capfilt.dataset import Counts, Provenance
from capfilt.pipelines.metrics import METRICS, DriverMetrics, Meters, count_batches
from capfilt.receipts import Receipt
from capfilt.schema import Reason
from capfilt.spec import Placement, Ray

Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


def receipt() -> Receipt:
    where = Provenance("id", "c", "s", "d", "run")
    return Receipt(shard="s", start=0, stop=5, file_rows=5, provenance=where, counts=Counts(3, 1, 1), worker="host:1")


@pytest.fixture
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where ray is installed without its `default` extra."""
    monkeypatch.setattr("ray._private.utils.get_dashboard_dependency_error", lambda: ImportError("no agent"))


@pytest.mark.usefixtures("local_ray", "no_agent")
@pytest.mark.parametrize("asked", [True, False])
def test_without_an_agent_nothing_is_counted_and_it_is_said_once(asked: bool) -> None:
    said: list[str] = []
    meters = DriverMetrics("run", asked, said.append)
    meters.expect(10)
    for _ in range(3):
        meters.adopt(receipt())
        meters.update(receipt())
        meters.failed("shard", "message")
        meters.committed([], 0.1)
    count_batches("run")(16, 0.5)
    assert meters._meters._made == {}
    assert len(said) == asked
    assert all("pip install 'capfilt[cluster]'" in line for line in said)


def test_without_ray_none_is_loaded() -> None:
    code = (
        "import sys; from test_metrics import receipt; from capfilt.pipelines.metrics import DriverMetrics;"
        "m = DriverMetrics('r', True, print); m.update(receipt()); m.adopt(receipt()); m.committed([], 0.1);"
        "sys.exit('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.usefixtures("local_ray")
def test_every_metric_can_be_made_and_names_its_labels() -> None:
    pytest.importorskip("opencensus", reason="Ray's agent is not installed: pip install 'capfilt[cluster]'")
    meters = Meters("run")
    for name, metric in METRICS.items():
        meters.add(name, 1.0, **dict.fromkeys(metric.labels, "x"))
        if metric.labels:
            with pytest.raises(ValueError, match="tag key"):
                meters.add(name, 1.0)
    assert set(meters._made) == set(METRICS)
    assert all(re.fullmatch(r"capfilt_[a-z_]+(?<!_total)", name) for name in METRICS)


def samples(text: str, run: str) -> Samples:
    """What a scrape says of a run: by name and our own labels, summed over processes."""
    found: Samples = defaultdict(lambda: defaultdict(float))
    for line in text.splitlines():
        if match := re.fullmatch(r"(ray_capfilt_\w+)\{(.*)\} ([-+.e\d]+)", line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            assert labels.pop("run") == run
            own = tuple((k, v) for k, v in labels.items() if k in ("status", "reason", "outcome", "stage", "le"))
            found[match[1]][own] += float(match[3])
    return found


@pytest.mark.slow
def test_a_scrape_finds_what_the_run_counted(make_spec: MakeSpec, tmp_path: Path) -> None:
    pytest.importorskip("opencensus", reason="Ray's agent is not installed: pip install 'capfilt[cluster]'")
    for s in range(3):
        texts = [f"text {i}" for i in range(60)]
        texts[7] = "raise"  # the filter does
        images: list[bytes | None] = [jpeg(100 * s + i) for i in range(60)]
        images[3], images[50] = None, b"<html>"
        write_shard(tmp_path / "in" / f"{s}.parquet", images, texts)
    (tmp_path / "in" / "bad.parquet").write_bytes(b"no Parquet")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spec = make_spec(ray=Ray(num_cpus=2, metrics_port=port), max_error_fraction=1.0)
    two = Placement(cpus=0.5, min_actors=2, max_actors=2)
    spec = spec.model_copy(update={"captioners": (spec.captioners[0].model_copy(update={"placement": two}),)})
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    command = [sys.executable, str(Path(__file__).parent / "metrics_driver.py"), str(tmp_path / "spec.json"), str(port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found, counts, reasons = samples(said["text"], said["run"]), said["counts"], said["reasons"]
    status = {"kept": counts["kept"], "dropped": counts["dropped"], "error": counts["errors"]}
    assert found["ray_capfilt_rows_total"] == {(("status", name),): count for name, count in status.items()}
    errors = {(("reason", name),): reasons[name] for name in ("not_an_image", "model_error")}
    assert found["ray_capfilt_errors_total"] == errors
    assert set(errors.values()) == {3}
    assert found["ray_capfilt_shards_total"] == {(("outcome", "committed"),): 3, (("outcome", "failed"),): 1}
    assert found["ray_capfilt_rows_waiting"] == {(): 0}
    assert 0 < found["ray_capfilt_device_busy"][()] <= 1
    assert found["ray_capfilt_images_total"] == {(): 180 - 6}  # of both workers; no image and no picture never met them
    spent = found["ray_capfilt_stage_seconds_total"]
    assert {stage for ((_, stage),) in spent} == {"read", "decode", "wait", "model", "write"}
    on_models = found["ray_capfilt_model_seconds_total"][()]
    assert on_models == pytest.approx(spent[("stage", "model"),], rel=0.01, abs=1e-3)
    assert found["ray_capfilt_batch_seconds_bucket"][("le", "+Inf"),] == found["ray_capfilt_batch_seconds_count"][()]
    assert {name.removesuffix("_sum").removesuffix("_count") for name in found} == {
        f"ray_{name}{'_total' if metric.kind == 'counter' else '_bucket' if metric.kind == 'histogram' else ''}"
        for name, metric in METRICS.items()
    } | {"ray_capfilt_batch_seconds"}


def test_errors_are_those_of_rows_that_could_not_be_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reason is either; a copy or what is kept out is no error."""
    counted: Counter[str] = Counter()

    def add(_: Meters, name: str, amount: float, **labels: str) -> None:
        if name == "capfilt_errors":
            counted[labels["reason"]] += int(amount)

    monkeypatch.setattr(Meters, "add", add)
    monkeypatch.setattr(DriverMetrics, "_on", lambda _: True)
    seen = {str(reason): 1 for reason in Reason} | {"kept": 1, "web:kept": 1, "web:below_threshold": 1}
    DriverMetrics("run", asked=True, tell=print).adopt(receipt().model_copy(update={"reasons": seen}))
    source = inspect.getsource(Reason)
    errors = source.partition("# rows: errors\n")[2].partition("# texts")[0]
    assert counted == Counter(re.findall(r'= "(\w+)"', errors))
