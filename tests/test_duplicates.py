"""Copies of images and URLs: which stays, over shards, nights and deaths; and the hash that finds the near ones."""

from __future__ import annotations

import io
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MakeSpec, jpeg, read, write_shard
from PIL import Image, ImageDraw
from rich.console import Console
from stubs import load_hash

from capfilt.dataset import CuratedDataset
from capfilt.duplicates import NO_URL, Candidates, Copy, find_copies
from capfilt.perceptual import SIZE, near, perceptual_hash
from capfilt.pipelines.curate import Execute, Summary, curate, in_process
from capfilt.pipelines.job import Job, LoadModels
from capfilt.plan import Stage
from capfilt.receipts import Receipt
from capfilt.schema import Reason
from capfilt.spec import CurateSpec, Duplicates, Thresholds, Withdrawn

LOOSE = Thresholds(web=0.0, synthetic=0.0)


def run(spec: CurateSpec, load: Any = load_hash, execute: Execute | None = in_process) -> Summary:
    return curate(spec, load=load, execute=execute, console=Console(file=io.StringIO()))


def no_models(_spec: CurateSpec, _device: str) -> Any:
    raise AssertionError("models are loaded")


def tables(output: str) -> dict[str, list[dict[str, Any]]]:
    """All that a dataset holds, but for the runs that wrote it and when."""
    names = ("annotations", "pairs", "quarantine")
    return {name: [{**row, "run": "", "generation": 0} for row in read(output, name)] for name in names}


def fates(output: str) -> dict[str, tuple[str | None, str | None]]:
    """By the first letters of the shard and the row: why it is dropped, and what stays in its place."""
    found = {}
    for row in read(output):
        of = row["duplicate_of"]
        found[f"{row['shard'][0]}{row['row']}"] = (row["reason"], of and f"{of['shard'][0]}{of['row']}")
    return found


def write(path: Path, seeds: Sequence[int], urls: Sequence[str] | None = None) -> Path:
    """A shard of the pictures of these seeds."""
    write_shard(path, [jpeg(seed) for seed in seeds])
    if urls is not None:
        table = pq.read_table(path)
        pq.write_table(table.set_column(1, "url", pa.array(urls, pa.string())), path)
    return path


def copies(shard: str, seeds: int) -> dict[str, tuple[str | None, str | None]]:
    return {f"{shard}{row}": (None, None) for row in range(seeds)}


# --- the rule ---


def candidates(rows: Sequence[tuple[int, str, int, str, int]], settled: Sequence[bool] = ()) -> Candidates:
    """Of (generation, shard, row, image, url)."""
    shards = sorted({shard for _, shard, *_ in rows})
    return Candidates(
        shards,
        np.array([shards.index(shard) for _, shard, *_ in rows]),
        np.array([row for _, _, row, *_ in rows]),
        np.array([generation for generation, *_ in rows]),
        np.array(settled or [False] * len(rows)),
        np.array([image.encode().ljust(16) for *_, image, _ in rows]).view("V16"),
        np.array([url for *_, url in rows], np.uint64),
    )


TWINS = [(0, "b", 0, "x", 1), (0, "a", 5, "x", 1), (0, "a", 7, "y", 1), (0, "c", 0, "x", 2), (1, "a", 1, "x", 2)]


@pytest.mark.parametrize(
    ("rules", "dropped"),
    [
        # of x: a5 stays, then b0, then c0, then a1, which is of a later generation
        (Duplicates(), {"b0": ("duplicate", "a5"), "c0": ("duplicate", "a5"), "a1": ("duplicate", "a5")}),
        (Duplicates(max_per_image=2), {"c0": ("duplicate", "a5"), "a1": ("duplicate", "a5")}),
        (Duplicates(max_per_image=9), {}),
        # of URL 1: a5, a7, b0; of URL 2: c0, a1
        (
            Duplicates(max_per_image=9, max_per_url=1),
            {"a7": ("same_url", "a5"), "b0": ("same_url", "a5"), "a1": ("same_url", "c0")},
        ),
        (Duplicates(max_per_image=9, max_per_url=2), {"b0": ("same_url", "a5")}),
        # b0 and c0 are dropped for their image, and do not count for their URL
        (
            Duplicates(max_per_url=1),
            {
                "a7": ("same_url", "a5"),
                "b0": ("duplicate", "a5"),
                "c0": ("duplicate", "a5"),
                "a1": ("duplicate", "a5"),
            },
        ),
    ],
)
def test_which_copies_stay(rules: Duplicates, dropped: dict[str, tuple[str, str]]) -> None:
    for seed in range(5):  # whatever the order in which they are read
        rows = random.Random(seed).sample(TWINS, len(TWINS))
        found = find_copies(candidates(rows), rules)
        said = {
            f"{shard}{row}": (str(copy.reason), f"{copy.shard}{copy.row}")
            for shard, own in found.by_shard.items()
            for row, copy in own.items()
        }
        assert said == dropped
        assert len(found) == len(dropped)


