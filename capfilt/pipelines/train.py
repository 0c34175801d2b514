"""Training on Ray Train: one process a device, each over its own share of the data; resumes to the same step.

The driver lists the data, pins the versions of datasets and starts the workers; the workers do everything else
(capfilt.pipelines.train_worker). One worker on a local Ray is this process itself, in Ray Train's local mode.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from capfilt.errors import CapfiltError, CheckpointError, DatasetError, SpecError, TrainingError
from capfilt.examples import Part, list_parts, oversized
from capfilt.fingerprints import fingerprint
from capfilt.interrupts import interruptible, signals_kept
from capfilt.models.trainee import ROLES
from capfilt.pipelines.rows import Data
from capfilt.pipelines.run_files import States, compare_record, only_one, read_log, read_record, write_json
from capfilt.pipelines.session import connected, connecting, lacking, surroundings
from capfilt.pipelines.train_worker import Task, of_first_rank, train_here
from capfilt.pipelines.training_progress import TrainingDisplay
from capfilt.spec import PairSource, PretrainSpec, TrainSpec
from capfilt.terminal import say

_TUNING = {"lr", "min_lr", "decay_rate", "warmup_steps", "warmup_lr", "weight_decay", "clip_norm"}
_MAY_CHANGE: dict[str, Any] = {
    **dict.fromkeys(("ray", "state_steps", "output", "checkpointing"), True),
    "workers": {"retries", "cpus"},
    "optimiser": _TUNING,
}
"""Fields that a run resumes with others of: they change nothing about what is trained but for rounding; and what a
person turns when training diverges, which is recorded."""


@dataclass
class TrainSummary:
    """What a training run did.

    Attributes:
        steps: of the optimiser, in all.
        resumed_at: the step that this attempt began after.
        last: metrics of the last step.
        cards: role -> the card of the checkpoint.
    """

    name: str
    kind: str
    output: str
    rows: int = 0
    steps: int = 0
    resumed_at: int = 0
    last: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    cards: dict[str, str] = field(default_factory=dict)
    elapsed: float = 0.0


def train(spec: TrainSpec, *, console: Console | None = None) -> TrainSummary:
    """Pretrain or fine-tune, and write the checkpoints and their cards; a run that is done already is left alone.

    Raises:
        CapfiltError: a local Ray has not what the workers need, or there is no Ray at the address.
        CheckpointError: a checkpoint to start from cannot be used.
        ConflictError: another run is at work in the output.
        DatasetError, InputError: the data are not there.
        SpecError: a field does not fit a checkpoint.
        TrainingError: the output holds another run, the data changed since the run began, or training diverged.
        KeyboardInterrupt: the newest state is kept.
    """
    output = Path(spec.output)
    summary = TrainSummary(spec.name, spec.kind, spec.output)
    begin = time.monotonic()
    with only_one(output):
        task = _prepare(spec)
        states = States(output)
        summary.rows, summary.steps, summary.resumed_at = task.data.rows, task.total, states.newest() or 0
        if _missing(spec):
            console = console or Console(stderr=True)
            if said := oversized(task.data.parts):
                say(f"capfilt: {said}", console)
            display = TrainingDisplay(console, output, summary.resumed_at, task.total)
            with interruptible(), display:
                _fit(task, console, display.waits)
        _end(spec, states)
        lines = read_log(output)
    summary.last = next((line for line in reversed(lines) if "warning" not in line), {})
    summary.warnings = [line["warning"] for line in lines if "warning" in line]
    summary.cards = {role: str(output / f"{role}.yaml") for role in ROLES[spec.kind]}
    summary.elapsed = time.monotonic() - begin
    return summary


def _missing(spec: TrainSpec) -> list[Path]:
    """The cards that are still to come."""
    cards = [Path(spec.output) / f"{role}.yaml" for role in ROLES[spec.kind]]
    return [card for card in cards if not card.exists()]


def _end(spec: TrainSpec, states: States) -> None:
    """Remove the states, which a run that is done needs no longer.

    Raises:
        TrainingError: it is not done, though its workers are.
    """
    if missing := _missing(spec):
        raise TrainingError(
            f"{missing[0]}: no such file, though the workers have ended; output must be a directory that all workers "
            "share. What they wrote is on their machines; name a shared directory, or share this one, and run again"
        )
    states.clear()


# --- what is trained on ---


def _prepare(spec: TrainSpec) -> Task:
    """The run's task: as its record says where there is one, else new, and recorded."""
    file = Path(spec.output) / "run.json"
    record = read_record(file)
    pinned = record["versions"] if record else {}
    sources = tuple(_pin(source, pinned) for source in spec.data)
    parts, versions = list_parts(sources)
    data = Data(sources, tuple(parts), spec.seed)
    per_step = spec.batch_size * spec.optimiser.accumulate * spec.workers.count
    steps_per_epoch = data.rows // per_step
    if not steps_per_epoch:
        raise TrainingError(
            f"{data.rows:,} rows make no step of {per_step:,}; lower batch_size, optimiser.accumulate or workers.count"
        )
    total = spec.steps or max(1, round(spec.epochs * data.rows / per_step))
    about = {"spec": _identity(spec), "data": _digest(parts), "start": _start(spec)}
    if record is None:
        length = {"rows": data.rows, "steps_per_epoch": steps_per_epoch, "total": total}
        record = {**about, "versions": versions, **length, **surroundings(), "optimisers": []}
    else:
        compare_record(file, record, about)
    optimiser = spec.optimiser.model_dump(mode="json")
    if not record["optimisers"] or record["optimisers"][-1]["optimiser"] != optimiser:
        after = States(Path(spec.output)).newest() or 0
        record["optimisers"].append({"after_step": after, "optimiser": optimiser})
        write_json(file, record)
    return Task(spec, data, steps_per_epoch, total)


