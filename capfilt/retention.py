"""Old versions of the dataset: which of them stay readable when a run has ended, by the spec's `retention`."""

from __future__ import annotations

from collections.abc import Mapping

from capfilt.dataset import DIRECTORIES, CuratedDataset
from capfilt.spec import Retention

_MORE = 50
"""Runs on record that are looked through beyond those wanted: some left no version, or one that another left, too."""


def thin(dataset: CuratedDataset, retention: Retention | None) -> int:
    """Delete what no version names and, with a retention, what only versions name that it lets go.

    Returns:
        Number of files deleted.

    Raises:
        ConflictError: another driver committed since this one opened. Nothing was deleted.
    """
    if retention is None:
        return dataset.vacuum()
    return dataset.vacuum(_hours(retention), _kept(dataset, retention))


def due(dataset: CuratedDataset, retention: Retention) -> bool:
    """Whether there is a file that only versions name that go."""
    return bool(dataset.replaced(_hours(retention), _kept(dataset, retention)))


def _hours(retention: Retention) -> float:
    return 24 * (retention.days or 0)


def _kept(dataset: CuratedDataset, retention: Retention) -> list[Mapping[str, int]]:
    """The versions by table that the newest runs left, but for what is there now, which stays anyhow."""
    wanted = (retention.versions or 1) - 1
    kept: list[Mapping[str, int]] = []
    for record in dataset.runs(wanted + _MORE) if wanted else ():
        left = record.details.get("versions", {})
        if left.keys() == DIRECTORIES.keys() and left != dataset.versions() and left not in kept:
            kept.append(left)
        if len(kept) == wanted:
            break
    return kept
