"""What became of the rows and texts, and what the images are: counts by reason, by shard, by format and size."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.dataset import Counts
from capfilt.report.tally import WEB, Tally
from capfilt.schema import Status

SHARDS = 12
"""So many of the shards that keep the least are listed."""

RANGE = (4, 13)
"""log2 of the sides that sizes are counted by: 16 to 8,192 pixels, four bins to an octave; others join the ends."""
PER_OCTAVE = 4

BYTES_RANGE = (8, 26)
"""log2 of the encoded sizes, two bins to an octave: 256 bytes to 64 MiB."""

SMALL = 200
"""Pixels."""


@dataclass(frozen=True)
class Shard:
    """A shard and its rows by status."""

    shard: str
    counts: Counts


@dataclass(frozen=True)
class Outcome:
    """Rows and texts by what became of them.

    Attributes:
        reasons: (status, reason or None, rows), most first.
        texts: (origin, reason or None where kept, texts).
        shards: how many.
        poorest: those with the smallest fraction of rows kept.
    """

    counts: Counts
    reasons: tuple[tuple[str, str | None, int], ...]
    texts: tuple[tuple[str, str | None, int], ...]
    shards: int
    poorest: tuple[Shard, ...]


@dataclass(frozen=True)
class ImageSizes:
    """The images that could be read.

    Attributes:
        formats: (format, images), most first.
        sides: (bin of width, bin of height, images): four bins to an octave from 2 ** RANGE[0] pixels.
        bytes: encoded size, images by bin: two to an octave from 2 ** BYTES_RANGE[0].
        median_width, median_height, median_bytes: None where there is no image.
        small: with a side below SMALL.
    """

    images: int
    formats: tuple[tuple[str, int], ...]
    sides: tuple[tuple[int, int, int], ...]
    bytes: tuple[int, ...]
    median_width: float | None
    median_height: float | None
    median_bytes: float | None
    small: int


def measure_outcome(tally: Tally) -> Outcome:
    """Counts alone."""
    columns = ", ".join(f"count(*) FILTER (status = '{status}')" for status in Status)
    reasons = tally.ask("SELECT status, reason, count(*) AS n FROM rows GROUP BY ALL ORDER BY n DESC, status, reason")
    texts = tally.ask(
        "SELECT origin, reason, count(*) AS n FROM texts GROUP BY origin, reason "
        "ORDER BY any_value(origin <> $web), origin, n DESC",
        web=WEB,
    )
    poorest = tally.ask(
        f"SELECT shard, {columns} FROM rows GROUP BY shard "
        f"ORDER BY count(*) FILTER (status = '{Status.KEPT}') / count(*), count(*) DESC, shard LIMIT {SHARDS}"
    )
    return Outcome(
        Counts(*tally.one(f"SELECT {columns} FROM rows")),
        tuple(reasons),
        tuple(texts),
        tally.one("SELECT count(DISTINCT shard) FROM rows")[0],
        tuple(Shard(shard, Counts(*counts)) for shard, *counts in poorest),
    )


def measure_images(tally: Tally) -> ImageSizes:
    """Of rows whose image has a size."""
    low, high = RANGE
    side = "least({most}, greatest(0, floor((log2({what}) - {low}) * {per})))::INTEGER"
    last = (high - low) * PER_OCTAVE - 1
    width, height = (side.format(what=what, low=low, per=PER_OCTAVE, most=last) for what in ("width", "height"))
    least, most = BYTES_RANGE
    bins = 2 * (most - least)
    encoded = side.format(what="image_bytes", low=least, per=2, most=bins - 1)
    seen = "FROM rows WHERE width > 0 AND height > 0"
    counts = dict(tally.ask(f"SELECT {encoded}, count(*) {seen} AND image_bytes > 0 GROUP BY ALL"))
    medians = [_median(tally, f"SELECT {name} AS value {seen}") for name in ("width", "height", "image_bytes")]
    small, images = tally.one(f"SELECT count(*) FILTER (least(width, height) < {SMALL}), count(*) {seen}")
    return ImageSizes(
        images,
        tuple(
            tally.ask(f"SELECT coalesce(format, 'unknown') AS f, count(*) AS n {seen} GROUP BY f ORDER BY n DESC, f")
        ),
        tuple(tally.ask(f"SELECT {width} AS w, {height} AS h, count(*) {seen} GROUP BY ALL ORDER BY ALL")),
        tuple(counts.get(number, 0) for number in range(bins)),
        median_width=medians[0],
        median_height=medians[1],
        median_bytes=medians[2],
        small=small,
    )


def _median(tally: Tally, values: str) -> float | None:
    """The lower one. DuckDB's own holds all values in memory."""
    (found,) = tally.one(
        "SELECT min(value) FROM (SELECT value, sum(n) OVER (ORDER BY value) AS upto, sum(n) OVER () AS total "
        f"FROM (SELECT value, count(*) AS n FROM ({values}) WHERE value IS NOT NULL GROUP BY value)) "
        "WHERE 2 * upto >= total"
    )
    return None if found is None else float(found)
