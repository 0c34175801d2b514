"""Encoded images -> batches of pixels at a model's size, decoded in threads ahead of the model.

B  images in a batch    S  side in pixels
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from capfilt.images import decode
from capfilt.models.preprocess import resize
from capfilt.spec import Images

Show = Callable[[int, int], Iterable[Tensor]]
"""(start, stop) -> batches of uint8 [B, 3, S, S] that together are those images of a test set, in order."""

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

    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="decode") as pool:
        waiting: deque[list[Future[Tensor]]] = deque()
        try:
            for start in range(0, len(images), batch_size):
                waiting.append([pool.submit(one, image) for image in images[start : start + batch_size]])
                if len(waiting) > 1:
                    yield _stacked(waiting.popleft())
            while waiting:
                yield _stacked(waiting.popleft())
        finally:
            for future in (future for batch in waiting for future in batch):
                future.cancel()


def _stacked(batch: list[Future[Tensor]]) -> Tensor:
    return torch.stack([future.result() for future in batch]).permute(0, 3, 1, 2)
