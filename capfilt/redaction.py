"""Secrets kept out of what is recorded, logged and printed.

Specs refuse them by name (capfilt.spec.fields); this is for the other ways in: URLs with a password or a signature, and
messages of stores that repeat what the environment gave them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"

_PASSWORD = re.compile(r"(?<=://)([^/@:\s]*):[^/@\s]+(?=@)")
_USER = re.compile(r"(?<=\bhttp://)[^/@:\s]+(?=@)|(?<=\bhttps://)[^/@:\s]+(?=@)")
"""Tokens stand there, too. Of other schemes it is a name: `abfs://container@account`."""

_PARAMETER = re.compile(
    r"([?&][^=&\s]*(?:secret|token|password|credential|signature|sig|key)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE
)
_VARIABLE = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|ACCESS_KEY|ACCOUNT_KEY|API_KEY|CONNECTION_STRING", re.I)
_PLACE = re.compile(r"_(FILE|PATH|DIR|URL|URI|ENDPOINT)$", re.I)
"""Ends of names of variables that say where a secret is. A value that begins with `/` says nothing: base64 may."""

_SHORTEST = 8
"""Of a variable's value that is hidden: shorter ones are words that a text may well hold."""


def redacted(value: Any) -> Any:
    """A copy of what JSON can hold, without passwords and signatures of URLs and the environment's secrets."""
    secrets = [
        text
        for name, text in os.environ.items()
        if _VARIABLE.search(name) and not _PLACE.search(name) and len(text) >= _SHORTEST
    ]
    return _redacted(value, sorted(secrets, key=len, reverse=True))


def _redacted(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, HIDDEN)
        return _PARAMETER.sub(rf"\1{HIDDEN}", _USER.sub(HIDDEN, _PASSWORD.sub(rf"\1:{HIDDEN}", value)))
    if isinstance(value, Mapping):
        return {_redacted(name, secrets): _redacted(inner, secrets) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_redacted(inner, secrets) for inner in value]
    return value
