"""LitData chunks, written by LitData's own writer (`pip install 'capfilt[litdata]'`)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from capfilt.errors import SpecError
from capfilt.export.folder import PROGRESS, FileRecord, Folder
from capfilt.export.shards import Example, captions_of


class LitData:
    """Files `chunk-0-0.bin`, `chunk-0-1.bin`, ... and index.json.

    Raises:
        SpecError: LitData is not installed.
    """

    def __init__(self, shards: int, all_texts: bool) -> None:
        try:
            import litdata  # noqa: F401
        except ImportError as error:
            raise SpecError(f"format: litdata needs LitData: pip install 'capfilt[litdata]' ({error})") from None
        self._shards, self._all_texts = shards, all_texts

    def write(self, shard: int, batches: Iterable[list[Example]], folder: Folder) -> list[FileRecord]:
        """Write one file of the export. Its rows are in memory, as LitData's writer has them."""
        from litdata.streaming.writer import BinaryWriter

        with tempfile.TemporaryDirectory(prefix="capfilt-") as place:
            writer = BinaryWriter(place, chunk_size=2**31, chunk_index=shard)
            for batch in batches:
                for example in batch:
                    writer[example.number] = self._sample(example)
            writer.done()
            (index,) = Path(place).glob("*.index.json")
            (chunk,) = Path(place).glob("*.bin")
            with chunk.open("rb") as file, folder.create(chunk.name) as sink:
                while block := file.read(2**20):
                    sink.write(block)
            folder.put(_index(shard), index.read_bytes())
        return [FileRecord(chunk.name, sink.bytes, sink.sha256)]

    def finish(self, written: list[list[FileRecord]], rows: list[int], folder: Folder) -> list[FileRecord]:  # noqa: ARG002
        """Write the index, of what LitData says of each chunk."""
        parts = [folder.read(_index(shard)) or {} for shard in range(len(written))]
        index = {"chunks": [chunk for part in parts for chunk in part["chunks"]], "config": parts[0]["config"]}
        return [folder.put("index.json", json.dumps(index, sort_keys=True).encode())]

    @property
    def usage(self) -> str:
        """How it is read."""
        return """```python
from litdata import StreamingDataset

dataset = StreamingDataset("<this directory>")
dataset[0]["image"], dataset[0]["text"], dataset[0]["about"]  # encoded bytes, a string, JSON of where they come from
```
"""

    def _sample(self, example: Example) -> dict[str, bytes | str]:
        about = {**example.about(), **({"captions": captions_of(example)} if self._all_texts else {})}
        return {"image": example.image, "text": example.chosen.text, "about": json.dumps(about)}


def _index(shard: int) -> str:
    return f"{PROGRESS}/litdata-{shard:05d}.json"
