"""Rows that their owners withdrew: gone from the next version, from the old files after vacuum, and accounted for."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MakeSpec, jpeg, read, write_shard
from deltalake import DeltaTable
from s3 import S3
from stubs import load_hash
from test_recurate import Stop, dying_after, no_models, other_filter, run, scratch, spoil, tables
from typer.testing import CliRunner

from capfilt.check import look
from capfilt.cli import app
from capfilt.dataset import DIRECTORIES, CuratedDataset
from capfilt.errors import DatasetError, InputError, SpecError
from capfilt.fingerprints import run_fingerprints
from capfilt.plan import Stage, Why, make_plan, plan_run
from capfilt.receipts import RECEIPTS
from capfilt.spec import Columns, CurateSpec, Input, Retention, Sampling, Thresholds, Withdrawn
from capfilt.withdrawn import Withdrawals, digest, read_lists


def url(shard: int, row: int) -> str:
    return f"http://example.org/{shard:05d}/{row}.jpg"


ROWS = [(0, 3), (0, 50), (1, 7), (1, 97), (1, 12)]
"""No image, an empty one, a good one, HTML, a good one; of the shards below."""


@pytest.fixture
def web(tmp_path: Path) -> Path:
    """Three shards of 100 rows, some bad; keys are their own."""
    for s in range(3):
        images: list[bytes | None] = [jpeg(100 * s + i) for i in range(100)]
        images[3], images[50], images[97] = None, b"", b"<html> a page of its owner"
        path = write_shard(tmp_path / "in" / f"{s:05d}.parquet", images)
        table = pq.read_table(path)
        keys = pa.array([f"{s:05d}{i:04d}" for i in range(100)])
        pq.write_table(table.set_column(0, "key", keys), path, row_group_size=50)
    return tmp_path / "in"


def withdrawing(spec: CurateSpec, *rows: tuple[int, int], keys: tuple[str, ...] = ()) -> CurateSpec:
    """The spec with these rows' URLs on a list, and these keys on another."""
    folder = Path(spec.output).parent
    (folder / "urls.txt").write_text("".join(f"{url(*row)}\n" for row in rows))
    (folder / "keys.txt").write_text("\n".join(keys))
    own = Withdrawn(urls=(str(folder / "urls.txt"),), keys=(str(folder / "keys.txt"),))
    return spec.model_copy(update={"withdrawn": own})


def files(spec: CurateSpec, table: str = "annotations") -> set[str]:
    return set(DeltaTable(f"{spec.output}/{DIRECTORIES[table]}").file_uris())


# --- out of what is there ---


@pytest.mark.usefixtures("web")
def test_withdrawn_rows_are_as_if_they_had_never_been_curated(make_spec: MakeSpec) -> None:
    """Without models or the input; the accounts of the rows, and all others, stay."""
    spec = make_spec(max_error_fraction=1.0)
    run(spec)
    before = tables(spec.output)
    spec = withdrawing(spec, *ROWS, keys=("000000020", "000010021"))
    expected = scratch(spec)
    for path in Path(spec.input.paths[0]).iterdir():
        spoil(path)
    summary = run(spec, no_models)
    assert list(summary.stages) == [Stage.WITHDRAW]
    assert (summary.shards, summary.skipped, summary.counts.rows, summary.reasons["withdrawn"]) == (2, 1, 200, 7)
    after = tables(spec.output)
    assert after == expected
    gone = [row for row in after["annotations"] if row["reason"] == "withdrawn"]
    assert [(int(row["shard"][:5]), row["row"]) for row in gone] == sorted([*ROWS, (0, 20), (1, 21)])
    for row in gone:
        held = {name for name, value in row.items() if value not in (None, [], "")}
        provenance = {"seed", "caption_fingerprint", "score_fingerprint", "decide_fingerprint", "input_id"}
        assert held == {"shard", "row", "status", "reason", "note", "generation", *provenance}
        assert row["status"] == "dropped"
    places = {(row["shard"], row["row"]) for row in gone}
    for name, rows in before.items():
        left = [row for row in rows if (row["shard"], row["row"]) not in places]
        mine = [row for row in after[name] if (row["shard"], row["row"]) not in places]
        assert [{**row, "decide_fingerprint": ""} for row in mine] == [
            {**row, "decide_fingerprint": ""} for row in left
        ]
        assert name == "annotations" or len(mine) == len(after[name])
    states = CuratedDataset.for_reading(spec.output, {}).committed()
    assert sum(state.rows for state in states.values()) == 300


