"""URLs in, rows out: as many, whatever the web answers, who is killed, or how the list changes."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import MakeSpec, jpeg, read
from PIL import Image
from rich.console import Console
from stubs import load_hash
from typer.testing import CliRunner
from webserver import Page, WebServer

from capfilt.account import Account, kind_of_error
from capfilt.cli import app
from capfilt.errors import CapfiltError, ErrorBudgetError, InputError, LeaseHeldError, SpecError, StoreError
from capfilt.ingest import make_plan, unsettled
from capfilt.lease import Lease
from capfilt.pipelines.curate import curate, in_process
from capfilt.pipelines.fetch import KILLED, Fetched, Task, Writer, _schema, fetch
from capfilt.pipelines.ingest import IngestSummary, ingest
from capfilt.pipelines.processes import Died, Executor, NextTask, Outcome, in_processes, on_ray
from capfilt.shard_store import Store
from capfilt.spec import Download, IngestSpec, Input, Resize, UrlList, load_spec
from capfilt.url_shards import ShardName, cut, name_rows

HERE = {"allow_private": ["127.0.0.1/32"]}
QUIET = Console(file=io.StringIO())


def write_list(path: Path, urls: Sequence[str | None], texts: Sequence[str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [f"text of {url}" for url in urls] if texts is None else texts
    pq.write_table(pa.table({"url": pa.array(urls, pa.string()), "caption": list(texts)}), path)
    return path


def make(tmp_path: Path, **fields: Any) -> IngestSpec:
    source = {"urls": {"paths": [str(tmp_path / "lists")]}, "output": str(tmp_path / "out")}
    return IngestSpec.model_validate({"kind": "ingest", **source, "processes": 1, **fields})


def stored(output: str) -> list[dict[str, Any]]:
    """Every row of an output's shards, as any reader of Parquet sees them."""
    return [row for path in sorted(Path(output).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


# --- cutting lists ---


def table(words: str) -> pa.Table:
    return pa.table({"url": list(words)})


def cuts(words: str, known: Sequence[ShardName] = (), shard_rows: int = 4) -> list[str]:
    """A list of one-letter URLs, cut; read in pieces of three."""
    tables = (table(words[at : at + 3]) for at in range(0, len(words), 3))
    return ["".join(shard.table["url"].to_pylist()) for shard in cut(tables, known, shard_rows)]


def names(*words: str) -> list[ShardName]:
    return [shard.name for word in words for shard in cut(iter([table(word)]), [], 100)]


@pytest.mark.parametrize(
    ("words", "known", "expected"),
    [
        ("", (), []),
        ("abc", (), ["abc"]),
        ("abcdefghij", (), ["abcd", "efgh", "ij"]),
        ("abcdefghijkl", ("abcd", "efgh", "ij"), ["abcd", "efgh", "ij", "kl"]),  # appended
        ("abcdefghijkl", ("abcd", "efgh", "ij", "kl"), ["abcd", "efgh", "ij", "kl"]),  # nothing new
        ("xyabcdefgh", ("abcd", "efgh"), ["xy", "abcd", "efgh"]),  # put before
        ("abcdxyefgh", ("abcd", "efgh"), ["abcd", "xy", "efgh"]),  # put between
        ("abxycdefgh", ("abcd", "efgh"), ["abxy", "cd", "efgh"]),  # put within
        ("efghabcd", ("abcd", "efgh"), ["efgh", "abcd"]),  # another order
        ("abcdgh", ("abcd", "efgh"), ["abcd", "gh"]),  # taken out
        ("abcd", ("abcd", "ab"), ["abcd"]),  # the longest
        ("abcx", ("abcd", "ab"), ["ab", "cx"]),
        ("abab", ("ab",), ["ab", "ab"]),  # twice
        ("abcdefghij", ("abcdefghij",), ["abcdefghij"]),  # of a larger shard_rows
    ],
)
def test_a_changed_list_keeps_the_shards_it_had(words: str, known: Sequence[str], expected: list[str]) -> None:
    assert cuts(words, names(*known)) == expected


def test_any_change_of_any_list_loses_no_row() -> None:
    rng = random.Random(0)
    known: set[ShardName] = set()
    words = "".join(rng.choices("abcdefgh", k=40))
    for _ in range(60):
        at, length = rng.randrange(len(words) + 1), rng.randrange(6)
        words = words[:at] + "".join(rng.choices("abcdefgh", k=rng.randrange(6))) + words[at + length :]
        found = cuts(words, list(known))
        assert "".join(found) == words
        assert cuts(words, names(*found)) == found
        known |= set(names(*found))


def test_a_name_tells_rows_and_content_and_is_read_back() -> None:
    (one,) = names("abc")
    assert ShardName.parse(one.file) == one
    assert ShardName.parse(str(one) + "-2.parquet") == ShardName(3, one.first, one.digest, 2)
    assert one.rows == 3
    assert len({name.digest for name in names("abc", "abd", "ab", "bac")}) == 4
    assert [ShardName.parse(name) for name in ("00000.parquet", "x", f"{one}.parquet.tmp")] == [None] * 3
    captions = [pa.table({"caption": [text], "url": ["u"]}) for text in ("a", None)]
    assert len({next(cut(iter([one]), [], 9)).name.digest for one in captions}) == 2


def test_halves_are_shards_of_their_own() -> None:
    (shard,) = cut(iter([table("abcde")]), [], 9)
    halves = shard.halves()
    assert ["".join(half.table["url"].to_pylist()) for half in halves] == ["ab", "cde"]
    assert [half.name for half in halves] == names("ab", "cde")
    assert name_rows([b"x" * 16]).rows == 1


REFUSED = "{} is refused: {} is not a public address (loopback)"


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        (["HTTP Error 404: Not Found", "HTTP Error 404: Gone fishing"], "HTTP Error 404"),
        (["IncompleteRead(10 bytes read, 990 more expected)", "IncompleteRead(7 bytes read, 1 more expected)"], None),
        ([REFUSED.format("a.b", "::1"), REFUSED.format("localhost", "127.0.0.1")], REFUSED.format("…", "…")),
        (["<urlopen error [Errno 111] Connection refused>"], "<urlopen error [Errno …] Connection refused>"),
        (["Redirection to url 'file:///x' is not allowed", "Redirection to url 'ftp://y' is not allowed"], None),
        ([""], "no message"),
    ],
)
def test_errors_are_counted_by_kind(messages: list[str], kind: str | None) -> None:
    kinds = {kind_of_error(message) for message in messages}
    assert len(kinds) == 1
    assert kind is None or kinds == {kind}


