"""What changed between two versions of a curated dataset, row by row. Loads neither torch nor ray.

Files of annotations that both versions have are not read. Of the shards whose files differ both sides are read side by
side, a row group at a time: rows lie in order, and every input row has one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capfilt.dataset import DIRECTORIES, CuratedDataset, DataFile
from capfilt.errors import DatasetError, InputError
from capfilt.inputs import read_parquet
from capfilt.schema import ANNOTATIONS, Status
from capfilt.stores import one_line
from capfilt.withdrawn import shard_of

ABSENT = "absent"
"""Outcome of a row of a shard that a version does not have, or that has fewer rows there."""

_ROWS = 4096
"""Changed rows handed on at a time."""

_COLUMNS = ["row", "key", "url", "image_sha256", "status", "reason"]
_COLUMNS += [f"texts.list.element.{name}" for name in ("text", "kept")]


class Change(StrEnum):
    """What became of a row. Each changed row has exactly one, the first that is true."""

    GAINED = "gained"  # kept, and was not
    LOST = "lost"  # was kept, and is not
    IMAGE = "image"  # kept, with another image
    TEXT = "text"  # kept, with other texts
    OUTCOME = "outcome"  # not kept, for another reason than before; or new and not kept, or gone and was not kept


CHANGED_ROW = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("row", pa.int64()),
        *(pa.field(name, pa.string()) for name in ("key", "url", "change", "before", "after")),
        *(pa.field(name, pa.list_(pa.string())) for name in ("texts_before", "texts_after")),
    ]
)
"""Of a row that changed: `before` and `after` are `kept`, the row's reason, or ABSENT; of the texts those kept."""


@dataclass
class Diff:
    """Two versions compared.

    Attributes:
        before, after: versions of the annotations.
        shards: how many each has, and how many of them are not the same files in both.
        changes: rows by change.
        outcomes: rows by outcome before and after, where these differ.
    """

    before: int
    after: int
    shards: dict[str, int] = field(default_factory=dict)
    changes: Counter[Change] = field(default_factory=Counter)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "before": self.before,
            "after": self.after,
            "shards": self.shards,
            "rows": {str(change): self.changes[change] for change in Change},
            "outcomes": [
                {"before": before, "after": after, "rows": rows}
                for (before, after), rows in self.outcomes.most_common()
            ],
        }


@dataclass(frozen=True, slots=True)
class _Row:
    """A row as a version has it; `texts` are those kept, in order."""

    outcome: str
    key: str | None = None
    url: str | None = None
    sha256: str | None = None
    texts: tuple[str | None, ...] = ()


_NONE = _Row(ABSENT)


def diff(
    dataset: CuratedDataset,
    before: int,
    after: int | None = None,
    sink: Callable[[pa.Table], None] | None = None,
) -> Diff:
    """Compare two versions of the annotations; `after` is the newest if None.

    Args:
        sink: takes the rows that changed, as tables of CHANGED_ROW, in order of shard and row.

    Raises:
        DatasetError: there is no such version, or it can no longer be read: vacuum took its files.
    """
    after = dataset.versions()[ANNOTATIONS] if after is None else after
    sides = [_by_shard(dataset, version) for version in (before, after)]
    shards = sorted(sides[0].keys() | sides[1].keys())
    changed = [shard for shard in shards if sides[0].get(shard) != sides[1].get(shard)]
    found = Diff(before, after, {"before": len(sides[0]), "after": len(sides[1]), "changed": len(changed)})
    for shard in changed:
        _compare(dataset, shard, [side.get(shard, ()) for side in sides], found, sink or (lambda _: None))
    return found


def _by_shard(dataset: CuratedDataset, version: int) -> Mapping[str, Sequence[str]]:
    """The annotations files of each shard, in order of their rows."""
    shards: dict[str, list[str]] = defaultdict(list)
    for path in dataset.annotation_paths(version):
        shards[shard_of(path)].append(path)
    return {
        shard: sorted(paths, key=lambda path: DataFile(path, 0, 0).span or (0, 0)) for shard, paths in shards.items()
    }


