"""Decoding and preprocessing: every format and mode, every way to be broken."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import random
import resource
import struct
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from capfilt.errors import ImageError
from capfilt.images import Picture, decode, look
from capfilt.models.preprocess import CLIP_MEAN, CLIP_STD, normalise, resize
from capfilt.schema import Reason
from capfilt.spec import Images

LIMITS = Images()
PHOTOS = {name: getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")}
SMALL = Image.fromarray(PHOTOS["astronaut"]).resize((67, 45))
GREY = SMALL.convert("L")
BICUBIC = Image.Resampling.BICUBIC


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_alpha(image: Image.Image, alpha: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(alpha)
    return image


def pillow_rgb(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def refusal(data: bytes, limits: Images = LIMITS) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode(data, limits)
    return caught.value


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def tiff(tags: dict[int, int], pixels: bytes = b"", width: int = 4, height: int = 4) -> bytes:
    """A grey TIFF written by hand: `tags` override; every value is one LONG; the strip follows the directory."""
    start = 8 + 2 + 12 * len({256, 257, 258, 259, 262, 273, 277, 278, 279} | tags.keys()) + 4
    fields = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: start, 277: 1, 278: height, 279: len(pixels)} | tags
    body = b"".join(struct.pack("<HHII", tag, 4, 1, fields[tag]) for tag in sorted(fields))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + body + b"\0\0\0\0" + pixels


def png(width: int, height: int, depth: int, colour: int, pixels: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *extra]
    chunks += [(b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


# --- what decodes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90},
        {"quality": 30, "subsampling": 0},
        {"quality": 75, "subsampling": 1},
        {"quality": 95, "subsampling": 2},
        {"quality": 85, "progressive": True},
        {"quality": 85, "restart_marker_rows": 1},
    ],
    ids=str,
)
def test_jpeg_is_bit_exact_with_pillow(name, options):
    photo = Image.fromarray(PHOTOS[name])
    for image in (photo, photo.crop((0, 0, 211, 97)), photo.convert("L")):
        data = encode(image, "JPEG", **options)
        picture = decode(data, LIMITS)
        assert picture.format == "JPEG"
        assert (picture.width, picture.height) == image.size
        np.testing.assert_array_equal(picture.rgb, pillow_rgb(data))


LOSSLESS = [
    ("PNG", SMALL, {}),
    ("PNG", GREY, {}),
    ("PNG", SMALL.quantize(32), {}),
    ("PNG", SMALL.quantize(4), {"bits": 2}),
    ("PNG", GREY.convert("1"), {}),
    ("WEBP", SMALL, {"lossless": True}),
    ("WEBP", SMALL, {"quality": 80}),
    ("GIF", SMALL.quantize(32), {}),
    ("GIF", GREY, {}),
    ("BMP", SMALL, {}),
    ("BMP", SMALL.quantize(32), {}),
    ("BMP", GREY.convert("1"), {}),
    ("TIFF", SMALL, {}),
    ("TIFF", SMALL, {"compression": "tiff_lzw"}),
    ("TIFF", SMALL, {"compression": "tiff_adobe_deflate"}),
    ("TIFF", SMALL, {"compression": "packbits"}),
    ("TIFF", SMALL, {"compression": "jpeg"}),
    ("TIFF", SMALL.convert("YCbCr"), {}),
    ("TIFF", SMALL.quantize(32), {}),
    ("TIFF", GREY.convert("1"), {"compression": "group4"}),
    ("TIFF", SMALL.convert("CMYK"), {"compression": "tiff_lzw"}),
    ("JPEG", SMALL.convert("CMYK"), {"quality": 95}),
]


@pytest.mark.parametrize(("kind", "image", "options"), LOSSLESS, ids=lambda v: getattr(v, "mode", str(v)))
def test_opaque_images_are_as_pillow_converts_them(kind, image, options):
    data = encode(image, kind, **options)
    picture = decode(data, LIMITS)
    assert picture.format == kind
    assert picture.rgb.dtype == np.uint8
    assert picture.rgb.flags.c_contiguous
    np.testing.assert_array_equal(picture.rgb, pillow_rgb(data))


def test_cmyk_jpeg_keeps_its_colours():
    data = encode(Image.fromarray(PHOTOS["coffee"]).convert("CMYK"), "JPEG", quality=95)
    difference = np.abs(decode(data, LIMITS).rgb.astype(int) - PHOTOS["coffee"])
    assert difference.mean() < 3  # inverted, it would be above 100


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF lzw"])
def test_orientation_is_pillows(kind, orientation):
    options = {"compression": "tiff_lzw"} if kind.endswith("lzw") else {}
    data = encode(SMALL, kind.split()[0], exif=exif(orientation), **options)
    picture = decode(data, LIMITS)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert (picture.width, picture.height) == ((45, 67) if orientation >= 5 else (67, 45))
    assert picture.rgb.flags.c_contiguous
    np.testing.assert_array_equal(picture.rgb, expected)


@pytest.mark.parametrize(
    "block", [b"junk", b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40, b"II*\0\xff\xff\xff\xff", b"", exif(9).tobytes()[6:]]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_harms_no_picture(kind, block):
    data = encode(SMALL, kind, exif=b"Exif\0\0" + block)
    np.testing.assert_array_equal(decode(data, LIMITS).rgb, pillow_rgb(encode(SMALL, kind)))


def test_junk_side_directory_harms_no_tiff():
    data = tiff({0x8769: 0xFFFFFFF0, 0x8825: 3}, pixels=bytes(range(0, 160, 10)))
    assert decode(data, LIMITS).rgb[:, :, 0].ravel().tolist() == list(range(0, 160, 10))


@pytest.mark.parametrize(
    ("rgba", "white"),
    [
        ((0, 0, 0, 255), (0, 0, 0)),
        ((10, 20, 30, 0), (255, 255, 255)),
        ((0, 100, 255, 128), (127, 177, 255)),  # 0*128/255 + 127, 100*128/255 + 127, 255
        ((200, 0, 50, 51), (244, 204, 214)),
    ],
)
def test_alpha_is_composited_on_white(rgba, white):
    image = Image.new("RGBA", (5, 3), rgba)
    files = [encode(image, "PNG"), encode(image, "WEBP", lossless=True, exact=True), encode(image, "TIFF")]
    for data in files:
        np.testing.assert_array_equal(decode(data, LIMITS).rgb, np.full((3, 5, 3), white))


def test_transparency_of_every_other_kind_is_white():
    palette = SMALL.quantize(8)
    inks = np.asarray(palette)
    opaque = np.asarray(palette.convert("RGB")).copy()
    opaque[inks == 3] = 255
    for kind in ("PNG", "GIF"):
        np.testing.assert_array_equal(decode(encode(palette, kind, transparency=3), LIMITS).rgb, opaque)
    half = encode(palette, "PNG", transparency=bytes([255, 255, 255, 0, 255, 255, 255, 255]))
    np.testing.assert_array_equal(decode(half, LIMITS).rgb, opaque)

    grey = np.asarray(GREY)
    value = int(grey[0, 0])
    expected = np.where(grey == value, 255, grey)
    assert (decode(encode(GREY, "PNG", transparency=value), LIMITS).rgb == expected[:, :, None]).all()
    la = with_alpha(GREY, Image.fromarray(np.where(grey == value, 0, 255).astype(np.uint8)))
    assert (decode(encode(la, "PNG"), LIMITS).rgb == expected[:, :, None]).all()

    red = Image.new("RGB", (2, 1), (250, 0, 0))
    assert (decode(encode(red, "PNG", transparency=(250, 0, 0)), LIMITS).rgb == 255).all()
    sixteen = png(1, 2, 16, 2, b"\0" + b"\x80\0" * 3 + b"\0" + b"\x40\0" * 3, (b"tRNS", b"\x80\0" * 3))
    assert decode(sixteen, LIMITS).rgb[:, 0].tolist() == [[255] * 3, [0x40] * 3]
    deep = png(1, 2, 16, 0, b"\0\x80\0\0\x40\0", (b"tRNS", b"\x80\0"))
    assert decode(deep, LIMITS).rgb[:, 0].tolist() == [[255] * 3, [64] * 3]


LEVELS = np.array([[0, 128, 257, 32768, 65278, 65535]])
"""16-bit levels; / 257, rounded: 0, 0, 1, 128, 254, 255."""


def sixteen_bit() -> dict[str, bytes]:
    little, big = LEVELS.astype("<u2"), LEVELS.astype(">u2")
    return {
        "png": png(6, 1, 16, 0, b"\0" + big.tobytes()),
        "tiff": encode(Image.fromarray(little), "TIFF"),
        "tiff lzw": encode(Image.fromarray(little), "TIFF", compression="tiff_lzw"),
        "tiff big-endian": encode(Image.frombytes("I;16B", (6, 1), big.tobytes()), "TIFF"),
        "tiff 32-bit": encode(Image.fromarray(LEVELS.astype(np.int32)), "TIFF"),
        "tiff float": encode(Image.fromarray((LEVELS / 65535).astype(np.float32)), "TIFF"),
        "tiff float to 255": encode(Image.fromarray((LEVELS / 257).astype(np.float32)), "TIFF"),
    }


@pytest.mark.parametrize("data", sixteen_bit().values(), ids=sixteen_bit())
def test_deep_grey_is_scaled_not_clipped(data):
    assert decode(data, LIMITS).rgb[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 254, 255)]


def test_deep_grey_corner_cases():
    white_is_zero = tiff({258: 16, 262: 0}, LEVELS.astype("<u2").tobytes(), width=6, height=1)
    assert decode(white_is_zero, LIMITS).rgb[0, :, 0].tolist() == [255, 255, 254, 127, 1, 0]
    junk = np.array([[np.nan, np.inf, -np.inf, 0.0]], np.float32)
    assert decode(encode(Image.fromarray(junk), "TIFF"), LIMITS).rgb.max() == 0
    signed = np.array([[-100, 0, 155]], np.float32)
    assert decode(encode(Image.fromarray(signed), "TIFF"), LIMITS).rgb[0, :, 0].tolist() == [0, 100, 255]
    rgb = png(1, 1, 16, 2, b"\0" + b"\x80\xff\0\0\xff\xff")
    assert decode(rgb, LIMITS).rgb.tolist() == [[[128, 0, 255]]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame_of_several(kind):
    first, second = Image.new("RGB", (40, 30), (255, 0, 0)), Image.new("RGB", (40, 30), (0, 0, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(first, kind, save_all=True, append_images=[second], **options)
    picture = decode(data, LIMITS)
    assert picture.format == kind
    assert (picture.rgb == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (3, 2)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_extreme_shapes_decode_and_resize(kind, size):
    size = tuple(min(side, 16_383) for side in size) if kind == "WEBP" else size
    picture = decode(encode(Image.new("RGB", size, (60, 60, 60)), kind), LIMITS)
    assert (picture.width, picture.height) == size
    small_CHW = resize(picture.rgb, 96)
    assert small_CHW.shape == (3, 96, 96)
    assert (small_CHW.to(int) - 60).abs().max() <= 3


# --- what does not ----------------------------------------------------------------------------------------------------

SVG = b'<?xml version="1.0"?>\n<!-- a comment -->\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


@pytest.mark.parametrize(
    ("data", "seems"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"\n\n  <html lang=en>", "HTML"),
        (SVG, "SVG"),
        (b"\xef\xbb\xbf" + SVG, "SVG"),
        ("<html>".encode("utf-16"), "HTML"),
        (b'{"error": "not found"}', "JSON"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
        (b"Not found", "text"),
        (b"BMW drivers are waiting at the door of the shop", "text"),
        (b"%PDF-1.4\n", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"8BPS\0\1" + bytes(40), "PSD"),
        (b"\0\0\1\0\1\0\x10\x10" + bytes(40), "icon"),
        (b"\0\0\0\x20ftypavif" + bytes(40), "AVIF"),
        (b"\0\0\0\x20ftypheic" + bytes(40), "HEIC"),
        (b"\0\0\0\x20ftypisom" + bytes(40), "video"),
        (b"PK\3\4" + bytes(40), "archive"),
        (b"\x93\x01\x00\xfe" * 20, "unknown"),
        (b"\xff\xd8", "unknown"),
        (b"\0", "unknown"),
    ],
)
def test_not_an_image_says_what_it_seems_to_be(data, seems):
    error = refusal(data)
    assert error.reason == Reason.NOT_AN_IMAGE
    assert seems in error.detail


def test_formats_outside_the_list_never_reach_pillow():
    for kind in ("PPM", "ICO", "TGA", "EPS", "PCX", "JPEG2000"):
        assert refusal(encode(SMALL, kind)).reason == Reason.NOT_AN_IMAGE


def test_bounds():
    data = encode(SMALL, "PNG")
    assert refusal(b"").reason == Reason.EMPTY_IMAGE
    assert isinstance(decode(data, Images(max_bytes=len(data), max_pixels=67 * 45)), Picture)
    assert refusal(data, Images(max_bytes=len(data) - 1)).reason == Reason.TOO_MANY_BYTES
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        error = refusal(encode(SMALL, kind), Images(max_pixels=67 * 45 - 1))
        assert error.reason == Reason.TOO_MANY_PIXELS
        assert "67 x 45" in error.detail


FORMATS = {
    "JPEG": encode(SMALL, "JPEG"),
    "JPEG progressive": encode(SMALL, "JPEG", progressive=True, exif=exif(6)),
    "JPEG CMYK": encode(SMALL.convert("CMYK"), "JPEG"),
    "PNG": encode(with_alpha(SMALL, GREY), "PNG", exif=exif(3)),
    "PNG palette": encode(SMALL.quantize(32), "PNG", transparency=3),
    "PNG 16-bit": encode(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "PNG"),
    "WEBP": encode(SMALL, "WEBP", exif=exif(8)),
    "WEBP lossless": encode(with_alpha(SMALL, GREY), "WEBP", lossless=True),
    "GIF": encode(SMALL.quantize(32), "GIF", transparency=1),
    "GIF animated": encode(SMALL, "GIF", save_all=True, append_images=[GREY], disposal=2, comment=b"hello"),
    "BMP": encode(SMALL, "BMP"),
    "BMP palette": encode(SMALL.quantize(32), "BMP"),
    "TIFF": encode(SMALL, "TIFF", exif=exif(5)),
    "TIFF lzw": encode(with_alpha(SMALL, GREY), "TIFF", compression="tiff_lzw"),
    "TIFF deflate": encode(SMALL.quantize(32), "TIFF", compression="tiff_adobe_deflate"),
    "TIFF jpeg": encode(SMALL, "TIFF", compression="jpeg"),
    "TIFF packbits": encode(GREY, "TIFF", compression="packbits"),
    "TIFF fax": encode(GREY.convert("1"), "TIFF", compression="group4"),
    "TIFF float": encode(GREY.convert("F"), "TIFF"),
}


ODD_TAG = tiff({}, bytes(range(16))).replace(struct.pack("<HHI", 277, 4, 1), struct.pack("<HHI", 277, 4, 999))
"""A good picture with a tag larger than the file, which Pillow warns of and ignores."""


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"GIF animated"}))  # whose first frame may be whole
def test_truncated_images_are_refused(name):
    data = FORMATS[name]
    for cut in (len(data) // 3, len(data) // 2, len(data) - max(4, len(data) // 20)):
        assert refusal(data[:cut]).reason == Reason.TRUNCATED_IMAGE


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_headers_without_a_picture_are_corrupt_or_truncated(name):
    for data in (FORMATS[name][:18] + b"\xa5" * 400, FORMATS[name][:18] + bytes(400)):
        claimed_size_is_junk = name == "WEBP" and data.endswith(b"\xa5")
        allowed = {Reason.TOO_MANY_PIXELS} if claimed_size_is_junk else {Reason.CORRUPT_IMAGE, Reason.TRUNCATED_IMAGE}
        assert refusal(data).reason in allowed


def test_corrupt_is_not_truncated():
    data = bytearray(FORMATS["PNG"])
    middle = data.index(b"IDAT") + 40
    data[middle : middle + 60] = bytes(60)
    assert refusal(bytes(data)).reason == Reason.CORRUPT_IMAGE


def bombs() -> dict[str, bytes]:
    webp = bytearray(FORMATS["WEBP"])
    assert webp[12:16] == b"VP8X"
    webp[24:30] = b"\xff\xff\xff\x7f\0\0"
    jpeg = bytearray(FORMATS["JPEG"])
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = b"\xff\xdc\xff\xdc"
    gif = b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0)
    frame = struct.pack("<cHHHHBB", b",", 0, 0, 65535, 65535, 0, 2)
    scans = encode(SMALL, "JPEG", progressive=True)
    last = scans.rindex(b"\xff\xda")
    scans = scans[:last] + scans[last:-2] * 2000 + b"\xff\xd9"
    # Whoever takes the bare marker TEM for one with a length skips to a frame and a scan that are not there.
    decoy = b"\xff\xc0\0\x0b\x08\0\x09\0\x09\x01\0\0\0" + b"\xff\xda\0\x08\x01"
    comments = (bytes(59_998), bytes(5_528) + decoy + bytes(99))  # FF FE, a comment's marker, would be a length
    tem = b"\xff\x01" + b"".join(b"\xff\xfe" + struct.pack(">H", 2 + len(text)) + text for text in comments)
    return {
        "png": png(50_000, 50_000, 8, 2, b"\0" * 100),
        "png row": png(40_000_000, 1, 16, 6, b"\0" * 100),  # for Pillow a want of memory, whatever there is
        "tiff row": tiff({}, b"\0" * 16, width=40_000_000, height=1),
        "tiff column": tiff({}, b"\0" * 16, width=1, height=40_000_000),
        "jpeg": bytes(jpeg),
        "jpeg scans": scans,
        "jpeg scans behind a decoy": scans[:2] + tem + scans[2:],
        "webp": bytes(webp),
        "gif canvas": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + frame,
        "gif frame": gif + b"!\xf9\4\x08\0\0\0\0" + frame,
        "bmp": struct.pack("<2sIIIIiiHHIIIIII", b"BM", 54, 0, 54, 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "tiff": tiff({}, b"\0" * 16, width=50_000, height=50_000),
        "tiff tile": tiff({259: 8, 322: 60_000, 323: 60_000, 324: 8, 325: 99}, zlib.compress(bytes(10**6))),
        "tiff strips": tiff({}, bytes(16)).replace(
            struct.pack("<HHI", 273, 4, 1), struct.pack("<HHI", 273, 4, 400_000)
        ) + bytes(1_700_000),
    }  # fmt: skip


@contextlib.contextmanager
def little_memory():
    """Lets the process allocate 96 MiB more, touched or not."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 96 * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def scarce_memory():
    with little_memory():
        yield


