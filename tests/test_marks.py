"""Marks: a label file that outlives whoever writes it, and that an evaluation measures the filter with."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import read
from rich.console import Console
from sklearn.metrics import precision_score, recall_score
from viewing import Served, make_dataset, serving

from capfilt.errors import InputError, StoreError
from capfilt.pipelines.evaluate import evaluate
from capfilt.spec import CurateSpec, EvaluateSpec, Input, Quality, Truth
from capfilt.tables import report_table
from capfilt.truth import read_labels
from capfilt.view.marks import MARKS_SCHEMA, Marks

ONE, TWO = "ab" * 32, "cd" * 32
ABOUT = {"shard": "s", "row": 3, "source": "web", "captioner": None, "version": 2, "drawn": '{"sort":"random"}'}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "marks.parquet"


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> CurateSpec:
    return make_dataset(tmp_path_factory.mktemp("marked"))


@pytest.fixture
def view(spec: CurateSpec, path: Path, tmp_path: Path) -> Iterator[Served]:
    with serving(spec.output, path, tmp_path / "index.duckdb", against=1) as served:
        yield served


# --- the file ---


def test_a_mark_is_a_label(path: Path) -> None:
    marks = Marks(str(path))
    assert not path.exists()
    marks.mark(ONE, "A red  House.", True, ABOUT)
    marks.mark(ONE, "a blue house", False, ABOUT)
    labels = read_labels(Input(paths=(str(path),)))
    assert [labels.is_true(ONE, text) for text in ("a red house", "a blue house", "a house")] == [True, False, None]
    assert pq.read_schema(path).equals(MARKS_SCHEMA)
    first = pq.read_table(path).to_pylist()[0]
    assert {name: first[name] for name in ABOUT} == ABOUT
    assert first["text"] == "A red  House."
    assert first["marked_by"]
    assert first["marked_at"].tzinfo


def test_a_mark_can_be_changed_and_taken_back(path: Path) -> None:
    marks = Marks(str(path))
    for verdict in (True, False, False):
        marks.mark(ONE, "a house", verdict, ABOUT)
        assert marks.verdict(ONE.upper(), "A HOUSE!") is verdict
        assert read_labels(Input(paths=(str(path),))).is_true(ONE, "a house") is verdict
    assert marks.counts() == {"right": 0, "wrong": 1}
    assert marks.verdict(TWO, "a house") is None
    marks.mark(ONE, "a house", None, ABOUT)
    assert (marks.counts(), marks.rows(), marks.verdict(ONE, "a house")) == ({"right": 0, "wrong": 0}, [], None)
    marks.mark(ONE, "a house", None, ABOUT)  # of what is not marked: nothing
    assert Marks(str(path)).counts() == {"right": 0, "wrong": 0}


def test_two_writers_lose_nothing(path: Path) -> None:
    mine, other = Marks(str(path)), Marks(str(path))
    for n in range(5):
        (mine if n % 2 else other).mark(ONE, f"text {n}", bool(n % 2), ABOUT)
    assert pq.read_table(path).num_rows == 5
    threads = [
        threading.Thread(
            target=lambda own, k: [own.mark(TWO, f"{k} {n}", True, ABOUT) for n in range(10)], args=(own, k)
        )
        for k, own in enumerate((mine, mine, other, Marks(str(path))))
    ]
    reading, broken = threading.Event(), []

    def read_on() -> None:
        while not reading.is_set():
            try:
                pq.ParquetFile(path).read()
            except Exception as error:  # noqa: BLE001  what the test looks for
                broken.append(error)

    reader = threading.Thread(target=read_on)
    for thread in (reader, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    reading.set()
    reader.join()
    assert broken == []
    assert pq.read_table(path).num_rows == 45
    assert sorted(file.name for file in path.parent.iterdir()) == [".marks.parquet.lock", "marks.parquet"]


def test_a_killed_writer_leaves_whole_marks(path: Path) -> None:
    code = (
        "import sys; from capfilt.view.marks import Marks; marks = Marks(sys.argv[1])\n"
        "for n in range(10**6): marks.mark('ab' * 32, f'text {n}', True, {}); print(n, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for _ in range(30):
            last = process.stdout.readline()
        process.kill()
        rest = process.stdout.read().split()
    told = int([last.strip(), *rest][-1]) + 1
    assert told >= 30
    assert Marks(str(path)).counts()["right"] in (told, told + 1)


def test_labels_of_another_hand_are_taken_in(path: Path) -> None:
    pq.write_table(
        pa.table({"image_sha256": [ONE, TWO, None], "text": ["x", "y", "z"], "true": [True, None, True]}), path
    )
    marks = Marks(str(path))
    assert marks.counts() == {"right": 1, "wrong": 0}
    marks.mark(ONE, "new", False, ABOUT)
    assert read_labels(Input(paths=(str(path),))).is_true(ONE, "x") is True


def test_files_that_marks_would_spoil_are_refused(path: Path, tmp_path: Path) -> None:
    columns: dict[str, Any] = {"image_sha256": [ONE], "text": ["x"], "true": [True]}
    pq.write_table(pa.table({**columns, "mine": [1]}), path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"has columns that marks have not, mine,.*--marks another file"):
        Marks(str(path))
    assert path.read_bytes() == before
    pq.write_table(pa.table({"text": ["x"]}), path)
    with pytest.raises(InputError, match="no column image_sha256"):
        Marks(str(path))
    path.write_text("no Parquet")
    with pytest.raises(InputError, match=r"marks\.parquet: not readable as Parquet"):
        Marks(str(path))
    with pytest.raises(InputError, match="its directory does not exist"):
        Marks(str(tmp_path / "no" / "marks.parquet"))
    with pytest.raises(InputError, match="give a local path"):
        Marks("s3://bucket/marks.parquet")


def test_a_full_disk_keeps_earlier_marks(path: Path) -> None:
    marks = Marks(str(path))
    marks.mark(ONE, "x", True, ABOUT)
    code = (
        "import resource, signal, sys; from capfilt.view.marks import Marks; marks = Marks(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "marks.mark('cd' * 32, 'y', True, {})"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert f"{StoreError.__name__}: {path}: the mark cannot be written" in done.stderr
    assert Marks(str(path)).counts() == {"right": 1, "wrong": 0}
    assert sorted(file.name for file in path.parent.iterdir()) == [".marks.parquet.lock", "marks.parquet"]


# --- from the page to the evaluation ---


def test_what_was_marked_measures_the_filter(view: Served, spec: CurateSpec, path: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    truth: list[tuple[float, bool, bool]] = []  # (score, right, kept) of the web texts
    for row in view.get("rows", sort="random", limit=60)["rows"]:
        web = row["texts"][0]
        if not row["markable"] or not web["length"] or web["itm"] is None:
            continue
        right = bool(rng.random() < web["itm"])  # a filter that is right more often than not
        status, counts = view.post(id=row["id"], text=0, true=right, search={"sort": "random"})
        truth.append((web["itm"], right, web["kept"]))
        assert (status, sum(counts.values())) == (200, len(truth))
    shown = [row["texts"][0]["marked"] for row in view.get("rows", sort="random", limit=60)["rows"]]
    assert sum(mark is not None for mark in shown) == len(truth)
    assert {row["drawn"] for row in pq.read_table(path).to_pylist()} == {'{"sort":"random"}'}

    quality = Quality(dataset=spec.output, truth=Truth(labels=Input(paths=(str(path),))))
    asked = EvaluateSpec(kind="evaluate", output=str(tmp_path / "measured"), quality=(quality,))
    report = evaluate(asked, Console(file=io.StringIO()))
    web = report.quality[0].sources["web"]
    scores, right, kept = (np.array(column) for column in zip(*truth, strict=True))
    assert (web.judged, web.kept) == (len(truth), kept.sum())
    assert web.precision == pytest.approx(precision_score(right, kept))
    assert web.recall == pytest.approx(recall_score(right, kept))

    best = web.calibrated
    assert best is not None
    above = scores >= best.threshold
    assert (best.precision, best.recall) == pytest.approx((precision_score(right, above), recall_score(right, above)))

    def f1(threshold: float) -> float:
        above = scores >= threshold
        return float(2 * (above & right).sum() / (above.sum() + right.sum()))

    assert f1(best.threshold) == max(map(f1, scores)) >= f1(0.6)
    record = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    assert record["quality"][0]["sources"]["web"]["calibrated"]["threshold"] == best.threshold
    console = Console(file=io.StringIO(), width=200)
    for table in report_table(record):
        console.print(table)
    assert f"{best.threshold:.4f}" in console.file.getvalue()  # type: ignore[attr-defined]

    strict = evaluate(asked.model_copy(update={"max_false_positive_rate": 0.0}), Console(file=io.StringIO()))
    own = strict.quality[0].sources["web"]
    if right[scores.argmax()]:
        assert own.calibrated is not None
        assert (own.calibrated.precision, own.calibrated.false_positive_rate) == (1, 0)
    else:
        assert own.calibrated is None
        assert "untrue pairs have the highest score" in (own.problem or "")


def test_marks_that_a_search_chose_are_no_fair_sample(
    view: Served, spec: CurateSpec, path: Path, tmp_path: Path
) -> None:
    searches: list[dict[str, Any]] = [
        *({"sort": "random"}, {"sort": "random", "seed": 7, "descending": True, "offset": 25}),
        *({"sort": "borderline"}, {"sort": "random", "status": "kept"}, {}),
    ]
    rows = [row for row in view.rows() if row["markable"] and row["texts"][0]["length"] and row["texts"][0]["itm"]]
    for row, search in zip(rows[10:], searches, strict=False):
        assert view.post(id=row["id"], text=0, true=True, search=search)[0] == 200
    quality = Quality(dataset=spec.output, truth=Truth(labels=Input(paths=(str(path),))))
    asked = EvaluateSpec(kind="evaluate", output=str(tmp_path / "measured"), quality=(quality,))

    def measured() -> tuple[int, int, str]:
        console = Console(file=io.StringIO(), width=200)
        report = evaluate(asked, console)
        console.print(*report_table(report.record()))
        web = report.quality[0].sources["web"]
        said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
        return web.judged, web.chosen, said

    judged, chosen, said = measured()
    assert (judged, chosen) == (5, 3)
    assert "3 of the marked texts were not drawn at random from all rows" in said
    table = pq.read_table(path)
    fair = table.filter(pa.array(["random" in drawn and "status" not in drawn for drawn in table["drawn"].to_pylist()]))
    for labels, count in ((fair, 2), (table.drop_columns("drawn"), 5)):  # what says nothing is not doubted
        pq.write_table(labels, path)
        assert measured()[:2] == (count, 0)
        assert "not drawn at random" not in measured()[2]


def test_marks_are_found_again(view: Served, spec: CurateSpec) -> None:
    rows = view.rows(text="blue")
    for row, verdict in zip(rows, (True, False), strict=False):
        assert view.post(id=row["id"], text=1, true=verdict)[0] == 200
    assert [row["row"] for row in view.rows(marked="true")] == [row["row"] for row in rows[:2]]
    assert [row["texts"][1]["marked"] for row in view.rows(marked="true")] == [True, False]
    assert view.get("count", marked="false")["count"] == len(read(spec.output)) - 2
    assert view.get("state")["marks"]["right"] == 1
    assert view.post(id=rows[0]["id"], text=1, true=None) == (200, {"right": 0, "wrong": 1})
    assert len(view.rows(marked="true")) == 1


def test_texts_that_cannot_be_judged(view: Served, path: Path) -> None:
    for search, said in (
        ({"reason": "no_image"}, "has no image"),
        ({"reason": "empty_text"}, "neither right nor wrong"),
    ):
        row = view.rows(**search)[0]
        status, answer = view.post(id=row["id"], text=0, true=True)
        assert status == 409
        assert said in answer["error"]
    assert not path.exists()


def test_a_mark_of_the_older_version_says_so(view: Served, path: Path) -> None:
    row = next(row for row in view.rows(changed="true") if row["change"] == "changed" and row["markable"])
    assert view.post(id=row["id"], text=1, true=True, older=True)[0] == 200
    (mark,) = pq.read_table(path).to_pylist()
    assert (mark["version"], mark["text"]) == (1, row["older"]["texts"][1]["text"])
    same = next(row for row in view.rows() if row["older"] is None)
    status, answer = view.post(id=same["id"], text=0, true=True, older=True)
    assert (status, "no other version" in answer["error"]) == (409, True)
