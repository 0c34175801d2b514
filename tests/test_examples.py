"""Pairs to train on: what an epoch holds, in which order, and what is read."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MakeSpec, jpeg, read, write_shard
from rich.console import Console
from stubs import load_hash

from capfilt.dataset import CuratedDataset
from capfilt.errors import DatasetError, InputError, TrainingError
from capfilt.examples import (
    GROUP_PARTS,
    GROUP_ROWS,
    PART_ROWS,
    Group,
    Pair,
    Part,
    epoch_groups,
    list_parts,
    oversized,
    read_group,
)
from capfilt.pipelines.curate import curate, in_process
from capfilt.spec import Input, PairSource


def plain(*paths: Path, weight: float = 1.0) -> PairSource:
    return PairSource(pairs=Input(paths=tuple(map(str, paths))), weight=weight)


def rows(groups: list[Group], sources: list[PairSource]) -> list[Pair | None]:
    return [pair for group in groups for pair in read_group(group, sources)]


@pytest.fixture
def shards(tmp_path: Path) -> list[PairSource]:
    """700 rows and 300 rows, of which one has no image and one no text."""
    images: list[bytes | None] = [jpeg(n) for n in range(1000)]
    texts: list[str | None] = [f"text {n}" for n in range(1000)]
    images[5], texts[6] = None, ""
    first = write_shard(tmp_path / "a" / "0.parquet", images[:700], texts[:700], row_group=700)
    second = write_shard(tmp_path / "b" / "1.parquet", images[700:], texts[700:], row_group=40)
    return [plain(first), plain(second)]


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(shards: list[PairSource]) -> None:
    parts, versions = list_parts(shards)
    assert versions == {}
    assert max(part.rows for part in parts) <= PART_ROWS
    epochs = [rows(epoch_groups(parts, shards, seed=1, epoch=n), shards) for n in range(2)]
    texts = [[pair.texts[0] for pair in epoch if pair is not None] for epoch in epochs]
    assert [len(epoch) for epoch in epochs] == [1000, 1000]
    assert sorted(texts[0]) == sorted(texts[1]) == sorted(f"text {n}" for n in range(1000) if n not in (5, 6))
    assert texts[0] != texts[1]
    again = rows(epoch_groups(parts, shards, seed=1, epoch=0), shards)
    assert again == epochs[0]
    assert rows(epoch_groups(parts, shards, seed=2, epoch=0), shards) != epochs[0]


def test_a_pair_is_known_by_its_image(shards: list[PairSource]) -> None:
    parts, _ = list_parts(shards)
    pair = next(pair for pair in rows(epoch_groups(parts, shards, 0, 0), shards) if pair is not None)
    assert pair.sha256 == hashlib.sha256(pair.image).digest()
    assert pair.image_id == int(pair.sha256.hex()[:16], 16) // 2
    assert pair.image == jpeg(int(pair.texts[0].split()[1]))


def made_up(count: int, source: int = 0, rows: Sequence[int] = (10,)) -> list[Part]:
    """Parts of so many rows, over and over."""
    sizes = itertools.islice(itertools.cycle(rows), count)
    return [Part(source, f"{n}.parquet", size, row_group=0) for n, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("epoch", "order"),
    [
        (
            0,
            [
                ([0, 15, 1, 1, 2, 6, 7, 11], 4071676768602550278),
                ([10, 17, 4, 18, 14, 16, 9, 11], 8188984656827807932),
                ([13, 8, 12, 19, 5, 3], 875848283205883971),
            ],
        ),
        (
            1,
            [
                ([2, 7, 0, 12, 17, 13, 17, 4], 3214904815037817419),
                ([1, 1, 10, 3, 18, 19, 8, 14], 3029823821322982554),
                ([16, 15, 11, 9, 6, 5], 7457885535488149783),
            ],
        ),
    ],
)
@pytest.mark.parametrize("sizes", [[250], [250, 250, 100, 1], [500, 495]])
def test_one_workers_order_stays_what_it_was(epoch: int, order: list[tuple[list[int], int]], sizes: list[int]) -> None:
    """Published results are of this order. Parts of up to 250 rows are what plain files give with row groups of up to
    2,000; the toy web's curated datasets have parts of up to 500."""
    groups = epoch_groups(made_up(20, rows=sizes), [PairSource(dataset="/d", weight=1.1)], seed=7, epoch=epoch)
    assert [([int(part.url.split(".")[0]) for part in group.parts], group.seed) for group in groups] == order


