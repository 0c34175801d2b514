"""Which rows the gallery shows: of every score some, and those that thresholds decide by the least margin.

Rows of a stratum are drawn by the hash of the block of the input that they lie in, then by their own: every stratum
draws from the same few blocks while these have rows for it, so that few parts of files are read for the pictures.
"""

from __future__ import annotations

from typing import Any

from capfilt.report.tally import Tally
from capfilt.spec import Thresholds

BINS = 50
PER_BIN = 6
EXTREMES = 12
PER_REASON = 6
BLOCK = 1_000
"""Rows of an input file that are drawn together."""

TEXT = 10_000
"""Characters of a text, or of an error's detail, that are shown."""

_DRAWN = f"hash(shard, row // {BLOCK}), hash(shard, row), shard, row"

_CHOSEN = f"""
CREATE OR REPLACE TABLE chosen AS
WITH scored AS (
  SELECT rows.id, shard, row, web, synthetic, greatest(web, synthetic) AS best,
         greatest(coalesce(web - $web, -2), coalesce(synthetic - $synthetic, -2)) AS margin
  FROM decided JOIN rows USING (id)
)
SELECT id FROM scored QUALIFY row_number() OVER (PARTITION BY least({BINS - 1}, floor(best * {BINS})) ORDER BY {_DRAWN})
  <= {PER_BIN}
UNION SELECT id FROM (SELECT id FROM scored WHERE margin >= 0 ORDER BY margin, {_DRAWN} LIMIT {EXTREMES})
UNION SELECT id FROM (SELECT id FROM scored WHERE margin < 0 ORDER BY margin DESC, {_DRAWN} LIMIT {EXTREMES})
UNION SELECT id FROM (SELECT id FROM scored WHERE synthetic IS NOT NULL ORDER BY web - synthetic, {_DRAWN}
                      LIMIT {EXTREMES})
UNION SELECT id FROM (SELECT id FROM scored WHERE web IS NOT NULL ORDER BY synthetic - web, {_DRAWN} LIMIT {EXTREMES})
UNION SELECT id FROM rows WHERE id NOT IN (SELECT id FROM decided)
  QUALIFY row_number() OVER (PARTITION BY status, reason ORDER BY {_DRAWN}) <= {PER_REASON}
"""


def choose_rows(tally: Tally, in_force: Thresholds) -> list[dict[str, Any]]:
    """Rows with their texts, in order of shard and row; at most a few hundred.

    Each has the columns of `rows`, `margin` (None where thresholds do not decide) and `texts`: of each its source,
    origin, text, score, itc, kept and reason. Longer texts than TEXT are cut, and `cut` says how many characters of it
    are not shown.
    """
    tally.ask(_CHOSEN, web=in_force.web, synthetic=in_force.synthetic)
    rows = tally.records(
        """
        SELECT rows.*, greatest(web - $web, synthetic - $synthetic) AS margin
        FROM rows SEMI JOIN chosen USING (id) LEFT JOIN decided USING (id) ORDER BY shard, row
        """,
        web=in_force.web,
        synthetic=in_force.synthetic,
    )
    texts: dict[int, list[dict[str, Any]]] = {row["id"]: [] for row in rows}
    for text in tally.records(
        f"""
        SELECT id, source, origin, left(text, {TEXT}) AS text, greatest(0, length(text) - {TEXT}) AS cut,
               score, itc, kept, reason
        FROM texts SEMI JOIN chosen USING (id)
        """
    ):
        texts[text.pop("id")].append(text)
    for row in rows:
        own = texts[row.pop("id")]
        row["texts"] = sorted(own, key=lambda text: (text["source"] != "web", -(text["score"] or 0), text["origin"]))
        row["detail"] = row["detail"] and row["detail"][:TEXT]
    return rows