@pytest.mark.parametrize("data", bombs().values(), ids=bombs())
@pytest.mark.usefixtures("scarce_memory")
def test_bombs_are_refused_without_allocating(data):
    assert refusal(data).reason == Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize("name", FORMATS)
def test_a_look_tells_format_and_size_by_the_header(name):
    data = FORMATS[name]
    with Image.open(io.BytesIO(data)) as image:
        assert look(data, LIMITS) == (name.split()[0], *image.size)
    with pytest.raises(ImageError, match="too_many_pixels"):
        look(data, Images(max_pixels=67 * 45 - 1))


@pytest.mark.parametrize("name", sorted(bombs().keys() - {"gif frame"}))  # whose header says nothing of it
@pytest.mark.usefixtures("scarce_memory")
def test_a_look_sees_bombs(name):
    with pytest.raises(ImageError) as caught:
        look(bombs()[name], LIMITS)
    assert caught.value.reason == Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY_IMAGE),
        (b"<html>", Reason.NOT_AN_IMAGE),
        (bytes(100), Reason.NOT_AN_IMAGE),
        (b"\xff\xd8\xff" + b"x" * 99 + b"\xff\xd9", Reason.CORRUPT_IMAGE),
        (FORMATS["PNG"][:20], Reason.TRUNCATED_IMAGE),
    ],
)
def test_a_look_refuses_what_is_no_image(data, reason):
    with pytest.raises(ImageError) as caught:
        look(data, LIMITS)
    assert caught.value.reason == reason


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_want_of_memory_is_no_fault_of_the_images(kind):
    """Else a good image would be called corrupt, and for good: no later run tries it again."""
    data = encode(Image.new("L", (7000, 7000)), kind)  # 147 MB of RGB
    # In a process of its own: one that has loaded a model keeps the memory that it frees, and would not want for any.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(_formats_with_little_memory_and_with_enough, data).result() == (None, kind)


