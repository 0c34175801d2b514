"""A small learnable web: pictures of coloured shapes with captions, noisy in ways that are on record.

``render`` writes the web, ``render_clean`` the human pairs and the test set beside it:

    <directory>/shards/00000.parquet ...   exactly the shape of img2dataset 1.47's Parquet output, its
                                           ``disable_all_reencoding`` mode: the bytes as the web served them
    <directory>/truth.parquet              what img2dataset cannot know: one row per row, keyed by (shard, row)

There are 576 scenes (2 sizes, 9 colours, 4 shapes, 8 backgrounds). No word names two attributes, so any caption, a
model's too, can be read back word by word and judged against the scene on record (``is_true``). To extend the grammar,
add an entry to one of the tables below.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import re
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

SHARD_SCHEMA = pa.schema(
    [
        pa.field("caption", pa.string()),
        pa.field("url", pa.string()),
        pa.field("key", pa.string()),
        pa.field("status", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("width", pa.int32()),  # the four sizes are null in this mode: img2dataset did not decode
        pa.field("height", pa.int32()),
        pa.field("original_width", pa.int32()),
        pa.field("original_height", pa.int32()),
        pa.field("exif", pa.string()),  # JSON object
        pa.field("sha256", pa.string()),  # hex, of the bytes as downloaded
        pa.field("jpg", pa.binary()),  # named after img2dataset's encode_format, whatever the bytes are
    ]
)

TRUTH_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string()),  # file name in shards/
        pa.field("row", pa.int64()),  # position in that file, from 0
        pa.field("truth", pa.string()),  # TextKind of the web caption
        pa.field("truth_caption", pa.string()),  # a true caption; the web caption itself where clean
        pa.field("encoding", pa.string()),  # Encoding, null where broken
        pa.field("broken", pa.string()),  # Breakage, null where the image is usable
        pa.field("size", pa.string()),  # the scene shown, or meant where broken
        pa.field("colour", pa.string()),
        pa.field("shape", pa.string()),
        pa.field("background", pa.string()),
    ]
)

ROW_GROUP = 100
"""Rows per row group: img2dataset's own buffer."""

RGB = tuple[int, int, int]

SIZES: dict[str, tuple[float, float]] = {"small": (0.16, 0.18), "large": (0.32, 0.38)}  # radius / picture side
COLOURS: dict[str, RGB] = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (235, 210, 40),
    "purple": (130, 50, 160),
    "orange": (240, 130, 30),
    "brown": (105, 50, 20),
    "turquoise": (45, 190, 190),
    "magenta": (225, 45, 160),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (236, 236, 236),
    "black": (20, 20, 20),
    "grey": (128, 128, 128),
    "pink": (246, 176, 200),
    "cream": (246, 228, 170),
    "lavender": (190, 176, 240),
    "mint": (170, 232, 190),
    "navy": (25, 35, 95),
}


def _corners(count: int, start: float) -> list[tuple[float, float]]:
    turns = [start + index / count for index in range(count)]
    return [(math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)) for turn in turns]


SHAPES: dict[str, list[tuple[float, float]]] = {  # outlines of radius 1, y downwards; a small network confuses what
    # looks alike by quarter turns, so only one of them does
    "circle": _corners(48, 0),
    "square": _corners(4, 1 / 8),
    "triangle": _corners(3, 3 / 4),
    "line": [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)],
}

TEMPLATES = (
    "a {size} {colour} {shape} on a {background} background",
    "{size} {colour} {shape}, {background} background",
    "there is a {size} {colour} {shape} on a {background} background",
    "a picture of a {size} {colour} {shape} on {background}",
)
BOILERPLATE = (
    "click to enlarge",
    "buy now | free shipping",
    "image not available",
    "share this on your wall",
    "stock photo - royalty free",
    "loading, please wait ...",
)
FILE_NAMES = ("IMG_{:04d}.JPG", "DSC_{:04d}.jpg", "image-{}.png", "Screenshot_{}.png", "photo{}.jpeg")


