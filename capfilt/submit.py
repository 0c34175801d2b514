"""What a cluster is sent for one run: its resolved spec, the local checkpoints it names, and what it is to run with.

Ray copies a folder to every node that works on the job: its working directory. This makes that folder. It holds what
the run reads by way of its spec, and nothing else: data stay where they are. The spec is resolved here, so local paths
in it are those of this machine, and data must lie on a disk that all nodes share, or in an object store.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel

from capfilt.errors import CapfiltError, CheckpointError, SpecError
from capfilt.spec import (
    AnyCard,
    ClassifierCard,
    ExportSpec,
    LocalCard,
    LocalCheckpoint,
    PretrainSettings,
    RunSpec,
    load_spec,
)
from capfilt.spec.fields import absolute
from capfilt.weights import inspect, inspect_classifier, inspect_starts

SPEC = "spec.yaml"
ENTRYPOINT = f"exec python -m capfilt run {SPEC}"
"""`exec`: the signal that stops a job, and the exit code, are the run's own and not a shell's."""

MAX_BYTES = 100 * 2**20
"""Of a working directory: what Ray's job server takes in one request (its store takes 512 MiB)."""

STOP_SECONDS = 600
"""A stopped run commits what is finished before it ends; Ray kills it after 3 s if it is not told to wait."""

_EXTRAS_OF_KINDS = {
    "ingest": "ingest",
    **dict.fromkeys(("pretrain", "finetune-captioner", "finetune-filter", "bootstrap"), "train"),
}
_EXTRAS_OF_SCHEMES = dict.fromkeys(("gs", "gcs"), "gcs") | dict.fromkeys(("az", "abfs", "abfss"), "azure")

_WORKING_DIR = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"  # pip reads it on the node, where the folder lies then


@dataclass(frozen=True)
class Submission:
    """A run that a cluster can be sent.

    Attributes:
        spec: as it runs there: `ray.address` is `auto`, checkpoints that are sent have paths relative to it.
        checkpoints: what is sent, by those paths.
    """

    spec: RunSpec
    checkpoints: dict[str, Path] = field(default_factory=dict)


def prepare(path: str | Path, overrides: Sequence[str] = (), shared: Sequence[str] = ()) -> Submission:
    """Read a spec as `capfilt run` would, look at its cards and checkpoints, and make it one for a cluster.

    The data are not looked at: this machine may not see them.

    Args:
        shared: directories that the cluster sees under the same path; checkpoints in them are not sent.

    Raises:
        CheckpointError: a checkpoint does not fit its card.
        SpecError: as :func:`capfilt.spec.load_spec`; or `ray.address` names a cluster.
    """
    spec = load_spec(path, overrides)
    if (ray := getattr(spec, "ray", None)) is not None:
        if ray.address not in ("local", "auto"):
            raise SpecError(
                f"{path}: ray.address: {ray.address} names a cluster, and a job runs on the one it is submitted to; "
                "leave it out"
            )
        spec = load_spec(path, [*overrides, "ray={address: auto}"])
    common = [absolute(directory, os.curdir) for directory in shared]
    _look(spec, common)
    names: dict[str, str] = {}

    def sent(checkpoint: LocalCheckpoint) -> LocalCheckpoint:
        if _is_shared(checkpoint, common):
            return checkpoint
        name = names.setdefault(checkpoint.path, f"checkpoints/{len(names)}-{Path(checkpoint.path).name}")
        return checkpoint.model_copy(update={"path": name})

    there = _with_checkpoints(spec, sent)
    return Submission(there, {name: Path(directory) for directory, name in names.items()})


