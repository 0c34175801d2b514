"""Encoded bytes from the web -> RGB uint8, or the reason why not.

JPEG is decoded by libjpeg-turbo through simplejpeg (bit-exact with Pillow, and without the GIL); everything else, and
every JPEG that libjpeg-turbo complains about, by Pillow. Colour profiles are not applied: BLIP's pipeline does not.
"""

from __future__ import annotations

import ctypes
import io
import logging
import operator
import re
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    _imaging,
)

from capfilt.errors import ImageError
from capfilt.schema import Reason
from capfilt.spec import Images

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Picture:
    """One decoded image.

    Attributes:
        rgb: uint8 [H, W, 3], C-contiguous, upright (EXIF orientation applied), transparency composited on white.
        format: what the bytes are, whatever their name said: JPEG, PNG, WEBP, GIF, BMP or TIFF.
    """

    rgb: npt.NDArray[np.uint8]
    format: str

    @property
    def width(self) -> int:
        """Pixels, after orientation."""
        return int(self.rgb.shape[1])

    @property
    def height(self) -> int:
        """Pixels, after orientation."""
        return int(self.rgb.shape[0])


def decode(data: bytes, limits: Images, scratch: npt.NDArray[np.uint8] | None = None) -> Picture:
    """Decode one image: the first frame or page. Thread safe; libjpeg-turbo and Pillow decode without the GIL.

    Args:
        data: the encoded image.
        limits: `max_bytes` bounds `data`; `max_pixels` the size its header claims, checked before any pixel is
            allocated.
        scratch: uint8 [N], memory that the picture may lie in, if it fits: a twentieth of the time is fresh memory's.
            The picture is then good until the next use of it.

    Raises:
        ImageError: for whatever is wrong with the image, with its reason; nothing else leaves but MemoryError and
            KeyboardInterrupt and its like.
        MemoryError: there is no memory to decode into; the image is not to blame. Not of what libwebp and libjpeg need
            for themselves: they do not say why they fail.
    """
    return _judged(data, limits, lambda format_: Picture(_decode(data, format_, scratch), format_))


def look(data: bytes, limits: Images) -> tuple[str, int, int]:
    """Format, width and height of an image as its header has them: what other decoders may be given is judged by it.

    Raises:
        ImageError: as :func:`decode`, for what shows before a pixel is decoded.
    """
    return _judged(data, limits, lambda format_: (format_, *_size(data, format_)))


def _judged(data: bytes, limits: Images, judge: Callable[[str], T]) -> T:
    """What `judge` makes of data of acceptable size and format; what it raises, as an ImageError."""
    if not data:
        raise ImageError(Reason.EMPTY_IMAGE, "zero bytes")
    if len(data) > limits.max_bytes:
        raise ImageError(Reason.TOO_MANY_BYTES, f"{len(data)} bytes, above max_bytes ({limits.max_bytes})")
    format_ = image_format(data)
    _here.max_pixels = limits.max_pixels
    try:
        return judge(format_)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow raises anything from struct.error to ZeroDivisionError; the row records it
        message = re.sub(r"\s+", " ", str(error))[:200] or type(error).__name__
        cut = "truncated" in message.lower() or _cut_short(data, format_)
        reason = Reason.TRUNCATED_IMAGE if cut else Reason.CORRUPT_IMAGE
        raise ImageError(reason, f"{format_}: {message}") from error
    finally:
        _here.max_pixels = None


# --- what the bytes are -----------------------------------------------------------------------------------------------

_MAGIC = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0",  # with the header's size: prose may begin with BM
    "TIFF": rb"II[*+]\0|MM\0[*+]",
}
_FOREIGN = {
    "PSD": rb"8BPS",
    "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "PDF": rb"%PDF",
    "a Windows icon": rb"\0\0[\x01\x02]\0",
    "AVIF": rb"....ftypavi[fs]",
    "HEIC": rb"....ftyp(hei|hev|mif1|msf1)",
    "a video": rb"....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI ",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\0\0\0\x0cJXL |\xff\x0a",
    "an archive": rb"\x1f\x8b|PK\x03\x04",
}


_TIFF_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}


