"""Reports: their numbers are the table's, their pictures the rows', and what strangers wrote stays text."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import jpeg, read, write_shard
from curated_web import HOSTILE, ROWS, SHARDS, cards, curate_web, make_web
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from capfilt.cli import app
from capfilt.dataset import CuratedDataset
from capfilt.decide import FilterScore, Text, decide, row_outcome
from capfilt.errors import CapfiltError, DatasetError, InputError
from capfilt.pipelines import leave_report
from capfilt.pipelines.curate import Summary, in_process
from capfilt.pipelines.job import Job, LoadModels
from capfilt.receipts import Receipt
from capfilt.records import earlier
from capfilt.report import AT_END, Limits, Report, make_report, report
from capfilt.report.captions import Captions, Counted, measure_captions
from capfilt.report.drift import alarms, shifts, stability_index
from capfilt.report.gallery import choose_rows
from capfilt.report.judged import truth_at
from capfilt.report.numbers import compare
from capfilt.report.page import MOST, PLOT_STYLE
from capfilt.report.pictures import Budget, Pictures
from capfilt.report.statistics import Statistics, measure, side_by_side, tallied
from capfilt.report.tally import ALL, COLUMNS, Tally
from capfilt.rules import Rules
from capfilt.schema import ANNOTATION_FILE_SCHEMA, Source, Status
from capfilt.spec import CurateSpec, Duplicates, KeepOut, Thresholds, ThresholdsOverride
from capfilt.text import clean

PAGE = Path(report.__file__).parent / "static"


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> tuple[CurateSpec, Summary]:
    root = tmp_path_factory.mktemp("report")
    make_web(root)
    return curate_web(root)


@pytest.fixture(scope="module")
def dataset(curated: tuple[CurateSpec, Summary]) -> CuratedDataset:
    return CuratedDataset.for_reading(curated[0].output, {})


@pytest.fixture(scope="module")
def rows(curated: tuple[CurateSpec, Summary]) -> list[dict[str, Any]]:
    return read(curated[0].output)


@pytest.fixture(scope="module")
def made(dataset: CuratedDataset) -> Report:
    return make_report(dataset, {})


def statistics(dataset: CuratedDataset, version: int | None = None) -> Statistics:
    number = dataset.versions()["annotations"] if version is None else version
    with tallied(dataset, number, None) as tally:
        return measure(tally, number, {record.run: record for record in dataset.runs()})


# --- numbers ---


def test_counts_are_those_of_the_table(dataset: CuratedDataset, rows: list[dict[str, Any]]) -> None:
    found = statistics(dataset).outcome
    texts = [text for row in rows for text in row["texts"]]
    assert found.shards == SHARDS
    assert found.counts.rows == len(rows) == ROWS * SHARDS
    assert Counter({(status, reason): n for status, reason, n in found.reasons}) == Counter(
        (row["status"], row["reason"]) for row in rows
    )
    assert Counter({(origin, reason): n for origin, reason, n in found.texts}) == Counter(
        (text["captioner"] or "web", text["reason"]) for text in texts
    )
    assert {one.shard: one.counts.kept for one in found.poorest} == Counter(
        row["shard"] for row in rows if row["status"] == Status.KEPT
    )


def test_captions_are_counted_by_their_words(dataset: CuratedDataset, rows: list[dict[str, Any]]) -> None:
    found = statistics(dataset).captions
    assert list(found) == ["web", "writer"]
    for origin, own in found.items():
        texts = [
            clean(text["text"], 10_000)
            for row in rows
            for text in row["texts"]
            if (text["captioner"] or "web") == origin and text["text"]
        ]
        texts = [text for text in texts if text]
        words = Counter(word for text in texts for word in text.split(" "))
        assert (own.texts.total, own.texts.distinct) == (len(texts), len(set(texts)))
        assert dict(own.texts.top[:3]) == {
            text[:300]: n
            for text, n in sorted(Counter(texts).items(), key=lambda item: (-item[1], item[0].encode()))[:3]
        }
        assert (own.words.total, own.words.distinct) == (words.total(), len(words))
        assert own.words.top[0][1] == words.most_common(1)[0][1]
        lengths = Counter(min(50, len(text.split(" "))) for text in texts)
        assert {n: count for n, count in enumerate(own.lengths) if count} == lengths
        assert own.mean_words == pytest.approx(words.total() / len(texts))
    assert found["web"].loops == 2  # "endless endless ..." and "a man in a man in ..."
    assert [text[:9] for text in found["web"].examples] == ["a man in ", "endless e"]
    assert found["writer"].loops == 0


def test_images_are_counted_by_format_and_size(dataset: CuratedDataset, rows: list[dict[str, Any]]) -> None:
    found = statistics(dataset).images
    sized = [row for row in rows if row["width"]]
    assert found.images == len(sized) == sum(n for _, _, n in found.sides) == sum(found.bytes)
    assert found.formats == (("JPEG", len(sized)),)
    assert {n for _, _, n in found.sides} == set(Counter(row["width"] for row in sized).values())
    assert found.small == len(sized)


@pytest.mark.parametrize(("decision", "filters"), [("mean", 2), ("vote", 3)])
def test_any_threshold_keeps_what_decide_would(tmp_path: Path, decision: str, filters: int) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(n) for n in range(60)])
    fields = {**cards(tmp_path, filters), "decision": decision, "report": False}
    spec, _ = curate_web(tmp_path, **fields, thresholds=ThresholdsOverride(web=0.437, synthetic=0.61))
    dataset = CuratedDataset.for_reading(spec.output, {})
    scores = statistics(dataset)
    assert scores.rule.exact
    assert scores.scores.kept(0.437, 0.61) == sum(row["status"] == Status.KEPT for row in read(spec.output))
    rows = [[_text(text) for text in row["texts"]] for row in read(spec.output)]
    for web, synthetic in ((0.0, 0.0), (0.3, 0.3), (0.5, 0.7), (0.437, 0.9), (1.0, 1.0)):
        one = Thresholds(web=web, synthetic=synthetic)
        thresholds = [one] * (filters if decision == "vote" else 1)
        kept = sum(row_outcome(decide(texts, thresholds, spec.decision, "best"))[0] is Status.KEPT for texts in rows)
        assert scores.scores.kept(web, synthetic) == kept
    with pytest.raises(ValueError, match="not in"):
        scores.scores.kept(0.4371, 0.5)


def test_a_text_with_a_word_that_is_kept_out_matches_at_no_threshold(tmp_path: Path) -> None:
    """Its scores stay on record; what the sliders count, and which texts the gallery shows as matching, go by rules."""
    make_web(tmp_path)
    lists = KeepOut(words=("shard", "endless"))
    spec, _ = curate_web(tmp_path, report=False, keep_out=lists, thresholds=ThresholdsOverride(web=0.3, synthetic=0.3))
    dataset, rows = CuratedDataset.for_reading(spec.output, {}), read(spec.output)
    found = statistics(dataset)
    assert found.rule.exact
    assert Counter(text["reason"] for row in rows for text in row["texts"])["kept_out_word"] > ROWS
    judged = [row for row in rows if row["reason"] in (None, "no_match")]
    assert any(_best(row, barred=True) >= 0.3 > _best(row, barred=False) for row in judged)
    for least in (0.3, 0.5, 0.9):
        rules = Rules(spec.model_copy(update={"thresholds": ThresholdsOverride(web=least, synthetic=least)}))
        kept = sum(rules.judge([_text(text) for text in row["texts"]], None)[1] is Status.KEPT for row in judged)
        assert found.scores.kept(least, least) == kept
    elsewhere = {"duplicates": Duplicates()}, {"keep_out": KeepOut(domains=("example.org",))}
    rules_of = [replace(found.rule, spec=spec.model_copy(update=fields)) for fields in ({}, *elsewhere)]
    assert [rule.elsewhere for rule in rules_of] == [False, True, True]
    gallery = page_data(make_report(dataset, {}))["gallery"]
    best = {(row["shard"], row["row"]): max(row["best"].values(), key=lambda b: b or 0) for row in gallery}
    for row in judged:
        assert best.get((row["shard"], row["row"]), _best(row)) == _best(row)


def _best(row: dict[str, Any], barred: bool = False) -> float:
    """The highest score of a row's texts, of those with a word that is kept out, or of the others."""
    return max((t["itm"] for t in row["texts"] if t["itm"] and (t["reason"] == "kept_out_word") == barred), default=0.0)


