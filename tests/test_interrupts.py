"""Ctrl-C and SIGTERM, in processes of their own: what is said, when, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pytest

from capfilt.interrupts import interruptible, signals_kept, uninterrupted

BEGIN = """
import hashlib, os, signal, sys, threading, time
from rich.console import Console
from capfilt.errors import RunInterruptedError
from capfilt.interrupts import acknowledged, interrupt, interruptible, uninterrupted

signal.signal(signal.SIGINT, signal.{sigint})
console = Console(stderr=True, soft_wrap=True)

def native(seconds):
    "One call that hears no signal, though other threads run."
    rounds = 50_000
    begin = time.monotonic()
    hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 + int(rounds * seconds / (time.monotonic() - begin)))

def main():
    with acknowledged(console, lambda: print("last", flush=True)), interruptible():
        try:
            print("ready", flush=True)
            {body}
        finally:
            native({cleaning})
            print("cleaned up", flush=True)

try:
    main()
except RunInterruptedError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def line_of(stream: IO[str] | None) -> str:
    """A line, and nothing of what follows, which `communicate` reads."""
    assert stream is not None
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(stream.fileno(), 1)):
        line += byte
    return line.decode()


@contextmanager
def process(body: str, cleaning: float = 0, sigint: str = "default_int_handler") -> Iterator[subprocess.Popen[str]]:
    """One that is in its body."""
    code = BEGIN.replace("{body}", body).replace("{sigint}", sigint).replace("{cleaning}", str(cleaning))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as begun:
        try:
            assert line_of(begun.stdout) == "ready\n"
            yield begun
        finally:
            begun.kill()


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (
            signal.SIGINT,
            "capfilt: interrupted: stopping, which may take some seconds; what is finished is kept (Ctrl-C",
        ),
        (signal.SIGTERM, "capfilt: interrupted by SIGTERM: stopping, which may take some seconds; what is finished is"),
    ],
)
def test_it_is_said_at_once_and_the_rest_is_done(sent: signal.Signals, said: str) -> None:
    with process("native(1)", cleaning=3) as begun:
        begun.send_signal(sent)
        begin = time.monotonic()
        assert line_of(begun.stderr).startswith(said)
        assert time.monotonic() - begin < 1.5, "the main thread hears of it later"
        out, errors = begun.communicate(timeout=60)
    assert out == "cleaned up\ninterrupted; what was finished is kept. Run the same command again to resume\n"
    assert (errors, begun.returncode) == ("", 130)


def test_a_second_one_ends_it_at_once() -> None:
    with process("native(60)", cleaning=60) as begun:
        begun.send_signal(signal.SIGINT)
        line_of(begun.stderr)
        time.sleep(0.6)
        begun.send_signal(signal.SIGINT)
        out, errors = begun.communicate(timeout=10)
    assert out == "last\n"
    assert errors == "capfilt: ended at once; what was finished is kept. Run the same command again to resume\n"
    assert begun.returncode == 130


def test_one_order_may_come_twice() -> None:
    """As `timeout` sends it: to the process, then to its group."""
    again = "os.kill(os.getpid(), signal.SIGTERM)"
    with process(f"\n            try: {again}\n            finally: {again}; time.sleep(0.8)") as begun:
        out, errors = begun.communicate(timeout=60)
    assert out.startswith("cleaned up\n"), "the clean-up was torn, or the process ended"
    assert (errors.count("\n"), begun.returncode) == (1, 130)


def test_who_is_deaf_to_ctrl_c_stays_so() -> None:
    body = "os.kill(os.getpid(), signal.SIGINT)\n            with uninterrupted(): os.kill(os.getpid(), signal.SIGINT)"
    with process(body, sigint="SIG_IGN") as begun:
        assert begun.communicate(timeout=60) == ("cleaned up\n", "")
    assert begun.returncode == 0


def test_what_must_not_be_torn_is_not_and_the_order_is_heard() -> None:
    body = "\n            with uninterrupted(): os.kill(os.getpid(), signal.SIGTERM); print('whole', flush=True)"
    with process(body + "\n            print('not reached')") as begun:
        out, errors = begun.communicate(timeout=60)
    assert out.startswith("whole\ncleaned up\ninterrupted;")
    assert errors.startswith("capfilt: interrupted by SIGTERM: stopping")


def test_an_interrupt_of_its_own_is_no_order() -> None:
    with process("threading.Timer(0.1, interrupt).start(); time.sleep(20)") as begun:
        out, errors = begun.communicate(timeout=60)
    assert out.startswith("cleaned up\n")
    assert (errors, begun.returncode) == ("", 130)


def test_one_that_comes_where_nothing_can_be_raised_is_not_lost() -> None:
    """In a callback of the garbage collector's, of which Python says that it ignored the exception."""
    body = "import weakref; loop = lambda _: native(1); thing = type('T', (), {})(); at = weakref.ref(thing, loop); "
    with process(f"{body}del thing; time.sleep(60)") as begun:
        time.sleep(0.3)
        begun.send_signal(signal.SIGTERM)
        out, errors = begun.communicate(timeout=30)
    assert out.startswith("cleaned up\n")
    assert errors.count("\n") == 1
    assert (errors[:31], begun.returncode) == ("capfilt: interrupted by SIGTERM", 130)


def test_ray_takes_no_signal_away() -> None:
    """It takes SIGTERM as it starts, and would end the process with exit code 15, in silence."""
    body = (
        "\n            from capfilt.pipelines.session import connected; from capfilt.spec import Ray"
        "\n            import ray"
        "\n            ours = signal.getsignal(signal.SIGTERM)"
        "\n            def when_it_is_taken():"
        "\n                while signal.getsignal(signal.SIGTERM) is ours: time.sleep(0.001)"
        "\n                os.kill(os.getpid(), signal.SIGTERM)"
        "\n            threading.Thread(target=when_it_is_taken, daemon=True).start()"
        "\n            with connected(Ray(num_cpus=1)): print('not reached')"
    )
    with process(body) as begun:
        out, errors = begun.communicate(timeout=120)
    assert out.startswith("cleaned up\ninterrupted;"), errors
    assert begun.returncode == 130


def as_ray_does() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
    signal.raise_signal(signal.SIGTERM)


def test_handlers_are_put_back_and_an_exit_is_an_interruption() -> None:
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    with interruptible():
        own = signal.getsignal(signal.SIGTERM)
        assert own is not before
        with pytest.raises(KeyboardInterrupt), signals_kept():
            as_ray_does()
        assert signal.getsignal(signal.SIGTERM) is own
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"), uninterrupted():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is own
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_one_is_heard_where_nobody_reads_what_is_said() -> None:
    with process("native(60)", cleaning=60) as begun:
        assert begun.stderr is not None
        begun.stderr.close()
        begun.send_signal(signal.SIGINT)
        time.sleep(1)
        begun.send_signal(signal.SIGINT)
        assert begun.wait(timeout=10) == 130
