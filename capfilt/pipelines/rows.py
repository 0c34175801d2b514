"""A rank's rows, from a place on, for as long as it is asked: read by Ray Data tasks, ahead and in order.

Each rank runs a Ray Data pipeline of its own, whose items are the groups of capfilt.examples in the order of the spec's
seed. Which row meets which step is so a function of the spec alone.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from capfilt.errors import CapfiltError, TrainingError
from capfilt.examples import Group, Pair, Part, epoch_groups, read_group
from capfilt.models.feed import Place
from capfilt.pipelines.session import quiet
from capfilt.spec import PairSource

WINDOW = 2_000
"""Groups handed to Ray Data at a time."""

READERS = 4
"""Tasks of a rank that read at the same time. They wait for storage, and ask Ray for no core: the workers may have all
of them, and would wait for rows for ever."""

_SCHEMA = pa.schema(
    [pa.field("image", pa.binary()), pa.field("sha256", pa.binary(32)), pa.field("texts", pa.list_(pa.string()))]
)


@dataclass(frozen=True)
class Data:
    """What a run trains on, and in which order.

    Attributes:
        parts: everything there is, of versions that do not change.
        seed: of the order.
    """

    sources: tuple[PairSource, ...]
    parts: tuple[Part, ...]
    seed: int

    @property
    def rows(self) -> int:
        """Rows of an epoch, over all ranks."""
        own = [0] * len(self.sources)
        for part in self.parts:
            own[part.source] += part.rows
        return round(sum(rows * source.weight for rows, source in zip(own, self.sources, strict=True)))


def rank_rows(
    data: Data, rank: int, ranks: int, place: Place, wanted: int
) -> Generator[tuple[Place, Pair | None], None, None]:
    """Rows after a place, epoch after epoch without end; None for one without an image or a text.

    Args:
        wanted: how many usable rows are expected to be asked for; not many more are read at first.

    Raises:
        TrainingError: there are fewer parts than ranks.
        InputError: a file cannot be read.
        ray.exceptions.RayError: Ray lost what it was reading.
    """
    groups = _groups(data, rank, ranks, place)
    usable = 1.0  # the fraction of the last window's rows that could be used
    while True:
        window: list[tuple[Place, Group]] = []
        rows = good = 0
        while len(window) < READERS or (len(window) < WINDOW and rows * usable < wanted):
            window.append(next(groups))
            rows += window[-1][1].rows
        with closing(_read([group for _, group in window], data.sources)) as read:
            for (start, group), pairs in zip(window, read, strict=True):
                if len(pairs) != group.rows:
                    raise TrainingError(
                        f"{group.parts[0].url}: {len(pairs)} rows where its footer promised others; write the file "
                        "again, or take it out of data"
                    )
                for number, pair in enumerate(pairs, start.row + 1):
                    here = Place(group.epoch, number)
                    good += pair is not None
                    if here > place:
                        yield here, pair
        wanted, usable = wanted - good, max(good, 1) / rows


def _groups(data: Data, rank: int, ranks: int, place: Place) -> Iterator[tuple[Place, Group]]:
    """Groups that end after a place, each with where it starts."""
    for epoch in itertools.count(place.epoch):
        row = 0
        for group in epoch_groups(data.parts, data.sources, data.seed, epoch, rank, ranks):
            if epoch > place.epoch or row + group.rows > place.row:
                yield Place(epoch, row), group
            row += group.rows


def _read(groups: Sequence[Group], sources: Sequence[PairSource]) -> Generator[list[Pair | None], None, None]:
    import ray
    import ray.data

    context = quiet(ray.data.DataContext.get_current().copy())
    context.execution_options.preserve_order = True
    context.target_max_block_size = None  # a group is one block, however large
    with ray.data.DataContext.current(context):  # a dataset keeps the context it was made in
        dataset = ray.data.from_items(
            [{"group": pickle.dumps(group)} for group in groups], override_num_blocks=len(groups)
        ).map_batches(
            _read_one,
            fn_args=(tuple(sources),),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=0,
            concurrency=min(READERS, len(groups)),
        )
    for bundle in dataset.iter_internal_ref_bundles():  # dropping this iterator ends what still runs
        for entry in bundle.blocks:
            yield _pairs(ray.get(entry.ref))


def _read_one(batch: pa.Table, sources: tuple[PairSource, ...]) -> pa.Table:
    """The rows of a batch's one group; what went wrong travels as a row, too."""
    (pickled,) = batch.column("group").to_pylist()
    try:
        pairs = read_group(pickle.loads(pickled), sources)
    except CapfiltError as error:
        return pa.table({"error": pa.array([pickle.dumps(error)], pa.binary())})
    return pa.Table.from_pylist(
        [
            {"image": p.image, "sha256": p.sha256, "texts": p.texts} if p else dict.fromkeys(_SCHEMA.names)
            for p in pairs
        ],
        _SCHEMA,
    )


def _pairs(block: Any) -> list[Pair | None]:
    if "error" in block.column_names:
        (error,) = block.column("error").to_pylist()
        raise pickle.loads(error)
    return [
        None if row["image"] is None else Pair(row["image"], row["sha256"], tuple(row["texts"]))
        for row in block.to_pylist()
    ]