def check_name(name: str) -> None:
    """Refuse what is no id of a job.

    Raises:
        SpecError: it is not.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        raise SpecError(f"--id {name!r}: write letters, digits, '.', '_' and '-', 200 at the most")


def _look(spec: RunSpec, shared: Sequence[str]) -> None:
    """Refuse checkpoints that cannot be used; those that the cluster has are its own to look at."""
    for node in _models(spec):
        if isinstance(node, LocalCard) and not _is_shared(node.checkpoint, shared):
            inspect(cast(AnyCard, node))
        elif isinstance(node, ClassifierCard) and not _is_shared(node.checkpoint, shared):
            inspect_classifier(node)
        elif isinstance(node, PretrainSettings) and not any(_is_shared(inner, shared) for inner in _models(node)):
            inspect_starts(node)


def _is_shared(node: BaseModel, shared: Sequence[str]) -> bool:
    return isinstance(node, LocalCheckpoint) and any(Path(node.path).is_relative_to(place) for place in shared)


def _models(node: Any) -> Iterator[BaseModel]:
    """A model and all within it."""
    if isinstance(node, BaseModel):
        yield node
        for name in type(node).model_fields:
            yield from _models(getattr(node, name))
    elif isinstance(node, tuple):
        for one in node:
            yield from _models(one)


def _with_checkpoints(node: Any, change: Callable[[LocalCheckpoint], LocalCheckpoint]) -> Any:
    """A copy of a model in which every local checkpoint is changed; what the user left out stays left out."""
    if isinstance(node, LocalCheckpoint):
        return change(node)
    if isinstance(node, BaseModel):
        given = {name: getattr(node, name) for name in type(node).model_fields if name in node.model_fields_set}
        return node.model_copy(update={name: _with_checkpoints(value, change) for name, value in given.items()})
    if isinstance(node, tuple):
        return tuple(_with_checkpoints(one, change) for one in node)
    return node


def pack(
    submission: Submission,
    folder: Path,
    wheel: Path | None = None,
    constraints: Path | None = None,
    forward: Sequence[str] = (),
) -> list[str]:
    """Write a job's working directory.

    Args:
        wheel: the capfilt that the job runs, in place of the one that the cluster has. Its files go into the folder,
            which comes first on every worker's path.
        constraints: have pip install capfilt (the wheel, if given) and what this run needs, at this file's versions.
        forward: as of :func:`runtime_env`.

    Returns:
        Requirements for pip; none without constraints.

    Raises:
        CapfiltError: it is more than Ray takes; or a file cannot be used.
    """
    if wheel is not None and not (wheel.is_file() and wheel.name.startswith("capfilt-") and zipfile.is_zipfile(wheel)):
        raise CapfiltError(f"{wheel}: not a wheel of capfilt; make one with `pip wheel --no-deps .` in its source")
    if constraints is not None and not constraints.is_file():
        raise CapfiltError(f"{constraints}: no such file; --pip takes a file of versions such as constraints.txt")
    _check_sizes(submission.checkpoints)
    # What a user left out stays so: a cluster whose capfilt is older need not know every field of ours.
    data = submission.spec.model_dump(mode="json", exclude_unset=True)
    (folder / SPEC).write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
    for name, directory in submission.checkpoints.items():
        shutil.copytree(directory, folder / name)
    if wheel is not None:  # and not by py_modules, for which Ray has pip fetch all that the wheel depends on, torch too
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return _requirements(extras(submission.spec, forward), folder, wheel, constraints) if constraints else []


def _check_sizes(checkpoints: Mapping[str, Path]) -> None:
    sizes = {
        directory: sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        for directory in checkpoints.values()
    }
    if sum(sizes.values()) > MAX_BYTES:
        listed = ", ".join(f"{directory} {size / 2**20:,.0f} MiB" for directory, size in sizes.items())
        raise CheckpointError(
            f"checkpoints of {sum(sizes.values()) / 2**20:,.0f} MiB are more than Ray's job server takes "
            f"({MAX_BYTES // 2**20} MiB): {listed}. Put them on a disk that all nodes share, or into the image, and "
            "name that directory with --shared; or let the card name a hub checkpoint"
        )


def extras(spec: RunSpec, forward: Sequence[str] = ()) -> list[str]:
    """Names of the extras of capfilt that a run needs: by its kind, its stores and its environment."""
    needed = {_EXTRAS_OF_KINDS.get(spec.kind)}
    if isinstance(spec, ExportSpec) and spec.format == "litdata":
        needed.add("litdata")
    text = spec.model_dump_json(exclude_unset=True)
    needed |= {_EXTRAS_OF_SCHEMES.get(scheme) for scheme in re.findall(r"\b([a-z0-9]+)://", text)}
    if any(re.fullmatch(r"OTEL_EXPORTER_OTLP_(\w+_)?ENDPOINT", name) for name in forward):
        needed.add("otel")
    return sorted(filter(None, needed))


def _requirements(extras: Sequence[str], folder: Path, wheel: Path | None, constraints: Path) -> list[str]:
    """Put what pip needs into the folder, at paths that change with the contents: Ray caches environments by them."""
    files = [constraints, *([wheel] if wheel else [])]
    digest = hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=6).hexdigest()
    (folder / digest).mkdir()
    for file in files:
        shutil.copy(file, folder / digest)
    extra = f"[{','.join(extras)}]" if extras else ""
    package = f"{_WORKING_DIR}/{digest}/{wheel.name}{extra}" if wheel else f"capfilt{extra}=={_own_version()}"
    return [f"-c {_WORKING_DIR}/{digest}/{constraints.name}", package]


def _own_version() -> str:
    try:
        return version("capfilt")
    except PackageNotFoundError:
        raise CapfiltError("this capfilt is not installed and has no version; name a --wheel") from None


def runtime_env(folder: Path, requirements: Sequence[str], forward: Sequence[str]) -> dict[str, Any]:
    """Ray's runtime environment for a job. Holds the values of `forward`: never to be shown.

    Args:
        forward: names of environment variables that the job gets with the values they have here.

    Raises:
        SpecError: a variable is not set here, or a value is given in place of a name.
    """
    for name in forward:
        if "=" in name:
            raise SpecError(
                f"--env {name.split('=')[0]}: give the variable's name alone; its value is taken from the environment, "
                "so that a secret stands in no command line"
            )
        if name not in os.environ:
            raise SpecError(f"--env {name}: not set here; export it, or leave it out")
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **{name: os.environ[name] for name in forward}}
    pip = {"pip": {"packages": list(requirements)}} if requirements else {}
    return {"working_dir": str(folder), "env_vars": variables, **pip}
