"""What the manifests run is run: their commands, on the spec they mount, with this checkout's tiny models."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import read
from manifests import ROOT, launcher, manifest, mapped_command, mapped_spec, unit

from capfilt.lease import Lease
from capfilt.toyweb import render

ROWS = 24
TINY = {role: f"{ROOT}/models/tiny-{role}.yaml" for role in ("captioner", "filter")}


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy web's shards."""
    return render(tmp_path_factory.mktemp("web"), images=ROWS, shards=2, seed=3).directory / "shards"


def spec(directory: Path, web: Path) -> Path:
    """The mounted spec, over the toy web."""
    return mapped_spec(directory / "curate.yaml", input=str(web), output=str(directory / "out"), **TINY)


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240)


def curated(directory: Path) -> int:
    """Rows of what a command curated there; some of them kept."""
    rows = read(str(directory / "out"))
    assert "kept" in {row["status"] for row in rows}
    return len(rows)


@pytest.mark.usefixtures("local_ray")
def test_the_entrypoint_of_the_ray_jobs_curates(tmp_path: Path, web: Path) -> None:
    """On a cluster that is there; RAY_ADDRESS is what Ray's job server sets. RayCronJob's is the same (test_deploy)."""
    import ray

    command = mapped_command(manifest("rayjob.yaml")["spec"]["entrypoint"], spec(tmp_path, web))
    done = run(command, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    assert done.returncode == 0, done.stderr
    assert curated(tmp_path) == ROWS


@pytest.mark.parametrize("where", ["rayjob.yaml", "capfilt@.service"])
def test_a_run_that_meets_another_is_no_failure(tmp_path: Path, web: Path, where: str) -> None:
    if where == "rayjob.yaml":
        command = manifest(where)["spec"]["entrypoint"]
    else:
        (command,) = (value for _, key, value in unit(where) if key == "ExecStart")
    path = spec(tmp_path, web)
    with Lease(str(tmp_path / "out"), {}, "first"):
        done = run(mapped_command(command, path))
    assert done.returncode == 0, done.stderr
    assert "held by run first" in done.stderr
    assert not (tmp_path / "out" / "annotations").exists()


@pytest.mark.slow
def test_the_service_of_one_machine_curates(tmp_path: Path, web: Path) -> None:
    """With a Ray of its own, and nothing of the environment but what the unit sets."""
    lines = unit("capfilt@.service")
    (start,) = (value for _, key, value in lines if key == "ExecStart")
    path = spec(tmp_path, web)
    path.write_text(path.read_text().replace("address: auto", "address: local"))
    variables = dict(value.split("=", 1) for _, key, value in lines if key == "Environment")
    variables |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": os.defpath}
    command = mapped_command(start, path)
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert curated(tmp_path) == ROWS


# --- a real cluster: head and worker as KubeRay and Ray's launcher start them, with the job server and a token ---


@dataclass(frozen=True)
class Cluster:
    """Ports of a running cluster, and the variables that its token goes by."""

    dashboard: int
    metrics: int
    environment: dict[str, str]

    @property
    def address(self) -> str:
        """Of the job server."""
        return f"http://127.0.0.1:{self.dashboard}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


RAY = [sys.executable, "-m", "ray.scripts.scripts"]
PORTS = ("--object-manager-port", "--metrics-export-port", "--dashboard-agent-listen-port")
"""Of every node; no two may share them on one machine."""
HEAD_PORTS = ("--port", "--dashboard-port", "--ray-client-server-port")


def start_command(node: str, head: int | None, ports: dict[str, int], **own: object) -> list[str]:
    """The launcher's `ray start`, with KubeRay's parameters, with ports that are free here and in the foreground.

    Args:
        node: `head` or `worker`.
        head: the head's port, for a worker.
        own: more flags.
    """
    spec = manifest("raycluster.yaml")["spec"]
    group = spec["headGroupSpec"] if node == "head" else spec["workerGroupSpecs"][0]
    (command,) = (line for line in launcher()[f"{node}_start_ray_commands"] if "ray start" in line)
    words = shlex.split(command.replace("$RAY_HEAD_IP:6379", f"127.0.0.1:{head}"))
    kept = [word for word in words[1:] if word.partition("=")[0] not in (*ports, "--autoscaling-config")]
    flags = ports | {f"--{name}": value for name, value in (group["rayStartParams"] | own).items()}
    given = [f"{flag}={value}" for flag, value in flags.items()]
    return [*RAY, *kept, *given, "--node-ip-address=127.0.0.1", "--block"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head without CPUs and one worker with two, each a process of its own."""
    ports = {flag: free_port() for flag in (*PORTS, *HEAD_PORTS)}
    environment = {
        "RAY_AUTH_MODE": manifest("raycluster.yaml")["spec"]["authOptions"]["mode"],
        "RAY_AUTH_TOKEN": "a" * 32,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    found = Cluster(ports["--dashboard-port"], ports["--metrics-export-port"], environment)
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a socket's path is short
    commands = (
        start_command("head", None, ports, **{"temp-dir": temporary}),
        start_command("worker", ports["--port"], {flag: free_port() for flag in PORTS}, **{"num-cpus": 2}),
    )
    processes: list[subprocess.Popen[bytes]] = []
    log = tmp_path_factory.mktemp("cluster") / "log"
    try:
        with log.open("wb") as out:
            for number, command in enumerate(commands, 1):
                processes.append(subprocess.Popen(command, env=os.environ | environment, stdout=out, stderr=out))
                wait_for(lambda number=number: nodes(ports["--port"], environment) == number, processes[-1], log)
        listing = [*RAY, "job", "list", "--address", found.address]
        wait_for(lambda: run(listing, **environment).returncode == 0, processes[0], log)
        yield found
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(60)
        shutil.rmtree(temporary, ignore_errors=True)


def nodes(gcs: int, environment: dict[str, str]) -> int:
    """Nodes that are alive."""
    done = run([*RAY, "list", "nodes", "--address", f"127.0.0.1:{gcs}"], **environment)
    return done.stdout.count("ALIVE")


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while not what():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


@pytest.mark.slow
def test_a_ray_job_runs_as_kuberay_submits_it(cluster: Cluster, tmp_path: Path, web: Path) -> None:
    entrypoint = mapped_command(manifest("rayjob.yaml")["spec"]["entrypoint"], spec(tmp_path, web))
    job = [*RAY, "job"]
    submit = ["submit", "--address", cluster.address, "--submission-id", "capfilt-1", "--no-wait", "--", *entrypoint]
    submitted = run([*job, *submit], **cluster.environment)
    assert submitted.returncode == 0, submitted.stderr
    followed = run([*job, "logs", "--address", cluster.address, "--follow", "capfilt-1"], **cluster.environment)
    state = run([*job, "status", "--address", cluster.address, "capfilt-1"], **cluster.environment)
    assert "succeeded" in state.stdout, followed.stdout + followed.stderr
    assert curated(tmp_path) == ROWS


def cron_command(path: Path, address: str) -> list[str]:
    """What the CronJob's pod runs."""
    (container,) = manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    command = mapped_command(shlex.join([*container["command"], *container["args"]]), path)
    head = f"http://{manifest('raycluster.yaml')['metadata']['name']}-head-svc:8265"
    return [word.replace(head, address).replace("$(JOB_NAME)", "capfilt-nightly-1") for word in command]


@pytest.mark.slow
def test_the_cron_job_submits_its_spec_and_follows_it(cluster: Cluster, tmp_path: Path, web: Path) -> None:
    done = run(cron_command(spec(tmp_path, web), cluster.address), **cluster.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert curated(tmp_path) == ROWS


def test_a_bad_spec_fails_the_cron_job_for_good(tmp_path: Path, web: Path) -> None:
    path = spec(tmp_path, web)
    path.write_text(path.read_text() + "outputs: x\n")
    done = run(cron_command(path, "http://127.0.0.1:1"))
    rule = manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"][1]
    assert done.returncode in rule["onExitCodes"]["values"], done.stderr
    assert "outputs: unknown field" in done.stderr


@pytest.mark.slow
def test_without_the_token_no_job_is_taken(cluster: Cluster) -> None:
    command = [*RAY, "job", "submit", "--address", cluster.address, "--", "true"]
    done = run(command, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="")
    assert done.returncode != 0
    assert "401" in done.stderr + done.stdout or "nauthorized" in done.stderr + done.stdout


@pytest.mark.slow
def test_prometheus_reads_the_metrics_port(cluster: Cluster) -> None:
    """Where the pod monitor looks; of what grafana.json shows, one that is Ray's own."""
    deadline = time.monotonic() + 60
    text = ""
    while "# TYPE ray_node_mem_used" not in text and time.monotonic() < deadline:
        time.sleep(1)
        with urllib.request.urlopen(f"http://127.0.0.1:{cluster.metrics}/metrics", timeout=30) as answer:
            text = answer.read().decode()
    assert "# TYPE ray_node_mem_used" in text