def _text(text: dict[str, Any]) -> Text:
    scores = tuple(FilterScore(**score) for score in text["scores"])
    return Text(Source(text["source"]), 0, text["text"], clean(text["text"] or ""), text["captioner"], scores)


def test_where_no_run_is_on_record_thresholds_are_those_that_were_seen(
    dataset: CuratedDataset, rows: list[dict[str, Any]]
) -> None:
    with tallied(dataset, dataset.versions()["annotations"], None) as tally:
        found = measure(tally, 1, {})
    assert (found.rule.run, found.rule.exact, found.rule.others) == (
        None,
        False,
        sum(row["status"] != Status.ERROR for row in rows),
    )
    kept = [text["itm"] for row in rows for text in row["texts"] if text["kept"] and text["source"] == "web"]
    assert found.rule.thresholds.web == min(kept)
    assert found.scores.kept(found.rule.thresholds.web, found.rule.thresholds.synthetic) == found.outcome.counts.kept


def test_a_dataset_without_rows_has_a_report(tmp_path: Path) -> None:
    CuratedDataset.for_writing(str(tmp_path / "out"), {})
    made = make_report(CuratedDataset.for_reading(str(tmp_path / "out"), {}), {})
    text = " ".join(" ".join(Parsed(made.html).text).split())
    for words in ("rows 0 in 0 shards", "No image could be read.", "There is no text.", "No run is on record."):
        assert words in text


