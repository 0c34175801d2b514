"""The dataset card, README.md: what is in an export, how it came about, what it may be used for.

Names of models and licences are from the runs' records; no text of the data is in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from capfilt.dataset import CuratedDataset
from capfilt.schema import Reason, Status
from capfilt.spec import (
    AnyCard,
    CaptionerCard,
    ClassifierCard,
    CurateSpec,
    EndpointCard,
    ExportSpec,
    HubCheckpoint,
    KeepOut,
)

_CHOICES = {
    "best": "the kept text that matches best (by the mean of the filters' scores)",
    "web-first": "the web's text where it was kept, else the best synthetic one",
    "mixture": "where both kinds were kept, the web's with probability {p:g} and else the best synthetic one, drawn by "
    "seed {seed} and the image's sha256",
    "all": "the kept text that matches best; every kept text is in `captions`",
}
_AUTHORS_ALL = "every kept text, an entry each"


def card(spec: ExportSpec, dataset: CuratedDataset, manifest: Mapping[str, Any], usage: str) -> str:
    """README.md of an export.

    Args:
        dataset: as of the version that is exported.
        manifest: asked, sources, formats; see capfilt.export.manifest.
        usage: how the files are read.
    """
    rule = _AUTHORS_ALL if (spec.format, spec.text) == ("authors", "all") else _CHOICES[spec.text]
    rule = rule.format(p=spec.web_probability, seed=spec.seed)
    asked, sources = manifest["asked"], manifest["sources"]
    origin = ", ".join(f"{count:,} {name}" for name, count in sources.items())
    images = ", ".join(f"{count:,} {name}" for name, count in manifest["formats"].items())
    runs = {state.provenance.run for state in dataset.committed().values()}
    specs = [record.spec for record in dataset.runs() if record.run in runs and record.spec is not None]
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(spec, asked['rows']), sort_keys=False)}---\n",
        "# Image-text pairs, curated with CapFilt\n",
        f"{asked['rows']:,} pairs of an image and a text: from the web, texts rewritten by captioners and judged by "
        "filters (CapFilt, [BLIP](https://arxiv.org/abs/2201.12086)), written by "
        f"[capfilt](https://github.com/capfilt/capfilt) {asked['capfilt']} from version {asked['version']} of the "
        "dataset.\n",
        f"- Text: {rule}. Chosen: {origin}.",
        f"- Images: bytes as they came, never re-encoded: {images}.",
        f"- Files: {asked['shards']:,} with rows, in order of the dataset's (shard, row), each once; `manifest.json` "
        "has the rows, bytes and sha256 of every file.\n",
        f"## Reading it\n\n{usage}",
        f"## What became of the input\n\n{_reasons(dataset)}",
        *_how(specs, len(runs)),
        "## Licence\n",
        "The images, and the texts whose source is `web`, belong to whoever put them on the web; `url` says where they "
        "were. Synthetic texts were written by the captioners above, whose weights have the licences named there. "
        "Whether a use is allowed is for whoever uses it to find out.",
    ]
    return "\n".join(parts) + "\n"


def _front_matter(spec: ExportSpec, rows: int) -> dict[str, Any]:
    """What the Hugging Face hub reads of a card; datasets finds the files by it."""
    sizes = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
    size = next((name for bound, name in sizes.items() if rows < bound), "n>10M")
    matter: dict[str, Any] = {
        "task_categories": ["image-to-text", "text-to-image"],
        "size_categories": [size],
        "tags": ["capfilt", "image-text"],
    }
    if spec.format in ("huggingface", "parquet"):
        files = [{"split": "train", "path": "data/train-*.parquet"}]
        matter["configs"] = [{"config_name": "default", "data_files": files}]
    return matter


def _reasons(dataset: CuratedDataset) -> str:
    counts = dataset.reasons()
    by_status: Counter[str] = Counter()
    for (status, _), count in counts.items():
        by_status[status] += count
    total = sum(counts.values())
    rows = [
        (f"{count:,}", f"{count / total:.1%}", status, reason or "")
        for (status, reason), count in counts.items()
        if status != Status.KEPT
    ]
    kept = by_status[Status.KEPT]
    return _table(
        ("rows", "share", "status", "reason"), [(f"{kept:,}", f"{kept / total:.1%}", str(Status.KEPT), ""), *rows]
    ) + (f"\n`{Reason.NO_MATCH}`: no text of the image, the web's or a captioner's, passed the filters.\n")


def _how(specs: Sequence[CurateSpec], runs: int) -> Iterable[str]:
    """What the runs that made the rows used. Rows of runs with other settings may stand side by side."""
    if len(specs) < runs:
        unknown = f"{runs - len(specs):,} of {runs:,} runs"
        yield f"## How it was made\n\nSettings of {unknown} are not on record, or of another version of capfilt.\n"
    ways = sorted({"\n".join(_way(spec)) for spec in specs})
    for number, way in enumerate(ways, 1):
        yield f"## How it was made{f' ({number} of {len(ways)})' if len(ways) > 1 else ''}\n\n{way}\n"


def _way(spec: CurateSpec) -> Iterator[str]:
    """What of a run's spec matters to a row."""
    classifier = spec.keep_out.classifier if spec.keep_out else None
    cards = [*spec.captioners, *spec.filters, *([classifier] if classifier else [])]
    yield _table(
        ("model", "name", "checkpoint", "licence"),
        [(card.role, card.name, _weights(card), card.licence) for card in cards],
    )
    yield _table(("filter", "threshold, web", "threshold, synthetic", "unit"), _thresholds(spec))
    yield f"A text is kept by `decision: {spec.decision}`, synthetic ones by `keep: {spec.keep}`. {_sampling(spec)}"
    if spec.keep_out and (lists := list(_kept_out(spec.keep_out))):
        yield f"\nKept out: {'; '.join(lists)}."
    if copies := spec.duplicates:
        near = "" if copies.near_bits is None else f", or hashes that differ in at most {copies.near_bits} bits"
        url = f", and {copies.max_per_url:,} of a URL" if copies.max_per_url else ""
        yield f"\nOf copies (the same bytes{near}) {copies.max_per_image:,} of an image may stay{url}."