# --- the driver, with an executor that asks no web ---


class Pretend:
    """Fetches by a function from URL to status; the process dies over URLs that say so."""

    def __init__(self, status: Callable[[str], str] = lambda _: "success") -> None:
        self.status = status
        self.fetched: list[str] = []
        self.deaths = 0

    def __call__(self, spec: IngestSpec, next_task: NextTask) -> Iterator[tuple[Task, Outcome]]:
        while (task := next_task()) is not None:
            yield task, self.outcome(spec, task)

    def outcome(self, spec: IngestSpec, task: Task) -> Outcome:
        if task.fatal:
            return fetch(spec, task.shard, fatal=True)
        urls = task.shard.table["url"].to_pylist()
        if any("poison" in url for url in urls):
            self.deaths += 1
            return Died
        store = Store(spec.output, spec.output_options)
        path = Path(spec.output) / "_attempts" / "1"
        path.parent.mkdir(exist_ok=True)
        writer = Writer(str(path), spec, task.shard, _schema(spec, task.shard))
        for position, row in enumerate(task.shard.table.to_pylist()):
            status = self.status(row["url"])
            meta = dict.fromkeys(_schema(spec, task.shard).names) | row | {"status": status}
            good = status == "success"
            writer.write(
                jpeg(1) if good else None, str(position), None, meta | {"error_message": None if good else "no"}
            )
        writer.close()
        store.publish(str(path), task.shard.name)
        self.fetched += urls
        return Fetched(task.shard.name, writer.account, 1, 0.1)


def run(spec: IngestSpec, execute: Any = None) -> IngestSummary:
    return ingest(spec, execute=execute or Pretend(), console=QUIET)


def urls_of(*numbers: int) -> list[str]:
    return [f"http://a.example/{number}" for number in numbers]


def test_a_list_that_grows_has_only_what_is_new_fetched(tmp_path: Path) -> None:
    spec = make(tmp_path, shard_rows=10)
    write_list(tmp_path / "lists" / "0.parquet", urls_of(*range(25)))
    first = run(spec, one := Pretend())
    assert (first.rows, first.fetched_shards, len(one.fetched)) == (25, 3, 25)
    write_list(tmp_path / "lists" / "0.parquet", urls_of(*range(32)))
    write_list(tmp_path / "lists" / "1.parquet", urls_of(100, 101))
    plan = make_plan(spec)
    assert list(plan.lines()) == [
        "34 URLs in 2 lists",
        "fetch 9 URLs, in 2 shards",
        "leave 25 URLs, in 3 shards: on record",
    ]
    second = run(spec, two := Pretend())
    assert two.fetched == urls_of(*range(25, 32), 100, 101)
    assert (second.rows, second.account.rows, second.kept_shards, second.stale) == (34, 34, 3, 0)
    assert sorted(row["url"] for row in stored(spec.output)) == sorted(urls_of(*range(32), 100, 101))
    third = run(spec, three := Pretend())
    assert (three.fetched, third.fetched_shards, third.account.rows) == ([], 0, 34)
    keys = [row["key"] for row in stored(spec.output)]
    assert len(set(keys)) == 34