# --- captions ---


@pytest.fixture
def tally_of(tmp_path: Path) -> Iterator[Any]:
    """Makes a tally of rows with one web text each, none of them scored."""
    opened: list[Tally] = []

    def make(texts: list[str]) -> Tally:
        struct = {"source": "web", "captioner": None, "itm": None, "itc": None, "scores": [], "kept": False}
        rows = [
            {"shard": "s", "row": n, "status": "dropped", "texts": [{**struct, "text": text, "reason": "no_match"}]}
            for n, text in enumerate(texts)
        ]
        schema = pa.schema([pa.field("shard", pa.string()), *ANNOTATION_FILE_SCHEMA])
        table = pa.Table.from_pylist(rows, pa.schema([schema.field(name) for name in COLUMNS]))
        tally = Tally(table.to_reader(), str(tmp_path))
        tally.flatten("mean")
        opened.append(tally)
        return tally

    yield make
    for tally in opened:
        tally.__exit__()


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("dog dog dog", True),
        ("dog dog", False),
        ("a dog a dog a dog", True),
        ("a dog a dog a cat", False),
        ("on the mat on the mat on the mat", True),
        ("one two three four one two three four one two three four", True),
        ("one two three four five " * 3, False),  # five words: no loop, by our definition
        ("the cat and the dog and the cow", False),
        ("so so and so and so", False),
    ],
)
def test_loops(tally_of: Any, text: str, loops: bool) -> None:
    found = measure_captions(tally_of([text]))["web"]
    assert found.loops == loops
    assert found.examples == ((text.strip(),) if loops else ())


def test_repeated_ngrams_are_those_that_the_same_text_holds_before(tally_of: Any) -> None:
    found = measure_captions(tally_of(["a b a b a b", "a b", "x"]))["web"]
    assert found.repeated == {2: 3 / 6, 3: 2 / 4, 4: 1 / 3}


def test_variety_is_counted_in_a_sample_of_one_size(tally_of: Any) -> None:
    """1,000 of 2,000 texts, half of which are one and the same: of each other one half is to be expected."""
    texts = ["the same"] * 1000 + [f"other {n}" for n in range(1000)]
    found = measure_captions(tally_of(texts))["web"].texts
    assert (found.total, found.distinct, found.share) == (2000, 1001, 0.5)
    assert found.top[0] == ("the same", 1000)
    assert found.drawn == pytest.approx(1 + 1000 * (1 - (1 - 1 / 2000) ** 1000))


# --- gallery ---


def test_the_gallery_has_rows_of_every_kind_and_score(dataset: CuratedDataset, rows: list[dict[str, Any]]) -> None:
    with tallied(dataset, dataset.versions()["annotations"], None) as tally:
        now = measure(tally, 1, {record.run: record for record in dataset.runs()})
        chosen = choose_rows(tally, now.rule.thresholds)
        assert choose_rows(tally, now.rule.thresholds) == chosen
    assert {(row["status"], row["reason"]) for row in chosen} == {(row["status"], row["reason"]) for row in rows}
    assert [(row["shard"], row["row"]) for row in chosen] == sorted((row["shard"], row["row"]) for row in chosen)
    by_key = {(row["shard"], row["row"]): row for row in rows}
    best: dict[tuple[str, int], float] = {
        key: max(text["itm"] for text in row["texts"] if text["itm"] is not None)
        for key, row in by_key.items()
        if row["reason"] in (None, "no_match")
    }
    nearest = sorted(best, key=lambda key: abs(best[key] - 0.5))[:8]
    assert set(nearest) <= {(row["shard"], row["row"]) for row in chosen}
    assert len({int(best[row["shard"], row["row"]] * 50) for row in chosen if row["margin"] is not None}) == len(
        {int(score * 50) for score in best.values()}
    )
    for row in chosen:
        assert [text["text"] for text in row["texts"]].count(None) == [
            text["text"] for text in by_key[row["shard"], row["row"]]["texts"]
        ].count(None)


def test_a_text_that_is_longer_than_is_shown_says_so(tally_of: Any) -> None:
    (row,) = choose_rows(tally_of(["x" * 12_000]), Thresholds(web=0.5, synthetic=0.5))
    (text,) = row["texts"]
    assert (len(text["text"]), text["cut"]) == (10_000, 2_000)


# --- pictures ---


def pictures(dataset: CuratedDataset, spec: CurateSpec | None, **budget: int) -> Pictures:
    return Pictures(
        dataset, dataset.versions()["annotations"], spec, {}, Budget(**{"bytes": 10**9, "files": 99} | budget)
    )


