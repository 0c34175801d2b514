"""Single rows, read from the tables' own files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow.parquet as pq

from capfilt.errors import DatasetError
from capfilt.inputs import read_parquet

_THREADS = 8
_PAUSES = (0.5,)  # a person is waiting


def read_places(places: Sequence[tuple[str, int]], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows at these places: (URL of a data file, position in it from 0), in the order asked.

    Raises:
        InputError: a file cannot be read.
        DatasetError: a file has no such row.
    """
    asked: dict[str, list[int]] = defaultdict(list)
    for url, place in places:
        asked[url].append(place)

    def of_file(url: str) -> dict[int, dict[str, Any]]:
        return read_parquet(url, options, lambda parquet: _rows(parquet, url, asked[url]), _PAUSES)

    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(asked, pool.map(of_file, asked), strict=True))
    return [found[url][place] for url, place in places]


def _rows(parquet: pq.ParquetFile, url: str, places: Sequence[int]) -> dict[int, dict[str, Any]]:
    """By place; only the row groups that hold them are read."""
    found: dict[int, dict[str, Any]] = {}
    begin = 0
    for group in range(parquet.metadata.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if mine := [place for place in places if begin <= place < begin + rows]:
            taken = parquet.read_row_group(group, use_threads=False).take([place - begin for place in mine])
            found |= zip(mine, taken.to_pylist(), strict=True)
        begin += rows
    if lost := set(places) - found.keys():
        raise DatasetError(f"{url}: has {begin:,} rows, and row {max(lost)} was indexed; delete the index")
    return found
