"""A real web server on the loopback address, for tests that download."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
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
    """

    body: bytes
    content_type: str
    status: int = 200
    sent: int | None = None
    delay: float = 0.0


class WebServer:
    """Serves ``pages`` by path on 127.0.0.1, a port the system chose, one thread a connection; else 404.

    A context manager: on leaving, the port is closed and every thread has ended.
    """

    def __init__(self, pages: Mapping[str, Page]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = pages.get(urlsplit(self.path).path, Page(b"not here", "text/plain", status=404))
                time.sleep(page.delay)
                self.send_response(page.status)
                self.send_header("Content-Type", page.content_type)
                self.send_header("Content-Length", str(len(page.body)))
                self.end_headers()
                self.wfile.write(page.body[: page.sent])

            def log_message(self, format: str, *args: object) -> None:
                """Silent: pytest shows what fails."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False  # server_close() then joins the connections' threads
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        """``http://127.0.0.1:PORT``, without a slash at the end."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> WebServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
