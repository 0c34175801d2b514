"""A real S3-speaking server (moto) on the loopback address, behind a proxy that injects faults, for tests.

    client -> proxy (counts, faults) -> moto

Both run in one process of their own, which ends when this one does: deltalake keeps Python's lock while it waits for an
answer, so no thread of the tests' own process could give one. The proxy answers conditional writes one by one, and
refuses a client whose clock is a quarter of an hour off, as S3 does and moto does not.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SO_LINGER, SOL_SOCKET
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import unquote

import fsspec


class Fault(StrEnum):
    """What goes wrong with one request."""

    ERROR_500 = "500 InternalError, nothing done"
    SLOW_DOWN = "503 SlowDown, nothing done"
    UPLOAD_RESET = "connection reset in the middle of the upload"
    DOWNLOAD_RESET = "connection reset in the middle of the answer"
    TRUNCATED = "connection closed in the middle of the answer"
    SLOW = "the answer comes in drops"
    LOST = "done, and the connection reset before the answer"
    LATE_500 = "done, and answered with 500 InternalError"
    DENIED = "403 AccessDenied, nothing done"
    SILENT = "done, and never answered: whoever asked can be killed at that very point"

    def befalls(self, request: Request) -> bool:
        """Whether a request can have it."""
        if self in (Fault.ERROR_500, Fault.SLOW_DOWN, Fault.DENIED):
            return True
        if self is Fault.UPLOAD_RESET:
            return request.size > 0
        reads = self in (Fault.DOWNLOAD_RESET, Fault.TRUNCATED, Fault.SLOW)
        return request.method == "GET" if reads else request.method not in ("GET", "HEAD")


PASSING = tuple(fault for fault in Fault if fault not in (Fault.DENIED, Fault.SILENT))
"""Those after which the same request, sent again, is as likely to do as any."""


@dataclass(frozen=True)
class Request:
    """A request as the proxy sees it; `path` is unquoted and has the query, `conditional` means If-None-Match: *."""

    method: str
    path: str
    size: int
    conditional: bool

    def __str__(self) -> str:
        return f"{self.method}{' if absent' * self.conditional} {self.path}"


class Faults(Protocol):
    """Draws the fault of each request, in turn; it is sent to the server's process."""

    def draw(self, request: Request) -> Fault | None: ...


class Seeded:
    """Faults at random: each request has one with probability `rate`, of the `kinds` that can befall it."""

    def __init__(self, seed: int, rate: float, kinds: Sequence[Fault] = PASSING) -> None:
        self._rng, self._rate, self._kinds = random.Random(seed), rate, kinds

    def draw(self, request: Request) -> Fault | None:
        kinds = [kind for kind in self._kinds if kind.befalls(request)]
        return self._rng.choice(kinds) if kinds and self._rng.random() < self._rate else None


class Struck:
    """One fault for the requests in whose `METHOD path` a pattern is found: `times` of them, after the first `skip`."""

    def __init__(self, fault: Fault, pattern: str, times: float = float("inf"), skip: int = 0) -> None:
        self._fault, self._pattern, self._times, self._skip = fault, pattern, times, skip

    def draw(self, request: Request) -> Fault | None:
        if self._times <= 0 or not self._fault.befalls(request) or not re.search(self._pattern, str(request)):
            return None
        if self._skip > 0:
            self._skip -= 1
            return None
        self._times -= 1
        return self._fault


class Several:
    """The first fault that any of several drawers has for a request."""

    def __init__(self, *drawers: Faults) -> None:
        self._drawers = drawers

    def draw(self, request: Request) -> Fault | None:
        return next(filter(None, (drawer.draw(request) for drawer in self._drawers)), None)


