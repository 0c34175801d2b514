"""What became of URLs: how many have an image, how many do not, and why not."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field

SUCCESS = "success"
"""img2dataset's status of a row with an image."""


@dataclass(frozen=True)
class Account:
    """What became of URLs.

    Attributes:
        statuses: rows by img2dataset's status: success, failed_to_download, failed_to_resize.
        errors: rows that failed, by what was wrong; the most frequent ones of each shard.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """Accounted for."""
        return sum(self.statuses.values())

    @property
    def failed(self) -> int:
        """Rows without an image."""
        return self.rows - self.statuses[SUCCESS]

    def __add__(self, other: Account) -> Account:
        return Account(self.statuses + other.statuses, self.errors + other.errors)

    def over(self, fraction: float) -> bool:
        """Whether more failed than is tolerated."""
        return self.failed > fraction * self.rows

    def to_json(self) -> str:
        """For a footer."""
        return json.dumps({"statuses": self.statuses, "errors": dict(self.errors.most_common(100))}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Account:
        """Of a footer."""
        said = json.loads(text)
        return cls(Counter(said["statuses"]), Counter(said["errors"]))


_HOLES = re.compile(r"""'[^']*'|"[^"]*"|\S+(?= is refused)|(?<=refused: )\S+|\b\d[\d.,]*\b""")


def kind_of_error(message: str) -> str:
    """An error's message without what differs from URL to URL, so that its like can be counted."""
    kept = re.match(r"HTTP Error \d+", message)
    return (kept[0] if kept else re.sub(r"\s+", " ", _HOLES.sub("…", message)).strip())[:120] or "no message"
