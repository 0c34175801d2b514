"""What any threshold would keep, from the scores on record: exact at each of a list of thresholds.

A row is kept when its web text's score is at least the web's threshold or its best synthetic text's at least the
synthetic one's (capfilt.decide). So the rows by web score and best synthetic score tell how many any two keep.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capfilt.report.tally import WEB, Tally
from capfilt.spec import Thresholds

Ints = npt.NDArray[np.int64]

STEPS = 100
"""Thresholds are 0, 0.01, ..., 1, and those in force."""

ITC_BINS = 100


@dataclass(frozen=True)
class Scores:
    """The scores of texts, and the rows that thresholds decide about.

    Attributes:
        thresholds: in order, T of them.
        rows: [T + 1, T + 1]; entry (i, j) counts rows whose web text reaches i of the thresholds and whose best
            synthetic text j of them. One without such a text reaches none.
        itm: texts by origin and how many thresholds they reach, [T + 1] each.
        itc: texts by origin in ITC_BINS bins from -1 to 1.
        means: of each origin's scores, ITM then ITC: mean and standard deviation.
    """

    thresholds: tuple[float, ...]
    rows: Ints
    itm: dict[str, Ints]
    itc: dict[str, Ints]
    means: dict[str, dict[str, tuple[float, float]]]

    def kept(self, web: float, synthetic: float) -> int:
        """Rows that these two of the thresholds keep."""
        i, j = (self.thresholds.index(one) + 1 for one in (web, synthetic))
        return int(self.rows.sum() - self.rows[:i, :j].sum())

    @property
    def decided(self) -> int:
        """Rows that thresholds decide about."""
        return int(self.rows.sum())


def measure_scores(tally: Tally, in_force: Thresholds) -> Scores:
    """Two passes over numbers."""
    thresholds = np.unique([*(step / STEPS for step in range(STEPS + 1)), in_force.web, in_force.synthetic])
    size = len(thresholds) + 1
    rows = np.zeros((size, size), np.int64)
    for batch in tally.batches("SELECT web, synthetic FROM decided"):
        i, j = (_reached(thresholds, column) for column in batch.columns)
        rows += np.bincount(i * size + j, minlength=size * size).reshape(size, size)
    itm: dict[str, Ints] = {}
    itc: dict[str, Ints] = {}
    means: dict[str, dict[str, tuple[float, float]]] = {}
    query = """
        SELECT origin, avg(score), coalesce(stddev_pop(score), 0), avg(itc), coalesce(stddev_pop(itc), 0)
        FROM texts WHERE score IS NOT NULL GROUP BY origin ORDER BY any_value(origin <> $web), origin
    """
    for origin, *found in tally.ask(query, web=WEB):
        means[origin] = {"itm": (found[0], found[1])} | ({"itc": (found[2], found[3])} if found[2] is not None else {})
        itm[origin], itc[origin] = np.zeros(size, np.int64), np.zeros(ITC_BINS, np.int64)
        for batch in tally.batches(
            "SELECT score, itc FROM texts WHERE origin = $origin AND score IS NOT NULL", origin=origin
        ):
            itm[origin] += np.bincount(_reached(thresholds, batch.column(0)), minlength=size)
            similar = _numbers(batch.column(1))
            similar = similar[~np.isnan(similar)]
            itc[origin] += np.histogram(np.clip(similar, -1, 1), ITC_BINS, (-1, 1))[0]
    return Scores(tuple(thresholds.tolist()), rows, itm, itc, means)


def _numbers(column: pa.Array) -> npt.NDArray[np.float64]:
    """float64, null as NaN."""
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False))


def _reached(thresholds: npt.NDArray[np.float64], column: pa.Array) -> Ints:
    """How many thresholds each score reaches, by decide's own comparison: of the stored float32 as a float64."""
    scores = np.nan_to_num(_numbers(column), nan=-1.0)
    return np.asarray(np.searchsorted(thresholds, scores, side="right"), np.int64)