def image_format(data: bytes) -> str:
    """The format by its first bytes; only these are ever handed to a decoder.

    Raises:
        ImageError: NOT_AN_IMAGE, with what the bytes look like.
    """
    for name, magic in _MAGIC.items():
        if re.match(magic, data, re.DOTALL):
            return name
    foreign = (name for name, magic in _FOREIGN.items() if re.match(magic, data, re.DOTALL))
    seems = next(foreign, None) or _seems_text(data[:4096])
    raise ImageError(Reason.NOT_AN_IMAGE, f"looks like {seems}" if seems else "unknown format")


def _seems_text(head: bytes) -> str | None:
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    text = head.decode(encoding, "replace").lstrip("\ufeff \t\r\n").lower()
    if "<svg" in text:
        return "SVG"
    if text.startswith(("<!doctype html", "<html", "<head", "<body", "<script", "<title", "<div")) or "<html" in text:
        return "HTML"
    if text.startswith("<?xml"):
        return "XML"
    if text.startswith(("{", "[")):
        return "JSON"
    odd = sum(not (character.isprintable() or character.isspace()) or character == "\ufffd" for character in text)
    return "text" if text and odd * 20 <= len(text) else None


def _cut_short(data: bytes, format_: str) -> bool:
    """Whether a file that failed to decode lacks its end, so that TRUNCATED says more than CORRUPT."""
    if format_ == "JPEG":
        return b"\xff\xd9" not in data[-4096:]
    if format_ == "PNG":
        return b"IEND" not in data[-4096:]
    if format_ == "GIF":
        return b";" not in data[-64:]
    if format_ == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if format_ == "BMP":
        return int.from_bytes(data[2:6], "little") > len(data)
    return _tiff_cut_short(data)


def _tiff_cut_short(data: bytes) -> bool:
    """Whether a TIFF's first directory, or a value it points to, lies beyond the end. Strips: see _Tiff.load."""
    order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"

    def number(at: int, width: int) -> int:
        return int.from_bytes(data[at : at + width], order)

    if number(2, 2) != 42:  # BigTIFF is too rare to walk
        return False
    directory = number(4, 4)
    end = directory + 2 + 12 * number(directory, 2)
    for entry in range(directory + 2, min(end, len(data)), 12):
        size = number(entry + 4, 4) * _TIFF_TYPE_SIZES.get(number(entry + 2, 2), 0)
        end = max(end, number(entry + 8, 4) + size if size > 4 else 0)
    return end > len(data)


# --- decoding ---------------------------------------------------------------------------------------------------------

_SCAN_PIXELS = 2**31
"""Scans x pixels spent on one JPEG: each scan is a pass over all coefficients, and a few kilobytes can hold thousands.
An honest picture has one scan, or about ten where it is progressive; 16 are always allowed, 1000 never."""
_TILE_PIXELS = 2**20
"""Size up to which a TIFF's tile may be larger than images.max_pixels."""
_MAX_SIDE = 2**24
"""Width or height. Of a row of 2 Gbit, which only a forged header has, Pillow says that there is no memory for it."""
_MAX_STRIPS = 2**18
"""Strips or tiles of one TIFF: 64 Mpx in tiles of 16 x 16. Pillow builds a Python object for each, 5 us."""


class _Tiff(TiffImagePlugin.TiffImageFile):
    """Pillow's TIFF reader, minus what lets a small file take much memory; and it knows a missing end."""

    def _setup(self) -> None:
        side_x, side_y = (self.tag_v2.get(tag, 1) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
        if isinstance(side_x, int) and isinstance(side_y, int) and side_x * side_y > _TILE_PIXELS:
            _check_pixels((side_x, side_y))  # libtiff allocates a whole tile, whatever the image's size
        for tag in (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.TILEOFFSETS):
            if len(self.tag_v2._tagdata.get(tag, b"")) > 4 * _MAX_STRIPS:
                raise ImageError(Reason.TOO_MANY_PIXELS, f"TIFF: more than {_MAX_STRIPS} strips or tiles")
        super()._setup()
        _check_pixels(self._tile_size)
        rows = max((tile.extents[3] for tile in self.tile if tile.extents), default=0)
        if rows < self._tile_size[1]:  # Pillow would take the rest for black: a kilobyte, a million rows
            raise ImageError(
                Reason.CORRUPT_IMAGE, f"TIFF: strips for {rows} rows of {self._tile_size[1]}, as its header has it"
            )

    def load(self) -> Any:
        try:
            return super().load()
        except OSError as error:  # libtiff says -2 whatever happened
            starts, counts = (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.STRIPBYTECOUNTS)
            if TiffImagePlugin.TILEOFFSETS in self.tag_v2:
                starts, counts = (TiffImagePlugin.TILEOFFSETS, TiffImagePlugin.TILEBYTECOUNTS)
            ends = map(operator.add, self.tag_v2.get(starts, ()), self.tag_v2.get(counts, ()))
            if self.fp and max(ends, default=0) > self.fp.seek(0, io.SEEK_END):
                raise OSError("image file is truncated: a strip lies beyond its end") from error
            raise


_PLUGINS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": _Tiff,
}


