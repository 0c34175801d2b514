"""Test pairs: images, each with its texts, read whole. Rows of equal image bytes are one image."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from capfilt.errors import ImageError, InputError
from capfilt.fragments import Row, cut, read_footer, read_rows
from capfilt.images import decode
from capfilt.inputs import list_inputs
from capfilt.schema import Reason
from capfilt.spec import Images, Input
from capfilt.text import clean

_FRAGMENT_ROWS = 1000


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """A test image.

    Attributes:
        image: encoded bytes, which decode.
        sha256: hex, of the image.
        texts: as they came, in file order; one or more, no two alike after clean-up.
        cleaned: the same after clean-up (capfilt.text.clean), none empty.
    """

    image: bytes
    sha256: str
    texts: list[str] = field(default_factory=list)
    cleaned: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PairCounts:
    """What is on record of a test set.

    Attributes:
        rows: read. Each is one of `texts`, or left out.
        left_out: rows by capfilt.schema.Reason.
    """

    rows: int
    images: int
    texts: int
    left_out: dict[str, int]


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """A test set: images in the order of their first rows, and what became of all rows.

    Attributes:
        rows: read. Each is a text of an image, or left out.
        left_out: rows by capfilt.schema.Reason: the image's, `no_image`, `no_text`, `duplicate_text`, `unreadable_row`.
    """

    images: list[LabelledImage]
    rows: int
    left_out: dict[str, int]

    @property
    def texts(self) -> int:
        """Texts of all images."""
        return sum(len(image.texts) for image in self.images)

    @property
    def counts(self) -> PairCounts:
        """Of rows, images and texts."""
        return PairCounts(self.rows, len(self.images), self.texts, self.left_out)


def read_test_set(pairs: Input, limits: Images, only: Collection[str] | None = None) -> LabelledImages:
    """Read every row and decode every image once. Holds the encoded images: COCO's 5,000 are 0.8 GB.

    Args:
        only: sha256 of the images that are wanted; rows of others are passed over. All if None.

    Raises:
        InputError: files cannot be listed or read, or no row has both an image that decodes and a text.
    """
    found: dict[str, LabelledImage] = {}
    unusable: dict[str, Reason] = {}
    left_out: Counter[str] = Counter()
    rows = 0
    for row in _rows(pairs):
        if only is not None and (row.image is None or _sha256(row.image) not in only):
            continue
        rows += 1
        if reason := _place(row, found, unusable, limits):
            left_out[reason] += 1
    images = [image for image in found.values() if image.texts]
    if not images:
        why = ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common()) or "there are none"
        if only is not None and not left_out:
            why = f"none is of the {len(only):,} images that the labels know; name the files whose images were judged"
        raise InputError(f"pairs: no row of {', '.join(pairs.paths)} has a usable image and a text: {why}")
    return LabelledImages(images, rows, dict(left_out.most_common()))


def _sha256(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()


def _rows(pairs: Input) -> Iterator[Row]:
    for file in list_inputs(pairs):
        footer = read_footer(file, pairs.columns, pairs.storage_options)
        for start, stop in cut(footer.row_groups, _FRAGMENT_ROWS):
            yield from read_rows(footer.fragment(file, start, stop), pairs.storage_options)


def _place(row: Row, found: dict[str, LabelledImage], unusable: dict[str, Reason], limits: Images) -> Reason | None:
    """Add a row to its image; or say why not."""
    if not row.readable:
        return Reason.UNREADABLE_ROW
    if row.image is None:
        return Reason.NO_IMAGE
    sha256 = _sha256(row.image)
    if sha256 not in found and sha256 not in unusable:
        try:
            decode(row.image, limits)
            found[sha256] = LabelledImage(row.image, sha256)
        except ImageError as error:
            unusable[sha256] = error.reason
    if sha256 in unusable:
        return unusable[sha256]
    image, cleaned = found[sha256], clean(row.text or "")
    if not cleaned:
        return Reason.NO_TEXT
    if cleaned in image.cleaned:
        return Reason.DUPLICATE_TEXT
    image.texts.append(row.text or "")
    image.cleaned.append(cleaned)
    return None
