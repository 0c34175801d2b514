"""Events of a run, for machines: records of the logger `capfilt`, each with its fields.

A library's user attaches handlers of his own to that logger. The command line writes them to standard error, a JSON
object a line, where the environment says `CAPFILT_LOG_FORMAT=json`; `CAPFILT_LOG_LEVEL` is `info` unless given. These
are no fields of a spec: who reads a log is a matter of the place where a spec runs, as credentials are, and a spec that
cannot be read has to be reported in the same form.
"""

from __future__ import annotations

import io
import json
import logging
import os
from datetime import UTC, datetime
from typing import IO, Any, cast

from rich.console import Console

from capfilt.errors import SpecError
from capfilt.redaction import redacted
from capfilt.terminal import err

LOG = logging.getLogger("capfilt")
LOG.addHandler(logging.NullHandler())  # else Python prints warnings of its own accord

FORMAT, LEVEL = "CAPFILT_LOG_FORMAT", "CAPFILT_LOG_LEVEL"
_LEVELS = ("debug", "info", "warning", "error")


def event(name: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event: a short constant name, and what JSON can hold."""
    LOG.log(level, name, extra={"fields": fields})


class JsonLines(logging.Formatter):
    """A record as one line of JSON, in ASCII, without secrets: a terminal that shows it has nothing to obey."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level and event, then its fields."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        return json.dumps(redacted(line), default=str)


class _Printed(io.TextIOBase):
    """Takes what is printed for people, as events."""

    def write(self, text: str) -> int:
        """One print."""
        if message := text.strip():
            event("message", message=message.removeprefix("capfilt: "))
        return len(text)


def as_json() -> bool:
    """Whether the environment asks for JSON.

    Raises:
        SpecError: it asks for something else.
    """
    return _choice(FORMAT, ("text", "json")) == "json"


def _choice(variable: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(variable, "").lower() or choices[0]
    if value not in choices:
        raise SpecError(f"{variable}={value}: write {' or '.join(choices)}")
    return value


def begin() -> None:
    """Have standard error carry JSON lines and nothing else, if the environment asks for it.

    Raises:
        SpecError: a variable has none of its values.
    """
    level = _choice(LEVEL, (_LEVELS[1], *_LEVELS))
    if as_json():
        own = os.fdopen(os.dup(2), "w", buffering=1)  # a run turns descriptor 2 to a file, for Ray's native code
        handler = logging.StreamHandler(own)
        handler.setFormatter(JsonLines())
        LOG.addHandler(handler)
        LOG.setLevel(level.upper())
        LOG.propagate = False
        err.file = cast(IO[str], _Printed())


def begun() -> bool:
    """Whether standard error carries JSON lines and nothing else."""
    return any(isinstance(handler.formatter, JsonLines) for handler in LOG.handlers)


def console() -> Console:
    """A console whose every print is an event."""
    return Console(file=cast(IO[str], _Printed()), soft_wrap=True)
