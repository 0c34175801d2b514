"""Parquet: flat pairs, or a directory that Hugging Face's datasets loads with its images decoded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.export.folder import FileRecord, Folder
from capfilt.export.shards import Example, captions_of
from capfilt.schema import CAPTION_STRUCT

_FIELDS = [
    pa.field("text", pa.string()),
    pa.field("source", pa.string()),  # of the text: schema.Source
    pa.field("captioner", pa.string()),
    pa.field("itm", pa.float32()),
    pa.field("key", pa.string()),
    pa.field("url", pa.string()),
    pa.field("shard", pa.string()),  # shard and row are those of the curated dataset
    pa.field("row", pa.int64()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("format", pa.string()),
    pa.field("sha256", pa.string()),
]
_FLAT_IMAGE = pa.field("image", pa.binary())
_HUB_IMAGE = pa.field("image", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())]))
_FEATURES = {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}).encode()}


class Parquet:
    """Files `data/train-00000-of-00012.parquet`; of a `hub` the image is a struct, as datasets' `Image` stores it."""

    def __init__(self, shards: int, all_texts: bool, *, hub: bool) -> None:
        self._shards, self._all_texts, self._hub = shards, all_texts, hub
        captions = [pa.field("captions", pa.list_(CAPTION_STRUCT))] if all_texts else []
        image, metadata = (_HUB_IMAGE, _FEATURES) if hub else (_FLAT_IMAGE, None)
        self.schema = pa.schema([image, *_FIELDS, *captions], metadata)

    def write(self, shard: int, batches: Iterable[list[Example]], folder: Folder) -> list[FileRecord]:
        """Write one file of the export, a row group for each batch."""
        name = f"data/train-{shard:05d}-of-{self._shards:05d}.parquet"
        compression = {field.name: "zstd" for field in self.schema if not field.name.startswith("image")}
        how: dict[str, Any] = {
            "compression": {**compression, "image.bytes": "none", "image.path": "zstd", "image": "none"},
            "use_dictionary": ["source", "captioner", "shard", "format"],
            "write_statistics": [field.name for field in _FIELDS],
        }
        with folder.create(name) as sink, pq.ParquetWriter(pa.PythonFile(sink, mode="w"), self.schema, **how) as writer:
            for batch in batches:
                writer.write_table(pa.Table.from_pylist([self._row(example) for example in batch], self.schema))
        return [FileRecord(name, sink.bytes, sink.sha256)]

    def finish(self, written: list[list[FileRecord]], rows: list[int], folder: Folder) -> list[FileRecord]:  # noqa: ARG002
        """Nothing more than the files."""
        return []

    @property
    def usage(self) -> str:
        """How it is read."""
        if self._hub:
            return """```python
import datasets

dataset = datasets.load_dataset("<this directory>", split="train")  # or with streaming=True
dataset[0]["image"], dataset[0]["text"]  # a PIL image, a string
```
"""
        return """```python
import pyarrow.dataset as ds

for batch in ds.dataset("<this directory>/data").to_batches():
    ...  # image: encoded bytes; text
```
"""

    def _row(self, example: Example) -> dict[str, object]:
        image = {"bytes": example.image, "path": example.file_name} if self._hub else example.image
        row = {"image": image, "text": example.chosen.text, **example.about()}
        return {**row, "captions": captions_of(example)} if self._all_texts else row
