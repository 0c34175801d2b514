"""Copies: how many altered ones are found, how many pictures are taken for others, and how long a million takes.

    python benchmarks/duplicates.py [--pictures 1000] [--rows 1000000] [--bits 16] [--json FILE]

Pictures are of four kinds: `photo`, tiles of scikit-image's photographs and their mirror images; `noise`, of all
scales (1/f, as in photographs); `toy`, scenes of the toy web, which resemble each other by design; `page`, lines of
random words, black on white, as of screenshots. Each is altered: resized by 0.5 to 1.5, saved as JPEG of quality 50,
cropped to 95% of its width and height anywhere, and all of these at once. Each alteration is a later row beside all the
originals: its recall is the share that is dropped as a copy of its own original. False matches are counted twice: the
share of all pairs of originals that are near, and the share of originals that are dropped for another.

The million: hashes of 64 x 64 windows of noise, each used ten times under another mask of bits, so that they differ.
One row in ten is an exact copy, one in twenty a near one. What is timed is `find_copies`, from columns to verdicts;
and then, how long it takes to read the same from a dataset of 1,000 shards.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import skimage
from measuring import machine
from PIL import Image, ImageDraw, ImageFont

from capfilt import toyweb
from capfilt.dataset import Counts, CuratedDataset, DataFile, Provenance, ShardCommit
from capfilt.duplicates import Candidates, find_copies
from capfilt.perceptual import SIDE, SIZE, VIEWS, hash_of_square, near, perceptual_hash, split
from capfilt.pipelines.settle import read_candidates
from capfilt.schema import ANNOTATION_FILE_SCHEMA, ANNOTATIONS
from capfilt.spec import Duplicates

PHOTOS = (
    *("coffee.png", "camera.png", "astronaut.png", "gravel.png", "brick.png", "hubble_deep_field.jpg", "grass.png"),
    *("chelsea.png", "coins.png", "motorcycle_left.png", "retina.jpg", "ihc.png", "rocket.jpg", "moon.png"),
)
TILE = 160  # pixels


# --- pictures ---


def photos(count: int) -> list[Image.Image]:
    """Tiles that share no pixel, then their mirror images."""
    tiles = []
    for name in PHOTOS:
        with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
            whole = image.convert("RGB")
        for y, x in itertools.product(*(range(0, side - TILE + 1, TILE) for side in (whole.height, whole.width))):
            tiles.append(whole.crop((x, y, x + TILE, y + TILE)))
    turns = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_90)
    return [*tiles, *(tile.transpose(turn) for turn in turns for tile in tiles)][:count]


def noise(rng: np.random.Generator, side: int, planes: int) -> np.ndarray:
    """float32 [planes, side, side]: noise of all scales, of mean 128 and deviation 45."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    waves = rng.normal(size=(planes, *frequency.shape)) + 1j * rng.normal(size=(planes, *frequency.shape))
    fields = np.fft.irfft2(waves / frequency ** rng.uniform(0.8, 1.6), s=(side, side))
    return (128 + 45 * fields / fields.std(axis=(1, 2), keepdims=True)).astype(np.float32)


def noises(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    fields = (noise(rng, 240, 3).transpose(1, 2, 0) for _ in range(count))
    return [Image.fromarray(np.clip(field, 0, 255).astype(np.uint8)) for field in fields]


def toys(count: int) -> list[Image.Image]:
    rng = random.Random(0)
    return [toyweb.draw(toyweb.scene(rng), rng, 96) for _ in range(count)]


def pages(count: int) -> list[Image.Image]:
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    drawn = []
    for _ in range(count):
        size, side = rng.randint(10, 24), rng.randint(240, 400)
        image, font = Image.new("RGB", (side, side), "white"), ImageFont.load_default(size)
        draw, (left, top) = ImageDraw.Draw(image), (rng.randint(4, 40), rng.randint(4, 40))
        for y in range(top, side - size, size + rng.randint(4, 12)):
            words = ("".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 12)))
            draw.text((left, y), " ".join(words), "black", font)
        drawn.append(image)
    return drawn


