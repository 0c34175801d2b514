"""What a worker hands back for a fragment, and its durable copy.

A receipt says which files hold a run of rows and what became of them. The worker stores it beside the dataset as its
last act, so a driver that dies costs at most the fragments in flight: the next one adopts the receipts of what was
finished and not yet committed. A shard is committed when its receipts cover all its rows.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from capfilt.dataset import DIRECTORIES, Counts, DataFile, Provenance, ShardCommit
from capfilt.fingerprints import without_withdrawn
from capfilt.inputs import is_local
from capfilt.plan import Stage
from capfilt.schema import ANNOTATIONS, PAIRS, QUARANTINE
from capfilt.stores import blamed, connect, persist

RECEIPTS = "_runs/receipts"
_RUN = re.compile(r"\.([^./]+)\.json(?:\.tmp)?$")


class Receipt(BaseModel):
    """What became of rows [start, stop) of a shard of `file_rows` rows.

    Attributes:
        counts: rows kept, dropped and in error; they sum to `rows` unless the fragment failed.
        reasons: rows by reason, and texts by `web:` or `synthetic:` and reason or `kept`.
        seconds: by stage, summed over threads.
        stage: at which the shard restarted.
        captions: that captioners wrote for it.
        images: whose bytes were read from the input.
        copied: images whose bytes were copied from an earlier pairs file.
        on_models: when its first batch met the models and its last one left them, in seconds of the worker's machine
            since its start; none if no row came so far.
        failure: why the fragment could not be read at all just now; then nothing was written, and its shard is left for
            another run.
        worker: host and process id.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: str
    start: int
    stop: int
    file_rows: int
    provenance: Provenance
    counts: Counts = Counts()
    annotations: tuple[DataFile, ...] = ()
    pairs: tuple[DataFile, ...] = ()
    quarantine: tuple[DataFile, ...] = ()
    reasons: dict[str, int] = {}
    stage: Stage = Stage.CAPTION
    captions: int = 0
    images: int = 0
    copied: int = 0
    seconds: dict[str, float] = {}
    on_models: tuple[float, float] | None = None
    failure: str | None = None
    worker: str = ""

    @property
    def rows(self) -> int:
        """Rows covered."""
        return self.stop - self.start

    def same_work(self, other: Provenance, *, any_withdrawn: bool = False) -> bool:
        """Whether `other`, of another run, would produce the same rows; or might, but for those that are withdrawn."""
        mine = replace(self.provenance, run=other.run)
        if any_withdrawn and without_withdrawn(mine.decide_fingerprint) == without_withdrawn(other.decide_fingerprint):
            mine = replace(mine, decide_fingerprint=other.decide_fingerprint)
        return mine == other


def shard_commit(receipts: Sequence[Receipt]) -> ShardCommit:
    """Join the receipts that cover one shard.

    Raises:
        ValueError: they leave a gap, overlap, or belong to different work.
    """
    receipts = sorted(receipts, key=lambda r: (r.start, r.stop))
    first = receipts[0]
    position = 0
    for receipt in receipts:
        if receipt.start != position or receipt.shard != first.shard or not receipt.same_work(first.provenance):
            raise ValueError(f"shard {first.shard}: receipts do not cover it exactly at row {position}")
        position = receipt.stop
    if position != first.file_rows:
        raise ValueError(f"shard {first.shard}: receipts end at row {position} of {first.file_rows}")
    return ShardCommit(
        shard=first.shard,
        rows=first.file_rows,
        counts=sum((r.counts for r in receipts), Counts()),
        provenance=receipts[-1].provenance,
        annotations=tuple(file for r in receipts for file in r.annotations),
        pairs=tuple(file for r in receipts for file in r.pairs),
        quarantine=tuple(file for r in receipts for file in r.quarantine),
    )


# --- the durable copy ---


def store(receipt: Receipt, output: str, options: Mapping[str, Any]) -> None:
    """Write a receipt under the output; it is there whole or not at all.

    Raises:
        StoreError: the store refuses, or keeps failing.
    """
    fs, root = connect(output, options)
    directory = f"{root}/{RECEIPTS}/{receipt.shard}"
    run = receipt.provenance.run
    name = f"{directory}/{receipt.start:09d}-{receipt.stop:09d}-{uuid.uuid4().hex[:8]}.{run}.json"
    text = receipt.model_dump_json().encode()
    with blamed(f"{output}/{RECEIPTS}/{receipt.shard}: cannot be written"):
        if is_local(fs):
            _store_locally(directory, name, text)
        else:
            persist(lambda: fs.pipe_file(name, text))


