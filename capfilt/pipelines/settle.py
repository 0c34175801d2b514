"""What is on record of all rows, to find copies among them: the part of that which reads. Loads neither torch nor ray.

It is done once all shards are decided. What it finds makes those shards stale whose decide fingerprint says otherwise;
they are decided anew like any other. A dataset of which nothing was committed since is settled, and not read again.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.dataset import CuratedDataset
from capfilt.duplicates import NO_URL, Candidates, Found, find_copies
from capfilt.inputs import InputFile
from capfilt.perceptual import SIZE
from capfilt.pipelines.job import Job
from capfilt.plan import why_stale
from capfilt.schema import COPIES, SHARD, Status
from capfilt.spec import CurateSpec, Duplicates

_DIGEST = 16  # bytes of a sha256 that are held of every row


def unsettled(spec: CurateSpec) -> bool:
    """Whether a run has to look for copies though it may have nothing else to do."""
    return spec.duplicates is not None and not CuratedDataset.settled_in(spec.output, spec.output_options)


def look_for_copies(
    dataset: CuratedDataset, job: Job, files: Sequence[InputFile], failures: Container[str]
) -> tuple[Found, list[InputFile]]:
    """Find the copies among the rows of a dataset.

    Args:
        files: the inputs. Rows of shards that are of none of these, or not up to date, stay what they are.
        failures: paths of those that could not be read.

    Returns:
        The copies, and the files of the shards to be decided anew.
    """
    committed, rules = dataset.committed(), job.spec.duplicates or Duplicates()
    can_change = {
        file.shard: file
        for file in files
        if file.path not in failures and why_stale(file, job.fingerprints, committed.get(file.shard)) is None
    }
    found = find_copies(read_candidates(dataset, sorted(committed), can_change, rules), rules)
    decided = {shard: committed[shard].provenance.decide_fingerprint for shard in can_change}
    return found, [
        file for shard, file in can_change.items() if found.fingerprint(shard, decided[shard]) != decided[shard]
    ]


def read_candidates(
    dataset: CuratedDataset, shards: Sequence[str], can_change: Container[str], rules: Duplicates
) -> Candidates:
    """The rows that are kept and, in shards that can change, those that would be."""
    columns = [SHARD, "row", "generation", "image_sha256", "status", "reason"]
    columns += ["url"] if rules.max_per_url else []
    columns += ["perceptual_hash"] if rules.near_bits is not None else []
    # Nothing is asked of `reason` here: deltalake takes a file of dropped rows alone for one without any reason.
    candidates, copies = pc.field("status") != Status.ERROR, pa.array([str(reason) for reason in COPIES])
    names, fixed_S = pa.array(shards, pa.string()), np.array([shard not in can_change for shard in shards], bool)
    table = dataset.annotations()
    none = pa.RecordBatch.from_pylist([], pa.schema([table.schema.field(name) for name in columns]))
    parts: dict[str, list[Any]] = defaultdict(list)
    for found_here in itertools.chain([none], table.to_batches(columns=columns, filter=candidates)):
        matched = pc.or_(pc.equal(found_here["status"], Status.KEPT), pc.is_in(found_here["reason"], copies))
        ours = pc.is_in(found_here[SHARD].cast(pa.string()), names)  # what others rewrote is pending
        batch = found_here.filter(pc.and_(matched, ours))
        shard_R = pc.index_in(batch[SHARD].cast(pa.string()), names).to_numpy(zero_copy_only=False).astype(np.int64)
        settled_R = fixed_S[shard_R] if len(batch) else np.empty(0, bool)
        found = {"shard_R": shard_R, "settled_R": settled_R, **_columns(batch, rules)}
        taken_R = ~settled_R | pc.equal(batch["status"], Status.KEPT).to_numpy(zero_copy_only=False)
        for name, values_R in found.items():
            parts[name].append(values_R[taken_R])
    return Candidates(shards, **{name: np.concatenate(arrays) for name, arrays in parts.items()})


def _columns(batch: pa.RecordBatch, rules: Duplicates) -> dict[str, Any]:
    """What Candidates says of the rows of a batch, but for their shards."""
    digests = b"".join(bytes.fromhex(sha256)[:_DIGEST] for sha256 in batch["image_sha256"].to_pylist())
    found = {
        "row_R": batch["row"].to_numpy(zero_copy_only=False),
        "generation_R": batch["generation"].to_numpy(zero_copy_only=False),
        "sha256_R": np.frombuffer(digests, f"V{_DIGEST}"),
        "url_R": np.full(len(batch), NO_URL, np.uint64),
    }
    if rules.max_per_url:
        urls = (url and hashlib.blake2b(url.encode(), digest_size=8).digest() for url in batch["url"].to_pylist())
        found["url_R"] = np.frombuffer(b"".join(url or bytes(8) for url in urls), np.uint64)
    if rules.near_bits is not None:
        hashes = batch["perceptual_hash"]
        # Older shards' hashes may be of another kind.
        hashed_R = pc.equal(pc.fill_null(pc.binary_length(hashes), 0), SIZE).to_numpy(zero_copy_only=False)
        data = b"".join(
            value if ours else bytes(SIZE) for value, ours in zip(hashes.to_pylist(), hashed_R, strict=True)
        )
        found["hash_RB"] = np.frombuffer(data, np.uint8).reshape(len(batch), SIZE)
        found["hashed_R"] = hashed_R
    return found
