"""Ctrl-C, and SIGTERM, which is how clusters say stop: either ends a run by a KeyboardInterrupt in the main thread.

What is finished is then committed and put on record, as the run's `finally` clauses have it. The command line says at
once that it has heard, and ends at once where it is told a second time (:func:`acknowledged`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console

from capfilt import logs
from capfilt.errors import RunInterruptedError
from capfilt.terminal import say

_STOPPING = (signal.SIGINT, signal.SIGTERM)

_AGAIN_SECONDS = 0.5
"""In which one order may come twice: to the process, and to its group (`timeout`, and what passes signals on)."""

_ONCE_MORE_SECONDS = 0.1
"""After which an interruption is raised again that came where nothing can be raised."""

_END = b"\0"  # no signal's number

_HEARD = "{}: stopping, which may take some seconds; what is finished is kept ({} ends it at once)"
_AT_ONCE = "ended at once; what was finished is kept. Run the same command again to resume"


class _Stop:
    """The handler of a signal that stops a run: raises KeyboardInterrupt.

    Attributes:
        once: whether the first signal alone does, so that a second one does not tear what the first set off.
        ours: whether the next signal is this process's own, and no order from outside.
    """

    def __init__(self, *, once: bool = False) -> None:
        self.once, self.ours = once, False
        self._raised = False
        self._number = signal.SIGTERM

    def __call__(self, number: int, _: Any) -> None:
        if self.once and self._raised:
            return
        self._raised, self._number = True, signal.Signals(number)
        raise KeyboardInterrupt(self._number.name)

    @contextmanager
    def never_lost(self) -> Iterator[None]:
        """Raise again what was raised in a callback of the garbage collector's or in a `__del__`: Python drops it."""
        before = sys.unraisablehook

        def hook(lost: Any) -> None:
            if lost.exc_type is not KeyboardInterrupt:
                before(lost)
                return
            self._raised, self.ours = False, True
            again = threading.Timer(_ONCE_MORE_SECONDS, os.kill, (os.getpid(), self._number))
            again.daemon = True
            again.start()

        sys.unraisablehook = hook
        try:
            yield
        finally:
            sys.unraisablehook = before


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends what is inside as Ctrl-C does."""
    if isinstance(signal.getsignal(signal.SIGTERM), _Stop) or not _is_main():  # whoever owns the signals handles them
        yield
        return
    stop = _Stop()
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with stop.never_lost():
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def interrupt() -> None:
    """End the run of this process as Ctrl-C does, from any thread, if it is interruptible just now."""
    if isinstance(stop := signal.getsignal(signal.SIGTERM), _Stop):
        stop.ours = True
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """What is inside is not torn by Ctrl-C or SIGTERM; they are heard at its end."""
    if not _is_main():  # signals do not come here
        yield
        return
    heard: list[signal.Signals] = []
    before = _replace(lambda number, _: heard.append(signal.Signals(number)))
    try:
        yield
    finally:
        _put_back(before)
    if heard:
        handler = before[heard[0]]
        if not callable(handler):
            raise KeyboardInterrupt(heard[0].name)
        handler(heard[0], None)


@contextmanager
def signals_kept() -> Iterator[None]:
    """Around what takes these signals for itself: Ray takes SIGTERM, and Ray Train SIGINT, and end the process as if it
    had asked for it. Here that is an interruption, and the handlers are put back."""
    before: _Handlers = {number: signal.getsignal(number) for number in _STOPPING}
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt("Ray was interrupted") from None
    finally:
        if _is_main():
            _put_back(before)


_Handlers = dict[signal.Signals, Any]
"""By signal."""


def _replace(handler: Callable[[int, Any], None]) -> _Handlers:
    """Those that were there. A background job of a shell is deaf to Ctrl-C, and stays so."""
    heard = [number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def _put_back(handlers: _Handlers) -> None:
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: no Python code set it


# --- on the command line ---


@contextmanager
def acknowledged(console: Console, at_once: Callable[[], None]) -> Iterator[None]:
    """Say at once that a signal was heard, whatever the main thread is at; a second one ends the process, at once.

    Args:
        at_once: called before it is ended so: what no `finally` does then.

    Raises:
        RunInterruptedError: in place of the KeyboardInterrupt.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    stop = _Stop(once=True)
    before = _replace(stop)
    waker = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # written to by C code, when a signal comes
    listener = threading.Thread(target=_listen, args=(reading, stop, console, at_once), name="interrupts", daemon=True)
    listener.start()
    try:
        with stop.never_lost():
            yield
    except KeyboardInterrupt:
        raise RunInterruptedError(
            "interrupted; what was finished is kept. Run the same command again to resume"
        ) from None
    finally:
        signal.set_wakeup_fd(waker)
        _put_back(before)
        os.write(writing, _END)
        listener.join()
        os.close(writing)
        os.close(reading)


def _listen(reading: int, stop: _Stop, console: Console, at_once: Callable[[], None]) -> None:
    first: float | None = None
    while (number := os.read(reading, 1)) != _END:
        if number[0] not in _STOPPING:
            continue
        if stop.ours:  # the run says itself what it was
            stop.ours = False
            continue
        name, now = signal.Signals(number[0]).name, time.monotonic()
        if first is None:
            first = now
            with suppress(OSError, SystemExit):  # nobody reads it any more; a second one is to be heard all the same
                _tell("interrupted", name, _HEARD.format(*_words(name)), console)
        elif now - first >= _AGAIN_SECONDS:
            try:
                at_once()
                _tell("ended_at_once", name, _AT_ONCE, console)
                console.show_cursor()
            finally:
                os._exit(RunInterruptedError.exit_code)


def _words(name: str) -> tuple[str, str]:
    return ("interrupted", "Ctrl-C again") if name == "SIGINT" else (f"interrupted by {name}", "a second one")


def _tell(event: str, name: str, line: str, console: Console) -> None:
    logs.event(event, signal=name)
    if not logs.begun():
        say(f"capfilt: {line}", console)
