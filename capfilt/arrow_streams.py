"""Arrow IPC, as Hugging Face's `save_to_disk` writes it (`data-00000-of-00001.arrow`): where its record batches are.

A stream has no index, so the messages' heads are read one after another (Arrow's columnar format, "encapsulated message
format"); their bodies are skipped. A file of Arrow's file format holds such a stream after 8 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

_MAGIC = b"ARROW1"
_CONTINUES = 0xFFFFFFFF
_LARGEST_HEAD = 64 * 2**20
_DICTIONARY, _BATCH = 2, 3


class _BreaksOffError(Exception):
    """The stream does not go on as it should."""


@dataclass(frozen=True, slots=True)
class Stream:
    """What a stream says of itself.

    Attributes:
        rows, offsets: of each record batch. A stream that breaks off has a last one of one row, for what is lost: how
            many it was no one can tell.
    """

    schema: pa.Schema
    rows: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Message:
    kind: int
    offset: int
    end: int
    rows: int


def index(file: Any, size: int) -> Stream:
    """Find the record batches.

    Args:
        file: seeks and reads.
        size: of the file, in bytes.

    Raises:
        pa.ArrowInvalid: it is no Arrow stream, or has columns that are read with dictionaries.
    """
    schema = read_schema(file)
    rows: list[int] = []
    offsets: list[int] = []
    messages = _messages(file, size)
    try:
        for message in messages:
            if message.kind == _DICTIONARY:
                raise pa.ArrowNotImplementedError("it has dictionary-encoded columns: rewrite it without")
            if message.kind == _BATCH:
                rows.append(message.rows)
                offsets.append(message.offset)
                if message.end > size:  # its rows are those that are lost
                    break
    except _BreaksOffError:
        rows.append(1)
        offsets.append(size)
    return Stream(schema, tuple(rows), tuple(offsets))


def read_schema(file: Any) -> pa.Schema:
    """The stream's schema, which comes first.

    Raises:
        pa.ArrowInvalid: it is none.
    """
    file.seek(_begin(file))
    return pa.ipc.read_schema(_read_message(file))


def read_batch(file: Any, offset: int, schema: pa.Schema, rows: int) -> pa.RecordBatch:
    """The record batch at an offset.

    Raises:
        pa.ArrowInvalid, OSError: it is not whole, or does not have so many rows.
    """
    file.seek(offset)
    try:
        batch = pa.ipc.read_record_batch(_read_message(file), schema)
        batch.validate(full=True)
    except EOFError as error:
        raise pa.ArrowInvalid(f"the stream ends at byte {offset:,} without an end mark ({error})") from error
    if batch.num_rows != rows:
        raise pa.ArrowInvalid(f"the record batch at byte {offset:,} has {batch.num_rows:,} rows of {rows:,}")
    return batch


def _read_message(file: Any) -> Any:
    """The message that begins where the file stands."""
    return pa.ipc.read_message(file if isinstance(file, pa.NativeFile) else pa.PythonFile(file, mode="r"))


def _begin(file: Any) -> int:
    file.seek(0)
    return 8 if file.read(len(_MAGIC)) == _MAGIC else 0


def _messages(file: Any, size: int) -> Iterator[_Message]:
    """Heads of all messages.

    Raises:
        _BreaksOffError: before its end mark.
    """
    offset = _begin(file)
    while True:
        file.seek(offset)
        start = file.read(8)
        if len(start) < 8:
            raise _BreaksOffError
        marker, length = struct.unpack("<II", start)
        if marker != _CONTINUES or length > _LARGEST_HEAD:
            raise _BreaksOffError
        if length == 0:  # the end mark
            return
        head = file.read(length)
        try:
            kind, rows, body = _head(head)
        except (struct.error, ValueError):
            raise _BreaksOffError from None
        end = offset + 8 + length + body
        yield _Message(kind, offset, end, rows)
        if end > size:
            raise _BreaksOffError
        offset = end


def _head(head: bytes) -> tuple[int, int, int]:
    """(kind, rows of a record batch, bytes of the body) of a message's flatbuffer.

    Raises:
        struct.error, ValueError: it is none.
    """
    (table,) = struct.unpack_from("<I", head)
    kind = _scalar(head, table, 1, "<B")
    body = _scalar(head, table, 3, "<q")
    rows = 0
    if kind == _BATCH:
        at = _place(head, table, 2)
        rows = _scalar(head, at + struct.unpack_from("<I", head, at)[0], 0, "<q")
    if body < 0 or rows < 0:
        raise ValueError("less than nothing")
    return kind, rows, body


def _place(data: bytes, table: int, number: int) -> int:
    """Where the n-th field of a flatbuffer's table stands; 0 where it has its default."""
    (back,) = struct.unpack_from("<i", data, table)
    vtable = table - back
    if vtable < 0:
        raise ValueError("no table")
    (size,) = struct.unpack_from("<H", data, vtable)
    if size <= 4 + 2 * number:
        return 0
    (offset,) = struct.unpack_from("<H", data, vtable + 4 + 2 * number)
    return table + offset if offset else 0


def _scalar(data: bytes, table: int, number: int, kind: str) -> int:
    at = _place(data, table, number)
    value: int = struct.unpack_from(kind, data, at)[0] if at else 0
    return value
