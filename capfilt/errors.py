"""The error tree.

    CapfiltError
    ├── SpecError          a spec or card cannot be used as written      exit 2
    ├── InputError         an input file cannot be listed or read
    ├── StoreError         a store refuses, or keeps failing
    ├── ImageError         one image cannot be used; carries its reason
    ├── CheckpointError    a checkpoint cannot be found, trusted or loaded
    ├── EndpointError      an endpoint that captions does not answer as it should
    ├── DatasetError       the output tables are not what they should be
    │   └── ConflictError  another run writes to the same output     exit 4
    │       ├── LeaseHeldError  it holds the output; nothing was done
    │       └── LeaseLostError  it took the output over
    ├── TrainingError      a training run cannot go on
    ├── ErrorBudgetError   too many rows are errors                      exit 3
    └── RunInterruptedError  Ctrl-C or SIGTERM, on the command line    exit 130

Every message names the file, the field or the shard, and the next thing to do.
"""

from __future__ import annotations

from capfilt.schema import Reason


class CapfiltError(Exception):
    """Root of every error this package raises on purpose."""

    exit_code = 1


class SpecError(CapfiltError):
    """A spec or model card cannot be used as written."""

    exit_code = 2


class InputError(CapfiltError):
    """An input file cannot be listed, opened or read as image-text Parquet."""


class StoreError(CapfiltError):
    """What a run writes cannot be written, or read back: its store refuses or keeps failing."""


class ImageError(CapfiltError):
    """One image cannot be used.

    Attributes:
        reason: the member of :class:`capfilt.schema.Reason` recorded for the row.
        detail: one line for a person; never contains image bytes.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class CheckpointError(CapfiltError):
    """A checkpoint cannot be found, trusted or loaded."""


class EndpointError(CapfiltError):
    """An endpoint that captions is down, refuses everyone, or is no such endpoint; no row is to blame."""


class DatasetError(CapfiltError):
    """The output tables are not what they should be (row conservation broken, foreign schema)."""


class ConflictError(DatasetError):
    """Another run writes to the same output; this one must stop, and may start again when that has ended."""

    exit_code = 4


class LeaseHeldError(ConflictError):
    """Another run holds the output; this one has done nothing."""


class LeaseLostError(ConflictError):
    """Another run took the output over, because this one gave no sign of life for too long."""


class TrainingError(CapfiltError):
    """A training run cannot go on: a loss that is not a number, data that run out, a state that does not fit."""


class ErrorBudgetError(CapfiltError):
    """More rows are errors than ``max_error_fraction`` allows."""

    exit_code = 3


class RunInterruptedError(CapfiltError):
    """A person or a cluster stopped the run; what was finished is kept."""

    exit_code = 130
