"""Stores: where inputs and outputs lie, how they are reached, and what is done when one fails for a moment.

Data goes through fsspec (:func:`connect`), the tables' logs through deltalake (:func:`delta_options`); both take their
credentials, profile, region and endpoint from the same places, and neither takes a secret from a spec.

Three layers try again, each what only it can:

    a store's client   a request: connections refused or reset, 429, 5xx; REQUESTS times, backing off, with jitter
    persist            an operation: one whose answer broke off in its body, which clients pass on
    the next run       what did not come back in time; it resumes
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import fsspec
from deltalake.exceptions import DeltaError

from capfilt.causes import said
from capfilt.errors import CapfiltError, DatasetError, StoreError
from capfilt.remedies import remedy

T = TypeVar("T")

PAUSES = (0.5, 2.0, 8.0)
"""Seconds before an operation is tried again, on average."""

REQUESTS = 5
"""How often a client sends one request, the first time included."""

_S3 = ("s3", "s3a")

_LASTING = (
    *(FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(NotImplementedError, TypeError, AttributeError, NameError, LookupError, ImportError, AssertionError),
    *(ValueError, MemoryError, CapfiltError),  # the first is what fsspec says of a URL that it cannot make sense of
)
_BROKEN_OFF = (json.JSONDecodeError, UnicodeDecodeError)  # of an answer: not all of it came, or another's
_LASTING_NUMBERS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EPERM, errno.EACCES, errno.ENOENT, errno.EEXIST, errno.ENOTDIR),
    *(errno.EISDIR, errno.EFBIG, errno.ENAMETOOLONG, errno.EMSGSIZE, errno.EINVAL, errno.ENOSYS),
    getattr(errno, "EREMCHG", -1),
}
_LASTING_NAMES = {  # of the clients' own kinds, which are not imported for this
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoRegionError", "InvalidRegionError"),
    *("ParamValidationError", "DefaultCredentialsError", "ClientAuthenticationError"),
}
_PASSING_NAMES = {"ClientPayloadError"}  # an answer that broke off: its cause, the parser's, calls itself a 400
_PASSING_CODES = {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"}  # among S3's 400s
_PASSING_STATUS = {408, 409, 425, 429}
_DELTA_STORE = re.compile(r"Generic \w+ error|HTTP error|error sending request")
_DELTA_LASTING = re.compile(r"Generic LocalFileSystem|lacked (?:the necessary privileges|valid authentication)")
_DELTA_STATUS = re.compile(r"(?:status(?: code)?:?|with) (\d{3}) [A-Z]")


# --- trying again ---


def transient(error: BaseException) -> bool:
    """Whether the same operation may succeed a moment later: the one place that decides it.

    Stores' clients raise kinds of their own, so what is not known to last is taken to pass: a try too many costs
    seconds, one too few a run.
    """
    if isinstance(error, StoreError) and error.__cause__ is not None:
        return transient(error.__cause__)
    if isinstance(error, _BROKEN_OFF) or type(error).__name__ in _PASSING_NAMES:
        return True
    if isinstance(error, _LASTING) or type(error).__name__ in _LASTING_NAMES:
        return False
    if isinstance(error, DeltaError) and not _DELTA_STORE.search(str(error)):
        return False
    if isinstance(error, (DeltaError, OSError)) and _DELTA_LASTING.search(str(error)):
        return False
    if said := _DELTA_STATUS.search(str(error)):
        return _passes(int(said[1]))
    code, status = _answer(error)
    if code in _PASSING_CODES:
        return True
    if status is not None:
        return _passes(status)
    return not (isinstance(error, OSError) and error.errno in _LASTING_NUMBERS)


def _passes(status: int) -> bool:
    return status in _PASSING_STATUS or (status >= 500 and status not in (501, 505))


def _answer(error: BaseException) -> tuple[str | None, int | None]:
    """The store's error code and HTTP status, where the error or what it was made from has them."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)  # botocore's
        if isinstance(response, Mapping):
            said = response.get("Error", {}), response.get("ResponseMetadata", {})
            return said[0].get("Code"), said[1].get("HTTPStatusCode")
        for name in ("status", "status_code", "code"):  # aiohttp's, Azure's, gcsfs's
            status = getattr(one, name, None)
            if isinstance(status, int) and 400 <= status < 600:
                return None, status
    return None, None


def pause(seconds: float) -> None:
    """Wait about so long: workers that failed together should not come back together."""
    time.sleep(seconds * random.uniform(0.5, 1.5))


def persist(call: Callable[[], T], pauses: Sequence[float] = PAUSES, *, of: type[Exception] = Exception) -> T:
    """What `call` returns, called again where it fails in a way that may pass. It must be safe to repeat.

    Args:
        pauses: seconds to wait before each further try.
        of: the errors that are a store's, where `call` does more than ask one.

    Raises:
        Exception: what the last try raised, or the first that will not pass.
    """
    for seconds in pauses:
        try:
            return call()
        except of as error:
            if not transient(error):
                raise
        pause(seconds)
    return call()


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Raise a store's error as a StoreError that begins with `what`: the place, and what cannot be done there."""
    try:
        yield
    except (CapfiltError, MemoryError):
        raise
    except Exception as error:  # every store raises its own kinds
        raise StoreError(
            f"{what}: {one_line(error)}. What is committed stays; mend the cause, if it does not pass, and run again "
            "to resume"
        ) from error