def test_rows_without_url_are_of_no_url() -> None:
    rows = [(0, "a", row, f"image {row}", NO_URL) for row in range(3)]
    assert len(find_copies(candidates(rows), Duplicates(max_per_url=1))) == 0


def test_a_shard_that_cannot_change_comes_first_and_stays() -> None:
    rows = [(0, "a", 0, "x", 0), (5, "z", 0, "x", 0), (5, "z", 1, "x", 0)]
    found = find_copies(candidates(rows, [False, True, True]), Duplicates())
    assert found.by_shard == {"a": {0: Copy(Reason.DUPLICATE, "z", 0)}}


def test_a_fingerprint_tells_which_rows_are_dropped_and_what_stays() -> None:
    one = find_copies(candidates(TWINS), Duplicates())
    other = find_copies(candidates(TWINS[1:]), Duplicates())
    assert one.fingerprint("b", "0123") == one.fingerprint("b", "0123+4567")
    assert one.fingerprint("b", "0123").startswith("0123+")
    assert other.fingerprint("b", "0123+4567") == "0123"
    assert one.fingerprint("a", "0123") == other.fingerprint("a", "0123") != one.fingerprint("c", "0123")


# --- curation ---


@pytest.fixture
def web(tmp_path: Path) -> Path:
    """Three shards: pictures 0 and 1 are in each, 2 twice in b; a holds a bad row."""
    write(tmp_path / "in" / "b.parquet", [0, 1, 2, 2, 20])
    write(tmp_path / "in" / "c.parquet", [30, 1, 0])
    write_shard(tmp_path / "in" / "a.parquet", [jpeg(1), b"<html>", jpeg(0), jpeg(10)])
    return tmp_path / "in"


WEB = {
    "a0": (None, None),
    "a1": ("not_an_image", None),
    "a2": (None, None),
    "a3": (None, None),
    "b0": ("duplicate", "a2"),
    "b1": ("duplicate", "a0"),
    "b2": (None, None),
    "b3": ("duplicate", "b2"),
    "b4": (None, None),
    "c0": (None, None),
    "c1": ("duplicate", "a0"),
    "c2": ("duplicate", "a2"),
}


def spec_of(make_spec: MakeSpec, **fields: Any) -> CurateSpec:
    defaults = {"duplicates": Duplicates(), "thresholds": LOOSE, "max_error_fraction": 0.5, "fragment_rows": 2}
    return make_spec(**{**defaults, **fields})


@pytest.mark.usefixtures("web")
def test_copies_over_shards_are_dropped_and_name_the_row_that_stays(make_spec: MakeSpec) -> None:
    spec = spec_of(make_spec)
    summary = run(spec)
    assert fates(spec.output) == WEB
    assert (summary.shards, summary.copies) == (3, 5)
    assert (summary.counts.kept, summary.counts.dropped, summary.counts.errors) == (6, 5, 1)
    assert summary.reasons["duplicate"] == 5
    assert summary.reasons["web:duplicate"] == 5
    pairs = read(spec.output, "pairs")
    assert len(pairs) == len({row["image_sha256"] for row in pairs}) == 6
    for row in read(spec.output):
        if row["reason"] == "duplicate":
            assert {text["reason"] for text in row["texts"]} == {"duplicate"}
            assert not any(text["kept"] for text in row["texts"])
    plain = spec.model_copy(update={"duplicates": None, "output": f"{spec.output}-plain"})
    assert run(plain).copies == 0
    assert {reason for reason, _ in fates(plain.output).values()} == {None, "not_an_image"}