def test_kept_and_dropped_rows_have_their_pictures(
    dataset: CuratedDataset, curated: tuple[CurateSpec, Summary], rows: list[dict[str, Any]]
) -> None:
    found = pictures(dataset, curated[0]).find(rows)
    for row in rows:
        picture = found[row["shard"], row["row"]]
        if row["width"]:
            assert picture.startswith("data:image/webp;base64,"), (row, picture)
            with Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) as small:
                assert small.size == (row["width"], row["height"])
        else:
            assert picture == ("no image" if row["reason"] == "no_image" else "the image cannot be used")


def test_what_is_read_for_pictures_is_bounded(
    dataset: CuratedDataset, curated: tuple[CurateSpec, Summary], rows: list[dict[str, Any]]
) -> None:
    def have(**budget: int) -> Counter[str]:
        return Counter(
            picture.partition(",")[0].partition("/")[0]
            for picture in pictures(dataset, curated[0], **budget).find([row for row in rows if row["width"]]).values()
        )

    assert have(files=2).keys() == {"data:image", "not read: enough files were"}
    assert have(files=0).keys() == {"not read: enough files were"}
    assert have(bytes=30_000).keys() == {"data:image", "not read: enough bytes were"}


def test_a_picture_that_is_not_had_has_a_reason(tmp_path: Path) -> None:
    make_web(tmp_path)
    spec, _ = curate_web(tmp_path, report=False)
    dataset, all_rows = CuratedDataset.for_reading(spec.output, {}), read(spec.output)
    rows = [row for row in all_rows if row["width"]]
    write_shard(tmp_path / "in" / "part-0.parquet", [jpeg(n) for n in range(ROWS)])
    (tmp_path / "in" / "part-1.parquet").unlink()
    found = pictures(dataset, spec).find(rows)
    whys = {(row["shard"].partition("-")[2][0], row["status"]): found[row["shard"], row["row"]][:40] for row in rows}
    gone = "its file is no longer among the inputs"
    assert {key: why for key, why in whys.items() if not why.startswith("data:")} == {
        ("0", "dropped"): gone,
        ("1", "dropped"): gone,
    }
    unknown = pictures(dataset, None).find(rows)
    assert {why for why in unknown.values() if not why.startswith("data:")} == {
        "the run that dropped it is not on record, so its input is not known"
    }
    shutil.rmtree(tmp_path / "in")
    missing = pictures(dataset, spec).find(rows)
    assert any("no such file or directory" in why for why in missing.values())


# --- the page ---


class Parsed(HTMLParser):
    """Elements with their attributes, and the text of scripts and styles, by a parser that browsers agree with."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.text: list[str] = []
        self._in: str | None = None
        self.feed(page.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in self.raw:
            self._in = tag
            self.raw[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._in:
            self._in = None

    def handle_data(self, data: str) -> None:
        if self._in:
            self.raw[self._in][-1] += data
        else:
            self.text.append(data)


def page_data(made: Report) -> dict[str, Any]:
    """What the page's scripts are given."""
    (raw,) = [source for source in Parsed(made.html).raw["script"] if source.startswith("{")]
    found = json.loads(raw)
    assert isinstance(found, dict)
    return found


def test_the_page_loads_nothing_and_runs_its_own_scripts_alone(made: Report) -> None:
    page = Parsed(made.html)
    (policy,) = [
        about["content"] for tag, about in page.elements if about.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    scripts = [source for source in page.raw["script"] if not source.startswith("{")]

    def hashes(sources: list[str]) -> set[str]:
        return {f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in sources}

    rules = {name: set(values) for name, *values in (rule.split() for rule in policy.split(";"))}
    assert rules == {
        "default-src": {"'none'"},
        "script-src": hashes(scripts),
        "style-src": hashes([*page.raw["style"], PLOT_STYLE]),
        "img-src": {"data:"},
        "base-uri": {"'none'"},
        "form-action": {"'none'"},
    }
    for tag, about in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "img", "video", "audio"), tag
        assert not [name for name in about if name.startswith("on") or name in ("src", "srcset", "style")], (tag, about)
        assert (about.get("href") or "#").startswith(("#", "data:,")), (tag, about)
    assert len(made.html) < 2_500_000 < MOST


def test_what_strangers_wrote_is_text(made: Report, rows: list[dict[str, Any]]) -> None:
    page = Parsed(made.html)
    assert made.html.count(b"<script") == len(page.raw["script"]) == 8
    (raw,) = [source for source in page.raw["script"] if source.startswith("{")]
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\x00-\x08\x0e-\x1f]", "".join([raw, *page.text]))
    assert not re.search("[<>&]", raw)
    data = json.loads(raw)
    texts = {text["text"]: text for row in data["gallery"] for text in row["texts"]}
    assert HOSTILE["script"] in texts
    assert HOSTILE["markup"] in texts
    assert HOSTILE["ends"] in texts
    assert HOSTILE["long"] in texts
    assert "a cat \\u202egnp.exe\\u202c on \\u2066the\\u2069 mat\\u200b" in texts
    assert "a bell \\x07 and a null \\x00 and \\x1b[31mred" in texts
    assert len(data["gallery"]) <= len(rows)


