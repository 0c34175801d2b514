from __future__ import annotations

import threading

import pytest
import torch

from capfilt.models.upload import Upload

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [[], [0], [0, 1, 2], [0, 1, 2, 3, 4], [1], [0, 2, 4], [3, 4]])
def test_rows_arrive_in_order(device: str, rows: list[int]) -> None:
    upload = Upload(device)
    buffer = upload.memory((5, 4, 4, 3))
    buffer.copy_(torch.randint(0, 256, buffer.shape, generator=torch.Generator().manual_seed(0)))
    sent = upload.send(buffer, rows)
    upload.arrive()
    assert sent.device.type == device
    assert sent.shape == (len(rows), 3, 4, 4)
    assert torch.equal(sent.cpu(), torch.stack([*buffer[rows]]).permute(0, 3, 1, 2) if rows else sent.cpu())


def test_on_a_cpu_nothing_is_copied() -> None:
    upload = Upload("cpu")
    buffer = upload.memory((4, 2, 2, 3))
    assert upload.send(buffer, [0, 1, 2]).data_ptr() == buffer.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
def test_two_threads_send_their_own(device: str) -> None:
    upload, wrong = Upload(device), []

    def send(number: int) -> None:
        buffer = upload.memory((8, 16, 16, 3))
        for turn in range(50):
            buffer.fill_((7 * number + turn) % 256)
            sent = upload.send(buffer, [0, 1, 2, 5])
            upload.arrive()
            if not bool((sent == (7 * number + turn) % 256).all()):
                wrong.append((number, turn))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
