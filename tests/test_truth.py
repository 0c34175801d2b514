"""What is known to be true of an image, and what is refused as a truth."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from capfilt import toyweb
from capfilt.errors import InputError
from capfilt.spec import Columns, Input, Truth
from capfilt.toyweb import ATTRIBUTES, Scene, Web
from capfilt.truth import Judge, read_truth

ONE, TWO = "ab" * 32, "cd" * 32


def of_labels(path: Path, **columns: pa.Array | list[Any]) -> Judge:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return read_truth(Truth(labels=Input(paths=(str(path),))))


# --- toy webs ---


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Web:
    return toyweb.render(tmp_path_factory.mktemp("web"), images=150, shards=3, broken=0.2, seed=3)


def test_a_toy_web_judges_any_text_of_its_pictures(web: Web) -> None:
    judge = read_truth(Truth(toyweb=str(web.directory)))
    tables = {shard.name: pq.read_table(shard) for shard in web.shards}
    verdicts = set()
    for row in pq.read_table(web.truth).to_pylist():
        sha256 = tables[row["shard"]]["sha256"][row["row"]].as_py()
        web_text = tables[row["shard"]]["caption"][row["row"]].as_py() or ""
        if sha256 is None:
            continue
        scene = Scene(**{name: row[name] for name in ATTRIBUTES})
        part = f"something {scene.colour}"
        expected = {
            web_text: toyweb.is_true(web_text, scene),
            row["truth_caption"]: True,
            part: True,
            f"{part}, or is it {'red' if scene.colour != 'red' else 'blue'}": False,
        }
        if row["broken"]:
            expected = dict.fromkeys(expected)  # a picture that cannot be seen
        assert {text: judge.is_true(sha256, text) for text in expected} == expected
        whole = {row["truth_caption"]: True, part: False}
        expected = dict.fromkeys(whole) if row["broken"] else whole
        assert {text: judge.names_whole(sha256, text) for text in whole} == expected
        verdicts.add((row["broken"] is None, judge.is_true(sha256, web_text)))
    assert verdicts == {(True, True), (True, False), (False, None)}
    assert judge.is_true(ONE, "a red circle") is None


def test_an_image_with_several_captions_is_one(tmp_path: Path) -> None:
    web = toyweb.render_clean(tmp_path, images=5, captions=3, shards=2)
    judge = read_truth(Truth(toyweb=str(web.directory)))
    rows = [row for shard in web.shards for row in pq.read_table(shard).to_pylist()]
    assert len({row["sha256"] for row in rows}) == 5
    assert all(judge.names_whole(row["sha256"], row["caption"]) for row in rows)


@pytest.mark.parametrize("missing", ["shards", "truth.parquet", ""])
def test_what_is_no_toy_web_is_refused(tmp_path: Path, missing: str) -> None:
    directory = tmp_path / "web"
    toyweb.render_clean(directory, images=4)
    gone = directory / missing
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink()
    with pytest.raises(InputError, match=r"web is not a rendered toy web: .*no such file.*Give the directory that"):
        read_truth(Truth(toyweb=str(directory)))


def test_a_toy_web_whose_files_do_not_belong_together(tmp_path: Path) -> None:
    one, two = (toyweb.render_clean(tmp_path / str(n), images=n) for n in (4, 6))
    shutil.copy(two.truth, one.truth)
    with pytest.raises(InputError, match=r"speaks of row 4 of 00000.parquet, which is not in .*render the web again"):
        read_truth(Truth(toyweb=str(one.directory)))
    shutil.copy(one.shards[0], one.truth)
    with pytest.raises(InputError, match=r"truth\.parquet: no column background, broken, colour"):
        read_truth(Truth(toyweb=str(one.directory)))


# --- labels ---


def test_labels_know_texts_as_they_are_after_clean_up(tmp_path: Path) -> None:
    judge = of_labels(
        tmp_path / "labels.parquet",
        image_sha256=[ONE, ONE.upper(), TWO, TWO, None],
        text=["A dog.", "a cat", "a dog", None, "a dog"],
        true=[True, False, None, True, True],
        rater=["x"] * 5,
    )
    assert judge.is_true(ONE, "a dog") is judge.is_true(ONE, "  A DOG!") is True
    assert judge.is_true(ONE, "a cat") is False
    assert judge.is_true(ONE, "a bird") is judge.is_true(TWO, "a dog") is None
    assert judge.names_whole(ONE, "a dog") is None


def test_several_label_files_of_other_string_types(tmp_path: Path) -> None:
    of_labels(
        tmp_path / "a.parquet",
        image_sha256=pa.array([ONE]).dictionary_encode(),
        text=pa.array(["a dog"], pa.large_string()),
        true=[True],
    )
    of_labels(tmp_path / "b.parquet", image_sha256=[TWO], text=["a dog"], true=[False])
    judge = read_truth(Truth(labels=Input(paths=(str(tmp_path),))))
    assert (judge.is_true(ONE, "a dog"), judge.is_true(TWO, "a dog")) == (True, False)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_sha256": [ONE], "text": ["a"]}, "l.parquet: no column true; .* the file has image_sha256, text"),
        ({"image_sha256": [1], "text": ["a"], "true": [True]}, "column image_sha256 is int64; it should be text"),
        ({"image_sha256": [ONE], "text": [b"a"], "true": [True]}, "column text is binary; it should be text"),
        ({"image_sha256": [ONE], "text": ["a"], "true": [1]}, "column true is int64; it should be boolean"),
        ({"image_sha256": ["x"], "text": ["a"], "true": [True]}, "image_sha256 'x' is not 64 hex digits"),
        (
            {"image_sha256": [ONE, ONE], "text": ["A", "a."], "true": [True, False]},
            f"'a' is labelled true and untrue of image {ONE}; remove one",
        ),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        of_labels(tmp_path / "l.parquet", **columns)


def test_labels_that_are_not_there_or_no_parquet(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone.parquet: no such file"):
        read_truth(Truth(labels=Input(paths=(str(tmp_path / "gone.parquet"),))))
    (tmp_path / "l.parquet").write_text("sha256,text,true")
    with pytest.raises(InputError, match=r"l.parquet: not readable as Parquet"):
        read_truth(Truth(labels=Input(paths=(str(tmp_path / "l.parquet"),))))


def test_a_truth_is_one_thing_and_has_its_own_columns() -> None:
    labels = Input(paths=("l.parquet",))
    for wrong in ({}, {"labels": labels, "toyweb": "web"}):
        with pytest.raises(ValidationError, match="give either labels or toyweb"):
            Truth(**wrong)
    with pytest.raises(ValidationError, match=r"labels\.columns: the columns of labels are"):
        Truth(labels=labels.model_copy(update={"columns": Columns(text="caption")}))
