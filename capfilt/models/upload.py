"""Pixels on their way to the device: a batch is sent while the device computes another.

B  images of a buffer    N  images sent    S  side in pixels
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Upload:
    """Sends bytes; what makes numbers of them runs on the device. On a CPU there is nothing to send.

    Two threads may use it, each for batches of its own: while one's is computed, the other's is on its way.

    Args:
        device: as torch names it.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def memory(self, shape: Sequence[int]) -> Tensor:
        """Memory for uint8 of a shape, which the device can read without the host's help (page-locked)."""
        return torch.empty(tuple(shape), dtype=torch.uint8, pin_memory=self._stream is not None)

    def send(self, buffer_BSSC: Tensor, rows: Sequence[int]) -> Tensor:
        """Send some of a buffer's rows, which stay as they are until the device has computed with them.

        Args:
            buffer_BSSC: uint8, of :meth:`memory`.
            rows: ascending.

        Returns:
            uint8 [N, 3, S, S] on the device, for use after :meth:`arrive`; a view where no row is missing in between.
            On the host where the device has no memory for it now: whoever computes with it copies it, or less of it.
        """
        whole = list(rows) == list(range(len(rows)))
        if self._stream is not None:
            try:
                return self._sent(self._stream, buffer_BSSC, rows, whole).permute(0, 3, 1, 2)
            except torch.OutOfMemoryError:
                pass  # below, where the error no longer holds on to what it met
        return (buffer_BSSC[: len(rows)] if whole else buffer_BSSC[rows]).permute(0, 3, 1, 2)

    def _sent(self, stream: torch.cuda.Stream, buffer_BSSC: Tensor, rows: Sequence[int], whole: bool) -> Tensor:
        with torch.cuda.stream(stream):
            sent_BSSC = buffer_BSSC[: rows[-1] + 1 if rows else 0].to(self._device, non_blocking=True)
            if not whole:
                sent_BSSC = sent_BSSC[torch.tensor(rows, device=self._device)]
        # Its memory is the sending stream's: it must not be used again while the computing one still reads it.
        sent_BSSC.record_stream(torch.cuda.current_stream(self._device))
        return sent_BSSC

    def arrive(self) -> None:
        """Let what the device computes from here on wait for all that was sent."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
