"""The worker in a plain loop: every row gets its fate, in order, whatever the rows and however they are cut."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeSpec, jpeg, read, write_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from stubs import load_hash, load_raising

from capfilt.errors import ErrorBudgetError
from capfilt.pipelines.curate import Summary, curate, in_process
from capfilt.spec import CurateSpec, Sampling, Thresholds


def run(spec: CurateSpec, load: Any = load_hash) -> Summary:
    return curate(spec, load=load, execute=in_process, console=Console(file=io.StringIO()))


BAD: dict[str, tuple[bytes | None, str]] = {
    "null": (None, "no_image"),
    "empty": (b"", "empty_image"),
    "html": (b"<!doctype html><html><body>404</body></html>", "not_an_image"),
    "truncated": (jpeg(1)[:-200], "truncated_image"),
}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from(["ok", "ok", "ok", *BAD]), max_size=60),
    fragment_rows=st.integers(1, 70),
    row_group=st.integers(1, 70),
    batch=st.integers(1, 20),
)
def test_any_rows_and_any_fragments_are_conserved_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    make_spec: MakeSpec,
    kinds: list[str],
    fragment_rows: int,
    row_group: int,
    batch: int,
) -> None:
    folder = tmp_path_factory.mktemp("property")
    images = [jpeg(i) if kind == "ok" else BAD[kind][0] for i, kind in enumerate(kinds)]
    write_shard(folder / "in" / "0.parquet", images, row_group=row_group)
    base = make_spec()
    spec = base.model_copy(
        update={
            "input": base.input.model_copy(update={"paths": (str(folder / "in"),)}),
            "output": str(folder / "out"),
            "fragment_rows": fragment_rows,
            "max_error_fraction": 1.0,
            "captioner": base.captioner.model_copy(update={"batch_size": batch}),
        }
    )
    summary = run(spec)
    rows = read(spec.output)
    assert [row["row"] for row in rows] == list(range(len(kinds)))
    assert summary.counts.rows == len(kinds)
    for kind, row in zip(kinds, rows, strict=True):
        expected = {"ok": None}.get(kind, BAD[kind][1] if kind in BAD else None)
        if kind == "ok":
            assert row["status"] in ("kept", "dropped")
            assert len(row["texts"]) == 2
        else:
            assert row["reason"] == expected
    kept = [row["row"] for row in rows if row["status"] == "kept"]
    assert [pair["row"] for pair in read(spec.output, "pairs")] == kept


def test_pairs_hold_the_bytes_as_they_came_and_every_kept_text(tmp_path: Path, make_spec: MakeSpec) -> None:
    images = [jpeg(i) for i in range(60)]
    write_shard(tmp_path / "in" / "0.parquet", images)
    spec = make_spec()
    run(spec)
    annotations = {row["row"]: row for row in read(spec.output)}
    pairs = read(spec.output, "pairs")
    assert 20 < len(pairs) < 60
    for pair in pairs:
        texts = [text for text in annotations[pair["row"]]["texts"] if text["kept"]]
        assert pair["image"] == images[pair["row"]]
        assert pair["image_sha256"] == hashlib.sha256(pair["image"]).hexdigest()
        assert [c["text"] for c in pair["captions"]] == [t["text"] for t in texts]
        assert pair["text"] == max(texts, key=lambda t: t["itm"])["text"]
        assert (pair["width"], pair["height"], pair["format"]) == (24, 24, "JPEG")


def test_every_text_has_its_own_score_and_source(tmp_path: Path, make_spec: MakeSpec) -> None:
    """Data-Juicer gives a synthetic caption the web text's score."""
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(50)])
    spec = make_spec(sampling=Sampling(candidates=3))
    run(spec)
    for row in read(spec.output):
        assert [(t["source"], t["candidate"]) for t in row["texts"]] == [
            ("web", 0), ("synthetic", 0), ("synthetic", 1), ("synthetic", 2),
        ]  # fmt: skip
        assert len({t["itm"] for t in row["texts"]}) == 4
        assert all(t["kept"] == (t["reason"] is None) for t in row["texts"])
        assert sum(t["kept"] for t in row["texts"] if t["source"] == "synthetic") <= 1
        assert row["captioner"] == "stub-captioner"
        assert row["filter"] == "stub-filter"
        assert row["seed"] == 0
        assert row["caption_fingerprint"]


