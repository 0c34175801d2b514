"""What is looked for, as SQL over the index: fixed text and parameters, whatever a request holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import duckdb
from pydantic import BaseModel, ConfigDict, Field, field_validator

from capfilt.schema import Source, Status

Score = Field(default=None, ge=-1, le=2, allow_inf_nan=False)

_TERM = re.compile(r'"([^"]*)"|(\S+)')
_TERMS = 8

_SORTS = {
    "table": "rows.id",
    "web": "rows.web",
    "synthetic": "rows.synthetic",
    "borderline": "least(abs(rows.web - $web_threshold), abs(rows.synthetic - $synthetic_threshold))",
    "random": "hash(rows.id, $seed)",
}
_SORT_PARAMETERS = {"borderline": ("web_threshold", "synthetic_threshold"), "random": ("seed",)}


class Search(BaseModel):
    """What is looked for, and in what order. Fields that are not given do not restrict.

    Attributes:
        text: terms that the row's texts, web and synthetic, hold, each, somewhere; "in quotes" a term may hold spaces.
        url: is in the row's URL.
        reason: of the row, or of one of its texts.
        source: of a text that is kept.
        shard: is in the shard's name.
        web_min ... synthetic_max: bounds of the ITM score of the web's text, and of the best synthetic one.
        marked: whether a text of the row was marked.
        changed: whether the row's outcome differs between the two versions.
        web_threshold, synthetic_threshold: what `borderline` rows are near to.
        seed: of the `random` order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = Field(default="", max_length=1000)
    url: str = Field(default="", max_length=1000)
    status: Status | None = None
    reason: str | None = Field(default=None, max_length=100)
    source: Source | None = None
    shard: str = Field(default="", max_length=300)
    row: int | None = Field(default=None, ge=0, le=2**62)
    web_min: float | None = Score
    web_max: float | None = Score
    synthetic_min: float | None = Score
    synthetic_max: float | None = Score
    marked: bool | None = None
    changed: bool = False
    sort: Literal["table", "web", "synthetic", "borderline", "random"] = "table"
    descending: bool = False
    web_threshold: float = Field(default=0.5, ge=0, le=1)
    synthetic_threshold: float = Field(default=0.5, ge=0, le=1)
    seed: int = Field(default=0, ge=0, le=2**31 - 1)
    offset: int = Field(default=0, ge=0, le=10**12)
    limit: int = Field(default=25, ge=1, le=100)

    @field_validator("text")
    @classmethod
    def _few(cls, text: str) -> str:
        if (count := len(terms(text))) > _TERMS:
            raise ValueError(f"{count} words; at most {_TERMS}, or some of them in double quotes as one")
        return text


@dataclass(frozen=True, slots=True)
class Hit:
    """A row that was found: where it lies in its table, and where the other version of it does, if that differs.

    Attributes:
        id: the index's.
        url: of the data file; `place` is the row's position in it.
        older: where the older version of it is; None where its outcome, texts and scores are the same there.
        change: of the outcome between the two versions; None where there is none, or one version. A row that is gone is
            the older's.
    """

    id: int
    shard: str
    url: str
    place: int
    older: tuple[str, int] | None = None
    change: Literal["changed", "gained", "gone"] | None = None


