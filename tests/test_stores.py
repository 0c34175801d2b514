"""Which errors pass, how often a call is made again, and how a store is reached."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import botocore.exceptions
import pyarrow as pa
import pytest
from aiohttp.http_exceptions import ContentLengthError
from botocore.exceptions import ClientError
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from capfilt.errors import CapfiltError, DatasetError, StoreError
from capfilt.stores import REQUESTS, blamed, connect, delta_options, persist, transient


def answered(code: str, status: int) -> Exception:
    """What s3fs raises for an answer of S3."""
    error = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")
    translated: Exception = translate_boto_error(error)
    return translated


def broken_off() -> Exception:
    """What aiohttp raises where a body ends too early."""
    error = aiohttp.ClientPayloadError("Response payload is not completed")
    error.__cause__ = ContentLengthError("Not enough data to satisfy content length header")
    return error


class HttpError(Exception):
    """gcsfs's kind."""

    def __init__(self, code: int) -> None:
        super().__init__(f"{code}")
        self.code = code


class HttpResponseError(Exception):
    """Azure's kind."""

    def __init__(self, status_code: int) -> None:
        super().__init__(f"{status_code}")
        self.status_code = status_code


RESET = "Generic S3 error: Error performing PUT http://s/1.json - HTTP error: error sending request"
REFUSED = 'Generic S3 error: Error performing PUT http://s/1.json - Server returned non-2xx status code: {}: "<Error>'

PASSES: list[tuple[Exception, bool]] = [
    (answered("InternalError", 500), True),
    (answered("SlowDown", 503), True),
    (answered("ServiceUnavailable", 503), True),
    (answered("500", 500), True),  # of a HEAD, which has no body to say more
    (answered("Throttling", 429), True),
    (answered("RequestTimeout", 400), True),
    (answered("BadDigest", 400), True),
    (answered("OperationAborted", 409), True),
    (answered("AccessDenied", 403), False),
    (answered("RequestTimeTooSkewed", 403), False),
    (answered("NoSuchBucket", 404), False),
    (answered("NoSuchUpload", 404), False),
    (answered("InvalidArgument", 400), False),
    (answered("PreconditionFailed", 412), False),
    (answered("NotImplemented", 501), False),
    (answered("PermanentRedirect", 301), False),
    (botocore.exceptions.EndpointConnectionError(endpoint_url="http://s"), True),
    (botocore.exceptions.ReadTimeoutError(endpoint_url="http://s"), True),
    (botocore.exceptions.NoCredentialsError(), False),
    (botocore.exceptions.ProfileNotFound(profile="mine"), False),
    (aiohttp.ClientPayloadError("not all of the body came"), True),
    (broken_off(), True),
    (FSTimeoutError(), True),
    (ConnectionResetError(), True),
    (TimeoutError(), True),
    (HttpError(503), True),
    (HttpError(403), False),
    (HttpResponseError(500), True),
    (HttpResponseError(404), False),
    (OSError(errno.EIO, "input/output error"), True),
    (OSError(errno.ENOSPC, "no space left"), False),
    (OSError(errno.EROFS, "read-only"), False),
    (OSError(errno.EFBIG, "file too large"), False),
    (ValueError("Protocol not known: weird"), False),
    (aiohttp.InvalidURL("http://"), False),
    (json.JSONDecodeError("Expecting value", "", 0), True),  # of an answer that broke off
    (FileNotFoundError(), False),
    (PermissionError(), False),
    (OSError(RESET), True),
    (OSError(REFUSED.format("503 Service Unavailable")), True),
    (OSError(REFUSED.format("403 Forbidden")), False),
    (OSError("The operation lacked the necessary privileges to complete for path out/1.json"), False),
    (OSError("Generic LocalFileSystem error: Unable to open file"), False),
    (DeltaError(f"Kernel error: {RESET}"), True),
    (DeltaError("Kernel error: no protocol found"), False),
    (TableNotFoundError("no files in log"), False),
    (CommitFailedError("a concurrent transaction"), False),
    (pa.ArrowInvalid("magic bytes not found"), False),
    (TypeError("a fault of ours"), False),
    (MemoryError(), False),
    (DatasetError("rows do not add up"), False),
]


@pytest.mark.parametrize(("error", "passes"), PASSES, ids=lambda value: f"{value!r:.60}")
def test_what_passes(error: Exception, passes: bool) -> None:
    assert transient(error) is passes
    kind = type(error) if isinstance(error, (CapfiltError, MemoryError)) else StoreError
    with pytest.raises(kind) as caught, blamed("s3://b/x: cannot be written"):
        raise error
    assert transient(caught.value) is passes


def failing(errors: list[Exception]) -> Callable[[], int]:
    """Raises these, one a call, then returns how many are left."""

    def call() -> int:
        if errors:
            raise errors.pop(0)
        return len(errors)

    return call


