from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from capfilt.models.fitting import MOST, ON_A_CPU, Fitting, most_that_fit


def test_batches_in_order() -> None:
    sizes: list[int] = []

    def batch(some: slice) -> range:
        sizes.append(some.stop - some.start)
        return range(some.start, some.stop)

    fitting = Fitting(4, "model")
    assert fitting.run(10, batch) == list(range(10))
    assert sizes == [4, 4, 2]
    assert fitting.run(0, batch) == []


def test_what_does_not_fit_is_halved_and_done(caplog: pytest.LogCaptureFixture) -> None:
    tried: list[int] = []

    def batch(some: slice) -> list[int]:
        tried.append(some.stop - some.start)
        if tried[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(some.start, some.stop))

    fitting = Fitting(16, "blip-large")
    with caplog.at_level(logging.WARNING):
        assert fitting.run(20, batch) == list(range(20))
    assert tried == [16, 8, 4, *[2] * 10]
    assert "blip-large: 16 images do not fit the device's memory; going on with 8" in caplog.text
    tried.clear()
    assert fitting.run(5, batch) == list(range(5))  # for good
    assert tried == [2, 2, 1]


def test_a_small_batch_that_fails_is_halved_by_its_own_size() -> None:
    fitting = Fitting(16, "model")

    def batch(some: slice) -> list[int]:
        if some.stop - some.start == 3:
            raise torch.OutOfMemoryError
        return list(range(some.start, some.stop))

    assert fitting.run(3, batch) == [0, 1, 2]
    assert fitting.images == 1


def test_one_that_does_not_fit_is_an_error_and_so_is_another_failure() -> None:
    def too_large(_some: slice) -> list[int]:
        raise torch.OutOfMemoryError("one image")

    def broken(_some: slice) -> list[int]:
        raise RuntimeError("device-side assert")

    with pytest.raises(torch.OutOfMemoryError, match="one image"):
        Fitting(4, "model").run(4, too_large)
    fitting = Fitting(4, "model")
    with pytest.raises(RuntimeError, match="assert"):
        fitting.run(4, broken)
    assert fitting.images == 4


class LinearMemory:
    """A device on which an image takes so many bytes, and a batch some more, the first time."""

    def __init__(self, free: int, each: int) -> None:
        self._free, self._each, self.tried = free, each, list[int]()

    def run(self, images: int) -> None:
        self.tried.append(images)

    def free(self) -> int:
        return self._free

    def peak(self, run: Callable[[], object]) -> int:
        run()
        return 1000 + self._each * self.tried[-1]


@pytest.mark.parametrize(
    ("free", "each", "part", "expected"),
    [
        (100_000, 500, 1.0, 96),  # half of it holds 100
        (100_000, 500, 0.5, 48),  # two actors share the device
        (10**9, 500, 1.0, MOST),
        (7_000, 500, 1.0, 7),
        (100, 500, 1.0, 1),
        (10**9, 0, 1.0, MOST),
    ],
)
def test_what_fits_is_found_from_two_small_batches(free: int, each: int, part: float, expected: int) -> None:
    memory = LinearMemory(free, each)
    assert most_that_fit(memory.run, memory, part) == expected
    assert max(memory.tried) == 16


def test_an_open_size_on_a_cpu() -> None:
    fitting = Fitting("auto", "model")
    fitting.measure(lambda _: pytest.fail("a CPU's memory is not measured"), torch.device("cpu"), 0)
    assert fitting.images == ON_A_CPU


def test_memory_that_can_be_spared_is_given_back_first() -> None:
    spared: list[bool] = []

    def batch(some: slice) -> list[int]:
        if not spared:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(some.start, some.stop))

    assert Fitting(4, "model", lambda: spared.append(True)).run(4, batch) == [0, 1, 2, 3]
    assert spared == [True]
