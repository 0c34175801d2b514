"""A real server on the loopback address that speaks OpenAI's chat completions, and fails as it is told to."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        number: of it, from 0.
        image: the JPEG that the data URL held.
    """

    number: int
    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]

    @property
    def image(self) -> bytes:
        (picture,) = [part for part in self.body["messages"][0]["content"] if part["type"] == "image_url"]
        kind, _, data = picture["image_url"]["url"].partition(",")
        assert kind == "data:image/jpeg;base64"
        return base64.b64decode(data, validate=True)

    @property
    def name(self) -> str:
        return hashlib.sha256(self.image).hexdigest()[:6]


@dataclass(frozen=True)
class Reply:
    """What it answers.

    Attributes:
        cut: closes the connection after half of the body.
        delay: seconds before the answer.
    """

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    delay: float = 0.0


def completion(text: Any, finish: str = "stop", **message: Any) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return Reply(json.dumps({"object": "chat.completion", "choices": [choice]}).encode())


def trouble(status: int, text: str = "not now", **headers: str) -> Reply:
    return Reply(json.dumps({"error": {"message": text}}).encode(), status, headers)


def caption(asked: Asked) -> Reply:
    """A text of its own for every image and seed."""
    return completion(f"picture {asked.name} of seed {asked.body['seed']}")


class ChatServer:
    """A context manager: on leaving, the port is closed and every thread has ended.

    Attributes:
        reply: answers a request.
        asked: the requests so far.
        most: requests that it was answering at a time, at the most.
    """

    def __init__(self, reply: Callable[[Asked], Reply] = caption, port: int = 0) -> None:
        self.reply, self.asked, self.most, self._now, lock = reply, list[Asked](), 0, 0, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    asked = Asked(len(server.asked), self.path, dict(self.headers), body)
                    server.asked.append(asked)
                    server._now += 1
                    server.most = max(server.most, server._now)
                try:
                    reply = server.reply(asked)
                    time.sleep(reply.delay)
                    self._send(reply)
                finally:
                    with lock:
                        server._now -= 1

            def _send(self, reply: Reply) -> None:
                try:
                    self.send_response(reply.status)
                    for name, value in reply.headers.items():
                        self.send_header(name.replace("_", "-"), value)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(reply.body)))
                    self.end_headers()
                    self.wfile.write(reply.body[: len(reply.body) // 2] if reply.cut else reply.body)
                    self.close_connection = self.close_connection or reply.cut
                except ConnectionError:  # who asked has given up
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                """Silent: pytest shows what fails."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True  # a kept connection waits for its next request
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ChatServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
