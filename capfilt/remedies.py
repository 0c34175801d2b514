"""What a person can do about an error that a store, the operating system or fsspec raised.

Known by its number, where the operating system gave one that says it; else by what it says: clients raise kinds of
their own, through several libraries, so that the text is all they have in common. Paths and URLs are no part of what
it says: a folder may be called forbidden.
"""

from __future__ import annotations

import errno
import re

_REACHED = "check that it can be reached from here, and its address (of S3: AWS_ENDPOINT_URL or endpoint_url)"
_ROOM = "free some room there"
_WRITABLE = "name a place that can be written"
_RIGHTS = "give the user who runs this the right to it"
_MORE_FILES = "allow this user more (`ulimit -n 65536`)"

_BY_NUMBER = {
    **dict.fromkeys((errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH), _REACHED),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _ROOM),
    errno.EROFS: _WRITABLE,
    errno.EACCES: _RIGHTS,
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _MORE_FILES),
    **dict.fromkeys((errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR), ""),
}
_BY_TEXT = (
    (
        r"CredentialsError|InvalidAccessKeyId|InvalidToken|SignatureDoesNotMatch|ExpiredToken|Access ?Denied|"
        r"\bForbidden\b|\b401 Unauthorized|ClientAuthenticationError|lacked (the necessary privileges|valid authent)",
        "check the store's credentials (of S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; workers "
        "need them, too) and what they may do there",
    ),
    (r"NoSuchBucket|bucket does not exist", "make the bucket, or mend its name"),
    (
        r"EndpointConnectionError|Connect(ion|or)?(Error|Timeout)|ClientConnector|error sending request|dns error|"
        r"Connection refused|Name or service not known|Temporary failure in name resolution",
        _REACHED,
    ),
    (r"install gcsfs", "pip install 'capfilt[gcs]'"),
    (r"install adlfs", "pip install 'capfilt[azure]'"),
    (r"Protocol not known", "write s3://, gs://, az://, https:// or a local path"),
    (r"No space left on device|Disk quota exceeded|os error 28\b", _ROOM),
    (r"Read-only file system|os error 30\b", _WRITABLE),
    (r"Permission denied|os error 13\b|Operation not permitted", _RIGHTS),
    (r"Too many open files|os error 24\b", _MORE_FILES),
)
_QUOTED = re.compile(r"(?<![\w<])(['\"])[^'\"]*/[^'\"]*\1")
_PATH = re.compile(r"(?<!<)(?:\b\w+:/)?/[^\s<>'\":,;]*")  # but no end tag of XML


def remedy(error: BaseException) -> str:
    """What to do, as a clause without a full stop; empty where it is not known."""
    text = str(error)
    if isinstance(error, OSError):
        if error.errno in _BY_NUMBER:
            return _BY_NUMBER[error.errno]
        if error.filename is not None:
            text = str(error.strerror)
    said = f"{type(error).__name__}: {_PATH.sub('', _QUOTED.sub('', text))}"
    return next((what for pattern, what in _BY_TEXT if re.search(pattern, said, re.IGNORECASE)), "")
