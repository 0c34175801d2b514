"""What strangers' URLs cannot do: reach what is not public, take long, send much."""

from __future__ import annotations

import datetime
import http.client
import ipaddress
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
from webserver import Page, WebServer

from capfilt.opener import EVERYWHERE, FetchError, Limits, Opener, goes_through, installed, not_public

LIMIT = 64 * 1024
HERE = (IPv4Network("127.0.0.1/32"),)
"""And not 127.0.0.2, where the server is that no one may reach."""


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("8.8.8.8", None),
        ("93.184.215.14", None),
        ("172.15.255.255", None),
        ("172.32.0.0", None),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", None),
        ("64:ff9b::808:808", None),  # 8.8.8.8 through NAT64
        ("::ffff:8.8.8.8", None),
        ("127.0.0.1", "loopback"),
        ("127.255.255.254", "loopback"),
        ("0.0.0.0", "this network"),
        ("0.1.2.3", "this network"),
        ("10.0.0.1", "private"),
        ("172.16.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.168.1.1", "private"),
        ("169.254.169.254", "link-local"),  # AWS, Google, Azure: metadata
        ("100.100.100.200", "shared, of a provider"),  # Alibaba's
        ("192.0.0.192", "special-purpose"),  # Oracle's
        ("168.63.129.16", "a cloud's metadata service"),  # Azure's wire server, a public number
        ("198.18.0.1", "benchmarking"),
        ("224.0.0.1", "multicast"),
        ("255.255.255.255", "reserved"),
        ("203.0.113.7", "documentation"),
        ("::1", "loopback"),
        ("::", "unspecified"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("fd00:ec2::254", "private"),  # AWS's metadata
        ("fec0::1", "reserved"),  # site-local, of old
        ("ff02::1", "multicast"),
        ("::ffff:127.0.0.1", "loopback"),
        ("::ffff:169.254.169.254", "link-local"),
        ("::127.0.0.1", "reserved"),  # compatible, of old
        ("64:ff9b::7f00:1", "loopback"),
        ("64:ff9b::a9fe:a9fe", "link-local"),
        ("64:ff9b:1::a00:1", "reserved"),  # a local network's own NAT64
        ("2002:7f00:1::", "6to4"),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", "special-purpose"),  # Teredo
        ("2001:db8::1", "documentation"),
    ],
)
def test_what_is_not_public(address: str, what: str | None) -> None:
    assert not_public(address) == what


def test_the_table_refuses_whatever_python_calls_not_global() -> None:
    """Two lists of the same registry, made apart; at the edges of every network of either."""
    edges = [1, 2**24, 2**31, 2**32 - 2]
    for network in ipaddress._IPv4Constants._private_networks:  # type: ignore[attr-defined]
        edges += [int(network[0]), int(network[-1])]
    for number in edges:
        address = ipaddress.IPv4Address(number)
        if not address.is_global:
            assert not_public(str(address)), address


# --- the server ---


@pytest.fixture(scope="module")
def forbidden() -> Iterator[WebServer]:
    """A server that must not be asked; each test that could reach it says so."""
    with WebServer({"/": Page(b"secret", "text/plain")}, host="127.0.0.2") as server:
        yield server


