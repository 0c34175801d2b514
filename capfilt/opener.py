"""An opener for strangers' URLs: urllib's, held to public addresses, http and https, and a limit of time and bytes.

The address that a connection goes to is the one that was checked: a name is resolved once, each of its addresses is
judged, and the socket connects to the number. So neither a redirect nor a name that resolves otherwise the second time
gets past it. Proxies of the environment are not used: what they connect to could not be checked.

img2dataset downloads with `urllib.request.urlopen`; :func:`installed` makes this the opener behind it, in the process
that downloads.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from capfilt.errors import CapfiltError

_HEADERS = 256 * 1024
"""Bytes allowed for status lines and headers, beside the body's."""

_PIECE = 256 * 1024
"""Read at a time: what an answer claims to hold is never allocated before it has come."""


Network = ipaddress.IPv4Network | ipaddress.IPv6Network

EVERYWHERE: tuple[Network, ...] = (ipaddress.IPv4Network("0.0.0.0/0"), ipaddress.IPv6Network("::/0"))


class FetchError(CapfiltError):
    """A URL was refused, or went over its limits. It becomes the row's error_message."""


@dataclass(frozen=True)
class Limits:
    """What one URL may cost, redirects included, and where it may lead.

    Attributes:
        timeout: seconds to connect, and between two parts of an answer.
        total_timeout: seconds in all. (Resolving a name cannot be cut short; the system's resolver has its own limit.)
        max_bytes: of all bodies.
        allowed: networks that may be connected to though they are not public.
    """

    timeout: float
    total_timeout: float
    max_bytes: int
    allowed: tuple[Network, ...] = ()


# --- addresses ---

_NETWORKS_4 = {  # IANA's special-purpose registry, and multicast; the clouds' metadata services are in these, but one
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private",
    "100.64.0.0/10": "shared, of a provider",
    "127.0.0.0/8": "loopback",
    "169.254.0.0/16": "link-local",
    "172.16.0.0/12": "private",
    "192.0.0.0/24": "special-purpose",
    "192.0.2.0/24": "documentation",
    "192.88.99.0/24": "6to4 relay",
    "192.168.0.0/16": "private",
    "198.18.0.0/15": "benchmarking",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved",
    "168.63.129.16/32": "a cloud's metadata service",
}
_NETWORKS_6 = {
    "::1/128": "loopback",
    "::/128": "unspecified",
    "fc00::/7": "private",
    "fe80::/10": "link-local",
    "ff00::/8": "multicast",
    "2001::/23": "special-purpose",
    "2001:db8::/32": "documentation",
    "2002::/16": "6to4",
    "3fff::/20": "documentation",
}
_SPECIAL_4 = [(ipaddress.IPv4Network(text), what) for text, what in _NETWORKS_4.items()]
_SPECIAL_6 = [(ipaddress.IPv6Network(text), what) for text, what in _NETWORKS_6.items()]
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")  # global unicast, the only space that is handed out
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # how a network of IPv6 alone reaches any IPv4 address


def not_public(address: str) -> str | None:
    """What an IP address is, where it is not one of the public internet; None where it is."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
        if inner is None:
            what = next((what for network, what in _SPECIAL_6 if ip in network), None)
            return what or (None if ip in _PUBLIC_6 else "reserved")
        ip = inner
    return next((what for network, what in _SPECIAL_4 if ip in network), None)


def _is_in(address: str, networks: tuple[Network, ...]) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    return any(ip in network for network in networks)


class _Allowance:
    """What one URL may still cost."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.bytes = limits.max_bytes + _HEADERS
        self._end = time.monotonic() + limits.total_timeout

    def seconds(self) -> float:
        """To wait for the next thing to happen."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise FetchError(f"took longer than {self.limits.total_timeout:g} s in all")
        return min(left, self.limits.timeout)

    def take(self, count: int) -> None:
        self.bytes -= count
        if self.bytes < 0:
            self.too_large()

    def too_large(self) -> None:
        raise FetchError(f"more than {self.limits.max_bytes:,} bytes")


def _dial(host: str, port: int, allowance: _Allowance) -> socket.socket:
    """Connect to the first of a host's addresses that may be, and can be, connected to."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    error: Exception = FetchError(f"{host} has no address")
    for family, kind, protocol, _, address in found:
        number = str(address[0])
        if (what := not_public(number)) and not _is_in(number, allowance.limits.allowed):
            error = FetchError(f"{host} is refused: {number} is not a public address ({what})")
            continue
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(allowance.seconds())
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as failed:
            connection.close()
            allowance.seconds()
            error = failed
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise error


# --- http ---


