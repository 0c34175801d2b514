"""Which rows are copies of which: a pure function of what is on record of the rows that would be kept. No file.

Rows are looked at in order of (generation, shard, row), and a row stays unless enough that came before it do: of the
same image, of one that is near, or of the same URL. So each copy names a row that is kept, never another copy; rows
that arrive later (in a later generation) never change what becomes of earlier ones; and within one generation the
outcome does not depend on the order in which shards were finished.

R  rows    I  images that differ (by sha256), in order of their first row    K  those of them that have a hash
B  bytes of a hash    V  its views    W  64-bit words of a view's signs    C  colours of a view    P  pairs of images
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from capfilt.fingerprints import without_copies
from capfilt.perceptual import BYTES, VIEWS, alike, split
from capfilt.schema import Reason
from capfilt.spec import Duplicates

Numbers = npt.NDArray[np.int64]

_BUCKET = 32
"""Images of one key that another is compared with, the first by rank: bounds the work where many look alike."""

_CHUNK = 32_768
"""Images looked at a time: they are in at most _BUCKET times as many pairs. Bounds memory."""

_THREADS = 4
"""More take more memory: of a million images, two of them 1.7 GB at the peak (benchmarks/duplicates.py)."""

NO_URL = 0


@dataclass(frozen=True, slots=True)
class Copy:
    """Why a row is dropped, and the row that stays in its place."""

    reason: Reason
    shard: str
    row: int


@dataclass(frozen=True)
class Candidates:
    """Rows that are kept, or would be if they were no copies; R of them, in any order.

    Attributes:
        shards: names, sorted.
        shard_R: index into `shards`.
        settled_R: whether the row stays whatever the others are: its shard is not decided anew.
        sha256_R: of the image, its first 16 bytes.
        url_R: a hash of the URL; NO_URL where it has none.
        hash_RB: as capfilt.perceptual makes them; zeros where `hashed_R` is False. None if no near copies are wanted.
    """

    shards: Sequence[str]
    shard_R: Numbers  # noqa: N815  the shape's suffix
    row_R: Numbers  # noqa: N815
    generation_R: Numbers  # noqa: N815
    settled_R: npt.NDArray[np.bool_]  # noqa: N815
    sha256_R: npt.NDArray[np.void]  # noqa: N815
    url_R: npt.NDArray[np.uint64]  # noqa: N815
    hash_RB: npt.NDArray[np.uint8] | None = None  # noqa: N815
    hashed_R: npt.NDArray[np.bool_] | None = None  # noqa: N815


@dataclass(frozen=True)
class Found:
    """The copies among the rows of a dataset, by shard."""

    by_shard: Mapping[str, Mapping[int, Copy]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.by_shard.values()))

    def of(self, shard: str) -> Mapping[int, Copy]:
        """The copies in a shard, by row."""
        return self.by_shard.get(shard, {})

    def fingerprint(self, shard: str, decide: str) -> str:
        """The decide fingerprint of a shard of which these rows are dropped: as it was where none is."""
        own = self.of(shard)
        if not own:
            return without_copies(decide)
        said = (f"{row} {copy.reason} {copy.shard} {copy.row}\n" for row, copy in sorted(own.items()))
        return f"{without_copies(decide)}+{hashlib.blake2b(''.join(said).encode(), digest_size=8).hexdigest()}"


def find_copies(rows: Candidates, rules: Duplicates) -> Found:
    """The rows that are to be dropped.

    A row of an image of which `max_per_image` rows are kept is a copy of the first of them. Images are the same by
    their bytes or, with `near_bits`, by their hashes: then a row joins the first image, by rank, that is near and kept.
    A row of a URL of which `max_per_url` rows are kept is dropped, too.
    """
    order_R = np.lexsort((rows.row_R, rows.shard_R, rows.generation_R, ~rows.settled_R))
    _, first_I, image_R = np.unique(rows.sha256_R[order_R], return_index=True, return_inverse=True)
    rank_I = np.empty(len(first_I), np.int64)
    rank_I[np.argsort(first_I)] = np.arange(len(first_I))  # images in order of their first row
    image_R = rank_I[image_R]
    near: Mapping[int, Sequence[int]] = {}
    if rows.hash_RB is not None and rows.hashed_R is not None and rules.near_bits is not None:
        firsts_I = order_R[np.sort(first_I)]
        near = _near(rows.hash_RB[firsts_I], rows.hashed_R[firsts_I], rules.near_bits)
    by_shard: dict[str, dict[int, Copy]] = defaultdict(dict)
    named = zip(rows.shard_R[order_R].tolist(), rows.row_R[order_R].tolist(), strict=True)
    where = [(rows.shards[shard], row) for shard, row in named]
    stays = rows.settled_R[order_R].tolist()
    for n, reason, of in _judge(image_R.tolist(), rows.url_R[order_R].tolist(), stays, near, rules):
        shard, row = where[n]
        by_shard[shard][row] = Copy(reason, *where[of])
    return Found(by_shard)


def _judge(
    images: Sequence[int],
    urls: Sequence[int],
    stays: Sequence[bool],
    near: Mapping[int, Sequence[int]],
    rules: Duplicates,
) -> Iterator[tuple[int, Reason, int]]:
    """(place, why, place of the row that stays) of the copies, of rows by rank."""
    most = rules.max_per_image
    group: dict[int, int] = {}  # of an image that has a kept row: the place of the first row of what looks like it
    kept: dict[int, int] = defaultdict(int)  # rows of a group
    of_url: dict[int, list[int]] = defaultdict(list)  # places of kept rows
    for n, (image, url) in enumerate(zip(images, urls, strict=True)):
        reason, first = Reason.DUPLICATE, group.get(image)
        if first is None:
            reason = Reason.NEAR_DUPLICATE
            first = next((group[other] for other in near.get(image, ()) if other in group), None)
        if first is not None and kept[first] >= most and not stays[n]:
            yield n, reason, first
        elif rules.max_per_url and url != NO_URL and len(of_url[url]) >= rules.max_per_url and not stays[n]:
            yield n, Reason.SAME_URL, of_url[url][0]
        else:
            first = group.setdefault(image, n if first is None else first)
            kept[first] += 1
            if rules.max_per_url:
                of_url[url].append(n)


# --- near ---

_STEPS = ((1, 3), (1, 5), (2, 9))
_TABLES = [(a, (a + b) % BYTES, (a + c) % BYTES) for a in range(BYTES) for b, c in _STEPS]
"""Triples of a view's bytes of signs, spread evenly. Two pictures are compared where they agree in any of them, and in
colour: to _SHADE levels, whose bounds lie elsewhere for each triple, so that few near pairs have one between them every
time. Pictures that are nearly plain agree in all triples; colour parts them."""

_SHADE = 32
_MIXER = 0x9E3779B1  # 2^32 over the golden ratio: spreads a key's colour over its bits


def _near(hash_IB: npt.NDArray[np.uint8], hashed_I: npt.NDArray[np.bool_], most_bits: int) -> dict[int, list[int]]:
    """For each image, those before it that are near, in order.

    Whether a pair is compared depends on the pair alone or, where more than _BUCKET images have the same triple, on
    those before it: never on later ones.
    """
    (known_K,) = np.nonzero(hashed_I)
    signs_KVW, colours_KVC = split(hash_IB[known_K])
    shades_KV3 = np.rint(colours_KVC.reshape(*colours_KVC.shape[:2], 3, -1).mean(axis=3, dtype=np.float32))
    views = _Views(signs_KVW, colours_KVC, shades_KV3.astype(np.uint8))
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:  # numpy leaves the GIL
        found = list(pool.map(lambda table: _near_by(table, views, most_bits), range(len(_TABLES))))
    near: dict[int, list[int]] = defaultdict(list)
    for later, earlier in zip(*np.divmod(np.unique(np.concatenate(found)), max(1, len(known_K))), strict=True):
        near[int(known_K[later])].append(int(known_K[earlier]))
    return near


@dataclass(frozen=True)
class _Views:
    """What images look like; shades are the mean red, green and blue of each view."""

    signs_KVW: npt.NDArray[np.uint64]  # noqa: N815
    colours_KVC: npt.NDArray[np.uint8]  # noqa: N815
    shades_KV3: npt.NDArray[np.uint8]  # noqa: N815

    def keys(self, table: int) -> npt.NDArray[np.int32]:
        """[V, K]: what two views must have in common to be compared, in 24 bits."""
        byte_KVB = self.signs_KVW.view(np.uint8).reshape(*self.signs_KVW.shape[:2], BYTES)
        a, b, c = (byte_KVB[:, :, at].astype(np.int32) for at in _TABLES[table])
        moved_KV3 = (self.shades_KV3 + np.uint16(table * _SHADE // len(_TABLES))) // np.uint16(_SHADE)
        red, green, blue = (moved_KV3[:, :, channel].astype(np.uint32) for channel in range(3))
        spread = ((red * 100 + green * 10 + blue) * np.uint32(_MIXER)) >> np.uint32(8)
        return np.ascontiguousarray((((a << 16) | (b << 8) | c) ^ spread.astype(np.int32)).T)


def _near_by(table: int, views: _Views, most_bits: int) -> Numbers:
    """Pairs of near images of which the whole of one and a view of the other have the same key: [P] of
    (the later one x K + the earlier one)."""
    signs_KVW, colours_KVC = views.signs_KVW, views.colours_KVC
    images = len(signs_KVW)
    key_VK = views.keys(table)
    by_key_K = np.argsort(key_VK[0], kind="stable")
    sorted_K = key_VK[0][by_key_K]
    (first,) = np.nonzero(np.diff(sorted_K, prepend=-1))
    size, start = np.zeros(1 << 24, np.int32), np.empty(1 << 24, np.int32)  # by key; what is not touched costs nothing
    size[sorted_K[first]], start[sorted_K[first]] = np.diff(first, append=images), first
    found = [np.empty(0, np.int64)]
    for view, chunk in ((view, chunk) for view in range(VIEWS) for chunk in range(0, images, _CHUNK)):
        key = key_VK[view, chunk : chunk + _CHUNK]
        partners = np.minimum(size[key], _BUCKET)
        mine_P = np.repeat(np.arange(chunk, chunk + len(key)), partners)
        nth_P = np.arange(len(mine_P)) - np.repeat(np.cumsum(partners) - partners, partners)
        other_P = by_key_K[np.repeat(start[key], partners) + nth_P]
        apart = mine_P != other_P
        mine_P, other_P = mine_P[apart], other_P[apart]
        near_P = np.bitwise_count(signs_KVW[mine_P, view] ^ signs_KVW[other_P, 0]).sum(axis=1) <= most_bits
        mine_P, other_P = mine_P[near_P], other_P[near_P]
        alike_P = alike(colours_KVC[mine_P, view], colours_KVC[other_P, 0])
        mine_P, other_P = mine_P[alike_P], other_P[alike_P]
        found.append(np.unique(np.maximum(mine_P, other_P) * images + np.minimum(mine_P, other_P)))
    return np.concatenate(found)