@pytest.mark.usefixtures("web")
def test_a_night_without_news_reads_nothing_and_commits_nothing(make_spec: MakeSpec) -> None:
    spec = spec_of(make_spec)
    run(spec)
    versions = CuratedDataset.for_reading(spec.output, {}).versions()
    summary = run(spec, no_models)
    assert (summary.shards, summary.skipped, summary.versions) == (0, 3, versions)


def test_where_the_row_that_stayed_is_withdrawn_another_copy_stays(make_spec: MakeSpec, web: Path) -> None:
    spec = spec_of(make_spec)
    run(spec)
    listed = web.parent / "urls.txt"
    listed.write_text("http://example.org/a/0.jpg\nhttp://example.org/b/3.jpg\n")
    spec = spec.model_copy(update={"withdrawn": Withdrawn(urls=(str(listed),))})
    assert list(run(spec, no_models).stages) == [Stage.WITHDRAW, Stage.DECIDE]
    gone = ("withdrawn", None)
    assert fates(spec.output) == WEB | {"a0": gone, "b3": gone, "b1": (None, None), "c1": ("duplicate", "b1")}
    assert (run(spec, no_models).shards, CuratedDataset.for_reading(spec.output, {}).settled) == (0, True)
    scratch = spec.model_copy(update={"output": f"{spec.output}-scratch"})
    run(scratch)
    assert tables(spec.output) == tables(scratch.output)


def test_a_new_shard_whose_name_comes_first_takes_nothing_from_those_before(make_spec: MakeSpec, web: Path) -> None:
    shutil.move(web / "a.parquet", web.parent)
    spec = spec_of(make_spec)
    run(spec)
    before = read(spec.output)
    shutil.move(web.parent / "a.parquet", web)
    summary = run(spec)
    assert (summary.shards, summary.skipped) == (1, 2)
    assert [row for row in read(spec.output) if row["shard"][0] != "a"] == before
    assert {name: fate for name, fate in fates(spec.output).items() if name[0] == "a"} == {
        "a0": ("duplicate", "b1"),
        "a1": ("not_an_image", None),
        "a2": ("duplicate", "b0"),
        "a3": (None, None),
    }