def _decode(data: bytes, format_: str, scratch: npt.NDArray[np.uint8] | None) -> npt.NDArray[np.uint8]:
    if format_ == "JPEG" and (rgb := _turbo(data, scratch)) is not None:
        return rgb
    image = _PLUGINS[format_](io.BytesIO(data))  # reads the header only
    _check_pixels(image.size)
    image.load()
    _check_pixels(image.size)
    return _upright(_flatten(image), _orientation(image))


def _size(data: bytes, format_: str) -> tuple[int, int]:
    """Width and height by the header, within bounds."""
    if format_ != "JPEG":
        width, height = _PLUGINS[format_](io.BytesIO(data)).size  # reads the header only
        _check_pixels((width, height))
        return width, height
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    _check_pixels((width, height))
    if not _segments(data)[0]:
        _check_scans(data, width, height)
    return width, height


def _check_pixels(size: tuple[int, int]) -> None:
    limit = _here.max_pixels
    if limit is None:
        return
    if max(size) > _MAX_SIDE:
        raise ImageError(Reason.TOO_MANY_PIXELS, f"{size[0]} x {size[1]} pixels claimed, a side above {_MAX_SIDE}")
    if size[0] * size[1] > limit:
        detail = f"{size[0]} x {size[1]} pixels claimed, above max_pixels ({limit})"
        raise ImageError(Reason.TOO_MANY_PIXELS, detail)