def _formats_with_little_memory_and_with_enough(data):
    with little_memory():
        try:
            little = decode(data, LIMITS).format
        except MemoryError:
            little = None
    return little, decode(data, LIMITS).format


def test_scans_after_a_whole_one_are_not_decoded():
    plain = encode(SMALL, "JPEG")
    scan = plain[plain.rindex(b"\xff\xda") : -2]
    assert refusal(plain[:-2] + 2000 * scan + b"\xff\xd9").reason == Reason.CORRUPT_IMAGE


@pytest.mark.parametrize("chunk", [b"zTXt", b"iCCP"])
@pytest.mark.usefixtures("scarce_memory")
def test_png_zlib_bombs_are_refused_without_allocating(chunk):
    deflate = zlib.compressobj(9)
    packed = b"".join(deflate.compress(bytes(10**6)) for _ in range(200)) + deflate.flush()
    error = refusal(png(1, 1, 8, 0, b"\0\0", (chunk, b"name\0\0" + packed)))
    assert error.reason == Reason.CORRUPT_IMAGE
    assert "too large" in error.detail


def test_spec_overrules_pillows_own_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name in ("JPEG", "PNG", "WEBP", "GIF", "TIFF lzw"):
        decode(FORMATS[name], LIMITS)
    with pytest.raises(Image.DecompressionBombError):  # and outside decode() Pillow's own still holds
        Image.open(io.BytesIO(FORMATS["PNG"]))