def test_rows_that_left_the_list_are_kept_out_of_the_way(tmp_path: Path) -> None:
    spec = make(tmp_path, shard_rows=10)
    path = write_list(tmp_path / "lists" / "0.parquet", urls_of(*range(30)))
    run(spec)
    write_list(path, [*urls_of(*range(20)), *urls_of(*range(21, 30))])
    assert "move 1 shard to _stale/: the list no longer has their rows as they were" in make_plan(spec).lines()
    summary = run(spec)
    assert (summary.stale, summary.rows) == (1, 29)
    assert sorted(row["url"] for row in stored(spec.output)) == sorted(urls_of(*range(20), *range(21, 30)))
    assert len(stored(str(Path(spec.output) / "_stale"))) == 10


def test_the_same_rows_twice_are_rows_twice(tmp_path: Path) -> None:
    spec = make(tmp_path)
    for name in ("0", "1"):
        write_list(tmp_path / "lists" / f"{name}.parquet", urls_of(1, 2, 1))
    assert run(spec).account.rows == 6
    rows = stored(spec.output)
    assert Counter(row["url"] for row in rows) == {urls_of(1)[0]: 4, urls_of(2)[0]: 2}
    assert len({row["key"] for row in rows}) == 6
    assert run(spec, again := Pretend()).rows == 6
    assert again.fetched == []


def test_a_shard_that_is_cut_short_is_fetched_again(tmp_path: Path) -> None:
    spec = make(tmp_path, shard_rows=5)
    write_list(tmp_path / "lists" / "0.parquet", urls_of(*range(10)))
    run(spec)
    first, second = sorted(Path(spec.output).glob("*.parquet"))
    first.write_bytes(first.read_bytes()[:-20])
    second.write_bytes(b"")
    assert run(spec, again := Pretend()).account.rows == 10
    assert len(again.fetched) == 10
    assert len(stored(spec.output)) == 10


def test_too_many_failures_are_told_and_fetched_again(tmp_path: Path) -> None:
    """A night without a network: the next run fetches what failed then, and leaves what did not."""
    spec = make(tmp_path, shard_rows=10, max_error_fraction=0.3)
    write_list(tmp_path / "lists" / "0.parquet", urls_of(*range(30)))

    def dead(url: str) -> str:
        return "success" if int(url.rpartition("/")[2]) < 12 else "failed_to_download"

    with pytest.raises(ErrorBudgetError, match=r"18 of 30 URLs have no image, 60\.0%: over .* 30\.0%\. .*: no 18"):
        run(spec, Pretend(dead))
    assert Counter(row["status"] for row in stored(spec.output)) == {"success": 12, "failed_to_download": 18}
    report = json.loads((tmp_path / "out" / "_ingest" / "report.json").read_text())
    assert report["all"]["statuses"] == {"success": 12, "failed_to_download": 18}
    assert report["outcome"].startswith("ErrorBudgetError")
    assert any(line.startswith("of these, 2 shards again: too many") for line in make_plan(spec).lines())
    summary = run(spec, again := Pretend())
    assert again.fetched == urls_of(*range(10, 30))
    assert summary.account.statuses == {"success": 30}
    assert len(stored(spec.output)) == 30
    assert run(spec.model_copy(update={"max_error_fraction": 1.0}), Pretend()).fetched_shards == 0


def test_a_sick_run_stops_early(tmp_path: Path) -> None:
    spec = make(tmp_path, shard_rows=2_000)
    write_list(tmp_path / "lists" / "0.parquet", urls_of(*range(30_000)))
    with pytest.raises(ErrorBudgetError, match="10,000 of 10,000 URLs have no image"):
        run(spec, Pretend(lambda _: "failed_to_download"))


def test_a_row_that_kills_its_process_costs_one_row(tmp_path: Path) -> None:
    spec = make(tmp_path, shard_rows=16)
    urls = urls_of(*range(40))
    urls[21] = "http://a.example/poison"
    write_list(tmp_path / "lists" / "0.parquet", urls)
    summary = run(spec, execute := Pretend())
    assert summary.account.statuses == {"success": 39, "failed_to_resize": 1}
    assert summary.account.errors == {KILLED: 1}
    assert execute.deaths == 6  # of 16 twice, 8, 4, 2, 1
    rows = {row["url"]: row for row in stored(spec.output)}
    assert sorted(rows) == sorted(urls)
    assert (rows[urls[21]]["status"], rows[urls[21]]["error_message"]) == ("failed_to_resize", KILLED)
    again = run(spec, execute := Pretend())
    assert (execute.deaths, execute.fetched, again.account.rows) == (0, [], 40)


def test_the_same_row_that_kills_twice_is_two_rows(tmp_path: Path) -> None:
    urls = ["http://a.example/poison"] * 4 + urls_of(1, 1)
    write_list(tmp_path / "lists" / "0.parquet", urls)
    spec = make(tmp_path, max_error_fraction=0.9)
    for _ in range(2):
        assert run(spec).account.statuses == {"success": 2, "failed_to_resize": 4}
    assert sorted(row["url"] for row in stored(spec.output)) == sorted(urls)


