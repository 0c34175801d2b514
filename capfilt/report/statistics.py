"""All that a report says of one version of a dataset, but for its gallery."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.damage import of_data
from capfilt.dataset import CuratedDataset
from capfilt.errors import DatasetError
from capfilt.records import RunRecord
from capfilt.report.captions import Captions, measure_captions, measure_together
from capfilt.report.judged import Judged
from capfilt.report.outcome import ImageSizes, Outcome, measure_images, measure_outcome
from capfilt.report.rule import Rule, find_rule
from capfilt.report.tally import ALL, COLUMNS, WEB, Tally
from capfilt.report.thresholds import Scores, measure_scores
from capfilt.schema import ANNOTATIONS, SHARD

_BATCH = 16_384


@dataclass(frozen=True)
class Statistics:
    """Of one version of the annotations, or of some of its shards.

    Attributes:
        captions: by origin.
        together: those of all captioners; None where there is none.
        run: that left this version, and curated rows; None where none is on record.
        judged: by source, the scores against the truth; empty where it is not known.
    """

    version: int
    rule: Rule
    outcome: Outcome
    scores: Scores
    captions: dict[str, Captions]
    together: Captions | None
    images: ImageSizes
    run: RunRecord | None
    judged: Mapping[str, Judged] = field(default_factory=dict)


@contextmanager
def tallied(dataset: CuratedDataset, version: int, shards: Sequence[str] | None) -> Iterator[Tally]:
    """A version's annotations, or those of some shards, in a database that is gone afterwards.

    Raises:
        DatasetError: there is no such version, or its files cannot be read, as after a vacuum.
    """
    wanted = None if shards is None else pc.field(SHARD).isin(list(shards))
    annotations = dataset.annotations(version)
    with tempfile.TemporaryDirectory(prefix="capfilt-report-") as folder:
        try:
            batches = annotations.scanner(
                columns=COLUMNS, filter=wanted, batch_size=_BATCH, batch_readahead=2, fragment_readahead=2
            ).to_reader()
            tally = Tally(batches, folder)
        except (OSError, pa.ArrowException, duckdb.Error) as error:
            newest = dataset.versions()[ANNOTATIONS]
            raise DatasetError(of_data(dataset.output, ANNOTATIONS, version, newest, error)) from error
        with tally:
            yield tally


def measure(tally: Tally, version: int, records: Mapping[str, RunRecord]) -> Statistics:
    """Everything but what is judged, by queries.

    Args:
        records: of the runs on record, by id.
    """
    rule = find_rule(tally, records)
    captions = measure_captions(tally)
    return Statistics(
        version,
        rule,
        measure_outcome(tally),
        measure_scores(tally, rule.thresholds),
        captions,
        measure_together(tally, captions),
        measure_images(tally),
        next((run for run in records.values() if run.version == version and run.rows), None),
    )


# --- two versions ---


def side_by_side(before: Statistics, now: Statistics) -> tuple[Statistics, Statistics]:
    """Two versions, ready to be compared by origin.

    Where their captioners are not the same, as after every round of bootstrapping, both have one more origin: ALL.
    """
    if before.captions.keys() == now.captions.keys():
        return before, now
    return _with_all(before), _with_all(now)


def _with_all(of: Statistics) -> Statistics:
    """With the captioners together as one more origin, after the web."""
    if of.together is None:
        return of
    web = {origin: own for origin, own in of.captions.items() if origin == WEB}
    reasons: dict[str | None, int] = {}
    for origin, reason, n in of.outcome.texts:
        if origin != WEB:
            reasons[reason] = reasons.get(reason, 0) + n
    return replace(
        of,
        outcome=replace(of.outcome, texts=(*of.outcome.texts, *((ALL, reason, n) for reason, n in reasons.items()))),
        scores=_scores_with_all(of.scores),
        captions={**web, ALL: of.together, **of.captions},
    )


def _scores_with_all(of: Scores) -> Scores:
    own = [origin for origin in of.itm if origin != WEB]
    if not own:
        return of
    counts = {"itm": of.itm, "itc": of.itc}
    means = {
        name: _mean([(int(counts[name][origin].sum()), *of.means[origin][name]) for origin in having])
        for name in counts
        if (having := [origin for origin in own if name in of.means[origin]])
    }
    itm, itc = (np.sum([by_origin[origin] for origin in own], axis=0) for by_origin in counts.values())
    return replace(of, itm={**of.itm, ALL: itm}, itc={**of.itc, ALL: itc}, means={**of.means, ALL: means})


def _mean(parts: Sequence[tuple[int, float, float]]) -> tuple[float, float]:
    """Mean and standard deviation of parts, each with its number, mean and standard deviation."""
    numbers, means, deviations = np.array(parts, float).T
    mean = np.average(means, weights=numbers)
    return float(mean), float(np.sqrt(np.average(deviations**2 + (means - mean) ** 2, weights=numbers)))