# --- the server's process ---


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Proxy)
        self.upstream = upstream
        self.lock, self.one_by_one = threading.Lock(), threading.Lock()
        self.reset()

    def reset(self) -> None:
        """A smooth store that was asked nothing yet."""
        with self.lock:
            self.faults: Faults | None = None
            self.conditional = True
            self.requests: Counter[str] = Counter()
            self.keys: Counter[str] = Counter()
            self.injected: list[tuple[Fault, str]] = []
            self.silent: list[str] = []

    def befall(self, request: Request, signature: str) -> Fault | None:
        """Count a request, and draw its fault."""
        key = re.search(r"Credential=([^/]*)/", signature)
        with self.lock:
            self.requests[request.method] += 1
            self.keys[key[1] if key else "unsigned"] += 1
            fault = self.faults.draw(request) if self.faults else None
            if fault:
                self.injected.append((fault, str(request)))
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news here."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Proxy(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Silent: pytest shows what fails."""

    def _handle(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        conditional = self.headers.get("If-None-Match") == "*"
        request = Request(self.command, unquote(self.path), size, conditional)
        fault = self.server.befall(request, self.headers.get("Authorization", ""))
        body = self.rfile.read(size // 2 if fault is Fault.UPLOAD_RESET else size)
        if fault is Fault.UPLOAD_RESET:
            self._reset()
        elif fault is Fault.ERROR_500:
            self._refuse(500, "InternalError", "We encountered an internal error. Please try again.")
        elif fault is Fault.SLOW_DOWN:
            self._refuse(503, "SlowDown", "Please reduce your request rate.")
        elif fault is Fault.DENIED:
            self._refuse(403, "AccessDenied", "Access Denied")
        elif self._is_skewed():
            message = "The difference between the request time and the current time is too large."
            self._refuse(403, "RequestTimeTooSkewed", message)
        else:
            with self.server.one_by_one if conditional else contextlib.nullcontext():
                status, headers, answer = self._ask(body)
            if fault is Fault.LOST:
                self._reset()
            elif fault is Fault.SILENT:
                self.close_connection = True
                self.server.silent.append(str(request))
                self.connection.recv(1)  # till whoever asked hangs up
            elif fault is Fault.LATE_500:
                self._refuse(500, "InternalError", "We encountered an internal error. Please try again.")
            else:
                self._answer(status, headers, answer, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle  # noqa: N815

    def _is_skewed(self) -> bool:
        stamp = self.headers.get("X-Amz-Date")
        if stamp is None:  # not signed
            return False
        sent = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        return abs(datetime.now(UTC) - sent) > timedelta(minutes=15)

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=30)
        ignored = {"expect", "connection", "if-none-match" if not self.server.conditional else ""}
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ignored:
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            upstream.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, fault: Fault | None) -> None:
        length = headers.get("content-length", "0") if self.command == "HEAD" else str(len(body))
        self.send_response_only(status)
        for name, value in headers.items():
            if name not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("content-length", length)
        self.end_headers()
        if fault in (Fault.DOWNLOAD_RESET, Fault.TRUNCATED):
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            if fault is Fault.DOWNLOAD_RESET:
                self._reset()
        elif fault is Fault.SLOW:
            step = max(1, len(body) // 10)
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                time.sleep(0.03)
        elif self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
        self._answer(status, {"content-type": "application/xml"}, text.encode(), None)

    def _reset(self) -> None:
        """End the connection with RST, whatever is still to be read or sent."""
        self.close_connection = True
        self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())


def serve() -> None:
    """Serve until standard input ends. Each pickled message, a name and a value or none, is answered with a value."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: object) -> None: ...

    app = DomainDispatcherApplication(create_backend_app)
    moto = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    proxy = _Server(moto.server_port)
    for server in (moto, proxy):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    answer: Any = proxy.server_port
    while True:
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        try:
            name, *value = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if name == "reset":
            answer = proxy.reset()
        else:
            with proxy.lock:
                answer = setattr(proxy, name, *value) if value else getattr(proxy, name)


# --- the tests' side ---


class S3:
    """The server and its proxy, as a context manager: on leaving, their process has ended.

    Attributes:
        url: the endpoint.
    """

    def __enter__(self) -> S3:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import s3; s3.serve()"],
            cwd=os.path.dirname(__file__),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.url = f"http://127.0.0.1:{self._answer()}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=10)  # closes its input, which ends it

    def _answer(self, *message: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if message:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
        return pickle.load(self._process.stdout)

    @property
    def options(self) -> dict[str, Any]:
        """fsspec's storage options; the credentials are in the environment (conftest.py)."""
        return {"endpoint_url": self.url}

    @property
    def requests(self) -> Counter[str]:
        """Requests by method since the last reset."""
        answer: Counter[str] = self._answer("requests")
        return answer

    @property
    def keys(self) -> Counter[str]:
        """Requests by the access key that signed them, since the last reset."""
        answer: Counter[str] = self._answer("keys")
        return answer

    @property
    def injected(self) -> list[tuple[Fault, str]]:
        """Faults since the last reset, each with its request."""
        answer: list[tuple[Fault, str]] = self._answer("injected")
        return answer

    @property
    def silent(self) -> list[str]:
        """Requests since the last reset that were done, and that no one answers."""
        answer: list[str] = self._answer("silent")
        return answer

    def files(self) -> Any:
        """The store through s3fs, for tests to put objects there and look at them."""
        return fsspec.filesystem("s3", **self.options, use_listings_cache=False)

    def reset(self) -> None:
        """Make the store a smooth one that was asked nothing yet."""
        self._answer("reset")

    def ignore_conditions(self) -> None:
        """Make it a store that does not know If-None-Match, until the reset."""
        self._answer("conditional", False)

    @contextlib.contextmanager
    def faulty(self, faults: Faults) -> Iterator[None]:
        """Make its requests fail meanwhile."""
        self._answer("faults", faults)
        try:
            yield
        finally:
            self._answer("faults", None)
