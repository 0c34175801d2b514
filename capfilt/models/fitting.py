"""How many images go through a network at a time: as many as the device's memory holds."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

from capfilt.spec import BatchSize

T = TypeVar("T")
_log = logging.getLogger(__name__)

ON_A_CPU = 32
"""Images at a time on a CPU, where the card leaves it open."""

MOST = 256
"""Images at a time, at the most: larger batches make the device wait longer for the first of a fragment."""

SHARE = 0.5
"""Of the free memory that the images of a batch may take: other models of the actor, and texts longer than those that
were tried, take of the rest."""

_TRIED = (4, 16)
_MULTIPLE = 8


class Memory(Protocol):
    """A device's memory."""

    def free(self) -> int:
        """Bytes that could be taken."""
        ...

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes that a run took at its height, beyond what was taken before."""
        ...


class CudaMemory:
    """That of the current CUDA device."""

    def free(self) -> int:
        """See :class:`Memory`. What torch holds in reserve counts as free."""
        in_reserve = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0] + in_reserve)

    def peak(self, run: Callable[[], object]) -> int:
        """See :class:`Memory`."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before


def most_that_fit(batch: Callable[[int], object], memory: Memory, part: float) -> int:
    """Images of which a batch fits memory, from what two small batches take; 1 to :data:`MOST`.

    Args:
        batch: runs one of so many images.
        part: of the device that is ours; several actors may share one.
    """
    few, more = _TRIED
    batch(few)  # what is taken once, whatever the size, is taken
    took_few, took_more = memory.peak(lambda: batch(few)), memory.peak(lambda: batch(more))
    each = max(1.0, (took_more - took_few) / (more - few))
    fit = min(MOST, int(SHARE * part * memory.free() / each))
    return max(1, fit - fit % _MULTIPLE if fit > _MULTIPLE else fit)


class Fitting:
    """A batch size that is halved, for good, where a batch does not fit the device's memory.

    Attributes:
        images: at a time, now.
    """

    def __init__(self, size: BatchSize, name: str, forget: Callable[[], object] | None = None) -> None:
        """Begin with a card's batch size.

        Args:
            size: "auto" is :data:`ON_A_CPU`, until :meth:`measure`.
            name: the model's, for the log.
            forget: gives back memory that is not needed; called where it ran out.
        """
        self.images = ON_A_CPU if size == "auto" else size
        self._open = size == "auto"
        self._name, self._forget = name, forget

    def measure(self, batch: Callable[[int], object], device: torch.device, gpus: float) -> None:
        """Choose the size, where the card leaves it open and the device is a GPU.

        Args:
            batch: runs one of so many images.
            gpus: that the actor holds; a part of one is shared with other actors.
        """
        if not self._open or device.type != "cuda":
            return
        found = None
        with torch.inference_mode(), contextlib.suppress(torch.OutOfMemoryError):
            found = most_that_fit(batch, CudaMemory(), min(1.0, gpus or 1.0))
        if found is None:
            self._give_back()
        self.images = found or _TRIED[0]
        _log.info("%s: %d images at a time", self._name, self.images)

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
        self._give_back()
        _log.warning("%s: %d images do not fit the device's memory; going on with %d", self._name, size, self.images)
        return None

    def _give_back(self) -> None:
        if self._forget:
            self._forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
