"""`capfilt view` over a large dataset: how long its index takes, and then a page of each of some typical searches.

    python benchmarks/view.py [--shards 500] [--rows 10000] [--file-rows 1000] [--repeats 5] [--json FILE]
                              [--folder DIRECTORY]

`--shards` shards of `--rows` rows are put on record, in files of `--file-rows` rows as workers write them. Every row
has a URL, a web text of 4 to 18 words and a synthetic text of 6 to 12, drawn by Zipf's law, and random scores; about
one row in a million says "zanzibar". The first 100 shards are drawn, the others are copies of them.

Searches go to the real server over HTTP, one at a time: a page is 25 rows, read from the tables' own files. Each is
sent `--repeats` times, each time for something else, after one that is not counted. The count of a search, which the
page shows when it is there, is measured beside.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from measuring import machine

from capfilt.dataset import Counts, CuratedDataset, DataFile, Provenance, ShardCommit
from capfilt.schema import ANNOTATION_FILE_SCHEMA, ANNOTATIONS, SCORE_STRUCT, TEXT_STRUCT
from capfilt.view.explorer import Explorer
from capfilt.view.server import Server

RARE = "zanzibar"
DRAWN = 100
"""Shards that are drawn; those after them are copies of these, which no search profits from."""

SYLLABLES = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "ing")]


def make_words(count: int = 20_000) -> list[str]:
    """Words of two to four syllables, each once; the first are the most frequent."""
    rng = np.random.default_rng(0)
    words = {"".join(rng.choice(SYLLABLES, rng.integers(2, 5))): None for _ in range(count * 2)}
    return list(words)[:count]


def draw_texts(rng: np.random.Generator, words: pa.Array, count: int, least: int, most: int) -> pa.Array:
    """Texts of `least` to `most` words."""
    lengths = rng.integers(least, most + 1, count)
    chosen = np.minimum(rng.zipf(1.3, lengths.sum()) - 1, len(words) - 1)
    chosen = np.where(chosen < 50, chosen, (chosen * 7919) % len(words))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pc.binary_join(pa.ListArray.from_arrays(offsets, words.take(pa.array(chosen))), " ")


def make_file(rng: np.random.Generator, words: pa.Array, start: int, rows: int, constant: dict[str, str]) -> pa.Table:
    """Rows `start` to `start + rows` of a shard, as annotations; those with a score of at least 0.5 are kept."""
    web, own = draw_texts(rng, words, rows, 4, 18), draw_texts(rng, words, rows, 6, 12)
    if (rare := rng.random(rows) < 1e-6).any():
        web = pc.if_else(pa.array(rare), pc.binary_join_element_wise(web, RARE, " "), web)
    itm = rng.random((rows, 2), np.float32)
    kept = itm >= 0.5
    numbers = np.arange(rows)
    order = pa.array(np.stack([numbers, numbers + rows], 1).ravel())
    score = pa.StructArray.from_arrays(
        [pa.array(["itm-base"] * 2 * rows), pa.array(itm.ravel()), pa.array(itm.ravel() - 0.5)],
        fields=list(SCORE_STRUCT),
    )
    text = {
        "source": pa.array(["web", "synthetic"] * rows),
        "captioner": pa.array([None, "captioner-base"] * rows),
        "candidate": pa.array([0] * 2 * rows, pa.int32()),
        "text": pa.concat_arrays([web, own]).take(order),
        "itm": pa.array(itm.ravel()),
        "itc": pa.array(itm.ravel() - 0.5),
        "scores": pa.ListArray.from_arrays(pa.array(range(2 * rows + 1), pa.int32()), score).cast(
            TEXT_STRUCT.field("scores").type
        ),
        "kept": pa.array(kept.ravel()),
        "reason": pa.array(np.where(kept.ravel(), None, "below_threshold"), pa.string()),
    }
    texts = pa.StructArray.from_arrays([text[field.name] for field in TEXT_STRUCT], fields=list(TEXT_STRUCT))
    status = np.where(kept.any(1), "kept", "dropped")
    values: dict[str, Any] = {
        "row": pa.array(range(start, start + rows), pa.int64()),
        "key": pa.array([f"{number:09d}" for number in range(start, start + rows)]),
        "url": pa.array([f"https://img{n % 97}.example.org/{n:x}/{rng.integers(1 << 60):x}.jpg" for n in numbers]),
        "format": pa.array(["JPEG"] * rows),
        "width": pa.array(rng.integers(200, 2000, rows), pa.int32()),
        "height": pa.array(rng.integers(200, 2000, rows), pa.int32()),
        "image_sha256": pa.array([rng.bytes(32).hex() for _ in numbers]),
        "image_bytes": pa.array(rng.integers(5_000, 500_000, rows), pa.int64()),
        "status": pa.array(status),
        "reason": pa.array(np.where(kept.any(1), None, "no_match"), pa.string()),
        "texts": pa.ListArray.from_arrays(pa.array(range(0, 2 * rows + 1, 2), pa.int32()), texts),
        "seed": pa.array([0] * rows, pa.int64()),
        **{name: pa.array([value] * rows) for name, value in constant.items()},
    }
    nulls = {field.name: pa.nulls(rows, field.type) for field in ANNOTATION_FILE_SCHEMA}
    return pa.table(list({**nulls, **values}.values()), schema=ANNOTATION_FILE_SCHEMA)


def make_dataset(output: Path, shards: int, rows: int, file_rows: int, words: list[str]) -> None:
    """Put shards on record; the pairs are there by name only, for no image is asked for."""
    rng, vocabulary = np.random.default_rng(1), pa.array(words)
    dataset, drawn = CuratedDataset.for_writing(str(output), {}), list[ShardCommit]()
    for number in range(shards):
        name = f"web-{number:016x}"
        if number < DRAWN:
            drawn.append(make_shard(output, name, rows, file_rows, rng, vocabulary))
        else:
            drawn.append(copy_shard(output, name, drawn[number % DRAWN]))
    dataset.commit(drawn)


def copy_shard(output: Path, name: str, shard: ShardCommit) -> ShardCommit:
    """Another shard of the same rows, in files of its own."""

    def moved(file: DataFile) -> DataFile:
        return replace(file, path=file.path.replace(shard.shard, name))

    for file in shard.annotations:
        target = output / ANNOTATIONS / moved(file).path
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(output / ANNOTATIONS / file.path, target)
    annotations, pairs = (tuple(map(moved, files)) for files in (shard.annotations, shard.pairs))
    return replace(shard, shard=name, annotations=annotations, pairs=pairs)


def make_shard(
    output: Path, name: str, rows: int, file_rows: int, rng: np.random.Generator, words: pa.Array
) -> ShardCommit:
    """Write a shard's files, ready to commit."""
    provenance = Provenance("1-2", "c" * 16, "s" * 16, "d" * 16, "first")
    annotations, pairs = [], []
    for start in range(0, rows, file_rows):
        table = make_file(rng, words, start, min(file_rows, rows - start), vars(provenance))
        path = f"shard={name}/{start:09d}-{start + table.num_rows:09d}-first-0.parquet"
        target = output / ANNOTATIONS / path
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, target, compression="zstd", store_schema=False)
        kept = pc.sum(pc.equal(table["status"], "kept")).as_py()
        annotations.append(DataFile(path, table.num_rows, target.stat().st_size, 0, kept))
        pairs.append(DataFile(path, kept, 1))
    kept = sum(file.kept for file in annotations)
    counts = Counts(kept=kept, dropped=rows - kept)
    return ShardCommit(name, rows, counts, provenance, tuple(annotations), tuple(pairs))