@pytest.mark.usefixtures("web")
def test_files_that_hold_no_withdrawn_row_stay_and_a_list_that_grows_redoes_what_it_hits(make_spec: MakeSpec) -> None:
    spec = make_spec()
    run(spec)
    before, pairs, quarantine = files(spec), files(spec, "pairs"), files(spec, "quarantine")
    kept = {(int(row["shard"][:5]), row["row"]) for row in read(spec.output, "pairs")}
    one = next(row for row in sorted(kept) if row[0] == 1 and row[1] < 40)
    summary = run(withdrawing(spec, one), no_models)
    assert summary.shards == 1
    assert {path.partition("shard=")[2][:5] for path in before - files(spec)} == {"00001"}
    assert len(pairs - files(spec, "pairs")) == 1
    assert quarantine == files(spec, "quarantine")
    summary = run(withdrawing(spec, one, (2, 97)), no_models)
    assert (summary.shards, summary.stages[Stage.WITHDRAW].copied, summary.stages[Stage.WITHDRAW].images) == (1, 0, 0)
    assert len(quarantine - files(spec, "quarantine")) == 1
    assert run(withdrawing(spec, (2, 97), one), no_models).shards == 0
    assert tables(spec.output) == scratch(withdrawing(spec, one, (2, 97)))


def test_an_input_that_is_gone_or_broken_withholds_nothing(make_spec: MakeSpec, web: Path) -> None:
    """Nor do thresholds that have changed, a shard that is mostly errors, or a redo that fails."""
    write_shard(web / "00003.parquet", [b"<html>"] * 90 + [jpeg(1000 + i) for i in range(10)])
    spec = make_spec(max_error_fraction=0.5)
    run(spec)
    (web / "00000.parquet").unlink()
    write_shard(web / "00001.parquet", [jpeg(i) for i in range(20)])
    spoil(web / "00001.parquet")
    rows = [(0, 7), (1, 12), (2, 8), (3, 5)]
    spec = withdrawing(spec.model_copy(update={"thresholds": Thresholds(web=0.9, synthetic=0.9)}), *rows)
    plan = plan_run(spec, run_fingerprints(spec))
    assert plan.reasons == {Why.WITHDRAWN: 4, Why.INPUT: 1, Why.DECIDE: 2}
    assert {shard[:5]: own for shard, own in plan.withdrawals.hits.items()} == {f"{s:05d}": (r,) for s, r in rows}
    summary = run(spec)
    assert list(summary.failures) == [str(web / "00001.parquet")]
    annotations = read(spec.output)
    gone = [(int(row["shard"][:5]), row["row"]) for row in annotations if row["reason"] == "withdrawn"]
    assert gone == rows
    old = {row["decide_fingerprint"][:16] for row in annotations if row["shard"][:5] in ("00000", "00001")}
    new = {row["decide_fingerprint"][:16] for row in annotations if row["shard"][:5] in ("00002", "00003")}
    assert len(old) == len(new) == 1
    assert old != new
    write_shard(web / "00001.parquet", [jpeg(i) for i in range(20)])
    run(spec)
    assert sum(row["reason"] == "withdrawn" for row in read(spec.output)) == 4  # its row 12 is still of that URL


