"""The dataset card, README.md: what is in an export, how it came about, what it may be used for.

Names of models and licences are from the runs' records; no text of the data is in it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from capfilt.dataset import CuratedDataset
from capfilt.schema import Reason, Status
from capfilt.spec import ExportSpec

_CHOICES = {
    "best": "the kept text that matches best (mean ITM probability of the filters)",
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
    specs = [record.details["spec"] for record in dataset.runs() if record.run in runs and "spec" in record.details]
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


def _how(specs: Sequence[Mapping[str, Any]], runs: int) -> Iterable[str]:
    """What the runs that made the rows used. Rows of runs with other settings may stand side by side."""
    if len(specs) < runs:
        yield f"## How it was made\n\n{runs - len(specs):,} of {runs:,} runs are not on record.\n"
    ways = {json.dumps(_way(spec), sort_keys=True) for spec in specs}
    for number, way in enumerate(map(json.loads, sorted(ways))):
        yield f"## How it was made{f' ({number + 1} of {len(ways)})' if len(ways) > 1 else ''}\n"
        yield _table(("model", "name", "checkpoint", "licence"), way["models"])
        yield _table(("filter", "threshold, web", "threshold, synthetic"), way["thresholds"])
        yield f"A text is kept by `decision: {way['decision']}`, synthetic ones by `keep: {way['keep']}`. Sampling: "
        yield ", ".join(f"{name} {value}" for name, value in way["sampling"].items()) + ".\n"


def _way(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's record says that matters to a row; of a run of an older capfilt it may lack."""
    cards = [("captioner", one) for one in spec.get("captioners", ())] + [
        ("filter", f) for f in spec.get("filters", ())
    ]
    override = {name: value for name, value in (spec.get("thresholds") or {}).items() if value is not None}
    thresholds = [(one["name"], {**one.get("thresholds", {}), **override}) for one in spec.get("filters", ())]
    return {
        "models": [(role, one["name"], _checkpoint(one), one.get("licence", "unknown")) for role, one in cards],
        "thresholds": [(name, own.get("web", ""), own.get("synthetic", "")) for name, own in thresholds],
        "decision": spec.get("decision", "mean"),
        "keep": spec.get("keep", "best"),
        "sampling": spec.get("sampling", {}),
    }


def _checkpoint(one: Mapping[str, Any]) -> str:
    checkpoint = one.get("checkpoint", {})
    if "hub" in checkpoint:
        return f"[{checkpoint['hub']}](https://huggingface.co/{checkpoint['hub']}) at {checkpoint['revision'][:12]}"
    return "local"  # the path is of no use to a reader


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