def test_the_page_says_the_numbers(made: Report, rows: list[dict[str, Any]]) -> None:
    text = " ".join(" ".join(Parsed(made.html).text).split())
    kept = sum(row["status"] == Status.KEPT for row in rows)
    assert f"rows {len(rows)} in {SHARDS} shards" in text
    assert f"kept {kept} {100 * kept / len(rows):.1f}%" in text
    for reason, n in Counter(row["reason"] for row in rows if row["reason"]).items():
        assert re.search(rf"{reason.replace('_', ' ')} {n} ", text), reason
    assert "There is none: no run before this one is on record." in text
    assert "No truth is known of these images." in text


def test_the_data_for_the_sliders_are_the_rows(made: Report, dataset: CuratedDataset) -> None:
    data = page_data(made)
    scores = statistics(dataset).scores
    assert sum(n for _, _, n in data["decided"]) == scores.decided
    half = data["thresholds"].index(0.5) + 1
    assert sum(n for i, j, n in data["decided"] if i >= half or j >= half) == scores.kept(0.5, 0.5)
    assert data["inForce"] == {"web": 0.5, "synthetic": 0.5}


def test_the_gallery_keeps_to_its_size(dataset: CuratedDataset, made: Report) -> None:
    small = make_report(dataset, {}, limits=Limits(gallery_bytes=20_000)).html
    assert len(small) < len(made.html) - 20_000
    assert b"more were left out, as the page would exceed 10 MB" in small


def test_the_libraries_in_the_page_are_the_published_files() -> None:
    """As npm serves them: d3 7.9.0 and @observablehq/plot 0.6.17."""
    published = {
        "d3.min.js": "f2094bbf6141b359722c4fe454eb6c4b0f0e42cc10cc7af921fc158fceb86539",
        "plot.umd.min.js": "4358086467740777dd788d6b27a95cebdbaefdd50c730a3060117073bd7134cb",
    }
    for name, digest in published.items():
        assert hashlib.sha256((PAGE / "vendor" / name).read_bytes()).hexdigest() == digest
        assert (PAGE / "vendor" / f"{name.partition('.')[0]}.LICENSE").is_file()


# --- versions ---


def test_versions_are_compared_number_by_number(tmp_path: Path) -> None:
    make_web(tmp_path)
    spec, first = curate_web(tmp_path, report=False)
    _, second = curate_web(tmp_path, thresholds=ThresholdsOverride(web=0.9, synthetic=0.9))
    dataset = CuratedDataset.for_reading(spec.output, {})
    made = make_report(dataset, {})
    assert (made.version, made.against) == (second.versions["annotations"], first.versions["annotations"])
    before, now = statistics(dataset, made.against), statistics(dataset)
    changes = {change.name: change for change in compare(before, now)}
    assert (changes["rows kept"].before, changes["rows kept"].now) == (
        first.counts.kept / first.counts.rows,
        second.counts.kept / second.counts.rows,
    )
    assert changes["threshold, web"].now == 0.9
    moved = {shift.name: shift.index for shift in shifts(before, now)}
    assert moved["reasons of rows"] > 0.25
    assert moved["writer: ITM"] == 0
    assert "Fewer rows are kept" in [alarm.title for alarm in alarms(now, before)]
    assert alarms(now, now) == []
    with pytest.raises(DatasetError, match="no version 99"):
        make_report(dataset, {}, against=99)


@pytest.mark.slow
def test_a_version_whose_files_are_gone_is_named(tmp_path: Path) -> None:
    make_web(tmp_path)
    spec, first = curate_web(tmp_path, report=False)
    curate_web(tmp_path, thresholds=ThresholdsOverride(web=0.9, synthetic=0.9), report=False)
    CuratedDataset.for_writing(spec.output, {}).vacuum(retain_hours=0)
    dataset, gone = CuratedDataset.for_reading(spec.output, {}), first.versions["annotations"]
    with pytest.raises(DatasetError, match=f"version {gone} of the annotations cannot be read"):
        make_report(dataset, {}, version=gone)
    made = make_report(dataset, {})
    assert made.against is None
    assert f"Version {gone} cannot be read any more".encode() in made.html


@pytest.mark.parametrize(
    ("number", "left", "before"),
    [
        (4, [4], None),  # the first run
        (4, [2, 4], 2),
        (3, [2, 4], 2),  # within the second run
        (2, [2, 4], None),
        (5, [2, 4], 2),  # maintenance since
        (4, [], None),
        (4, [4, 4, 2, 2], 2),  # runs that committed nothing
        (9, [0, 9], None),  # 0 is the empty table
    ],
)
def test_the_version_before_is_what_the_run_before_left(number: int, left: list[int], before: int | None) -> None:
    assert earlier(number, left) == before


