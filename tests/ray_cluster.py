"""A Ray cluster on this machine: every node is a `ray start --block` of its own, which can be killed like a machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import requests

ROOT = Path(__file__).parent.parent
TOKEN = "a-token-of-the-tests-" + "0" * 32
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
_BIN = str(Path(sys.executable).parent)

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "PATH": f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}",
    # A dead node is noticed within seconds; Ray's own setting takes half a minute.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    # And a dead head: it takes a minute.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
}
"""Of every node, and of what joins them."""


def free_port() -> int:
    """A port that no one listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Node:
    """The processes of one node."""

    def __init__(
        self, folder: Path, arguments: list[str], environment: Mapping[str, str], cpus: float, prefix: Sequence[str]
    ) -> None:
        self.log = folder / f"node-{time.monotonic_ns()}.log"
        command = [*prefix, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += ["--node-ip-address=127.0.0.1", f"--num-cpus={cpus:g}", f"--object-store-memory={100 * 2**20}"]
        command += ["--include-log-monitor=false", *arguments]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT, **environment},
                cwd=folder,
                start_new_session=True,
            )
        self._seen: dict[int, psutil.Process] = {}

    def family(self) -> list[psutil.Process]:
        """Its processes, those included whose parents are gone."""
        try:
            root = psutil.Process(self._process.pid)
            self._seen |= {process.pid: process for process in [root, *root.children(recursive=True)]}
        except psutil.NoSuchProcess:
            pass
        for process in list(self._seen.values()):
            try:
                self._seen |= {child.pid: child for child in process.children(recursive=True)}
            except psutil.NoSuchProcess:
                continue
        return [process for process in self._seen.values() if process.is_running()]

    def named(self, name: str) -> list[psutil.Process]:
        """Its living processes whose command begins with a name, such as `ray::MapWorker`; paths are left out."""
        found = []
        for process in self.family():
            try:
                words = process.cmdline()
            except psutil.NoSuchProcess:
                continue
            if words and words[0].rsplit("/", 1)[-1].startswith(name):
                found.append(process)
        return found

    def kill(self) -> None:
        """SIGKILL to all of it, as a machine that loses its power."""
        family = self.family()
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, 10)
        self._process.wait(10)

    def alive(self) -> bool:
        """Whether it runs still."""
        return self._process.poll() is None


class RayCluster:
    """A head with a job server, and nodes that join it. As a context; all is killed at its end."""

    def __init__(self, cpus: float = 2, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: its sockets' names have little room
        self._environment, self._cpus = environment, cpus
        self._port, self._dashboard = free_port(), free_port()
        self.nodes: list[Node] = []
        self.start_head()

    @property
    def address(self) -> str:
        """Of the cluster."""
        return f"127.0.0.1:{self._port}"

    @property
    def job_server(self) -> str:
        """Of its job server."""
        return f"http://127.0.0.1:{self._dashboard}"

    def start_head(self) -> None:
        """Start a head, at the addresses of the one before if there was one."""
        ports = {"ray-client-server-port": free_port(), "dashboard-agent-listen-port": free_port()}
        ports |= {"port": self._port, "dashboard-port": self._dashboard}
        arguments = [f"--{name}={port}" for name, port in ports.items()]
        self.head = self._node(["--head", f"--temp-dir={self.folder}", *arguments], self._cpus)
        for _ in self._patiently(self.head):
            try:
                found = requests.get(
                    f"{self.job_server}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=5
                )
            except requests.RequestException:
                continue
            if found.status_code == 200:
                return

    def add_node(self, cpus: float = 1, prefix: Sequence[str] = ()) -> Node:
        """Add a node that takes work.

        Args:
            prefix: a command that starts it.
        """
        node = self._node([f"--address={self.address}"], cpus, prefix)
        for _ in self._patiently(node):
            if node.named("raylet") and "Ray runtime started" in node.log.read_text():
                self.nodes.append(node)
                return node
        raise AssertionError("unreachable")

    def _node(self, arguments: list[str], cpus: float, prefix: Sequence[str] = ()) -> Node:
        return Node(self.folder, arguments, self._environment, cpus, prefix)

    def _patiently(self, node: Node, seconds: float = 120) -> Iterator[None]:
        end = time.monotonic() + seconds
        while time.monotonic() < end and node.alive():
            node.family()
            yield
            time.sleep(0.2)
        said = node.log.read_text()[-3000:]
        node.kill()
        self.close()
        raise AssertionError(f"a node does not start:\n{said}")

    def environment(self, **more: str) -> dict[str, str]:
        """For a process that joins it."""
        return {**os.environ, **ENVIRONMENT, **self._environment, **more}

    def close(self) -> None:
        """Kill every node and delete what it wrote."""
        for node in [*self.nodes, self.head]:
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