@pytest.mark.parametrize(
    ("accounts", "again"),
    [
        ({(1000, 0): 499}, []),
        ({(1000, 0): 501}, [(1000, 0)]),
        ({(1000, 0): 0, (1000, 1): 1000}, [(1000, 1)]),  # an hour without a network
        ({(1000, 0): 0, (99, 0): 99, (1, 0): 1}, []),  # too few to tell
        ({(100, 0): 0, (99, 0): 99, (4, 0): 4, (2, 0): 0}, [(99, 0), (4, 0)]),  # but of a sick whole
        ({(10, 0): None, (10, 1): 0}, [(10, 0)]),
        ({}, []),
    ],
)
def test_what_is_fetched_again(accounts: dict[tuple[int, int], int | None], again: list[tuple[int, int]]) -> None:
    """(rows, a number): how many failed, or None of a file that cannot be read; more than half is too much."""

    def name(key: tuple[int, int]) -> ShardName:
        return ShardName(key[0], "00000000", f"{key[1]:032x}")

    there = {
        name(key): None if failed is None else Account(Counter(success=key[0] - failed, failed_to_download=failed))
        for key, failed in accounts.items()
    }
    assert unsettled(there, 0.5) == {name(key) for key in again}


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    spec = make(tmp_path)
    write_list(tmp_path / "lists" / "0.parquet", urls_of(1))
    run(spec)
    other = make(tmp_path, resize={"image_size": 256}, download={"thread_count": 7, "timeout": 3})
    with pytest.raises(SpecError, match=r"other settings: resize\.image_size was 512 and is 256\. Set these back, or"):
        run(other)
    with pytest.raises(SpecError, match=r"resize\.image_size"):
        make_plan(other)
    assert run(make(tmp_path, download={"thread_count": 7, "timeout": 3, "retries": 2})).kept_shards == 1


def test_a_run_that_holds_the_output_is_left_alone(tmp_path: Path) -> None:
    spec = make(tmp_path)
    write_list(tmp_path / "lists" / "0.parquet", urls_of(1))
    with Lease(spec.output, {}, "other"), pytest.raises(LeaseHeldError, match="held by run other"):
        run(spec)
    assert stored(spec.output) == []


def test_what_lies_in_the_output_is_no_list(tmp_path: Path) -> None:
    """Shards have URLs, too."""
    spec = make(tmp_path, urls={"paths": [str(tmp_path)]})
    write_list(tmp_path / "0.parquet", urls_of(1, 2))
    for _ in range(2):
        assert run(spec).rows == 2
    (tmp_path / "0.parquet").unlink()
    with pytest.raises(InputError, match=r"every file of urls\.paths lies in the output"):
        run(spec)


def test_processes_that_die_whatever_they_do_end_the_run(tmp_path: Path) -> None:
    write_list(tmp_path / "lists" / "0.parquet", urls_of(*range(1000)))

    def execute(_: IngestSpec, next_task: NextTask) -> Iterator[tuple[Task, Outcome]]:
        while (task := next_task()) is not None:
            yield task, Died

    with pytest.raises(CapfiltError, match="200 processes died one after the other, and none finished a shard"):
        run(make(tmp_path), execute)
    assert stored(str(tmp_path / "out")) == []


