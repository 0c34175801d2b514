"""The authors' JSON (salesforce/BLIP, data/pretrain_dataset.py): lists of {image, caption}, image files beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable

from capfilt.export.folder import IMAGES, FileRecord, Folder
from capfilt.export.shards import Example


class Authors:
    """Files `pairs-00000-of-00012.json`, and images in `images/00000/`; paths in the JSON are relative to the export.

    Each entry has an `image_id`, as their fine-tuning wants; with all texts an image has an entry for each of them.
    """

    def __init__(self, shards: int, all_texts: bool) -> None:
        self._shards, self._all_texts = shards, all_texts

    def write(self, shard: int, batches: Iterable[list[Example]], folder: Folder) -> list[FileRecord]:
        """Write one list and its images. The images are not among the files on record: their sha256 is in the list."""
        name = f"pairs-{shard:05d}-of-{self._shards:05d}.json"
        with folder.create(name) as sink:
            opening = b"[\n"
            for batch in batches:
                for example in batch:
                    image = f"{IMAGES}/{shard:05d}/{example.file_name}"
                    folder.put(image, example.image)
                    for caption in example.captions if self._all_texts else (example.chosen,):
                        about = {**example.about(), "source": caption.source, "captioner": caption.captioner}
                        entry = {
                            "image": image,
                            "caption": caption.text,
                            "image_id": example.number,
                            **about,
                            "itm": caption.itm,
                        }
                        sink.write(opening + json.dumps(entry, ensure_ascii=False).encode())
                        opening = b",\n"
            sink.write(b"\n]\n")
        return [FileRecord(name, sink.bytes, sink.sha256)]

    def finish(self, written: list[list[FileRecord]], rows: list[int], folder: Folder) -> list[FileRecord]:  # noqa: ARG002
        """Nothing more than the lists and images."""
        return []

    @property
    def usage(self) -> str:
        """How it is read."""
        names = ", ".join(f"'pairs-{n:05d}-of-{self._shards:05d}.json'" for n in range(min(self._shards, 3)))
        names += ", ..." if self._shards > 3 else ""
        return (
            f"In the authors' `configs/pretrain.yaml`: `train_file: [{names}]`. Their pretraining opens `image` as it "
            "stands: run it from this directory. Their fine-tuning datasets take this directory as `image_root`.\n"
        )