@pytest.mark.usefixtures("web")
@pytest.mark.parametrize(
    "stage", [Stage.DECIDE, *(pytest.param(s, marks=pytest.mark.slow) for s in (Stage.SCORE, Stage.CAPTION))]
)
def test_what_is_made_later_leaves_them_out(make_spec: MakeSpec, stage: Stage) -> None:
    """New thresholds, filters or captioners, with the list as it was, and with one that has grown."""
    spec = make_spec()
    run(withdrawing(spec, *ROWS[:3]))
    changed = {
        Stage.DECIDE: {"thresholds": Thresholds(web=0.2, synthetic=0.2)},
        Stage.SCORE: {"filters": other_filter(spec).filters},
        Stage.CAPTION: {"sampling": Sampling(candidates=2)},
    }
    spec = spec.model_copy(update=changed[stage])
    assert list(run(withdrawing(spec, *ROWS[:3])).stages) == [stage]
    assert tables(spec.output) == scratch(withdrawing(spec, *ROWS[:3]))
    spec = spec.model_copy(update={"keep": "all-above-threshold"})
    assert list(run(withdrawing(spec, *ROWS, (2, 10))).stages) == [Stage.WITHDRAW, Stage.DECIDE]
    assert tables(spec.output) == scratch(withdrawing(spec, *ROWS, (2, 10)))


def test_a_moved_shard_keeps_them_out_and_a_new_one_never_has_them(make_spec: MakeSpec, web: Path) -> None:
    spec = make_spec()
    run(withdrawing(spec, *ROWS))
    assert tables(spec.output) == scratch(withdrawing(spec, *ROWS))
    (web / "moved").mkdir()
    (web / "00001.parquet").rename(web / "moved" / "00001.parquet")
    write_shard(web / "00004.parquet", [jpeg(4000 + i) for i in range(30)])
    summary = run(withdrawing(spec, *ROWS, (4, 9)))
    assert (summary.shards, summary.reasons["withdrawn"], summary.skipped) == (1, 1, 3)
    assert sum(row["reason"] == "withdrawn" for row in read(spec.output)) == len(ROWS) + 1
    assert not left_of(spec.output, [jpeg(4009)[-80:], url(4, 9).encode()])


@pytest.mark.usefixtures("web")
def test_a_row_that_is_on_no_list_any_more_is_curated_again(make_spec: MakeSpec) -> None:
    spec = make_spec()
    run(withdrawing(spec, *ROWS))
    again = withdrawing(spec, *ROWS[1:])
    plan = plan_run(again, run_fingerprints(again))
    assert plan.reasons == {Why.RETURNED: 1}
    summary = run(again)
    assert (summary.shards, summary.stages[Stage.CAPTION].rows) == (1, 100)
    assert tables(spec.output) == scratch(again)
    with pytest.raises(SpecError, match=r"rows of 2 shards were withdrawn, of 00000-\w+ for one.*names no lists"):
        run(spec)
    run(spec.model_copy(update={"withdrawn": Withdrawn()}))
    assert tables(spec.output) == scratch(spec)
    assert run(spec).skipped == 3


@pytest.mark.usefixtures("web")
def test_the_same_lists_are_compared_once(make_spec: MakeSpec) -> None:
    """With annotations that no one can read any more, only other lists are a reason to look."""
    spec = withdrawing(make_spec(), *ROWS)
    run(spec)
    for path in Path(spec.output, "annotations").rglob("*.parquet"):
        if "_delta_log" not in path.parts:
            spoil(path)
    assert run(spec, no_models).skipped == 3
    CuratedDataset.for_writing(spec.output, {}).vacuum(0)  # which makes a version of its own
    assert run(spec, no_models).skipped == 3
    with pytest.raises(InputError, match=r"annotations/shard=.*not readable as Parquet"):
        run(withdrawing(spec, *ROWS, (2, 2)))