@pytest.fixture(scope="module")
def server(forbidden: WebServer) -> Iterator[WebServer]:
    pages: dict[str, Page] = {}

    def leads(path: str, to: str, status: int = 302) -> None:
        pages[path] = Page(b"", "text/plain", status=status, headers={"Location": to})

    huge = b"x" * (LIMIT + 300_000)
    pages["/good"] = Page(b"picture", "image/jpeg")
    pages["/largest"] = Page(b"x" * LIMIT, "image/jpeg")
    pages["/huge"] = Page(huge, "image/jpeg")
    pages["/huge-unsaid"] = Page(huge, "image/jpeg", claimed="")
    pages["/lying"] = Page(b"little", "image/jpeg", claimed=str(10**15))
    pages["/cut"] = Page(b"x" * 1000, "image/jpeg", sent=10)
    pages["/longer-than-said"] = Page(b"picture and more", "image/jpeg", claimed="7")
    pages["/bad-length"] = Page(b"picture", "image/jpeg", claimed="seven")
    pages["/drip"] = Page(b"x" * 100, "image/jpeg", drip=0.1)
    pages["/stall"] = Page(b"x", "image/jpeg", delay=1.0)
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    pages["/chunked"] = Page(b"", "", raw=head + b"4\r\npict\r\n3\r\nure\r\n0\r\n\r\n")
    pages["/chunk-cut"] = Page(b"", "", raw=head + b"4\r\npict\r\n9\r\nure")
    pages["/chunk-bomb"] = Page(b"", "", raw=head + b"7fffffffffff\r\n" + huge)
    pages["/headers"] = Page(b"", "", raw=b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 60_000)
    pages["/continue"] = Page(b"", "", raw=b"HTTP/1.1 100 Continue\r\n\r\n" * 30_000)
    pages["/nonsense"] = Page(b"", "", raw=b"\0\1\2 this is no HTTP\r\n\r\n")
    pages["/silent"] = Page(b"", "", raw=b"")
    for code in (403, 429, 500):
        pages[f"/{code}"] = Page(b"no", "text/plain", status=code)
    leads("/moved", "/good")
    leads("/moved-for-good", "/good", status=308)
    leads("/circle", "/circle")
    leads("/to-file", "file:///etc/passwd")
    leads("/to-ftp", "ftp://127.0.0.1/x")
    leads("/to-forbidden", forbidden.url)
    leads("/to-metadata", "http://169.254.169.254/latest/meta-data/")
    for number in range(30):
        leads(f"/hop{number}", f"/hop{number + 1}")
    pages["/fat"] = Page(b"x" * (LIMIT // 2 + 200_000), "text/plain", status=302, headers={"Location": "/fat"})
    with WebServer(pages) as running:
        yield running


def fetch(url: str, timeout: float = 5, total: float = 5, allowed: Any = HERE, **options: Any) -> bytes:
    with Opener(Limits(timeout, total, LIMIT, allowed), **options).open(url) as answer:
        body: bytes = answer.read()
        return body


def refused(url: str, **limits: Any) -> str:
    with pytest.raises((FetchError, OSError, ValueError, http.client.HTTPException)) as caught:
        fetch(url, **limits)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("path", ["good", "moved", "moved-for-good", "chunked", "longer-than-said"])
def test_what_is_whole_arrives(server: WebServer, path: str) -> None:
    assert fetch(f"{server.url}/{path}") == b"picture"


def test_the_largest_that_may_be(server: WebServer) -> None:
    assert len(fetch(f"{server.url}/largest")) == LIMIT


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("huge", "FetchError: more than 65,536 bytes"),
        ("huge-unsaid", "FetchError: more than 65,536 bytes"),
        ("lying", "FetchError: more than 65,536 bytes"),
        ("chunk-bomb", "FetchError: more than 65,536 bytes"),
        ("fat", "FetchError: more than 65,536 bytes"),
        ("cut", "IncompleteRead: IncompleteRead(10 bytes read, 990 more expected)"),
        ("chunk-cut", "IncompleteRead"),
        ("headers", "HTTPException: got more than 100 headers"),
        ("continue", "FetchError: more than 65,536 bytes"),
        ("nonsense", "BadStatusLine"),
        ("silent", "RemoteDisconnected"),
        ("403", "HTTPError: HTTP Error 403: Forbidden"),
        ("404", "HTTPError: HTTP Error 404: Not Found"),
        ("429", "HTTPError: HTTP Error 429: Too Many Requests"),
        ("500", "HTTPError: HTTP Error 500: Internal Server Error"),
        (
            "circle",
            "HTTPError: HTTP Error 302: The HTTP server returned a redirect error that",
        ),
        ("hop0", "HTTPError: HTTP Error 302: The HTTP server returned a redirect error that"),
        ("to-file", "HTTPError: HTTP Error 302: Found - Redirection to url 'file:///etc/passwd' is not allowed"),
        ("to-ftp", "URLError: <urlopen error unknown url type: ftp>"),
        ("to-metadata", "FetchError: 169.254.169.254 is refused: 169.254.169.254 is not a public address (link-local)"),
        ("to-forbidden", "FetchError: 127.0.0.2 is refused: 127.0.0.2 is not a public address (loopback)"),
    ],
)
def test_what_goes_wrong_is_said(server: WebServer, forbidden: WebServer, path: str, message: str) -> None:
    assert refused(f"{server.url}/{path}").startswith(message)
    assert forbidden.asked == []


def test_no_length_that_can_be_read_is_none(server: WebServer) -> None:
    assert fetch(f"{server.url}/bad-length") == b"picture"


