"""The files of an export: under another name until all are there, then in their place.

    <output>.incomplete/    while it is written: its files, `_export/` with what is done, at last manifest.json
    <output>/               the same once all is done, without `_export/`
    <output>.lease/         which export writes there, and whether it lives (capfilt.lease); gone once all is done

A local directory is renamed, in one step. An object store has no renaming: its files are moved one by one there,
manifest.json as the last, so that a directory without one is not complete. Either way the next try finds what is left.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import posixpath
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capfilt.errors import DatasetError
from capfilt.inputs import is_local
from capfilt.stores import blamed, connect, persist

MANIFEST = "manifest.json"
PROGRESS = "_export"
"""Of an incomplete export: what was asked for, and of each file that is whole what it holds."""

IMAGES = "images"
"""Of the authors' format, whose image files are not among the manifest's: one a row, in a folder a shard."""

_IMAGE = re.compile(rf"{IMAGES}/\d{{5,}}/\d{{9,}}\.\w+")
LEASE = ".lease"
_SUFFIX = ".incomplete"
_PART = ".part"
_PART_BYTES = 16 * 2**20
_THREADS = 16


@dataclass(frozen=True)
class FileRecord:
    """A file that was written: its path in the export, bytes and sha256 (hex)."""

    path: str
    bytes: int
    sha256: str


class Sink:
    """A file as it is written, for whoever writes to files; it hashes and counts."""

    closed = False

    def __init__(self, file: Any, what: str) -> None:
        self._file, self._what, self.bytes, self._hash = file, what, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        """All of `data`, bytes or a buffer of them.

        Raises:
            StoreError: the store refuses, or keeps failing.
        """
        with blamed(self._what):
            self._file.write(data)
        self._hash.update(data)
        self.bytes += memoryview(data).nbytes
        return memoryview(data).nbytes

    def tell(self) -> int:
        """Bytes so far."""
        return self.bytes

    def flush(self) -> None:
        """Nothing: a file that is not whole is no one's to read."""

    def close(self) -> None:
        """Nothing: the folder closes it."""

    @property
    def sha256(self) -> str:
        """Of the bytes so far."""
        return self._hash.hexdigest()


