"""The rendered web: what it promises about its truth, its pictures, its files."""

from __future__ import annotations

import io
import random
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

from capfilt import toyweb
from capfilt.toyweb import ATTRIBUTES, Breakage, Encoding, Scene, TextKind, Web

EVERY_SCENE = [Scene(*values) for values in product(*ATTRIBUTES.values())]


def read_back(caption: str | None) -> Scene | None:
    """The scene that a caption names, or None if it does not name all four attributes once."""
    words = (caption or "").replace(",", " ").split()
    named = {name: [word for word in words if word in values] for name, values in ATTRIBUTES.items()}
    if any(len(values) != 1 for values in named.values()):
        return None
    return Scene(**{name: values[0] for name, values in named.items()})


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Web:
    return toyweb.render(tmp_path_factory.mktemp("web"), images=700, shards=3, broken=0.1, seed=7)


@pytest.fixture(scope="module")
def rows(web: Web) -> list[dict[str, Any]]:
    """Every shard row with its truth beside it."""
    truths = pq.read_table(web.truth).to_pylist()
    at = {(truth["shard"], truth["row"]): truth for truth in truths}
    assert len(at) == len(truths) == web.images
    return [
        row | at[shard.name, position]
        for shard in web.shards
        for position, row in enumerate(pq.read_table(shard).to_pylist())
    ]


def test_equal_arguments_write_equal_bytes(tmp_path: Path) -> None:
    def written(name: str, seed: int) -> dict[str, bytes]:
        web = toyweb.render(tmp_path / name, images=120, shards=2, seed=seed)
        return {path.name: path.read_bytes() for path in (*web.shards, web.truth)}

    first = written("first", 1)
    assert written("again", 1) == first
    assert all(content != first[name] for name, content in written("other", 2).items())


def test_counts_are_what_was_asked(web: Web, rows: list[dict[str, Any]]) -> None:
    assert len(rows) == web.images == 700
    assert web.texts == Counter(row["truth"] for row in rows)
    assert web.broken == Counter(row["broken"] for row in rows if row["broken"])
    assert web.texts[TextKind.CLEAN] == 350
    assert [web.texts[kind] for kind in toyweb.NOISE] == [70] * 5
    assert [web.broken[breakage] for breakage in Breakage] == [10] * 7
    assert {row["encoding"] for row in rows} == {*Encoding, None}


@pytest.mark.parametrize(("noise", "broken"), [(0, 0), (1, 1), (0.25, 0)])
def test_fractions_reach_their_ends(tmp_path: Path, noise: float, broken: float) -> None:
    web = toyweb.render(tmp_path, images=40, shards=1, noise=noise, broken=broken)
    assert 40 - web.texts[TextKind.CLEAN] == 40 * noise
    assert sum(web.broken.values()) == 40 * broken


def test_noise_and_breakage_are_independent(rows: list[dict[str, Any]]) -> None:
    assert len({row["truth"] for row in rows if row["broken"]}) == len(TextKind)


def test_shards_are_img2dataset_shaped(web: Web) -> None:
    """tests/test_img2dataset.py compares the schema with one that img2dataset itself wrote."""
    assert [path.relative_to(web.directory).as_posix() for path in web.shards] == [
        "shards/00000.parquet",
        "shards/00001.parquet",
        "shards/00002.parquet",
    ]
    assert sorted(path.name for path in web.directory.iterdir()) == ["shards", "truth.parquet"]
    for path in web.shards:
        file = pq.ParquetFile(path)
        assert file.schema_arrow == toyweb.SHARD_SCHEMA
        assert file.num_row_groups == 3
    keys = [pq.read_table(path)["key"].to_pylist() for path in web.shards]
    assert [len(keys[0]), keys[0][0], keys[0][-1], keys[1][0]] == [233, "00000000", "00000232", "00001000"]