# --- robustness -------------------------------------------------------------------------------------------------------


def mutate(data: bytes, dice: random.Random) -> bytes:
    """Flip bytes (half of the time near the header), cut, splice with another image, or delete a run."""
    out = bytearray(data)
    kind = dice.random()
    if kind < 0.6:
        reach = min(len(out), dice.choice([64, 250, len(out)]))
        for _ in range(dice.choice([1, 1, 2, 4, 16])):
            out[dice.randrange(reach)] = dice.choice([0, 255, dice.randrange(256)])
        directory = struct.unpack_from("<I", out, 4)[0] if out[:2] == b"II" else len(out)
        for at in (directory + dice.randrange(160) for _ in range(3)):
            if at < len(out):
                out[at] = dice.randrange(256)
    elif kind < 0.7:
        del out[dice.randrange(len(out)) :]
    elif kind < 0.85:
        other = dice.choice(list(FORMATS.values()))
        out[dice.randrange(len(out)) :] = other[dice.randrange(len(other)) :]
    else:
        at = dice.randrange(len(out))
        del out[at : at + dice.randrange(64)]
    return bytes(out)


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_images_decode_or_are_refused_in_silence(name, capfd):
    """capfd watches file descriptors 1 and 2: libtiff prints there, past Python."""
    dice = random.Random(name)
    outcomes, details = set(), set()
    for _ in range(300):
        try:
            outcomes.add(decode(mutate(FORMATS[name], dice), Images(max_pixels=2_000_000)).rgb.shape)
        except ImageError as error:
            outcomes.add(error.reason)
            details.add(error.detail)
    assert all("\n" not in detail and len(detail) < 250 for detail in details)
    assert {Reason.CORRUPT_IMAGE, Reason.TRUNCATED_IMAGE} & outcomes
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@settings(max_examples=300)
@given(
    magic=st.sampled_from([data[:n] for data in FORMATS.values() for n in (4, 14, 26)]), tail=st.binary(max_size=300)
)
def test_any_bytes_after_a_magic_number(magic, tail):
    with contextlib.suppress(ImageError):
        assert decode(magic + tail, Images(max_pixels=2_000_000)).rgb.ndim == 3


