"""Random crop, flip and RandAugment against torchvision's and the authors' definitions, written again in NumPy."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from capfilt.models.augment import FILL, OPERATIONS, Box, Operation, augment, distort, draw_operations, random_crop

torch.set_num_threads(1)

Picture = npt.NDArray[np.uint8]
SIDE = 40


def picture(height: int, width: int, seed: int = 0) -> Picture:
    """Smooth, in colour, of no symmetry, with neither black nor white."""
    coarse = np.random.default_rng(seed).integers(30, 220, (5, 6, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def plain(rgb: Picture, seed: int = 0, **settings: float) -> npt.NDArray[np.uint8]:
    """[S, S, 3] without operations."""
    settings = {"min_scale": 0.2, "flip": 0.0, **settings}
    view = augment(
        rgb,
        SIDE,
        np.random.default_rng(seed),
        min_scale=settings["min_scale"],
        flip=settings["flip"],
        operations=0,
        magnitude=5,
    )
    return view.permute(1, 2, 0).numpy()


# --- crop and flip ---


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_crop_then_flip_then_resize(seed: int, flip: float) -> None:
    rgb = picture(61, 83)
    box = random_crop(61, 83, 0.2, np.random.default_rng(seed))
    part = Image.fromarray(rgb).crop((box.left, box.top, box.left + box.width, box.top + box.height))
    if flip:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    expected = np.asarray(part.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(plain(rgb, seed, flip=flip).astype(int) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.1


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (40, 40, Box(0, 0, 40, 40)),
        (30, 100, Box(0, 30, 30, 40)),
        (100, 30, Box(30, 0, 40, 30)),
        (1, 1, Box(0, 0, 1, 1)),
        (1, 500, Box(0, 249, 1, 1)),
        (500, 1, Box(249, 0, 1, 1)),
        (7, 100, Box(0, 45, 7, 9)),
    ],
)
def test_what_never_fits_is_cropped_in_the_middle(height: int, width: int, expected: Box) -> None:
    """The whole area of these, at another aspect ratio, does not fit into them."""
    assert random_crop(height, width, 1.0, np.random.default_rng(0)) == expected


def test_areas_are_uniform_aspects_log_uniform_and_places_uniform() -> None:
    generator = np.random.default_rng(3)
    boxes = [random_crop(1000, 1000, 0.2, generator) for _ in range(4000)]
    for box in boxes:
        assert 0 <= box.top <= 1000 - box.height
        assert 0 <= box.left <= 1000 - box.width
        assert 0.199 < box.height * box.width / 1e6 <= 1
        assert 0.749 < box.width / box.height < 1.335
    # Boxes of less than 3/4 of the area always fit, so that nothing is drawn again and the distributions are pure.
    small = [box for box in boxes if box.height * box.width < 0.75e6]
    areas = np.array([box.height * box.width for box in small]) / 1e6
    aspects = np.array([math.log(box.width / box.height) for box in small]) / math.log(4 / 3)
    places = np.array([(box.top / (1000 - box.height), box.left / (1000 - box.width)) for box in small])
    quartiles = [0.25, 0.5, 0.75]
    np.testing.assert_allclose(np.quantile(areas, quartiles), 0.2 + 0.55 * np.array(quartiles), atol=0.02)
    np.testing.assert_allclose(np.quantile(aspects, quartiles), 2 * np.array(quartiles) - 1, atol=0.06)
    for place in places.T:
        np.testing.assert_allclose(np.quantile(place, quartiles), quartiles, atol=0.04)


def test_every_place_is_reached() -> None:
    """The last row and column too: of a box of 2 x 2 in an image of 3 x 3, all four places."""
    generator = np.random.default_rng(4)
    boxes = {random_crop(3, 3, 0.2, generator) for _ in range(500)}
    assert {(box.top, box.left) for box in boxes if box[2:] == (2, 2)} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_half_the_pictures_are_mirrored() -> None:
    rgb = picture(SIDE, SIDE)
    mirrored = 0
    for seed in range(200):
        view = plain(rgb, seed, min_scale=1.0, flip=0.5)
        assert np.array_equal(view, rgb) != np.array_equal(view, rgb[:, ::-1])
        mirrored += np.array_equal(view, rgb[:, ::-1])
    assert 80 <= mirrored <= 120


# --- the whole ---


def whole(rgb: Picture, generator: np.random.Generator, out_HWC: torch.Tensor | None = None) -> torch.Tensor:
    return augment(
        rgb, SIDE, generator, min_scale=0.2, flip=0.5, operations=2, magnitude=5, out_HWC=out_HWC, scratch=None
    )


def test_one_state_one_picture() -> None:
    rgb = picture(61, 83)
    before = rgb.copy()
    first, again = (np.random.default_rng(11) for _ in range(2))
    views = [whole(rgb, first) for _ in range(30)]
    for view in views:
        assert torch.equal(view, whole(rgb, again))
    assert len({view.numpy().tobytes() for view in views}) == 30
    assert np.array_equal(rgb, before)


def test_it_writes_into_the_row_of_a_batch() -> None:
    rgb = picture(61, 83)
    rgb.setflags(write=False)
    batch = torch.zeros((20, SIDE, SIDE, 3), dtype=torch.uint8)
    views = [whole(rgb, np.random.default_rng(seed), row) for seed, row in enumerate(batch)]
    for seed, (view, row) in enumerate(zip(views, batch, strict=True)):
        assert view.dtype == torch.uint8
        assert view.shape == (3, SIDE, SIDE)
        assert view.data_ptr() == row.data_ptr()
        assert torch.equal(row.permute(2, 0, 1), whole(rgb, np.random.default_rng(seed)))
    assert any((row == torch.tensor(FILL, dtype=torch.uint8)).all(-1).any() for row in batch)


def test_operations_come_after_the_crop() -> None:
    """The fill is of the resized picture, and the operations are those that the generator draws next."""
    rgb = picture(61, 83)
    for seed in range(20):
        generator = np.random.default_rng(seed)
        random_crop(61, 83, 0.2, generator)
        generator.random()
        expected = Image.fromarray(plain(rgb, seed))
        for operation, level in draw_operations(2, 5, generator):
            expected = distort(expected, operation, level)
        view = augment(rgb, SIDE, np.random.default_rng(seed), min_scale=0.2, flip=0.0, operations=2, magnitude=5)
        assert np.array_equal(view.permute(1, 2, 0).numpy(), np.asarray(expected))


# --- RandAugment ---


def test_what_is_drawn() -> None:
    generator = np.random.default_rng(5)
    drawn = [draw_operations(2, 3, generator) for _ in range(4000)]
    counts = Counter(operation for pair in drawn for operation, _ in pair)
    assert counts.keys() == set(OPERATIONS) - {"Identity"}
    for operation, count in counts.items():
        assert 330 < count < 470, operation  # 8,000 draws of ten, half applied
    assert {level for pair in drawn for _, level in pair} == {0.3, -0.3}
    assert 0.45 < np.mean([level > 0 for pair in drawn for _, level in pair]) < 0.55
    assert any(len(pair) == 2 and pair[0][0] == pair[1][0] for pair in drawn)


def test_factors_of_one_are_not_applied() -> None:
    """At BLIP's magnitude, 5, brightness and sharpness are what they were."""
    generator = np.random.default_rng(5)
    names = {operation for _ in range(2000) for operation, _ in draw_operations(2, 5, generator)}
    assert names == set(OPERATIONS) - {"Identity", "Brightness", "Sharpness"}
    image = Image.fromarray(picture(SIDE, SIDE))
    for idle in ("Identity", "Brightness", "Sharpness"):
        assert np.array_equal(np.asarray(distort(image, idle, 0.5)), np.asarray(image))


