"""What the demo shows beside a run's summary: what became of each kind of noise, and some rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from capfilt.dataset import CuratedDataset
from capfilt.inputs import stem
from capfilt.schema import Source
from capfilt.toyweb import ATTRIBUTES, Scene, TextKind, is_true


@dataclass(frozen=True, slots=True)
class Sample:
    """A row of the web and what was made of it.

    Attributes:
        kind: of the web text.
        texts: (source, text, mean ITM score, whether it was kept, whether it is true).
    """

    kind: TextKind
    texts: tuple[tuple[str, str, float, bool, bool], ...]


@dataclass(frozen=True, slots=True)
class Findings:
    """A curated toy web against its truth.

    Attributes:
        kinds: kind of web text -> (texts that were scored, of these kept).
        samples: one row of each kind that has texts, the first in the data.
    """

    kinds: dict[TextKind, tuple[int, int]]
    samples: tuple[Sample, ...]


def findings(dataset: CuratedDataset, web: Path) -> Findings:
    """Compare a dataset with the truth of the toy web that it was curated from.

    Args:
        web: directory that :func:`capfilt.toyweb.render` wrote.
    """
    truth = {(row["shard"], row["row"]): row for row in pq.read_table(web / "truth.parquet").to_pylist()}
    scored: Counter[TextKind] = Counter()
    kept: Counter[TextKind] = Counter()
    samples: dict[TextKind, Sample] = {}
    table = dataset.annotations().to_table(columns=["shard", "row", "texts"])
    for row in table.sort_by([("shard", "ascending"), ("row", "ascending")]).to_pylist():
        known = truth[f"{stem(row['shard'])}.parquet", row["row"]]
        kind = TextKind(known["truth"])
        texts = [text for text in row["texts"] if text["itm"] is not None]
        for text in texts:
            if text["source"] == Source.WEB:
                scored[kind] += 1
                kept[kind] += text["kept"]
        if len(texts) > 1 and kind not in samples:
            samples[kind] = Sample(kind, tuple(_text(text, known) for text in texts))
    return Findings(
        {kind: (scored[kind], kept[kind]) for kind in TextKind if scored[kind]},
        tuple(samples[kind] for kind in TextKind if kind in samples),
    )


def _text(text: dict[str, Any], known: dict[str, Any]) -> tuple[str, str, float, bool, bool]:
    true = is_true(text["text"], Scene(**{name: known[name] for name in ATTRIBUTES}))
    return text["source"], text["text"], text["itm"], text["kept"], true
