"""Write Parquet: one file of one table, on any fsspec URL, in bounded memory."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.inputs import is_local
from capfilt.schema import FILE_SCHEMAS
from capfilt.stores import blamed, connect

_ROW_GROUP_BYTES = 8 * 2**20
"""More costs the kernel's zeroing of fresh memory for every row group: 32 MiB twice the time of 8."""


_PART_BYTES = 16 * 2**20
"""What is held of a file before it is sent to an object store, as a part or, if it is all, as a whole."""


class ParquetWriter:
    """Writes one file of one table, a row group whenever enough has gathered, so that memory stays bounded.

    The file is whole, or it is not readable as Parquet: its footer is written by `close`. An object store shows nothing
    of it until then.

    Args:
        table: a key of schema.FILE_SCHEMAS.
        url: local path or URL of the file; parent directories are made.
        constant: columns with one value in every row; those the table lacks are left out.

    Raises:
        StoreError: the store refuses, or keeps failing.
    """

    def __init__(
        self, table: str, url: str, options: Mapping[str, Any], constant: Mapping[str, Any] | None = None
    ) -> None:
        self.schema = FILE_SCHEMAS[table]
        self._constant = {
            field.name: pa.scalar(constant[field.name], field.type)
            for field in self.schema
            if constant and field.name in constant
        }
        self.rows = 0
        self.size = 0
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        self._fs, self._name = connect(url, options)
        self._local = self._name if is_local(self._fs) else None
        self._what = f"{url}: cannot be written"
        with blamed(self._what):
            self._open()
            try:
                self._writer = self._begin()
            except BaseException:
                self._remove()
                raise

    def _begin(self) -> pq.ParquetWriter:
        """Write the first bytes."""
        plain = [field.name for field in self.schema if field.name != "image"]
        return pq.ParquetWriter(
            self._sink,
            self.schema,
            compression={name: "none" if name == "image" else "zstd" for name in self.schema.names},
            use_dictionary=[name for name in plain if name not in ("row", "image_sha256")],
            write_statistics=plain,
            store_schema=False,
        )

    def _open(self) -> None:
        if self._local:  # arrow's own file: no detour through Python for every page
            os.makedirs(os.path.dirname(self._local), exist_ok=True)
            self._file = self._sink = pa.OSFile(self._local, mode="w")
        else:
            self._file = self._fs.open(self._name, "wb", block_size=_PART_BYTES)
            self._sink = pa.PythonFile(self._file, mode="w")

    def append(self, row: dict[str, Any], size: int) -> None:
        """Add one row, without its constant columns; `size` is about its bytes."""
        if self._pending_bytes + size > _ROW_GROUP_BYTES:
            self._flush()
        self._pending.append(row)
        self._pending_bytes += size
        self.rows += 1

    def write(self, table: pa.Table) -> None:
        """Add rows that are columns already, as one row group; constant columns are set anew."""
        self._flush()
        columns = [
            pa.repeat(self._constant[name], table.num_rows) if name in self._constant else table[name]
            for name in self.schema.names
        ]
        whole = pa.Table.from_arrays(columns, schema=self.schema)
        with blamed(self._what):
            self._writer.write_table(whole)
        self.rows += table.num_rows

    def _flush(self) -> None:
        if self._pending:
            columns = [
                pa.repeat(self._constant[name], len(self._pending))
                if name in self._constant
                else _array([row[name] for row in self._pending], kind)
                for name, kind in zip(self.schema.names, self.schema.types, strict=True)
            ]
            table = pa.Table.from_arrays(columns, schema=self.schema)
            with blamed(self._what):
                self._writer.write_table(table)
        self._pending, self._pending_bytes = [], 0

    def close(self) -> int:
        """Finish the file and return its size in bytes."""
        self._flush()
        with blamed(self._what):
            self._writer.close()
            size: int = self._sink.tell()
            try:
                self._file.close()
            except Exception:  # a store that has the file may yet fail to say so; no other has its name
                if self._local or not self._arrived(size):
                    raise
                self._file.closed = True
        return size

    def _arrived(self, size: int) -> bool:
        self._fs.invalidate_cache()
        try:
            return bool(self._fs.info(self._name)["size"] == size)
        except FileNotFoundError:
            return False

    def abandon(self) -> None:
        """Give the file up: nothing readable is left where the store allows it; vacuum finds the rest.

        Raises nothing, since the error that led here is the one to hear of.
        """
        self._pending = []
        self._writer.is_open = False  # else it would write its footer when collected
        self._remove()

    def _remove(self) -> None:
        with contextlib.suppress(Exception):  # every store raises its own kinds
            self._file.close() if self._local else self._file.discard()
        with contextlib.suppress(OSError, AttributeError):  # some files' `closed` is read-only
            if self._local:
                os.unlink(self._local)
            else:
                self._file.closed = True  # else fsspec would upload what it holds when collected


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """`pa.array`, but for binary values without its growing and copying buffer; together they must fit 2 GiB."""
    if kind != pa.binary() or None in values:
        return pa.array(values, kind)
    offsets = pa.array(itertools.accumulate(map(len, values), initial=0), pa.int32())
    return pa.Array.from_buffers(kind, len(values), [None, offsets.buffers()[1], pa.py_buffer(b"".join(values))])