def test_original_text_is_preserved_and_clean_text_is_scored(tmp_path: Path, make_spec: MakeSpec) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(0), jpeg(0)], ["A (Cat)!!", "a cat"])
    spec = make_spec()
    run(spec)
    first, second = read(spec.output)
    assert first["texts"][0]["text"] == "A (Cat)!!"
    assert first["texts"][0]["itm"] == second["texts"][0]["itm"]


def test_one_bad_image_costs_one_row_not_its_batch(tmp_path: Path, make_spec: MakeSpec) -> None:
    """Data-Juicer drops the batch around a corrupt image and reports no error."""
    images: list[bytes | None] = [jpeg(i) for i in range(41)]
    images[17] = b"\xff\xd8\xff garbage"
    write_shard(tmp_path / "in" / "0.parquet", images)
    summary = run(make_spec())
    assert (summary.counts.rows, summary.counts.errors) == (41, 1)
    (bad,) = [row for row in read(str(tmp_path / "out")) if row["status"] == "error"]
    assert bad["row"] == 17
    (quarantined,) = read(str(tmp_path / "out"), "quarantine")
    assert quarantined["image"] == images[17]
    assert quarantined["reason"] == bad["reason"]


def test_quarantine_is_capped(tmp_path: Path, make_spec: MakeSpec) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [b"x" * 5000, jpeg(0)])
    spec = make_spec(max_error_fraction=1.0)
    run(spec.model_copy(update={"images": spec.images.model_copy(update={"quarantine_bytes": 100})}))
    (row,) = read(spec.output, "quarantine")
    assert (row["image"], row["image_bytes"]) == (b"x" * 100, 5000)


def test_all_images_corrupt_is_no_success(tmp_path: Path, make_spec: MakeSpec) -> None:
    """Data-Juicer writes 0 rows and reports success."""
    write_shard(tmp_path / "in" / "0.parquet", [b"garbage"] * 30)
    with pytest.raises(ErrorBudgetError, match=r"30 of 30 rows are errors, 100\.0%.*not_an_image 30") as caught:
        run(make_spec())
    assert caught.value.exit_code == 3


def test_text_without_score_is_never_kept(tmp_path: Path, make_spec: MakeSpec) -> None:
    """Data-Juicer keeps a text without its image token unscored."""
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(40)], [None, "", " ?!* ", "\n"] * 10)
    run(make_spec(thresholds=Thresholds(web=0.0, synthetic=0.0)))
    for row in read(str(tmp_path / "out")):
        for text in row["texts"]:
            assert not text["kept"] or text["itm"] is not None
    assert {
        r["texts"][0]["reason"] for r in read(str(tmp_path / "out")) if not (r["texts"][0]["text"] or "").strip()
    } == {"empty_text"}


def test_a_model_that_raises_costs_the_row_it_raises_on(tmp_path: Path, make_spec: MakeSpec) -> None:
    texts = [f"t{i}" for i in range(50)]
    texts[7], texts[31] = "raise", "nan"
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(50)], texts)
    run(make_spec(), load_raising)
    errors = {row["row"]: row["detail"] for row in read(str(tmp_path / "out")) if row["status"] == "error"}
    assert set(errors) == {7, 31}
    assert "device-side assert" in errors[7]
    assert "not a probability" in errors[31]


def test_two_runs_agree_to_the_letter(tmp_path: Path, make_spec: MakeSpec) -> None:
    """Data-Juicer: two identical runs share no caption."""
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(40)])
    a, b = (make_spec(output=str(tmp_path / name)) for name in "ab")
    run(a)
    run(b)
    for left, right in zip(read(a.output), read(b.output), strict=True):
        assert {**left, "run": ""} == {**right, "run": ""}


def test_shards_do_not_mix(tmp_path: Path, make_spec: MakeSpec) -> None:
    """Ray Data alone: four input files become one with a random name."""
    for i in range(4):
        write_shard(tmp_path / "in" / f"{i}.parquet", [jpeg(i)] * 10)
    run(make_spec())
    shards = {row["shard"]: row["url"].split("/")[3] for row in read(str(tmp_path / "out"))}
    assert sorted(shards.values()) == ["0", "1", "2", "3"]
    assert all(shard.startswith(f"{name}-") for shard, name in shards.items())


def test_image_bytes_are_not_in_annotations(tmp_path: Path, make_spec: MakeSpec) -> None:
    out = io.BytesIO()
    Image.effect_noise((400, 400), 90).save(out, "PNG")
    write_shard(tmp_path / "in" / "0.parquet", [out.getvalue()] * 20)
    run(make_spec())
    size = sum(p.stat().st_size for p in (tmp_path / "out" / "annotations").rglob("*.parquet"))
    assert size < 20_000
