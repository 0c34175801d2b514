"""What to do about what stores and the operating system raise."""

from __future__ import annotations

import errno
import os
import socket
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


def test_a_port_that_no_one_listens_on(free_port: int) -> None:
    options = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port}",
        **{"AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "r"},
        **{"max_retries": "0", "retry_timeout": "1s"},
    }
    with pytest.raises((DeltaError, OSError)) as raised:
        DeltaTable("s3://bucket/table", storage_options=options)
    assert remedy(raised.value).startswith(REACHED)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_directory_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(InputError, match="give the user who runs this the right to it"):
        list_inputs(Input(paths=(str(tmp_path / "closed" / "*.parquet"),)))