def test_a_mistyped_list_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no URL list there"):
        run(make(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_is_no_failure_of_a_url(tmp_path: Path) -> None:
    """img2dataset takes what its writer raises for the row's fault, and goes on."""
    spec = make(tmp_path)
    (shard,) = cut(iter([table("ab")]), [], 9)
    writer = Writer(str(tmp_path / "file"), spec, shard, _schema(spec, shard))
    meta = dict.fromkeys(_schema(spec, shard).names) | {"url": "a", "status": "success"}
    writer._writer.close()
    with pytest.raises(StoreError, match="cannot be written"):
        writer.write(b"x" * 10_000_000, "0", None, meta)
    writer.write(b"x", "1", None, meta)
    with pytest.raises(StoreError, match="cannot be written"):
        writer.close()


def test_accounts_add_up_and_go_through_a_footer() -> None:
    one = Account(Counter(success=3, failed_to_download=1), Counter({"HTTP Error 404": 1}))
    assert Account.from_json((one + one).to_json()) == one + one
    assert ((one + one).rows, (one + one).failed) == (8, 2)
    assert [one.over(fraction) for fraction in (0, 0.24, 0.25, 1)] == [True, True, False, False]
    assert not Account().over(0)


def test_an_output_in_an_object_store(tmp_path: Path, s3: Any) -> None:
    write_list(tmp_path / "lists" / "0.parquet", urls_of(*range(6)))
    spec = make(tmp_path, output="s3://data/ingested", output_options=s3.options, shard_rows=3)

    def execute(spec: IngestSpec, next_task: NextTask) -> Iterator[tuple[Task, Outcome]]:
        while (task := next_task()) is not None:
            yield task, fetch(spec, task.shard, fatal=True)

    spec = spec.model_copy(update={"max_error_fraction": 1.0})
    assert run(spec, execute).account.rows == 6
    files = s3.files()
    found = [name for name in files.find("data/ingested") if name.endswith(".parquet")]
    assert len(found) == 2
    assert sum(pq.read_table(files.open(name)).num_rows for name in found) == 6
    assert run(spec, execute).kept_shards == 2
    write_list(tmp_path / "lists" / "0.parquet", urls_of(*range(3)))
    assert run(spec, execute).stale == 1
    assert len(files.glob("data/ingested/_stale/*.parquet")) == 1


def test_check_and_plan_say_what_is_there(tmp_path: Path) -> None:
    write_list(tmp_path / "lists" / "0.parquet", urls_of(*range(5)))
    path = spec_file(tmp_path, shard_rows=3)
    runner = CliRunner()
    checked = runner.invoke(app, ["check", str(path)])
    assert checked.exit_code == 0, checked.output
    assert "lists: 1 of parquet, url=url caption=caption; the first is" in " ".join(checked.output.split())
    assert runner.invoke(app, ["plan", str(path)]).output.splitlines() == [
        "5 URLs in 1 list",
        "fetch 5 URLs, in 2 shards",
        "leave 0 URLs, in 0 shards: on record",
    ]
    assert not (tmp_path / "out").exists()
    run(make(tmp_path, shard_rows=3))
    assert runner.invoke(app, ["plan", str(path)]).output.splitlines()[1:] == [
        "nothing to fetch",
        "leave 5 URLs, in 2 shards: on record",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"urls": {"paths": ["x"], "save_additional_columns": ["url"]}},
            "the output has columns of these names itself",
        ),
        ({"urls": {"paths": ["x"], "save_additional_columns": ["a", "a"]}}, "named twice: a"),
        ({"resize": {"encode_format": "png"}}, "encode_quality: of png it is the compression, 0 to 9"),
        ({"resize": {"resize_mode": "crop"}}, "resize.resize_mode: Input should be 'no', 'keep_ratio'"),
        ({"download": {"allow_privat": True}}, "did you mean allow_private?"),
        ({"download": {"allow_private": ["10.0.0.1/8"]}}, "has host bits set"),
        (
            {"download": {"compute_hash": None}, "urls": {"paths": ["x"], "verify_hash_col": "h"}},
            "give download.compute",
        ),
        ({"output_options": {"password": "hunter2"}}, "looks like a secret"),
    ],
)
def test_what_is_wrong_in_a_spec_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    data = {"kind": "ingest", "urls": {"paths": ["lists"]}, "output": "out", **fields}
    (tmp_path / "ingest.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(SpecError) as caught:
        load_spec(tmp_path / "ingest.yaml")
    assert message in str(caught.value)


# --- img2dataset, in a process of its own, on a real web ---


def picture(side: int, format_: str = "JPEG", seed: int = 0) -> bytes:
    image = Image.radial_gradient("L").resize((side, side + seed)).convert("RGB")
    out = io.BytesIO()
    image.save(out, format_)
    return out.getvalue()


def bomb() -> bytes:
    """A PNG of a few kilobytes that claims to be of 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (100_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    body = zlib.compress(b"\0" * 1_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


PICTURE = picture(640)
BAD, NONE = "failed_to_resize", "failed_to_download"


def web(forbidden: str) -> dict[str, tuple[Page, str, str]]:
    """By path: what is answered, what must become of it, and how its message begins."""
    jpg, text, opted_out = "image/jpeg", "text/html", "Use of image disallowed by X-Robots-Tag"

    def tagged(value: str) -> Page:
        return Page(PICTURE, jpg, headers={"X-Robots-Tag": value})

    def leads(to: str) -> Page:
        return Page(b"", text, 302, headers={"Location": to})

    zipped = Page(gzip.compress(b"\0" * 10**7), jpg, headers={"Content-Encoding": "gzip"})
    page = {
        "good": (Page(PICTURE, jpg), "success", ""),
        "small": (Page(picture(60), jpg), "success", ""),
        "png": (Page(picture(100, "PNG"), "image/png"), "success", ""),
        "webp-as-jpeg": (Page(picture(100, "WEBP"), jpg), "success", ""),
        "late": (Page(PICTURE, jpg, delay=0.3), "success", ""),
        "moved": (leads("/good"), "success", ""),
        "noindex-of-another": (tagged("otherbot: noindex"), "success", ""),
        "noai": (tagged("noai"), NONE, opted_out),
        "noimageai": (tagged("all, noimageai"), NONE, opted_out),
        "ours": (tagged("capfilt-test: noindex"), NONE, opted_out),
        "html": (Page(b"<html>sorry</html>", text), BAD, "not_an_image: looks like HTML"),
        "html-as-jpeg": (Page(b"<!DOCTYPE html>", jpg), BAD, "not_an_image: looks like HTML"),
        "nothing": (Page(b"", jpg), BAD, "empty_image"),
        "cut-picture": (Page(PICTURE[:200], jpg), BAD, ""),
        "cut": (Page(PICTURE, jpg, sent=500), NONE, "IncompleteRead(500 bytes read"),
        "gzip-bomb": (zipped, BAD, "not_an_image"),
        "png-bomb": (Page(bomb(), "image/png"), BAD, "too_many_pixels"),
        "huge": (Page(b"\xff\xd8\xff" + b"x" * 3_000_000, jpg), NONE, "more than 1,000,000 bytes"),
        "lying": (Page(PICTURE, jpg, claimed=str(10**12)), NONE, "more than 1,000,000 bytes"),
        "stall": (Page(PICTURE, jpg, delay=4.2), NONE, "nothing came for 3.5 s"),
        "drip": (Page(PICTURE[:100], jpg, drip=0.1), NONE, "took longer than 5.5 s in all"),
        "circle": (leads("/circle"), NONE, "HTTP Error 302"),
        "to-file": (leads("file:///etc/passwd"), NONE, "HTTP Error 302: Found - Redirection"),
        "to-private": (leads(f"{forbidden}/secret.jpg"), NONE, "127.0.0.2 is refused: 127.0.0.2 is not"),
        **{str(code): (Page(b"no", text, code), NONE, f"HTTP Error {code}") for code in (403, 404, 429, 500)},
    }
    return {f"/{path}": answer for path, answer in page.items()}


@pytest.fixture(scope="module")
def forbidden() -> Iterator[WebServer]:
    with WebServer({"/secret.jpg": Page(PICTURE, "image/jpeg")}, host="127.0.0.2") as server:
        yield server


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, forbidden: WebServer) -> tuple[IngestSpec, IngestSummary, WebServer]:
    """A list with every kind of answer, twice each, and URLs that are none; fetched in one process."""
    pytest.importorskip("img2dataset", reason="img2dataset is not installed: install the extra 'ingest'")
    root = tmp_path_factory.mktemp("ingest")
    answers = web(forbidden.url)
    with WebServer({path: page for path, (page, _, _) in answers.items()}) as server:
        urls: list[str | None] = [f"{server.url}{path}?{n}" for n in range(2) for path in answers]
        urls += [None, "", "no url", "file:///etc/passwd", "ftp://127.0.0.1/x", f"{forbidden.url}/secret.jpg"]
        urls += ["http://[::ffff:127.0.0.2]/x.jpg", "http://169.254.169.254/latest/meta-data/", "http://ü.invalid/é"]
        write_list(root / "lists" / "0.parquet", urls, [f"caption {n}" for n in range(len(urls))])
        spec = make(
            root,
            max_error_fraction=0.9,
            resize={"image_size": 256},
            download={
                **{"timeout": 3.5, "total_timeout": 5.5, "max_bytes": 1_000_000, "thread_count": 40, **HERE},
                "user_agent_token": "capfilt-test",
            },
        )
        summary = ingest(spec, console=QUIET)
    return spec, summary, server


Ran = tuple[IngestSpec, IngestSummary, WebServer]


def test_every_url_is_a_row_with_what_became_of_it(ran: Ran, forbidden: WebServer) -> None:
    spec, summary, server = ran
    rows = stored(spec.output)
    answers = web(forbidden.url)
    assert len(rows) == summary.rows == summary.account.rows == 2 * len(answers) + 9
    assert Counter(row["status"] for row in rows) == summary.account.statuses
    listed = pq.read_table(Path(spec.urls.paths[0]) / "0.parquet").to_pylist()
    assert Counter((row["url"], row["caption"]) for row in rows) == Counter((r["url"], r["caption"]) for r in listed)
    for row in rows:
        path = (row["url"] or "").removeprefix(server.url).partition("?")[0]
        _, status, message = answers.get(path, (None, NONE, ""))
        assert row["status"] == status, row
        assert (row["error_message"] or "").startswith(message), row
        assert (row["jpg"] is not None) == (status == "success"), row


def test_nothing_private_was_asked(ran: Ran, forbidden: WebServer) -> None:
    rows = {row["url"]: row["error_message"] for row in stored(ran[0].output)}
    assert forbidden.asked == []
    assert rows["file:///etc/passwd"] == "<urlopen error unknown url type: file>"
    assert rows["ftp://127.0.0.1/x"] == "<urlopen error unknown url type: ftp>"
    for url in (f"{forbidden.url}/secret.jpg", "http://[::ffff:127.0.0.2]/x.jpg"):
        assert "is not a public address (loopback)" in rows[url]
    assert "(link-local)" in rows["http://169.254.169.254/latest/meta-data/"]


def test_images_are_as_asked_for(ran: Ran) -> None:
    spec, _, server = ran
    for row in stored(spec.output):
        if row["status"] == "success":
            image = Image.open(io.BytesIO(row["jpg"]))
            assert (image.format, image.size) == ("JPEG", (row["width"], row["height"]))
            assert min(row["original_width"], row["original_height"]) in (60, 100, 640)
            assert min(image.size) == min(256, row["original_width"], row["original_height"])
    good = next(row for row in stored(spec.output) if row["url"] == f"{server.url}/good?0")
    assert good["sha256"] == hashlib.sha256(PICTURE).hexdigest()


def test_its_account_is_in_the_report_and_in_every_shard(ran: Ran) -> None:
    spec, summary, _ = ran
    report = json.loads((Path(spec.output) / "_ingest" / "report.json").read_text())
    assert (report["outcome"], report["rows"], report["all"]["rows"]) == ("done", summary.rows, summary.rows)
    assert report["all"]["statuses"] == dict(summary.account.statuses)
    accounts = Store(spec.output, {}).shards()
    assert all(account is not None and account.rows == name.rows for name, account in accounts.items())
    assert sum((account for account in accounts.values() if account), Account()) == summary.account
    assert not (Path(spec.output) / "_attempts").exists() or not list((Path(spec.output) / "_attempts").iterdir())


def test_curate_reads_it_as_it_is(ran: Ran, make_spec: MakeSpec) -> None:
    spec, summary, _ = ran
    curated = make_spec(input=Input(paths=(spec.output,)), max_error_fraction=0.0)
    assert curate(curated, load=load_hash, execute=in_process, console=QUIET).failures == {}
    rows = read(curated.output)
    assert len(rows) == summary.rows
    images = sum(row["reason"] != "no_image" for row in rows)
    assert images == summary.account.statuses["success"]
    notes = Counter((row["note"] or "").partition(":")[0] for row in rows if row["reason"] == "no_image")
    assert notes == summary.account.statuses - Counter(success=images)


def test_the_run_goes_on_where_it_was(ran: Ran) -> None:
    """And what was fetched stays byte for byte; the server is gone by now, so nothing can be asked."""
    spec, summary, _ = ran
    before = {path.name: path.read_bytes() for path in Path(spec.output).glob("*.parquet")}
    again = ingest(spec, console=QUIET)
    assert (again.fetched_shards, again.account) == (0, summary.account)
    assert {path.name: path.read_bytes() for path in Path(spec.output).glob("*.parquet")} == before


# --- proofs that take longer ---

CAPFILT = [sys.executable, "-c", "from capfilt.cli import main; main()"]


def spec_file(tmp_path: Path, **fields: Any) -> Path:
    data = make(tmp_path, **fields).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "ingest.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "ingest.yaml"


def capfilt(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [*CAPFILT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture
def pictures() -> Iterator[WebServer]:
    """400 pictures, each a little late."""
    pages = {f"/{n}": Page(picture(64, seed=n % 7), "image/jpeg", delay=0.05) for n in range(400)}
    with WebServer(pages) as server:
        yield server


@pytest.mark.slow
def test_a_user_goes_through_every_command(tmp_path: Path, pictures: WebServer) -> None:
    with (tmp_path / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["URL", "TEXT"])
        writer.writerows([f"{pictures.url}/{n}", f"picture {n}"] for n in range(30))
    path = spec_file(tmp_path, urls={"paths": [str(tmp_path / "list.csv")]}, download=HERE, shard_rows=20)
    checked = capfilt("check", path)
    assert checked.returncode == 0, checked.stderr
    assert f"lists: 1 of csv, url=URL caption=TEXT; the first is {tmp_path}/list.csv" in checked.stdout
    assert "allow_private" in checked.stdout
    planned = capfilt("plan", path)
    assert planned.returncode == 0, planned.stderr
    assert "30 URLs in 1 list\nfetch 30 URLs, in 2 shards" in planned.stdout
    assert not (tmp_path / "out").exists()
    done = capfilt("run", path)
    assert done.returncode == 0, done.stderr
    assert "accounted for: 30" in done.stdout
    assert "success (100.0%)" in done.stdout
    assert "nothing to fetch\nleave 30 URLs, in 2 shards: on record" in capfilt("plan", path).stdout
    with (tmp_path / "list.csv").open("a", newline="") as file:
        csv.writer(file).writerows([f"{pictures.url}/gone/{n}", "none"] for n in range(40))
    over = capfilt("run", path)
    assert over.returncode == 3, over.stderr
    assert "40 of 70 URLs have no image" in over.stderr
    assert "HTTP Error 404 40" in over.stderr
    assert capfilt("run", path, "--set", "resize.image_size=9").returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_the_same_command_goes_on(tmp_path: Path, pictures: WebServer, seed: int) -> None:
    urls = [f"{pictures.url}/{n}" for n in range(400)]
    write_list(tmp_path / "lists" / "0.parquet", urls)
    path = spec_file(tmp_path, download={"thread_count": 4, **HERE}, shard_rows=25, processes=2)
    out, kills = tmp_path / "out", 0
    for attempt in range(6):
        before = len(list(out.glob("*.parquet")))
        process = subprocess.Popen([*CAPFILT, "run", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while process.poll() is None and len(list(out.glob("*.parquet"))) < before + 2 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(random.Random(10 * seed + attempt).random() * 0.5)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        for file in out.glob("*.parquet"):
            assert pq.ParquetFile(file).metadata.num_rows == 25  # never half a shard
    assert kills >= 3
    asked = len(pictures.asked)
    done = capfilt("run", path)
    assert done.returncode == 0, done.stderr
    rows = stored(str(out))
    assert sorted(row["url"] for row in rows) == sorted(urls)
    assert {row["status"] for row in rows} == {"success"}
    assert len(pictures.asked) - asked < 400
    assert not list((out / "_attempts").iterdir()) if (out / "_attempts").exists() else True


@pytest.mark.slow
def test_a_process_that_is_killed_is_begun_anew(tmp_path: Path, pictures: WebServer) -> None:
    write_list(tmp_path / "lists" / "0.parquet", [f"{pictures.url}/{n}" for n in range(60)])
    spec = make(tmp_path, download={"thread_count": 4, **HERE}, shard_rows=20)
    killed: list[int] = []

    def execute(spec: IngestSpec, next_task: NextTask) -> Iterator[tuple[Task, Outcome]]:
        import multiprocessing

        for ended in in_processes(spec, next_task):
            if not killed:
                (child,) = multiprocessing.active_children()
                assert child.pid is not None
                killed.append(child.pid)
                os.kill(child.pid, signal.SIGKILL)
            yield ended

    summary = ingest(spec, execute=execute, console=QUIET)
    assert killed
    assert summary.account.statuses == {"success": 60}


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_ray_s_workers_are_held_to_the_same(tmp_path: Path, forbidden: WebServer, pictures: WebServer) -> None:
    asked = len(forbidden.asked)
    urls = [f"{pictures.url}/{n}" for n in range(30)] + [f"{forbidden.url}/secret.jpg?{n}" for n in range(3)]
    write_list(tmp_path / "lists" / "0.parquet", urls)
    spec = make(tmp_path, download=HERE, shard_rows=10, ray={"address": "auto"}, processes=2)
    summary = ingest(spec, console=QUIET)
    assert summary.account.statuses == {"success": 30, "failed_to_download": 3}
    assert len(forbidden.asked) == asked
    assert sorted(row["url"] for row in stored(spec.output)) == sorted(urls)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("execute", [in_processes, on_ray], ids=["processes", "ray"])
def test_options_reach_img2dataset(tmp_path: Path, execute: Executor) -> None:
    raw = picture(100, "PNG")
    pages = {"/a": Page(raw, "image/png"), "/b": Page(raw, "image/png"), "/c": Page(picture(40), "image/jpeg")}
    with WebServer(pages) as server:
        listed = {
            "link": [f"{server.url}/{path}" for path in "abcd"],
            "alt": ["a", "b", "c", "d"],
            "hash": [hashlib.sha256(raw).hexdigest(), "0" * 64, None, None],
            "licence": ["cc0", None, "by", "by"],
        }
        (tmp_path / "lists").mkdir()
        pq.write_table(pa.table(listed), tmp_path / "lists" / "0.parquet")
        source = UrlList(
            paths=(str(tmp_path / "lists"),),
            url_col="link",
            caption_col="alt",
            verify_hash_col="hash",
            save_additional_columns=("licence",),
        )
        resize = Resize(disable_all_reencoding=True, encode_format="png", encode_quality=1)
        download = Download(retries=2, extract_exif=False, allow_private=True)
        spec = make(tmp_path).model_copy(update={"urls": source, "resize": resize, "download": download})
        spec = spec.model_copy(update={"max_error_fraction": 1.0})
        ingest(spec, execute=execute, console=QUIET)
    rows = {row["url"][-1]: row for row in stored(spec.output)}
    assert [(rows[name]["status"], rows[name]["error_message"], rows[name]["licence"]) for name in "abcd"] == [
        ("success", None, "cc0"),
        (NONE, "hash mismatch", None),
        (NONE, "hash mismatch", "by"),
        (NONE, "HTTP Error 404: Not Found", "by"),
    ]
    assert (rows["a"]["png"], rows["a"]["sha256"], rows["a"]["width"]) == (raw, listed["hash"][0], 100)
    assert "exif" not in rows["a"]
    assert Counter(server.asked) == {"/a": 1, "/b": 1, "/c": 1, "/d": 3}