def resized(image: Image.Image, rng: random.Random) -> Image.Image:
    scale = rng.uniform(0.5, 1.5)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def recompressed(image: Image.Image, _rng: random.Random) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=50)
    return Image.open(data).convert("RGB")


def cropped(image: Image.Image, rng: random.Random) -> Image.Image:
    width, height = round(0.95 * image.width), round(0.95 * image.height)
    x, y = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((x, y, x + width, y + height))


def all_at_once(image: Image.Image, rng: random.Random) -> Image.Image:
    return recompressed(resized(cropped(image, rng), rng), rng)


ALTERATIONS = {"resize": resized, "JPEG 50": recompressed, "crop 5%": cropped, "all three": all_at_once}


# --- what is found ---


def rows_of(hashes: list[bytes], generation: int) -> dict[str, np.ndarray]:
    count = len(hashes)
    return {
        "shard_R": np.full(count, generation),
        "row_R": np.arange(count),
        "generation_R": np.full(count, generation),
        "settled_R": np.zeros(count, bool),
        "sha256_R": np.array([f"{generation} {n}".encode().ljust(16) for n in range(count)]).view("V16"),
        "url_R": np.zeros(count, np.uint64),
        "hash_RB": np.frombuffer(b"".join(hashes), np.uint8).reshape(count, SIZE),
        "hashed_R": np.ones(count, bool),
    }


def find(bits: int, *parts: dict[str, np.ndarray]) -> Any:
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return find_copies(Candidates(["originals", "altered"], **columns), Duplicates(near_bits=bits))


