"""What runs did at each stage and how fast, and so how long the next will take. Loads neither torch nor ray."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from capfilt.plan import Plan, Stage
from capfilt.receipts import Receipt
from capfilt.records import RunRecord
from capfilt.terminal import counted

NEWEST = 50
"""Runs on record that are looked through for their pace, of those that did anything."""

_STEADY_SECONDS = 5.0
"""Of work after a stage's first fragment, from which on its pace says how long more of it takes."""


@dataclass
class Pace:
    """What a run did at one stage.

    Attributes:
        rows: finished; not those adopted from an earlier run.
        captions: that captioners wrote for them.
        images: whose bytes were read from the input.
        copied: images whose bytes were copied from an earlier pairs file.
        seconds: from the stage's beginning to its last fragment's end.
        first_rows, first_seconds: of these, the rows and the end of its first fragment: Ray and the models started.
    """

    rows: int = 0
    captions: int = 0
    images: int = 0
    copied: int = 0
    seconds: float = 0.0
    first_rows: int = 0
    first_seconds: float = 0.0

    def add(self, receipt: Receipt, seconds: float) -> None:
        """Count a fragment that was finished so long after the stage began."""
        if not self.rows:
            self.first_rows, self.first_seconds = receipt.rows, seconds
        self.rows += receipt.rows
        self.captions += receipt.captions
        self.images += receipt.images
        self.copied += receipt.copied
        self.seconds = seconds

    @property
    def steady(self) -> bool:
        """Whether it worked for long enough to tell its pace."""
        return self.rows > self.first_rows and self.seconds - self.first_seconds >= _STEADY_SECONDS

    @property
    def rate(self) -> float | None:
        """Rows a second: once started where it is steady, else from the beginning on; None if nothing was done."""
        if self.steady:
            return (self.rows - self.first_rows) / (self.seconds - self.first_seconds)
        return self.rows / self.seconds if self.rows and self.seconds > 0 else None


@dataclass(frozen=True)
class Cost:
    """What a plan takes at one stage.

    Attributes:
        rows: of its shards; None where nothing says how many they are.
        exact: whether that is known; else it is what the others' rows in a byte make likely.
        run, rate: the run on record whose pace is taken, and its rows a second.
        steady: whether it worked for long enough to tell; else its start-up is in its rate.
    """

    stage: Stage
    shards: int
    rows: int | None
    exact: bool
    run: str | None
    rate: float | None
    steady: bool = True

    def __str__(self) -> str:
        rows = (
            "rows not known yet"
            if self.rows is None
            else f"{'' if self.exact else 'about '}{counted(self.rows, 'row')}"
        )
        if self.rate is None:
            time = f"no run on record was at the {self.stage} stage, to tell how long that takes"
        elif self.rows is None:
            time = f"{self.rate:,.1f} rows/s in run {self.run}"
        else:
            seconds = datetime.timedelta(seconds=math.ceil(self.rows / self.rate))
            time = f"about {seconds} once started, at {self.rate:,.1f} rows/s as in run {self.run}"
            if not self.steady:
                time = f"at most about {seconds}: run {self.run} was too short to tell its pace without its start-up"
        return f"restart at {self.stage}: {counted(self.shards, 'shard')}, {rows}; {time}"


def costs(plan: Plan, paces: Mapping[Stage, tuple[str, Pace]]) -> list[Cost]:
    """What a plan takes at each stage that it has work at, by the pace of earlier runs."""
    found = []
    for stage in Stage:
        files = plan.at(stage)
        unknown = [file.size for file in files if file.shard not in plan.rows]
        rows: int | None = sum(plan.rows.get(file.shard, 0) for file in files)
        if unknown:
            rows = None if plan.rows_per_byte is None else (rows or 0) + round(sum(unknown) * plan.rows_per_byte)
        run, pace = paces.get(stage, (None, None))
        if files:
            rate, steady = (pace.rate, pace.steady) if pace else (None, True)
            found.append(Cost(stage, len(files), rows, not unknown, run, rate, steady))
    return found


def last_paces(records: Iterable[RunRecord]) -> dict[Stage, tuple[str, Pace]]:
    """By stage, the first of the runs, which are to be the newest first, that was steady there, and its pace.

    Where none was, the first that did anything there.
    """
    found: dict[Stage, tuple[str, Pace]] = {}
    for record in islice((one for one in records if one.details.get("stages")), NEWEST):
        try:
            paces = {Stage(name): Pace(**own) for name, own in record.details["stages"].items()}
        except (ValueError, TypeError, AttributeError):  # another version's: tells nothing
            continue
        for stage, pace in paces.items():
            if pace.rate is not None and (stage not in found or (pace.steady and not found[stage][1].steady)):
                found[stage] = record.run, pace
        if len(found) == len(Stage) and all(pace.steady for _, pace in found.values()):
            break
    return found
