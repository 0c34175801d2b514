"""The lease on an output: one run writes there, and others see which and stop before they begin.

    <output>/_runs/lease/<number>.json      the highest number counts

A run takes the lease by creating the next number's file where there is none, in which one of several succeeds. At every
beat it writes the file anew, with a higher count; at its end it marks it as ended. Who finds another's lease must know
whether that run lives, and compares no clocks of two machines for it:

- On the same machine, since the same start: its process is there and it has had a beat of late, or the process is gone.
- Else, be it that the machine was started anew, one watches. A beat within the holder's own limit is life; none is
  death, or a process so stopped or cut off that it must give way.

A holder that gives way learns of it by a higher number, and stops. That nothing is lost or doubled does not rest on the
lease: a run that takes over from one which may yet wake begins with an empty commit, after which the other's commits
fail (capfilt.dataset). In stores that cannot create a file only where there is none, two runs may both take the lease;
then one of them is stopped by the other's commit, as if there were none.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from capfilt.errors import LeaseHeldError, LeaseLostError
from capfilt.holder import FOLDER, Files, Holder, Standing
from capfilt.logs import event
from capfilt.stores import blamed, one_line

BEATS = 6
"""In the time after which a silent holder gives way."""


class Lease:
    """A run's lease on an output, as a context: taken on entry, given back at the end, however that comes.

    Args:
        output, options: as of CuratedDataset.
        run: the run's id.
        seconds: without a beat, after which others may take it.
        say: told in a line what is waited for.
        on_loss: called, in another thread, once when another run has taken it.
        at: where its files lie: what follows the output in their folder's name.

    Attributes:
        contended: whether another run held the lease between `look` and entry, so that what was read may be old.
        unsure: whether the last holder was given up for its silence alone, so that it may yet wake.
    """

    def __init__(
        self,
        output: str,
        options: Mapping[str, Any],
        run: str,
        seconds: float = 60,
        say: Callable[[str], None] = lambda _: None,
        on_loss: Callable[[], None] = lambda: None,
        at: str = f"/{FOLDER}",
    ) -> None:
        self._files = Files(output, options, at)
        self._output, self._run, self._say, self._on_loss = output, run, say, on_loss
        self._place = f"{output}{at}"
        self._limit = seconds
        self._looked: Standing | None = None
        self._given_up: Standing | None = None  # watched for its limit, in vain
        self._found = Standing(0)
        self._number = 0
        self._me: Holder | None = None
        self._lost: LeaseLostError | None = None
        self._last_beat = 0.0
        self._beating = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="lease", daemon=True)
        self.contended = self.unsure = False

    # --- before ---

    def look(self) -> None:
        """Return if the lease can be had; may watch another's for as long as its limit.

        Raises:
            LeaseHeldError: a run that lives has it.
            StoreError: the output cannot be looked at.
        """
        watched: Standing | None = None
        while True:
            now = self._read()
            if now.free or now == self._given_up:
                break
            holder = now.holder
            lives = holder.lives() if holder else None
            if lives is None and watched is not None and watched.number == now.number and watched.text != now.text:
                lives = True  # it has changed while we watched
            if lives and holder:
                event("lease_held", logging.WARNING, run=self._run, holder=holder.run, host=holder.host, pid=holder.pid)
                raise LeaseHeldError(f"{self._output}: held by {holder}. Nothing was done: run again when it has ended")
            if lives is False:
                break
            watched = now
            if self._is_silent(now):
                self._given_up = now
        self._looked = self._looked or now
        self._found = now

    def _read(self) -> Standing:
        with blamed(f"{self._output}: cannot be looked at"):
            return self._files.newest()

    def _is_silent(self, held: Standing) -> bool:
        """Watch a lease until it changes (False) or its limit has passed."""
        holder = held.holder
        limit = holder.limit if holder else self._limit
        who = str(holder) if holder else "a run that has just begun, or broke off while it did"
        self._say(f"the output is held by {who}. Whether it lives shows within {limit:g} s: watching")
        event("lease_watched", run=self._run, holder=holder.run if holder else None, seconds=limit)
        end = time.monotonic() + limit
        while time.monotonic() < end:
            time.sleep(min(1.0, limit / 20))
            if self._read() != held:
                return False
        return True

    # --- held ---

    def __enter__(self) -> Self:
        """Take the lease.

        Raises:
            LeaseHeldError: a run that lives has it.
            StoreError: the output cannot be looked at, or written.
        """
        self.look()
        while not self._take(self._found.number + 1):
            self.look()
        self.contended = self._looked is not None and self._looked.number != self._found.number
        self.unsure = not self._found.free and self._found == self._given_up
        if before := self._found.holder if not self._found.free else None:
            self._say(f"taken over from {before}, which is {'silent' if self.unsure else 'dead'}")
        event("lease_taken", run=self._run, number=self._number, before=before.run if before else None)
        self._thread.start()
        return self

    def _take(self, number: int) -> bool:
        me = Holder.here(self._run, self._limit)
        with blamed(f"{self._place}: cannot be written"):
            created = self._files.create(number, me.model_dump_json().encode(), me.token)
        if not created:
            return False
        if self._read().number != number:  # who is slow may find a number free that was used and cleared away
            self._files.remove(number)
            return False
        self._me, self._number, self._last_beat = me, number, time.monotonic()
        self._files.clear_before(number)
        return True

    def check(self) -> None:
        """Make sure, before something that counts, that the lease is still held.

        Raises:
            LeaseLostError: another run has it.
            StoreError: this run has had no beat for its limit, and the store does not answer, or takes none.
        """
        if not self._lost and time.monotonic() - self._last_beat >= self._limit:  # it was stopped, or cut off
            with blamed(f"{self._place}: cannot be written"):
                self._beat()
        if self._lost:
            raise self._lost

    def cause(self, error: BaseException) -> BaseException:
        """What ended the run: the loss of the lease, where it was interrupted to tell it so; else the error itself."""
        return self._lost if self._lost and isinstance(error, KeyboardInterrupt) else error

    def _beat_on(self) -> None:
        while not self._lost and not self._ended.wait(self._limit / BEATS):
            try:
                self._beat()
            except Exception as error:  # noqa: BLE001 - every store raises its own; the next beat may pass
                event("lease_beat_failed", logging.WARNING, run=self._run, error=one_line(error))
        if self._lost and not self._ended.is_set():
            self._on_loss()

    def _beat(self) -> None:
        with self._beating:
            now = self._files.newest()
            holder = now.holder
            if self._me is None or self._lost:
                return
            if now.number != self._number or holder is None or holder.token != self._me.token:
                self._lose(holder)
                return
            self._me = self._me.once_more()
            self._files.write(self._number, self._me.model_dump_json().encode())
            self._last_beat = time.monotonic()

    def _lose(self, holder: Holder | None) -> None:
        silent = time.monotonic() - self._last_beat
        who = (
            f"taken over by {holder}" if holder else f"no longer leased to this run: {self._place} was changed by hand"
        )
        self._lost = LeaseLostError(
            f"{self._output}: {who}. This run gave no sign of life for {silent:,.0f} s (was it stopped, or cut off "
            "from the store?) and stops; what it committed stays, nothing is lost"
        )
        event("lease_lost", logging.ERROR, run=self._run, holder=holder.run if holder else None, seconds=silent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lease back.

        Raises:
            LeaseLostError: in place of the interrupt by which the run was told of it.
        """
        self._ended.set()
        self._thread.join()
        if self._lost:
            if error and (cause := self.cause(error)) is not error:
                raise cause from None
            return
        try:
            self._give_back()
        except Exception as trouble:  # noqa: BLE001 - the run is over; the next one finds its process gone, or waits
            event("lease_not_given_back", logging.WARNING, run=self._run, error=one_line(trouble))

    def _give_back(self) -> None:
        holder = self._files.newest().holder
        if self._me is not None and holder is not None and holder.token == self._me.token:
            last = self._me.once_more()
            last = last.model_copy(update={"ended": last.seen})
            self._files.write(self._number, last.model_dump_json().encode())

    def forget(self) -> None:
        """Remove the files of a lease that no one holds; what cannot be removed does no harm.

        Only where whoever comes next sees by itself that all is done: one who looked before may take the next number,
        while another begins with the first.
        """
        try:
            now = self._files.newest()
            if now.number and (now.free or (now.holder and now.holder.lives() is False)):
                self._files.remove_all_up_to(now.number)
        except Exception as trouble:  # noqa: BLE001 - every store raises its own
            event("lease_not_removed", logging.WARNING, run=self._run, error=one_line(trouble))