def one_line(error: BaseException) -> str:
    """What an error says, as :func:`capfilt.causes.said`, and what can be done about it, where that is known."""
    return f"{said(error)}; {what}" if (what := remedy(error)) else said(error)


# --- reaching a store ---


def connect(url: str, options: Mapping[str, Any], **local: Any) -> tuple[Any, str]:
    """The file system of a URL or local path, and the name there.

    Args:
        options: fsspec's storage options.
        local: more of them, for a local path.
    """
    protocol = fsspec.utils.get_protocol(url)
    if protocol not in _S3:
        fs, name = fsspec.core.url_to_fs(url, **(local if protocol in ("file", "local") else {}), **options)
        return fs, name
    config = {"retries": {"mode": "standard", "total_max_attempts": REQUESTS}, **options.get("config_kwargs", {})}
    fs, name = fsspec.core.url_to_fs(url, **{**options, "config_kwargs": config})
    fs.retries = 1  # s3fs's own loop around botocore's, five times five, without jitter
    return fs, name


def refuses_to_overwrite(url: str, options: Mapping[str, Any]) -> bool:
    """Whether the store of a directory keeps what is there when asked to write only what is not: Delta's commits rest
    on it. Asked of S3's many kinds alone (If-None-Match), of which older ones do not know it and write all the same.

    Raises:
        StoreError: it does not answer, or says that it cannot.
    """
    fs, root = connect(url, options)
    if "s3" not in fs.protocol:
        return True
    name = f"{root}/_probe-{uuid.uuid4().hex}"
    with blamed(f"{url}: cannot be written"):
        try:
            for _ in range(2):
                persist(lambda: fs.pipe_file(name, b"", mode="create"))
        except FileExistsError:
            return True
        except OSError as error:
            if _answer(error)[1] != 412:
                raise
            return True
        finally:
            persist(lambda: fs.rm_file(name))
    return False


def delta_options(output: str, options: Mapping[str, Any]) -> dict[str, str]:
    """deltalake's names for fsspec's storage options, and how often it tries again.

    Secrets come from the environment, or the profile that it names, which both read; so do region and endpoint.

    Raises:
        DatasetError: naming an option that has no counterpart.
    """
    names = {
        "endpoint_url": "AWS_ENDPOINT_URL",
        "region": "AWS_REGION",
        "region_name": "AWS_REGION",
        "allow_http": "AWS_ALLOW_HTTP",
        "anon": "AWS_SKIP_SIGNATURE",
        "account_name": "AZURE_STORAGE_ACCOUNT_NAME",
    }
    mapped = {}
    for name, value in {**options, **options.get("client_kwargs", {})}.items():
        if name in names:
            mapped[names[name]] = str(value).lower() if isinstance(value, bool) else str(value)
        elif name not in ("client_kwargs", "config_kwargs"):
            hint = "set AWS_PROFILE in the environment" if name == "profile" else f"it is none of {', '.join(names)}"
            raise DatasetError(f"{output}: storage option {name!r} cannot be used for outputs: {hint}")
    if "://" not in output:
        return mapped
    if fsspec.utils.get_protocol(output) in _S3:
        mapped = {**_configured(output), **mapped}
    if mapped.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        mapped.setdefault("AWS_ALLOW_HTTP", "true")
    signed = mapped.get("AWS_SKIP_SIGNATURE") != "true"
    if (
        "AWS_ENDPOINT_URL" in mapped
        and signed
        and ("AWS_PROFILE" in os.environ or "AWS_ACCESS_KEY_ID" not in os.environ)
    ):
        mapped["AWS_FORCE_CREDENTIAL_LOAD"] = "true"  # else deltalake reads no profile for other stores than Amazon's
    return {"max_retries": str(REQUESTS - 1), "retry_timeout": "60s", **mapped}


def _configured(output: str) -> dict[str, str]:
    """Endpoint and region where s3fs takes them from: the environment, else the profile."""
    import botocore.session
    from botocore.configprovider import ConfiguredEndpointProvider
    from botocore.exceptions import ProfileNotFound

    session = botocore.session.get_session()
    try:
        profile = session.get_scoped_config()
    except ProfileNotFound as error:
        raise DatasetError(
            f"{output}: {error}; AWS_PROFILE names one of ~/.aws/config or ~/.aws/credentials"
        ) from error
    endpoint = ConfiguredEndpointProvider(session.full_config, profile, "s3").provide()
    region = session.get_config_variable("region")
    found = {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": region}
    return {name: value for name, value in found.items() if value}
