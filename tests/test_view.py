"""The view's server over a real dataset: what it finds, what it shows, and whom it refuses."""

from __future__ import annotations

import hashlib
import http.client
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode
from urllib.request import urlopen

import duckdb
import pyarrow.parquet as pq
import pytest
from conftest import jpeg, read, write_shard
from s3 import S3
from viewing import HOSTILE, Served, make_dataset, make_spec, run, serving

from capfilt.dataset import CuratedDataset
from capfilt.errors import CapfiltError, DatasetError
from capfilt.spec import CurateSpec, Input, Thresholds
from capfilt.view.explorer import Explorer
from capfilt.view.search import Search, terms
from capfilt.view.server import Server

Row = dict[str, Any]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> CurateSpec:
    return make_dataset(tmp_path_factory.mktemp("viewed"))


@pytest.fixture(scope="module")
def rows(spec: CurateSpec) -> list[Row]:
    """The newest version's rows, by another way."""
    return read(spec.output)


@pytest.fixture(scope="module")
def view(spec: CurateSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The newest version against the first."""
    folder = tmp_path_factory.mktemp("view")
    with serving(spec.output, folder / "marks.parquet", folder / "index.duckdb", against=1) as served:
        yield served


def keys(rows: list[Row]) -> list[tuple[str, int]]:
    return sorted((row["shard"], row["row"]) for row in rows)


def score(row: Row, source: str) -> float | None:
    return max((t["itm"] for t in row["texts"] if t["source"] == source and t["itm"] is not None), default=None)


def says(row: Row, *words: str) -> bool:
    texts = "\n".join(text["text"].lower() for text in row["texts"] if text["text"] is not None)
    return all(word.lower() in texts for word in words)


def between(value: float | None, low: float, high: float) -> bool:
    return value is not None and low <= value <= high


SEARCHES: list[tuple[Row, Callable[[Row], bool]]] = [
    ({}, lambda _: True),
    ({"text": "blue"}, lambda row: says(row, "blue")),
    ({"text": "BLUE picture"}, lambda row: says(row, "blue", "picture")),
    ({"text": '"blue house 1" text'}, lambda row: says(row, "blue house 1", "text")),
    ({"text": "grosse straßen ärger"}, lambda row: says(row, "grosse", "straßen", "ärger")),
    ({"text": "100% _under\\score"}, lambda row: says(row, "100%", "_under\\score")),
    ({"text": "שלום"}, lambda row: says(row, "שלום")),
    ({"text": "no such words"}, lambda _: False),
    ({"url": "/1/7.JPG"}, lambda row: "/1/7.jpg" in row["url"]),
    ({"status": "kept"}, lambda row: row["status"] == "kept"),
    ({"status": "error"}, lambda row: row["status"] == "error"),
    ({"reason": "not_an_image"}, lambda row: row["reason"] == "not_an_image"),
    ({"reason": "empty_text"}, lambda row: any(t["reason"] == "empty_text" for t in row["texts"])),
    ({"source": "web"}, lambda row: any(t["kept"] and t["source"] == "web" for t in row["texts"])),
    ({"source": "synthetic"}, lambda row: any(t["kept"] and t["source"] == "synthetic" for t in row["texts"])),
    ({"shard": "1-", "row": 7}, lambda row: row["shard"].startswith("1-") and row["row"] == 7),
    ({"web_min": 0.3, "web_max": 0.7}, lambda row: between(score(row, "web"), 0.3, 0.7)),
    ({"synthetic_min": 0.5}, lambda row: between(score(row, "synthetic"), 0.5, 1)),
    (
        {"text": "red", "status": "dropped", "synthetic_max": 0.5},
        lambda row: says(row, "red") and row["status"] == "dropped" and between(score(row, "synthetic"), 0, 0.5),
    ),
]


@pytest.mark.parametrize(("query", "wanted"), SEARCHES, ids=[urlencode(query) for query, _ in SEARCHES])
def test_a_search_finds_what_python_does(
    view: Served, rows: list[Row], query: Row, wanted: Callable[[Row], bool]
) -> None:
    expected = keys([row for row in rows if wanted(row)])
    assert keys(view.rows(**query)) == expected
    assert view.get("count", **query) == {"count": len(expected)}
    if query and "no such words" not in query.values():
        assert 0 < len(expected) < len(rows)


def test_a_row_is_shown_whole(view: Served, rows: list[Row]) -> None:
    shown = {(row["shard"], row["row"]): row for row in view.rows()}
    for row in rows:
        own = shown[row["shard"], row["row"]]
        names = ("status", "reason", "detail", "note", "url", "key", "width", "height")
        assert {name: own[name] for name in names} == {name: row[name] for name in names}
        assert own["provenance"]["run"] == row["run"]
        for text, wanted in zip(own["texts"], row["texts"], strict=True):
            about = ("source", "captioner", "itm", "itc", "kept", "reason", "scores")
            assert {name: text[name] for name in about} == {name: wanted[name] for name in about}
            assert (text["text"], text["length"]) == (wanted["text"] or "", len(wanted["text"] or ""))
    first = next(row for row in rows if row["shard"].startswith("0-"))
    assert [shown[first["shard"], n]["texts"][0]["text"] for n in range(len(HOSTILE))] == list(HOSTILE)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("sort", ["table", "web", "synthetic", "borderline", "random"])
def test_pages_in_any_order_hold_every_row_once(view: Served, rows: list[Row], sort: str, descending: bool) -> None:
    found = view.rows(sort=sort, descending=str(descending).lower(), limit=9, web_threshold=0.6, seed=3)
    assert keys(found) == keys(rows)
    values = {
        "web": lambda row: score(row, "web"),
        "synthetic": lambda row: score(row, "synthetic"),
        "borderline": lambda row: min(
            (abs(s - t) for s, t in ((score(row, "web"), 0.6), (score(row, "synthetic"), 0.5)) if s is not None),
            default=None,
        ),
    }
    if sort in values:
        scores = [values[sort](row) for row in found]
        known = [value for value in scores if value is not None]
        assert scores[len(known) :] == [None] * (len(scores) - len(known))
        assert known == sorted(known, reverse=descending)
    if sort == "random":
        again, other = (view.rows(sort=sort, descending=str(descending).lower(), seed=seed) for seed in (3, 4))
        assert [row["id"] for row in again] == [row["id"] for row in found] != [row["id"] for row in other]


def test_facets_count_every_row(view: Served, spec: CurateSpec) -> None:
    facets = view.get("facets")
    counted = {(one["status"], one["reason"]): one["rows"] for one in facets["rows"]}
    assert counted == CuratedDataset.for_reading(spec.output, {}).reasons()
    assert {"below_threshold", "empty_text", "not_scored"} <= set(facets["text_reasons"])


def test_changed_rows_are_those_whose_outcome_or_text_differs(view: Served, spec: CurateSpec, rows: list[Row]) -> None:
    def outcome(row: Row) -> Any:
        return row["status"], row["reason"], [text["text"] for text in row["texts"] if text["kept"]]

    dataset = CuratedDataset.for_reading(spec.output, {})
    first = {(row["shard"], row["row"]): row for row in dataset.annotations(1).to_table().to_pylist()}
    changed = [
        row for row in rows if (old := first.get((row["shard"], row["row"]))) is None or outcome(old) != outcome(row)
    ]
    found = view.rows(changed="true")
    assert keys(found) == keys(changed)
    assert {row["change"] for row in found} == {"changed", "gained"}
    for row in found:
        old = first.get((row["shard"], row["row"]))
        assert (row["older"] is None) == (old is None) == (row["change"] == "gained")
        if old:
            assert outcome(row["older"]) == outcome(old)
            assert row["older"]["provenance"]["run"] == old["run"] != row["provenance"]["run"]
    unchanged = [row for row in view.rows() if (row["shard"], row["row"]) not in keys(found)]
    assert unchanged
    assert {(row["change"], row["older"]) for row in unchanged} == {(None, None)}
    assert keys(view.rows(changed="true", status="kept")) == keys([row for row in changed if row["status"] == "kept"])


def test_another_filters_scores_stand_beside_the_first_ones(tmp_path: Path) -> None:
    """Also where both decide alike: that is where one looks how sure they are."""
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(n) for n in range(30)])
    write_shard(tmp_path / "in" / "1.parquet", [None, jpeg(90)])
    spec = make_spec(tmp_path)
    run(spec)
    (first, _) = spec.filters
    run(spec.model_copy(update={"filters": (first, first.model_copy(update={"name": "other", "image_size": 8}))}))
    before = {
        (row["shard"], row["row"]): row
        for row in CuratedDataset.for_reading(spec.output, {}).annotations(1).to_table().to_pylist()
    }
    with serving(spec.output, tmp_path / "m.parquet", tmp_path / "i.duckdb", against=1) as view:
        found = view.rows()
        alike = [row for row in found if row["change"] is None]
        assert 5 < len(alike) < len(found) == 32
        for row in found:
            old = before[row["shard"], row["row"]]
            assert (row["older"] is None) == (old["reason"] == "no_image")  # nothing to compare
            for text, side in zip(old["texts"], (row["older"] or row)["texts"], strict=True):
                assert text["itm"] == pytest.approx(side["itm"])
        changed = view.rows(changed="true")
        assert keys(changed) == keys([row for row in found if row["change"] == "changed"])
        shown = next(row for row in alike if row["older"])
        assert shown["older"]["texts"][0]["scores"][1]["filter"] == "stub-filter-1"
        assert shown["texts"][0]["scores"][1]["filter"] == "other"
        assert view.post(id=shown["id"], text=0, true=True, older=True)[0] == 200


def test_a_row_that_is_gone_is_the_older_versions(spec: CurateSpec, tmp_path: Path) -> None:
    newest = CuratedDataset.for_reading(spec.output, {}).versions()["annotations"]
    with serving(spec.output, tmp_path / "m.parquet", tmp_path / "i.duckdb", version=1, against=newest) as view:
        assert [row["change"] for row in view.rows(changed="true", shard="2-")] == ["gone"] * 5
        assert view.rows(shard="2-") == []
        assert view.get("count") == {"count": 80}
        gone = view.rows(changed="true", shard="2-")[0]
        status, _, body = view.raw("GET", f"/api/image?id={gone['id']}")
        assert (status, hashlib.sha256(body).hexdigest()) == (200, gone["provenance"]["image_sha256"])


# --- images ---


def image(view: Served, row: Row) -> tuple[int, Any, bytes]:
    return view.raw("GET", f"/api/image?id={row['id']}")


def test_images_come_from_the_pairs_or_the_input(view: Served) -> None:
    shown = set()
    for row in view.rows(limit=50):
        status, headers, body = image(view, row)
        shown.add((row["status"], row["reason"], status))
        if status == 200:
            assert hashlib.sha256(body).hexdigest() == row["provenance"]["image_sha256"]
            assert headers["Content-Type"] == "image/jpeg"
        else:
            said = json.loads(body)["error"]
            assert ("without an image" if row["reason"] == "no_image" else "looks like HTML") in said
    assert shown == {
        ("kept", None, 200),
        ("dropped", "no_match", 200),
        ("dropped", "no_image", 409),
        ("error", "not_an_image", 409),
    }


def test_a_pair_of_another_image_is_not_shown(tmp_path: Path) -> None:
    """As a table that another tool maintained may have it: no mark is to be of a text beside the wrong picture."""
    spec = make_spec(tmp_path, thresholds=Thresholds(web=0.0, synthetic=0.0))
    write_shard(tmp_path / "in" / "a.parquet", [jpeg(n) for n in range(8)])
    run(spec)
    (file,) = (tmp_path / "out" / "pairs").rglob("*.parquet")
    table = pq.read_table(file, partitioning=None)
    images = table["image"].to_pylist()
    images[3] = images[4]
    swapped = table.set_column(table.schema.get_field_index("image"), table.schema.field("image"), [images])
    pq.write_table(swapped, file)
    with serving(spec.output, tmp_path / "m.parquet", tmp_path / "i.duckdb") as view:
        for row in view.rows():
            status, _, body = image(view, row)
            assert (status == 200) == (row["row"] != 3)
            if status != 200:
                assert "row 3 of shard" in json.loads(body)["error"]
                assert "another image in the pairs than the annotations name" in json.loads(body)["error"]


def test_an_input_that_is_gone_or_changed_is_said(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, filters=make_spec(tmp_path).filters[:1])
    for name in "ab":
        write_shard(tmp_path / "in" / f"{name}.parquet", [jpeg(n) for n in range(20)])
    run(spec)
    write_shard(tmp_path / "in" / "a.parquet", [jpeg(n + 50) for n in range(20)])
    (tmp_path / "in" / "b.parquet").unlink()
    with serving(spec.output, tmp_path / "m.parquet", tmp_path / "i.duckdb") as view:
        said = {}
        for row in view.rows():
            status, _, body = image(view, row)
            assert (status == 200) == (row["status"] == "kept")
            if status != 200:
                said[row["shard"][0]] = json.loads(body)["error"]
    assert "a.parquet has changed since" in said["a"]
    assert "no longer among" in said["b"]


# --- whom it refuses ---


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": "127.0.0.1@evil.example"}, 421),
        ({"Host": ""}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer \xff"}, 401),
    ],
    ids=str,
)
def test_others_are_refused(view: Served, headers: dict[str, str], status: int) -> None:
    for method, path in (("GET", "/api/rows"), ("GET", "/api/image?id=0"), ("POST", "/api/marks")):
        got, answer, body = view.raw(method, path, headers, b"{}" if method == "POST" else None)
        assert got == status
        assert b"shard" not in body
        assert not [name for name in answer if name.lower().startswith("access-control")]
    if "Authorization" not in headers and "Sec-Fetch-Site" not in headers:
        assert view.raw("GET", "/", headers, token=False)[0] == status


def test_a_browsers_own_requests_are_let_in(view: Served) -> None:
    for host in (f"127.0.0.1:{view.server.port}", "localhost:8000", "LOCALHOST"):
        headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        assert view.raw("GET", "/api/state", headers)[0] == 200
    assert view.raw("OPTIONS", "/api/rows", {"Origin": "http://evil.example"}, token=False)[0] == 403
    assert view.raw("GET", "/api/state", token=False)[0] == 401


def test_the_page_needs_no_token_and_holds_no_data(view: Served) -> None:
    (status, headers, body), (_, others, _) = (view.raw("GET", "/", token=False) for _ in range(2))
    policy = headers["Content-Security-Policy"]
    assert status == 200
    assert view.server.token.encode() not in body
    assert b"{{" not in body
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy != others["Content-Security-Policy"]
    for name, value in (("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")):
        assert headers[name] == value
    assert view.raw("GET", "/api/state")[1]["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    [
        *("/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page.html", "/static/../server.py", "//etc/passwd"),
        *("/api/", "/api/rows/../../etc/passwd", "/api/image/../../etc/passwd", "/api/rows%00", "/favicon.ico"),
    ],
)
def test_there_is_nothing_else(view: Served, path: str) -> None:
    status, _, body = view.raw("GET", path)
    assert status == 404
    assert b"root:" not in body


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "POST"])
def test_there_is_no_other_way_in(view: Served, method: str) -> None:
    assert view.raw(method, "/api/rows", body=b"x")[0] == 405


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"[" * 20_000, "application/json", 413),
        (b"[" * 15_000, "application/json", 400),
        (b"{", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"id": 0, "text": 0, "true": true}', "text/plain", 415),
        (b'{"id": 0, "text": 0}', "application/json", 422),
        (b'{"id": 0, "text": -1, "true": true}', "application/json", 422),
        (b'{"id": 1e99, "text": 0, "true": true}', "application/json", 422),
        (b'{"id": 0, "text": 0, "true": true, "path": "/etc/passwd"}', "application/json", 422),
        (b'{"id": 0, "text": 0, "true": true, "search": {"sort": "id; DROP"}}', "application/json", 422),
        (b'{"id": 99999999999, "text": 0, "true": true}', "application/json", 409),
        (b'{"id": 0, "text": 9, "true": true}', "application/json", 409),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mark_that_cannot_be_is_refused(view: Served, body: bytes, kind: str, status: int) -> None:
    got, _, answer = view.raw("POST", "/api/marks", {"Content-Type": kind}, body)
    assert (got, len(answer) < 500) == (status, True)
    assert json.loads(answer)["error"]
    assert not Path(view.explorer.marks.path).exists()


def test_a_body_without_a_length_is_bounded_too(view: Served) -> None:
    endless = itertools.repeat(b" " * 8192, 100)
    try:
        status = view.raw("POST", "/api/marks", {"Content-Type": "application/json"}, endless)[0]
    except (BrokenPipeError, ConnectionResetError):  # it does not listen to the rest
        status = 413
    assert status == 413
    assert view.get("count") == {"count": 85}


STRINGS = ("text", "url", "reason", "shard")
INJECTIONS = [
    "' OR '1'='1",
    "'; DROP TABLE rows; --",
    '" OR 1=1 --',
    "$text",
    "'||(SELECT text FROM rows LIMIT 1)||'",
    "%",
    "_",
    "\\",
    "x') OR contains(rows.url, 'http",
    "1; COPY rows TO '/tmp/owned.csv'",
    "\x00",
]


@pytest.mark.parametrize("field", STRINGS)
def test_no_text_is_taken_for_sql(view: Served, rows: list[Row], field: str) -> None:
    have = {
        "text": lambda row, word: all(says(row, term) for term in terms(word)),
        "url": lambda row, word: word.lower() in row["url"].lower(),
        "shard": lambda row, word: word in row["shard"],
        "reason": lambda row, word: word in [row["reason"], *(text["reason"] for text in row["texts"])],
    }
    for word in INJECTIONS:
        expected = keys([row for row in rows if have[field](row, word)])
        assert keys(view.rows(**{field: word})) == expected, word
        assert view.get("count", **{field: word}) == {"count": len(expected)}
    assert view.get("count") == {"count": len(rows)}
    assert not Path("/tmp/owned.csv").exists()


@pytest.mark.parametrize("name", [name for name in Search.model_fields if name not in STRINGS])
def test_no_other_value_is_taken_for_sql(view: Served, name: str) -> None:
    for word in ("1 OR 1=1", "' OR ''='", "1); DROP TABLE rows; --", "nan", "1e999", "\x00", "[1]", "1" * 5000):
        status, _, body = view.raw("GET", f"/api/count?{urlencode({name: word})}")
        assert (status, name in json.loads(body)["error"]) == (422, True), (word, body)
    assert view.raw("GET", f"/api/count?{quote('x; DROP')}=1")[0] == 422
    assert view.get("count") == {"count": 85}


def test_the_index_reads_no_other_file(view: Served) -> None:
    with view.explorer.index.cursor() as cursor, pytest.raises(duckdb.PermissionException):
        cursor.execute("SELECT * FROM read_csv('/etc/passwd')")


# --- the index ---


def test_what_is_indexed_is_not_read_again(spec: CurateSpec, tmp_path: Path) -> None:
    output, index = tmp_path / "out", tmp_path / "i.duckdb"
    shutil.copytree(spec.output, output)
    with serving(str(output), tmp_path / "m.parquet", index, version=1) as view:
        assert view.get("count") == {"count": 80}
    names = set()
    for file in (output / "annotations").glob("shard=*/*.parquet"):
        names.add(file.name)
        file.write_bytes(b"\0" * file.stat().st_size)  # whoever reads it fails
    with serving(str(output), tmp_path / "m.parquet", index, version=1) as view:
        assert view.get("count", text="blue")["count"] > 10
    explorer = Explorer(str(output), {}, None, None, str(tmp_path / "m.parquet"), str(index))
    try:
        explorer.index.build()
        with pytest.raises(DatasetError, match=r"the index stops at 0 of \d+ files.*start again"):
            explorer.index.wait()  # all the newest version's files are new
        with explorer.index.cursor() as cursor:
            assert cursor.execute("SELECT count(*) FROM rows").fetchall() == [(0,)]  # what is looked at no more is out
    finally:
        explorer.close()


def test_one_index_serves_whoever_has_it_open(spec: CurateSpec, tmp_path: Path) -> None:
    index = tmp_path / "i.duckdb"
    code = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code, index], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout
    other.stdout.readline()
    try:
        with pytest.raises(DatasetError, match=r"in use by another `capfilt view`.*--index"):
            Explorer(spec.output, {}, None, None, str(tmp_path / "m.parquet"), str(index))
    finally:
        other.communicate()


def test_another_file_is_left_as_it_is(spec: CurateSpec, tmp_path: Path) -> None:
    text, foreign = tmp_path / "text", tmp_path / "foreign.duckdb"
    text.write_text("my notes " * 1000)
    with duckdb.connect(str(foreign)) as connection:
        connection.execute("CREATE TABLE mine AS SELECT 1 AS one")
    for path in (text, foreign):
        before = path.read_bytes()
        with pytest.raises(DatasetError, match=f"{path.name}: .*(--index|delete it)"):
            Explorer(spec.output, {}, None, None, str(tmp_path / "m.parquet"), str(path))
        assert path.read_bytes() == before


def test_versions_that_are_not_there(spec: CurateSpec, tmp_path: Path) -> None:
    marks, index = str(tmp_path / "m.parquet"), str(tmp_path / "i.duckdb")
    with pytest.raises(DatasetError, match="no version 99"):
        Explorer(spec.output, {}, 99, None, marks, index)
    output = tmp_path / "out"
    shutil.copytree(spec.output, output)
    CuratedDataset.for_writing(str(output), {}).vacuum(retain_hours=0)
    with pytest.raises(DatasetError, match=r"version 1 can no longer be looked at: 8 of its 8 files are gone"):
        Explorer(str(output), {}, None, 1, marks, index)


def test_a_port_that_is_taken(view: Served) -> None:
    with pytest.raises(CapfiltError, match=rf"port {view.server.port}: .*--port"):
        Server(view.explorer, view.server.port)


@pytest.mark.slow
def test_a_search_ends_when_its_asker_is_gone(spec: CurateSpec, tmp_path: Path) -> None:
    with serving(spec.output, tmp_path / "m.parquet", tmp_path / "i.duckdb") as view:
        with view.explorer.index.cursor() as cursor:
            cursor.execute(
                "INSERT INTO rows BY NAME SELECT n AS id, 0 AS file, n AS row, repeat(n::VARCHAR || ' abc ', 200) AS "
                "text FROM range(3000000) AS t(n)"
            )
        slow = "/api/count?" + urlencode({"text": "a b c abd"})
        begin = time.monotonic()
        assert view.raw("GET", slow)[0] == 200
        took = time.monotonic() - begin
        assert took > 2, "too fast to be told from one that is interrupted"
        impatient = []
        for _ in range(4):  # as many as are answered at once
            connection = http.client.HTTPConnection("127.0.0.1", view.server.port)
            connection.request("GET", slow, headers={"Authorization": f"Bearer {view.server.token}"})
            impatient.append(connection)
        time.sleep(0.5)
        for connection in impatient:
            connection.close()
        begin = time.monotonic()
        assert view.get("rows", row=7)["rows"] is not None
        assert time.monotonic() - begin < took / 2


# --- elsewhere ---


def test_a_dataset_on_s3(s3: S3, tmp_path: Path) -> None:
    for number in range(2):
        path = write_shard(tmp_path / f"{number}.parquet", [jpeg(100 * number + n) for n in range(20)])
        s3.files().pipe_file(f"data/viewed/{number}.parquet", path.read_bytes())
    source = Input(paths=("s3://data/viewed",), storage_options=s3.options)
    output = {"output": f"s3://data/out/{tmp_path.name}", "output_options": s3.options}
    spec = make_spec(tmp_path, input=source, **output)
    run(spec)
    with serving(spec.output, tmp_path / "m.parquet", tmp_path / "i.duckdb", options=s3.options, against=1) as view:
        assert keys(view.rows()) == keys(read(spec.output, options=s3.options))
        for status in ("kept", "dropped"):
            row = view.rows(status=status)[0]
            got, _, body = image(view, row)
            assert (got, hashlib.sha256(body).hexdigest()) == (200, row["provenance"]["image_sha256"])


def test_the_command_says_where_and_ends_quietly(spec: CurateSpec, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "capfilt", "view", spec.output, "--index", str(tmp_path / "i.duckdb")]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    line = process.stdout.readline()
    port = line.partition("127.0.0.1:")[2].partition("/")[0]
    with urlopen(f"http://127.0.0.1:{port}/") as answer:  # it serves
        assert b"capfilt view" in answer.read()
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=30)
    assert line.startswith("open http://127.0.0.1:")
    assert "/#token=" in line
    assert (rest, errors, process.returncode) == ("", f"capfilt: opening {spec.output}\n", 0)
