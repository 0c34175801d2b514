"""What the page shows and does, without the web: a dataset's version, its index, its images and the marks."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import duckdb
from pydantic import BaseModel, ConfigDict, Field

from capfilt.dataset import CuratedDataset
from capfilt.errors import CapfiltError, DatasetError
from capfilt.inputs import is_local
from capfilt.schema import ANNOTATIONS, PAIRS, PROVENANCE, Status
from capfilt.spec import Thresholds
from capfilt.stores import blamed, connect, persist
from capfilt.text import clean
from capfilt.view.index import Index, default_path
from capfilt.view.marks import Marks
from capfilt.view.pictures import NoPictureError, Pictures
from capfilt.view.reading import read_places
from capfilt.view.search import Hit, Search, Searcher

_LONGEST = 20_000
"""Characters of a text that are shown."""

_ABOUT = ("row", "key", "url", "status", "reason", "detail", "note", "format", "width", "height", "image_bytes")


class NotMarkedError(CapfiltError):
    """A text cannot be marked; the message says why."""


class Mark(BaseModel):
    """A person's verdict on a text.

    Attributes:
        id: the index's, of the row.
        older: whether the text is of the other version's row.
        text: its number in the row, from 0.
        true: whether it is right of the image; None takes a mark back.
        search: what the row was found with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: int = Field(ge=0, le=2**62)
    older: bool = False
    text: int = Field(ge=0, le=10_000)
    true: bool | None
    search: Search = Search()


class Explorer:
    """One version of a curated dataset, and another to compare it with.

    Args:
        output: of the dataset, with its storage `options`.
        version: of the annotations; the newest if None.
        against: another one, to compare with.
        marks: where marks are kept.
        index: where the search index is kept; in the user's cache if None.

    Raises:
        DatasetError: there is no such dataset or version, or its files are gone; or the index is in use.
        InputError: the marks cannot be read.
    """

    def __init__(
        self,
        output: str,
        options: Mapping[str, Any],
        version: int | None,
        against: int | None,
        marks: str,
        index: str | None = None,
    ) -> None:
        self._options = dict(options)
        dataset = CuratedDataset.for_reading(output, options)
        self.output, self.marks = dataset.output, Marks(marks)
        self.version, newer = dataset.annotation_files(version)
        self._newer = Pictures(dataset, options, _pairs_version(dataset, version))
        _check_there(dataset, options, version, newer)
        self.against: int | None = None
        older: list[str] | None = None
        if against is not None:
            self.against, older = dataset.annotation_files(against)
            self._older = Pictures(dataset, options, _pairs_version(dataset, against))
            _check_there(dataset, options, against, older)
        self.thresholds = _thresholds(dataset)
        filesystem = None if is_local(fs := connect(self.output, options)[0]) else fs
        self.index = Index(index or default_path(self.output), newer, older, filesystem)

    def close(self) -> None:
        """Stop what goes on, and let the index go."""
        self.index.close()

    def state(self) -> dict[str, Any]:
        """What is looked at, and how far the index is."""
        return {
            "output": self.output,
            "version": self.version,
            "against": self.against,
            "thresholds": self.thresholds,
            "index": {**asdict(self.index.progress), "done": self.index.progress.done},
            "marks": {"path": self.marks.path, **self.marks.counts()},
        }

    def facets(self, cursor: duckdb.DuckDBPyConnection) -> dict[str, Any]:
        """Rows by status and reason, and the reasons that texts have."""
        searcher = self._searcher(cursor)
        found = [{"status": status, "reason": reason, "rows": rows} for status, reason, rows in searcher.facets()]
        return {"rows": found, "text_reasons": searcher.text_reasons()}

    def count(self, cursor: duckdb.DuckDBPyConnection, search: Search) -> int:
        """How many rows a search finds, of those indexed so far."""
        return self._searcher(cursor).count(search, self._marked(search))

    def page(self, cursor: duckdb.DuckDBPyConnection, search: Search) -> dict[str, Any]:
        """A page of the rows that a search finds, of those indexed so far.

        Raises:
            InputError: a table's file cannot be read.
        """
        hits, more = self._searcher(cursor).page(search, self._marked(search))
        read = iter(self._read(hits))
        rows = []
        for hit in hits:
            row = {"id": hit.id, "change": hit.change, **self._shown(hit.shard, next(read))}
            rows.append(row | {"older": self._shown(hit.shard, next(read)) if hit.older else None})
        return {"rows": rows, "more": more}

    def picture(self, cursor: duckdb.DuckDBPyConnection, number: int) -> tuple[bytes, str]:
        """The image of the row of this id, and its media type.

        Raises:
            NoPictureError: it has none, or it cannot be had.
        """
        hit = self._hit(cursor, number)
        rows = self._read([hit])
        sides = [(self._older if hit.change == "gone" else self._newer, rows[0])]
        if hit.older and rows[1]["status"] == Status.KEPT and rows[1]["image_sha256"] == rows[0]["image_sha256"]:
            sides.append((self._older, rows[1]))  # of the same image the older version's pairs may hold the bytes
        try:
            return sides[0][0].picture(hit.shard, sides[0][1])
        except NoPictureError:
            if len(sides) == 1:
                raise
        return sides[1][0].picture(hit.shard, sides[1][1])

    # --- marking ---

    def mark(self, cursor: duckdb.DuckDBPyConnection, mark: Mark) -> dict[str, Any]:
        """Mark a text, and count the marks.

        Raises:
            NotMarkedError: there is no such text, or it is none that can be judged.
            StoreError: the marks cannot be written.
        """
        hit = self._hit(cursor, mark.id)
        rows = self._read([hit])
        if mark.older and not hit.older:
            raise NotMarkedError(f"row {rows[0]['row']} of {hit.shard} has no other version")
        row = rows[1 if mark.older else 0]
        if mark.text >= len(row["texts"]):
            raise NotMarkedError(
                f"row {row['row']} of {hit.shard} has {len(row['texts'])} texts, and no text {mark.text}"
            )
        text, sha256 = row["texts"][mark.text], row["image_sha256"]
        if sha256 is None:
            raise NotMarkedError("the row has no image that a text could be right or wrong of")
        if not text["text"] or not clean(text["text"]):
            raise NotMarkedError("an empty text is neither right nor wrong")
        about = {
            "shard": hit.shard,
            "row": row["row"],
            "source": text["source"],
            "captioner": text["captioner"],
            "version": self.against if mark.older or hit.change == "gone" else self.version,
            "drawn": mark.search.model_dump_json(exclude_defaults=True, exclude={"offset", "limit"}),
        }
        self.marks.mark(sha256, text["text"], mark.true, about)
        return self.marks.counts()

    # --- within ---

    def _searcher(self, cursor: duckdb.DuckDBPyConnection) -> Searcher:
        return Searcher(cursor, compares=self.index.compares)

    def _marked(self, search: Search) -> list[tuple[str, int]]:
        return [] if search.marked is None else self.marks.rows()

    def _hit(self, cursor: duckdb.DuckDBPyConnection, number: int) -> Hit:
        hits = self._searcher(cursor).hits([number])
        if number not in hits:
            raise NoPictureError(f"the index has no row {number}")
        return hits[number]

    def _read(self, hits: Sequence[Hit]) -> list[dict[str, Any]]:
        """The annotations of these rows, each followed by its other version's where there is one."""
        places = [place for hit in hits for place in ((hit.url, hit.place), hit.older) if place]
        return read_places(places, self._options)

    def _shown(self, shard: str, row: Mapping[str, Any]) -> dict[str, Any]:
        texts = []
        for text in row["texts"]:
            words = text["text"] or ""
            scores = [{**one, "itm": _number(one["itm"]), "itc": _number(one["itc"])} for one in text["scores"]]
            verdict = self.marks.verdict(row["image_sha256"], words)
            own = {"text": words[:_LONGEST], "length": len(words), "scores": scores, "marked": verdict}
            texts.append({**text, **own, "itm": _number(text["itm"]), "itc": _number(text["itc"])})
        names = ("image_sha256", "source_sha256", "seed", *PROVENANCE)
        provenance = {
            name: None if row[name] is None else str(row[name]) for name in names
        }  # a seed is too large for JS
        about = {name: _short(row[name]) for name in _ABOUT}
        markable = row["image_sha256"] is not None
        return {"shard": shard, **about, "markable": markable, "texts": texts, "provenance": provenance}


