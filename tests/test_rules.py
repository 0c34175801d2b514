"""Lists of what is kept out: domains, words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MakeSpec, jpeg, read, write_shard
from test_duplicates import no_models, run, tables

from capfilt.decide import FilterScore, Text
from capfilt.errors import SpecError
from capfilt.rules import Rules
from capfilt.schema import Reason, Source, Status
from capfilt.spec import KeepOut, Thresholds, load_curate_spec


def rules(make_spec: MakeSpec, **lists: Any) -> Rules:
    return Rules(make_spec(keep_out=KeepOut(**lists)))


@pytest.mark.parametrize(
    ("url", "out"),
    [
        ("http://bad.org/a.jpg", True),
        ("https://img.cdn.BAD.org:8080/a.jpg?x=good.org", True),
        ("https://user:pw@bad.org./a.jpg", True),
        ("//bad.org/a.jpg", True),
        ("bad.org/a.jpg", True),
        ("https://notbad.org/a.jpg", False),
        ("https://bad.org.evil.com/a.jpg", False),
        ("https://good.org/bad.org/a.jpg", False),
        ("http://bücher.de/a.jpg", True),
        ("http://cdn.xn--bcher-kva.de/a.jpg", True),
        ("http://BÜCHER.de/a.jpg", True),
        ("http://buecher.de/a.jpg", False),
        ("http://10.0.0.7/a.jpg", True),
        ("http://a.xxx/", True),
        ("http://[::1]/a.jpg", False),
        ("http://[broken/a.jpg", False),
        ("http://\u2603\u2603.\u0000/", False),
        ("data:image/png;base64,AAAA", False),
        ("", False),
    ],
)
def test_a_domain_keeps_its_subdomains_out(make_spec: MakeSpec, url: str, out: bool) -> None:
    assert rules(make_spec, domains=["Bad.org", "bücher.de", "10.0.0.7", "xxx"]).bars_url(url) is out


@pytest.mark.parametrize(
    ("text", "out"),
    [
        ("buy it NOW!", True),
        ("buy it, now", True),
        ("now buy it", False),
        ("a class of ships", False),
        ("an ass", True),
        ("ASS.", True),
        ("\uff21\uff33\uff33 in wide letters", True),
        ("groß", True),
        ("GROSS", True),
        ("großen", False),
        ("naked_eye", True),
        ("nakedness", False),
        ("की", False),  # the vowel sign is part of the word
        ("क", True),
        ("", False),
    ],
)
def test_words_are_whole_and_phrases_in_order(make_spec: MakeSpec, text: str, out: bool) -> None:
    assert rules(make_spec, words=["it now", "ass", "Groß", "naked", "क"]).bars_text(text) is out


def scored(source: Source, text: str, itm: float) -> Text:
    return Text(source, 0, text, text, None, (FilterScore("f", itm, None),))


def test_verdicts(make_spec: MakeSpec) -> None:
    judge = rules(make_spec, domains=["bad.org"], words=["spam"]).judge
    web, best, other = (
        scored(Source.WEB, "spam cat", 0.9),
        scored(Source.SYNTHETIC, "spam", 0.8),
        scored(Source.SYNTHETIC, "a cat", 0.7),
    )
    texts, status, reason = judge([web, best, other], "http://a.org")
    assert [text.reason for text in texts] == [Reason.KEPT_OUT_WORD, Reason.KEPT_OUT_WORD, None]
    assert (status, reason) == (Status.KEPT, None)
    texts, status, reason = judge([web, best], None)
    assert (status, reason) == (Status.DROPPED, Reason.KEPT_OUT_WORD)
    texts, status, reason = judge([web, scored(Source.SYNTHETIC, "a dog", 0.1)], None)
    assert (status, reason) == (Status.DROPPED, Reason.NO_MATCH)
    texts, status, reason = judge([web, other], "http://bad.org/1")
    assert [text.reason for text in texts] == [Reason.KEPT_OUT_WORD, Reason.KEPT_OUT_DOMAIN]
    assert (status, reason) == (Status.DROPPED, Reason.KEPT_OUT_DOMAIN)


def test_lists_are_given_or_named(tmp_path: Path, make_spec: MakeSpec) -> None:
    spec = make_spec().model_dump(mode="json")
    (tmp_path / "domains.txt").write_text("# of others\nbad.org\n\n  bücher.de\nBAD.org\n", encoding="utf-8")

    def load(**lists: Any) -> Any:
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump({**spec, "keep_out": lists}, allow_unicode=True))
        return load_curate_spec(tmp_path / "spec.yaml").keep_out

    found = load(domains="domains.txt", words=["b", "a", "b"])
    assert found == KeepOut(domains=("bad.org", "xn--bcher-kva.de"), words=("a", "b"))
    assert load(**found.model_dump(mode="json")) == found
    for lists, message in (
        ({"domains": "nowhere.txt"}, "nowhere.txt: cannot be read"),
        ({"domains": ["https://bad.org/"]}, "https://bad.org/ is no domain; write `example.org`"),
        ({"domains": ["a..b"]}, "is no domain"),
        ({"words": ["!?"]}, "has no letter or digit"),
    ):
        with pytest.raises(SpecError, match=r"keep_out\.(domains|words)") as caught:
            load(**lists)
        assert message in str(caught.value)


def test_lists_are_decided_by_without_models_and_end_as_from_scratch(make_spec: MakeSpec, tmp_path: Path) -> None:
    texts = ["a cat", "free spam", "a dog", "Spam!", None, "x"]
    write_shard(tmp_path / "in" / "a.parquet", [jpeg(seed) for seed in range(6)], texts)
    spec = make_spec(thresholds=Thresholds(web=0.0, synthetic=1.0))
    run(spec)
    for lists in (KeepOut(words=("spam",)), KeepOut(words=("cat",), domains=("example.org",)), KeepOut()):
        spec = spec.model_copy(update={"keep_out": lists})
        run(spec, no_models)
        fresh = spec.model_copy(update={"output": f"{spec.output}-{len(lists.words)}{len(lists.domains)}"})
        run(fresh)
        assert tables(spec.output) == tables(fresh.output)
    words = read(f"{spec.output}-10")
    assert [row["texts"][0]["reason"] for row in words] == [
        None,
        "kept_out_word",
        None,
        "kept_out_word",
        "empty_text",
        None,
    ]
    assert {row["reason"] for row in read(f"{spec.output}-11")} == {"kept_out_domain", "no_match"}
