"""What is true of an image: read from labels, or from a toy web's record of its scenes."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.errors import InputError
from capfilt.inputs import Opened, list_inputs
from capfilt.spec import Input, Truth
from capfilt.stores import one_line
from capfilt.text import clean
from capfilt.toyweb import ATTRIBUTES, Scene, is_true, read_back

_LABELS = {"image_sha256": "text", "text": "text", "true": "boolean"}
_FAIR = {"sort", "seed", "descending", "web_threshold", "synthetic_threshold"}  # else a search is a filter
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Judge(Protocol):
    """Knows which texts are true of which images. An image is named by the sha256 of its bytes, 64 hex digits."""

    @property
    def images(self) -> Collection[str]:
        """Those of which it knows anything."""
        ...

    def is_true(self, sha256: str, text: str) -> bool | None:
        """Whether a text is true of an image; None where that is not known."""
        ...

    def names_whole(self, sha256: str, text: str) -> bool | None:
        """Whether a text is true and leaves nothing out; None where that is not known."""
        ...


def read_truth(truth: Truth) -> Judge:
    """Read a truth.

    Raises:
        InputError: files are missing, or are not what they should be; the message names the file.
    """
    if truth.labels is not None:
        return read_labels(truth.labels)
    assert truth.toyweb is not None  # the spec has one of the two
    return read_toyweb(truth.toyweb)


# --- labels ---


@dataclass(frozen=True, slots=True)
class Labels:
    """Judges the texts that someone has judged, alike after clean-up (capfilt.text.clean); knows no others.

    Attributes:
        true: by image and text.
        chosen: those that a search found, by their `drawn` (capfilt.view.marks), and not chance among all rows.
    """

    true: Mapping[tuple[str, str], bool]
    chosen: frozenset[tuple[str, str]] = frozenset()

    @property
    def images(self) -> Collection[str]:
        """See :class:`Judge`."""
        return {sha256 for sha256, _ in self.true}

    def is_true(self, sha256: str, text: str) -> bool | None:
        """See :class:`Judge`."""
        return self.true.get((sha256, clean(text)))

    def names_whole(self, sha256: str, text: str) -> bool | None:  # noqa: ARG002  a judge's
        """None: labels do not say."""
        return None


def read_labels(labels: Input) -> Labels:
    """Read Parquet files of `image_sha256` (hex), `text` and `true` (boolean); a row with a null says nothing.

    Raises:
        InputError: as :func:`read_truth`; or two rows contradict each other.
    """
    true: dict[tuple[str, str], bool] = {}
    chosen = set()
    for path, row in _label_rows(labels):
        sha256, text, verdict = row["image_sha256"], row["text"], row["true"]
        if sha256 is None or text is None or verdict is None:
            continue
        sha256 = sha256.lower()
        if not _SHA256.fullmatch(sha256):
            raise InputError(f"{path}: image_sha256 {sha256[:80]!r} is not 64 hex digits, an image's sha256")
        if true.setdefault((sha256, clean(text)), verdict) is not verdict:
            raise InputError(f"{path}: {clean(text)!r} is labelled true and untrue of image {sha256}; remove one")
        if _is_chosen(row.get("drawn")):
            chosen.add((sha256, clean(text)))
    return Labels(true, frozenset(chosen))


def _is_chosen(drawn: Any) -> bool:
    """Whether the search that found a row was another than one of all rows at random; False where none is on record."""
    try:
        search = json.loads(drawn)
    except (TypeError, ValueError):
        return False
    return isinstance(search, dict) and not (search.get("sort") == "random" and search.keys() <= _FAIR)


def _label_rows(labels: Input) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in list_inputs(labels):
        with Opened(file.path, labels.storage_options) as parquet:
            _check_columns(file.path, parquet.schema_arrow)
            more = {"drawn"} & set(parquet.schema_arrow.names)
            table = _read(parquet, file.path, [*_LABELS, *more])
        for batch in table.to_batches(max_chunksize=10_000):
            for row in batch.to_pylist():
                yield file.path, row


def _check_columns(path: str, schema: pa.Schema) -> None:
    for name, wanted in _LABELS.items():
        if name not in schema.names:
            raise InputError(
                f"{path}: no column {name}; labels have image_sha256, text and true, and the file has "
                f"{', '.join(schema.names)}"
            )
        kind = schema.field(name).type
        if not (_is_text(kind) if wanted == "text" else pa.types.is_boolean(kind)):
            raise InputError(f"{path}: column {name} is {kind}; it should be {wanted}")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


# --- toy webs ---


@dataclass(frozen=True, slots=True)
class Scenes:
    """Judges any text of a toy web's pictures, by its grammar."""

    scenes: Mapping[str, Scene]

    @property
    def images(self) -> Collection[str]:
        """See :class:`Judge`."""
        return self.scenes.keys()

    def is_true(self, sha256: str, text: str) -> bool | None:
        """See :class:`Judge` and :func:`capfilt.toyweb.is_true`."""
        scene = self.scenes.get(sha256)
        return None if scene is None else is_true(text, scene)

    def names_whole(self, sha256: str, text: str) -> bool | None:
        """Whether a text names every attribute of the picture's scene, and rightly."""
        scene = self.scenes.get(sha256)
        return None if scene is None else read_back(text) == vars(scene)


def read_toyweb(directory: str) -> Scenes:
    """Read the scenes of a web that `capfilt.toyweb.render` or `render_clean` wrote; broken pictures show none.

    Raises:
        InputError: as :func:`read_truth`.
    """
    root = directory.rstrip("/")
    try:
        files = list_inputs(Input(paths=(f"{root}/shards",)))
        (truth,) = list_inputs(Input(paths=(f"{root}/truth.parquet",)))
        truths = _columns(truth.path, ["shard", "row", "broken", *ATTRIBUTES])
        sha256s = {posixpath.basename(file.path): _columns(file.path, ["sha256"]) for file in files}
    except InputError as error:
        raise InputError(
            f"truth.toyweb: {root} is not a rendered toy web: {error}. Give the directory that "
            "capfilt.toyweb.render or render_clean wrote, with its shards/ and truth.parquet"
        ) from error
    scenes: dict[str, Scene] = {}
    for row in truths.to_pylist():
        shard = sha256s.get(row["shard"])
        if shard is None or row["row"] >= shard.num_rows:
            raise InputError(
                f"{truth.path}: speaks of row {row['row']} of {row['shard']}, which is not in {root}/shards; "
                "render the web again"
            )
        sha256 = shard["sha256"][row["row"]].as_py()
        if sha256 is not None and row["broken"] is None:
            scenes[sha256] = Scene(**{name: row[name] for name in ATTRIBUTES})
    return Scenes(scenes)


def _columns(path: str, names: list[str]) -> pa.Table:
    with Opened(path, {}) as parquet:
        if missing := set(names) - set(parquet.schema_arrow.names):
            raise InputError(f"{path}: no column {', '.join(sorted(missing))}")
        return _read(parquet, path, names)


def _read(parquet: pq.ParquetFile, path: str, columns: list[str]) -> pa.Table:
    try:
        return parquet.read(columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read: {one_line(error)}") from error