def moved(rgb: Picture, forward: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """OpenCV's warpAffine, bilinear, and where it does not blend with the fill; whole numbers are centres of pixels."""
    inverse = np.linalg.inv(np.vstack([forward, [0, 0, 1]]))
    height, width, _ = rgb.shape
    ys, xs = np.mgrid[:height, :width]
    x, y, _ = np.einsum("ij,jhw->ihw", inverse, np.stack([xs, ys, np.ones_like(xs)]))
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    padded = np.pad(rgb.astype(float), ((1, 1), (1, 1), (0, 0)), constant_values=FILL[0])
    result = np.zeros(rgb.shape)
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (1 - np.abs(x - x0 - dx)) * (1 - np.abs(y - y0 - dy))
            row, column = (np.clip(at + 1, 0, n + 1) for at, n in ((y0 + dy, height), (x0 + dx, width)))
            result += weight[..., None] * padded[row, column]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    outside = (x <= -1) | (x >= width) | (y <= -1) | (y >= height)
    return result, inside | outside


def rotation(degrees: float) -> npt.NDArray[np.float64]:
    """OpenCV's getRotationMatrix2D about (S / 2, S / 2)."""
    a, b, centre = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), SIDE / 2
    return np.array([[a, b, (1 - a) * centre - b * centre], [-b, a, b * centre + (1 - a) * centre]])


