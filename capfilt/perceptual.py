"""A perceptual hash that outlives a small crop: difference hashes of the whole picture and of nine windows of it.

A difference hash (dHash) says of neighbouring cells of a coarse grid which is brighter. Resizing and recompression flip
few of its bits; a crop of 5% flips a fifth, since it shifts every cell. So a picture is hashed ten times: whole, and
through windows of 95% of its width and height in each corner, at the middle of each side and in the centre. A crop is
then near one of the windows of what it was cut from: see :func:`distance`.

Pictures of one plain colour, nearly, have no hash: what little differs in them is noise.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
from PIL import Image

HASH_CODE = 1
"""Raise it when the hash of any picture changes."""

BYTES = 16
"""Of one hash: 64 horizontal differences and 64 vertical ones."""

VIEWS = 10
"""Hashes of a picture: the whole one first."""

SIDE = 64
"""In pixels, of what the grids are taken from."""

_ENOUGH = 512  # pixels of a picture's shorter side: 8 x 8 in each of those
_WINDOW = 0.95
_CELLS = 8
_VISIBLE = 3.0  # grey levels between neighbouring cells
_LEAST_VISIBLE = 40  # of 128 differences; a picture with fewer is plain


def _cells(start: float, stop: float, cells: int) -> npt.NDArray[np.float32]:
    """[cells, SIDE]: the mean of each of the cells that [start, stop) of a side is cut into, as weights of pixels."""
    edges = np.linspace(start, stop, cells + 1)[:, None] * SIDE
    pixels = np.arange(SIDE)
    overlap = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    weights: npt.NDArray[np.float32] = (np.maximum(overlap, 0) / (edges[1:] - edges[:-1])).astype(np.float32)
    return weights


_STARTS = (0.0, (1 - _WINDOW) / 2, 1 - _WINDOW)
_SPANS = [((0.0, 1.0), (0.0, 1.0))] + [
    ((y, y + _WINDOW), (x, x + _WINDOW)) for y, x in itertools.product(_STARTS, repeat=2)
]
_FEW_ROWS, _MORE_ROWS = (np.stack([_cells(*y, cells) for y, _ in _SPANS]) for cells in (_CELLS, _CELLS + 1))
_FEW_COLUMNS, _MORE_COLUMNS = (np.stack([_cells(*x, cells).T for _, x in _SPANS]) for cells in (_CELLS, _CELLS + 1))
_MIXED = np.arange(8 * BYTES).reshape(8, BYTES).T.ravel()  # a byte holds bits from all over the picture


def perceptual_hash(rgb: npt.NDArray[np.uint8]) -> bytes | None:
    """The hashes of a picture, one after the other.

    Args:
        rgb: uint8 [H, W, 3].

    Returns:
        VIEWS x BYTES bytes; None where the picture is too plain.
    """
    step = max(1, min(rgb.shape[:2]) // _ENOUGH)  # a large picture's every pixel would be copied
    grey = Image.fromarray(rgb[::step, ::step]).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return hash_of_grey(np.asarray(grey, np.float32))


def hash_of_grey(grey: npt.NDArray[np.float32]) -> bytes | None:
    """The hashes of a picture squeezed to [SIDE, SIDE], in grey levels; as :func:`perceptual_hash`."""
    across = np.diff(_FEW_ROWS @ grey @ _MORE_COLUMNS, axis=2).reshape(VIEWS, -1)
    down = np.diff(_MORE_ROWS @ grey @ _FEW_COLUMNS, axis=1).reshape(VIEWS, -1)
    differences = np.concatenate([across, down], axis=1)
    if np.count_nonzero(np.abs(differences[0]) > _VISIBLE) < _LEAST_VISIBLE:
        return None
    return np.packbits(differences[:, _MIXED] > 0, axis=1).tobytes()


def distance(one: bytes, other: bytes) -> int:
    """Bits in which two pictures differ: the whole of either against all views of the other, the least of these."""
    a, b = (np.frombuffer(of, np.uint8).reshape(VIEWS, BYTES) for of in (one, other))
    return int(min(np.bitwise_count(x[:1] ^ y).sum(axis=1).min() for x, y in ((a, b), (b, a))))
