"""How far ahead a rank reads."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence

import pytest

from capfilt.examples import GROUP_PARTS, Group, Pair, Part
from capfilt.models.feed import Place
from capfilt.pipelines import rows
from capfilt.spec import PairSource

ROWS = 50  # of a part


@pytest.mark.parametrize("every", [1, 10])
def test_rows_without_a_text_do_not_make_it_read_in_small_pieces(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset read for its web texts alone may have one for few of its images."""
    reads: list[int] = []

    def read(groups: Sequence[Group], _sources: Sequence[PairSource]) -> Generator[list[Pair | None], None, None]:
        reads.append(sum(group.rows for group in groups))
        for group in groups:
            yield [Pair(b"", bytes(32), ("text",)) if n % every == 0 else None for n in range(group.rows)]

    monkeypatch.setattr(rows, "_read", read)
    source = PairSource(dataset="nowhere", texts=("web",))
    parts = tuple(Part(0, f"{n}.parquet", ROWS, row_group=0) for n in range(40))
    wanted = 20 * len(parts) * ROWS
    found = rows.rank_rows(rows.Data((source,), parts, 0), 0, 1, Place(0, 0), wanted)
    places = [place for place, pair in itertools.islice(found, every * wanted) if pair is not None]
    assert len(places) == wanted
    assert places == sorted(places)
    assert len(reads) <= 3
    assert sum(reads) <= every * wanted + rows.READERS * GROUP_PARTS * ROWS
