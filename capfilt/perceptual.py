"""A perceptual hash that outlives a small crop: what a picture looks like, whole and through nine windows of it.

Of each view there are 128 bits, the signs of the lowest frequencies of the discrete cosine transform of its grey levels
(after pHash: Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010), and the mean colours
of its quarters, in which pictures differ that have the same outlines. Resizing and recompression flip few of the bits,
in drawings as in photographs. A crop of 5% would flip many, since it shifts every wave; so a picture is looked at ten
times: whole, and through windows of 95% of its width and height in each corner, at the middle of each side and in the
centre. A crop is then near one of the windows of what it was cut from: see :func:`near`.

Frequencies that are too weak to be seen have no sign, so pictures of one plain colour are alike if their colours are.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
from PIL import Image

HASH_CODE = 2
"""Raise it when the hash of any picture changes."""

VIEWS = 10
"""Looks at a picture: the whole one first."""

BYTES = 16
"""Of one view's signs, the lowest frequencies first."""

COLOURS = 12
"""Of one view: red, green and blue, 0 to 255, of its quarters."""

SIZE = VIEWS * (BYTES + COLOURS)
"""Bytes of a hash: all views' signs, then all views' colours."""

SIDE = 64
"""In pixels, of the square that a picture is squeezed to."""

MOST_COLOUR = 5 * COLOURS // 2
"""Near pictures' colours differ by no more than this in all: two and a half levels of 255 in the mean."""

_ENOUGH = 512  # pixels of a picture's shorter side: 8 x 8 in each of the square's
_WINDOW = 0.95
_WAVES = 13  # of a side; the 128 lowest frequencies but the mean have no more half periods than 12
_VISIBLE = 0.03  # grey levels; a picture of noise alone, of 3 levels a pixel, has 0.008


def _means(start: float, stop: float, cells: int) -> npt.NDArray[np.float32]:
    """[cells, SIDE]: the mean of each of the cells that [start, stop) of a side is cut into, as weights of pixels."""
    edges = np.linspace(start, stop, cells + 1)[:, None] * SIDE
    pixels = np.arange(SIDE)
    overlap = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    weights: npt.NDArray[np.float32] = (np.maximum(overlap, 0) / (edges[1:] - edges[:-1])).astype(np.float32)
    return weights


def _cosines(start: float, stop: float) -> npt.NDArray[np.float32]:
    """[_WAVES, SIDE]: the mean over [start, stop) of a side times cos(pi k x), x from 0 to 1 within it, as weights of
    pixels: each has the integral of the wave over its part."""
    edges = np.clip((np.arange(SIDE + 1) / SIDE - start) / (stop - start), 0, 1)
    k = np.pi * np.arange(1, _WAVES)[:, None]
    waves = np.concatenate([np.diff(edges)[None], np.diff(np.sin(k * edges)) / k])
    return waves.astype(np.float32)


_STARTS = (0.0, (1 - _WINDOW) / 2, 1 - _WINDOW)
_SPANS = [((0.0, 1.0), (0.0, 1.0))] + [
    ((y, y + _WINDOW), (x, x + _WINDOW)) for y, x in itertools.product(_STARTS, repeat=2)
]
_ROW_WAVES = np.stack([_cosines(*y) for y, _ in _SPANS])
_COLUMN_WAVES = np.stack([_cosines(*x).T for _, x in _SPANS])
_ROW_HALVES = np.stack([_means(*y, 2) for y, _ in _SPANS])
_COLUMN_HALVES = np.stack([_means(*x, 2).T for _, x in _SPANS])
_LOWEST = sorted(itertools.product(range(_WAVES), repeat=2), key=lambda at: (at[0] ** 2 + at[1] ** 2, at))
_ROWS, _COLUMNS = np.array(_LOWEST[1 : 1 + 8 * BYTES]).T  # without the mean


def perceptual_hash(rgb: npt.NDArray[np.uint8]) -> bytes:
    """The hash of a picture, SIZE bytes.

    Args:
        rgb: uint8 [H, W, 3].
    """
    step = max(1, min(rgb.shape[:2]) // _ENOUGH)  # a large picture's every pixel would be copied
    square = Image.fromarray(rgb[::step, ::step]).resize((SIDE, SIDE), Image.Resampling.BOX)
    return hash_of_square(np.asarray(square.convert("L"), np.float32), np.asarray(square, np.float32))


def hash_of_square(grey: npt.NDArray[np.float32], rgb: npt.NDArray[np.float32]) -> bytes:
    """The hash of a picture squeezed to grey [SIDE, SIDE] and rgb [SIDE, SIDE, 3], both from 0 to 255."""
    waves = _ROW_WAVES @ grey @ _COLUMN_WAVES
    signs = np.packbits(waves[:, _ROWS, _COLUMNS] > _VISIBLE, axis=1)
    colours = _ROW_HALVES @ rgb.transpose(2, 0, 1)[:, None] @ _COLUMN_HALVES  # [3, VIEWS, 2, 2]
    return signs.tobytes() + np.rint(colours).astype(np.uint8).swapaxes(0, 1).tobytes()


def split(hash_RB: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
    """Signs, in 64-bit words [R, VIEWS, BYTES / 8], and colours [R, VIEWS, COLOURS] of R hashes [R, SIZE]."""
    signs = np.ascontiguousarray(hash_RB[:, : VIEWS * BYTES]).view(np.uint64)
    return signs.reshape(-1, VIEWS, BYTES // 8), hash_RB[:, VIEWS * BYTES :].reshape(-1, VIEWS, COLOURS)


def alike(colours_PC: npt.NDArray[np.uint8], others_PC: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Whether two views have the same colours to the eye, of P pairs [P, COLOURS]."""
    apart_PC = colours_PC.astype(np.int16) - others_PC
    same_P: npt.NDArray[np.bool_] = np.abs(apart_PC).sum(axis=1) <= MOST_COLOUR
    return same_P


def near(one: bytes, other: bytes, most_bits: int) -> bool:
    """Whether two pictures look the same: the whole of either and a view of the other, in at most so many of 128 signs
    and in their colours."""
    signs_RVW, colours_RVC = split(np.frombuffer(one + other, np.uint8).reshape(2, SIZE))
    for whole, views in ((0, 1), (1, 0)):
        bits_V = np.bitwise_count(signs_RVW[views] ^ signs_RVW[whole, 0]).sum(axis=1)
        if ((bits_V <= most_bits) & alike(colours_RVC[views], colours_RVC[whole, :1])).any():
            return True
    return False