@pytest.mark.parametrize(("weight", "passes"), [(1.0, 40), (3.0, 120), (0.25, 10), (1.5, 60)])
def test_weights_are_passes(weight: float, passes: int) -> None:
    groups = epoch_groups(made_up(40), [PairSource(dataset="/d", weight=weight)], 0, 0)
    counts = Counter(part.url for group in groups for part in group.parts)
    assert sum(counts.values()) == passes
    assert max(counts.values()) - min(counts.values()) <= 1
    assert all(len(group.parts) == GROUP_PARTS for group in groups[:-1])


def test_a_weight_that_leaves_a_source_out(tmp_path: Path) -> None:
    """0.5 of one part is rounded to none: nothing of the human pairs, say, would ever be seen."""
    file = write_shard(tmp_path / "pairs.parquet", [jpeg(n) for n in range(3)], ["a", "b", "c"])
    with pytest.raises(InputError, match=r"data\.1: weight 0\.3 of 1 parts .* give it 0\.51 or more"):
        list_parts([plain(file), plain(file, weight=0.3)])
    sources = [plain(file, weight=0.51)]
    parts, _ = list_parts(sources)
    assert [group.rows for group in epoch_groups(parts, sources, 0, 0)] == [3]


def test_a_fraction_is_another_one_each_epoch() -> None:
    source = [PairSource(dataset="/d", weight=0.5)]
    seen = {frozenset(p.url for g in epoch_groups(made_up(40), source, 0, n) for p in g.parts) for n in range(3)}
    assert len(seen) == 3


def test_sources_are_mixed_within_groups() -> None:
    sources = [PairSource(dataset="/d"), PairSource(dataset="/e")]
    groups = epoch_groups([*made_up(64), *made_up(64, source=1)], sources, 0, 0)
    assert sum({part.source for part in group.parts} == {0, 1} for group in groups) > 0.8 * len(groups)


@pytest.mark.parametrize("rows", [501, 4_000, 15_000])
def test_a_group_of_large_parts_has_fewer(rows: int) -> None:
    """A group is one task's memory, and one block's: 8 parts of 15,000 photographs would be 19 GB."""
    parts = made_up(60, rows=(rows, 10))
    groups = epoch_groups(parts, [PairSource(dataset="/d")], 0, 0)
    assert Counter(part for group in groups for part in group.parts) == Counter(parts)
    assert all(group.rows <= GROUP_ROWS or len(group.parts) == 1 for group in groups)
    assert max(len(group.parts) for group in groups) <= GROUP_PARTS
    for one, following in itertools.pairwise(groups):  # none is closed too soon
        assert len(one.parts) == GROUP_PARTS or one.rows + following.parts[0].rows > GROUP_ROWS


def test_large_row_groups_are_pointed_out(tmp_path: Path) -> None:
    """pandas and pyarrow write row groups of up to a million rows, of which a part is an eighth at least."""
    fine, large = (tmp_path / name / "0.parquet" for name in ("fine", "large"))
    image, text = pa.array([b"x"] * 40_000, pa.binary()), pa.array(["text"] * 40_000)
    for path, row_group in ((fine, 2_000), (large, 40_000)):
        path.parent.mkdir()
        pq.write_table(pa.table({"jpg": image, "caption": text}), path, row_group_size=row_group)
    parts, _ = list_parts([plain(fine)])
    assert {part.rows for part in parts} == {PART_ROWS}
    assert oversized(parts) is None
    parts, _ = list_parts([plain(fine), plain(large)])
    said = oversized(parts)
    assert said is not None
    assert re.search(rf"8 of 168 parts have more than 4,000 rows.* in {large} 5,000\. .*row_group_size=250", said)
    groups = epoch_groups(parts, [plain(fine), plain(large)], 0, 0)
    assert max(group.rows for group in groups) == 5_000
    assert sum(group.rows for group in groups) == 80_000


