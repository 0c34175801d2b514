"""Honest files of every kind that is read, and what a fuzzer makes of them: each a pure function of its number."""

from __future__ import annotations

import io
import random
import re
import struct
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HUGE = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
"""What headers lie with."""


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)  # type: ignore[arg-type]
    return out.getvalue()


@cache
def images() -> list[bytes]:
    """An image of each format, mode and compression that capfilt.images takes."""
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 255, (6, 8, 3), np.uint8)
    rgb = Image.fromarray(smooth).resize((61, 47), Image.Resampling.BICUBIC)
    grey, palette, cmyk = rgb.convert("L"), rgb.quantize(17), rgb.convert("CMYK")
    rgba = rgb.copy()
    rgba.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    many = [rgb, rgb.rotate(90), rgb.rotate(180)]
    return [
        _saved(rgb, "JPEG"),
        _saved(rgb, "JPEG", progressive=True),
        _saved(rgb, "JPEG", exif=turned, subsampling=0),
        _saved(grey, "JPEG", restart_marker_blocks=2),
        _saved(cmyk, "JPEG"),
        *(_saved(image, "PNG") for image in (rgb, rgba, grey, palette, deep, rgb.convert("1"), grey.convert("LA"))),
        _saved(palette, "PNG", transparency=3),
        _saved(many[0], "PNG", save_all=True, append_images=many[1:]),
        _saved(rgb, "WEBP"),
        _saved(rgba, "WEBP", lossless=True),
        _saved(rgba, "WEBP", quality=40, exif=turned),
        _saved(many[0], "WEBP", save_all=True, append_images=many[1:]),
        _saved(palette, "GIF"),
        _saved(palette, "GIF", save_all=True, append_images=[image.quantize(9) for image in many[1:]], transparency=1),
        *(_saved(image, "BMP") for image in (rgb, grey, palette, rgb.convert("1"), rgba)),
        *(_saved(rgb, "TIFF", compression=c) for c in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
        _saved(rgb.convert("1"), "TIFF", compression="group4"),
        *(_saved(image, "TIFF") for image in (grey, palette, cmyk, deep, grey.convert("F"), grey.convert("I"))),
        _saved(rgb, "TIFF", compression="tiff_lzw", tiffinfo={317: 2}),
        _saved(rgb, "TIFF", big_tiff=True),
        _saved(rgb, "TIFF", save_all=True, append_images=many[1:]),
        _interlaced(np.asarray(grey)),
        _run_length_bmp(),
    ]


def _interlaced(pixels: np.ndarray) -> bytes:
    """A grey PNG in Adam7 order, which Pillow does not write."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = [row for y, x, dy, dx in passes for row in pixels[y::dy, x::dx] if len(row)]
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, body) for name, body in chunks)


def _run_length_bmp() -> bytes:
    """A BMP with RLE8 compression, which Pillow does not write."""
    palette = b"".join(bytes([i, 255 - i, i // 2, 0]) for i in range(256))
    data = b"".join(bytes([16, i * 9 % 256, 0, 0]) for i in range(16)) + b"\0\1"
    offset = 14 + 40 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, 16, 16, 1, 8, 1, len(data), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + header + palette + data


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


@cache
def parquets() -> list[bytes]:
    """Small shards: several row groups, encodings, compressions, types of columns, page versions."""
    rows = 60
    texts = [f"text {i}" if i % 7 else None for i in range(rows)]
    pictures = [images()[i % 5] if i % 11 else None for i in range(rows)]
    plain = pa.table({"jpg": pa.array(pictures, pa.binary()), "caption": pa.array(texts, pa.string())})
    keyed = plain.append_column("key", pa.array([f"{i:05d}" for i in range(rows)]))
    keyed = keyed.append_column("url", pa.array([f"http://example.org/{i}" for i in range(rows)]))
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    hugging = pa.table(
        {
            "image": pa.array([{"bytes": picture, "path": "x"} for picture in pictures], struct_type),
            "text": pa.array(texts, pa.string()).dictionary_encode(),
        }
    )
    large = pa.table({"image": pa.array(pictures, pa.large_binary()), "text": pa.array(texts, pa.large_string())})
    variants: list[tuple[pa.Table, dict[str, object]]] = [
        (keyed, {"compression": "snappy", "row_group_size": 20}),
        (plain, {"compression": "none", "row_group_size": 25}),
        (hugging, {"compression": "zstd", "row_group_size": 60}),
        (large, {"compression": "gzip", "data_page_version": "2.0", "row_group_size": 30}),
        (plain, {"compression": "lz4", "use_dictionary": False, "data_page_size": 256}),
        (keyed, {"compression": "brotli", "write_page_checksum": True, "write_page_index": True}),
        (plain, {"use_dictionary": False, "column_encoding": {"caption": "DELTA_BYTE_ARRAY", "jpg": "PLAIN"}}),
    ]
    found = []
    for table, options in variants:
        out = io.BytesIO()
        pq.write_table(table, out, **options)
        found.append(out.getvalue())
    return found


def mutated_image(number: int) -> bytes:
    """The `number`-th hostile image."""
    rng = random.Random(f"image {number}")
    honest = images()
    data = _mutated(rng, honest[number % len(honest)], honest, header=96)
    if data.startswith(b"\x89PNG") and rng.random() < 0.7:  # or its checksums would catch it all
        data = _checksummed(data)
    return data


def mutated_parquet(number: int) -> bytes:
    """The `number`-th hostile shard; most lies are told in the footer."""
    rng = random.Random(f"parquet {number}")
    honest = parquets()
    data = honest[number % len(honest)]
    if rng.random() < 0.6:
        length = int.from_bytes(data[-8:-4], "little")
        footer = _mutated(rng, data[-8 - length : -8], [b"\x15\x80\x80\x80\x80\x10"], header=length)
        return data[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    return _mutated(rng, data, honest, header=64)


def _mutated(rng: random.Random, data: bytes, others: list[bytes], header: int) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        data = rng.choice(_MUTATIONS)(rng, bytearray(data), others, min(header, len(data)))
    return data


def _place(rng: random.Random, data: bytearray, header: int) -> int:
    """Somewhere; every other time in the header."""
    return rng.randrange(max(1, header if rng.random() < 0.5 else len(data)))


def _flip(rng: random.Random, data: bytearray, _: list[bytes], header: int) -> bytes:
    for _ in range(rng.choice((1, 2, 8, 40))):
        if data:
            data[_place(rng, data, header) % len(data)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _lie(rng: random.Random, data: bytearray, _: list[bytes], header: int) -> bytes:
    at, width = _place(rng, data, header), rng.choice((1, 2, 4))
    value = rng.choice((*HUGE, rng.getrandbits(32))) % 2 ** (8 * width)
    data[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))  # type: ignore[arg-type]
    return bytes(data)


def _varint(rng: random.Random, data: bytearray, _: list[bytes], header: int) -> bytes:
    """Another number in place of a byte, as Thrift writes it: its length may change."""
    at, value, out = _place(rng, data, header), rng.choice((*HUGE, 2**40, 2**62, 2**64 - 1)), bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    data[at : at + 1] = out + bytes([value])
    return bytes(data)


def _truncate(rng: random.Random, data: bytearray, _: list[bytes], __: int) -> bytes:
    return bytes(data[: rng.randrange(len(data) + 1)])


def _cut(rng: random.Random, data: bytearray, _: list[bytes], header: int) -> bytes:
    at = _place(rng, data, header)
    del data[at : at + rng.choice((1, 2, 4, 16, 200))]
    return bytes(data)


def _repeat(rng: random.Random, data: bytearray, _: list[bytes], header: int) -> bytes:
    at = _place(rng, data, header)
    piece = data[at : at + rng.choice((1, 2, 4, 16, 200))]
    return bytes(data[:at] + piece * rng.choice((2, 3, 50)) + data[at + len(piece) :])


def _noise(rng: random.Random, data: bytearray, _: list[bytes], header: int) -> bytes:
    at = _place(rng, data, header)
    data[at : at + 16] = rng.randbytes(rng.randrange(1, 32))
    return bytes(data)


def _splice(rng: random.Random, data: bytearray, others: list[bytes], header: int) -> bytes:
    other = rng.choice(others)
    return bytes(data[: _place(rng, data, header)]) + other[rng.randrange(len(other)) :]


_MUTATIONS: tuple[Callable[[random.Random, bytearray, list[bytes], int], bytes], ...] = (
    *(_flip, _flip, _flip, _lie, _lie, _lie),
    *(_varint, _truncate, _cut, _repeat, _noise, _splice),
)


def _checksummed(data: bytes) -> bytes:
    """A PNG whose chunks' checksums fit again, as far as its lengths do."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        length = int.from_bytes(out[at : at + 4], "big")
        if at + 12 + length > len(out) or not re.fullmatch(rb"[A-Za-z]{4}", out[at + 4 : at + 8]):
            break
        out[at + 8 + length : at + 12 + length] = struct.pack(">I", zlib.crc32(out[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(out)
