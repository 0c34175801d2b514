"""The lease on an output: who takes it, who is dead, who gives way, and what the one that gave way can still do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from s3 import S3, Fault, Several, Struck

from capfilt import holder
from capfilt.errors import LeaseHeldError, LeaseLostError, StoreError
from capfilt.holder import FOLDER, Files, Holder, standing
from capfilt.lease import Lease

SECONDS = 1.2

HOLD = """
import sys, time
from capfilt.lease import Lease
with Lease(sys.argv[1], {}, "other", float(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
print("given back", flush=True)
"""


class Other:
    """A process that holds the lease until its standard input ends."""

    def __init__(self, output: str, seconds: float = SECONDS) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, output, str(seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def end(self) -> str:
        return self.process.communicate(timeout=60)[0]


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out")


@pytest.fixture
def other(output: str) -> Iterator[Other]:
    one = Other(output)
    yield one
    if one.process.poll() is None:
        one.process.kill()
    one.process.communicate()


def files(output: str) -> list[str]:
    return sorted(os.listdir(Path(output) / FOLDER))


def elsewhere(output: str, **changes: Any) -> Holder:
    """Make the newest lease one of a run on another machine."""
    now = standing(output, {})
    assert now.holder is not None
    changed = now.holder.model_copy(update={"machine": "far/1", "host": "far", "boot": "b", **changes})
    Files(output, {}).write(now.number, changed.model_dump_json().encode())
    return changed


def dead(output: str) -> None:
    """Leave the lease of a process that was killed."""
    one = Other(output)
    one.process.kill()
    one.process.communicate()


# --- one after the other ---


def test_taken_beaten_and_given_back(output: str) -> None:
    with Lease(output, {}, "a", 0.3) as lease:
        first = standing(output, {}).holder
        assert first is not None
        assert (first.run, first.pid, first.lives()) == ("a", os.getpid(), True)
        time.sleep(0.4)
        later = standing(output, {}).holder
        assert later is not None
        assert later.beat > first.beat
        lease.check()
    assert standing(output, {}).free
    with Lease(output, {}, "b", 0.3) as lease:
        assert (lease.contended, lease.unsure) == (False, False)
        assert files(output) == ["000000002.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_given_back_after_an_error_too(output: str, error: type[BaseException]) -> None:
    with pytest.raises(error), Lease(output, {}, "a"):
        raise error
    assert standing(output, {}).free


def test_a_look_leaves_nothing(output: str) -> None:
    Lease(output, {}, "a").look()
    assert not Path(output).exists()


def test_who_held_it_since_the_look_is_noticed(output: str) -> None:
    lease = Lease(output, {}, "a")
    lease.look()
    with Lease(output, {}, "b"):
        pass
    with lease:
        assert lease.contended


# --- a holder that lives ---


def test_a_live_run_is_named_at_once(output: str, other: Other) -> None:
    begin = time.monotonic()
    with pytest.raises(LeaseHeldError) as caught:
        Lease(output, {}, "mine").look()
    assert time.monotonic() - begin < 0.5
    message = str(caught.value)
    for part in (f"{output}: held by run other on ", f"process {other.process.pid}, user ", "last sign of life 20"):
        assert part in message
    assert caught.value.exit_code == 4
    assert other.end() == "given back\n"
    Lease(output, {}, "mine").look()


def test_a_live_run_far_away_is_known_by_its_beats_whatever_its_clock(output: str) -> None:
    """A clock that is a year behind, or ahead, makes no live run look dead."""
    said: list[str] = []
    with Lease(output, {}, "a", 60):
        for year in ("2000", "2099"):
            elsewhere(output, seen=f"{year}-01-01T00:00:00+00:00", limit=30)
            beats = threading.Timer(0.5, lambda: elsewhere(output, beat=time.monotonic_ns()))
            beats.start()
            begin = time.monotonic()
            with pytest.raises(LeaseHeldError, match="run a on far"):
                Lease(output, {}, "b", say=said.append).look()
            assert time.monotonic() - begin < 10
            beats.join()
    assert all("shows within 30 s: watching" in line for line in said)
    assert len(said) == 2


# --- a holder that is dead ---


def test_a_killed_run_is_dead_at_once(output: str) -> None:
    dead(output)
    begin, said = time.monotonic(), list[str]()
    with Lease(output, {}, "mine", say=said.append) as lease:
        assert time.monotonic() - begin < 0.5
        assert not lease.unsure
    assert "taken over from run other on " in said[0]
    assert said[0].endswith("which is dead")


def test_a_killed_run_that_no_one_has_buried_is_dead(output: str, other: Other) -> None:
    other.process.kill()  # a zombie until it is waited for
    deadline = time.monotonic() + 10
    while Path(f"/proc/{other.process.pid}/stat").read_text().split(")")[1].split()[0] != "Z":
        assert time.monotonic() < deadline
    Lease(output, {}, "mine").look()


@pytest.mark.parametrize(
    ("changes", "lives"),
    [
        ({}, True),
        ({"born": 1}, False),  # the process id is another's now
        ({"pid": 2**22 + 1}, False),
        ({"boot": "another"}, None),  # of a clone, which may live, or of this machine before it was started anew
        ({"boot": ""}, None),
        ({"space": "pid:[1]"}, None),
        ({"space": "pid:[1]", "pid": 2**22 + 1}, None),  # of another container: its process ids are not ours
        ({"machine": "far/1"}, None),
        ({"clock": 0.0}, None),  # it is there and has had no beat for long
    ],
)
def test_what_can_be_told_at_once(changes: dict[str, Any], lives: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    read = holder._read
    monkeypatch.setattr(holder, "_read", lambda path: "1" if path == "/etc/machine-id" else read(path))
    assert Holder.here("a", 60).model_copy(update=changes).lives() is lives


def test_a_silent_run_far_away_is_dead_after_its_own_limit(output: str) -> None:
    dead(output)
    elsewhere(output, limit=0.5)
    begin = time.monotonic()
    lease = Lease(output, {}, "b", 60)
    lease.look()
    assert 0.5 <= time.monotonic() - begin < 5
    with lease:
        assert time.monotonic() - begin < 5  # not watched again
        assert lease.unsure
        assert not lease.contended


@pytest.mark.parametrize("text", [b"", b'{"run": "half a fi'])
def test_a_file_that_broke_off_is_waited_for_and_passed(output: str, text: bytes) -> None:
    path = Path(output) / FOLDER / "000000003.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    with Lease(output, {}, "a", 0.5) as lease:
        assert lease.unsure
        assert files(output) == ["000000004.json"]


# --- taken over ---


def test_a_stopped_run_is_taken_over_and_told(output: str) -> None:
    told = threading.Event()
    with Lease(output, {}, "a", 0.6, on_loss=told.set) as lease:
        elsewhere(output, token="another's")
        assert told.wait(10)
        with pytest.raises(LeaseLostError, match=r"out: taken over by run a on far .* nothing is lost"):
            lease.check()
    assert not standing(output, {}).free  # it is not ours to give back


def test_the_interrupt_that_tells_of_a_loss_becomes_the_loss(output: str) -> None:
    def run() -> None:
        with Lease(output, {}, "a", 0.3, on_loss=told.set):
            elsewhere(output, token="another's")
            assert told.wait(10)
            raise KeyboardInterrupt

    told = threading.Event()
    with pytest.raises(LeaseLostError):
        run()


def test_a_run_that_slept_asks_before_it_commits(output: str, other: Other) -> None:
    """SIGSTOP for longer than the limit, as a virtual machine that is put to sleep."""
    os.kill(other.process.pid, signal.SIGSTOP)
    time.sleep(SECONDS)
    with Lease(output, {}, "mine", SECONDS) as lease:
        assert lease.unsure
        os.kill(other.process.pid, signal.SIGCONT)
        assert other.end() == "given back\n"  # it ends by itself
        time.sleep(SECONDS / 3)
        lease.check()
        now = standing(output, {}).holder
        assert now is not None
        assert (now.run, now.ended) == ("mine", None)


def test_a_lease_removed_by_hand_is_lost(output: str) -> None:
    with Lease(output, {}, "a", 0.3) as lease:
        for name in files(output):
            os.unlink(Path(output) / FOLDER / name)
        time.sleep(0.3)
        with pytest.raises(LeaseLostError, match="changed by hand"):
            lease.check()


# --- several at once ---


def test_one_of_many_takes_it(output: str) -> None:
    dead(output)
    for _ in range(5):
        taken, gate, over = [], threading.Barrier(8), threading.Event()

        def race(name: str, taken: list[str] = taken, gate: Any = gate, over: Any = over) -> None:
            lease = Lease(output, {}, name)
            gate.wait()
            try:
                with lease:
                    taken.append(name)
                    over.wait(30)
            except LeaseHeldError:
                pass

        threads = [threading.Thread(target=race, args=(f"run{n}",)) for n in range(8)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 20
        while sum(thread.is_alive() for thread in threads) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        over.set()
        for thread in threads:
            thread.join()
        assert len(taken) == 1


def test_a_number_that_was_used_and_cleared_away_is_not_taken_again(output: str) -> None:
    """By who looked long ago: numbers below the newest are free, and no one's."""
    late = Lease(output, {}, "late")
    late.look()
    for name in ("a", "b"):
        with Lease(output, {}, name):
            pass
    assert not late._take(1)
    assert files(output) == ["000000002.json"]


# --- a store that is no file system ---


def test_in_an_object_store() -> None:
    output = "memory://lease-test/out"
    try:
        with Lease(output, {}, "a", 0.3):
            with pytest.raises(LeaseHeldError):
                Lease(output, {}, "b").look()
            time.sleep(0.2)
        with Lease(output, {}, "b", 0.3):
            now = standing(output, {}).holder
            assert now is not None
            assert now.run == "b"
    finally:
        fsspec.filesystem("memory").rm("/lease-test", recursive=True)


def test_an_answer_that_was_lost_is_not_another_run() -> None:
    """The store's client tries again what was done, and hears that the file is there."""
    output = "memory://lease-lost-answer/out"
    where = Files(output, {})
    create = where._fs.pipe_file

    def twice(*arguments: Any, **options: Any) -> None:
        create(*arguments, **options)
        create(*arguments, **options)

    where._fs.pipe_file = twice
    try:
        with Lease(output, {}, "a") as lease:
            assert lease._number == 1
    finally:
        del where._fs.pipe_file
        fsspec.filesystem("memory").rm("/lease-lost-answer", recursive=True)


def test_on_s3_one_creates_the_file_and_the_other_hears_so(s3: S3, tmp_path: Path) -> None:
    output = f"s3://data/lease/{tmp_path.name}"
    files = Files(output, s3.options)
    assert [files.create(1, text, "mine") for text in (b"{}", b"[]")] == [True, False]  # If-None-Match: *
    assert files.newest().text == b"{}"
    files.remove(1)
    with Lease(output, s3.options, "a", 0.6):
        with pytest.raises(LeaseHeldError, match="held by run a on "):
            Lease(output, s3.options, "b").look()
        time.sleep(0.3)
        now = standing(output, s3.options).holder
        assert now is not None
        assert now.beat > 0
    with Lease(output, s3.options, "b", 0.6):
        assert standing(output, s3.options).number == 2
    assert standing(output, s3.options).free


def test_a_store_that_fails_for_a_moment_costs_no_lease(s3: S3, tmp_path: Path) -> None:
    output = f"s3://data/lease/{tmp_path.name}"
    with Lease(output, s3.options, "a"):
        pass
    once = (
        Struck(Fault.TRUNCATED, r"GET .*list-type.*_runs/lease", 1),
        Struck(Fault.DOWNLOAD_RESET, r"GET /data/.*_runs/lease/", 1),
        Struck(Fault.LOST, r"PUT if absent .*_runs/lease/", 1),
        Struck(Fault.LATE_500, r"PUT /data/.*_runs/lease/", 1),
    )
    with s3.faulty(Several(*once)), Lease(output, s3.options, "b"):
        assert str(standing(output, s3.options).holder).startswith("run b on ")
    assert len(s3.injected) == len(once)
    assert standing(output, s3.options).free


def test_a_store_that_refuses_is_heard(output: str) -> None:
    Path(output).mkdir(parents=True)
    (Path(output) / "_runs").write_text("a file where a directory must be")
    message = r"out(/_runs/lease)?: cannot be (looked at|written): .*_runs.*run again to resume"
    with pytest.raises(StoreError, match=message), Lease(output, {}, "a"):
        pass


def test_the_file_names_no_secret(output: str) -> None:
    with Lease(output, {}, "a"):
        (name,) = files(output)
        assert set(json.loads((Path(output) / FOLDER / name).read_text())) == set(Holder.model_fields)
