"""The worker as Ray Data calls it, and the ledger of attempts as a Ray actor beside it."""

from __future__ import annotations

import os
import pickle
import socket
import threading
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import ray
import ray.exceptions

from capfilt.errors import DatasetError
from capfilt.fragments import Fragment
from capfilt.pipelines.attempts import Attempts
from capfilt.pipelines.job import Failure, Job, LoadModels
from capfilt.pipelines.metrics import count_batches
from capfilt.pipelines.watchdog import Watchdog
from capfilt.pipelines.worker import DeviceLostError, Worker
from capfilt.receipts import Receipt

_LOOK_SECONDS = 0.2


class RemoteAttempts(Attempts):
    """The ledger, kept in a Ray actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def load_begins(self) -> int:
        """See Attempts."""
        answer: int = ray.get(self._actor.load_begins.remote())
        return answer

    def load_ended(self) -> None:
        """See Attempts."""
        ray.get(self._actor.load_ended.remote())

    def state(self, name: str) -> tuple[int, bytes | None]:
        """See Attempts."""
        answer: tuple[int, bytes | None] = ray.get(self._actor.state.remote(name))
        return answer

    def begin(self, name: str) -> None:
        """See Attempts."""
        ray.get(self._actor.begin.remote(name))

    def end(self, name: str, result: bytes, whole: str) -> None:
        """See Attempts."""
        ray.get(self._actor.end.remote(name, result, whole))

    def lose(self, whole: str, rows: int) -> None:
        """See Attempts."""
        ray.get(self._actor.lose.remote(whole, rows))

    def lost(self, whole: str) -> int:
        """See Attempts."""
        answer: int = ray.get(self._actor.lost.remote(whole))
        return answer


def start_attempts() -> Any:
    """Start a ledger actor; it takes no CPU and outlives the workers. Its handle."""
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()


class Loading:
    """Says that the models are being loaded, and when a first worker has done so.

    Its thread has ended before the connection to Ray does: one that is left behind ends the process, in silence.

    Args:
        attempts: the ledger's actor.
        waits: takes what is waited for.
    """

    def __init__(self, attempts: Any, waits: Callable[[str], None]) -> None:
        self._attempts, self._waits = attempts, waits
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="loading", daemon=True)
        waits("loading the models")
        self._thread.start()

    def end(self) -> None:
        """There is nothing to wait for any more."""
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        answer = None
        while not self._ended.wait(_LOOK_SECONDS):
            answer = answer or self._attempts.loaded.remote()
            try:
                if ray.get(answer, timeout=_LOOK_SECONDS):
                    self._waits("the models are loaded, the first fragment is at work")
                    return
                answer = None
            except ray.exceptions.GetTimeoutError:
                pass
            except ray.exceptions.RayError:  # the run will hear of it
                return


class RayWorker:
    """One fragment in, its receipts out: a block of one row each. What a worker raises comes out as a row, too."""

    def __init__(self, job: Job, load: LoadModels, attempts: Any) -> None:
        watchdog = Watchdog(job.spec.images.max_seconds)
        self._worker = Worker(job, load, RemoteAttempts(attempts), count_batches(job.run), watchdog.watching)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Process the batch's one fragment."""
        (pickled,) = batch.column("fragment").to_pylist()
        fragment: Fragment = pickle.loads(pickled)
        try:
            self._check_disk()
            result: list[Receipt] | Failure = self._worker.process(fragment)
        except (DeviceLostError, MemoryError):
            # Nothing works in this process any more, or something in the fragment claims more memory than there is. It
            # dies as by a signal: Ray starts another, and the ledger of attempts finds the row, if it is a row's doing.
            os._exit(1)
        except Exception as error:  # noqa: BLE001 - the driver raises it
            result = Failure.of(error, fragment.name)
        return pa.table({"result": pa.array([pickle.dumps(result)], pa.binary())})

    def _check_disk(self) -> None:
        """Refuse to write where the driver does not read: it would commit files that no reader finds."""
        output, run = self._worker.job.spec.output, self._worker.job.run
        if "://" not in output and not os.path.isdir(f"{output}/_runs/{run}"):  # the driver made it before any worker
            raise DatasetError(
                f"{output}: node {socket.gethostname()} does not see what the driver wrote there; an output must be on "
                "a disk that all nodes share, or in an object store"
            )
