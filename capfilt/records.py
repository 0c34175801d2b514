"""What each run left on record, in `<output>/_runs/<run>/`: `run.json` at its start, `summary.json` at its end.

`run.json` holds the resolved spec, fingerprints, versions of packages, host, process and start, and why shards were to
be curated. `summary.json` holds counts, reasons, seconds by stage, device-seconds, failures, versions of the tables,
outcome and end. A run that died has the first only; one that ended before it began has both, the second
without versions (capfilt.pipelines.unbegun). A run that found nothing to do leaves neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import ValidationError

from capfilt.holder import standing
from capfilt.spec import CurateSpec
from capfilt.stores import blamed, persist

RUN, SUMMARY = "run.json", "summary.json"
DONE = "done"
RUNNING, DIED, INTERRUPTED = "running", "no end recorded", "interrupted"

_THREADS = 16


@dataclass(frozen=True)
class RunRecord:
    """A run on record.

    Attributes:
        started, ended: times, ISO 8601; `ended` is None where no end is recorded.
        outcome: `done`, INTERRUPTED, the error that ended the run, RUNNING or DIED.
        seconds: from start to end.
        shards, rows, kept, dropped, errors: of the shards that the run committed.
        device_seconds: see capfilt.throughput.Throughput.device_seconds.
        details: all that its files hold.
        torn: whether its summary is there and cannot be read: what the run did and left is not known.
    """

    run: str
    started: str | None
    ended: str | None
    outcome: str
    host: str | None = None
    seconds: float | None = None
    shards: int = 0
    rows: int = 0
    kept: int = 0
    dropped: int = 0
    errors: int = 0
    device_seconds: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)
    torn: bool = False

    @property
    def images_per_second(self) -> float | None:
        """Over the whole run, its start-up included."""
        return self.rows / self.seconds if self.seconds else None

    @property
    def version(self) -> int | None:
        """Of the annotations, which the run left; None where that is not on record."""
        version = self.details.get("versions", {}).get("annotations")
        return version if isinstance(version, int) else None

    @property
    def spec(self) -> CurateSpec | None:
        """As it was resolved; None where it is not on record, or another version of capfilt wrote it."""
        try:
            return CurateSpec.model_validate(self.details.get("spec"))
        except ValidationError:
            return None

    def as_json(self) -> dict[str, Any]:
        """For machines: these fields, then all others on record."""
        own = {name: value for name, value in asdict(self).items() if name != "details"}
        return {**own, "images_per_second": self.images_per_second, "details": dict(self.details)}


def outcome_of(error: BaseException) -> str:
    """Of a run that an error ended."""
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"


def earlier(number: int, left: Sequence[int]) -> int | None:
    """The version that the run before left; None if there was none.

    Args:
        number: a version. The run that made it left this one or a later one; or an earlier one, if there was only
            maintenance since.
        left: what each run left.
    """
    ends = sorted(set(left))
    if not ends:
        return None
    maker = next((end for end in ends if end >= number), ends[-1])
    return max((end for end in ends if 0 < end < min(number, maker)), default=None)


def read_records(output: str, options: Mapping[str, Any], fs: Any, root: str, runs: Iterable[str]) -> list[RunRecord]:
    """The records of runs, in the order given.

    Args:
        fs, root: the output's file system, and its place there.
    """
    lease = standing(output, options)
    holder = None if lease.free else lease.holder
    alive = holder.run if holder and holder.lives() is not False else None
    with blamed(f"{output}: the records of its runs cannot be read"), ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda run: _record(run, fs, f"{root}/_runs/{run}", alive), runs))


def _record(run: str, fs: Any, folder: str, alive: str | None) -> RunRecord:
    begun, summary = _read(fs, f"{folder}/{RUN}") or {}, _read(fs, f"{folder}/{SUMMARY}")
    torn = summary is not None and "outcome" not in summary
    if summary is None or torn:
        summary = {}
    counts = {name: int(summary.get("counts", {}).get(name, 0)) for name in ("kept", "dropped", "errors")}
    return RunRecord(
        run=run,
        started=begun.get("started"),
        ended=summary.get("finished"),
        outcome=summary.get("outcome", RUNNING if run == alive else DIED),
        host=begun.get("host"),
        seconds=summary.get("elapsed"),
        shards=summary.get("shards", 0),
        rows=sum(counts.values()),
        device_seconds=summary.get("device_seconds", {}),
        details={**begun, **summary},
        torn=torn,
        **counts,
    )


def _read(fs: Any, path: str) -> dict[str, Any] | None:
    """What a file holds; None where it is not there, nothing where it is no JSON object: its writer was killed.

    Raises:
        Exception: the store's own, where it keeps failing.
    """
    try:
        text = persist(lambda: fs.cat_file(path))
    except FileNotFoundError:
        return None
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