@pytest.mark.parametrize(
    ("before", "now", "index"),
    [
        ({"a": 50, "b": 50}, {"a": 500, "b": 500}, 0.0),
        ({"a": 1_000_000, "b": 1_000_000}, {"a": 500_000, "b": 1_500_000}, 0.25 * 1.0986123),  # 0.25 * ln 3
        ({}, {"a": 1}, 0.0),
    ],
)
def test_stability_index(before: dict[object, float], now: dict[object, float], index: float) -> None:
    assert stability_index(before, now) == pytest.approx(index, abs=1e-5)
    assert stability_index(now, before) == pytest.approx(index, abs=1e-5)


def test_alarms(dataset: CuratedDataset) -> None:
    """Each limit from both sides."""
    calm = statistics(dataset)
    own = calm.captions["writer"]
    enough = replace(
        own, texts=Counted(2000, 900, 700.0, 0.01, (("x", 20),)), words=Counted(20000, 800, 600.0, 0.1, ())
    )

    def raised(changed: Captions, before: Captions | None = None) -> list[tuple[bool, str]]:
        earlier_ = None if before is None else replace(calm, captions={"writer": before})
        return [
            (alarm.collapse, alarm.title) for alarm in alarms(replace(calm, captions={"writer": changed}), earlier_)
        ]

    def texts(**fields: Any) -> Captions:
        return replace(enough, texts=replace(enough.texts, **fields))

    assert raised(enough, enough) == []
    assert raised(texts(share=0.2)) == []
    assert raised(texts(share=0.21)) == [(True, "writer writes one caption again and again")]
    assert raised(texts(drawn=50.0)) == []
    assert raised(texts(drawn=49.0)) == [(True, "writer writes few different captions")]
    assert raised(replace(enough, loops=40)) == []
    assert raised(replace(enough, loops=41)) == [(True, "writer loops")]
    assert raised(texts(drawn=350.0), enough) == []
    assert raised(texts(drawn=349.0), enough) == [(True, "writer: variety of captions is lost")]
    fewer = replace(enough, words=replace(enough.words, drawn=299.0))
    assert raised(fewer, enough) == [(True, "writer: variety of words is lost")]
    longer = replace(enough, mean_words=1.51 * enough.mean_words)
    assert raised(longer, enough) == [(False, "writer: captions of another length")]
    alike = {"writer": {"itm": (0.5, 0.01)}}
    flat = replace(calm, captions={"writer": enough}, scores=replace(calm.scores, means=alike))
    assert [alarm.title for alarm in alarms(flat)] == ["The filters find all texts of writer alike"]


def fewer(own: Captions, drawn: float) -> Captions:
    """Captions of 2,000 texts, so many different ones of 1,000."""
    return replace(own, texts=Counted(2000, 900, drawn, 0.01, (("x", 20),)), words=Counted(20, 8, 8.0, 0.1, ()))


def test_a_new_captioner_is_held_to_the_one_before(dataset: CuratedDataset) -> None:
    """Every round of a bootstrap names its captioner anew."""
    calm = statistics(dataset)
    was, is_ = (fewer(calm.captions["writer"], drawn) for drawn in (700.0, 349.0))
    before = replace(calm, captions={"round-1": was}, together=was)
    now = replace(calm, captions={"round-2": is_}, together=is_)
    assert [(alarm.collapse, alarm.title) for alarm in alarms(now, before)] == [
        (True, "all captioners: variety of captions is lost")
    ]
    same = replace(calm, captions={"round-1": is_}, together=is_)
    assert [alarm.title for alarm in alarms(same, before)] == ["round-1: variety of captions is lost"]


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> tuple[CurateSpec, CurateSpec]:
    """One web, curated by two captioners, then in another output by a third one."""
    root = tmp_path_factory.mktemp("rounds")
    make_web(root)
    (captioner,) = cards(root)["captioners"]
    first, second, third = (captioner.model_copy(update={"name": f"round-{n}"}) for n in range(3))
    before, _ = curate_web(root, output=str(root / "one"), captioners=(first, second), report=False)
    now, summary = curate_web(root, output=str(root / "two"), captioners=(third,), report_against=before.output)
    assert summary.report_error is None
    return before, now


def test_another_dataset_is_compared(rounds: tuple[CurateSpec, CurateSpec]) -> None:
    one, two = (CuratedDataset.for_reading(spec.output, {}) for spec in rounds)
    made = make_report(two, {}, against=one)
    number = one.versions()["annotations"]
    assert (made.against, made.other) == (number, one.output)
    text = " ".join(" ".join(Parsed(made.html).text).split())
    assert f"against version {number} of {one.output} ." in text
    changes = {change.name: change for change in compare(statistics(one), statistics(two))}
    texts = changes["all captioners: texts"]
    assert texts.before == 2 * (texts.now or 0) > 0
    assert changes["round-2: texts"].before is changes["round-0: texts"].now is None
    assert {"all captioners: ITM", "all captioners: reasons of texts"} <= {
        shift.name for shift in shifts(statistics(one), statistics(two))
    }


