"""Models that cost nothing and depend on card and image alone, for tests of everything around the models."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from capfilt.images import Picture, decode
from capfilt.spec import CaptionerCard, CurateSpec, FilterCard, Images, Sampling

POISON = "kill the worker"
WIDTH_THAT_HANGS = 56


def batch_size(card: CaptionerCard | FilterCard) -> int:
    return 16 if card.batch_size == "auto" else card.batch_size


class HashCaptioner:
    """Captions from the image's hash, the card's name and the seed: stable, different for different images."""

    def __init__(self, card: CaptionerCard, sampling: Sampling) -> None:
        self.image_size, self.batch_size, self._name = card.image_size, batch_size(card), card.name
        self._candidates, self._seed = range(sampling.candidates), sampling.seed

    def caption(self, images_BCHW: torch.Tensor, sha256: Sequence[str]) -> list[list[str]]:
        assert images_BCHW.shape == (len(sha256), 3, self.image_size, self.image_size)
        return [
            [f"picture {digest[:6]} {k} by {self._name}, seed {self._seed}" for k in self._candidates]
            for digest in sha256
        ]


class HashFilter:
    """Scores from a hash of card's name, text and pixels: uniform over [0, 1], reproducible to the bit."""

    def __init__(self, card: FilterCard) -> None:
        self.image_size, self.batch_size, self._name = card.image_size, batch_size(card), card.name

    def score(self, images_BCHW: torch.Tensor, texts: Sequence[Sequence[str]]) -> list[list[tuple[float, float]]]:
        assert images_BCHW.shape == (len(texts), 3, self.image_size, self.image_size)
        return [[self._score(image, text) for text in row] for image, row in zip(images_BCHW, texts, strict=True)]

    def _score(self, image: torch.Tensor, text: str) -> tuple[float, float]:
        data = f"{self._name}/{text}".encode() + bytes(image.flatten()[:64].tolist())
        number = int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "big") / 2**32
        return number, 2 * number - 1


class PoisonFilter(HashFilter):
    """Kills its process on the text POISON, as a segmentation fault or the kernel's memory killer would."""

    def score(self, images_BCHW: torch.Tensor, texts: Sequence[Sequence[str]]) -> list[list[tuple[float, float]]]:
        if any(text == POISON for row in texts for text in row):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(images_BCHW, texts)


class RaisingFilter(HashFilter):
    """Raises on the text "raise", returns NaN on "nan"."""

    def score(self, images_BCHW: torch.Tensor, texts: Sequence[Sequence[str]]) -> list[list[tuple[float, float]]]:
        if any(text == "raise" for row in texts for text in row):
            raise RuntimeError("device-side assert")
        nan = (float("nan"), 0.0)
        scores = super().score(images_BCHW, texts)
        return [
            [nan if text == "nan" else score for text, score in zip(row, row_scores, strict=True)]
            for row, row_scores in zip(texts, scores, strict=True)
        ]


class LosesDeviceFilter(HashFilter):
    """From the text "lose the device" on, every call of this process fails, as after a device-side assert."""

    lost = False

    def score(self, images_BCHW: torch.Tensor, texts: Sequence[Sequence[str]]) -> list[list[tuple[float, float]]]:
        self.lost = self.lost or any(text == "lose the device" for row in texts for text in row)
        if self.lost:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return super().score(images_BCHW, texts)


Models = tuple[list[HashCaptioner], list[HashFilter]]


def _models(spec: CurateSpec, kind: type[HashFilter]) -> Models:
    return [HashCaptioner(card, spec.sampling) for card in spec.captioners], [kind(card) for card in spec.filters]


def load_hash(spec: CurateSpec, _device: str) -> Models:
    return _models(spec, HashFilter)


def load_poison(spec: CurateSpec, _device: str) -> Models:
    return _models(spec, PoisonFilter)


def load_hangs(spec: CurateSpec, _device: str) -> Models:
    """And from now on this process's decoder hangs on images of WIDTH_THAT_HANGS."""
    from capfilt.pipelines import worker

    def hang(data: bytes, limits: Images, scratch: npt.NDArray[np.uint8] | None = None) -> Picture:
        picture = decode(data, limits, scratch)
        while picture.width == WIDTH_THAT_HANGS:
            time.sleep(1)
        return picture

    worker.decode = hang  # type: ignore[attr-defined]
    return _models(spec, HashFilter)


def load_raising(spec: CurateSpec, _device: str) -> Models:
    return _models(spec, RaisingFilter)


def load_loses_device(spec: CurateSpec, _device: str) -> Models:
    return _models(spec, LosesDeviceFilter)


def load_dies(_spec: CurateSpec, _device: str) -> Models:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("dead")