def _number(value: float | None) -> float | None:
    """As JSON has it."""
    return value if value is not None and math.isfinite(value) else None


def _short(value: Any) -> Any:
    return value[:_LONGEST] if isinstance(value, str) else value


def _pairs_version(dataset: CuratedDataset, version: int | None) -> int | None:
    """The version of the pairs that goes with one of the annotations, which may be one ahead."""
    return None if version is None else min(version, dataset.versions()[PAIRS])


def _check_there(
    dataset: CuratedDataset, options: Mapping[str, Any], version: int | None, files: Sequence[str]
) -> None:
    """Say so where a vacuum took an older version's files."""
    if version is None:
        return
    fs, root = connect(f"{dataset.output}/{ANNOTATIONS}", options)
    if is_local(fs):
        gone = [url for url in files if not os.path.exists(url)]
    else:
        with blamed(f"{dataset.output}: cannot be listed"):
            there = {fs.unstrip_protocol(name) for name in persist(lambda: fs.find(root))}
        gone = [url for url in files if url not in there]
    if gone:
        raise DatasetError(
            f"{dataset.output}: version {version} can no longer be looked at: {len(gone):,} of its {len(files):,} "
            f"files are gone, as by a vacuum; the newest version is {dataset.versions()[ANNOTATIONS]}"
        )


def _thresholds(dataset: CuratedDataset) -> dict[str, float]:
    """What most shards were decided with, by source; 0.5 where no record tells."""
    runs = Counter(state.provenance.run for state in dataset.committed().values())
    for run, _ in runs.most_common(1):
        if spec := dataset.record(run).spec:
            found = spec.effective_thresholds
            return {name: fmean(getattr(one, name) for one in found) for name in Thresholds.model_fields}
    return dict.fromkeys(Thresholds.model_fields, 0.5)
