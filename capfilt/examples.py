"""Pairs to train on: what there is, in which order an epoch takes it, and reading it.

An epoch is a list of groups; a group is a handful of row groups from all over the data, read together and shuffled. The
order is a function of the seed, the epoch and the rank, so that a run can take it up again in the middle. Nothing here
knows of Ray.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from capfilt.dataset import CuratedDataset
from capfilt.errors import InputError, TrainingError
from capfilt.fragments import Fragment, cut, read_footer, read_rows, row_group_rows
from capfilt.inputs import list_inputs, read_parquet
from capfilt.spec import PairSource

PART_ROWS = 250
"""Rows of a part of a plain file, at most where its row groups have up to eight times as many; of larger ones a part is
an eighth (capfilt.fragments.cut). A part of a dataset is a row group, 8 MiB or so as `curate` writes it."""

GROUP_PARTS = 8
"""Parts read and shuffled together, at most."""

GROUP_ROWS = 4_000
"""Rows of a group, at most, but for a part that has more alone: 640 MB of photographs of 160 KB. Parts of up to 500
rows, as of plain files with row groups of up to 4,000, are always grouped by eights."""

_THREADS = 16


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one file that are read together.

    Attributes:
        source: position of its source in the spec.
        url: of the file.
        row_group: of a dataset's file.
        fragment: of a plain file.
    """

    source: int
    url: str
    rows: int
    row_group: int | None = None
    fragment: Fragment | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Parts whose rows are shuffled together by `seed`."""

    epoch: int
    parts: tuple[Part, ...]
    seed: int

    @property
    def rows(self) -> int:
        """Rows of all its parts."""
        return sum(part.rows for part in self.parts)


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and the texts it may be trained with.

    Attributes:
        image: encoded bytes.
        sha256: 32 bytes, of the image.
    """

    image: bytes
    sha256: bytes
    texts: tuple[str, ...]

    @property
    def image_id(self) -> int:
        """63 bits of the sha256: pairs of one image have one id."""
        return int.from_bytes(self.sha256[:8], "big") >> 1

    def text(self, seed: int, epoch: int, row: int) -> str:
        """The text for a place in the data: one of its texts, each as likely, by the seed."""
        if len(self.texts) == 1:
            return self.texts[0]
        return random.Random(f"{seed}/{epoch}/{row}/{self.sha256.hex()}").choice(self.texts)


def list_parts(sources: Sequence[PairSource]) -> tuple[list[Part], dict[str, int]]:
    """Everything there is to train on, and which version of each dataset that is.

    Raises:
        DatasetError: a dataset or its version is not there.
        InputError: files cannot be listed or read, or there are none; a weight leaves a source out.
    """
    parts: list[Part] = []
    versions: dict[str, int] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for number, source in enumerate(sources):
            if source.dataset is not None:
                dataset = CuratedDataset.for_reading(source.dataset, source.storage_options)
                versions[source.dataset], urls = dataset.pair_files(source.version)
                groups = pool.map(
                    lambda url, options=source.storage_options: read_parquet(url, options, row_group_rows), urls
                )
                found = [
                    Part(number, url, rows, row_group=n)
                    for url, sizes in zip(urls, groups, strict=True)
                    for n, rows in enumerate(sizes)
                    if rows
                ]
            else:
                found = _plain_parts(number, source, pool)
            if not found:
                raise InputError(f"data.{number}: {source.dataset or 'the files of pairs'} hold no rows to train on")
            if source.weight < 1 and not _rest(source.weight, len(found)):
                raise InputError(
                    f"data.{number}: weight {source.weight:g} of {len(found)} parts that are read together rounds to "
                    f"none, so it would be left out; give it {0.51 / len(found):.2g} or more"
                )
            parts += found
    return parts, versions


def _plain_parts(number: int, source: PairSource, pool: ThreadPoolExecutor) -> list[Part]:
    assert source.pairs is not None
    pairs = source.pairs
    files = list_inputs(pairs)
    footers = pool.map(lambda file: read_footer(file, pairs.columns, pairs.storage_options), files)
    return [
        Part(number, file.path, stop - start, fragment=footer.fragment(file, start, stop))
        for file, footer in zip(files, footers, strict=True)
        for start, stop in cut(footer.row_groups, PART_ROWS)
        if stop > start
    ]