class TextKind(StrEnum):
    """What a web caption has to do with its picture."""

    CLEAN = "clean"
    OTHER_CAPTION = "other_caption"  # a true caption of a picture of another scene
    WRONG_ATTRIBUTE = "wrong_attribute"  # one attribute is wrong
    BOILERPLATE = "boilerplate"
    FILE_NAME = "file_name"
    EMPTY = "empty"  # "" or null


NOISE = tuple(kind for kind in TextKind if kind is not TextKind.CLEAN)


class Encoding(StrEnum):
    """How a picture's bytes are written. Grey and 1-bit pictures lose the colours that their captions name."""

    JPEG = "jpeg"
    JPEG_PROGRESSIVE = "jpeg_progressive"
    JPEG_GREY = "jpeg_grey"
    JPEG_CMYK = "jpeg_cmyk"
    JPEG_ROTATED = "jpeg_rotated"  # stored turned or mirrored, upright by its EXIF orientation
    PNG = "png"
    PNG_RGBA = "png_rgba"
    PNG_PALETTE = "png_palette"
    PNG_GREY16 = "png_grey16"
    PNG_1BIT = "png_1bit"
    WEBP = "webp"
    WEBP_LOSSLESS = "webp_lossless"
    GIF = "gif"
    GIF_ANIMATED = "gif_animated"
    BMP = "bmp"
    TIFF = "tiff"
    TIFF_LZW = "tiff_lzw"


class Breakage(StrEnum):
    """Why a row has no usable picture."""

    TRUNCATED_JPEG = "truncated_jpeg"
    GARBAGE = "garbage"
    HTML = "html"
    SVG = "svg"
    EMPTY = "empty"  # zero bytes
    BOMB = "bomb"  # a PNG header that claims 60,000 x 60,000 pixels
    MISSING = "missing"  # null: the download failed


# Common on the web first. The colourless ones are rare, so that colour stays learnable.
_FREQUENCY = dict.fromkeys(Encoding, 2) | {
    Encoding.JPEG: 40, Encoding.JPEG_PROGRESSIVE: 14, Encoding.PNG: 12, Encoding.WEBP: 12,
    Encoding.JPEG_GREY: 1, Encoding.PNG_GREY16: 1, Encoding.PNG_1BIT: 1,
}  # fmt: skip
_OFF_CENTRE = 0.12
"""How far from the middle of the picture an object may be, as a fraction of its side."""

_PIXELS = (64, 96)
_FEWEST_PIXELS = 32


@dataclass(frozen=True)
class Scene:
    """One object on a plain background; each field is a key of the table of its name."""

    size: str
    colour: str
    shape: str
    background: str


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "background": tuple(BACKGROUNDS),
}
SCENES = tuple(Scene(*values) for values in product(*ATTRIBUTES.values()))


@dataclass(frozen=True)
class Web:
    """A rendered web."""

    directory: Path
    shards: tuple[Path, ...]
    truth: Path
    images: int
    texts: Mapping[TextKind, int]  # adds up to the rows
    broken: Mapping[Breakage, int]


def scene(rng: random.Random) -> Scene:
    """A scene, every one as likely as the next."""
    return Scene(**{name: rng.choice(values) for name, values in ATTRIBUTES.items()})


def caption(scene: Scene, rng: random.Random) -> str:
    """A true caption that names every attribute of the scene, in one of ``TEMPLATES``."""
    return rng.choice(TEMPLATES).format(**vars(scene))


def read_back(caption: str | None) -> dict[str, str] | None:
    """The attributes that a caption names, in the order of ``ATTRIBUTES``; None where it names two values of one.

    Case, punctuation, the order of the words and repetition do not matter. A caption names a scene whole where
    ``read_back(caption) == vars(scene)``; one that names nothing gives an empty dictionary.
    """
    words = set(re.findall(r"[a-z]+", (caption or "").lower()))
    named = {name: words.intersection(values) for name, values in ATTRIBUTES.items()}
    if any(len(values) > 1 for values in named.values()):
        return None
    return {name: values.pop() for name, values in named.items() if values}