def test_threads_agree():
    files = [*FORMATS.values(), ODD_TAG] * 8
    alone = [decode(data, LIMITS).rgb for data in files]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda data: decode(data, LIMITS).rgb, files))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_pillow_is_mute_inside_decode_only():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(ODD_TAG, LIMITS).rgb[:, :, 0].ravel().tolist() == list(range(16))
    with pytest.warns(UserWarning, match="Tag data larger than file"):
        Image.open(io.BytesIO(ODD_TAG))


def test_pillow_logs_nothing_inside_decode(caplog):
    caplog.set_level(logging.DEBUG)
    for data in (tiff({277: 99}, bytes(16)), FORMATS["PNG"]):  # too many samples a pixel: Pillow logs an error
        with contextlib.suppress(ImageError):
            decode(data, LIMITS)
    assert not caplog.records
    with contextlib.suppress(OSError):
        Image.open(io.BytesIO(tiff({277: 99}, bytes(16))))
    assert caplog.records


# --- preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [224, 384])
@pytest.mark.parametrize("name", PHOTOS)
def test_resize_is_within_two_levels_of_pillow(name, size):
    photo = PHOTOS[name]
    for rgb in (photo, np.ascontiguousarray(photo[:50, :300]), np.ascontiguousarray(photo[100:400, 7:90])):
        height, width, _ = rgb.shape
        columns_first = height - size > max(0, 2 * (width - size))
        half = (width, size) if columns_first else (size, height)  # one pass a call: Pillow up to 12 took rows first
        expected = np.asarray(Image.fromarray(rgb).resize(half, BICUBIC).resize((size, size), BICUBIC)).astype(int)
        difference = np.abs(resize(rgb, size).permute(1, 2, 0).numpy() - expected)
        assert difference.max() <= 2
        assert difference.mean() < 0.05
        if int(PIL.__version__.split(".")[0]) >= 13:
            assert np.array_equal(expected, np.asarray(Image.fromarray(rgb).resize((size, size), BICUBIC)))