def test_a_call_is_made_again_while_it_may_help() -> None:
    reset = [ConnectionResetError("1"), ConnectionResetError("2"), ConnectionResetError("3")]
    assert persist(failing(reset[:2]), (0, 0)) == 0
    with pytest.raises(ConnectionResetError, match="3"):
        persist(failing(reset[:]), (0, 0))
    left: list[Exception] = [PermissionError("no"), ConnectionResetError()]
    with pytest.raises(PermissionError, match="no"):
        persist(failing(left), (0, 0))
    assert len(left) == 1
    with pytest.raises(ConnectionResetError, match="1"):  # not a store's, in a call that does more than ask one
        persist(failing(reset[:1]), (0, 0), of=StoreError)


def test_tries_are_apart_and_not_all_alike() -> None:
    waits = []
    for _ in range(4):
        begin = time.monotonic()
        persist(failing([ConnectionResetError()]), (0.1,))
        waits.append(time.monotonic() - begin)
    assert all(0.05 <= wait < 0.5 for wait in waits)
    assert max(waits) - min(waits) > 0.001


def test_blame_names_the_place_the_cause_and_the_next_step() -> None:
    with pytest.raises(StoreError) as caught, blamed("s3://b/x.json: cannot be written"):
        raise OSError("Generic S3 error\n   \x1b[31m↳\x1b[0m Error performing PUT")
    assert str(caught.value) == (
        "s3://b/x.json: cannot be written: OSError: Generic S3 error Error performing PUT. What is committed stays; "
        "mend the cause, if it does not pass, and run again to resume"
    )
    with (
        pytest.raises(
            StoreError, match=r"begin: OSError: GET http://s/(a+) \.\.\. a+ 403 Forbidden; check .* there\. What"
        ),
        blamed("begin"),
    ):
        raise OSError(f"GET http://s/{'a' * 1000} 403 Forbidden")
    with pytest.raises(DatasetError, match="as it is"), blamed("x"):
        raise DatasetError("as it is")


def test_one_layer_tries_a_request_again() -> None:
    fs, name = connect("s3://bucket/a", {"endpoint_url": "http://127.0.0.1:9"})
    assert (name, fs.retries) == ("bucket/a", 1)
    assert fs.config_kwargs == {"retries": {"mode": "standard", "total_max_attempts": REQUESTS}}
    own = {"config_kwargs": {"retries": {"mode": "adaptive"}, "max_pool_connections": 5}}
    assert connect("s3://bucket/a", own)[0].config_kwargs == own["config_kwargs"]
    fs, name = connect("/a/b", {}, auto_mkdir=True)
    assert (fs.protocol[0], name, fs.auto_mkdir) == ("file", "/a/b", True)


RETRIES = {"max_retries": str(REQUESTS - 1), "retry_timeout": "60s"}


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ({}, {}, {"AWS_REGION": "us-east-1"}),
        (
            {"endpoint_url": "http://localhost:9000", "client_kwargs": {"region_name": "eu-1"}, "anon": True},
            {},
            {
                "AWS_ENDPOINT_URL": "http://localhost:9000",
                "AWS_ALLOW_HTTP": "true",
                "AWS_REGION": "eu-1",
                "AWS_SKIP_SIGNATURE": "true",
            },
        ),
        (
            {},
            {"AWS_ENDPOINT_URL_S3": "https://minio:9000", "AWS_PROFILE": "mine"},
            {
                "AWS_ENDPOINT_URL": "https://minio:9000",
                "AWS_FORCE_CREDENTIAL_LOAD": "true",
                "AWS_REGION": "us-east-1",
            },
        ),
        (
            {"endpoint_url": "https://a"},
            {"AWS_ENDPOINT_URL": "https://b"},
            {"AWS_ENDPOINT_URL": "https://a", "AWS_REGION": "us-east-1"},
        ),
    ],
)
def test_storage_options_are_translated(
    options: dict[str, Any],
    environment: dict[str, str],
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "config").write_text("[profile mine]\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert delta_options("s3://bucket/out", options) == {**RETRIES, **expected}


@pytest.mark.parametrize(
    ("name", "hint"), [("endpont_url", "none of endpoint_url"), ("profile", "set AWS_PROFILE in the environment")]
)
def test_storage_options_are_refused(name: str, hint: str) -> None:
    with pytest.raises(
        DatasetError, match=rf"s3://b/out: storage option '{name}' cannot be used for outputs: .*{hint}"
    ):
        delta_options("s3://b/out", {name: "x"})


def test_a_profile_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "typo")
    with pytest.raises(DatasetError, match=r"s3://b/out: .*\(typo\) could not be found; AWS_PROFILE names one of"):
        delta_options("s3://b/out", {})
