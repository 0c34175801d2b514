"""How many images go through a network at a time: as many as the device's memory holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Fitting:
    """A batch size that is halved, for good, where a batch does not fit the device's memory.

    Attributes:
        images: at a time, now.
    """

    def __init__(self, images: int, name: str) -> None:
        """`name` is the model's, for the log."""
        self.images = images
        self._name = name

    def run(self, count: int, batch: Callable[[slice], Sequence[T]]) -> list[T]:
        """The results of `count` images, in order, a batch at a time.

        Args:
            batch: results of the images of a slice; called again with fewer of them if memory ran out.

        Raises:
            torch.OutOfMemoryError: of one image alone.
        """
        results: list[T] = []
        while len(results) < count:
            some = slice(len(results), min(len(results) + self.images, count))
            if (part := self._attempt(batch, some)) is not None:
                results += part
        return results

    def _attempt(self, batch: Callable[[slice], Sequence[T]], some: slice) -> Sequence[T] | None:
        """None where memory ran out and fewer images may fit."""
        size = some.stop - some.start
        try:
            return batch(some)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # Not in the handler: the error holds on to the tensors of the frames it went through.
        self.images = size // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _log.warning("%s: %d images do not fit the device's memory; going on with %d", self._name, size, self.images)
        return None