class _Metered(io.RawIOBase):
    """What comes from a socket, each read in the time and the bytes that are left."""

    def __init__(self, connection: socket.socket, allowance: _Allowance) -> None:
        self._connection, self._allowance = connection, allowance
        self._raw = connection.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._connection.settimeout(self._allowance.seconds())
        try:
            count = self._raw.readinto(buffer)
        except TimeoutError:
            self._allowance.seconds()
            raise FetchError(f"nothing came for {self._allowance.limits.timeout:g} s") from None
        self._allowance.take(count or 0)
        return count

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, allowance: _Allowance, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Metered(sock, allowance), 64 * 1024)
        self._allowance = allowance

    def read(self, amt: int | None = None) -> bytes:
        """The whole body, or up to `amt` bytes.

        Raises:
            FetchError: it is larger, or takes longer, than allowed.
            http.client.IncompleteRead: it ends before the length that it claims.
        """
        if amt is not None:
            return super().read(amt)
        if self.length is not None and self.length > self._allowance.bytes:
            self._allowance.too_large()
        parts = []
        while part := super().read(_PIECE):
            parts.append(part)
        body = b"".join(parts)
        if self.length:
            raise http.client.IncompleteRead(body, self.length)
        return body


class _Connection(http.client.HTTPConnection):
    allowance: _Allowance

    def connect(self) -> None:
        self.sock = _dial(self.host, self.port, self.allowance)


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    """Its connect() is _Connection's, then TLS: certificates and host names are verified."""


def _connection(kind: type[_Connection], allowance: _Allowance, host: str, **options: Any) -> _Connection:
    made = kind(host, **options)
    made.allowance = allowance
    made.response_class = partial(_Response, allowance=allowance)  # type: ignore[assignment]
    return made


class _Web(urllib.request.AbstractHTTPHandler):
    """http and https."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__()
        self._context = context

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._ask(_Connection, request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._ask(_SecureConnection, request, context=self._context)

    def _ask(self, kind: type[_Connection], request: Any, **options: Any) -> http.client.HTTPResponse:
        answer: http.client.HTTPResponse = self.do_open(
            partial(_connection, kind, request.allowance),
            request,
            **options,
        )
        return answer

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


class _Redirects(urllib.request.HTTPRedirectHandler):
    """urllib's, within the allowance of the URL that began it; to http and https alone, at most ten, in no circle."""

    def redirect_request(self, req: Any, *args: Any, **options: Any) -> urllib.request.Request | None:
        new = super().redirect_request(req, *args, **options)
        if new is not None:
            vars(new)["allowance"] = req.allowance
        return new

    def http_error_302(self, req: Any, fp: Any, *args: Any, **options: Any) -> Any:
        try:
            return super().http_error_302(req, fp, *args, **options)
        except BaseException:
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class Opener(urllib.request.OpenerDirector):
    """Opens http and https URLs within limits.

    Args:
        context: of TLS; the system's authorities unless given.
    """

    def __init__(self, limits: Limits, context: ssl.SSLContext | None = None) -> None:
        super().__init__()
        self.limits = limits
        web = _Web(context or ssl.create_default_context())
        errors = (urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler())
        for handler in (web, _Redirects(), *errors, urllib.request.UnknownHandler()):
            self.add_handler(handler)

    def open(self, fullurl: Any, data: Any = None, timeout: float | None = None) -> Any:
        """As urllib's; `timeout` gives way to the limits.

        Raises:
            FetchError: the URL is refused, or goes over its limits.
            OSError: as urllib's.
        """
        request = urllib.request.Request(fullurl) if isinstance(fullurl, str) else fullurl
        if "allowance" not in vars(request):
            vars(request)["allowance"] = _Allowance(self.limits)
        try:
            return super().open(request, data, timeout)
        except urllib.error.HTTPError as error:  # which holds the connection, and nobody reads it
            error.close()
            raise


@contextmanager
def installed(opener: urllib.request.OpenerDirector) -> Iterator[None]:
    """Have `urllib.request.urlopen` use an opener, in this process and all its threads, for as long as this lasts."""
    before = urllib.request._opener  # type: ignore[attr-defined]
    urllib.request.install_opener(opener)
    try:
        yield
    finally:
        urllib.request._opener = before  # type: ignore[attr-defined]


class _Canary(urllib.request.OpenerDirector):
    def open(self, *_: Any, **__: Any) -> Any:
        raise FetchError("canary")


def goes_through(download: Callable[[str], str | None]) -> bool:
    """Whether what downloads a URL and returns its error asks the installed opener. Nothing is asked of a network."""
    with installed(_Canary()):
        return download("http://canary.invalid/") == "canary"
