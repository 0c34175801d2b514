"""All that a report says of one version of a dataset, but for its gallery and its truth."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.damage import of_data
from capfilt.dataset import CuratedDataset
from capfilt.errors import DatasetError
from capfilt.records import RunRecord
from capfilt.report.captions import Captions, measure_captions
from capfilt.report.outcome import ImageSizes, Outcome, measure_images, measure_outcome
from capfilt.report.rule import Rule, find_rule
from capfilt.report.tally import COLUMNS, Tally
from capfilt.report.thresholds import Scores, measure_scores
from capfilt.schema import ANNOTATIONS, SHARD

_BATCH = 16_384


@dataclass(frozen=True)
class Statistics:
    """Of one version of the annotations, or of some of its shards."""

    version: int
    rule: Rule
    outcome: Outcome
    scores: Scores
    captions: dict[str, Captions]
    images: ImageSizes


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
    """Everything, by queries.

    Args:
        records: of the runs on record, by id.
    """
    rule = find_rule(tally, records)
    return Statistics(
        version,
        rule,
        measure_outcome(tally),
        measure_scores(tally, rule.thresholds),
        measure_captions(tally),
        measure_images(tally),
    )