def searches(words: list[str], rows: int) -> dict[str, list[dict[str, Any]]]:
    """Typical searches by what they are, each for several things; the first is to warm up."""
    count = 1 + 20
    rare, common = [f"{RARE[: 4 + n % 5]}q{n}" for n in range(count)], words[60 : 60 + count]
    some, many = words[1000 : 1000 + count], words[:count]
    low = [0.3 + n / 100 for n in range(count)]
    return {
        "first page, no filter": [{"offset": 25 * n} for n in range(count)],
        "dropped, any reason no_match": [
            {"status": "dropped", "reason": "no_match", "offset": n} for n in range(count)
        ],
        "a word of very many rows": [{"text": word} for word in many],
        "a word of some rows": [{"text": word} for word in common],
        "a rare word": [{"text": word} for word in some],
        "one row in a million": [{"text": RARE, "web_max": 1 - n / 1000} for n in range(count)],
        "a word of no row": [{"text": word} for word in rare],
        "two words of many rows, by score": [
            {"text": f"{one} {other}", "sort": "synthetic", "descending": True}
            for one, other in zip(many, many[1:] + many[:1], strict=True)
        ],
        "a word of very many rows, by score": [{"text": word, "sort": "web", "descending": True} for word in many],
        "a word, by nearness to the threshold": [{"text": word, "sort": "borderline"} for word in common],
        "a part of a URL of one row": [{"url": f"/{n:x}/abcdef"} for n in range(count)],
        "score range, by score": [
            {"web_min": x, "web_max": x + 0.2, "sort": "synthetic", "descending": True} for x in low
        ],
        "nearest to the threshold": [{"sort": "borderline", "web_threshold": x} for x in low],
        "random": [{"sort": "random", "seed": n} for n in range(count)],
        "deep page, table order": [{"offset": int(rows * (0.5 + n / 50))} for n in range(count)],
        "deep page, by score": [{"sort": "web", "offset": int(rows * (0.5 + n / 50))} for n in range(count)],
        "deep page of a word, by score": [
            {"text": word, "sort": "web", "offset": int(rows * 0.001 * n)} for n, word in enumerate(many)
        ],
        "one shard": [{"shard": f"{n:016x}"} for n in range(count)],
    }


