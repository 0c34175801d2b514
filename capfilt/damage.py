"""What is wrong with a table's files, where they cannot be read: which one it is, and what can be done about it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from deltalake.exceptions import DeltaError

from capfilt.causes import said
from capfilt.errors import DatasetError
from capfilt.remedies import remedy

_ENTRY = re.compile(r"(\d{20})\.json")
_DATA_FILE = re.compile(r"shard=[^'\"]+?\.parquet")
_MOST = 100  # entries, the newest ones: the log has a checkpoint more often


def of_log(fs: Any, table: str) -> str:
    """What is wrong with a Delta table's log, naming the entry; empty where that is not seen.

    Args:
        fs, table: fsspec's file system, and the table's place there.
    """
    folder = f"{table}/_delta_log"
    try:
        names = sorted(path.rsplit("/", 1)[-1] for path in fs.ls(folder, detail=False))
        entries = [found[0] for name in names if (found := _ENTRY.fullmatch(name))][-_MOST:]
        checkpoints = [name for name in names if ".checkpoint." in name]
        numbers = [int(entry.removesuffix(".json")) for entry in entries]
        for before, number in itertools.pairwise(numbers):
            if number != before + 1:
                return f"_delta_log/{before + 1:020d}.json is gone"
        if entries and not checkpoints and numbers[0] > 0 and len(entries) < _MOST:
            return f"_delta_log/{0:020d}.json is gone"
        for entry in reversed(entries):
            try:
                lines = fs.cat_file(f"{folder}/{entry}").decode().splitlines()
                whole = all(isinstance(json.loads(line), dict) for line in lines if line.strip())
            except ValueError:
                whole = False
            if not whole:
                return f"_delta_log/{entry} is damaged: cut short, or overwritten"
    except Exception:  # noqa: BLE001 - every store raises its own; the error that led here is said instead
        return ""
    return ""


@contextmanager
def data_files_blamed(output: str, table: str, version: int) -> Iterator[None]:
    """Raise what Arrow raises of the data files of a table's newest version as a DatasetError that names the file.

    Raises:
        DatasetError: see above.
    """
    try:
        yield
    except (OSError, pa.ArrowException, DeltaError) as error:
        raise DatasetError(of_data(output, table, version, version, error)) from error


def of_data(output: str, table: str, version: int, newest: int, error: Exception) -> str:
    """What was wrong with a data file that could not be read; Arrow's error may have passed through DuckDB.

    Args:
        newest: version of the table. The files of an older one may have gone rightly.
    """
    text = str(error)
    found = _DATA_FILE.search(text)
    file = f"{table}/{found[0]}" if found else "a file of it"
    if isinstance(error, FileNotFoundError) or "No such file or directory" in text:
        what = f"{file} is gone"
    elif isinstance(error, pa.ArrowInvalid) or "Could not open Parquet input" in text:
        what = f"{file} is damaged, and not readable as Parquet"
    else:
        what = said(error)
    todo = "Restore that file; or touch its shard's input and run again, which curates it anew"
    if right := remedy(error):
        todo = f"{right[0].upper()}{right[1:]}"
    elif version < newest:
        todo = "A vacuum deletes the files of older versions; `capfilt status` says which one is the newest"
    return f"{output}: version {version} of the {table} cannot be read: {what}. {todo}"
