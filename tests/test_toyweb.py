"""The rendered web: what it promises about its truth, its pictures, its files."""

from __future__ import annotations

import io
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

from capfilt import toyweb
from capfilt.toyweb import ATTRIBUTES, SCENES, Breakage, Encoding, Scene, TextKind, Web, is_true, read_back


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Web:
    return toyweb.render(tmp_path_factory.mktemp("web"), images=700, shards=3, broken=0.1, seed=7)


@pytest.fixture(scope="module")
def rows(web: Web) -> list[dict[str, Any]]:
    return judged(web)


def judged(web: Web) -> list[dict[str, Any]]:
    """Every shard row with its truth beside it."""
    truths = pq.read_table(web.truth).to_pylist()
    at = {(truth["shard"], truth["row"]): truth for truth in truths}
    rows = [
        row | at[shard.name, position]
        for shard in web.shards
        for position, row in enumerate(pq.read_table(shard).to_pylist())
    ]
    assert len(at) == len(truths) == len(rows) == sum(web.texts.values())
    return rows


def scene_of(row: dict[str, Any]) -> Scene:
    return Scene(**{name: row[name] for name in ATTRIBUTES})


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
    for row in rows:
        shown, named = scene_of(row), read_back(row["caption"])
        assert read_back(row["truth_caption"]) == vars(shown)
        assert is_true(row["caption"], shown) == (row["truth"] == TextKind.CLEAN)
        differing = [name for name, value in (named or {}).items() if value != getattr(shown, name)]
        match row["truth"]:
            case TextKind.CLEAN:
                assert row["caption"] == row["truth_caption"]
            case TextKind.OTHER_CAPTION:
                assert named in [vars(scene_of(other)) for other in rows]
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
        for name, value in (read_back(row["caption"]) or {}).items()
        if value != row[name]
    ]
    assert set(wrong) == set(ATTRIBUTES)


def test_no_word_names_two_attributes() -> None:
    words = [value for values in ATTRIBUTES.values() for value in values]
    assert len(words) == len(set(words))
    assert len(set(SCENES)) == 576
    for scene in SCENES:
        assert read_back(toyweb.caption(scene, random.Random(0))) == vars(scene)


SHOWN = Scene("small", "red", "line", "white")


@pytest.mark.parametrize(
    ("caption", "named", "true"),
    [
        ("a small red line on a white background", vars(SHOWN), True),
        ("Small RED line, white!", vars(SHOWN), True),
        ("white white line red small line", vars(SHOWN), True),
        ("a red line", {"colour": "red", "shape": "line"}, True),
        ("a picture of a white background", {"background": "white"}, True),
        ("a small red line on a red background", {"size": "small", "colour": "red", "shape": "line"}, True),
        ("a small red line on a black background", vars(SHOWN) | {"background": "black"}, False),
        ("a blue thing", {"colour": "blue"}, False),
        ("a red and blue line", None, False),
        ("a large small red line on white", None, False),
        ("a thing on a background", {}, False),
        ("smaller reddish lines", {}, False),
        ("IMG_0001.JPG", {}, False),
        ("", {}, False),
        (None, {}, False),
    ],
)
def test_what_is_true_of_a_small_red_line_on_white(
    caption: str | None, named: dict[str, str] | None, true: bool
) -> None:
    assert read_back(caption) == named
    assert is_true(caption, SHOWN) == true


SUBSETS = st.sets(st.sampled_from(list(ATTRIBUTES)), min_size=1)


@given(st.sampled_from(SCENES), st.sampled_from(SCENES), SUBSETS, st.randoms(use_true_random=False))
def test_a_caption_is_true_where_all_that_it_names_is(
    said: Scene, shown: Scene, names: set[str], rng: random.Random
) -> None:
    words = [*(getattr(said, name) for name in names), "a", "picture", "of"]
    rng.shuffle(words)
    agree = all(getattr(said, name) == getattr(shown, name) for name in names)
    assert is_true(" ".join(words), shown) == agree


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Web:
    return toyweb.render_clean(
        tmp_path_factory.mktemp("clean"), images=400, shards=3, captions=2, pixels=(48, 64), seed=7
    )


def test_clean_pairs_are_true_and_in_colour(clean: Web) -> None:
    rows = judged(clean)
    assert (clean.images, clean.texts, clean.broken) == (400, {TextKind.CLEAN: 800}, {})
    for row in rows:
        assert read_back(row["caption"]) == vars(scene_of(row))
        assert row["caption"] == row["truth_caption"]
        assert (row["status"], row["encoding"], row["broken"]) == ("success", Encoding.JPEG, None)
    openings = [template.split("{")[0] for template in toyweb.TEMPLATES]
    used = Counter(max((o for o in openings if row["caption"].startswith(o)), key=len) for row in rows)
    assert len(used) == len(toyweb.TEMPLATES)
    assert min(used.values()) > 150
    pictures = [Image.open(io.BytesIO(row["jpg"])) for row in rows]
    assert {(picture.format, picture.mode) for picture in pictures} == {("JPEG", "RGB")}
    sides = {side for picture in pictures for side in picture.size}
    assert (min(sides), max(sides)) == (48, 64)