def test_all_captioners_together_are_what_the_table_holds(rounds: tuple[CurateSpec, CurateSpec]) -> None:
    spec, _ = rounds
    before = statistics(CuratedDataset.for_reading(spec.output, {}))
    together, _ = side_by_side(before, replace(before, captions={}))
    texts = [text for row in read(spec.output) for text in row["texts"] if text["source"] == "synthetic"]
    scores = np.array([text["itm"] for text in texts if text["itm"] is not None], float)
    own = together.captions[ALL]
    assert (own.texts.total, own.texts.distinct) == (len(texts), len({text["text"] for text in texts}))
    assert list(together.captions) == ["web", ALL, "round-0", "round-1"]
    assert together.scores.means[ALL]["itm"] == pytest.approx((scores.mean(), scores.std()))
    assert together.scores.itm[ALL].sum() == len(scores)
    assert {reason: n for origin, reason, n in together.outcome.texts if origin == ALL} == Counter(
        text["reason"] for text in texts
    )


def test_a_runs_report_is_against_the_dataset_that_its_spec_names(rounds: tuple[CurateSpec, CurateSpec]) -> None:
    one, two = rounds
    (folder,) = (Path(two.output) / "_runs").glob("*/report.html")
    assert f"of {one.output} ." in " ".join(" ".join(Parsed(folder.read_bytes()).text).split())


def test_every_statistic_is_compared(tmp_path: Path) -> None:
    """Single reasons, small images, the scores against the truth, and the runs' speed."""
    make_web(tmp_path)
    spec, first = curate_web(tmp_path, report=False)
    _, second = curate_web(tmp_path, thresholds=ThresholdsOverride(web=0.9, synthetic=0.9), report=False)
    dataset, rows = CuratedDataset.for_reading(spec.output, {}), read(spec.output)
    texts = [(row["image_sha256"], text) for row in rows for text in row["texts"] if text["itm"] is not None]
    table = {
        "image_sha256": [sha256 for sha256, _ in texts],
        "text": [text["text"] for _, text in texts],
        "true": [text["itm"] > 0.3 for _, text in texts],
    }
    pq.write_table(pa.table(table), tmp_path / "labels.parquet")
    assert "truth, web: ROC AUC" not in Tables(make_report(dataset, {}).html).rows
    made = make_report(dataset, {}, truth=truth_at(str(tmp_path / "labels.parquet")))
    page = Tables(made.html).rows
    for status, name in ((Status.DROPPED, "no_match"), (Status.ERROR, "not_an_image")):
        before, now = (summary.reasons[name] / first.counts.rows for summary in (first, second))
        assert page[f"rows, {name.replace('_', ' ')}"][:2] == [_percent(before), _percent(now)], status
    assert "writer: texts, below threshold" in page
    assert "rows, truncated image" not in page  # there are none
    assert page["images with a side below 200"][:2] == ["100.0%", "100.0%"]
    assert page["truth, web: ROC AUC"] == ["1.000", "1.000", "="]
    assert page["truth, web: calibration error"][2] == "="
    assert "truth, synthetic: ROC AUC" in page
    assert page["run: rows a second"][0] != "–" != page["run: rows a second"][1]
    assert page["run: rows a second of a worker, write"][0] != "–"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}%" if fraction < 0.1 else f"{100 * fraction:.1f}%"


