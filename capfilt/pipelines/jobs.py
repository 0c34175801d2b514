"""A cluster's job server, as Ray's Job Submission client speaks to it; what goes wrong says what to do next."""

from __future__ import annotations

import asyncio
import datetime
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from capfilt.errors import CapfiltError, RunInterruptedError, SpecError
from capfilt.submit import ENTRYPOINT

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

OLDEST_RAY = (2, 60)
"""As pyproject.toml has it."""

LOST_SECONDS = 60.0
"""Without an answer of a server that has answered before, after which it counts as gone."""

_SILENT_SECONDS = 300.0
"""After which a log is asked for again: a machine that lost its power never says that a connection has ended."""

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class JobState:
    """What the job server knows of a job.

    Attributes:
        status: Ray's: PENDING, RUNNING, STOPPED, SUCCEEDED, FAILED.
        exit_code: of the run, once it has ended: its own where Ray knows it, as a shell gives it (137 is SIGKILL).
        message: Ray's, of a job that failed.
    """

    id: str
    status: str
    exit_code: int | None
    message: str
    entrypoint: str
    started: datetime.datetime | None
    ended: datetime.datetime | None


class JobServer:
    """The job server at an address.

    Args:
        address: of the head's dashboard: `http://head:8265`.

    Raises:
        CapfiltError: no job server answers there, or it asks for a token that we lack.
        SpecError: that is no such address.
    """

    def __init__(self, address: str) -> None:
        self.address = _url(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if "RAY_AUTH_MODE" not in os.environ and _has_token():
            os.environ["RAY_AUTH_MODE"] = "token"  # as `ray start` does; the client by itself sends none
        from ray.job_submission import JobSubmissionClient

        for handler in logging.getLogger("ray").handlers:  # its modules set their own levels
            handler.setLevel(logging.ERROR)
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address  # else RAY_ADDRESS would count for more than the argument
        with self._errors():
            self._client = JobSubmissionClient(self.address)
        self._check_version()

    def _check_version(self) -> None:
        running = self._client._server_ray_version or "0"  # asked for by the constructor; there is no other way to it
        numbers = tuple(int(part) for part in running.split(".")[:2] if part.isdigit())
        if not OLDEST_RAY <= numbers < (OLDEST_RAY[0] + 1,):
            raise CapfiltError(
                f"the cluster at {self.address} runs Ray {running}; capfilt needs {OLDEST_RAY[0]}.{OLDEST_RAY[1]} or a "
                f"later {OLDEST_RAY[0]}.x: give its head and its nodes an image with that"
            )

    def submit(
        self,
        runtime_env: Mapping[str, Any],
        metadata: Mapping[str, str],
        entrypoint: str = ENTRYPOINT,
        job: str | None = None,
    ) -> str:
        """Send a job. Its id.

        Args:
            job: the id, which no job there may have; Ray's choice if not given.

        Raises:
            CapfiltError: the server does not take it.
        """
        with self._errors():
            sent: str = self._client.submit_job(
                entrypoint=entrypoint, runtime_env=dict(runtime_env), metadata=dict(metadata), submission_id=job
            )
        return sent

    def attempts(self, name: str) -> list[JobState]:
        """The jobs `NAME`, `NAME-2`, `NAME-3`, ... that are there: each was sent because the one before had failed."""
        with self._errors():
            there = {job.submission_id: job for job in self._client.list_jobs()}
        ids = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        return [_state(there[job]) for job in itertools.takewhile(there.__contains__, ids)]

    def state(self, job: str) -> JobState:
        """What is known of a job.

        Raises:
            CapfiltError: there is none of this id, or the server does not answer.
        """
        with self._errors(job):
            return _state(self._client.get_job_info(job))

    def logs(self, job: str) -> str:
        """All that a job has printed so far."""
        with self._errors(job):
            text: str = self._client.get_job_logs(job)
        return text

    def stop(self, job: str) -> None:
        """Ask a job to stop: its run gets SIGTERM, commits what is finished and ends."""
        with self._errors(job):
            self._client.stop_job(job)

    def follow(self, job: str, write: Callable[[str], object]) -> JobState:
        """Pass on what a job prints, from its beginning, until it has ended.

        Raises:
            CapfiltError: there is no job of this id, or the server has gone.
        """
        import aiohttp

        self.state(job)  # raises at once; from here on a failure may be the network's, and is waited out

        shown = 0

        async def tail() -> None:
            nonlocal shown
            skip = shown  # a new connection begins anew
            async with aclosing(self._client.tail_job_logs(job)) as chunks:
                while chunk := await asyncio.wait_for(anext(chunks, None), _SILENT_SECONDS):
                    if new := chunk[skip:]:
                        write(new)
                        shown += len(new)
                    skip = max(0, skip - len(chunk))

        last_answer = time.monotonic()
        while True:
            lost: Exception | None = None
            try:
                asyncio.run(tail())
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                lost = error
            try:
                if (state := self.state(job)).exit_code is not None:
                    if lost:
                        write(self.logs(job)[shown:])
                    return state
                last_answer = time.monotonic()
            except CapfiltError as error:
                if time.monotonic() - last_answer > LOST_SECONDS:
                    raise CapfiltError(
                        f"{error}\nThe job {job} may have ended with the head. Once the cluster is back, ask "
                        f"`capfilt job status {job}`; if it is not known, submit it again: it resumes"
                    ) from error
            time.sleep(_POLL_SECONDS)

    def wait(self, job: str) -> JobState:
        """Wait for a job's end."""
        while (state := self.state(job)).exit_code is None:
            time.sleep(_POLL_SECONDS)
        return state

    @contextmanager
    def _errors(self, job: str = "") -> Iterator[None]:
        """Say what a failed request means, and the next thing to do. Nothing of a request's body is in it."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise CapfiltError(
                f"the job server at {self.address} wants a token, and {_token_we_have()}: set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's (`ray get-auth-token` on its head shows it)"
            ) from error
        except (ConnectionError, requests.ConnectionError, requests.Timeout) as error:
            raise CapfiltError(
                f"no job server answers at {self.address}. It is the head's dashboard, port 8265 as a rule: is the "
                "head up, with ray[default] installed, and reachable from here (`ray start --dashboard-host 0.0.0.0`, "
                "or `kubectl port-forward service/NAME-head-svc 8265`)?"
            ) from error
        except RuntimeError as error:
            text = str(error)
            if job and "does not exist" in text:
                raise CapfiltError(
                    f"no job {job} at {self.address}; `ray job list --address {self.address}` has them. A head that "
                    "was started anew has forgotten those before: submit again, the run resumes"
                ) from error
            if "Version check returned 404" in text:
                raise self._stranger(error) from error
            raise CapfiltError(f"the job server at {self.address} refuses: {_gist(text)}") from error
        except (requests.RequestException, KeyError, TypeError) as error:
            raise self._stranger(error) from error

    def _stranger(self, error: Exception) -> CapfiltError:
        return CapfiltError(
            f"what answers at {self.address} is not a Ray job server ({type(error).__name__}); give the address of the "
            "head's dashboard, such as http://head:8265"
        )


def _url(address: str) -> str:
    url = (address if "://" in address else f"http://{address}").rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SpecError(f"--address {address}: give that of the head's job server, such as http://head:8265")
    return url


def _has_token() -> bool:
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(token) or (Path.home() / ".ray" / "auth_token").is_file()


def _token_we_have() -> str:
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return "none was sent"
    return "ours is not the one" if _has_token() else "there is none here"


def _state(found: JobDetails) -> JobState:
    return JobState(
        id=found.submission_id or found.job_id or "",
        status=str(found.status),
        exit_code=_exit_code(str(found.status), found.driver_exit_code),
        message=found.message or "",
        entrypoint=found.entrypoint,
        started=_time(found.start_time),
        ended=_time(found.end_time),
    )


def _exit_code(status: str, code: int | None) -> int | None:
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":  # Ray does not keep the code of what it stopped
        return RunInterruptedError.exit_code
    if status == "FAILED":
        return 1 if code is None else code if code >= 0 else 128 - code
    return None


def _time(milliseconds: int | None) -> datetime.datetime | None:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC) if milliseconds else None


def _gist(text: str) -> str:
    """The last line of what may hold a whole traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip().strip(".")]
    return lines[-1] if lines else "without a word"