def test_clean_shards_are_a_web_s(clean: Web, tmp_path: Path) -> None:
    files = [pq.ParquetFile(path) for path in clean.shards]
    assert all(file.schema_arrow == toyweb.SHARD_SCHEMA for file in files)
    assert [file.metadata.num_rows for file in files] == [266, 266, 268]
    assert pq.read_schema(clean.truth) == toyweb.TRUTH_SCHEMA
    small = toyweb.render_clean(tmp_path, images=10, shards=2, captions=3)  # 5 images a shard, 15 rows
    for web in (clean, small):
        keys = [row["key"] for row in judged(web)]
        assert keys == sorted(set(keys))
    assert keys[15] == "0000100"


def test_an_image_s_captions_lie_together_and_differ(clean: Web) -> None:
    rows = judged(clean)
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        assert [one[name] for name in ("shard", "url", "sha256", "jpg")] == [
            two[name] for name in ("shard", "url", "sha256", "jpg")
        ]
        assert one["caption"] != two["caption"]
    assert len({row["url"] for row in rows}) == len({row["sha256"] for row in rows}) == 400


def test_every_round_shows_every_scene_once(tmp_path: Path) -> None:
    rounds = toyweb.render_clean(tmp_path / "rounds", images=2 * len(SCENES) + 16, pixels=(32, 32))
    scenes = [scene_of(row) for row in judged(rounds)]
    first, second, rest = scenes[: len(SCENES)], scenes[len(SCENES) : -16], scenes[-16:]
    assert set(first) == set(second) == set(SCENES)
    assert first != second
    assert len(set(rest)) == 16
    default = toyweb.render_clean(tmp_path / "default")
    assert {scene_of(row) for row in judged(default)} == set(SCENES)
    assert default.images == sum(default.texts.values()) == len(SCENES)


def test_clean_pairs_are_of_their_seed_and_of_no_web(clean: Web, web: Web, tmp_path: Path) -> None:
    def written(name: str, seed: int) -> Web:
        return toyweb.render_clean(tmp_path / name, images=20, seed=seed)

    first, again, other = written("first", 7), written("again", 7), written("other", 8)
    assert first.shards[0].read_bytes() == again.shards[0].read_bytes()
    assert first.truth.read_bytes() == again.truth.read_bytes()
    for name in ("sha256", "url"):
        sets = [{row[name] for row in judged(some) if row[name]} for some in (first, other, clean, web)]
        assert not sets[0] & sets[1]
        assert not (sets[0] | sets[1] | sets[2]) & sets[3]


def test_pictures_are_of_the_size_asked(tmp_path: Path) -> None:
    web = toyweb.render(tmp_path, images=60, shards=1, broken=0, pixels=(32, 40))
    sides = {side for row in judged(web) for side in Image.open(io.BytesIO(row["jpg"])).size}
    assert sides == set(range(32, 41))


def nearest(table: dict[str, toyweb.RGB], colour: np.ndarray[Any, Any]) -> str:
    return min(table, key=lambda name: float(np.abs(np.array(table[name]) - colour).sum()))


@pytest.mark.parametrize("pixels", [32, 64, 96])
def test_a_picture_shows_its_scene(pixels: int) -> None:
    """The colours, the extent and the place: everything but the shape's own outline."""
    for number, scene in enumerate(SCENES):
        picture = toyweb.draw(scene, random.Random(number), pixels)
        assert (picture.mode, picture.size) == ("RGB", (pixels, pixels))
        image = np.asarray(picture, dtype=float)
        rim = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert nearest(toyweb.BACKGROUNDS, np.median(rim, axis=0)) == scene.background
        apart = np.abs(image - np.median(rim, axis=0)).sum(axis=2) > 60
        assert nearest(toyweb.COLOURS, np.median(image[apart], axis=0)) == scene.colour
        extents = [np.flatnonzero(apart.any(axis=axis)) for axis in (0, 1)]
        longest = max(extent[-1] - extent[0] + 1 for extent in extents)
        assert (longest > 0.42 * pixels) == (scene.size == "large")


def test_the_shapes_fill_their_boxes_differently() -> None:
    def fill(shape: str) -> float:
        scene = Scene("large", "red", shape, "black")
        red = [np.asarray(toyweb.draw(scene, random.Random(seed), 96))[..., 0] > 110 for seed in range(20)]
        boxes = [mask[np.ix_(mask.any(axis=1), mask.any(axis=0))] for mask in red]
        return float(np.mean([box.mean() for box in boxes]))

    assert 0.30 < fill("triangle") < fill("line") < fill("circle") < 0.81 < fill("square")


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
    picture = toyweb.draw(SCENES[0], random.Random(0), 64)
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
    picture = toyweb.draw(SCENES[0], random.Random(0), 64)
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
        {"pixels": (31, 40)},
        {"pixels": (50, 40)},
    ],
)
def test_a_bad_argument_is_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}: "):
        toyweb.render(tmp_path, **({"images": 10, "shards": 2} | wrong))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong", [{"images": 0}, {"shards": 11}, {"pixels": (31, 40)}, {"captions": 0}, {"captions": 5}]
)
def test_a_bad_argument_of_a_clean_set_is_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}: "):
        toyweb.render_clean(tmp_path, **({"images": 10, "shards": 2} | wrong))
    assert list(tmp_path.iterdir()) == []


def test_too_few_pixels_is_named() -> None:
    with pytest.raises(ValueError, match=r"^pixels: 31 "):
        toyweb.draw(SCENES[0], random.Random(0), 31)


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
