"""A person's marks: which texts are right or wrong of their images, in a Parquet file that `kind: evaluate` reads.

One row for each text marked; to evaluate (capfilt.truth.read_labels) the first three columns are what counts:

    image_sha256  text    of the image's bytes, hex
    text          text    as the tables have it; alike after clean-up (capfilt.text.clean) is the same
    true          boolean whether the text is true of the image
    shard, row            the row that it was marked in
    source, captioner     of the text: web or synthetic, and the model card's name
    version       int64   of the annotations
    drawn         text    how the row was come upon: `random`, or the search that found it
    marked_by     text    who
    marked_at     timestamp, UTC

A mark that is changed replaces the one before it, one that is taken back goes. Every change is a whole new file under
the old name, on disk before the answer is given. Two programs may write to one file: each first takes in what the other
wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import threading
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.errors import InputError, StoreError
from capfilt.spec import Input
from capfilt.stores import one_line
from capfilt.text import clean
from capfilt.truth import read_labels

MARKS_SCHEMA = pa.schema(
    [
        pa.field("image_sha256", pa.string()),
        pa.field("text", pa.string()),
        pa.field("true", pa.bool_()),
        pa.field("shard", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("source", pa.string()),
        pa.field("captioner", pa.string()),
        pa.field("version", pa.int64()),
        pa.field("drawn", pa.string()),
        pa.field("marked_by", pa.string()),
        pa.field("marked_at", pa.timestamp("us", tz="UTC")),
    ]
)

Key = tuple[str, str]
"""An image's sha256 and a text after clean-up: what labels are known by."""


class Marks:
    """The marks in one local file, which is made with the first of them. For use from several threads.

    Raises:
        InputError: there is a file and it holds no labels, or more than marks.
    """

    def __init__(self, path: str) -> None:
        if "://" in path:
            raise InputError(f"{path}: marks are kept in a file of this machine; give a local path")
        self.path = os.path.abspath(path)
        if not os.path.isdir(os.path.dirname(self.path)):
            raise InputError(f"{path}: its directory does not exist; make it, or give another file")
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] | None = None
        self._marks: dict[Key, dict[str, Any]] = {}
        with self._lock:
            self._look()

    def verdict(self, sha256: str | None, text: str | None) -> bool | None:
        """Whether a text was marked right of an image; None where it was not marked."""
        mark = self._marks.get(_key(sha256, text)) if sha256 and text else None
        return None if mark is None else mark["true"]

    def rows(self) -> list[tuple[str, int]]:
        """(shard, row) of the rows that marks were made in."""
        places = ((mark["shard"], mark["row"]) for mark in list(self._marks.values()))
        return sorted({(shard, row) for shard, row in places if shard is not None and row is not None})

    def counts(self) -> dict[str, int]:
        """Texts marked right and wrong."""
        verdicts = [mark["true"] for mark in list(self._marks.values())]
        return {"right": sum(verdicts), "wrong": len(verdicts) - sum(verdicts)}

    def mark(self, sha256: str, text: str, verdict: bool | None, about: Mapping[str, Any]) -> None:
        """Mark a text of an image, or with None take its mark back. Durable once this returns.

        Args:
            about: the other columns, but for who and when.

        Raises:
            InputError: the file is not a label file any more.
            StoreError: it cannot be written.
        """
        with self._lock, self._alone():
            self._look()
            marks = dict(self._marks)
            if verdict is None:
                marks.pop(_key(sha256, text), None)
            else:
                mine = {"image_sha256": sha256, "text": text, "true": verdict, **about}
                marks[_key(sha256, text)] = {**mine, "marked_by": _who(), "marked_at": datetime.now(UTC)}
            self._write(marks)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other processes that write marks waiting."""
        folder, name = os.path.split(self.path)
        with _blamed(self.path), open(os.path.join(folder, f".{name}.lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _look(self) -> None:
        """Take in the file as it is now."""
        try:
            stat = os.stat(self.path)  # noqa: PTH116
        except FileNotFoundError:
            self._marks, self._seen = {}, None
            return
        seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if seen == self._seen:
            return
        read_labels(Input(paths=(self.path,)))
        with pq.ParquetFile(self.path) as file:  # read_table opens it twice, and another may come between
            table = file.read()
        if others := sorted(set(table.schema.names) - set(MARKS_SCHEMA.names)):
            raise InputError(
                f"{self.path}: has columns that marks have not, {', '.join(others)}, and would lose them; give --marks "
                "another file: evaluate takes several"
            )
        rows = [{**dict.fromkeys(MARKS_SCHEMA.names), **row} for row in table.to_pylist()]
        whole = [row for row in rows if None not in (row["image_sha256"], row["text"], row["true"])]
        self._marks, self._seen = {_key(row["image_sha256"], row["text"]): row for row in whole}, seen

    def _write(self, marks: dict[Key, dict[str, Any]]) -> None:
        folder, name = os.path.split(self.path)
        fresh = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
        with _blamed(self.path):
            try:
                with open(fresh, "xb") as file:
                    pq.write_table(pa.Table.from_pylist(list(marks.values()), MARKS_SCHEMA), file)
                    file.flush()
                    os.fsync(file.fileno())
                Path(fresh).replace(self.path)
            except BaseException:
                Path(fresh).unlink(missing_ok=True)
                raise
            _sync(folder)
        stat = os.stat(self.path)  # noqa: PTH116
        self._marks, self._seen = marks, (stat.st_ino, stat.st_mtime_ns, stat.st_size)


def _key(sha256: str, text: str) -> Key:
    return sha256.lower(), clean(text)


def _sync(folder: str) -> None:
    """Put a directory's names on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _blamed(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}: the mark cannot be written: {one_line(error)}. Earlier marks are kept") from error


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user on this machine, as in some containers
        return str(os.getuid())