def test_a_failed_download_is_a_row_of_nulls(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        missing = row["broken"] == Breakage.MISSING
        assert row["status"] == ("failed_to_download" if missing else "success")
        assert [row[name] is None for name in ("jpg", "sha256", "exif")] == [missing] * 3
        assert (row["error_message"] is not None) == missing
        assert (row["exif"] not in (None, "{}")) == (row["encoding"] == Encoding.JPEG_ROTATED)


def test_the_truth_is_true(rows: list[dict[str, Any]]) -> None:
    true_captions = {row["truth_caption"] for row in rows}
    true_scenes = {read_back(caption) for caption in true_captions}
    for row in rows:
        shown, named = read_back(row["truth_caption"]), read_back(row["caption"])
        assert shown is not None
        differing = [name for name in ATTRIBUTES if named and getattr(named, name) != getattr(shown, name)]
        match row["truth"]:
            case TextKind.CLEAN:
                assert row["caption"] == row["truth_caption"]
            case TextKind.OTHER_CAPTION:
                assert named in true_scenes
                assert differing
            case TextKind.WRONG_ATTRIBUTE:
                assert len(differing) == 1
            case TextKind.BOILERPLATE:
                assert row["caption"] in toyweb.BOILERPLATE
            case TextKind.FILE_NAME:
                assert Path(row["caption"]).suffix.lower() in {".jpg", ".jpeg", ".png"}
            case TextKind.EMPTY:
                assert not row["caption"]
    assert {row["caption"] for row in rows if row["truth"] == TextKind.EMPTY} == {"", None}


def test_every_attribute_goes_wrong(rows: list[dict[str, Any]]) -> None:
    wrong = [
        name
        for row in rows
        if row["truth"] == TextKind.WRONG_ATTRIBUTE
        for name in ATTRIBUTES
        if getattr(read_back(row["caption"]), name) != getattr(read_back(row["truth_caption"]), name)
    ]
    assert set(wrong) == set(ATTRIBUTES)


def test_no_word_names_two_attributes() -> None:
    words = [value for values in ATTRIBUTES.values() for value in values]
    assert len(words) == len(set(words))
    for scene in EVERY_SCENE:
        assert read_back(toyweb.caption(scene, random.Random(0))) == scene


def nearest(table: dict[str, toyweb.RGB], colour: np.ndarray[Any, Any]) -> str:
    return min(table, key=lambda name: float(np.abs(np.array(table[name]) - colour).sum()))


@pytest.mark.parametrize("pixels", [32, 64, 96])
def test_a_picture_shows_its_scene(pixels: int) -> None:
    """The colours, the extent and the place: everything but the shape's own outline."""
    for number, scene in enumerate(EVERY_SCENE):
        picture = toyweb.draw(scene, random.Random(number), pixels)
        assert (picture.mode, picture.size) == ("RGB", (pixels, pixels))
        image = np.asarray(picture, dtype=float)
        rim = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert nearest(toyweb.BACKGROUNDS, np.median(rim, axis=0)) == scene.background
        apart = np.abs(image - np.median(rim, axis=0)).sum(axis=2) > 60
        assert nearest(toyweb.COLOURS, np.median(image[apart], axis=0)) == scene.colour
        height = np.flatnonzero(apart.any(axis=1))
        assert (height[-1] - height[0] + 1 > 0.42 * pixels) == (scene.size == "large")


def test_the_shapes_fill_their_boxes_differently() -> None:
    def fill(shape: str) -> float:
        scene = Scene("large", "red", shape, "black")
        red = [np.asarray(toyweb.draw(scene, random.Random(seed), 96))[..., 0] > 110 for seed in range(20)]
        boxes = [mask[np.ix_(mask.any(axis=1), mask.any(axis=0))] for mask in red]
        return float(np.mean([box.mean() for box in boxes]))

    assert 0.30 < fill("triangle") < 0.5 < fill("cross") < 0.6 < fill("circle") < 0.81 < fill("square")


FORMATS = {
    Encoding.JPEG: ("JPEG", "RGB"),
    Encoding.JPEG_PROGRESSIVE: ("JPEG", "RGB"),
    Encoding.JPEG_GREY: ("JPEG", "L"),
    Encoding.JPEG_CMYK: ("JPEG", "CMYK"),
    Encoding.JPEG_ROTATED: ("JPEG", "RGB"),
    Encoding.PNG: ("PNG", "RGB"),
    Encoding.PNG_RGBA: ("PNG", "RGBA"),
    Encoding.PNG_PALETTE: ("PNG", "P"),
    Encoding.PNG_GREY16: ("PNG", "I;16"),
    Encoding.PNG_1BIT: ("PNG", "1"),
    Encoding.WEBP: ("WEBP", "RGB"),
    Encoding.WEBP_LOSSLESS: ("WEBP", "RGB"),
    Encoding.GIF: ("GIF", "P"),
    Encoding.GIF_ANIMATED: ("GIF", "P"),
    Encoding.BMP: ("BMP", "RGB"),
    Encoding.TIFF: ("TIFF", "RGB"),
    Encoding.TIFF_LZW: ("TIFF", "RGB"),
}


@pytest.mark.parametrize("encoding", Encoding)
def test_every_encoding_shows_the_same_scene(encoding: Encoding) -> None:
    picture = toyweb.draw(Scene("large", "blue", "triangle", "white"), random.Random(3), 80)
    for seed in range(10):  # the rotated ones draw one of seven orientations
        opened = Image.open(io.BytesIO(toyweb.encode(picture, encoding, random.Random(seed))))
        assert (opened.format, opened.mode) == FORMATS[encoding]
        if opened.mode == "I;16":
            shown = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
        else:
            shown = ImageOps.exif_transpose(opened).convert("RGB")
        colourless = encoding in {Encoding.JPEG_GREY, Encoding.PNG_GREY16, Encoding.PNG_1BIT}
        seen, meant = ((image.convert("L") if colourless else image) for image in (shown, picture))
        blurred = [np.asarray(image.filter(ImageFilter.BoxBlur(4)), dtype=float) for image in (seen, meant)]
        assert np.abs(blurred[0] - blurred[1]).mean() < 6


def test_encodings_are_what_they_are_called() -> None:
    picture = toyweb.draw(EVERY_SCENE[0], random.Random(0), 64)
    opened = {name: Image.open(io.BytesIO(toyweb.encode(picture, name, random.Random(0)))) for name in Encoding}
    assert "progressive" in opened[Encoding.JPEG_PROGRESSIVE].info
    assert "progressive" not in opened[Encoding.JPEG].info
    assert getattr(opened[Encoding.GIF_ANIMATED], "n_frames", 1) == 2
    assert opened[Encoding.TIFF_LZW].info["compression"] == "tiff_lzw"
    assert np.array_equal(np.asarray(opened[Encoding.WEBP_LOSSLESS]), np.asarray(picture))


@pytest.mark.parametrize(
    ("breakage", "error"),
    [
        (Breakage.TRUNCATED_JPEG, OSError),
        (Breakage.GARBAGE, UnidentifiedImageError),
        (Breakage.HTML, UnidentifiedImageError),
        (Breakage.SVG, UnidentifiedImageError),
        (Breakage.EMPTY, UnidentifiedImageError),
        (Breakage.BOMB, Image.DecompressionBombError),
    ],
)
def test_broken_images_break(breakage: Breakage, error: type[Exception]) -> None:
    picture = toyweb.draw(EVERY_SCENE[0], random.Random(0), 64)
    for seed in range(30):
        image = toyweb.spoil(picture, breakage, random.Random(seed))
        assert image is not None
        with pytest.raises(error):
            Image.open(io.BytesIO(image)).load()


@pytest.mark.parametrize(
    "wrong",
    [
        {"images": 0},
        {"images": -3},
        {"shards": 0},
        {"shards": 11},
        {"noise": -0.1},
        {"noise": 1.01},
        {"noise": float("nan")},
        {"broken": 2},
        {"broken": float("nan")},
    ],
)
def test_a_bad_argument_is_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}: "):
        toyweb.render(tmp_path, **({"images": 10, "shards": 2} | wrong))
    assert list(tmp_path.iterdir()) == []


def test_too_few_pixels_is_named() -> None:
    with pytest.raises(ValueError, match=r"^pixels: 31 "):
        toyweb.draw(EVERY_SCENE[0], random.Random(0), 31)


def test_one_image_has_no_other_to_borrow_a_caption_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^images: "):
        toyweb.render(tmp_path, images=1, shards=1, noise=1)
    assert list(tmp_path.iterdir()) == []


def test_a_web_is_never_overwritten(tmp_path: Path) -> None:
    web = toyweb.render(tmp_path, images=20, shards=1)
    before = web.shards[0].read_bytes()
    with pytest.raises(FileExistsError, match="shards"):
        toyweb.render(tmp_path, images=20, shards=1, seed=1)
    assert web.shards[0].read_bytes() == before


def test_a_render_that_fails_leaves_no_shards(tmp_path: Path) -> None:
    (tmp_path / "truth.parquet").mkdir()  # the last file but the shards cannot take its place
    with pytest.raises(IsADirectoryError):
        toyweb.render(tmp_path, images=20, shards=1)
    assert [path.name for path in tmp_path.iterdir()] == ["truth.parquet"]
