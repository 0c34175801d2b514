"""The logic around CUDA graphs, with a recording that runs the step again: what a graph does, on the CPU."""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from capfilt.models.captioner import Captioner
from capfilt.models.recorded import Player, cuda_graph
from capfilt.models.tiny import write_tiny_pair
from capfilt.spec import CaptionerCard, LocalCheckpoint, Sampling

torch.set_num_threads(1)

COUNT = 40


class Recorder:
    """Counts recordings and plays."""

    def __init__(self) -> None:
        self.recorded = self.played = 0

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.recorded += 1
        written = step()

        def play() -> None:
            self.played += 1
            written.copy_(step())

        return play, written


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pair(tmp_path_factory.mktemp("tiny"))[0]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (COUNT, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


SHAS = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(COUNT)]


def captioner(checkpoint: Path, device: str = "cpu", **sampling: int) -> Captioner:
    card = CaptionerCard(
        role="captioner", name="t", checkpoint=LocalCheckpoint(path=str(checkpoint)), image_size=32, batch_size=16
    )
    return Captioner(card, Sampling(**{"min_tokens": 2, "max_tokens": 9, **sampling}), device)


def playing(checkpoint: Path, **sampling: int) -> tuple[Captioner, Recorder]:
    own, recorder = captioner(checkpoint, **sampling), Recorder()
    own._player = Player(own._blip.model.text_decoder, recorder)
    return own, recorder


@pytest.mark.parametrize("candidates", [1, 3, 20])
def test_played_steps_write_what_others_do(checkpoint: Path, images: Tensor, candidates: int) -> None:
    """Batches of 16, 16 and 8, whose texts leave one by one; then smaller and larger ones in the same memory."""
    expected = captioner(checkpoint, candidates=candidates).caption(images, SHAS)
    writer, recorder = playing(checkpoint, candidates=candidates)
    assert writer.caption(images, SHAS) == expected
    assert recorder.recorded == 1
    assert recorder.played > 3
    for start, stop in ((5, 16), (0, 1), (20, 36)):
        assert writer.caption(images[start:stop], SHAS[start:stop]) == expected[start:stop]
    assert recorder.recorded == 1


def test_a_larger_batch_is_recorded_anew(checkpoint: Path, images: Tensor) -> None:
    expected = captioner(checkpoint).caption(images, SHAS)
    writer, recorder = playing(checkpoint)
    for count, recordings in ((3, 1), (12, 2), (16, 3), (12, 3), (8, 3)):
        before = recorder.played
        assert writer.caption(images[:count], SHAS[:count]) == expected[:count]
        assert recorder.recorded == recordings
        assert (recorder.played > before) == (count != 8)  # half a batch goes without, as all of it would be computed
    assert writer._player is not None
    writer._player.forget()
    assert writer.caption(images[:8], SHAS[:8]) == expected[:8]
    assert recorder.recorded == 4


def test_greedy_search_is_played_and_beams_are_not(checkpoint: Path, images: Tensor) -> None:
    plain, (writer, recorder) = captioner(checkpoint), playing(checkpoint)
    assert writer.describe(images[:16], beams=1) == plain.describe(images[:16], beams=1)
    assert recorder.played
    before = recorder.played
    assert writer.describe(images[:16], beams=3) == plain.describe(images[:16], beams=3)
    assert recorder.played == before


def test_as_many_tokens_as_there_is_memory_for(checkpoint: Path, images: Tensor) -> None:
    for longest in (1, 2, 3):
        writer, _ = playing(checkpoint, min_tokens=longest, max_tokens=longest)
        expected = captioner(checkpoint, min_tokens=longest, max_tokens=longest).caption(images[:16], SHAS[:16])
        assert writer.caption(images[:16], SHAS[:16]) == expected
    assert writer._player is not None
    step = writer._player._step
    assert step is not None
    step.cache.length = step.cache.room
    with pytest.raises(ValueError, match="tokens for a cache of"):
        step(torch.zeros(16, dtype=torch.int64))


def test_an_image_alone_is_the_reference_and_not_played(checkpoint: Path, images: Tensor) -> None:
    writer, recorder = playing(checkpoint)
    assert writer.caption(images[:1], SHAS[:1]) == captioner(checkpoint).caption(images[:1], SHAS[:1])
    assert recorder.recorded == recorder.played == 0


def test_a_batch_that_was_no_number_leaves_nothing_behind(checkpoint: Path, images: Tensor) -> None:
    expected = captioner(checkpoint).caption(images[:16], SHAS[:16])
    writer, recorder = playing(checkpoint)
    writer.caption(images[:16], SHAS[:16])
    assert writer._player is not None
    assert writer._player._step is not None
    with torch.inference_mode():
        writer._player._step.cache._all.fill_(torch.nan)
    assert writer.caption(images[:16], SHAS[:16]) == expected
    assert recorder.recorded == 1


def test_one_recording_is_in_memory_at_a_time(checkpoint: Path, images: Tensor) -> None:
    writer, _ = playing(checkpoint)
    writer.caption(images[:4], SHAS[:4])
    assert writer._player is not None
    before, alive = weakref.ref(writer._player._step), []

    def record(step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        gc.collect()
        alive.append(before() is not None)
        return Recorder()(step)

    writer._player._record = record
    writer.caption(images[:16], SHAS[:16])
    assert alive == [False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records a CUDA graph; there is no CUDA device")
def test_a_cuda_graph_writes_what_steps_do(checkpoint: Path, images: Tensor) -> None:
    writer = captioner(checkpoint, "cuda", candidates=2)
    assert writer._player is not None
    assert writer._player._record is cuda_graph
    played = writer.caption(images, SHAS)
    writer._player = None
    assert writer.caption(images, SHAS) == played
