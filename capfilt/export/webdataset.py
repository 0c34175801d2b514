"""WebDataset tars, as OpenCLIP reads them: `{number}.jpg`, `{number}.txt`, `{number}.json` of each row, side by side.

The same rows give the same bytes: no time, owner or mode of this machine is in a tar.
"""

from __future__ import annotations

import io
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
        with (
            folder.create(name) as sink,
            tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar,  # type: ignore[call-overload]
        ):
            for batch in batches:
                for example in batch:
                    stem = example.file_name.partition(".")[0]
                    _add(tar, example.file_name, example.image)
                    _add(tar, f"{stem}.txt", example.chosen.text.encode())
                    _add(tar, f"{stem}.json", json.dumps(self._about(example), ensure_ascii=False).encode())
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


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    tar.addfile(info, io.BytesIO(data))
    tar.members.clear()  # type: ignore[attr-defined]  # which it would keep to the end