def oversized(parts: Sequence[Part]) -> str | None:
    """What to say of parts with more rows than a group should have; None where there are none."""
    large = [part for part in parts if part.rows > GROUP_ROWS]
    if not large:
        return None
    most = max(large, key=lambda part: part.rows)
    return (
        f"data: {len(large):,} of {len(parts):,} parts have more than {GROUP_ROWS:,} rows, since row groups are large. "
        f"A part's rows are in memory at once and shuffled only among themselves: in {most.url} {most.rows:,}. Rewrite "
        f"such files with smaller row groups (row_group_size={PART_ROWS} of pandas and pyarrow)"
    )


def epoch_groups(
    parts: Sequence[Part], sources: Sequence[PairSource], seed: int, epoch: int, rank: int = 0, ranks: int = 1
) -> list[Group]:
    """A rank's groups of an epoch in order. The ranks together take every part as often as its source's weight says.

    Args:
        parts: of all sources.
        sources: for their weights; a fraction of one is a fraction of the parts, others each epoch.

    Raises:
        TrainingError: there are fewer parts than ranks.
    """
    rng = random.Random(f"{seed}/{epoch}")
    chosen: list[Part] = []
    for number, source in enumerate(sources):
        own = [part for part in parts if part.source == number]
        whole = int(source.weight)
        chosen += own * whole
        chosen += rng.sample(own, _rest(source.weight, len(own)))
    rng.shuffle(chosen)
    if ranks > 1:
        chosen = _share(chosen, rank, ranks)
        rng = random.Random(f"{seed}/{epoch}/{rank}")
    return [Group(epoch, tuple(some), rng.getrandbits(63)) for some in _grouped(chosen)]


def _rest(weight: float, parts: int) -> int:
    """Parts that an epoch takes beyond whole passes over all of them."""
    return round((weight - int(weight)) * parts)


def _grouped(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Runs of at most GROUP_PARTS parts and GROUP_ROWS rows; a part with more rows is alone."""
    some: list[Part] = []
    rows = 0
    for part in parts:
        if some and (len(some) == GROUP_PARTS or rows + part.rows > GROUP_ROWS):
            yield some
            some, rows = [], 0
        some.append(part)
        rows += part.rows
    if some:
        yield some


def _share(parts: Sequence[Part], rank: int, ranks: int) -> list[Part]:
    """A rank's of an epoch's parts, in order. Each goes to the rank with the fewest rows; two differ by one at most.

    Raises:
        TrainingError: there are fewer parts than ranks.
    """
    if len(parts) < ranks:
        raise TrainingError(
            f"{len(parts)} parts of rows for {ranks} workers; use fewer workers, more data or smaller row groups"
        )
    own: list[Part] = []
    fewest = [(0, number) for number in range(ranks)]  # a heap
    for part in parts:
        rows, number = fewest[0]
        if number == rank:
            own.append(part)
        heapq.heapreplace(fewest, (rows + part.rows, number))
    return own


def read_group(group: Group, sources: Sequence[PairSource]) -> list[Pair | None]:
    """A group's rows, shuffled; None for a row that has no image or no text.

    Raises:
        InputError: a file cannot be read.
    """
    pairs = [pair for part in group.parts for pair in _read_part(part, sources[part.source])]
    random.Random(group.seed).shuffle(pairs)
    return pairs


def _read_part(part: Part, source: PairSource) -> Iterator[Pair | None]:
    if part.fragment is not None:
        assert source.pairs is not None
        for row in read_rows(part.fragment, source.pairs.storage_options):
            yield None if row.image is None or not row.text else _pair(row.image, (row.text,))
        return
    table = read_parquet(
        part.url,
        source.storage_options,
        lambda parquet: parquet.read_row_group(part.row_group, columns=["image", "captions"]),
    )
    for image, captions in zip(table["image"].to_pylist(), table["captions"].to_pylist(), strict=True):
        texts = tuple(caption["text"] for caption in captions if caption["source"] in source.texts)
        yield _pair(image, texts) if texts else None


def _pair(image: bytes, texts: tuple[str, ...]) -> Pair:
    return Pair(image, hashlib.sha256(image).digest(), texts)
