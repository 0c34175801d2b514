"""One version's annotations in a DuckDB database of their own, on disk: statistics of any size in bounded memory.

    rows      id, shard, row, url, format, width, height, image_sha256, image_bytes, status, reason, detail, note, run
    texts     id, source, origin, text, clean, score, itc, kept, reason
    decided   id, web, synthetic: the best score of each source, of the rows that thresholds decide about; a text with a
              word that is kept out has no say

`origin` is `web`, or the captioner's name. `score` is what thresholds are compared with: the filters' mean ITM or,
where they vote, the score that more than half of them reach, which under one threshold for all decides alike.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Self

import duckdb
import pyarrow as pa

from capfilt.schema import Reason, Source, Status
from capfilt.spec import Decision

MEMORY = "600MB"
"""Of DuckDB's own; what does not fit lies in its file."""

THREADS = 4
"""At most: each needs its share of the memory."""

WEB = str(Source.WEB)
SYNTHETIC = "synthetic"
ALL = "all captioners"
"""Together. No origin has this name: a card's has no space in it."""

COLUMNS = [
    *("shard", "row", "url", "format", "width", "height", "image_sha256", "image_bytes", "status", "reason", "detail"),
    *("note", "texts", "run"),
]
"""What is read of the annotations."""

LONGEST = 10_000
"""Characters of a text that statistics look at."""

# As capfilt.text.clean, in RE2's syntax; but for the cut to 50 words, which would hide a caption that runs on.
_UNSEEN = (
    r"[\x00-\x08\x0e-\x1b\x7f-\x{84}\x{86}-\x{9f}\x{ad}\x{61c}\x{180e}\x{200b}-\x{200f}\x{202a}-\x{202e}"
    r"\x{2060}-\x{206f}\x{feff}\x{fff9}-\x{fffb}\x{e0000}-\x{e007f}]+"
)
_BETWEEN_WORDS = r'[\s\p{Z}\x0b\x1c-\x1f\x{85}.!"()*#:;~]+'

_TEXTS = f"""
CREATE TABLE texts AS SELECT
  id,
  t.source AS source,
  CASE WHEN t.source = '{WEB}' THEN '{WEB}' WHEN t.captioner = '{WEB}' THEN 'captioner {WEB}'
       ELSE coalesce(t.captioner, '{SYNTHETIC}') END AS origin,
  t.text AS text,
  trim(regexp_replace(regexp_replace(lower(left(t.text, {LONGEST})), $unseen, '', 'g'), $between, ' ', 'g')) AS clean,
  {{score}} AS score,
  t.itc AS itc,
  t.kept AS kept,
  t.reason AS reason
FROM (SELECT id, unnest(texts) AS t FROM staged)
"""
_MEAN = "t.itm"
_VOTE = "list_sort(list_transform(t.scores, lambda s: s.itm), 'DESC')[len(t.scores) // 2 + 1]"

_DECIDED = f"""
CREATE TABLE decided AS SELECT
  id,
  max(score) FILTER (texts.source = '{WEB}') AS web,
  max(score) FILTER (texts.source <> '{WEB}') AS synthetic
FROM texts JOIN rows USING (id)
WHERE score IS NOT NULL AND texts.reason IS DISTINCT FROM '{Reason.KEPT_OUT_WORD}'
  AND (rows.status = '{Status.KEPT}' OR rows.reason = '{Reason.NO_MATCH}')
GROUP BY id
"""


class Tally:
    """See the module. A context manager; what it made is gone at its end."""

    def __init__(self, batches: pa.RecordBatchReader, folder: str) -> None:
        """Read the annotations, once, into `rows`; :meth:`flatten` makes the other tables.

        Args:
            batches: of COLUMNS.
            folder: an empty directory for the database, which takes about as much as the annotations.
        """
        config: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY,
            "threads": min(THREADS, os.cpu_count() or 1),
            "temp_directory": os.path.join(folder, "spilt"),
            "preserve_insertion_order": "false",
            "autoinstall_known_extensions": "false",  # a download
            "autoload_known_extensions": "false",
        }
        self._connection = duckdb.connect(os.path.join(folder, "tally.duckdb"), config=config)
        try:
            self._read(batches)
        except BaseException:
            self._connection.close()
            raise

    def _read(self, batches: pa.RecordBatchReader) -> None:
        connection = self._connection
        connection.register("annotations", batches)
        connection.execute("CREATE TABLE staged AS SELECT row_number() OVER () AS id, * FROM annotations")
        connection.unregister("annotations")
        connection.execute("CREATE VIEW rows AS SELECT * EXCLUDE (texts) FROM staged")

    def flatten(self, decision: Decision) -> None:
        """Make `texts` and `decided`."""
        score = _VOTE if decision == "vote" else _MEAN
        self._connection.execute(_TEXTS.format(score=score), {"unseen": _UNSEEN, "between": _BETWEEN_WORDS})
        self._connection.execute(_DECIDED)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, query: str, **values: Any) -> list[tuple[Any, ...]]:
        """The rows of a query whose answer is small; `values` are its `$name`s."""
        return self._connection.execute(query, values or None).fetchall()

    def one(self, query: str, **values: Any) -> tuple[Any, ...]:
        """The only row of a query."""
        (row,) = self.ask(query, **values)
        return row

    def records(self, query: str, **values: Any) -> list[dict[str, Any]]:
        """The rows of a query, each by column."""
        answer = self._connection.execute(query, values or None)
        names = [column[0] for column in answer.description or ()]
        return [dict(zip(names, row, strict=True)) for row in answer.fetchall()]

    def batches(self, query: str, **values: Any) -> Iterator[pa.RecordBatch]:
        """The rows of a query of any size, a batch at a time."""
        yield from self._connection.sql(query, params=values or None).to_arrow_reader(100_000)

    def give(self, name: str, column: str, values: Sequence[str]) -> None:
        """Make a table of one column of texts, for queries to join."""
        table = pa.table({column: pa.array(values, pa.string())})
        self._connection.register("given", table)
        self._connection.execute(f"CREATE OR REPLACE TABLE {name} AS SELECT DISTINCT * FROM given")
        self._connection.unregister("given")