class Searcher:
    """Searches an index.

    Args:
        compares: whether it holds two versions; rows are then the newer one's, and of `changed` ones also those gone.
    """

    def __init__(self, cursor: duckdb.DuckDBPyConnection, *, compares: bool) -> None:
        self._cursor, self._compares = cursor, compares

    def page(self, search: Search, marked: Sequence[tuple[str, int]] = ()) -> tuple[list[Hit], bool]:
        """A page of hits, and whether there are more after it.

        Args:
            marked: (shard, row) of the rows with a mark.
        """
        source, values = self._source(search, marked)
        sort = f"{_SORTS[search.sort]} {'DESC' if search.descending else 'ASC'} NULLS LAST"
        values |= {name: getattr(search, name) for name in _SORT_PARAMETERS.get(search.sort, ())}
        found = self._cursor.execute(
            f"SELECT rows.id {source} ORDER BY {sort}{', rows.id' * (search.sort != 'table')} "
            "LIMIT $limit OFFSET $offset",
            {**values, "limit": search.limit + 1, "offset": search.offset},
        ).fetchall()
        ids = [number for (number,) in found]
        hits = self.hits(ids[: search.limit])
        return [hits[number] for number in ids[: search.limit]], len(ids) > search.limit

    def count(self, search: Search, marked: Sequence[tuple[str, int]] = ()) -> int:
        """How many rows a search finds."""
        source, values = self._source(search, marked)
        ((count,),) = self._cursor.execute(f"SELECT count(*) {source}", values).fetchall()
        return int(count)

    def facets(self) -> list[tuple[str, str | None, int]]:
        """Rows by status and reason, most first."""
        source, values = self._source(Search(), ())
        query = f"SELECT status, reason, count(*) {source} GROUP BY ALL ORDER BY 3 DESC, 1, 2"
        return self._cursor.execute(query, values).fetchall()

    def text_reasons(self) -> list[str]:
        """The reasons that single texts have."""
        query = "SELECT DISTINCT unnest(string_split(t, '|')) AS r FROM (SELECT DISTINCT text_reasons AS t FROM rows)"
        return sorted(reason for (reason,) in self._cursor.execute(query).fetchall() if reason)

    def hits(self, ids: Sequence[int]) -> dict[int, Hit]:
        """The rows of these ids that the index has, by id."""
        query = """
            SELECT
                w.id, f.shard, f.url, o.url, c.older,
                CASE WHEN c.id IS NULL THEN NULL WHEN c.newer IS NULL THEN 'gone' WHEN c.older IS NULL THEN 'gained'
                WHEN c.outcome THEN 'changed' END
            FROM (SELECT unnest($ids::BIGINT[]) AS id) AS w
            JOIN files AS f ON f.number = w.id >> 32
            LEFT JOIN (FROM changes WHERE id IN (SELECT unnest($ids::BIGINT[]))) AS c ON c.id = w.id
            LEFT JOIN files AS o ON o.number = c.older >> 32
        """
        hits = {}
        for number, shard, url, older_url, older, change in self._cursor.execute(query, {"ids": list(ids)}).fetchall():
            other = None if older is None or change == "gone" else (older_url, older & 0xFFFFFFFF)
            hits[number] = Hit(number, shard, url, number & 0xFFFFFFFF, other, change)
        return hits

    def _source(self, search: Search, marked: Sequence[tuple[str, int]]) -> tuple[str, dict[str, Any]]:
        """FROM and WHERE, and their parameters."""
        conditions, values = _conditions(search)
        source = "FROM rows"
        if search.changed:
            source += " JOIN changes ON changes.id = rows.id AND changes.outcome"
        elif self._compares:
            conditions.append(
                "rows.file IN (SELECT number FROM files JOIN opened ON opened.url = files.url WHERE newer)"
            )
        if search.marked is not None:
            conditions.append(
                f"(rows.file, rows.row) {'' if search.marked else 'NOT '}IN (SELECT number, m.row FROM files JOIN "
                "(SELECT unnest($mark_shards::VARCHAR[]) AS shard, unnest($mark_rows::BIGINT[]) AS row) AS m "
                "ON m.shard = files.shard)"
            )
            values |= {"mark_shards": [shard for shard, _ in marked], "mark_rows": [row for _, row in marked]}
        return f"{source} WHERE {' AND '.join(conditions)}" if conditions else source, values


def _conditions(search: Search) -> tuple[list[str], dict[str, Any]]:
    """Of the row's own columns; the cheap ones first."""
    conditions: list[str] = []
    values: dict[str, Any] = {}

    def need(condition: str, **parameters: Any) -> None:
        conditions.append(condition)
        values.update(parameters)

    if search.row is not None:
        need("rows.row = $row", row=search.row)
    if search.shard:
        need("rows.file IN (SELECT number FROM files WHERE contains(shard, $shard))", shard=search.shard)
    if search.status is not None:
        need("rows.status = $status", status=str(search.status))
    if search.reason is not None:
        need("(rows.reason = $reason OR contains(rows.text_reasons, '|' || $reason || '|'))", reason=search.reason)
    if search.source is not None:
        need("rows.kept_web" if search.source is Source.WEB else "rows.kept_synthetic")
    for column in ("web", "synthetic"):
        for side, sign in (("min", ">="), ("max", "<=")):
            if (bound := getattr(search, f"{column}_{side}")) is not None:
                need(f"rows.{column} {sign} ${column}_{side}", **{f"{column}_{side}": bound})
    for number, term in enumerate(terms(search.text)):
        need(f"contains(rows.text, lower($term{number}))", **{f"term{number}": term})
    if search.url:
        need("contains(rows.url, lower($url))", url=search.url)
    return conditions, values


def terms(text: str) -> list[str]:
    """What a row's texts must hold: words, and what stands in double quotes."""
    return [quoted or plain for quoted, plain in _TERM.findall(text) if quoted or plain]