def _pin(source: PairSource, versions: Mapping[str, int]) -> PairSource:
    if source.dataset is None or source.version is not None:
        return source
    return source.model_copy(update={"version": versions.get(source.dataset)})


def _identity(spec: TrainSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude=_MAY_CHANGE)


def _digest(parts: list[Part]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _start(spec: TrainSpec) -> str | None:
    return None if isinstance(spec, PretrainSpec) else fingerprint(spec.start.checkpoint)


# --- Ray Train ---


def _fit(task: Task, console: Console, waits: Callable[[str], None]) -> None:
    waits(connecting(task.spec.ray))
    import ray.exceptions

    workers = task.spec.workers
    with connected(task.spec.ray, cpus=math.ceil(workers.count * workers.cpus)), signals_kept():
        try:
            if not _is_here(task.spec):
                _check_capacity(task.spec, console)
            waits("starting the workers, which load the model and the data")
            _fit_on_ray_train(task)
        except ray.exceptions.RayError as error:
            raise TrainingError(f"Ray failed: {error}; run the same again to resume") from error


def _is_here(spec: TrainSpec) -> bool:
    """Whether the only worker is this process: Ray Train's local mode."""
    return spec.workers.count == 1 and spec.ray.address == "local"


def _check_capacity(spec: TrainSpec, console: Console) -> None:
    """Refuse workers that a local Ray can never place: Ray Train would try for ever, in silence. A cluster may yet
    grow, or others leave it: there, say what is waited for.

    Raises:
        CapfiltError: this machine has not so much.
    """
    import ray

    local, workers = spec.ray.address == "local", spec.workers
    have = ray.cluster_resources() if local else ray.available_resources()
    need = {name: round(workers.count * getattr(workers, name), 4) for name in ("gpus", "cpus")}  # Ray rounds so
    for name, there in lacking(have, **need).items():
        kind = name.upper().rstrip("S")
        asked = f"workers.count x workers.{name} is {workers.count} x {getattr(workers, name):g} {kind}"
        if local:
            raise CapfiltError(
                f"{asked} and this machine has {there:g}; lower workers.count or workers.{name}"
                f"{' (or raise ray.num_cpus)' if name == 'cpus' else ''}, or join a cluster with ray.address"
            )
        line = f"capfilt: {asked} and the cluster has {there:g} free; the run waits until it has more"
        say(line, console)


def _fit_on_ray_train(task: Task) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    spec = task.spec
    workers, output = spec.workers, Path(spec.output)
    here = _is_here(spec)
    attempt = f"attempt-{uuid.uuid4().hex[:8]}"
    resources = {"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {})
    trainer = TorchTrainer(
        _loop,
        train_loop_config={"task": pickle.dumps(task), "attempt": attempt},
        scaling_config=ray.train.ScalingConfig(
            num_workers=0 if here else workers.count,
            use_gpu=workers.gpus > 0,
            resources_per_worker=None if here else resources,
        ),
        run_config=ray.train.RunConfig(
            name=attempt,
            storage_path=str(output / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=workers.retries),
        ),
    )
    failure = _failure(output, attempt)
    try:
        trainer.fit()
        _raise_left(failure)
    except ray.train.TrainingFailedError as error:
        _raise_left(failure)  # with no retry left, no worker came to say it
        raise TrainingError(
            f"training failed after {workers.retries} retries: {error}\nMend the cause and run the same again: it "
            "resumes from its newest state"
        ) from error
    finally:
        failure.unlink(missing_ok=True)
        shutil.rmtree(output / "ray", ignore_errors=True)


_ENDS = {kind.__name__: kind for kind in (SpecError, CheckpointError, DatasetError, TrainingError)}
"""Errors that end a run, by the names that a worker leaves them under: a pickle in a directory that others may write to
would run what they please."""


def _failure(output: Path, attempt: str) -> Path:
    return output / f".failure-{attempt}"


def _raise_left(failure: Path) -> None:
    """Raise the error that a worker left for the driver, if one did."""
    if failure.exists():
        kind, message = json.loads(failure.read_bytes())
        raise _ENDS[kind](message)


def _loop(config: dict[str, Any]) -> None:
    """What each worker runs. An error that workers started anew would only meet again is left for the driver."""
    task: Task = pickle.loads(config["task"])
    failure = _failure(Path(task.spec.output), config["attempt"])
    if of_first_rank(failure.exists()):
        return
    try:
        train_here(task)
    except tuple(_ENDS.values()) as error:
        kind = next(name for name, ends in _ENDS.items() if isinstance(error, ends))
        failure.write_text(json.dumps([kind, str(error)]), encoding="utf-8")
        raise
