"""BLIP's training augmentation of one image: a random crop, a flip, RandAugment without colours.

The order, the crop's areas and the list of operations: salesforce/BLIP, data/__init__.py (create_dataset). The crop:
torchvision, transforms.RandomResizedCrop, which it calls. What the operations do and their magnitudes: salesforce/BLIP,
transform/randaugment.py. OpenCV moves pixels there, Pillow here: within 2 grey levels, but for the pixels that touch
the fill, which OpenCV blends with it. The random numbers are drawn in an order of our own.

H, W  pixels of the image    S  side of the result
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from capfilt.models.preprocess import resize

Operation = Literal[
    "Identity",
    "AutoContrast",
    "Brightness",
    "Sharpness",
    "Equalize",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
"""RandAugment's, without those that change colours: captions name colours (BLIP section 4.1)."""

MAX_MAGNITUDE = 10
FILL = (128, 128, 128)

_APPLIED = 0.5
"""Probability that an operation, once drawn, is applied."""

_ASPECTS = (3 / 4, 4 / 3)
_TRIES = 10

_Affine = tuple[float, float, float, float, float, float]


class Box(NamedTuple):
    """Part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def augment(
    rgb: npt.NDArray[np.uint8],
    size: int,
    generator: np.random.Generator,
    *,
    min_scale: float,
    flip: float,
    operations: int,
    magnitude: float,
    out_HWC: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """Another view of an image, for training.

    Args:
        rgb: uint8 [H, W, 3]; left as it is.
        size: side of the result in pixels.
        generator: the same state gives the same picture.
        min_scale: smallest area of the crop, as a fraction of the image's; 0.2 in pretraining, 0.5 in fine-tuning.
        flip: probability that left and right change places; 0.5 as published.
        operations: how many are drawn, each applied with probability 0.5; 2 as published.
        magnitude: of the operations, 0 to 10; 5 as published.
        out_HWC: as :func:`capfilt.models.preprocess.resize` takes it; the result is in it.
        scratch: likewise.

    Returns:
        uint8 [3, size, size], a view of memory that lies as [size, size, 3], as `resize` returns it.
    """
    height, width, _ = rgb.shape
    box = random_crop(height, width, min_scale, generator)
    part_HWC = rgb[box.top : box.top + box.height, box.left : box.left + box.width]
    if generator.random() < flip:  # before the resize, which copies the crop in any case
        part_HWC = part_HWC[:, ::-1]
    picture_CSS = resize(part_HWC, size, out_HWC, scratch)
    drawn = draw_operations(operations, magnitude, generator)
    if drawn:
        pixels_HWC = picture_CSS.permute(1, 2, 0).numpy()
        image = Image.fromarray(pixels_HWC)
        for operation, level in drawn:
            image = distort(image, operation, level)
        pixels_HWC[:] = np.asarray(image)
    return picture_CSS


def random_crop(height: int, width: int, min_scale: float, generator: np.random.Generator) -> Box:
    """Where to crop: area uniform in [min_scale, 1] of the image's, aspect ratio log-uniform in [3/4, 4/3].

    After ten boxes that do not fit, the middle of the image, of the nearest aspect ratio that is allowed (torchvision,
    transforms.RandomResizedCrop.get_params).
    """
    low, high = _ASPECTS
    for _ in range(_TRIES):
        area = height * width * generator.uniform(min_scale, 1)
        aspect = math.exp(generator.uniform(math.log(low), math.log(high)))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            top, left = generator.integers(height - h, endpoint=True), generator.integers(width - w, endpoint=True)
            return Box(int(top), int(left), h, w)
    h, w = min(height, round(width / low)), min(width, round(height * high))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def draw_operations(count: int, magnitude: float, generator: np.random.Generator) -> list[tuple[Operation, float]]:
    """The operations that one picture gets, in order, each with its signed level in [-1, 1].

    `count` are drawn, the same one perhaps twice; each is then left out with probability 0.5; the sign is a coin's
    (RandomAugment). Those that would change nothing are not among them: Identity; Brightness and Sharpness at magnitude
    5, where their factor, 0.1 + 1.8 * level, is 1.
    """
    level = magnitude / MAX_MAGNITUDE
    idle = {"Identity"} | ({"Brightness", "Sharpness"} if _factor(level) == 1 else set())
    drawn = []
    for index in generator.integers(len(OPERATIONS), size=count):
        applied, positive = generator.random() < _APPLIED, generator.random() < 0.5
        if applied and OPERATIONS[index] not in idle:
            drawn.append((OPERATIONS[index], level if positive else -level))
    return drawn


def distort(image: Image.Image, operation: Operation, level: float) -> Image.Image:
    """One operation. The sign of `level` is the direction of a movement, and nothing to the others."""
    match operation:
        case "Identity":
            return image
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Brightness":
            return ImageEnhance.Brightness(image).enhance(_factor(abs(level)))
        case "Sharpness":
            return ImageEnhance.Sharpness(image).enhance(_factor(abs(level)))
        case "ShearX":
            return _moved(image, (1, -0.3 * level, 0, 0, 1, 0))
        case "ShearY":
            return _moved(image, (1, 0, 0, -0.3 * level, 1, 0))
        case "TranslateX":
            return _moved(image, (1, 0, 10 * level, 0, 1, 0))
        case "TranslateY":
            return _moved(image, (1, 0, 0, 0, 1, 10 * level))
        case "Rotate":
            return _moved(image, _rotation(image, math.radians(30 * level)))


def _factor(level: float) -> float:
    return 0.1 + 1.8 * level


def _rotation(image: Image.Image, angle: float) -> _Affine:
    """Counter-clockwise about (W / 2, H / 2), where OpenCV's pixels have their centres at whole numbers."""
    x, y = image.width / 2, image.height / 2
    cos, sin = math.cos(angle), math.sin(angle)
    return (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def _moved(image: Image.Image, source: _Affine) -> Image.Image:
    """Every pixel from where `source` says: (a x + b y + c, d x + e y + f), bilinear, or else the fill.

    Its x and y are whole numbers at the centres of pixels, as OpenCV's; Pillow's are so at their corners.
    """
    a, b, c, d, e, f = source
    shifted = (a, b, c + 0.5 - (a + b) / 2, d, e, f + 0.5 - (d + e) / 2)
    return image.transform(
        image.size, Image.Transform.AFFINE, shifted, resample=Image.Resampling.BILINEAR, fillcolor=FILL
    )