@pytest.mark.parametrize(
    ("path", "limits", "message"),
    [
        ("drip", {"total": 0.6}, "FetchError: took longer than 0.6 s in all"),
        ("stall", {"timeout": 0.3}, "FetchError: nothing came for 0.3 s"),
        ("stall", {"total": 0.3}, "FetchError: took longer than 0.3 s in all"),
    ],
)
def test_time_is_bounded(server: WebServer, path: str, limits: dict[str, float], message: str) -> None:
    begin = time.monotonic()
    assert refused(f"{server.url}/{path}", **limits) == message
    assert time.monotonic() - begin < 1.0


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "localhost", "LOCALHOST"),
        *("0.0.0.0", "0", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
    ],
)
def test_however_it_is_written_this_machine_is_not_asked(server: WebServer, host: str) -> None:
    before = len(server.asked)
    assert "is not a public address" in refused(server.url.replace("127.0.0.1", host) + "/good", allowed=())
    assert len(server.asked) == before


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "gopher://127.0.0.1/", "FILE:/etc/passwd", "x", ""]
)
def test_other_schemes_are_refused(url: str) -> None:
    assert "unknown url type" in refused(url, allowed=EVERYWHERE)


def test_a_name_is_resolved_once_and_its_address_is_the_one_connected_to(
    server: WebServer, forbidden: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: an answer that is fine, then another one for whoever asks again."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def rebinding(host: str, port: int, *args: Any, **options: Any) -> Any:
        asked.append(host)
        return real("127.0.0.1" if len(asked) == 1 else "127.0.0.2", port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    assert fetch(server.url.replace("127.0.0.1", "rebinding.example") + "/good") == b"picture"
    assert asked == ["rebinding.example"]
    said = refused(forbidden.url.replace("127.0.0.2", "rebinding.example"))
    assert said == "FetchError: rebinding.example is refused: 127.0.0.2 is not a public address (loopback)"
    assert forbidden.asked == []


def test_of_several_addresses_only_those_that_may_be_are_tried(
    server: WebServer, forbidden: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def two(_: str, port: int, *args: Any, **options: Any) -> Any:
        return [one for address in ("127.0.0.2", "127.0.0.1") for one in real(address, port, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    assert fetch(server.url.replace("127.0.0.1", "two.example") + "/good") == b"picture"
    assert forbidden.asked == []


def test_proxies_of_the_environment_are_not_used(
    server: WebServer, forbidden: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, forbidden.url)
    monkeypatch.setenv("no_proxy", "")
    assert fetch(f"{server.url}/good") == b"picture"
    assert forbidden.asked == []


# --- https ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate of 127.0.0.1, that it signed itself."""
    x509 = pytest.importorskip("cryptography.x509", reason="cryptography is not installed")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    built = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = built.add_extension(names, critical=False).sign(key, hashes.SHA256())
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + signed.public_bytes(pem))
    return path


def test_https_is_held_to_the_same(certificate: Path, forbidden: WebServer) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    trusting = ssl.create_default_context(cafile=str(certificate))
    pages = {
        "/good": Page(b"picture", "image/jpeg"),
        "/huge": Page(b"x" * (LIMIT + 300_000), "image/jpeg", claimed=""),
        "/drip": Page(b"x" * 100, "image/jpeg", drip=0.1),
        "/away": Page(b"", "text/plain", status=301, headers={"Location": forbidden.url}),
    }
    with WebServer(pages, tls=tls) as server:
        assert fetch(f"{server.url}/good", context=trusting) == b"picture"
        assert "CERTIFICATE_VERIFY_FAILED" in refused(f"{server.url}/good")
        other = server.url.replace("127.0.0.1", "localhost")
        assert "CERTIFICATE_VERIFY_FAILED" in refused(f"{other}/good", context=trusting, allowed=EVERYWHERE)
        assert "is not a public address" in refused(f"{server.url}/good", context=trusting, allowed=())
        assert "more than 65,536 bytes" in refused(f"{server.url}/huge", context=trusting)
        assert "took longer than 0.4 s" in refused(f"{server.url}/drip", context=trusting, total=0.4)
        assert "127.0.0.2 is refused" in refused(f"{server.url}/away", context=trusting)
    assert forbidden.asked == []


# --- behind urlopen ---


def test_it_is_behind_urlopen_for_as_long_as_asked(server: WebServer) -> None:
    url = f"{server.url}/good"
    with installed(Opener(Limits(5, 5, LIMIT, ()))), pytest.raises(FetchError, match="not a public address"):
        urllib.request.urlopen(urllib.request.Request(url), timeout=5)
    with urllib.request.urlopen(url, timeout=5) as answer:
        assert answer.read() == b"picture"


def test_a_download_that_does_not_go_through_it_is_found_out(server: WebServer) -> None:
    def by_urlopen(url: str) -> str | None:
        try:
            urllib.request.urlopen(url)
        except Exception as error:  # noqa: BLE001 - as img2dataset does
            return str(error)
        return None

    def by_other_means(_: str) -> str | None:
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))):
            return None

    assert goes_through(by_urlopen)
    assert not goes_through(by_other_means)
