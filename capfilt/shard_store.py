"""The output of an ingest: its shards, and the records beside them.

A shard's file is there only when it is whole: it is written elsewhere and moved. So a listing of the output says what
is done, and nothing else is asked.

    <output>/<shard>.parquet        a row for every URL: its image, or what went wrong
    <output>/_ingest/settings.json  what all of them were made with
    <output>/_ingest/report.json    the last run's account
    <output>/_stale/                shards of rows that the lists have no longer, as they were: no reader looks there
    <output>/_attempts/             shards being fetched
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from capfilt.account import Account
from capfilt.errors import DatasetError, SpecError
from capfilt.inputs import Opened, is_local
from capfilt.stores import blamed, connect, persist
from capfilt.url_shards import ShardName

ACCOUNT = b"capfilt.ingest"
"""Key of a shard's own account, in its file's footer."""

STALE, ATTEMPTS = "_stale", "_attempts"
_FOLDER = "_ingest"
_FOOTER_THREADS = 16


class Store:
    """The output of an ingest.

    Raises:
        StoreError: from every method, where the store refuses or keeps failing.
    """

    def __init__(self, output: str, options: Mapping[str, Any]) -> None:
        self.output, self.options = output, options
        self.fs, self.root = connect(output, options)
        self.local = is_local(self.fs)

    def _path(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    # --- shards ---

    def names(self) -> set[ShardName]:
        """Every shard that is there, by the listing."""
        with blamed(f"{self.output}: cannot be listed"):
            self.fs.invalidate_cache()
            entries = persist(lambda: self.fs.ls(self.root, detail=False)) if self.fs.exists(self.root) else []
        parsed = (ShardName.parse(str(entry).rstrip("/").rpartition("/")[2]) for entry in entries)
        return {name for name in parsed if name}

    def shards(self) -> dict[ShardName, Account | None]:
        """Every shard that is there, and its account; None where its file cannot be read as what its name says."""
        names = sorted(self.names())
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            return dict(zip(names, pool.map(self._account, names), strict=True))

    def _account(self, name: ShardName) -> Account | None:
        opened = Opened(f"{self.output}/{name.file}", self.options)
        try:
            with opened as parquet:
                account = Account.from_json(parquet.metadata.metadata[ACCOUNT])
                return account if account.rows == parquet.metadata.num_rows == name.rows else None
        except Exception as error:
            if opened.failed is not None:
                with blamed(f"{self.output}/{name.file}: cannot be read"):
                    raise opened.failed from error
            return None  # cut short, or another's

    def publish(self, local: str, name: ShardName) -> None:
        """Make a file that is whole the shard's own, at once."""
        with blamed(f"{self.output}: cannot be written"):
            if self.local:
                Path(local).replace(self._path(name.file))
            else:  # which shows nothing of it before all of it has come
                persist(lambda: self.fs.put_file(local, self._path(name.file)))

    def retire(self, names: Iterable[ShardName]) -> None:
        """Move shards to `_stale/`."""
        with blamed(f"{self.output}: cannot be written"):
            for name in names:
                self.fs.makedirs(self._path(STALE), exist_ok=True)
                persist(lambda name=name: self.fs.mv(self._path(name.file), self._path(STALE, name.file)))  # type: ignore[misc]

    def clear_attempts(self) -> None:
        """Remove what killed runs left; for whoever holds the output alone."""
        with blamed(f"{self.output}: cannot be written"):
            self.fs.makedirs(self.root, exist_ok=True)
            if self.fs.exists(self._path(ATTEMPTS)):
                self.fs.rm(self._path(ATTEMPTS), recursive=True)

    # --- records ---

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Make sure that what is there was made with these settings; nothing being there is fine.

        Raises:
            SpecError: naming each that differs.
            DatasetError: the record cannot be read.
        """
        before = self._read("settings.json")
        if before is None:
            return
        now = json.loads(json.dumps(settings))
        differ = [
            f"{name} was {was!r} and is {now.get(name)!r}" for name, was in before.items() if was != now.get(name)
        ]
        if differ:
            raise SpecError(
                f"{self.output}: its shards were made with other settings: {'; '.join(differ)}. Set these back, or "
                "give another output"
            )

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a record."""
        text = json.dumps(value, indent=1, sort_keys=True).encode()
        with blamed(f"{self.output}: cannot be written"):
            self.fs.makedirs(self._path(_FOLDER), exist_ok=True)
            temporary = self._path(_FOLDER, f".{name}") if self.local else self._path(_FOLDER, name)
            persist(lambda: self.fs.pipe_file(temporary, text))
            if self.local:
                Path(temporary).replace(self._path(_FOLDER, name))

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._path(_FOLDER, name)
        with blamed(f"{self.output}: cannot be read"):
            try:
                text = persist(lambda: self.fs.cat_file(path))
            except FileNotFoundError:
                return None
        try:
            value: dict[str, Any] = json.loads(text)
        except ValueError:
            raise DatasetError(
                f"{self.output}/{_FOLDER}/{name}: not readable; remove it, or give another output"
            ) from None
        return value