def measure(pictures: list[Image.Image], bits: int) -> dict[str, Any]:
    rng = random.Random(1)
    hashes = [perceptual_hash(np.asarray(one)) for one in pictures]
    originals = rows_of(hashes, 0)
    count = len(pictures)
    pairs = sum(near(a, b, bits) for a, b in itertools.combinations(hashes, 2))
    found: dict[str, Any] = {
        "pictures": count,
        "near pairs of originals": pairs / (count * (count - 1) // 2),
        "originals dropped": len(find(bits, originals)) / count,
    }
    for name, alter in ALTERATIONS.items():
        altered = [perceptual_hash(np.asarray(alter(one, rng))) for one in pictures]
        copies = find(bits, originals, rows_of(altered, 1)).of("altered")
        found[name] = sum(copy.shard == "originals" and copy.row == row for row, copy in copies.items()) / count
    return found


# --- a million ---


def on_record(root: Path, columns: dict[str, np.ndarray], shards: int = 1000) -> CuratedDataset:
    """A dataset of these rows, all kept, one file a shard. Its pairs are not written."""
    prints, commits = {"caption_fingerprint": "c", "score_fingerprint": "s", "decide_fingerprint": "d"}, []
    for shard, part in enumerate(np.array_split(np.arange(len(columns["row_R"])), shards)):
        name, count = f"{shard:05d}-0", len(part)
        values: dict[str, Any] = {
            "row": range(count),
            "url": [f"https://example.org/{number}.jpg" for number in columns["url_R"][part]],
            "image_sha256": [one.tobytes().hex() * 2 for one in columns["sha256_R"][part]],
            "perceptual_hash": [one.tobytes() for one in columns["hash_RB"][part]],
            "status": ["kept"] * count,
            "generation": [0] * count,
            **{name: [value] * count for name, value in {**prints, "input_id": "i", "run": "first"}.items()},
        }
        arrays = [pa.array(values.get(own.name, [None] * count), own.type) for own in ANNOTATION_FILE_SCHEMA]
        path = f"shard={name}/0-{count}-first-0.parquet"
        target = root / ANNOTATIONS / path
        target.parent.mkdir(parents=True)
        pq.write_table(pa.table(arrays, schema=ANNOTATION_FILE_SCHEMA), target, compression="zstd", store_schema=False)
        file = DataFile(path, count, target.stat().st_size, kept=count)
        provenance = Provenance(input_id="i", run="first", **prints)
        commits.append(ShardCommit(name, count, Counts(kept=count), provenance, (file,), (file,)))
    dataset = CuratedDataset.for_writing(str(root), {})
    dataset.commit(commits)
    return dataset


def million(rows: int, bits: int) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    fields = noise(rng, 2048, 4)
    distinct = rows // 10
    where = zip(rng.integers(0, 4, distinct), *rng.integers(0, 2048 - SIDE, (2, distinct)), strict=True)
    windows = (fields[plane, y : y + SIDE, x : x + SIDE] for plane, y, x in where)
    hashes = [hash_of_square(window, np.repeat(window[..., None], 3, axis=2).clip(0, 255)) for window in windows]
    known, colours = split(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, SIZE))
    which = rng.integers(0, len(known), rows)
    signs_RVW = known[which] ^ rng.integers(0, 2**64, (rows, 1, 2), dtype=np.uint64)
    colours_RVC = colours[which]
    copy = rng.permutation(rows)[: rows // 20]  # a row of which another is a view, with two more bits changed
    of, view = (copy + rows // 2) % rows, 1 + copy % (VIEWS - 1)
    signs_RVW[copy, 0] = signs_RVW[of, view] ^ (np.uint64(1) << rng.integers(0, 64, (len(copy), 2), np.uint64))
    colours_RVC[copy, 0] = colours_RVC[of, view]
    hash_RB = np.concatenate([part.reshape(rows, -1).view(np.uint8) for part in (signs_RVW, colours_RVC)], axis=1)
    image_R = np.arange(rows)
    image_R[rng.permutation(rows)[: rows // 10]] = rng.integers(0, rows, rows // 10)
    digest_I2 = rng.integers(0, 2**64, (rows, 2), np.uint64)
    columns = {
        "shard_R": np.zeros(rows, np.int64),
        "row_R": np.arange(rows),
        "generation_R": np.zeros(rows, np.int64),
        "settled_R": np.zeros(rows, bool),
        "sha256_R": digest_I2[image_R].view("V16").ravel(),
        "url_R": rng.integers(1, rows, rows).astype(np.uint64),
        "hash_RB": hash_RB[image_R],
        "hashed_R": np.ones(rows, bool),
    }
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    exact = find_copies(Candidates(["all"], **columns), Duplicates(max_per_url=5))
    middle = time.perf_counter()
    both = find_copies(Candidates(["all"], **columns), Duplicates(near_bits=bits, max_per_url=5))
    end, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {
        "rows": rows,
        "exact": {"seconds": middle - begin, "copies": len(exact)},
        "near": {"seconds": end - middle, "copies": len(both), "MiB more at the peak": (after - before) / 1024},
    }
    print(json.dumps(found), flush=True)
    with tempfile.TemporaryDirectory(prefix="duplicates-") as folder:
        dataset = on_record(Path(folder), columns)
        begin = time.perf_counter()
        shards = sorted(dataset.committed())
        read = read_candidates(dataset, shards, set(shards), Duplicates(near_bits=bits, max_per_url=5))
        found["seconds to read them from 1,000 shards"] = time.perf_counter() - begin
    assert len(find_copies(read, Duplicates(max_per_url=5))) == len(exact)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=1000, help="of each kind")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--bits", type=int, default=16, help="duplicates.near_bits")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "bits": args.bits, "kinds": {}}
    if args.pictures:
        for kind, make in {"photo": photos, "noise": noises, "toy": toys, "page": pages}.items():
            found["kinds"][kind] = own = measure(make(args.pictures), args.bits)
            print(kind, " ".join(f"{name} {value:.3g}" for name, value in own.items()), flush=True)
        photo = np.asarray(Image.fromarray(np.asarray(photos(1)[0])).resize((512, 512)))
        begin = time.perf_counter()
        for _ in range(200):
            perceptual_hash(photo)
        found["ms of a 512 px picture"] = 1000 * (time.perf_counter() - begin) / 200
        print(f"{found['ms of a 512 px picture']:.2f} ms to hash a picture of 512 px")
    if args.rows:
        found["million"] = million(args.rows, args.bits)
        print(json.dumps(found["million"]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