def _store_locally(directory: str, name: str, text: bytes) -> None:
    for last in (False, False, True):
        os.makedirs(directory, exist_ok=True)
        try:
            with open(f"{name}.tmp", "wb") as file:
                file.write(text)
        except FileNotFoundError:  # another run, at its end, has just removed the empty folder
            if last:
                raise
        else:
            Path(f"{name}.tmp").replace(name)
            return


def adopt(
    output: str, options: Mapping[str, Any], wanted: Mapping[str, Provenance], closed: Container[str]
) -> dict[str, list[Receipt]]:
    """Find finished, uncommitted work of earlier runs.

    Args:
        wanted: the work to do, by shard; `run` is ignored.
        closed: runs whose files a vacuum may have taken.

    Returns:
        By shard, receipts in order of rows that do the wanted work, do not overlap, and whose files are all there.
        Which rows they take for withdrawn is for the caller to compare: see :meth:`Receipt.same_work`.

    Raises:
        StoreError: the store keeps failing.
    """
    fs, root, stored = _stored(output, options)
    names = [n for n in stored if n.endswith(".json") and n.split("/")[-2] in wanted]
    with blamed(f"{output}/{RECEIPTS}: cannot be read"), ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda name: persist(lambda: _load(fs, root, name, wanted, closed)), sorted(names)))
    adopted: dict[str, list[Receipt]] = {}
    for receipt in sorted((r for r in found if r is not None), key=lambda r: (r.shard, r.start, -r.stop)):
        taken = adopted.setdefault(receipt.shard, [])
        if taken and (receipt.start < taken[-1].stop or receipt.stop <= taken[-1].stop):  # the latter: of no rows
            continue
        if taken and receipt.file_rows != taken[-1].file_rows:
            continue
        taken.append(receipt)
    return adopted


def _load(fs: Any, root: str, name: str, wanted: Mapping[str, Provenance], closed: Container[str]) -> Receipt | None:
    """A stored receipt that does the wanted work and whose files are whole, else None: then the work is done again."""
    try:
        receipt = Receipt.model_validate_json(fs.cat_file(name))
        own = wanted[receipt.shard]
        if receipt.provenance.run in closed or not receipt.same_work(own, any_withdrawn=True):
            return None
        if sum(file.kept for file in receipt.annotations) != receipt.counts.kept:  # an older version did not count them
            return None
        for table, files in (
            (ANNOTATIONS, receipt.annotations),
            (PAIRS, receipt.pairs),
            (QUARANTINE, receipt.quarantine),
        ):
            for file in files:
                if fs.info(f"{root}/{DIRECTORIES[table]}/{file.path}")["size"] != file.size:
                    return None
    except (FileNotFoundError, ValidationError):
        return None
    return receipt


def _stored(output: str, options: Mapping[str, Any]) -> tuple[Any, str, list[str]]:
    """The output's file system, its name there, and the names of all that lies among its receipts, as it is now."""
    fs, root = connect(output, options)

    def names() -> list[str]:
        fs.invalidate_cache()
        found: list[str] = fs.find(f"{root}/{RECEIPTS}")
        return found

    with blamed(f"{output}/{RECEIPTS}: cannot be listed"):
        return fs, root, persist(names)


def gaps(receipts: Sequence[Receipt], rows: int) -> list[tuple[int, int]]:
    """The runs of rows of [0, rows) that ordered, non-overlapping receipts leave to do."""
    edges = [0, *(edge for r in receipts for edge in (r.start, r.stop)), rows]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def unfinished(output: str, options: Mapping[str, Any]) -> bool:
    """Whether receipts are stored, or the folders that held them: an earlier run did not come to its end."""
    fs, root, names = _stored(output, options)
    return bool(names) or (is_local(fs) and Path(f"{root}/{RECEIPTS}").is_dir())


def discard(output: str, options: Mapping[str, Any], closed: Container[str]) -> None:
    """Remove the stored receipts of closed runs, whose files may be gone, and whatever is no receipt at all."""
    fs, root, names = _stored(output, options)
    runs = {name: _RUN.search(name) for name in names}
    if doomed := [name for name, run in runs.items() if run is None or run[1] in closed]:
        with blamed(f"{output}/{RECEIPTS}: cannot be deleted"):
            persist(lambda: fs.rm(doomed))
    if is_local(fs):
        folder = Path(f"{root}/{RECEIPTS}")
        for empty in [*folder.glob("*"), folder]:
            with contextlib.suppress(OSError):  # another run's receipt is in it, or has just been put there
                empty.rmdir()
