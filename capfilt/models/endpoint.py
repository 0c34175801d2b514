"""A captioner behind an endpoint: images go out as data URLs, captions come back. The GPU is someone else's."""

from __future__ import annotations

import asyncio
import base64
import os
import threading
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from capfilt.errors import SpecError
from capfilt.models.completions import AnswerError, Completions
from capfilt.models.sampling import row_key
from capfilt.spec import EndpointCard, Sampling

JPEG_QUALITY = 95
"""Of what is sent, without chroma subsampling."""

CHARACTERS_A_TOKEN = 100
"""A caption of more, for each of `max_tokens`, is none: the endpoint heeds no limit."""

_MOST_IMAGES = 256
_SEEDS = 0x7FFFFFFF


class EndpointCaptioner:
    """Asks as soon as a picture is decoded, so that the endpoint works while the filters do, batch after batch.

    A request's seed is the row's own (capfilt.models.sampling.row_key): how far the same seed gives the same caption is
    the endpoint's affair.

    Attributes:
        image_size: None; it sends whole pictures, scaled down to the card's `longest_side`.
    """

    image_size = None

    def __init__(self, card: EndpointCard, sampling: Sampling, pause: float = 1.0) -> None:
        """Connect, and have a plain image captioned.

        Args:
            pause: seconds before a request is sent again, about; see :class:`capfilt.models.completions.Completions`.

        Raises:
            EndpointError: the endpoint does not caption.
            SpecError: the key's variable is not set.
        """
        self._card, self._sampling = card, sampling
        key = _key(card.api_key_variable) if card.api_key_variable else None
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name=f"captioner {card.name}", daemon=True)
        thread.start()
        self._completions = Completions(card, key, pause)
        self.close = weakref.finalize(self, _stop, self._loop, thread, self._completions)
        self._harmless = self._request(np.full((64, 64, 3), 127, np.uint8), 0)
        self._begin(self._completions.check(self._harmless)).result()

    @property
    def batch_size(self) -> int:
        """Images whose candidates fill the connections."""
        return max(1, min(_MOST_IMAGES, self._card.concurrency // self._sampling.candidates))

    def prepare(self, rgb: npt.NDArray[np.uint8], sha256: str) -> list[Future[str]]:
        """Ask for the captions of one picture; they arrive meanwhile.

        Args:
            rgb: uint8 [H, W, 3], the whole picture.
        """
        seeds = [
            row_key(self._sampling.seed, sha256, candidate)[0] & _SEEDS
            for candidate in range(self._sampling.candidates)
        ]
        body = self._request(rgb, 0)
        return [self._begin(self._completions.text({**body, "seed": seed}, self._harmless)) for seed in seeds]

    def caption(self, images: Sequence[list[Future[str]]], _sha256: Sequence[str]) -> list[list[str]]:
        """The captions of images, when they have arrived.

        Args:
            images: from :meth:`prepare`.

        Returns:
            For each its candidates, white space to single spaces. One can be empty, or cut off at `max_tokens`.

        Raises:
            AnswerError: the endpoint captions others, but not one of these.
            EndpointError: it captions no one any more.
        """
        return [[self._text(answer.result()) for answer in answers] for answers in images]

    def _text(self, text: str) -> str:
        if len(text) > CHARACTERS_A_TOKEN * self._sampling.max_tokens:
            raise AnswerError(f"{len(text)} characters where max_tokens is {self._sampling.max_tokens}")
        return text

    def _begin(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _request(self, rgb: npt.NDArray[np.uint8], seed: int) -> dict[str, Any]:
        own = self._sampling
        more = {"repetition_penalty": own.repetition_penalty, "min_tokens": own.min_tokens}
        if own.top_k:
            more["top_k"] = own.top_k
        picture = {"type": "image_url", "image_url": {"url": _data_url(rgb, self._card.longest_side)}}
        return {
            "model": self._card.served_model,
            "messages": [{"role": "user", "content": [picture, {"type": "text", "text": self._card.prompt}]}],
            "max_tokens": own.max_tokens,
            "temperature": own.temperature,
            "top_p": own.top_p,
            "seed": seed,
            **(more if self._card.parameters == "vllm" else {}),
        }


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise SpecError(
            f"api_key_variable: {variable} is not set on this machine; export it, or leave it out if the endpoint "
            "wants no key"
        )
    if not (key.isascii() and key.isprintable()):  # HTTP would refuse it, and repeat it in the error
        raise SpecError(f"api_key_variable: what {variable} holds is no key: control characters, or not ASCII")
    return key


def _data_url(rgb: npt.NDArray[np.uint8], longest: int) -> str:
    """A picture as a JPEG in a URL: upright, without the EXIF data and whatever else the file held."""
    height, width = rgb.shape[:2]
    if (most := max(height, width)) > longest:
        size = (max(1, round(width * longest / most)), max(1, round(height * longest / most)))
        rgb = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))
    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality=JPEG_QUALITY, colorspace="RGB")
    return f"data:image/jpeg;base64,{base64.b64encode(encoded).decode('ascii')}"


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, completions: Completions) -> None:
    """End what is under way, and the loop."""

    if threading.current_thread() is thread:  # collected there: nothing could be waited for
        loop.stop()
        return

    async def end() -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await completions.close()

    asyncio.run_coroutine_threadsafe(end(), loop).result(timeout=10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=10)
    loop.close()
