"""The image of a row: from the pairs where it is kept, else from the input, if that is still there."""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq
from pydantic import ValidationError

from capfilt.dataset import CuratedDataset, DataFile
from capfilt.errors import CapfiltError
from capfilt.fragments import read_footer, read_rows
from capfilt.images import image_format
from capfilt.inputs import InputFile, list_inputs, read_parquet
from capfilt.plan import keep_shards
from capfilt.schema import SHARD, Status
from capfilt.spec import Input

_PAUSES = (0.5,)  # a person is waiting
_LARGEST = 64 * 2**20
"""Bytes of an image that is sent to a browser."""

KINDS = {
    **{"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"},
    **{"GIF": "image/gif", "BMP": "image/bmp", "TIFF": "image/tiff"},
}
"""Media types of what is sent, by capfilt.images' formats: what no decoder of ours takes is not sent."""


class NoPictureError(CapfiltError):
    """There is no image to show of a row; the message says why."""


class Pictures:
    """The images of one version's rows. For use from several threads.

    Args:
        dataset: opened for reading.
        options: of its store.
        version: of the pairs.
    """

    def __init__(self, dataset: CuratedDataset, options: Mapping[str, Any], version: int | None) -> None:
        self._dataset, self._options = dataset, options
        self._pairs: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for url in dataset.pair_files(version)[1]:
            start, stop = DataFile(url, 0, 0).span or (0, 2**62)
            self._pairs[url.rsplit("/", 2)[-2].removeprefix(f"{SHARD}=")].append((start, stop, url))
        self._lock = threading.Lock()
        self._inputs: dict[str, tuple[Input, dict[str, InputFile]]] = {}

    def picture(self, shard: str, about: Mapping[str, Any]) -> tuple[bytes, str]:
        """Encoded bytes as they came, and their media type.

        Args:
            about: the row of the annotations.

        Raises:
            NoPictureError: the row has none, or it cannot be had.
        """
        try:
            kept = about["status"] == Status.KEPT
            image = self._of_pairs(shard, about) if kept else self._of_input(shard, about)
            if image is None:
                raise NoPictureError("the row came without an image")
            if len(image) > _LARGEST:
                raise NoPictureError(f"the image has {len(image):,} bytes, too many to show")
            return image, KINDS[image_format(image)]
        except NoPictureError:
            raise
        except CapfiltError as error:
            raise NoPictureError(str(error)) from error

    # --- kept ---

    def _of_pairs(self, shard: str, about: Mapping[str, Any]) -> bytes:
        row = about["row"]
        for start, stop, url in self._pairs.get(shard, ()):
            if start <= row < stop:
                image = read_parquet(url, self._options, lambda parquet: _image_in(parquet, row), _PAUSES)
                if image is None:
                    continue
                if hashlib.sha256(image).hexdigest() != about["image_sha256"]:  # another tool's work
                    raise NoPictureError(
                        f"row {row} of shard {shard} holds another image in the pairs than the annotations name; touch "
                        "the shard's input and run again to curate it anew"
                    )
                return image
        raise NoPictureError("the pairs of this version do not have the row; a run may be about to commit them")

    # --- all others ---

    def _of_input(self, shard: str, about: Mapping[str, Any]) -> bytes | None:
        source, files = self._input(about["run"])
        file = files.get(shard)
        if file is None:
            raise NoPictureError(f"the input that it came from is no longer among {', '.join(source.paths)}")
        if file.input_id != about["input_id"]:
            raise NoPictureError(f"{file.path} has changed since; its image is not shown")
        row = about["row"]
        footer = read_footer(file, source.columns, source.storage_options, _PAUSES)
        if row >= footer.rows:
            raise NoPictureError(f"{file.path} has no row {row}")
        fragment = footer.fragment(file, row, row + 1)
        (found,) = read_rows(fragment, source.storage_options, pauses=_PAUSES)
        if not found.readable:
            raise NoPictureError(f"{file.path}: {found.note}")
        if found.image and about["image_sha256"] not in (None, hashlib.sha256(found.image).hexdigest()):
            raise NoPictureError(f"{file.path}: row {row} is not the image that was curated")
        return found.image

    def _input(self, run: str) -> tuple[Input, dict[str, InputFile]]:
        """The input of the run that wrote a row, as its record says, and its files by shard."""
        with self._lock:
            if run not in self._inputs:
                try:
                    source = Input.model_validate(self._dataset.record(run).details.get("spec", {}).get("input"))
                except ValidationError as error:
                    raise NoPictureError(f"run {run}, which wrote the row, has no usable input on record") from error
                listed = list_inputs(source, exclude=self._dataset.output)
                files = keep_shards(listed, self._dataset.committed())
                self._inputs[run] = source, {file.shard: file for file in files}
            return self._inputs[run]


def _image_in(parquet: pq.ParquetFile, row: int) -> bytes | None:
    """The image of an input row among the rows of a pairs file; None where it is not there."""
    for group in range(parquet.metadata.num_row_groups):
        rows = parquet.read_row_group(group, columns=["row"], use_threads=False)["row"].to_pylist()
        if row in rows:
            place = rows.index(row)
            for batch in parquet.iter_batches(64, row_groups=[group], columns=["image"], use_threads=False):
                if place < batch.num_rows:
                    image: bytes = batch.column(0)[place].as_py()
                    return image
                place -= batch.num_rows
    return None
