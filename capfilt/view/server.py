"""The page's server: on the loopback address, for whoever has the token it prints, and for no other website.

    GET  /              the page; it holds no data
    GET  /api/state     what is looked at, how far the index is, the marks' count
    GET  /api/facets    rows by status and reason
    GET  /api/rows      a page of a search (capfilt.view.search.Search, as the query string)
    GET  /api/count     how many rows it finds
    GET  /api/image     ?id=: bytes of the row's image
    POST /api/marks     a mark (capfilt.view.explorer.Mark)

A website that a browser shows can send requests here. It cannot read answers of, or send marks to, what it has no token
for; a name of its own that it lets point here (DNS rebinding) is none of ours. What a request does ends when whoever
asked is gone.
"""

from __future__ import annotations

import json
import re
import secrets
import socket
from collections.abc import Callable
from contextlib import closing
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import duckdb
import uvicorn
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from capfilt.errors import CapfiltError
from capfilt.redaction import redacted
from capfilt.stores import one_line
from capfilt.view.explorer import Explorer, Mark
from capfilt.view.search import Search

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

ADDRESS = "127.0.0.1"

_HOSTS = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d{1,5})?", re.IGNORECASE)
_LARGEST = 16 * 2**10
"""Bytes of a request's body."""

_SECONDS = 60.0
"""After which a search is given up."""

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


class Guard:
    """Lets in what was sent to this machine by name, by our page or no page, with the token where there are data."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                set_already = {name for name, _ in message["headers"]}
                own = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in own if pair[0] not in set_already)]
            await send(message)

        refusal = self._refusal(Headers(scope=scope), scope["path"])
        await (refusal or self._app)(scope, receive, with_headers)

    def _refusal(self, headers: Headers, path: str) -> Response | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not _HOSTS.fullmatch(host) or len(headers.getlist("host")) != 1:
            return _error(421, "this server answers to 127.0.0.1 and localhost only")
        if origin is not None and origin.lower() != f"http://{host}".lower():
            return _error(403, "asked for by another website")
        if path == "/":
            return None
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return _error(403, "asked for by another website")
        if not secrets.compare_digest(headers.get("authorization", "").encode("latin-1"), self._token):
            return _error(401, "no token, or another one: open the address that `capfilt view` printed")
        return None


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": redacted(message)}, status)


def make_app(explorer: Explorer, token: str) -> ASGIApp:
    """The server's application."""
    searches, images = anyio.CapacityLimiter(4), anyio.CapacityLimiter(4)

    async def page(_request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        text = files("capfilt.view").joinpath("page.html").read_text("utf-8").replace("{{nonce}}", nonce)
        headers = {"Content-Security-Policy": _POLICY.format(nonce=nonce)}
        return Response(text, media_type="text/html; charset=utf-8", headers=headers)

    async def state(_request: Request) -> Response:
        return JSONResponse(explorer.state())

    async def facets(request: Request) -> Response:
        return JSONResponse(await _done(request, explorer, searches, explorer.facets))

    async def rows(request: Request) -> Response:
        search = _valid(Search, dict(request.query_params))
        return JSONResponse(await _done(request, explorer, searches, partial(explorer.page, search=search)))

    async def count(request: Request) -> Response:
        search = _valid(Search, dict(request.query_params))
        found = await _done(request, explorer, searches, partial(explorer.count, search=search))
        return JSONResponse({"count": found})

    async def image(request: Request) -> Response:
        asked = request.query_params.get("id", "")
        if not re.fullmatch(r"\d{1,18}", asked):
            raise HTTPException(422, "id: the number of a row")
        data, kind = await _done(request, explorer, images, partial(explorer.picture, number=int(asked)))
        return Response(data, media_type=kind)

    async def marks(request: Request) -> Response:
        mark = _valid(Mark, await _body(request))
        return JSONResponse(await _done(request, explorer, images, partial(explorer.mark, mark=mark)))

    routes = [
        Route("/", page),
        *(Route(f"/api/{handler.__name__}", handler) for handler in (state, facets, rows, count, image)),
        Route("/api/marks", marks, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        HTTPException: lambda _, error: _error(error.status_code, error.detail),
        CapfiltError: lambda _, error: _error(409, str(error)),
        duckdb.InterruptException: lambda *_: _error(503, f"no answer within {_SECONDS:.0f} s; look for less at once"),
        duckdb.Error: lambda _, error: _error(500, one_line(error)),
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers), token)


def _valid(model: type[M], values: Any) -> M:
    """Raises HTTPException naming the field."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise HTTPException(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


async def _body(request: Request) -> Any:
    """A request's JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _LARGEST:
            raise HTTPException(413, f"more than {_LARGEST:,} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "not JSON") from None


async def _done(
    request: Request,
    explorer: Explorer,
    limiter: anyio.CapacityLimiter,
    work: Callable[[duckdb.DuckDBPyConnection], T],
) -> T:
    """What `work` returns, done in a thread on a cursor of its own; interrupted if the asker leaves, or late."""
    found: list[T] = []
    failed: list[Exception] = []
    with closing(explorer.index.cursor()) as cursor:
        ended = anyio.Event()

        async def watch() -> None:
            with anyio.move_on_after(_SECONDS):
                while not await request.is_disconnected():
                    with anyio.move_on_after(0.1):
                        await ended.wait()
                        return
            while not ended.is_set():
                cursor.interrupt()
                await anyio.sleep(0.05)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            try:
                found.append(await anyio.to_thread.run_sync(work, cursor, limiter=limiter))
            except Exception as error:  # noqa: BLE001  raised below, out of the group that would wrap it
                failed.append(error)
            ended.set()
    if failed:
        raise failed[0]
    return found[0]


class Server:
    """Serves an explorer.

    Args:
        port: any that is free if 0.

    Attributes:
        url: of the page, with the token; after the `#`, which browsers send to no server.

    Raises:
        CapfiltError: the port is taken.
    """

    def __init__(self, explorer: Explorer, port: int = 0) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((ADDRESS, port))
            self._socket.listen()  # whoever comes from now on is answered once :meth:`run` runs
        except OSError as error:
            self._socket.close()
            raise CapfiltError(f"port {port}: {error.strerror}; give another --port, or none") from error
        self.port, self.token = self._socket.getsockname()[1], secrets.token_urlsafe(24)
        self.url = f"http://{ADDRESS}:{self.port}/#token={self.token}"
        config = uvicorn.Config(
            make_app(explorer, self.token),
            http="h11",
            ws="none",
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=2,
            limit_concurrency=200,
        )
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Serve until interrupted, or :meth:`stop` is called."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Have :meth:`run` return."""
        self._server.should_exit = True