def test_resize_writes_where_it_is_told():
    photo, scratch = PHOTOS["coffee"].copy(), torch.empty(2**20, dtype=torch.uint8)
    batch_BSSC = torch.zeros((3, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(resize(photo, 64, batch_BSSC[1], scratch), resize(photo, 64))
    assert torch.equal(batch_BSSC[1].permute(2, 0, 1), resize(photo, 64))
    assert not batch_BSSC[0].any()
    assert not batch_BSSC[2].any()
    assert torch.equal(resize(photo, 64, None, scratch[:100]), resize(photo, 64))  # too little is no harm


def test_resize_takes_any_array_and_keeps_the_fast_layout():
    photo = PHOTOS["coffee"].copy()
    small_CHW = resize(photo, 64)
    assert small_CHW.dtype == torch.uint8
    assert small_CHW.shape == (3, 64, 64)
    assert small_CHW.permute(1, 2, 0).is_contiguous()
    frozen = photo.copy()
    frozen.flags.writeable = False
    assert torch.equal(resize(frozen, 64), small_CHW)
    assert torch.equal(resize(photo[:, ::-1], 64), resize(photo[:, ::-1].copy(), 64))
    assert torch.equal(resize(np.asfortranarray(photo), 64), small_CHW)


def test_normalise_is_clips():
    images_BCHW = torch.tensor([[0, 255], [128, 7]], dtype=torch.uint8).expand(2, 3, 2, 2)
    before = images_BCHW.clone()
    result = normalise(images_BCHW, torch.float32)
    for channel in range(3):
        expected = (before[0, channel].numpy() / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
        np.testing.assert_allclose(result[1, channel].numpy(), expected, rtol=1e-5)
    assert torch.equal(images_BCHW, before)
    assert normalise(images_BCHW, torch.bfloat16).dtype == torch.bfloat16


def test_scratch_memory_holds_the_picture_and_never_what_is_made_of_it() -> None:
    scratch = np.empty(3 * 64 * 64, np.uint8)
    small, large = (encode(Image.effect_noise((side, side), 80).convert("RGB"), "JPEG") for side in (64, 80))
    picture = decode(small, Images(), scratch)
    assert np.shares_memory(picture.rgb, scratch)
    pixels = resize(picture.rgb, 64)  # not even where there is nothing to resize
    assert np.array_equal(picture.rgb, decode(small, Images()).rgb)
    scratch[:] = 0
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), decode(small, Images()).rgb)
    assert not np.shares_memory(decode(large, Images(), scratch).rgb, scratch)


# --- found by tests/test_fuzz.py ---


def test_a_signalling_nan_is_nothing_and_warns_of_nothing():
    floats = np.full((4, 4), 0.5, np.float32)
    data = encode(Image.fromarray(floats), "TIFF").replace(struct.pack("<f", 0.5), struct.pack("<I", 0x7FA00000), 1)
    assert decode(data, LIMITS).rgb[:, :, 0].ravel().tolist() == [0] + [128] * 15


def test_a_tiff_without_strips_for_all_its_rows_is_corrupt():
    """Pillow takes the rest for black: a kilobyte was 64 Mpx, 30 seconds and 1.7 GB."""
    error = refusal(tiff({278: 4}, bytes(16), width=4, height=1_000_000))
    assert error.reason is Reason.CORRUPT_IMAGE
    assert error.detail == "TIFF: strips for 4 rows of 1000000, as its header has it"
