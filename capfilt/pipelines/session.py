"""Around a run: the connection to Ray, and what is recorded of where it runs."""

from __future__ import annotations

import datetime
import logging
import os
import platform
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from capfilt.errors import CapfiltError
from capfilt.interrupts import signals_kept
from capfilt.spec import Ray


def connecting(settings: Ray) -> str:
    """What is waited for as :func:`connected` begins, for people."""
    return "starting Ray" if settings.address == "local" else f"joining Ray at {settings.address}"


@contextmanager
def connected(settings: Ray, cpus: int | None = None) -> Iterator[None]:
    """A connection to Ray: the one that is there, or one of its own that ends with the run.

    Args:
        cpus: of a local Ray, where the settings give none; all cores if neither does.

    Raises:
        CapfiltError: there is no Ray at the address.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = settings.address == "local"
    try:
        try:
            with signals_kept():
                ray.init(
                    address=settings.address,
                    log_to_driver=False,
                    logging_level="ERROR",
                    **(_local(settings, cpus) if local else {}),
                )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            if local:
                raise CapfiltError(
                    f"Ray does not start on this machine: {error}. Is there room in /dev/shm and /tmp? Its logs are in "
                    "/tmp/ray/session_latest/logs"
                ) from error
            raise CapfiltError(
                f"ray.address {settings.address}: no Ray there ({error}). Start one (`ray start --head`), or set "
                "ray.address=local"
            ) from error
        yield
    finally:
        ray.shutdown()
        _close_logs()


def _close_logs() -> None:
    """Let go of Ray Data's log file. It would stay open, in the session that has ended, and take later runs' lines."""
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == "SessionFileHandler":
            handler.close()  # it opens another one with its next line, in the session of then


def _local(settings: Ray, cpus: int | None) -> dict[str, Any]:
    """Options of a Ray of our own."""
    port = {"_metrics_export_port": settings.metrics_port} if settings.metrics_port else {}
    return {"num_cpus": settings.num_cpus or cpus, "include_dashboard": False, **port}


def lacking(have: Mapping[str, float], **need: float) -> dict[str, float]:
    """What a Ray has less of than is needed.

    Args:
        have: as Ray says it, "CPU" and "GPU".
        need: `cpus`, `gpus`.

    Returns:
        How much there is, by the names of `need`.
    """
    there = {name: have.get(name.upper().rstrip("S"), 0) for name in need}
    return {name: there[name] for name in need if need[name] > there[name]}


def quiet(context: Any) -> Any:
    """Ray Data's settings for a run, set on a copy; it still logs everything to its own file."""
    context.enable_progress_bars = False  # one progress display, and it is ours
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a fragment may take hours on a CPU, and a cluster may fill up late
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == "PlainRayHandler":  # the console's
            handler.setLevel(logging.ERROR)
    return context


def surroundings() -> dict[str, Any]:
    """When, where and with what a run is made; for its record."""
    packages = ("capfilt", "torch", "transformers", "ray", "pyarrow", "deltalake")
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # shipped to the cluster as a folder
        return "not installed"
