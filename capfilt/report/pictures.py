"""Small pictures of rows, as far as a budget of reading goes: kept ones from the pairs, dropped ones from the input.

A picture that is not had has a reason, for the page to say.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from capfilt.dataset import CuratedDataset, DataFile
from capfilt.errors import CapfiltError, ImageError, InputError
from capfilt.fragments import Footer, read_footer, read_rows
from capfilt.images import decode
from capfilt.inputs import InputFile, list_inputs, read_parquet
from capfilt.plan import keep_shards
from capfilt.schema import SHARD, Status
from capfilt.spec import CurateSpec, Images
from capfilt.stores import one_line

SIDE = 224
"""Pixels of a small picture's longer side."""

QUALITY = 60

Key = tuple[str, int]
"""Shard and row."""


@dataclass
class Budget:
    """What may yet be read: bytes of image columns, and files."""

    bytes: int
    files: int

    def open(self) -> None:
        """Take a file.

        Raises:
            InputError: there is none left.
        """
        if self.files <= 0:
            raise InputError("not read: enough files were")
        self.files -= 1

    def take(self, size: int) -> None:
        """Take bytes.

        Raises:
            InputError: there are not so many left.
        """
        if size > self.bytes:
            raise InputError("not read: enough bytes were")
        self.bytes -= size


