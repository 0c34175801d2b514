"""A real web server on a loopback address, for tests that download; its answers may be wrong in every way."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Page:
    """What one path answers.

    Attributes:
        sent: bytes of the body that go out before the connection closes, while Content-Length promises all of it;
            None for all.
        delay: seconds before the answer.
        claimed: Content-Length, whatever the body's length; "" for none.
        drip: seconds before each byte of the body.
        raw: bytes that are the whole answer, in place of one by HTTP's rules.
    """

    body: bytes
    content_type: str
    status: int = 200
    sent: int | None = None
    delay: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)
    claimed: str | None = None
    drip: float = 0.0
    raw: bytes | None = None


class WebServer:
    """Serves ``pages`` by path on a loopback address, a port the system chose, one thread a connection; else 404.

    A context manager: on leaving, the port is closed and every thread has ended.

    Args:
        host: 127.0.0.1, or another of 127.0.0.0/8.
        tls: speaks https with it.

    Attributes:
        asked: the paths of all requests, in order.
    """

    def __init__(self, pages: Mapping[str, Page], host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self.asked: list[str] = []
        asked = self.asked
        closing = self._closing = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                asked.append(path)
                page = pages.get(path, Page(b"not here", "text/plain", status=404))
                time.sleep(page.delay)
                if page.raw is not None:
                    self.wfile.write(page.raw)
                    return
                self.send_response(page.status)
                self.send_header("Content-Type", page.content_type)
                if page.claimed != "":
                    self.send_header("Content-Length", page.claimed or str(len(page.body)))
                for name, value in page.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(ConnectionError, ssl.SSLError):  # who has heard enough hangs up
                    self._send(page)

            def _send(self, page: Page) -> None:
                if not page.drip:
                    self.wfile.write(page.body[: page.sent])
                    return
                for byte in page.body:
                    if closing.wait(page.drip):
                        return
                    self.wfile.write(bytes([byte]))

            def log_message(self, format: str, *args: object) -> None:
                """Silent: pytest shows what fails."""

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # 5, and a connection more has to wait a second for its next try

            def handle_error(self, request: object, client_address: object) -> None:
                """Silent: who has heard enough hangs up."""

        self._server = Server((host, 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = False  # server_close() then joins the connections' threads
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._scheme, self._host = "https" if tls else "http", host

    @property
    def url(self) -> str:
        """``http://127.0.0.1:PORT``, without a slash at the end."""
        return f"{self._scheme}://{self._host}:{self._server.server_port}"

    def __enter__(self) -> WebServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
