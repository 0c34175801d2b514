"""Models that cost nothing and depend on the image alone, for tests and benchmarks of everything around the models."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Sequence

import torch

from capfilt.spec import CurateSpec

POISON = "kill the worker"


class HashCaptioner:
    """Captions from the image's hash and the seed: stable, different for different images."""

    image_size = 16

    def __init__(self, spec: CurateSpec) -> None:
        self._sampling = spec.sampling

    def caption(self, images_BCHW: torch.Tensor, sha256: Sequence[str]) -> list[list[str]]:
        assert images_BCHW.shape == (len(sha256), 3, self.image_size, self.image_size)
        return [
            [f"picture {digest[:6]} {k} of seed {self._sampling.seed}" for k in range(self._sampling.candidates)]
            for digest in sha256
        ]


class HashFilter:
    """Scores from a hash of the text and the picture's mean: uniform over [0, 1], reproducible to the bit."""

    image_size = 16

    def score(self, images_BCHW: torch.Tensor, texts: Sequence[Sequence[str]]) -> list[list[tuple[float, float]]]:
        assert len(images_BCHW) == len(texts)
        return [[self._score(image, text) for text in row] for image, row in zip(images_BCHW, texts, strict=True)]

    @staticmethod
    def _score(image: torch.Tensor, text: str) -> tuple[float, float]:
        data = text.encode() + bytes(image.flatten()[:64].tolist())
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


def load_loses_device(spec: CurateSpec, _device: str) -> tuple[HashCaptioner, HashFilter]:
    return HashCaptioner(spec), LosesDeviceFilter()


def load_dies(_spec: CurateSpec, _device: str) -> tuple[HashCaptioner, HashFilter]:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("dead")


def load_hash(spec: CurateSpec, _device: str) -> tuple[HashCaptioner, HashFilter]:
    return HashCaptioner(spec), HashFilter()


def load_poison(spec: CurateSpec, _device: str) -> tuple[HashCaptioner, HashFilter]:
    return HashCaptioner(spec), PoisonFilter()


def load_raising(spec: CurateSpec, _device: str) -> tuple[HashCaptioner, HashFilter]:
    return HashCaptioner(spec), RaisingFilter()
