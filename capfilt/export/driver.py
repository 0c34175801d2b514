"""An export from start to end: cut, write what is not yet written, put on record, put in place."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from rich.console import Console

from capfilt.dataset import CuratedDataset
from capfilt.errors import DatasetError
from capfilt.export.authors import Authors
from capfilt.export.card import card
from capfilt.export.choice import Choice
from capfilt.export.folder import LEASE, MANIFEST, PROGRESS, FileRecord, Folder
from capfilt.export.litdata import LitData
from capfilt.export.manifest import Written, asked, files, refuse_another, totals
from capfilt.export.mds import Mds
from capfilt.export.parquet import Parquet
from capfilt.export.shards import Example, Shard, cut, in_order, read_examples, row_groups
from capfilt.export.webdataset import WebDataset
from capfilt.lease import Lease
from capfilt.spec import ExportSpec
from capfilt.terminal import counted, say

SAY_SECONDS = 20.0
"""Between two lines on how far it has come."""

_ASKED = f"{PROGRESS}/asked.json"


class Format(Protocol):
    """Writes the files of an export."""

    def write(self, shard: int, batches: Iterable[list[Example]], folder: Folder) -> list[FileRecord]:
        """Write one shard; called from several threads. What it writes depends on the rows alone."""
        ...

    def finish(self, written: list[list[FileRecord]], rows: list[int], folder: Folder) -> list[FileRecord]:
        """Write what comes after all shards, given their files and rows."""
        ...

    @property
    def usage(self) -> str:
        """How it is read, in Markdown."""
        ...


@dataclass
class ExportSummary:
    """What an export did.

    Attributes:
        version: of the pairs.
        files: of the export, README.md included.
        resumed: shards that an earlier try had written.
        nothing: the output held this export already.
    """

    output: str
    version: int = 0
    rows: int = 0
    files: int = 0
    bytes: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    resumed: int = 0
    nothing: bool = False
    elapsed: float = 0.0


def export(spec: ExportSpec, console: Console | None = None) -> ExportSummary:
    """Write one version of a dataset; again, it resumes, or finds that all is there.

    Raises:
        ConflictError: another export writes to the output, or took it over.
        DatasetError: there is no such dataset or version, or it has no rows; the output holds something else; or files
            that an earlier try wrote are gone.
        InputError: a file of the dataset cannot be read.
        SpecError: the format needs a package that is not installed.
        StoreError: the output cannot be written.
    """
    begin, console = time.monotonic(), console or Console(stderr=True)
    planned, at = _planned(spec), (spec.output.rstrip("/"), spec.output_options)
    lease = Lease(*at, "export", say=lambda line: say(f"capfilt: {line}", console), at=LEASE)
    if (summary := _done(spec, planned, Folder(*at))) is None:
        with lease:
            folder = Folder(*at, lease.check)
            summary = _done(spec, planned, folder) or _export(spec, planned, folder, console)  # or another's, by now
        summary = replace(summary, elapsed=time.monotonic() - begin)
    lease.forget()
    return summary


def _done(spec: ExportSpec, planned: _Planned, folder: Folder) -> ExportSummary | None:
    """A summary, if the output holds this export."""
    if (there := folder.complete()) is None:
        return None
    refuse_another(there, planned.wanted, spec.output)
    folder.settle()
    return _summary(there, spec.output, nothing=True)


def _export(spec: ExportSpec, planned: _Planned, folder: Folder, console: Console) -> ExportSummary:
    dataset, shards, wanted = planned
    manifest = folder.read(MANIFEST)
    resumed = 0
    if manifest is not None and (manifest["asked"] != wanted or folder.lacking(manifest)):
        folder.take_back(manifest)  # of another export, or not whole, it broke off while it was put in its place
        folder.discard()
        manifest = None
    if manifest is None:
        written, resumed = _write(spec, shards, wanted, folder, console)
        manifest = _put_on_record(spec, dataset, wanted, written, folder)
    folder.publish(manifest)
    return _summary(manifest, spec.output, resumed=resumed)


def look(spec: ExportSpec) -> Iterator[str]:
    """What a look at the dataset and the output finds, in lines; writes nothing.

    Raises:
        CapfiltError: as :func:`export` does before it writes.
    """
    _, shards, wanted = _planned(spec)
    make_format(spec, len(shards))
    yield f"dataset {spec.dataset}: version {wanted['version']} of its pairs, {counted(wanted['rows'], 'row')}"
    there = Folder(spec.output, spec.output_options).complete()
    if there is not None:
        refuse_another(there, wanted, spec.output)
    yield f"{counted(len(shards), 'file')} of format {spec.format}" + (
        ": all there" if there is not None else " to write"
    )


class _Planned(NamedTuple):
    """The dataset as of the version, what it is cut into, and what determines the export."""

    dataset: CuratedDataset
    shards: list[Shard]
    wanted: dict[str, Any]


def _planned(spec: ExportSpec) -> _Planned:
    dataset = CuratedDataset.for_reading(spec.dataset, spec.storage_options)
    number, groups = row_groups(dataset, spec.version, spec.storage_options)
    shards = cut(groups, spec.shard_bytes, spec.shard_rows)
    if not shards:
        raise DatasetError(f"{spec.dataset}: version {number} of its pairs has no rows; there is nothing to export")
    return _Planned(dataset.as_of(number), shards, asked(spec, number, shards))


def _summary(manifest: dict[str, Any], output: str, **more: Any) -> ExportSummary:
    files, was = manifest["files"], manifest["asked"]
    size = sum(one["bytes"] for one in files)
    return ExportSummary(output, was["version"], was["rows"], len(files), size, manifest["sources"], **more)


# --- writing ---


def make_format(spec: ExportSpec, shards: int) -> Format:
    """The writer of the spec's format.

    Raises:
        SpecError: it needs a package that is not installed.
    """
    all_texts = spec.text == "all"
    match spec.format:
        case "webdataset":
            return WebDataset(shards, all_texts)
        case "parquet" | "huggingface":
            return Parquet(shards, all_texts, hub=spec.format == "huggingface")
        case "authors":
            return Authors(shards, all_texts)
        case "mds":
            return Mds(shards, all_texts)
        case "litdata":
            return LitData(shards, all_texts)


def _write(
    spec: ExportSpec, shards: Sequence[Shard], wanted: dict[str, Any], folder: Folder, console: Console
) -> tuple[list[Written], int]:
    """Write every shard that an earlier try of the same export did not; (all of them, those that it did)."""
    if folder.read(_ASKED) != wanted:
        folder.discard()
        folder.put(_ASKED, json.dumps(wanted).encode())
    folder.sweep()
    done: dict[int, Written] = {}
    names = folder.progress()
    for shard in shards:
        if _progress(shard.number).rpartition("/")[2] in names and (found := folder.read(_progress(shard.number))):
            done[shard.number] = Written.from_json(found)
    resumed, said = len(done), time.monotonic()
    writer = make_format(spec, len(shards))
    for shard, one in _written(spec, [shard for shard in shards if shard.number not in done], writer, folder):
        done[shard.number] = one
        if time.monotonic() - said >= SAY_SECONDS:
            said = time.monotonic()
            rows = sum(one.rows for one in done.values())
            of = counted(wanted["rows"], "row")
            say(f"capfilt: {rows:,} of {of}, {len(done):,} of {counted(len(shards), 'file')}", console)
    written = [done[shard.number] for shard in shards]
    for before, after in itertools.pairwise(written):
        in_order(before.last, after.first, spec.dataset)
    return written, resumed


def _written(
    spec: ExportSpec, shards: Sequence[Shard], writer: Format, folder: Folder
) -> Iterator[tuple[Shard, Written]]:
    """Shards as they are written, `spec.writers` at a time; where one fails, or is interrupted, the others stop."""
    stop = threading.Event()
    waiting = iter(shards)
    running: dict[Future[Written], Shard] = {}
    with ThreadPoolExecutor(spec.writers) as pool:
        try:
            while True:
                while len(running) < spec.writers and (shard := next(waiting, None)):
                    running[pool.submit(_write_shard, spec, shard, writer, folder, stop)] = shard
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            stop.set()


class _StoppedError(Exception):
    """Another shard failed, or the export was interrupted."""


def _write_shard(spec: ExportSpec, shard: Shard, writer: Format, folder: Folder, stop: threading.Event) -> Written:
    sources: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    places: list[tuple[str, int]] = []

    def batches() -> Iterator[list[Example]]:
        choice = Choice(spec.text, spec.web_probability, spec.seed)
        for batch in read_examples(shard, spec.storage_options, choice):
            if stop.is_set():
                raise _StoppedError
            sources.update(example.chosen.source for example in batch)
            formats.update(example.format for example in batch)
            ends = [(example.shard, example.row) for example in (batch[0], batch[-1])]
            places[:] = [places[0], ends[1]] if places else ends
            yield batch

    files = writer.write(shard.number, batches(), folder)
    if (rows := sum(sources.values())) != shard.rows:
        raise DatasetError(f"{spec.dataset}: {rows} rows read of {shard.rows}; another tool rewrites it; export again")
    first, last = places
    one = Written(rows, tuple(files), dict(sorted(sources.items())), dict(sorted(formats.items())), first, last)
    folder.put(_progress(shard.number), json.dumps(asdict(one)).encode())
    return one


def _progress(shard: int) -> str:
    return f"{PROGRESS}/{shard:06d}.json"


def _put_on_record(
    spec: ExportSpec, dataset: CuratedDataset, wanted: dict[str, Any], written: Sequence[Written], folder: Folder
) -> dict[str, Any]:
    """Write what comes after the shards: the format's own, README.md, and the manifest as the last."""
    writer = make_format(spec, len(written))
    more = writer.finish([list(one.files) for one in written], [one.rows for one in written], folder)
    manifest: dict[str, Any] = {"asked": wanted, **totals(written)}
    more.append(folder.put("README.md", card(spec, dataset, manifest, writer.usage).encode()))
    manifest["files"] = files(written, more)
    folder.put(MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest
