"""The page: one HTML file that holds all it needs and asks no one for anything.

What strangers wrote (captions, URLs, names, errors) reaches it in two ways only: through Jinja, which escapes it, and
as JSON in an element that is no script, from which the page's own scripts set text, never markup. Characters that turn
or hide text are spelt out. The content security policy lets the page's own scripts and styles run, each by its hash,
and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from capfilt.records import RunRecord
from capfilt.redaction import redacted
from capfilt.report.captions import DRAWN_TEXTS, DRAWN_WORDS, NGRAMS
from capfilt.report.drift import SHIFT, alarms, shifts
from capfilt.report.judged import Judged
from capfilt.report.numbers import compare
from capfilt.report.outcome import BYTES_RANGE, PER_OCTAVE, RANGE
from capfilt.report.pictures import Key
from capfilt.report.statistics import Statistics
from capfilt.report.tally import WEB
from capfilt.schema import SHARD, Reason
from capfilt.spec import Thresholds
from capfilt.terminal import escaped

MOST = 10_000_000
"""Bytes of a page."""

SCRIPTS = (
    "vendor/d3.min.js",
    "vendor/plot.umd.min.js",
    "show.js",
    "charts.js",
    "thresholds.js",
    "gallery.js",
    "page.js",
)

PLOT_STYLE = """:where(.plot) {
  --plot-background: white;
  display: block;
  height: auto;
  height: intrinsic;
  max-width: 100%;
}
:where(.plot text),
:where(.plot tspan) {
  white-space: pre;
}"""
"""What Observable Plot puts into each chart."""


@dataclass(frozen=True)
class Page:
    """What a page says.

    Attributes:
        all_rows: of the dataset, where `now` is about some of its shards.
        other: the dataset that `before` is of; None where it is the same.
        before_note, truth_note: why there is nothing to compare with, or no truth.
        rows: of the gallery, as capfilt.report.gallery.choose_rows returns them.
        pictures: of these rows, data URLs or why there is none.
        gallery_bytes: that the gallery may take.
        runs: the newest on record that say how long their stages took, the newest first.
    """

    dataset: str
    all_rows: int | None
    now: Statistics
    before: Statistics | None
    other: str | None
    before_note: str
    truth_note: str
    rows: Sequence[Mapping[str, Any]]
    pictures: Mapping[Key, str]
    gallery_bytes: int
    runs: Sequence[RunRecord]
    made: datetime

    @property
    def judged(self) -> Mapping[str, Judged]:
        """The scores against the truth."""
        return self.now.judged

    def html(self) -> bytes:
        """The file.

        Raises:
            ValueError: it would be too large, which is a bug: what can grow is cut.
        """
        scripts = [_source(name) for name in SCRIPTS]
        style = _source("page.css")
        gallery, left_out = self._gallery()
        template = _ENVIRONMENT.get_template("page.html.j2")
        page = template.render(
            page=self,
            now=self.now,
            origins=self._origins(),
            policy=_policy(scripts, [style, PLOT_STYLE]),
            style=Markup(style),
            scripts=[Markup(script) for script in scripts],
            texts_by_origin=_by_origin(self.now),
            data=_json({**self._data(), "gallery": gallery}),
            left_out=left_out,
            alarms=alarms(self.now, self.before),
            changes=compare(self.before, self.now) if self.before else [],
            shifts=shifts(self.before, self.now) if self.before else [],
            shift_limit=SHIFT,
            ngrams=NGRAMS,
            drawn_texts=DRAWN_TEXTS,
            drawn_words=DRAWN_WORDS,
            web=WEB,
            capfilt=version("capfilt"),
        ).encode()
        if len(page) > MOST:
            raise ValueError(f"the page has {len(page):,} bytes")
        return page

    def _data(self) -> dict[str, Any]:
        """For the scripts."""
        now, scores = self.now, self.now.scores
        cells = np.argwhere(scores.rows)
        captions = {
            origin: {"lengths": own.lengths, "repeated": own.repeated, "loops": own.loops / own.texts.total}
            for origin, own in now.captions.items()
        }
        return {
            "origins": self._origins(),
            "unit": now.rule.unit,
            "thresholds": scores.thresholds,
            "inForce": _by_source(now.rule.thresholds),
            "decided": [[*map(int, cell), int(scores.rows[tuple(cell)])] for cell in cells],
            "rows": now.outcome.counts.rows,
            "itm": {origin: counts.tolist() for origin, counts in scores.itm.items()},
            "itc": {origin: counts.tolist() for origin, counts in scores.itc.items() if counts.any()},
            "captions": captions,
            "images": {
                **{"sides": now.images.sides, "from": RANGE[0], "perOctave": PER_OCTAVE},
                **{"bytes": now.images.bytes, "bytesFrom": BYTES_RANGE[0], "formats": now.images.formats},
            },
            "judged": {source: asdict(own) for source, own in self.judged.items()},
            "before": None if self.before is None else _before(self.before),
            "runs": [_run(record) for record in self.runs],
        }

    def _origins(self) -> list[str]:
        """Of texts, each with a colour of its own: the web, then captioners, then those that the version before had."""
        found = {**self.now.scores.itm, **self.now.captions}
        if self.before is not None:
            found |= {**self.before.scores.itm, **self.before.captions}
        return [WEB, *(origin for origin in found if origin != WEB)]

    def _gallery(self) -> tuple[list[dict[str, Any]], int]:
        """The rows that fit, those that thresholds decide by the least margin first; and how many do not."""
        thresholds = _by_source(self.now.rule.thresholds)

        def margin(row: Mapping[str, Any]) -> float:
            return 2.0 if row["margin"] is None else abs(row["margin"])

        shown: list[dict[str, Any]] = []
        size = 0
        for row in sorted(self.rows, key=margin):
            one = _card(row, self.pictures.get((row[SHARD], row["row"]), "no picture"), thresholds)
            own = len(_json(one))
            if size + own <= self.gallery_bytes:
                size += own
                shown.append(one)
        return shown, len(self.rows) - len(shown)


# --- parts ---


def _card(row: Mapping[str, Any], picture: str, thresholds: Mapping[str, float]) -> dict[str, Any]:
    texts = [
        {
            "source": text["source"],
            "origin": escaped(text["origin"]),
            "text": None if text["text"] is None else escaped(text["text"]),
            "cut": text["cut"],
            "score": text["score"],
            "itc": text["itc"],
            "kept": text["kept"],
            "reason": text["reason"],
        }
        for text in row["texts"]
    ]
    judged = [text for text in texts if text["score"] is not None and text["reason"] != Reason.KEPT_OUT_WORD]
    best = {source: max((t["score"] for t in judged if t["source"] == source), default=None) for source in thresholds}
    about = {name: row[name] for name in ("row", "width", "height", "format", "image_bytes", "status", "reason")}
    said = {name: row[name] and escaped(redacted(row[name])) for name in ("url", "detail", "note")}
    has = {"picture": picture} if picture.startswith("data:") else {"noPicture": escaped(picture)}
    decided = row["status"] != "error" and row["margin"] is not None
    return {**about, **said, **has, "shard": row[SHARD], "texts": texts, "best": best, "decided": decided}


def _by_origin(now: Statistics) -> dict[str, list[tuple[str, str | None, int]]]:
    found: dict[str, list[tuple[str, str | None, int]]] = {}
    for origin, reason, n in now.outcome.texts:
        found.setdefault(origin, []).append((origin, reason, n))
    return found


def _before(before: Statistics) -> dict[str, Any]:
    return {
        "version": before.version,
        "unit": before.rule.unit,
        "thresholds": before.scores.thresholds,
        "itm": {origin: counts.tolist() for origin, counts in before.scores.itm.items()},
        "lengths": {origin: own.lengths for origin, own in before.captions.items()},
    }


def _run(record: RunRecord) -> dict[str, Any]:
    return {
        "run": record.run,
        "started": record.started,
        "rows": record.rows,
        "seconds": record.details["seconds"],
    }


def _by_source(thresholds: Thresholds) -> dict[str, float]:
    return {"web": thresholds.web, "synthetic": thresholds.synthetic}


# --- the file ---


def _source(name: str) -> str:
    return files("capfilt.report").joinpath("static", *name.split("/")).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    def hashes(sources: Sequence[str]) -> str:
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'" for source in sources
        )

    return (
        f"default-src 'none'; script-src {hashes(scripts)}; style-src {hashes(styles)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _json(value: Any) -> Markup:
    """JSON that no HTML parser takes for anything else."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _number(value: float | None, kind: str = "number") -> str:
    """As a person reads it."""
    if value is None:
        return "–"
    if kind == "fraction" and not value:
        return "0%"
    if kind == "fraction":
        return f"{100 * value:.2f}%" if abs(value) < 0.1 else f"{100 * value:.1f}%"
    if kind == "count" or (value == int(value) and abs(value) >= 100):
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _change(change: Any) -> str:
    """What is added from before to now, as a person reads it."""
    if change.before is None or change.now is None:
        return ""
    difference = change.now - change.before
    if abs(difference) < 1e-9:
        return "="
    sign = "+" if difference > 0 else "−"
    if change.kind == "fraction":
        return f"{sign}{abs(100 * difference):.2f} points"
    return f"{sign}{_number(abs(difference), change.kind)}"


def _words(name: str) -> str:
    """A reason as words."""
    return name.replace("_", " ")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("capfilt.report", "static"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "change": _change, "words": _words, "shown": escaped}
    return environment


_ENVIRONMENT = _environment()
