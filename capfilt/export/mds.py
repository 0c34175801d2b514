"""MosaicML Streaming's MDS shards (mosaicml/streaming, base/format/mds/writer.py). Writing them needs nothing of it.

A shard is the number of samples, where each begins and where the last ends (uint32, from the file's begin), the columns
as JSON, then the samples: the sizes of their columns (uint32) and the columns, in order of name. index.json lists the
shards and comes last.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np

from capfilt.errors import DatasetError
from capfilt.export.folder import FileRecord, Folder
from capfilt.export.shards import Example, captions_of

_COLUMNS = {"about": "json", "image": "bytes", "text": "str"}
_CONFIG: dict[str, Any] = {
    "column_encodings": list(_COLUMNS.values()),
    "column_names": list(_COLUMNS),
    "column_sizes": [None] * len(_COLUMNS),
    "compression": None,
    "format": "mds",
    "hashes": [],
    "size_limit": None,
    "version": 2,
}
_LIMIT = 2**32


class Mds:
    """Files `shard.00000.mds`, ... and index.json."""

    def __init__(self, shards: int, all_texts: bool) -> None:
        self._shards, self._all_texts = shards, all_texts

    def write(self, shard: int, batches: Iterable[list[Example]], folder: Folder) -> list[FileRecord]:
        """Write one file of the export; its samples wait on disk for the places of all to be known.

        Raises:
            DatasetError: they come to 4 GiB, which MDS cannot hold.
        """
        name, config = f"shard.{shard:05d}.mds", json.dumps(_CONFIG, sort_keys=True).encode()
        sizes: list[int] = []
        with folder.create(name) as sink, tempfile.TemporaryFile() as samples:
            for batch in batches:
                for example in batch:
                    sample = self._sample(example)
                    samples.write(sample)
                    sizes.append(len(sample))
            begin = 4 * (len(sizes) + 2) + len(config)
            if begin + sum(sizes) >= _LIMIT:
                raise DatasetError(f"{name}: its rows come to 4 GiB, which MDS cannot hold; make shard_bytes smaller")
            places = itertools.accumulate(sizes, initial=begin)
            sink.write(np.array([len(sizes), *places], "<u4").tobytes() + config)
            samples.seek(0)
            shutil.copyfileobj(samples, sink, 2**20)
        return [FileRecord(name, sink.bytes, sink.sha256)]

    def finish(self, written: list[list[FileRecord]], rows: list[int], folder: Folder) -> list[FileRecord]:
        """Write the index."""
        shards = [
            {
                **_CONFIG,
                "raw_data": {"basename": file.path, "bytes": file.bytes, "hashes": {}},
                "samples": count,
                "zip_data": None,
            }
            for (file,), count in zip(written, rows, strict=True)
        ]
        return [folder.put("index.json", json.dumps({"shards": shards, "version": 2}, sort_keys=True).encode())]

    @property
    def usage(self) -> str:
        """How it is read."""
        return """```python
from streaming import StreamingDataset

dataset = StreamingDataset(local="<this directory>", batch_size=32)  # or remote="s3://...", local="<a cache>"
dataset[0]["image"], dataset[0]["text"], dataset[0]["about"]  # encoded bytes, a string, where they come from
```
"""

    def _sample(self, example: Example) -> bytes:
        about = {**example.about(), **({"captions": captions_of(example)} if self._all_texts else {})}
        data = (json.dumps(about).encode(), example.image, example.chosen.text.encode())
        return np.array([len(one) for one in data], "<u4").tobytes() + b"".join(data)