def test_a_changed_shard_gives_up_its_place(make_spec: MakeSpec, web: Path) -> None:
    """The copy that stays next is newly kept: its bytes come from its input."""
    spec = spec_of(make_spec)
    run(spec)
    write(web / "a.parquet", [1, 11])
    summary = run(spec)
    found = fates(spec.output)
    assert found["b0"] == (None, None)  # of the picture that is gone from a
    assert found["c2"] == ("duplicate", "b0")
    assert found["a0"] == ("duplicate", "b1")  # which has waited for longer
    assert found["b1"] == (None, None)
    assert {name for name, (reason, _) in found.items() if reason} == {"a0", "b3", "c1", "c2"}
    assert summary.shards == 3
    assert len(read(spec.output, "pairs")) == summary.counts.kept == 6


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_restarts_end_with_what_a_run_from_scratch_makes(make_spec: MakeSpec, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for shard in "abc":
        seeds = [rng.randint(0, 12) for _ in range(rng.randint(1, 14))]
        write(tmp_path / "in" / f"{shard}.parquet", seeds, [f"http://a.org/{rng.randint(0, 5)}" for _ in seeds])
    spec = spec_of(make_spec, thresholds=Thresholds(web=0.5, synthetic=0.5), duplicates=None)
    run(spec)
    for _ in range(3):
        both = Duplicates(max_per_image=2, max_per_url=rng.randint(1, 2))
        rules = rng.choice([None, Duplicates(), Duplicates(max_per_image=2), both])
        thresholds = Thresholds(web=rng.random(), synthetic=rng.random())
        spec = spec.model_copy(update={"thresholds": thresholds, "duplicates": rules})
        summary = run(spec, no_models)
        fresh = spec.model_copy(update={"output": f"{spec.output}-fresh"})
        shutil.rmtree(fresh.output, ignore_errors=True)
        scratch = run(fresh)
        assert tables(spec.output) == tables(fresh.output)
        assert (summary.counts, summary.reasons) == (scratch.counts, scratch.reasons)
        assert run(spec, no_models).shards == 0


def test_a_shard_that_is_gone_keeps_its_copies(make_spec: MakeSpec, web: Path) -> None:
    spec = spec_of(make_spec)
    run(spec)
    (web / "a.parquet").unlink()
    write(web / "d.parquet", [10, 40])
    summary = run(spec)
    assert (summary.shards, summary.gone) == (1, 1)
    assert fates(spec.output) == {**WEB, "d0": ("duplicate", "a3"), "d1": (None, None)}


def test_a_copy_that_cannot_be_read_leaves_its_shard_for_another_run(make_spec: MakeSpec, web: Path) -> None:
    spec = spec_of(make_spec, max_error_fraction=1.0)
    run(spec)
    whole, stat = (web / "b.parquet").read_bytes(), (web / "b.parquet").stat()
    write(web / "a.parquet", [11])
    (web / "b.parquet").write_bytes(b"\0" * len(whole))
    os.utime(web / "b.parquet", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    summary = run(spec)
    assert list(summary.failures) == [str(web / "b.parquet")]
    assert fates(spec.output)["b0"] == ("duplicate", "a2")
    assert not CuratedDataset.for_reading(spec.output, {}).settled
    (web / "b.parquet").write_bytes(whole)
    os.utime(web / "b.parquet", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    summary = run(spec, no_models)
    assert not summary.failures
    assert fates(spec.output)["b0"] == (None, None)
    assert CuratedDataset.for_reading(spec.output, {}).settled


class Stop(BaseException):
    """Stands for the driver's death."""


def dying_after(units: int) -> Execute:
    """Dies after so many units of a run, over all its stages."""
    done = 0

    def execute(job: Job, work: Iterator[Any], load: LoadModels) -> Iterator[list[Receipt]]:
        nonlocal done
        for receipts in in_process(job, work, load):
            if done >= units:
                raise Stop
            done += 1
            yield receipts

    return execute


@pytest.mark.usefixtures("web")
@pytest.mark.parametrize("after", [1, 8, 10, *(pytest.param(after, marks=pytest.mark.slow) for after in (5, 7))])
def test_a_dead_driver_changes_nothing_of_the_outcome(make_spec: MakeSpec, after: int) -> None:
    """7 units are captioned; the shards of which rows are copies have 5 more."""
    spec = spec_of(make_spec)
    with pytest.raises(Stop):
        run(spec, execute=dying_after(after))
    summary = run(spec)
    assert summary.adopted_rows > 0 or after == 7
    assert fates(spec.output) == WEB
    fresh = spec.model_copy(update={"output": f"{spec.output}-fresh"})
    run(fresh)
    assert read(spec.output) == [
        {**row, "run": own["run"]} for row, own in zip(read(fresh.output), read(spec.output), strict=True)
    ]
    assert tables(spec.output) == tables(fresh.output)
    assert run(spec, no_models).shards == 0


@pytest.mark.usefixtures("local_ray", "web")
def test_on_ray_as_in_a_plain_loop(make_spec: MakeSpec) -> None:
    spec = spec_of(make_spec)
    run(spec.model_copy(update={"duplicates": None}))
    summary = run(spec, execute=None)
    assert fates(spec.output) == WEB
    assert list(summary.stages) == [Stage.DECIDE]


# --- near ---


def picture(seed: int, side: int = 240) -> Image.Image:
    """Noise of all scales, as in photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    waves = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
    planes = np.fft.irfft2(waves / frequency**1.2, s=(side, side))
    pixels = 128 + 45 * planes / planes.std(axis=(1, 2), keepdims=True)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def as_jpeg(image: Image.Image, quality: int = 95) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def hashed(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return perceptual_hash(np.asarray(image.convert("RGB")))


def alterations(image: Image.Image) -> dict[str, bytes]:
    side = image.width
    return {
        "half the size": as_jpeg(image.resize((side // 2, side // 2), Image.Resampling.BICUBIC)),
        "quality 50": as_jpeg(image, 50),
        "cropped": as_jpeg(image.crop((3, 8, 3 + side * 95 // 100, 8 + side * 95 // 100))),
    }


def drawing(seed: int, side: int = 240) -> Image.Image:
    """A few flat shapes on a plain ground."""
    rng = random.Random(seed)
    image = Image.new("RGB", (side, side), rng.choice(["white", "ivory", "gainsboro"]))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, size = rng.randrange(150), rng.randrange(150), rng.randint(40, 90)
        shape = rng.choice([draw.ellipse, draw.rectangle])
        shape((x, y, x + size, y + size * 2 // 3), fill=rng.choice(["red", "navy", "green", "black", "orange"]))
    return image


@pytest.mark.parametrize("make", [picture, drawing])
def test_hashes_of_altered_pictures_are_near_and_of_others_are_not(make: Callable[[int], Image.Image]) -> None:
    pictures = [make(seed) for seed in range(12)]
    hashes = [hashed(as_jpeg(one)) for one in pictures]
    assert {len(one) for one in hashes} == {SIZE}
    for one, own in zip(pictures, hashes, strict=True):
        for name, data in alterations(one).items():
            assert near(own, hashed(data), 20), name
            assert near(hashed(data), own, 20), name
    assert not any(near(a, b, 24) for n, a in enumerate(hashes) for b in hashes[:n])


def test_a_mirror_image_and_one_of_other_colours_are_not_near() -> None:
    for one in (picture(1), drawing(1)):
        own = np.asarray(one)
        assert not near(perceptual_hash(own), perceptual_hash(own[:, ::-1]), 16)
        assert near(perceptual_hash(own), perceptual_hash(own), 0)
        assert not near(perceptual_hash(own), perceptual_hash(own[..., ::-1]), 128)  # blue for red


def test_plain_pictures_are_near_if_their_colours_are() -> None:
    plain = {}
    for level in (0, 64, 130, 255):
        plain[level] = perceptual_hash(np.full((90, 120, 3), level, np.uint8))
        assert near(plain[level], hashed(as_jpeg(Image.new("RGB", (75, 31), (level,) * 3), 50)), 0)
    assert not any(near(a, b, 16) for a, b in itertools.combinations(plain.values(), 2))
    assert len(perceptual_hash(np.zeros((1, 1, 3), np.uint8))) == SIZE


def test_of_very_many_plain_pictures_each_is_found_again() -> None:
    """They have the same signs; more than are compared by those alone."""
    colours = list(itertools.product(range(10, 255, 40), repeat=3))
    plain = [perceptual_hash(np.full((8, 8, 3), colour, np.uint8)) for colour in colours]
    count = len(plain)
    rows = [(generation, f"{generation}", n, f"{generation} {n}", 0) for generation in range(2) for n in range(count)]
    twice = np.frombuffer(b"".join([*plain, *plain]), np.uint8).reshape(2 * count, SIZE)
    both = replace(candidates(rows), hash_RB=twice, hashed_R=np.ones(2 * count, bool))
    found = find_copies(both, Duplicates(near_bits=16))
    assert not found.of("0")
    assert {row: copy.row for row, copy in found.of("1").items()} == {n: n for n in range(count)}


def test_near_copies_are_dropped_across_shards(make_spec: MakeSpec, tmp_path: Path) -> None:
    pictures = [picture(seed) for seed in range(3)]
    grey = as_jpeg(Image.new("RGB", (64, 64), "grey"))
    write_shard(tmp_path / "in" / "a.parquet", [*map(as_jpeg, pictures), grey])
    altered = [data for one in pictures[:2] for data in alterations(one).values()]
    greyer, whiter = (as_jpeg(Image.new("RGB", (64, 64), colour)) for colour in ((130, 128, 128), (140, 140, 140)))
    write_shard(tmp_path / "in" / "b.parquet", [*altered, as_jpeg(picture(9)), greyer, whiter])
    spec = spec_of(make_spec, duplicates=Duplicates(near_bits=12))
    summary = run(spec)
    found = fates(spec.output)
    assert {name: of for name, of in found.items() if of != (None, None)} == {
        **{f"b{n}": ("near_duplicate", f"a{n // 3}") for n in range(6)},
        "b7": ("near_duplicate", "a3"),  # grey and nearly the same grey
    }
    assert summary.reasons["near_duplicate"] == 7
    strict = spec.model_copy(update={"duplicates": Duplicates(near_bits=0)})
    summary = run(strict, no_models)  # the hashes are on record
    assert (list(summary.stages), summary.copies < 7) == ([Stage.DECIDE], True)
    plain = spec.model_copy(update={"duplicates": Duplicates()})
    assert list(run(plain).stages) == [Stage.SCORE]
    assert {row["perceptual_hash"] for row in read(spec.output)} == {None}