def is_true(caption: str | None, scene: Scene) -> bool:
    """Whether a caption says something of the scene and nothing that is wrong.

    Naming some attributes is enough; naming none, or two values of one, is not. Words are read one by one, so "a red
    background" passes for the red object that it was not said of.
    """
    named = read_back(caption) or {}
    return bool(named) and named.items() <= vars(scene).items()


def draw(scene: Scene, rng: random.Random, pixels: int) -> Image.Image:
    """An anti-aliased RGB picture of the scene, ``pixels`` square; ``rng`` moves, turns, tints and grains it.

    Raises:
        ValueError: ``pixels`` is below 32, where small objects blur into one another.
    """
    if pixels < _FEWEST_PIXELS:
        raise ValueError(f"pixels: {pixels} is too few to tell the shapes apart; ask for {_FEWEST_PIXELS} or more")
    oversampling = 4
    canvas = Image.new("RGB", (pixels * oversampling,) * 2, _tint(BACKGROUNDS[scene.background], rng))
    ImageDraw.Draw(canvas).polygon(_outline(scene, rng, canvas.width), fill=_tint(COLOURS[scene.colour], rng))
    smooth = np.asarray(canvas.reduce(oversampling), dtype=np.float32)
    grain = np.random.default_rng(rng.getrandbits(64)).normal(0, 3, smooth.shape)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def _tint(colour: RGB, rng: random.Random) -> RGB:
    red, green, blue = (min(255, max(0, channel + rng.randint(-10, 10))) for channel in colour)
    return red, green, blue


def _outline(scene: Scene, rng: random.Random, side: int) -> list[tuple[float, float]]:
    """The object's corners in pixels, wholly inside a picture of that side."""
    radius = rng.uniform(*SIZES[scene.size])
    margin = max(radius * math.hypot(0.3, 1) + 0.02, 0.5 - _OFF_CENTRE)  # the line reaches farthest
    centre_x, centre_y = rng.uniform(margin, 1 - margin), rng.uniform(margin, 1 - margin)
    turn = math.radians(rng.uniform(-12, 12))
    cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
    return [
        (side * (centre_x + x * cos - y * sin), side * (centre_y + x * sin + y * cos)) for x, y in SHAPES[scene.shape]
    ]


def encode(picture: Image.Image, encoding: Encoding, rng: random.Random) -> bytes:
    """The RGB picture as a file; opened and turned upright by its EXIF, it shows what ``picture`` shows."""
    file = io.BytesIO()
    _ENCODERS[encoding](picture, file, rng)
    return file.getvalue()


# How a viewer turns a picture for each EXIF orientation, undone before it is stored.
_UNDO_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_ORIENTATION_TAG = 0x0112
_ORIENTATION_NAMES = {  # exifread's words
    2: "Mirrored horizontal",
    3: "Rotated 180",
    4: "Mirrored vertical",
    5: "Mirrored horizontal then rotated 90 CCW",
    6: "Rotated 90 CW",
    7: "Mirrored horizontal then rotated 90 CW",
    8: "Rotated 90 CCW",
}

_Encoder = Callable[[Image.Image, io.BytesIO, random.Random], None]


def _saver(format: str, mode: str = "RGB", **options: Any) -> _Encoder:
    def save(picture: Image.Image, file: io.BytesIO, _rng: random.Random) -> None:
        picture.convert(mode, palette=Image.Palette.ADAPTIVE).save(file, format, **options)

    return save


def _save_rotated(picture: Image.Image, file: io.BytesIO, rng: random.Random) -> None:
    orientation = rng.choice(list(_UNDO_ORIENTATION))
    exif = Image.Exif()
    exif[_ORIENTATION_TAG] = orientation
    picture.transpose(_UNDO_ORIENTATION[orientation]).save(file, "JPEG", quality=88, exif=exif)


def _save_rgba(picture: Image.Image, file: io.BytesIO, _rng: random.Random) -> None:
    """A transparent rim of one pixel: whatever is put behind it, the scene stays."""
    alpha = Image.new("L", picture.size, 0)
    alpha.paste(255, (1, 1, picture.width - 1, picture.height - 1))
    layered = picture.copy()
    layered.putalpha(alpha)
    layered.save(file, "PNG")


