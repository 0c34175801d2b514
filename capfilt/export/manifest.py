"""What is on record of an export: of each shard while it is written, and manifest.json once it is complete.

asked      what determines every byte of the data: dataset, version, format, rule, the cut, versions of packages
sources    texts by where they came from
formats    images by what their bytes are
files      path, bytes, sha256 and, where it holds some, rows of every file but the manifest
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Self

from capfilt.errors import DatasetError
from capfilt.export.folder import FileRecord
from capfilt.export.shards import Shard, digest
from capfilt.spec import ExportSpec

_PACKAGES = ("capfilt", "pyarrow")


@dataclass(frozen=True)
class Written:
    """A shard that is written. `first` and `last` are (shard, row) of the curated dataset."""

    rows: int
    files: tuple[FileRecord, ...]
    sources: dict[str, int]
    formats: dict[str, int]
    first: tuple[str, int]
    last: tuple[str, int]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What asdict made of one."""
        places = {name: (content[name][0], content[name][1]) for name in ("first", "last")}
        return cls(**{**content, **places, "files": tuple(FileRecord(**one) for one in content["files"])})


def asked(spec: ExportSpec, number: int, shards: Sequence[Shard]) -> dict[str, Any]:
    """What determines every byte of the data of an export.

    Args:
        number: of the version.
    """
    names = ("format", "text", "web_probability", "seed")
    return {
        "dataset": spec.dataset,
        "version": number,
        **{name: getattr(spec, name) for name in names},
        "shards": len(shards),
        "rows": sum(shard.rows for shard in shards),
        "cut": digest(shards),
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a folder of the source, without pip
        return "not installed"


def refuse_another(manifest: Mapping[str, Any], wanted: Mapping[str, Any], output: str) -> None:
    """Pass if a manifest is that of the export that is wanted, by whatever version of capfilt.

    Raises:
        DatasetError: it is that of another one; says what differs.
    """
    was = manifest.get("asked", {})
    for name in wanted:
        if was.get(name) != wanted[name] and name not in _PACKAGES:
            raise DatasetError(
                f"{output}: holds another export ({name} {was.get(name)!r}, now {wanted[name]!r}); give another "
                "output, or remove it"
            )


def totals(written: Sequence[Written]) -> dict[str, dict[str, int]]:
    """The manifest's `sources` and `formats`."""
    sources: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    for one in written:
        sources.update(one.sources)
        formats.update(one.formats)
    return {"sources": dict(sorted(sources.items())), "formats": dict(sorted(formats.items()))}


def files(written: Sequence[Written], more: Sequence[FileRecord]) -> list[dict[str, Any]]:
    """The manifest's `files`: those of shards, then others."""
    of_shards = [{**asdict(file), "rows": one.rows} for one in written for file in one.files]
    return of_shards + [asdict(file) for file in more]