def _compare(
    dataset: CuratedDataset, shard: str, paths: Sequence[Sequence[str]], found: Diff, sink: Callable[[pa.Table], None]
) -> None:
    """Walk both versions of a shard side by side."""
    before, after = (
        _rows(dataset, own, version) for own, version in zip(paths, (found.before, found.after), strict=True)
    )
    changed: list[dict[str, Any]] = []
    for number, (was, now) in enumerate(zip_longest(before, after, fillvalue=_NONE)):
        change = _change(was, now)
        if change is None:
            continue
        found.changes[change] += 1
        if was.outcome != now.outcome:
            found.outcomes[was.outcome, now.outcome] += 1
        changed.append(_changed_row(shard, number, change, was, now))
        if len(changed) == _ROWS:
            sink(pa.Table.from_pylist(changed, CHANGED_ROW))
            changed = []
    if changed:
        sink(pa.Table.from_pylist(changed, CHANGED_ROW))


def _change(was: _Row, now: _Row) -> Change | None:
    kept = was.outcome == Status.KEPT, now.outcome == Status.KEPT
    if kept == (True, True):
        if was.sha256 != now.sha256:
            return Change.IMAGE
        return Change.TEXT if was.texts != now.texts else None
    if any(kept):
        return Change.GAINED if kept[1] else Change.LOST
    return Change.OUTCOME if was.outcome != now.outcome else None


def _changed_row(shard: str, number: int, change: Change, was: _Row, now: _Row) -> dict[str, Any]:
    known = was if now.url is None and now.key is None else now
    return {
        "shard": shard,
        "row": number,
        "key": known.key,
        "url": known.url,
        "change": change,
        "before": was.outcome,
        "after": now.outcome,
        "texts_before": was.texts,
        "texts_after": now.texts,
    }


def _rows(dataset: CuratedDataset, paths: Sequence[str], version: int) -> Iterator[_Row]:
    """The rows of a shard in order, from its first on."""
    position = 0
    for path in paths:
        url = f"{dataset.output}/{DIRECTORIES[ANNOTATIONS]}/{path}"
        try:
            groups = read_parquet(url, dataset.options, lambda parquet: int(parquet.num_row_groups))
            for group in range(groups):
                table = read_parquet(url, dataset.options, partial(_group, group))
                for number, row in zip(table["row"].to_pylist(), _of(table), strict=True):
                    if number != position:
                        raise DatasetError(
                            f"{url}: row {number} where row {position} is due: another tool rewrote the annotations, "
                            "which leaves nothing to compare row by row"
                        )
                    yield row
                    position += 1
        except InputError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise DatasetError(
                    f"{dataset.output}: version {version} can no longer be read: vacuum, or a run's `retention`, took "
                    f"files that only it and its like had ({path} for one). Compare with a newer version; `capfilt "
                    "runs --json` lists those that runs left"
                ) from error
            raise


def _group(group: int, parquet: pq.ParquetFile) -> pa.Table:
    return parquet.read_row_group(group, columns=_COLUMNS, use_threads=False)


def _of(table: pa.Table) -> Iterator[_Row]:
    outcomes = pc.coalesce(table["reason"], table["status"]).to_pylist()
    columns = (table[name].to_pylist() for name in ("key", "url", "image_sha256", "texts"))
    for outcome, key, url, sha256, texts in zip(outcomes, *columns, strict=True):
        yield _Row(outcome, key, url, sha256, tuple(text["text"] for text in texts if text["kept"]))


class ChangedRows:
    """A local Parquet file of the rows that changed; whole when closed without an error, else not there.

    Raises:
        DatasetError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._part = path, path.with_name(f"{path.name}.part")

    def __enter__(self) -> Self:
        try:
            self._writer = pq.ParquetWriter(self._part, CHANGED_ROW, compression="zstd")
        except OSError as error:
            raise DatasetError(
                f"{self._path}: cannot be written: {one_line(error)}; name another file with --rows"
            ) from error
        return self

    def write(self, rows: pa.Table) -> None:
        """Add rows of CHANGED_ROW."""
        self._writer.write_table(rows)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._writer.close()
        if kind is None:
            self._part.replace(self._path)
        else:
            self._part.unlink(missing_ok=True)
