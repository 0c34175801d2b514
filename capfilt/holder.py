"""Who holds an output: the numbered files of its lease, and whether the run that they name lives. See capfilt.lease."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from capfilt.inputs import is_local
from capfilt.stores import connect, persist

FOLDER = "_runs/lease"


class Holder(BaseModel):
    """What the holder of a lease says of itself.

    Attributes:
        token: of this holding; two runs that think they hold a number differ in it.
        since, seen, ended: times of the holder's clock, for people. `ended` is None while the run goes on.
        beat: counts up.
        limit: seconds without a beat after which the holder gives way.
        machine: host name and machine id. boot: of the kernel's start. space: in which `pid` counts.
        born: when the process began, in ticks since that start. clock: of the last beat, in seconds since then.
    """

    model_config = ConfigDict(frozen=True)

    run: str
    token: str
    host: str
    user: str
    pid: int
    since: str
    seen: str
    ended: str | None = None
    beat: int = 0
    limit: float = Field(gt=0, le=3600)
    machine: str
    boot: str
    space: str
    born: int
    clock: float

    @classmethod
    def here(cls, run: str, limit: float) -> Self:
        """This process, as the holder for a run."""
        machine, boot, space = _place()
        return cls(
            run=run,
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            user=_user(),
            pid=os.getpid(),
            since=_now(),
            seen=_now(),
            limit=limit,
            machine=machine,
            boot=boot,
            space=space,
            born=_born(os.getpid()) or 0,
            clock=_clock(),
        )

    def once_more(self) -> Self:
        """Another beat."""
        return self.model_copy(update={"beat": self.beat + 1, "seen": _now(), "clock": _clock()})

    def __str__(self) -> str:
        return (
            f"run {self.run} on {self.host} (process {self.pid}, user {self.user}), since {self.since}; "
            f"last sign of life {self.seen}"
        )

    def lives(self) -> bool | None:
        """Whether the run lives, as far as can be told from here at once. None: watch its beats."""
        machine, boot, space = _place()
        # Another start may be another machine's, though names and ids agree: those of clones of one image do.
        if not boot or (self.machine, self.boot, self.space) != (machine, boot, space):
            return None
        if _born(self.pid) != self.born:
            return False
        return True if _clock() - self.clock < self.limit else None


@dataclass(frozen=True)
class Standing:
    """The lease as it is in the store.

    Attributes:
        number: 0 where none was ever taken.
        text: of its file; None where there is none.
        holder: None where there is none, or it cannot be read (yet).
    """

    number: int
    text: bytes | None = None

    @property
    def holder(self) -> Holder | None:
        try:
            return Holder.model_validate_json(self.text) if self.text else None
        except ValidationError:
            return None

    @property
    def free(self) -> bool:
        """Whether nobody has it."""
        holder = self.holder
        return self.text is None or (holder is not None and holder.ended is not None)


def standing(output: str, options: Mapping[str, Any]) -> Standing:
    """Read the lease on an output."""
    return Files(output, options).newest()


class Files:
    """The numbered files of an output.

    Args:
        at: what follows the output in the name of their folder.
    """

    def __init__(self, output: str, options: Mapping[str, Any], at: str = f"/{FOLDER}") -> None:
        self._fs, root = connect(output.rstrip("/"), options)
        self._folder = f"{root}{at}"
        self._local = is_local(self._fs)

    def _name(self, number: int) -> str:
        return f"{self._folder}/{number:09d}.json"

    def _numbers(self) -> list[int]:
        self._fs.invalidate_cache()
        try:
            names = [path.rpartition("/")[2] for path in self._fs.ls(self._folder, detail=False)]
        except FileNotFoundError:
            return []
        stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def newest(self) -> Standing:
        return persist(self._newest)

    def _newest(self) -> Standing:
        for number in reversed(self._numbers()):
            with contextlib.suppress(FileNotFoundError):  # cleared away since, by a newer one's holder
                return Standing(number, self._fs.cat_file(self._name(number)))
            return self._newest()
        return Standing(0)

    def create(self, number: int, text: bytes, token: str) -> bool:
        """Write a file where there is none; whether it is ours."""
        name = self._name(number)
        if self._local:
            return self._create_local(name, text)
        try:
            persist(lambda: self._fs.pipe_file(name, text, mode="create"))
        except OSError:  # FileExistsError, or the store's own way to say that
            # It may be ours all the same: an answer was lost, and the store's client tried again.
            self._fs.invalidate_cache()  # which was filled before the file was there
            with contextlib.suppress(FileNotFoundError):
                holder = Standing(number, persist(lambda: self._fs.cat_file(name))).holder
                return holder is not None and holder.token == token
            raise
        return True

    def _create_local(self, name: str, text: bytes) -> bool:
        os.makedirs(self._folder, exist_ok=True)
        try:
            file = open(name, "xb")  # noqa: SIM115 - what goes wrong with it has another meaning than its opening
        except FileExistsError:
            return False
        try:
            with file:
                file.write(text)
        except OSError:
            os.unlink(name)
            raise
        return True

    def write(self, number: int, text: bytes) -> None:
        """Replace a file of ours, whole."""
        name = self._name(number)
        if self._local:
            staged = Path(f"{self._folder}/.{number}.{os.getpid()}")
            try:
                staged.write_bytes(text)
                staged.replace(name)
            except OSError:
                staged.unlink(missing_ok=True)
                raise
        else:
            persist(lambda: self._fs.pipe_file(name, text))

    def remove(self, number: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            persist(lambda: self._fs.rm_file(self._name(number)))

    def remove_all_up_to(self, number: int) -> None:
        """Remove a number and those before it, and the folder, if nobody has put another there."""
        self.clear_before(number + 1)
        if self._local:
            with contextlib.suppress(OSError):
                Path(self._folder).rmdir()

    def clear_before(self, number: int) -> None:
        """Remove lower numbers; what remains does no harm."""
        for old in self._numbers():
            if old < number:
                with contextlib.suppress(OSError):
                    self.remove(old)


# --- who and where ---


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # containers run under numbers without names
        return str(os.getuid())


def _clock() -> float:
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def _place() -> tuple[str, str, str]:
    """The machine, its start, and the space of process ids, by Linux's names for them; empty where it has none."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        space = ""
    machine = f"{socket.gethostname()}/{_read('/etc/machine-id')}"
    return machine, _read("/proc/sys/kernel/random/boot_id"), space


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _born(pid: int) -> int | None:
    """When a process began, in ticks since the machine's start; None if it is gone, be it that no one has buried it."""
    stat = _read(f"/proc/{pid}/stat")
    state, *fields = stat.rpartition(")")[2].split() or ["X"]
    return None if state in "ZX" else int(fields[18])