def _turbo(data: bytes, scratch: npt.NDArray[np.uint8] | None) -> npt.NDArray[np.uint8] | None:
    """Decode a grey or RGB JPEG with libjpeg-turbo; None where Pillow is to judge: CMYK, or any warning.

    Pillow's header parser alone would cost a tenth of the whole; so the few segments that matter are found here.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_pixels((width, height))
    one_scan, may_be_turned = _segments(data)
    if not one_scan:
        _check_scans(data, width, height)
    if colours in ("CMYK", "YCCK"):
        return None
    try:
        fits = scratch if scratch is not None and scratch.size >= 3 * width * height else None
        rgb = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, buffer=fits)
    except ValueError:
        return None
    orientation = _orientation(JpegImagePlugin.JpegImageFile(io.BytesIO(data))) if may_be_turned else 1
    return _upright(rgb, orientation)


def _check_scans(data: bytes, width: int, height: int) -> None:
    allowed = min(1000, max(16, _SCAN_PIXELS // max(1, width * height)))
    if (scans := data.count(b"\xff\xda")) > allowed:
        raise ImageError(Reason.TOO_MANY_PIXELS, f"JPEG: {scans} scans of {width} x {height} pixels")


def _segments(data: bytes) -> tuple[bool, bool]:
    """Whether the first scan is surely the whole picture, and whether Pillow may find an orientation before it.

    (False, True), the careful answer, for a file that is not plainly laid out.
    """
    at, whole, components, may_be_turned = 2, False, -1, False
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:  # start of scan; ITU-T T.81, B.2.3: length (2 bytes), number of components
            return whole and data[at + 4] == components, may_be_turned
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame, B.2.2
            whole, components = marker <= 0xC1, data[at + 9]  # baseline or extended: each component in one scan only
        elif marker == 0xE1:  # APP1: EXIF or XMP
            may_be_turned = True
        elif marker < 0xC0 or 0xD0 <= marker <= 0xD9:  # markers without a length have no business here
            break
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False, True


def _flatten(image: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] of a loaded image of any mode; transparency composited on white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.repeat(_grey(image)[:, :, None], 3, axis=2)
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # a 16-bit PNG's colour key; Pillow keeps the pixels' high bytes only
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if not image.has_transparency_data:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", rgba.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return np.array(white)


def _grey(image: Image.Image) -> npt.NDArray[np.uint8]:
    """uint8 [H, W] of a grey image of more than 8 bits, by its full scale: as the format says, else guessed.

    16-bit is x / 257, rounded, as libpng scales. 32-bit integers and floats say no full scale: the smallest of 1
    (floats only), 255 and 65535 that holds the largest value, else that value; from 0, or the smallest value if below.
    """
    values = np.asarray(image)
    tags = image.tag_v2 if isinstance(image, _Tiff) else {}
    if image.mode.startswith("I;16"):
        full = 2 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
        grey = (np.minimum(values, full).astype(np.uint32) * 255 + full // 2) // full
    else:
        with np.errstate(invalid="ignore"):  # a signalling NaN is one to come to nothing, too
            reals = values.astype(np.float64)
        np.nan_to_num(reals, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        low, peak = min(0.0, float(reals.min())), float(reals.max())
        scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        high = next((scale for scale in scales if low == 0 and peak <= scale), peak)
        reals -= low  # in place: of the largest pictures each copy is 512 MB
        reals *= 255 / ((high - low) or 1.0)
        grey = np.rint(reals, out=reals)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero; Pillow heeds it up to 8 bits only
        grey = 255 - grey
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey = np.where(values == key, 255, grey)
    return np.asarray(grey, dtype=np.uint8)


def _orientation(image: Image.Image) -> int:
    """EXIF (or XMP) orientation, 1-8; 1 where there is none left (Pillow turns TIFFs itself) or it cannot be read."""
    try:
        value = image.getexif().get(0x0112)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  (junk there harms no pixel: there is no orientation to heed)
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(rgb: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Undo an EXIF orientation (Exif 2.32, tag 0x0112). Returns a C-contiguous array."""
    if orientation >= 5:
        rgb = rgb.transpose(1, 0, 2)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return np.ascontiguousarray(rgb[rows, columns])


# --- quiet, in this thread only ---------------------------------------------------------------------------------------


class _Here(threading.local):
    max_pixels: int | None = None
    """Set while this thread is inside decode()."""


_here = _Here()


class _Warnings:
    """`warnings` as Pillow's modules see it: mute inside decode(), itself elsewhere.

    `warnings.catch_warnings` swaps a global and so is not thread safe, and a filter set at import loses to any set
    after it (under pytest's `-W error` a stray TIFF tag would make a good image a corrupt one).
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(warnings, name)

    @staticmethod
    def warn(message: Any, category: Any = None, stacklevel: int = 1, source: Any = None) -> None:
        if _here.max_pixels is None:
            warnings.warn(message, category, stacklevel + 1, source)


def _hush() -> None:
    """Keep broken images from flooding the log, and Pillow's own pixel limit from overruling the spec's.

    Outside decode() Pillow warns, logs and limits as ever. Only libtiff goes quiet for the whole process: it prints to
    the C stderr, and its handlers are global.
    """
    readers = (JpegImagePlugin, PngImagePlugin, WebPImagePlugin, GifImagePlugin, BmpImagePlugin, TiffImagePlugin)
    for module in (Image, ImageFile, *readers):
        if hasattr(module, "warnings"):
            module.warnings = _Warnings()  # type: ignore[attr-defined]
        if hasattr(module, "logger"):
            module.logger.addFilter(lambda _: _here.max_pixels is None)
    pillows_own = Image._decompression_bomb_check

    def check(size: tuple[int, int], **options: bool) -> None:
        if _here.max_pixels is None:
            pillows_own(size, **options)
        else:
            _check_pixels(size)

    Image._decompression_bomb_check = check
    try:  # dlsym on the extension looks through its own libtiff, bundled in the wheel or the system's
        pillow = ctypes.CDLL(_imaging.__file__)
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            handler = getattr(pillow, name)
            handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            handler(None)
    except (AttributeError, OSError):
        logging.getLogger(__name__).debug("libtiff not found: broken TIFFs will print to stderr")


_hush()
