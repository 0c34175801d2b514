"""Encoded images -> batches as a model takes them, decoded in threads ahead of it.

B  images in a batch    S  side in pixels
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from capfilt.errors import InputError
from capfilt.images import decode
from capfilt.models.preprocess import resize
from capfilt.spec import Images
from capfilt.stores import one_line
from capfilt.testset import LabelledImage

Show = Callable[[int, int], Iterable[Any]]
"""(start, stop) -> batches that together are those images of a test set, in order: uint8 [B, 3, S, S], or what a model
that looks at whole pictures prepared."""

Prepare = Callable[[npt.NDArray[np.uint8], str], Any]

_S = TypeVar("_S")
_T = TypeVar("_T")

_MOST_THREADS = 8


def squares(images: Sequence[bytes], size: int, batch_size: int, limits: Images) -> Iterator[Tensor]:
    """Decode and resize images, two batches in memory at a time.

    Args:
        images: encoded; all decode within `limits`.
        size: S.

    Yields:
        uint8 [B, 3, S, S] of `batch_size` images in order; the last may be of fewer.

    Raises:
        ImageError: an image does not decode.
    """

    def one(image: bytes) -> Tensor:
        return resize(decode(image, limits).rgb, size).permute(1, 2, 0)

    return (torch.stack(batch).permute(0, 3, 1, 2) for batch in _ahead(images, one, batch_size))


def prepared(images: Sequence[LabelledImage], prepare: Prepare, batch_size: int, limits: Images) -> Iterator[list[Any]]:
    """Decode images and have a model prepare them, two batches in memory at a time.

    Args:
        prepare: of the model: uint8 [H, W, 3] and sha256 -> what it takes.

    Yields:
        `batch_size` of them in order; the last may be of fewer.

    Raises:
        InputError: the model cannot take a picture.
    """

    def one(image: LabelledImage) -> Any:
        rgb = decode(image.image, limits).rgb
        try:
            return prepare(rgb, image.sha256)
        except Exception as error:  # a processor raises anything
            raise InputError(
                f"pairs: the model cannot take the image with sha256 {image.sha256}: {one_line(error)}; leave it out"
            ) from error

    return _ahead(images, one, batch_size)


def _ahead(images: Sequence[_S], one: Callable[[_S], _T], batch_size: int) -> Iterator[list[_T]]:
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="decode") as pool:
        waiting: deque[list[Future[_T]]] = deque()
        try:
            for start in range(0, len(images), batch_size):
                waiting.append([pool.submit(one, image) for image in images[start : start + batch_size]])
                if len(waiting) > 1:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
        finally:
            for future in (future for batch in waiting for future in batch):
                future.cancel()