def _thresholds(spec: CurateSpec) -> list[tuple[str, str, str, str]]:
    """What scores were compared with: those of each filter for a vote, or of their mean."""
    judges = [(card.name, card.unit) for card in spec.filters]
    if spec.decision == "mean" and len(judges) > 1:
        judges = [(f"mean of {', '.join(name for name, _ in judges)}", judges[0][1])]
    return [
        (name, f"{own.web:.6g}", f"{own.synthetic:.6g}", unit)
        for (name, unit), own in zip(judges, spec.effective_thresholds, strict=True)
    ]


def _sampling(spec: CurateSpec) -> str:
    """How captioners write; of one that has its own way, what is other."""
    ways: dict[str, Mapping[str, Any]] = {"Sampling": spec.sampling.model_dump()}
    for card in spec.captioners:
        if not isinstance(card, CaptionerCard):
            ways[f"Of {card.name}"] = card.sampling.model_dump(exclude_none=True)
    return " ".join(
        f"{title}: {', '.join(f'{name} {value}' for name, value in way.items())}." for title, way in ways.items() if way
    )


def _kept_out(lists: KeepOut) -> Iterator[str]:
    """How much is listed; what, is no part of a card."""
    for what, listed in (("domains", lists.domains), ("words in texts", lists.words)):
        if listed:
            yield f"{what} ({len(listed):,} on the list)"
    if own := lists.classifier:
        labels = ", ".join(f"`{label}`" for label in own.labels)
        yield f"images that {own.name} takes for {labels} with a probability of {own.threshold:g} or more"


def _weights(card: AnyCard | ClassifierCard) -> str:
    """Where they come from, as far as a reader can follow."""
    if isinstance(card, EndpointCard):
        return f"{card.served_model}{f', revision {card.revision}' if card.revision else ''}, behind an endpoint"
    if isinstance(card.checkpoint, HubCheckpoint):
        hub = card.checkpoint.hub
        return f"[{hub}](https://huggingface.co/{hub}) at {card.checkpoint.revision[:12]}"
    return "local"  # the path is of no use to a reader


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
