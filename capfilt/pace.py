"""What runs did at each stage and how fast, and so how long the next will take. Loads neither torch nor ray."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fsspec

from capfilt.plan import Stage
from capfilt.receipts import Receipt

_NEWEST = 50  # run records looked through, newest first


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


def last_paces(output: str, options: Mapping[str, Any]) -> dict[Stage, tuple[str, Pace]]:
    """By stage, the newest run on record that did anything there, and its pace."""
    fs, root = fsspec.core.url_to_fs(output, **options)
    found: dict[Stage, tuple[str, Pace]] = {}
    for path in sorted(fs.glob(f"{root}/_runs/*/summary.json"), reverse=True)[:_NEWEST]:
        run = path.split("/")[-2]
        try:
            stages = json.loads(fs.cat_file(path)).get("stages", {})
            paces = {Stage(name): Pace(**own) for name, own in stages.items()}
        except (FileNotFoundError, ValueError, TypeError, AttributeError):  # gone, or another version's: tells nothing
            continue
        for stage, pace in paces.items():
            if pace.rate is not None:
                found.setdefault(stage, (run, pace))
        if len(found) == len(Stage):
            break
    return found
