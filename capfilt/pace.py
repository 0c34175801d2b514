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

NEWEST = 50
"""Runs on record that are looked through for their pace, of those that did anything."""


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
    def rate(self) -> float | None:
        """Rows a second once started, or from the beginning where one fragment was all; None if nothing was done."""
        rows, seconds = self.rows - self.first_rows, self.seconds - self.first_seconds
        if rows > 0 and seconds > 0:
            return rows / seconds
        return self.rows / self.seconds if self.rows and self.seconds > 0 else None


@dataclass(frozen=True)
class Cost:
    """What a plan takes at one stage.

    Attributes:
        rows: of its shards; None where nothing says how many they are.
        exact: whether that is known; else it is what the others' rows in a byte make likely.
        run, rate: the newest run on record that did anything at this stage, and its rows a second.
    """

    stage: Stage
    shards: int
    rows: int | None
    exact: bool
    run: str | None
    rate: float | None

    def __str__(self) -> str:
        rows = "rows not known yet" if self.rows is None else f"{'' if self.exact else 'about '}{self.rows:,} rows"
        if self.rate is None:
            time = f"no run on record was at the {self.stage} stage, to tell how long that takes"
        elif self.rows is None:
            time = f"{self.rate:,.1f} rows/s in run {self.run}"
        else:
            seconds = datetime.timedelta(seconds=math.ceil(self.rows / self.rate))
            time = f"about {seconds} once started, at {self.rate:,.1f} rows/s as in run {self.run}"
        return f"restart at {self.stage}: {self.shards:,} shards, {rows}; {time}"


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
            found.append(Cost(stage, len(files), rows, not unknown, run, pace.rate if pace else None))
    return found


def last_paces(records: Iterable[RunRecord]) -> dict[Stage, tuple[str, Pace]]:
    """By stage, the first of the runs, which are to be the newest first, that did anything there, and its pace."""
    found: dict[Stage, tuple[str, Pace]] = {}
    for record in islice((one for one in records if one.details.get("stages")), NEWEST):
        try:
            paces = {Stage(name): Pace(**own) for name, own in record.details["stages"].items()}
        except (ValueError, TypeError, AttributeError):  # another version's: tells nothing
            continue
        for stage, pace in paces.items():
            if pace.rate is not None:
                found.setdefault(stage, (record.run, pace))
        if len(found) == len(Stage):
            break
    return found