@pytest.mark.usefixtures("web")
@pytest.mark.parametrize("after", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_dead_driver_costs_what_was_in_flight(make_spec: MakeSpec, after: int) -> None:
    spec = make_spec()
    run(spec)
    spec = withdrawing(spec, *ROWS)
    with pytest.raises(Stop):
        run(spec, no_models, dying_after(after))
    assert list(Path(spec.output, RECEIPTS).rglob("*.json"))
    more = withdrawing(spec, *ROWS, (1, 80))  # what was done of shard 1 has too few rows
    summary = run(more, no_models)
    assert summary.adopted_rows == (50 if after == 1 else 0)
    assert tables(spec.output) == scratch(more)


@pytest.mark.usefixtures("web")
def test_a_dead_drivers_captions_of_rows_since_withdrawn_are_not_taken_over(make_spec: MakeSpec) -> None:
    spec = make_spec()
    with pytest.raises(Stop):
        run(spec, execute=dying_after(1))
    more = withdrawing(spec, (0, 1))
    assert run(more).adopted_rows == 0
    assert tables(spec.output) == scratch(more)
    assert not left_of(spec.output, [url(0, 1).encode(), jpeg(1)[-80:]])


def test_a_shard_that_another_tool_rewrote_is_named(make_spec: MakeSpec, web: Path) -> None:
    spec = make_spec(max_error_fraction=1.0)
    run(spec)
    DeltaTable(f"{spec.output}/annotations").optimize.compact()
    again = withdrawing(spec, *ROWS)
    for _ in range(2):
        summary = run(again, no_models)
        assert summary.failures.keys() == {str(web / "00000.parquet"), str(web / "00001.parquet")}
        assert "another tool rewrote them. Touch" in summary.failures[str(web / "00000.parquet")]
    prints = run_fingerprints(spec)
    with pytest.raises(DatasetError, match=r"shard x-1 holds withdrawn rows, and another tool rewrote its files"):
        make_plan(spec, prints, {}, Withdrawals(hits={"x-1": (1,)}))


# --- and out of every file ---


def contents(root: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file under a directory: its bytes, and of Parquet all that its columns, pages and statistics hold."""
    for path in root.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            yield path, data
            if path.suffix == ".parquet":
                parquet = pq.ParquetFile(path)
                plain = io.BytesIO()
                pq.write_table(parquet.read(), plain, compression="none", use_dictionary=False)
                yield path, plain.getvalue()
                yield path, repr(parquet.read().to_pylist()).encode()
                yield path, repr(parquet.metadata.to_dict()).encode()
            elif path.suffix == ".gz":
                yield path, gzip.decompress(data)


def left_of(output: str, needles: list[bytes]) -> dict[bytes, set[str]]:
    """Which files hold what, of these."""
    found: dict[bytes, set[str]] = {}
    for path, data in contents(Path(output)):
        for needle in needles:
            if needle in data:
                found.setdefault(needle, set()).add(path.parent.name)
    return found


@pytest.mark.usefixtures("web")
def test_after_vacuum_no_byte_of_a_withdrawn_row_is_left_under_the_output(make_spec: MakeSpec) -> None:
    """Text, captions, URL, key, image and its hash, of a kept row and of one in quarantine; also in the log."""
    spec = make_spec(thresholds=Thresholds(web=0.1, synthetic=0.1), max_error_fraction=1.0)
    run(spec)
    last = run(spec.model_copy(update={"keep": "all-above-threshold"}))
    kept = next(r for r in read(spec.output, "pairs") if r["shard"].startswith("00001") and r["row"] > 12)
    bad = next(r for r in read(spec.output, "quarantine") if r["shard"].startswith("00001") and r["image"])
    texts = [caption["text"].encode() for caption in kept["captions"]]
    needles = [url(1, row["row"]).encode() for row in (kept, bad)] + [row["key"].encode() for row in (kept, bad)]
    needles += [*texts, kept["image_sha256"].encode(), kept["image"][-80:]]
    page = b"a page of its owner"
    Path(spec.output, "_runs", last.run, "report.html").write_bytes(b"<p>" + b"<p>".join(needles))
    rows = sorted({(1, kept["row"]), (1, bad["row"]), *((s, 97) for s in range(3))})
    assert left_of(spec.output, [*needles, page]).keys() == {*needles, page}
    spec = withdrawing(spec.model_copy(update={"keep": "all-above-threshold"}), *rows)
    run(spec, no_models)
    for folder in DIRECTORIES.values():
        DeltaTable(f"{spec.output}/{folder}").create_checkpoint()
    assert left_of(spec.output, [*needles, page])  # of the versions before
    removed = CliRunner().invoke(app, ["vacuum", spec.output, "--hours", "0"])
    assert removed.exit_code == 0, removed.output
    assert left_of(spec.output, [*needles, page]) == {}
    assert sum(row["reason"] == "withdrawn" for row in read(spec.output)) == len(rows)


@pytest.mark.slow
def test_lists_and_versions_in_an_object_store(make_spec: MakeSpec, s3: S3, tmp_path: Path) -> None:
    """With a retention the run itself takes the old files."""
    fs, place = s3.files(), f"data/{tmp_path.name}"
    path = write_shard(tmp_path / "0.parquet", [jpeg(i) for i in range(30)])
    fs.pipe_file(f"{place}/web/0.parquet", path.read_bytes())
    spec = make_spec(
        input=Input(paths=(f"s3://{place}/web",), storage_options=s3.options),
        output=f"s3://{place}/out",
        output_options=s3.options,
        retention=Retention(versions=1),
        thresholds=Thresholds(web=0.0, synthetic=0.0),
    )
    run(spec)
    fs.pipe_file(f"{place}/lists/1.csv", b"id,url\n1,http://example.org/0/4.jpg\n")
    own = Withdrawn(urls=(f"s3://{place}/lists/*.csv",), storage_options=s3.options)
    spec = spec.model_copy(update={"withdrawn": own})
    summary = run(spec, no_models)
    assert (summary.counts.kept, summary.reasons["withdrawn"]) == (29, 1)
    assert run(spec, no_models).skipped == 1
    fs.get(f"{place}/out/", str(tmp_path / "out/"), recursive=True)
    assert left_of(str(tmp_path / "out"), [b"http://example.org/0/5.jpg", jpeg(5)[-80:]])
    assert left_of(str(tmp_path / "out"), [b"http://example.org/0/4.jpg", jpeg(4)[-80:], b"text 4 of 0"]) == {}


# --- lists ---


def test_kinds_of_lists(tmp_path: Path) -> None:
    entries = ["http://a.org/1,2.jpg", "http://a.org/ä.jpg", "00012"]
    (tmp_path / "a.txt").write_text("\ufeff" + "\r\n".join([*entries, "", "http://a.org/1,2.jpg"]), "utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("\n".join(entries).encode()))
    (tmp_path / "c.csv").write_text('id,link\n1,"http://a.org/1,2.jpg"\n2,http://a.org/ä.jpg\n3,00012\n4,\n', "utf-8")
    pq.write_table(pa.table({"link": pa.array([*entries, None, ""]).dictionary_encode()}), tmp_path / "d.parquet")
    pq.write_table(pa.table({"link": pa.array([7, 12])}), tmp_path / "e.parquet")
    for name in ("a.txt", "b.txt.gz", "c.csv", "d.parquet"):
        lists = read_lists(Withdrawn(urls=(str(tmp_path / name),), url_column="link"))
        assert lists.urls == set(entries)
        assert lists.keys == frozenset()
    lists = read_lists(Withdrawn(keys=(str(tmp_path / "e.parquet"), str(tmp_path / "[ac].*")), key_column="link"))
    assert lists.keys == {*entries, "7", "12"}
    assert lists.digest != read_lists(Withdrawn(keys=(str(tmp_path / "a.txt"),))).digest
    assert not read_lists(Withdrawn())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.txt", None, r"missing.txt: cannot be read: FileNotFoundError"),
        ("no*.csv", None, r"no\*.csv: no file there"),
        ("list.json", b"[]", r"list.json: lists of what is withdrawn are .parquet, .csv, .txt"),
        ("list.csv", b"link\nx\n", r"list.csv: no column url; name it with withdrawn.url_column"),
        ("list.csv", b'url,why\nx,"a\ny,b\nz,c"\n', r"list.csv: a value reaches over several lines, .*'a\\ny,b\\nz,c'"),
        ("list.csv", b'url,why\nx,"a\ny,b\n', r"list.csv: line 2 opens a quote that nothing closes"),
        ("list.csv", b"url,why\nx\n", r"list.csv: line 2 has 1 field, and its header 2"),
        ("list.csv", b"", r"list.csv: no column url"),
        ("list.txt", b"\xff\xfe", r"list.txt: cannot be read: UnicodeDecodeError"),
        ("list.txt.gz", b"plain", r"list.txt.gz: cannot be read: BadGzipFile"),
        ("list.parquet", b"PAR1", r"list.parquet: not readable as Parquet"),
    ],
)
def test_a_list_that_cannot_be_used_ends_the_run(
    make_spec: MakeSpec, web: Path, tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    spec = make_spec(withdrawn=Withdrawn(urls=(str(tmp_path / name),)))
    with pytest.raises(InputError, match=said):
        run(spec)
    assert not Path(spec.output).exists()
    assert web.exists()


def test_lists_that_an_input_cannot_be_compared_with_fail_it(make_spec: MakeSpec, tmp_path: Path) -> None:
    """Its rows would be taken in though their owners had withdrawn them."""
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(0)])
    bare = pq.read_table(tmp_path / "in" / "0.parquet").drop_columns(["url", "key"])
    pq.write_table(bare, tmp_path / "in" / "1.parquet")
    spec = withdrawing(make_spec(max_error_fraction=0.9), (0, 0))
    summary = run(spec)
    assert list(summary.failures) == [str(tmp_path / "in" / "1.parquet")]
    assert "has no column to compare with the lists" in summary.failures[str(tmp_path / "in" / "1.parquet")]
    named = Input(paths=spec.input.paths, columns=Columns(url="caption"))
    listed = tmp_path / "texts.txt"
    listed.write_text("text 0 of 0")
    spec = spec.model_copy(update={"input": named, "withdrawn": Withdrawn(urls=(str(listed),))})
    assert run(spec).reasons["withdrawn"] == 2


@pytest.mark.slow
def test_rows_behind_a_corrupt_page_are_unreadable_and_those_before_it_are_compared(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    path = write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(200)])
    pq.write_table(
        pq.read_table(path), path, compression="none", use_dictionary=False, data_page_size=512, write_page_index=False
    )
    data = path.read_bytes()
    place = data.index(b"http://example.org/0/150.jpg")
    path.write_bytes(data[: place - 4] + b"\xff\xff\xff\x7f" + data[place:])
    spec = make_spec(max_error_fraction=1.0)
    (tmp_path / "urls.txt").write_text("\n".join(f"http://example.org/0/{row}.jpg" for row in (5, 100, 199)))
    spec = spec.model_copy(update={"withdrawn": Withdrawn(urls=(str(tmp_path / "urls.txt"),))})
    summary = run(spec)
    assert summary.reasons["unreadable_row"] > 0
    assert [row["row"] for row in read(spec.output) if row["reason"] == "withdrawn"] == [5, 100]


# --- told ---


def test_a_plan_says_what_a_list_would_do(make_spec: MakeSpec, web: Path, tmp_path: Path) -> None:
    spec = make_spec()
    run(spec)
    spec = withdrawing(spec, *ROWS, (9, 9))
    write_shard(web / "00009.parquet", [jpeg(i) for i in range(20)])
    (tmp_path / "spec.json").write_text(json.dumps(spec.model_dump(mode="json")))
    said = CliRunner().invoke(app, ["plan", str(tmp_path / "spec.json")])
    assert said.exit_code == 0, said.output
    assert "curate 2 shards: rows were withdrawn" in said.output
    assert "withdraw 5 rows of 2 shards in the dataset" in said.output
    assert "leave 1 shard: up to date" in said.output
    assert "withdrawn: 6 URLs, 0 keys" in itertools.islice(look(spec), 3)
    assert digest("url", "a") != digest("key", "a")


@pytest.mark.usefixtures("local_ray", "web")
def test_on_ray_as_in_a_plain_loop(make_spec: MakeSpec) -> None:
    spec = make_spec()
    run(spec)
    spec = withdrawing(spec, *ROWS)
    run(spec, load_hash, None)
    assert tables(spec.output) == scratch(spec)


def test_unknown_fields_of_the_spec_are_named(make_spec: MakeSpec) -> None:
    data: dict[str, Any] = {"url": ["/x.txt"]}
    with pytest.raises(ValueError, match="url\n  Extra inputs"):
        Withdrawn(**data)
    assert make_spec().withdrawn is None