def _save_grey16(picture: Image.Image, file: io.BytesIO, _rng: random.Random) -> None:
    grey = np.asarray(picture.convert("L"), dtype=np.uint16) * 257  # 255 -> 65535
    Image.fromarray(grey).save(file, "PNG")


def _save_animated(picture: Image.Image, file: io.BytesIO, _rng: random.Random) -> None:
    frames = [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    first, second = (frame.quantize(64) for frame in frames)
    first.save(file, "GIF", save_all=True, append_images=[second], duration=200, loop=0)


_ENCODERS: dict[Encoding, _Encoder] = {
    Encoding.JPEG: _saver("JPEG", quality=88),
    Encoding.JPEG_PROGRESSIVE: _saver("JPEG", quality=80, progressive=True),
    Encoding.JPEG_GREY: _saver("JPEG", "L", quality=88),
    Encoding.JPEG_CMYK: _saver("JPEG", "CMYK", quality=90),
    Encoding.JPEG_ROTATED: _save_rotated,
    Encoding.PNG: _saver("PNG"),
    Encoding.PNG_RGBA: _save_rgba,
    Encoding.PNG_PALETTE: _saver("PNG", "P"),
    Encoding.PNG_GREY16: _save_grey16,
    Encoding.PNG_1BIT: _saver("PNG", "1"),
    Encoding.WEBP: _saver("WEBP", quality=85, method=2),
    Encoding.WEBP_LOSSLESS: _saver("WEBP", lossless=True, quality=20, method=0),
    Encoding.GIF: _saver("GIF", "P"),
    Encoding.GIF_ANIMATED: _save_animated,
    Encoding.BMP: _saver("BMP"),
    Encoding.TIFF: _saver("TIFF"),
    Encoding.TIFF_LZW: _saver("TIFF", compression="tiff_lzw"),
}


def spoil(picture: Image.Image, breakage: Breakage, rng: random.Random) -> bytes | None:
    """What the web served instead of the picture; None for a failed download."""
    match breakage:
        case Breakage.TRUNCATED_JPEG:
            whole = encode(picture, Encoding.JPEG, rng)
            return whole[: int(len(whole) * rng.uniform(0.5, 0.9))]
        case Breakage.GARBAGE:
            return rng.randbytes(rng.randint(40, 4000))
        case Breakage.HTML:
            return b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n"
        case Breakage.SVG:
            return b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><circle r="20"/></svg>\n'
        case Breakage.EMPTY:
            return b""
        case Breakage.BOMB:
            return _bomb()
        case Breakage.MISSING:
            return None


def _bomb() -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def render(
    directory: Path,
    *,
    images: int = 2400,
    shards: int = 6,
    noise: float = 0.5,
    broken: float = 0.03,
    pixels: tuple[int, int] = _PIXELS,
    seed: int = 0,
) -> Web:
    """Write a web of ``images`` rows in ``shards`` files, split as evenly as they go.

    ``round(noise * images)`` captions are noise and ``round(broken * images)`` pictures broken, independently of each
    other and each of all its kinds in equal number. A picture is a square with a side between the two ``pixels``. Equal
    arguments write equal bytes. ``<directory>/shards`` appears last and whole: where it exists, the web is complete.

    Raises:
        ValueError: an argument is out of range; the message names it.
        FileExistsError: ``<directory>/shards`` is there already; it is not touched.
    """
    _check(images, shards, pixels)
    for name, fraction in (("noise", noise), ("broken", broken)):
        if not 0 <= fraction <= 1:  # NaN too
            raise ValueError(f"{name}: {fraction} is not a fraction between 0 and 1")
    drafts = _drafts(images, noise, broken, seed)
    return _publish(directory, shards, _Lot(f"{seed}", drafts, pixels, _FREQUENCY, captions=1))


def render_clean(
    directory: Path,
    *,
    images: int = len(SCENES),
    shards: int = 1,
    captions: int = 1,
    pixels: tuple[int, int] = _PIXELS,
    seed: int = 0,
) -> Web:
    """Write pairs as people would make them: every caption true and whole, every picture a plain JPEG in colour.

    Scenes come in rounds, each in an order of its own: every 576 images from the first on show every scene once. So
    576 images are a test set for retrieval in which each text has one image, and more are several such sets in a row.
    An image has ``captions`` rows, one after the other in one shard, with equal url and sha256 and different templates.
    No picture is one of ``render``'s; human pairs and a test set need different seeds.

    Raises:
        ValueError: an argument is out of range; the message names it.
        FileExistsError: ``<directory>/shards`` is there already; it is not touched.
    """
    _check(images, shards, pixels)
    if not 1 <= captions <= len(TEMPLATES):
        raise ValueError(f"captions: {captions} is not between 1 and {len(TEMPLATES)}, the number of templates")
    name = f"clean/{seed}"
    rng = random.Random(name)
    scenes = [shown for _ in range(0, images, len(SCENES)) for shown in rng.sample(SCENES, len(SCENES))]
    drafts = [_Draft(shown, TextKind.CLEAN, None) for shown in scenes[:images]]
    return _publish(directory, shards, _Lot(name, drafts, pixels, {Encoding.JPEG: 1}, captions))


def _check(images: int, shards: int, pixels: tuple[int, int]) -> None:
    if images < 1:
        raise ValueError(f"images: {images} is not a positive number of images")
    if not 1 <= shards <= images:
        raise ValueError(f"shards: {shards} is not between 1 and images ({images}); a shard would be empty")
    if not _FEWEST_PIXELS <= pixels[0] <= pixels[1]:
        raise ValueError(f"pixels: {pixels} is not a range of sides from {_FEWEST_PIXELS} up")


@dataclass(frozen=True)
class _Draft:
    scene: Scene
    text: TextKind
    breakage: Breakage | None


@dataclass(frozen=True)
class _Lot:
    """What is rendered into one directory; ``name`` seeds it and makes its URLs."""

    name: str
    drafts: list[_Draft]
    pixels: tuple[int, int]
    encodings: Mapping[Encoding, int]  # to their frequency
    captions: int


_Row = dict[str, object]


def _publish(directory: Path, shards: int, lot: _Lot) -> Web:
    target = Path(directory) / "shards"
    if target.exists():
        raise FileExistsError(f"{target}: a web is there already; remove it or render into another directory")
    images = len(lot.drafts)
    bounds = [images * index // shards for index in range(shards + 1)]
    capacity = math.ceil(images / shards) * lot.captions
    truths: list[_Row] = []
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".rendering-") as scratch:
        staged = Path(scratch) / "shards"
        staged.mkdir()
        for shard, (start, end) in enumerate(pairwise(bounds)):
            pairs = [pair for index in range(start, end) for pair in _pairs(lot, index)]
            rows = [row | {"key": _key(shard, position, capacity)} for position, (row, _) in enumerate(pairs)]
            _write(rows, SHARD_SCHEMA, staged / _shard_name(shard))
            truths += [
                {"shard": _shard_name(shard), "row": position} | truth for position, (_, truth) in enumerate(pairs)
            ]
        _write(truths, TRUTH_SCHEMA, Path(scratch) / "truth.parquet")
        (Path(scratch) / "truth.parquet").replace(target.parent / "truth.parquet")
        staged.rename(target)
    return Web(
        directory=target.parent,
        shards=tuple(target / _shard_name(index) for index in range(shards)),
        truth=target.parent / "truth.parquet",
        images=images,
        texts=Counter(draft.text for draft in lot.drafts for _ in range(lot.captions)),
        broken=Counter(draft.breakage for draft in lot.drafts if draft.breakage is not None),
    )


def _drafts(images: int, noise: float, broken: float, seed: int) -> list[_Draft]:
    rng = random.Random(f"{seed}")
    noisy, spoilt = round(noise * images), round(broken * images)
    texts = [NOISE[index % len(NOISE)] for index in range(noisy)] + [TextKind.CLEAN] * (images - noisy)
    breakages = [list(Breakage)[index % len(Breakage)] for index in range(spoilt)]
    rng.shuffle(texts)
    order = rng.sample(range(images), images)  # apart from the captions' order: the two are independent
    broken_at = dict(zip(order, breakages, strict=False))
    return [_Draft(scene(rng), text, broken_at.get(index)) for index, text in enumerate(texts)]


def _pairs(lot: _Lot, index: int) -> list[tuple[_Row, _Row]]:
    """The image's rows, a row for each of its captions: the shard's but for its key, the truth's but for its place."""
    draft = lot.drafts[index]
    rng = random.Random(f"{lot.name}/{index}")  # a generator an image: one's changes leave the others alone
    true_caption = caption(draft.scene, rng)
    picture = draw(draft.scene, rng, rng.randint(*lot.pixels))
    encoding: Encoding | None = None
    if draft.breakage is None:
        encoding = rng.choices(list(lot.encodings), list(lot.encodings.values()))[0]
        image: bytes | None = encode(picture, encoding, rng)
    else:
        image = spoil(picture, draft.breakage, rng)
    row: _Row = dict.fromkeys(SHARD_SCHEMA.names) | {"url": f"https://toy.example/{lot.name}/{index}"}
    if image is None:
        row |= {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"}
    else:
        exif = _exif(image) if encoding is Encoding.JPEG_ROTATED else "{}"
        row |= {"status": "success", "exif": exif, "sha256": hashlib.sha256(image).hexdigest(), "jpg": image}
    truth: _Row = {"truth": draft.text, "encoding": encoding, "broken": draft.breakage} | vars(draft.scene)
    texts = [(_web_caption(lot.drafts, index, true_caption, rng), true_caption)]
    others = [text for text in (words.format(**vars(draft.scene)) for words in TEMPLATES) if text != true_caption]
    texts += [(text, text) for text in rng.sample(others, lot.captions - 1)]
    return [(row | {"caption": web}, truth | {"truth_caption": true}) for web, true in texts]


def _web_caption(drafts: list[_Draft], index: int, true_caption: str, rng: random.Random) -> str | None:
    shown = drafts[index].scene
    match drafts[index].text:
        case TextKind.CLEAN:
            return true_caption
        case TextKind.OTHER_CAPTION:
            return caption(_another(shown, drafts, rng), rng)
        case TextKind.WRONG_ATTRIBUTE:
            name = rng.choice(list(ATTRIBUTES))
            wrong = rng.choice([value for value in ATTRIBUTES[name] if value != getattr(shown, name)])
            return caption(replace(shown, **{name: wrong}), rng)
        case TextKind.BOILERPLATE:
            return rng.choice(BOILERPLATE)
        case TextKind.FILE_NAME:
            return rng.choice(FILE_NAMES).format(rng.randrange(10_000))
        case TextKind.EMPTY:
            return rng.choice(["", None])


def _another(shown: Scene, drafts: list[_Draft], rng: random.Random) -> Scene:
    """The scene of another image, not the one shown: two images of one scene share their captions."""
    start = rng.randrange(len(drafts))
    for draft in drafts[start:] + drafts[:start]:
        if draft.scene != shown:
            return draft.scene
    raise ValueError("images: all show the same scene, so no caption of another would be wrong; ask for more images")


def _exif(image: bytes) -> str:
    """What img2dataset's ``extract_exif`` makes of a picture whose one tag is its orientation."""
    orientation = Image.open(io.BytesIO(image)).getexif()[_ORIENTATION_TAG]
    return json.dumps({"Image Orientation": _ORIENTATION_NAMES[orientation]})


def _shard_name(shard: int) -> str:
    return f"{shard:05d}.parquet"


def _key(shard: int, row: int, capacity: int) -> str:
    """img2dataset's ``compute_key`` for shards of at most ``capacity`` rows."""
    digits = math.ceil(math.log10(capacity))
    return f"{10**digits * shard + row:0{digits + 5}d}"


def _write(rows: list[_Row], schema: pa.Schema, path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=ROW_GROUP)
