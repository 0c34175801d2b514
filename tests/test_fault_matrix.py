"""The matrix of faults in docs/faults.md says what the tests do: its numbers are those that the tests are run by.

    python tests/test_fault_matrix.py

prints it as it should be.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import test_bootstrap
import test_clock
import test_crash
import test_disk
import test_nodes
import test_recurate_crash
import test_s3

PAGE = Path(__file__).parent.parent / "docs" / "faults.md"
FEWEST = 200


@dataclass(frozen=True)
class Kind:
    """A kind of fault: how many of it `make test-slow` has, and where."""

    what: str
    faults: int
    where: str

    def __str__(self) -> str:
        return f"| {self.what} | {self.faults} | {self.where} |"


def kinds() -> list[Kind]:
    kills: Counter[str] = Counter()
    for (victim, _), count in test_crash.KILLS.items():
        kills[victim] += count
    midway: Counter[str] = Counter(strike.victim for strike in test_recurate_crash.STRIKES)
    stages, disk, clock = len(test_recurate_crash.CHANGES), test_disk.FAULTS, test_clock.FAULTS
    return [
        Kind("the driver is killed", kills["driver"], "test_crash.py"),
        Kind("an actor that holds the models is killed", kills["actor"], "test_crash.py"),
        Kind("both are", kills["both"], "test_crash.py"),
        Kind("the actor that counts attempts is killed", kills["ledger"], "test_crash.py"),
        Kind("the driver is killed while it recurates", stages * midway["driver"], "test_recurate_crash.py"),
        Kind("a worker is, meanwhile", stages * midway["worker"], "test_recurate_crash.py"),
        Kind("the driver of a bootstrap is killed", test_bootstrap.KILLS, "test_bootstrap.py"),
        Kind("a raylet is killed, a node dies", test_nodes.SEEDS * len(test_nodes.DEATHS), "test_nodes.py"),
        Kind("the head dies, or its GCS", len(test_nodes.HEADS), "test_nodes.py"),
        Kind("S3: 500, 503, resets, slow, cut off and lost answers, each by plan", test_s3.EACH_ONCE, "test_s3.py"),
        Kind("S3: the same at random, at least", test_s3.FEWEST, "test_s3.py"),
        Kind("the disk is full", disk["blocks"] + disk["inodes"], "test_disk.py"),
        Kind("a file may grow no more", disk["limit"], "test_disk.py"),
        Kind("the disk turns read-only", disk["read-only"], "test_disk.py"),
        Kind("runs by clocks that are years, days or hours off", clock["skew"], "test_clock.py"),
        Kind("the clock is set during a run", clock["set"], "test_clock.py"),
        Kind("S3 refuses the clock", clock["store"], "test_clock.py"),
    ]


def matrix() -> str:
    """The table, as the page has it."""
    rows = kinds()
    total = sum(kind.faults for kind in rows)
    return "\n".join(["| what goes wrong | faults | test |", "|---|---|---|", *map(str, rows), f"| all | {total} | |"])


def test_there_are_enough_faults_of_each_kind() -> None:
    assert sum(kind.faults for kind in kinds()) >= FEWEST
    assert min(kind.faults for kind in kinds()) > 0


def test_the_page_has_the_matrix() -> None:
    lines = PAGE.read_text().splitlines()
    table = list(
        itertools.takewhile(
            lambda line: line.startswith("|"), lines[lines.index("| what goes wrong | faults | test |") :]
        )
    )
    assert "\n".join(table) == matrix()


if __name__ == "__main__":
    print(matrix())
