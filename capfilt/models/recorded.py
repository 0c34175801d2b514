"""A step of decoding, recorded once and played again: a CUDA graph.

A step is some hundreds of small kernels, which a host launches more slowly than a GPU runs them. Played from a
recording they take one launch. A recording is of fixed memory and shapes: what a batch holds is copied into it, a
smaller batch leaves rows of it unused, and the number of tokens so far lies on the device (`Cache.place_1`).

B  images    R  rows, texts of B images, as many of each    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from capfilt.models.blip import Cache, Keys, TextDecoder

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Takes a step; gives what plays it again, and the tensor that every play writes anew."""

_WARM_UP = 3


@cache
def _aside() -> torch.cuda.Stream:
    """The stream of all recordings: libraries keep their workspace of each stream for ever."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def cuda_graph(step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Record a step on the current device; a :data:`Record`."""
    current, aside = torch.cuda.current_stream(), _aside()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP):  # libraries choose kernels and take their workspace before anything is recorded
            step()
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Another thread may send pixels meanwhile; by default that would break the recording.
    with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
        written = step()
    return graph.replay, written


class Step:
    """One token more for every text of a batch.

    Attributes:
        images: B at the most.
        each: texts of an image.
        cache: of all texts' tokens so far.
    """

    def __init__(self, decoder: TextDecoder, image: Sequence[Keys], cache: Cache, rows: int, record: Record) -> None:
        """Record it on a batch, which it then holds.

        Args:
            image: of B images.
            cache: of the R texts' tokens so far.
            rows: R.
        """
        self.images = len(image[0].keys)
        self.each = rows // self.images
        self.cache = cache.blank()
        self._image = [Keys(*(torch.empty_like(part) for part in layer)) for layer in image]
        self._token_R1 = torch.zeros(rows, 1, dtype=torch.int64, device=image[0].keys.device)
        self._rows = rows
        self.load(image, cache, rows)

        def step() -> Tensor:
            hidden_R1D = decoder.bert(self._token_R1, image=self._image, cache=self.cache)
            return decoder.logits(hidden_R1D)[:, 0]

        self._play, self._logits_RV = record(step)

    def load(self, image: Sequence[Keys], cache: Cache, rows: int) -> None:
        """Hold a batch of at most so many images, with as many texts of each."""
        for own, other in zip(self._image, image, strict=True):
            for memory, part in zip(own, other, strict=True):
                memory[: len(part)].copy_(part)
        self.cache.load(cache)
        self._rows = rows

    def __call__(self, token_R: Tensor) -> Tensor:
        """Give every text its next token.

        Returns:
            Logits [R, V] of what comes then, until the next call: it writes them in the same place.

        Raises:
            ValueError: there is no memory for more tokens.
        """
        if self.cache.length >= self.cache.room:
            raise ValueError(f"{self.cache.length + 1} tokens for a cache of {self.cache.room}")
        assert self.cache.place_1 is not None
        self._token_R1[: self._rows, 0] = token_R
        self._play()
        self.cache.place_1 += 1
        self.cache.length += 1
        return self._logits_RV[: self._rows]


class Player:
    """Keeps one recorded step, of the largest batch so far."""

    def __init__(self, decoder: TextDecoder, record: Record) -> None:
        self._decoder, self._record = decoder, record
        self._step: Step | None = None

    def forget(self) -> None:
        """Give its memory back."""
        self._step = None

    def load(self, image: Sequence[Keys], cache: Cache, rows: int) -> Step | None:
        """The step, holding a batch.

        Args:
            image: of B images.
            cache: of the R texts' tokens so far.
            rows: R.

        Returns:
            None where the batch is so small that the step's unused rows would cost more than is saved.
        """
        step, images = self._step, len(image[0].keys)
        if step and (step.each, step.cache.room) == (rows // images, cache.room) and images <= step.images:
            if 2 * images <= step.images:
                return None
            step.load(image, cache, rows)
            return step
        del step
        self.forget()  # first: both may not fit
        self._step = Step(self._decoder, image, cache, rows, self._record)
        return self._step