@pytest.mark.parametrize(("count", "ranks"), [(9, 2), (9, 8), (9, 9), (80, 3), (400, 7)])
def test_ranks_share_an_epoch_by_rows(count: int, ranks: int) -> None:
    """A rank with less would begin its next pass sooner, and show its rows more often."""
    parts = made_up(count, rows=(1000, 200, 10))
    shares = [epoch_groups(parts, [PairSource(dataset="/d")], 0, 0, rank, ranks) for rank in range(ranks)]
    assert Counter(part for groups in shares for group in groups for part in group.parts) == Counter(parts)
    rows = [sum(group.rows for group in groups) for groups in shares]
    assert max(rows) - min(rows) <= 1000  # the largest part
    seeds = [group.seed for groups in shares for group in groups]
    assert len(set(seeds)) == len(seeds)
    assert shares[-1] == epoch_groups(parts, [PairSource(dataset="/d")], 0, 0, ranks - 1, ranks)
    assert shares[-1] != epoch_groups(parts, [PairSource(dataset="/d")], 0, 1, ranks - 1, ranks)


def test_fewer_parts_than_ranks_are_refused() -> None:
    with pytest.raises(TrainingError, match="10 parts of rows for 11 workers; use fewer workers, more data or smaller"):
        epoch_groups(made_up(10), [PairSource(dataset="/d")], 0, 0, 0, 11)


def test_a_texts_draw_is_its_places() -> None:
    pair = Pair(b"", bytes(32), ("one", "two", "three"))
    drawn = [pair.text(seed=0, epoch=n, row=7) for n in range(300)]
    assert drawn == [pair.text(seed=0, epoch=n, row=7) for n in range(300)]
    assert min(Counter(drawn).values()) > 60
    assert drawn != [pair.text(seed=1, epoch=n, row=7) for n in range(300)]
    assert drawn != [pair.text(seed=0, epoch=n, row=8) for n in range(300)]  # an image may come twice in an epoch


@pytest.fixture
def curated(make_spec: MakeSpec, tmp_path: Path) -> str:
    """Two versions of a dataset: one shard, then two."""
    for s in range(2):
        write_shard(tmp_path / "in" / f"{s}.parquet", [jpeg(100 * s + n) for n in range(60)])
        spec = make_spec()
        with (tmp_path / "log").open("w") as log:
            curate(spec, load=load_hash, execute=in_process, console=Console(file=log))
    return spec.output


def test_a_dataset_gives_its_kept_texts(curated: str) -> None:
    kept = {row["image_sha256"]: row for row in read(curated, "pairs")}
    assert any(len(row["captions"]) == 2 for row in kept.values())
    for wanted in (("web", "synthetic"), ("web",), ("synthetic",)):
        sources = [PairSource(dataset=curated, texts=wanted)]
        parts, versions = list_parts(sources)
        assert versions == {curated: CuratedDataset.for_reading(curated, {}).versions()["pairs"]}
        got = {pair.sha256.hex(): pair for pair in rows(epoch_groups(parts, sources, 0, 0), sources) if pair}
        expected = {
            sha: tuple(caption["text"] for caption in row["captions"] if caption["source"] in wanted)
            for sha, row in kept.items()
        }
        assert {sha: pair.texts for sha, pair in got.items()} == {sha: t for sha, t in expected.items() if t}
        assert all(pair.image == kept[sha]["image"] for sha, pair in got.items())


def test_an_old_version_stays_what_it_was(curated: str) -> None:
    newest = CuratedDataset.for_reading(curated, {}).versions()["pairs"]
    counts = {}
    for version in (None, newest, newest - 1, 1):
        parts, versions = list_parts([PairSource(dataset=curated, version=version)])
        counts[version] = sum(part.rows for part in parts)
        assert versions[curated] == (newest if version is None else version)
    assert counts[None] == counts[newest] > counts[1] > 0


def test_what_is_missing_is_named(curated: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no version 99"):
        list_parts([PairSource(dataset=curated, version=99)])
    with pytest.raises(DatasetError, match="no curated dataset there"):
        list_parts([PairSource(dataset=str(tmp_path / "nowhere"))])
    empty = write_shard(tmp_path / "empty" / "0.parquet", [])
    with pytest.raises(InputError, match=r"data\.1: the files of pairs hold no rows"):
        list_parts([PairSource(dataset=curated), plain(empty)])
    parts, _ = list_parts([PairSource(dataset=curated)])
    gone = [Part(0, parts[0].url + ".gone", rows=1, row_group=0)]
    with pytest.raises(InputError, match=r"\.gone: cannot be read"):
        read_group(Group(0, tuple(gone), 0), [PairSource(dataset=curated)])