class Tables(HTMLParser):
    """The rows of a page's tables that have a head, by it."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.rows: dict[str, list[str]] = {}
        self._cells: list[str] = []
        self._in = False
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self._cells, self._head = [], False
        if tag in ("th", "td"):
            self._in = True
            self._cells.append("")
            self._head = self._head or ("scope", "row") in attrs

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td"):
            self._in = False
        if tag == "tr" and self._head:
            name, *cells = self._cells
            self.rows[name] = cells

    def handle_data(self, data: str) -> None:
        if self._in:
            self._cells[-1] += data


# --- the truth ---


def test_labels_tell_how_good_the_scores_are(
    dataset: CuratedDataset, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    scored = [
        (row["image_sha256"], text["text"], text["itm"])
        for row in rows
        for text in row["texts"]
        if text["itm"] is not None and text["source"] == "web" and row["row"] >= 20
    ]
    table = {
        "image_sha256": [sha256 for sha256, _, _ in scored],
        "text": [text for _, text, _ in scored],
        "true": [itm > 0.3 for _, _, itm in scored],
    }
    pq.write_table(pa.table(table), tmp_path / "labels.parquet")
    data = page_data(make_report(dataset, {}, truth=truth_at(str(tmp_path / "labels.parquet"))))
    (own,) = data["judged"].values()
    true = sum(table["true"])
    assert (own["texts"], own["true"], own["roc_auc"], own["average_precision"]) == (len(scored), true, 1.0, 1.0)
    assert own["kept"][50] == sum(itm >= 0.5 for _, _, itm in scored) == own["kept_true"][50]
    assert own["kept"][0] == len(scored)
    assert [n for n, _, _ in own["bins"]] == [
        sum(int(itm * 10) == tenth for _, _, itm in scored) for tenth in range(10)
    ]
    assert [fraction for _, _, fraction in own["bins"]][:3] == [0, 0, 0]
    expected = sum(
        abs(sum(i for i in b) / len(b) - (1 if tenth > 2 else 0)) * len(b)
        for tenth in range(10)
        if (b := [itm for _, _, itm in scored if int(itm * 10) == tenth])
    ) / len(scored)
    assert own["calibration_error"] == pytest.approx(expected)

    strangers = pa.table({"image_sha256": ["0" * 64], "text": ["x"], "true": [True]})
    pq.write_table(strangers, tmp_path / "strangers.parquet")
    with pytest.raises(InputError, match="knows none"):
        make_report(dataset, {}, truth=truth_at(str(tmp_path / "strangers.parquet")))


# --- the command, and the end of a run ---


def test_the_command_writes_a_page(
    curated: tuple[CurateSpec, Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec, summary = curated
    done = CliRunner().invoke(app, ["report", spec.output])
    assert done.exit_code == 0, done.output
    number = summary.versions["annotations"]
    assert (tmp_path / f"out-version-{number}.html").read_bytes().startswith(b"<!doctype html>")
    assert f"out-version-{number}.html: version {number} of" in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["report", spec.output, "--to", "mine.html", "--version", str(number - 1)])
    assert done.exit_code == 0
    assert f"Version {number - 1}".encode() in (tmp_path / "mine.html").read_bytes()


@pytest.mark.parametrize("against", ["1", "one", "pipelines/one.yaml"])
def test_the_command_compares_with_a_version_or_a_dataset(
    rounds: tuple[CurateSpec, CurateSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, against: str
) -> None:
    before, now = rounds
    place = Path(before.output).parent
    (place / "pipelines").mkdir(exist_ok=True)
    (place / "pipelines" / "one.yaml").write_text(json.dumps(before.model_dump(mode="json")))
    monkeypatch.chdir(place)
    done = CliRunner().invoke(app, ["report", now.output, "--to", str(tmp_path / "it.html"), "--against", against])
    assert done.exit_code == 0, done.output
    number = 1 if against == "1" else CuratedDataset.for_reading(before.output, {}).versions()["annotations"]
    other = "" if against == "1" else f" of {before.output}"
    assert f"compared with version {number}{other}\n" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--version", "77"], "no version 77"),
        (["--against", "nowhere"], "nowhere/pairs: no curated dataset there"),
        (["--against", "99"], "no version 99"),
        (["--to", "none/there.html"], "none/there.html: no such directory; name another file with --to"),
        (["--truth", "nowhere"], "nowhere: no such file or directory"),
    ],
)
def test_what_the_command_cannot_do_it_says(
    curated: tuple[CurateSpec, Summary],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", curated[0].output, *options])
    assert isinstance(done.exception, CapfiltError)
    assert message in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_a_run_leaves_its_report(curated: tuple[CurateSpec, Summary]) -> None:
    spec, summary = curated
    folder = Path(spec.output) / "_runs" / summary.run
    assert summary.report == leave_report.PAGE
    assert summary.report_error is None
    page = (folder / leave_report.PAGE).read_bytes()
    assert page.startswith(b"<!doctype html>")
    assert summary.run.encode() in page
    record = json.loads((folder / "summary.json").read_text())
    assert (record["report"], record["alarms"]) == ("report.html", summary.alarms)


def test_a_report_that_cannot_be_written_fails_no_run(tmp_path: Path) -> None:
    def in_the_way(job: Job, work: Iterator[Any], load: LoadModels) -> Iterator[list[Receipt]]:
        """A directory where the page should lie."""
        (Path(job.spec.output) / "_runs" / job.run / "report.html").mkdir()
        yield from in_process(job, work, load)

    make_web(tmp_path)
    told = io.StringIO()
    spec, summary = curate_web(tmp_path, execute=in_the_way, console=Console(file=told))
    assert (summary.outcome, summary.report) == ("done", None)
    assert summary.report_error is not None
    assert "report.html: cannot be written" in summary.report_error
    assert "the run's report could not be written" in " ".join(told.getvalue().split())
    record = json.loads((Path(spec.output) / "_runs" / summary.run / "summary.json").read_text())
    assert record["report_error"] == summary.report_error
    assert curate_web(tmp_path)[1].report is None  # nothing was to be done


@pytest.mark.slow
def test_a_large_dataset_is_sampled_at_the_end_of_a_run(dataset: CuratedDataset) -> None:
    made = make_report(dataset, {}, limits=replace(AT_END, rows=ROWS + 1))
    assert made.rows == 2 * ROWS
    text = " ".join(" ".join(Parsed(made.html).text).split())
    assert f"Of a sample: 2 whole shards with {2 * ROWS} of the dataset's {SHARDS * ROWS} rows." in text
    assert make_report(dataset, {}).rows == SHARDS * ROWS
