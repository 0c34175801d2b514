"""WebDataset tars, as OpenCLIP reads them: `{number}.jpg`, `{number}.txt`, `{number}.json` of each row, side by side.

The same rows give the same bytes: no time, owner or mode of this machine is in a tar.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable
from typing import Any

from capfilt.export.folder import FileRecord, Folder
from capfilt.export.shards import Example, captions_of


class WebDataset:
    """Tars `00000.tar`, `00001.tar`, ..."""

    def __init__(self, shards: int, all_texts: bool) -> None:
        self._digits, self._shards, self._all_texts = max(5, len(str(shards - 1))), shards, all_texts

    def write(self, shard: int, batches: Iterable[list[Example]], folder: Folder) -> list[FileRecord]:
        """Write one file of the export."""
        name = f"{shard:0{self._digits}d}.tar"
        with folder.create(name) as sink:
            for batch in batches:
                for example in batch:
                    stem, text = example.file_name.partition(".")[0], example.chosen.text.encode()
                    about = json.dumps(self._about(example), ensure_ascii=False).encode()
                    # A write a row: TarFile.addfile makes ten, and takes several times as long as all the rest.
                    sink.write(
                        b"".join(
                            [
                                *_member(example.file_name, example.image),
                                *_member(f"{stem}.txt", text),
                                *_member(f"{stem}.json", about),
                            ]
                        )
                    )
            sink.write(bytes(2 * tarfile.BLOCKSIZE))
            sink.write(bytes(-sink.bytes % tarfile.RECORDSIZE))
        return [FileRecord(name, sink.bytes, sink.sha256)]

    def finish(self, written: list[list[FileRecord]], rows: list[int], folder: Folder) -> list[FileRecord]:  # noqa: ARG002
        """Nothing more than the tars."""
        return []

    @property
    def usage(self) -> str:
        """How it is read."""
        last = f"{self._shards - 1:0{self._digits}d}"
        tars = f"{{{0:0{self._digits}d}..{last}}}.tar"
        return f"""```python
import webdataset as wds

dataset = wds.WebDataset("{tars}", shardshuffle=False).decode("pilrgb").to_tuple("jpg;png;webp;gif;bmp;tif", "txt")
```

OpenCLIP: `--dataset-type webdataset --train-data '{tars}'`. It takes jpg, png and webp images and leaves out others.
"""

    def _about(self, example: Example) -> dict[str, Any]:
        about = {"caption": example.chosen.text, **example.about()}
        return {**about, "captions": captions_of(example)} if self._all_texts else about


def _member(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """A file of a tar: header, bytes, and zeros up to the next block."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    return info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE)