class Folder:
    """An export's directory on any fsspec URL.

    Args:
        output: where it will lie once complete.
        options: fsspec's storage options.
        check: called before a file gets its name or is removed; raises where another export has taken the output over.
    """

    def __init__(self, output: str, options: Mapping[str, Any], check: Callable[[], None] = lambda: None) -> None:
        self._check = check
        self.output = output.rstrip("/")
        self._fs, self._final = connect(self.output, options, auto_mkdir=True)
        self._final = self._final.rstrip("/")
        self._stage = self._final + _SUFFIX
        self._local = is_local(self._fs)

    # --- before it is complete ---

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[Sink]:
        """A file to write, which is there once the block ends well, and not at all where it does not.

        Raises:
            StoreError: the store refuses, or keeps failing.
        """
        name, what = f"{self._stage}/{path}", f"{self.output}: {path} cannot be written"
        part = Path(f"{name}.{uuid.uuid4().hex}{_PART}")
        with blamed(what):
            if self._local:
                part.parent.mkdir(parents=True, exist_ok=True)
            file = part.open("wb") if self._local else self._fs.open(name, "wb", block_size=_PART_BYTES)
        try:
            yield Sink(file, what)
            self._check()
            with blamed(what):
                file.close()  # an object store shows nothing of it before
                if self._local:
                    part.replace(name)
        except BaseException:
            with contextlib.suppress(Exception):  # every store raises its own kinds; what it keeps no one can read
                file.close() if self._local else file.discard()  # type: ignore[union-attr]  # fsspec's alone
            with contextlib.suppress(OSError, AttributeError):  # some files' `closed` is read-only
                if self._local:
                    part.unlink()
                else:
                    file.closed = True  # type: ignore[misc]  # else fsspec would upload what it holds when collected
            raise

    def put(self, path: str, data: bytes) -> FileRecord:
        """Write a small file."""
        with self.create(path) as sink:
            sink.write(data)
        return FileRecord(path, sink.bytes, sink.sha256)

    def read(self, path: str) -> dict[str, Any] | None:
        """A JSON file of the incomplete export; None where there is none."""
        return self._read(f"{self._stage}/{path}")

    def progress(self) -> set[str]:
        """Names in PROGRESS."""
        return {posixpath.basename(name) for name in self._files(f"{self._stage}/{PROGRESS}")}

    def sweep(self) -> None:
        """Remove the parts of files that a killed try left on a disk; a store shows none."""
        if self._local:
            for part in Path(self._stage).rglob(f"*{_PART}"):
                part.unlink()

    def discard(self) -> None:
        """Remove what an export that will not be completed left: what it has on record before what that tells of."""
        self._check()
        self._discard(f"{self._stage}/{PROGRESS}")
        self._discard(self._stage)

    def _discard(self, name: str) -> None:
        with blamed(f"{self.output}{_SUFFIX}: cannot be removed"), contextlib.suppress(FileNotFoundError):
            persist(lambda: self._fs.rm(name, recursive=True))

    # --- complete ---

    def complete(self) -> dict[str, Any] | None:
        """The manifest of the export that is there.

        Raises:
            DatasetError: something else is there.
        """
        manifest = self._read(f"{self._final}/{MANIFEST}")
        if manifest is None and self._read(f"{self._stage}/{MANIFEST}") is None and self._files(self._final):
            raise DatasetError(
                f"{self.output}: not empty, and no export of capfilt (it has no {MANIFEST}); give another output"
            )
        return manifest

    def settle(self) -> None:
        """Remove what a try left that was killed once all was in its place, its manifest copied and not yet removed."""
        if not self._local:  # a renamed directory leaves nothing
            self.discard()

    def lacking(self, manifest: Mapping[str, Any]) -> str | None:
        """A file that an export should have, and that is neither here nor in its place; None where it is whole."""
        sizes = {**self._sizes(self._final), **self._sizes(self._stage)}  # what is here goes over what is there
        for file in manifest["files"]:
            if sizes.get(file["path"]) != file["bytes"]:
                return str(file["path"])
        images = sum(_is_image(path, manifest) for path in sizes)
        return None if images >= _images(manifest) else f"{_images(manifest) - images:,} files of {IMAGES}/"

    def publish(self, manifest: Mapping[str, Any]) -> None:
        """Put a complete export in its place; `_export/` goes. What a killed try of this left is finished.

        Raises:
            DatasetError: files of it were removed; it stays where it is.
        """
        if lost := self.lacking(manifest):
            raise DatasetError(
                f"{self.output}{_SUFFIX}: {lost} was written and is gone, or has another size; what removed it? Run "
                "again to write it all anew"
            )
        self._check()
        self._discard(f"{self._stage}/{PROGRESS}")
        with blamed(f"{self.output}: cannot be put in its place"):
            if self._local:
                Path(self._stage).rename(self._final)  # also onto an empty directory
                return
            names = self._files(self._stage)
            last = f"{self._stage}/{MANIFEST}"
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(self._move, [name for name in names if name != last]))
            self._move(last)

    def take_back(self, manifest: Mapping[str, Any]) -> None:
        """Remove what a killed try had put in its place of an export that is not wanted any more, or not whole.

        Its manifest stays with the incomplete export till the last: a try that is killed here does it again.
        """
        if self._local:  # in one step, or not at all
            return
        self._check()
        own = {file["path"] for file in manifest["files"]}
        there = self._sizes(self._final)
        moved = [f"{self._final}/{path}" for path in there if path in own or _is_image(path, manifest)]
        if moved:
            with blamed(f"{self.output}: cannot be removed"), contextlib.suppress(FileNotFoundError):
                persist(lambda: self._fs.rm(moved))

    def _move(self, name: str) -> None:
        target = self._final + name.removeprefix(self._stage)
        self._check()

        def move() -> None:
            with contextlib.suppress(FileNotFoundError):  # moved by a try whose answer was lost
                self._fs.mv(name, target)

        persist(move)

    def _read(self, name: str) -> dict[str, Any] | None:
        with blamed(f"{self.output}: cannot be read"):
            try:
                content = json.loads(persist(lambda: self._fs.cat_file(name)))
            except FileNotFoundError:
                return None
            except ValueError as error:
                raise DatasetError(f"{self.output}: {posixpath.basename(name)} is not capfilt's: {error}") from error
        return content if isinstance(content, dict) else {}

    def _sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file of a folder, by its path in there."""
        return {name.removeprefix(f"{folder}/"): size for name, size in self._files(folder).items()}

    def _files(self, folder: str) -> dict[str, int]:
        """Bytes of every file of a folder, by its name, in order."""

        def find() -> dict[str, int]:
            self._fs.invalidate_cache()
            return {name: about["size"] for name, about in sorted(self._fs.find(folder, detail=True).items())}

        with blamed(f"{self.output}: cannot be listed"):
            return persist(find)


def _images(manifest: Mapping[str, Any]) -> int:
    """Files that an export has beside those of its manifest."""
    asked: Mapping[str, Any] = manifest["asked"]
    return int(asked["rows"]) if asked["format"] == "authors" else 0


def _is_image(path: str, manifest: Mapping[str, Any]) -> bool:
    return bool(_images(manifest) and _IMAGE.fullmatch(path))
