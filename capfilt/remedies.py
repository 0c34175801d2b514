"""What a person can do about an error that a store, the operating system or fsspec raised: known by what it says.

Their clients raise kinds of their own, through several libraries, so that the text is all they have in common.
"""

from __future__ import annotations

import re

_REMEDIES = (
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
        "check that it can be reached from here, and its address (of S3: AWS_ENDPOINT_URL or endpoint_url)",
    ),
    (r"install gcsfs", "pip install 'capfilt[gcs]'"),
    (r"install adlfs", "pip install 'capfilt[azure]'"),
    (r"Protocol not known", "write s3://, gs://, az://, https:// or a local path"),
    (r"No space left on device|Disk quota exceeded|os error 28\b", "free some room there"),
    (r"Read-only file system|os error 30\b", "name a place that can be written"),
    (r"Permission denied|os error 13\b|Operation not permitted", "give the user who runs this the right to it"),
    (r"Too many open files|os error 24\b", "allow this user more (`ulimit -n 65536`)"),
)


def remedy(error: BaseException) -> str:
    """What to do, as a clause without a full stop; empty where it is not known."""
    said = f"{type(error).__name__}: {error}"
    return next((what for pattern, what in _REMEDIES if re.search(pattern, said, re.IGNORECASE)), "")