def ask(server: Server, path: str, search: dict[str, Any]) -> tuple[float, Any]:
    """Seconds until the whole answer is there, and the answer."""
    query = urllib.parse.urlencode({name: value for name, value in search.items() if value is not None})
    address = f"http://127.0.0.1:{server.port}/api/{path}?{query}"
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {server.token}"})
    begin = time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        data = answer.read()
    return time.perf_counter() - begin, json.loads(data)


def measure(server: Server, words: list[str], rows: int, repeats: int) -> dict[str, Any]:
    """Seconds of each kind of search."""
    results: dict[str, Any] = {}
    for name, asked in searches(words, rows).items():
        found = [ask(server, "rows", search) for search in asked[: repeats + 1]][1:]
        counted = [ask(server, "count", search) for search in asked[: repeats + 1]][1:]
        seconds, counts = [s for s, _ in found], [s for s, _ in counted]
        results[name] = {
            **{"median": statistics.median(seconds), "max": max(seconds), "rows": len(found[-1][1]["rows"])},
            **{"count, median": statistics.median(counts), "count, max": max(counts)},
            "counted": counted[-1][1]["count"],
        }
        own = results[name]
        print(
            f"{name:40} page {own['median']:.2f} s, at most {own['max']:.2f}; count {own['count, median']:.2f} s, "
            f"at most {own['count, max']:.2f}; {own['rows']} of {own['counted']:,}",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=500)
    parser.add_argument("--rows", type=int, default=10_000, help="of a shard")
    parser.add_argument("--file-rows", type=int, default=1_000, help="of a file")
    parser.add_argument("--repeats", type=int, default=5, choices=range(1, 21), metavar="1..20")
    parser.add_argument("--folder", help="where to work; a temporary folder there is removed at the end")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="view-", dir=args.folder))
    words, rows = make_words(), args.shards * args.rows
    try:
        begin = time.perf_counter()
        make_dataset(root / "out", args.shards, args.rows, args.file_rows, words)
        print(f"{rows:,} rows made in {time.perf_counter() - begin:.0f} s (not counted)", flush=True)
        index = root / "index.duckdb"
        with closing(Explorer(str(root / "out"), {}, None, None, str(root / "marks.parquet"), str(index))) as explorer:
            begin = time.perf_counter()
            explorer.index.build()
            explorer.index.wait()
            built = time.perf_counter() - begin
            size = index.stat().st_size
            print(f"index: {built:.1f} s, {size / 1e6:,.0f} MB", flush=True)
            server = Server(explorer)
            threading.Thread(target=server.run, daemon=True).start()
            try:
                results = measure(server, words, rows, args.repeats)
            finally:
                server.stop()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        slowest = max(own["max"] for own in results.values())
        print(f"slowest page: {slowest:.2f} s; peak memory, making the rows included: {peak / 1e6:,.0f} MB")
    finally:
        shutil.rmtree(root)
    if args.json:
        about = {"arguments": {k: str(v) for k, v in vars(args).items() if k != "json"}, "machine": machine()}
        found = {"index, s": built, "index, bytes": size, "peak, bytes": peak, "duckdb": duckdb.__version__}
        args.json.write_text(json.dumps({**about, **found, "searches": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
