"""The files of a training run: what it is, its metrics by step, and the states that it resumes from.

<output>/run.json        the resolved spec, versions of datasets, packages
<output>/metrics.jsonl   a line a step
<output>/tensorboard/    the same
<output>/state/          weights, optimiser, twin, queue and places in the data; gone once the run is done
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capfilt.errors import CapfiltError, ConflictError, TrainingError

KEPT_STATES = 2


@contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Hold a run's directory; the operating system lets go of it however the process ends.

    Raises:
        ConflictError: another process on this machine holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError(
                f"{output}: another run is at work there; wait for it, or take another output"
            ) from None
        yield


def write_json(file: Path, content: Any) -> None:
    """Write a file that appears whole."""
    staged = file.with_name(f".{file.name}.{os.getpid()}")
    staged.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    staged.replace(file)


def read_record(file: Path) -> dict[str, Any] | None:
    """What :func:`write_json` wrote; None where there is nothing.

    Raises:
        TrainingError: the file is something else.
    """
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise TrainingError(f"{file}: not a record of this package ({error}); take another output") from error
    return record


def compare_record(file: Path, record: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Refuse to go on with another run than the one on record.

    Raises:
        TrainingError: naming what differs.
    """
    for name, now in about["spec"].items():
        if (was := record["spec"].get(name)) != now:
            raise TrainingError(
                f"{file}: the run in this output has another {name} ({was!r}, now {now!r}); put it back to resume, or "
                "take another output"
            )
    for name, what in (("data", "the data"), ("start", "the checkpoint to start from")):
        if record.get(name) != about.get(name):
            raise TrainingError(f"{file}: {what} changed since the run began; put it back, or take another output")


class States:
    """A run's states by step; the newest few are kept."""

    def __init__(self, output: Path) -> None:
        self._directory = output / "state"

    def newest(self) -> int | None:
        """The step of the newest state; None where there is none."""
        return max(self._steps(), default=None)

    def write(self, step: int, state: Mapping[str, Any]) -> None:
        """Keep a state; it appears whole."""
        import torch  # the records need none

        self._directory.mkdir(parents=True, exist_ok=True)
        for left in self._directory.glob(".step-*"):  # by an attempt that was killed
            left.unlink()
        staged = self._directory / f".step-{step}.{os.getpid()}"
        with staged.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(self._file(step))
        for old in sorted(self._steps())[:-KEPT_STATES]:
            self._file(old).unlink(missing_ok=True)

    def read(self, step: int) -> dict[str, Any]:
        """A state.

        Raises:
            TrainingError: the file is not one.
        """
        import torch

        try:
            state: dict[str, Any] = torch.load(self._file(step), map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise TrainingError(
                f"{self._file(step)}: not a state ({error}); delete it to resume from the one before"
            ) from error
        return state

    def clear(self) -> None:
        """Remove all."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _file(self, step: int) -> Path:
        return self._directory / f"step-{step:09d}.pt"

    def _steps(self) -> list[int]:
        return [int(file.stem.removeprefix("step-")) for file in self._directory.glob("step-*.pt")]


class Log:
    """Metrics by step, as JSON lines and for TensorBoard.

    Args:
        step: that the run resumes from; what an earlier attempt wrote of later ones is removed.
    """

    def __init__(self, output: Path, step: int) -> None:
        self._path = output / "metrics.jsonl"
        kept = [line for line in read_log(output) if line["step"] <= step]
        staged = output / ".metrics.jsonl"
        staged.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        staged.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise CapfiltError("training needs tensorboardX and ray[train]: pip install 'capfilt[train]'") from None
        self._board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's metrics."""
        self._line({"step": step, **{name: value if math.isfinite(value) else None for name, value in metrics.items()}})
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def warn(self, step: int, message: str) -> None:
        """What a person should know."""
        self._line({"step": step, "warning": message})

    def _line(self, content: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        self._board.close()


def read_log(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's log so far; one that a kill cut short is left out."""
    try:
        text = (output / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