@pytest.mark.parametrize("level", [0.5, -0.5, 0.17, -1.0])
@pytest.mark.parametrize("operation", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_movements(operation: Operation, level: float) -> None:
    """salesforce/BLIP, transform/randaugment.py: a shear of 0.3, 10 pixels, 30 degrees at the highest level."""
    forward = {
        "ShearX": np.array([[1, 0.3 * level, 0], [0, 1, 0]]),
        "ShearY": np.array([[1, 0, 0], [0.3 * level, 1, 0]]),
        "TranslateX": np.array([[1, 0, -10 * level], [0, 1, 0]]),
        "TranslateY": np.array([[1, 0, 0], [0, 1, -10 * level]]),
        "Rotate": rotation(30 * level),
    }[operation]
    rgb = picture(SIDE, SIDE)
    expected, compared = moved(rgb, forward)
    difference = np.abs(np.asarray(distort(Image.fromarray(rgb), operation, level)) - expected)[compared]
    assert compared.mean() > 0.9
    assert difference.max() < 2
    assert difference.mean() < 0.6  # Pillow cuts what OpenCV rounds


@pytest.mark.parametrize("level", [0.3, -0.9])
def test_brightness_and_sharpness(level: float) -> None:
    rgb = picture(SIDE, SIDE)
    image, factor = Image.fromarray(rgb), 0.1 + 1.8 * abs(level)
    bright = (np.arange(256) * factor).clip(0, 255).astype(np.uint8)[rgb]
    np.testing.assert_allclose(np.asarray(distort(image, "Brightness", level)), bright, atol=1)
    kernel = np.ones((3, 3))
    kernel[1, 1] = 5
    windows = np.lib.stride_tricks.sliding_window_view(rgb.astype(float), (3, 3), axis=(0, 1))
    smooth = np.einsum("hwcij,ij->hwc", windows, kernel / 13)
    sharp = rgb.astype(float)  # the border stays
    sharp[1:-1, 1:-1] = smooth + factor * (sharp[1:-1, 1:-1] - smooth)
    np.testing.assert_allclose(np.asarray(distort(image, "Sharpness", level)), sharp.clip(0, 255), atol=2)


def test_autocontrast_and_equalize() -> None:
    rgb = picture(SIDE, SIDE)
    rgb[..., 2] = 77  # a channel without contrast stays
    image = Image.fromarray(rgb)
    stretched, equalized = rgb.copy(), rgb.copy()
    for channel in range(2):
        values = rgb[..., channel].astype(int)
        low, high = values.min(), values.max()
        stretched[..., channel] = (values - low) * 255 / (high - low)
        histogram = np.bincount(values.ravel(), minlength=256)
        step = histogram[histogram > 0][:-1].sum() // 255
        table = (step // 2 + np.concatenate([[0], np.cumsum(histogram)[:-1]])) // step
        equalized[..., channel] = table.clip(0, 255)[values]
    np.testing.assert_allclose(np.asarray(distort(image, "AutoContrast", 0.5)).astype(int), stretched, atol=1)
    assert np.array_equal(np.asarray(distort(image, "Equalize", 0.5)), equalized)
