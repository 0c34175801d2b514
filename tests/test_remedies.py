"""What to do about what stores and the operating system raise."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from capfilt.errors import InputError
from capfilt.inputs import list_inputs
from capfilt.remedies import remedy
from capfilt.spec import Input
from capfilt.stores import connect, one_line

CREDENTIALS, REACHED = "check the store's credentials", "check that it can be reached from here, and its address"


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (NoCredentialsError(), CREDENTIALS),
        (PermissionError("Access Denied"), CREDENTIALS),  # s3fs's
        (DeltaError("Generic S3 error: ... with status 403 Forbidden: <Code>SignatureDoesNotMatch"), CREDENTIALS),
        (EndpointConnectionError(endpoint_url="http://h"), REACHED),
        (socket.gaierror(-2, "Name or service not known"), REACHED),
        (FileNotFoundError("The specified bucket does not exist"), "make the bucket"),
        (ImportError("Please install gcsfs to access Google Storage"), "pip install 'capfilt[gcs]'"),
        (ImportError("Install adlfs to access Azure Datalake Gen2"), "pip install 'capfilt[azure]'"),
        *((OSError(number, os.strerror(number)), "") for number in (errno.EEXIST, errno.EIO)),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "/x"), "give the user who runs this the right to it"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "name a place that can be written"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "allow this user more"),
        (OSError("LocalError: No space left on device (os error 28)"), "free some room there"),
        (KeyError("a bug"), ""),
        # what a path is called is not what happened
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/data/forbidden/x.parquet"), ""),
        (FileNotFoundError(errno.ENOENT, "Failed to open local file '/data/Access Denied/x.parquet'"), ""),
        (FileNotFoundError("/data/forbidden/x.parquet"), ""),
        (FileNotFoundError("s3://bucket/forbidden/x.parquet"), ""),
        (OSError(errno.EIO, os.strerror(errno.EIO), "/data/Permission denied/x"), ""),
        (OSError(errno.EIO, "Cannot read '/data/Permission denied/x.parquet'"), ""),
        (DeltaError("Unable to open file /data/forbidden/x: Permission denied (os error 13)"), "give the user"),
        (DeltaError("http://h/b/_delta_log/0.json - <Error><Code>NoSuchBucket</Code><Message>The"), "make the bucket"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "/data/forbidden"), "give the user who runs this"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 9)"), REACHED),
        (OSError(errno.EIO, "An error occurred (InvalidToken) when calling the PutObject operation"), CREDENTIALS),
        (PermissionError("Forbidden"), CREDENTIALS),  # s3fs's, of a HEAD
        (OSError("Forbidden: https://h/b/o\nno"), CREDENTIALS),  # gcsfs's
    ],
)
def test_what_is_said_of_an_error(error: Exception, what: str) -> None:
    assert remedy(error).startswith(what)
    assert bool(remedy(error)) == bool(what)
    assert one_line(error).endswith(remedy(error))


def test_a_url_that_nothing_speaks() -> None:
    with pytest.raises(ValueError, match="Protocol not known") as raised:
        connect("nothing://there", {})
    assert remedy(raised.value) == "write s3://, gs://, az://, https:// or a local path"
    with pytest.raises(InputError, match=r"cannot be listed: .*; write s3://"):
        list_inputs(Input(paths=("nothing://there",)))


def test_a_port_that_no_one_listens_on(refusing_port: int) -> None:
    options = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{refusing_port}",
        **{"AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "r"},
        **{"max_retries": "0", "retry_timeout": "1s"},
    }
    with pytest.raises((DeltaError, OSError)) as raised:
        DeltaTable("s3://bucket/table", storage_options=options)
    assert remedy(raised.value).startswith(REACHED)


def test_a_web_server_that_does_not_answer_is_not_a_file_that_is_missing(refusing_port: int) -> None:
    with pytest.raises(InputError, match=rf"cannot be listed: ClientConnectorError.*{re.escape(REACHED)}"):
        list_inputs(Input(paths=(f"http://127.0.0.1:{refusing_port}/x.parquet",)))


@pytest.fixture
def refusing_port() -> Iterator[int]:
    """Held, so that no one else gets it, and not listened on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        yield one.getsockname()[1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_directory_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(InputError, match="give the user who runs this the right to it"):
        list_inputs(Input(paths=(str(tmp_path / "closed" / "*.parquet"),)))