@dataclass
class Pictures:
    """Finds the pictures of one version's rows.

    Attributes:
        spec: of the run that made the rows; None where it is not on record, so that dropped rows have no picture.
    """

    dataset: CuratedDataset
    version: int
    spec: CurateSpec | None
    options: Mapping[str, Any]
    budget: Budget

    def find(self, rows: Sequence[Mapping[str, Any]]) -> dict[Key, str]:
        """A data URL of each row's picture, or the reason why there is none, which begins with no `data:`."""
        found: dict[Key, str] = {}
        kept: dict[str, dict[int, str]] = defaultdict(dict)
        dropped: dict[str, dict[int, str]] = defaultdict(dict)
        for row in rows:
            key = row[SHARD], row["row"]
            if row["status"] == Status.ERROR:
                found[key] = "the image cannot be used"
            elif row["image_sha256"] is None:
                found[key] = (row["reason"] or "no image").replace("_", " ")
            else:
                own = kept if row["status"] == Status.KEPT else dropped
                own[row[SHARD]][row["row"]] = row["image_sha256"]
        found |= self._of_pairs(kept)
        found |= self._of_input(dropped)
        return found

    # --- kept rows ---

    def _of_pairs(self, wanted: Mapping[str, Mapping[int, str]]) -> dict[Key, str]:
        if not wanted:
            return {}
        files: dict[str, list[str]] = defaultdict(list)
        for url in self.dataset.pair_files(self.version)[1]:
            files[url.rsplit("/", 2)[-2].removeprefix(f"{SHARD}=")].append(url)
        found: dict[Key, str] = {}
        for shard, rows in _most_first(wanted):
            for url in files[shard]:
                mine = {row: rows[row] for row in rows if (shard, row) not in found and _may_hold(url, row)}
                if mine:
                    found |= self._try(shard, mine, lambda url=url, mine=mine: self._pairs_of(url, mine))
            for row in rows:
                found.setdefault((shard, row), "its pair is not there")
        return found

    def _pairs_of(self, url: str, rows: Mapping[int, str]) -> Iterator[tuple[int, bytes]]:
        self.budget.open()

        def read(parquet: pq.ParquetFile) -> list[tuple[int, bytes]]:
            found: list[tuple[int, bytes]] = []
            for group in range(parquet.metadata.num_row_groups):
                numbers = parquet.read_row_group(group, ["row"], use_threads=False)["row"]
                if not rows.keys() & set(numbers.to_pylist()):
                    continue
                self.budget.take(_size(parquet, group, "image"))
                for batch in parquet.iter_batches(64, row_groups=[group], columns=["row", "image"], use_threads=False):
                    mine = batch.filter(pc.is_in(batch.column("row"), value_set=pa.array(rows, pa.int64())))
                    found += zip(mine.column("row").to_pylist(), mine.column("image").to_pylist(), strict=True)
            return found

        yield from read_parquet(url, self.options, read, pauses=())

    # --- dropped rows ---

    def _of_input(self, wanted: Mapping[str, Mapping[int, str]]) -> dict[Key, str]:
        if not wanted:
            return {}
        try:
            files = self._inputs()
        except CapfiltError as error:
            return {(shard, row): str(error) for shard, rows in wanted.items() for row in rows}
        found: dict[Key, str] = {}
        for shard, rows in _most_first(wanted):
            file = files.get(shard)
            if file is None:
                found |= {(shard, row): "its file is no longer among the inputs" for row in rows}
            else:
                found |= self._try(shard, rows, lambda file=file, rows=rows: self._rows_of(file, rows))
        return found

    def _inputs(self) -> dict[str, InputFile]:
        """The input's files by shard, those that are what they were when they were curated."""
        if self.spec is None:
            raise InputError("the run that dropped it is not on record, so its input is not known")
        committed = self.dataset.committed()
        files = keep_shards(list_inputs(self.spec.input, exclude=self.spec.output), committed)
        return {
            file.shard: file
            for file in files
            if file.shard in committed and committed[file.shard].provenance.input_id == file.input_id
        }

    def _rows_of(self, file: InputFile, rows: Mapping[int, str]) -> Iterator[tuple[int, bytes]]:
        assert self.spec is not None
        source = self.spec.input
        self.budget.open()
        whole = file.path.endswith(".arrow")  # a record batch; of all others rows are read from the first on
        if "://" in file.path and file.path.endswith((".tar", ".arrow")):
            self.budget.take(file.size)  # looked through for its samples, in blocks that leave little out
        footer = read_footer(file, source.columns, source.storage_options, pauses=())
        begin = 0
        for count, size in zip(footer.row_groups, _sizes(file, footer, source.storage_options), strict=True):
            mine = [row for row in rows if begin <= row < begin + count]
            if mine:
                self.budget.take(size if whole else size * (max(mine) + 1 - begin) // count)
                part = footer.fragment(file, min(mine), max(mine) + 1)
                for row in read_rows(part, source.storage_options, pauses=()):
                    if row.row in rows and row.image is not None:
                        yield row.row, row.image
            begin += count

    # --- both ---

    def _try(self, shard: str, rows: Mapping[int, str], read: Any) -> dict[Key, str]:
        """Small pictures of the rows that `read` yields; for those that it does not, why not."""
        found: dict[Key, str] = {}
        why = "not found where it should lie"
        try:
            for row, image in read():
                found[shard, row] = self._small(image, rows[row])
        except (CapfiltError, OSError) as error:
            why = str(error) if isinstance(error, CapfiltError) else one_line(error)
        return {(shard, row): why for row in rows} | found

    def _small(self, image: bytes, sha256: str) -> str:
        if hashlib.sha256(image).hexdigest() != sha256:
            return "the input holds another image there now"
        try:
            return thumbnail(image, self.spec.images if self.spec else Images())
        except ImageError as error:
            return f"cannot be decoded: {error}"


def thumbnail(image: bytes, limits: Images) -> str:
    """A data URL of a small WebP.

    Raises:
        ImageError: it cannot be decoded.
    """
    small = Image.fromarray(decode(image, limits).rgb)
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def _most_first(wanted: Mapping[str, Mapping[int, str]]) -> list[tuple[str, Mapping[int, str]]]:
    """Shards of which the most rows are wanted first: they are worth their reading."""
    return sorted(wanted.items(), key=lambda item: (-len(item[1]), item[0]))


def _may_hold(url: str, row: int) -> bool:
    """Whether a pairs file may hold the row: its name says which it does, unless another tool wrote it."""
    span = DataFile(url, 0, 0).span
    return span is None or span[0] <= row < span[1]


def _sizes(file: InputFile, footer: Footer, options: Mapping[str, Any]) -> list[int]:
    """Bytes of the images of each row group; of a file without a footer all bytes of each run of rows."""
    if footer.offsets:
        return [stop - start for start, stop in itertools.pairwise((*footer.offsets, file.size))]

    def sizes(parquet: pq.ParquetFile) -> list[int]:
        return [_size(parquet, group, footer.layout.image) for group in range(len(footer.row_groups))]

    return read_parquet(file.path, options, sizes, pauses=())


def _size(parquet: pq.ParquetFile, group: int, column: str) -> int:
    """Bytes of a column of a row group in the file, those of its fields included."""
    about = parquet.metadata.row_group(group)
    columns = (about.column(number) for number in range(about.num_columns))
    return sum(one.total_compressed_size for one in columns if one.path_in_schema.split(".")[0] == column)
