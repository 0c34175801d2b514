"""A captioner behind an endpoint, against a real server that fails in every way that servers do."""

from __future__ import annotations

import datetime
import email.utils
import hashlib
import io
import json
import pickle
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_server import Asked, ChatServer, Reply, caption, completion, trouble
from conftest import MakeSpec, jpeg, read, write_shard
from PIL import Image
from rich.console import Console
from stubs import HashFilter

from capfilt.errors import EndpointError, SpecError
from capfilt.models.completions import MOST_BYTES, AnswerError, _wait
from capfilt.models.endpoint import EndpointCaptioner
from capfilt.models.sampling import row_key
from capfilt.pipelines.curate import Summary, curate, in_process
from capfilt.spec import CurateSpec, EndpointCard, Sampling

SAMPLING = Sampling(candidates=2, min_tokens=2, max_tokens=20)
KEY = "sk-hunter2-of-the-endpoint"
BLANK = 127


def card(url: str, **fields: Any) -> EndpointCard:
    own = {"prompt": "Describe it.", "served_model": "vlm", "concurrency": 8, "timeout": 5, "retries": 2, **fields}
    return EndpointCard(role="captioner", model="openai", name="remote", base_url=url, **own)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as server:
        yield server


Connect = Callable[..., EndpointCaptioner]


@pytest.fixture
def connect(server: ChatServer) -> Iterator[Connect]:
    opened = []

    def connect(sampling: Sampling = SAMPLING, **fields: Any) -> EndpointCaptioner:
        opened.append(EndpointCaptioner(card(server.url, **fields), sampling, pause=0.005))
        return opened[-1]

    yield connect
    for captioner in opened:
        captioner.close()


def pictures(count: int) -> tuple[list[np.ndarray[Any, Any]], list[str]]:
    rng = np.random.default_rng(0)
    rgbs = [rng.integers(0, 255, (20 + n, 30, 3), np.uint8) for n in range(count)]
    return rgbs, [hashlib.sha256(rgb.tobytes()).hexdigest() for rgb in rgbs]


def captions(captioner: EndpointCaptioner, count: int) -> list[list[str]]:
    rgbs, sha256 = pictures(count)
    return captioner.caption([captioner.prepare(rgb, one) for rgb, one in zip(rgbs, sha256, strict=True)], sha256)


def is_blank(asked: Asked) -> bool:
    """Whether it is the plain image that the captioner tries the endpoint with."""
    return bool((np.abs(np.asarray(Image.open(io.BytesIO(asked.image))).astype(int) - BLANK) < 3).all())


def some(cases: Iterable[str], *quick: str) -> list[Any]:
    """All cases; those that are like a quick one are slow."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


# --- what is asked ---


def test_a_request(server: ChatServer, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", f" {KEY}\n")
    captioner = connect(api_key_variable="THE_KEY", longest_side=24)
    (rgb, *_), (sha256, *_) = pictures(1)
    captioner.caption([captioner.prepare(rgb, sha256)], [sha256])
    blank, *asked = server.asked
    assert is_blank(blank)
    assert len(asked) == 2
    for one in asked:
        assert (one.path, one.headers["Authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")
        image = Image.open(io.BytesIO(one.image))
        assert (image.format, image.size) == ("JPEG", (24, 16))
        (message,) = one.body["messages"]
        assert message["role"] == "user"
        assert message["content"][1] == {"type": "text", "text": "Describe it."}
    rest = {name: value for name, value in asked[0].body.items() if name not in ("messages", "seed")}
    assert rest == {
        "model": "vlm", "max_tokens": 20, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1, "min_tokens": 2,
    }  # fmt: skip
    seeds = {one.body["seed"] for one in asked}
    assert seeds == {row_key(0, sha256, candidate)[0] & 0x7FFFFFFF for candidate in range(2)}


def test_a_small_picture_is_sent_as_it_is(server: ChatServer, connect: Connect) -> None:
    captioner = connect()
    (rgb, *_), (sha256, *_) = pictures(1)
    captioner.caption([captioner.prepare(rgb, sha256)], [sha256])
    sent = np.asarray(Image.open(io.BytesIO(server.asked[-1].image)))
    assert sent.shape == rgb.shape
    assert np.abs(sent.astype(int) - rgb).mean() < 10  # noise is the worst that JPEG can be given
    assert "Authorization" not in server.asked[-1].headers


def test_openai_has_fewer_parameters(server: ChatServer, connect: Connect) -> None:
    plain = Sampling(repetition_penalty=1, min_tokens=0)
    captions(connect(plain, parameters="openai"), 1)
    assert set(server.asked[-1].body) == {"model", "messages", "max_tokens", "temperature", "top_p", "seed"}
    captions(connect(plain.model_copy(update={"top_k": 5})), 1)
    assert server.asked[-1].body["top_k"] == 5


def test_captions_come_in_order_and_are_repeatable(server: ChatServer, connect: Connect) -> None:
    def shuffled(asked: Asked) -> Reply:  # later questions are answered first
        time.sleep(0.03 / (1 + asked.number))
        return caption(asked)

    first = captions(connect(concurrency=4), 9)
    server.reply = shuffled
    assert captions(connect(concurrency=32), 9) == first
    assert len({text for own in first for text in own}) == 18
    assert captions(connect(SAMPLING.model_copy(update={"seed": 1})), 9) != first


def test_no_more_than_so_many_at_a_time(server: ChatServer, connect: Connect) -> None:
    def slow(asked: Asked) -> Reply:
        time.sleep(0.02)
        return caption(asked)

    server.reply = slow
    captioner = connect(concurrency=3)
    assert captioner.batch_size == 1
    captions(captioner, 6)
    assert server.most == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" A dog.\n\nOn  grass ", "A dog. On grass"), ("", ""), (None, ""), ("\ud83d x", "\ufffd x")],
)
def test_texts(server: ChatServer, connect: Connect, text: str | None, expected: str) -> None:
    server.reply = lambda _: completion(text, "length")
    (found,) = captions(connect(), 1)
    assert found == [expected] * 2
    found[0].encode("utf-8")


# --- what passes ---

PASSING = {
    "too many": trouble(429, retry_after="0"),
    "internal": trouble(500),
    "overloaded": trouble(503, "<html>"),
    "timeout": trouble(408),
    "not json": Reply(b"<html>gateway</html>"),
    "nothing": Reply(b""),
    "no completion": Reply(b'{"choices": []}'),
    "an error with 200": Reply(b'{"error": "oom"}'),
    "a list": Reply(b"[1, 2]"),
    "a deep list": Reply(b"[" * 100_000),
    "a text that is a number": completion(3),
    "huge": Reply(b'{"choices": "' + b"x" * (MOST_BYTES + 1)),
    "cut": Reply(caption.__name__.encode() * 1000, cut=True),
    "slow": Reply(completion("too late").body, delay=3.0),
}


@pytest.mark.parametrize("fault", some(PASSING, "too many", "not json", "cut", "huge"))
def test_what_fails_for_a_moment_costs_nothing(server: ChatServer, connect: Connect, fault: str) -> None:
    expected = captions(connect(), 3)
    tried = set()

    def fails_first(asked: Asked) -> Reply:
        question = (asked.name, asked.body["seed"])
        if question in tried:
            return caption(asked)
        tried.add(question)
        return PASSING[fault]

    server.asked.clear()
    server.reply = fails_first
    assert captions(connect(timeout=1 if fault == "slow" else 30), 3) == expected
    assert len(server.asked) == 14  # the plain image and six captions, each twice


def test_retry_after_is_heeded(server: ChatServer, connect: Connect) -> None:
    times = []

    def limited(asked: Asked) -> Reply:
        if is_blank(asked):
            return caption(asked)
        times.append(time.monotonic())
        return trouble(429, retry_after="0.3") if len(times) == 1 else caption(asked)

    server.reply = limited
    captions(connect(Sampling(candidates=1)), 1)
    assert 0.3 <= times[1] - times[0] < 3


def test_retry_after() -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
    assert _wait({"retry-after": email.utils.format_datetime(soon, usegmt=True)}) == pytest.approx(90, abs=3)
    past = soon - datetime.timedelta(days=1)
    assert _wait({"retry-after": email.utils.format_datetime(past)}) == 0
    assert _wait({"retry-after": "7"}) == 7
    assert _wait({"retry-after": "-7"}) == 0
    assert _wait({"retry-after": "later"}) is None
    assert _wait({}) is None


# --- what is a row's own ---

ROWS = {
    "refusal": (completion(None, refusal="I cannot help with that"), "refused: I cannot help"),
    "content rule": (completion("", "content_filter"), "refused: content_filter"),
    "not accepted": (trouble(400, "image too small"), "answers 400: .*image too small"),
    "unprocessable": (trouble(422), "answers 422"),
    "crashes on it": (trouble(500, "division by zero"), r"answers 500: .*division by zero.*\(3 attempts\)"),
    "babbles on it": (Reply(b"???"), r"no chat completion .*\?\?\?"),
    "never ends": (completion("x" * 2001), "2001 characters where max_tokens is 20"),
}


def run(spec: CurateSpec, execute: Any = in_process) -> Summary:
    def load(spec: CurateSpec, _device: str) -> Any:
        captioners = [EndpointCaptioner(one, one.sampled(spec.sampling), pause=0.005) for one in spec.captioners]
        made.extend(captioners)
        return captioners, [HashFilter(one) for one in spec.filters]

    made: list[EndpointCaptioner] = []
    try:
        return curate(spec, load=load, execute=execute, console=Console(file=io.StringIO()))
    finally:
        for captioner in made:
            captioner.close()


@pytest.mark.parametrize("fault", some(ROWS, "refusal", "crashes on it"))
def test_what_one_image_meets_costs_one_row(
    server: ChatServer, make_spec: MakeSpec, tmp_path: Path, fault: str
) -> None:
    images: list[bytes | None] = [jpeg(n) for n in range(20)]
    write_shard(tmp_path / "in" / "0.parquet", images)
    spec = make_spec(captioners=(card(server.url),), sampling=SAMPLING)
    names = {}

    def note(asked: Asked) -> Reply:
        names[asked.name] = asked.body["seed"]
        return caption(asked)

    server.reply = note
    run(spec.model_copy(update={"output": str(tmp_path / "plain")}))
    seeds = {row_key(0, hashlib.sha256(images[7] or b"").hexdigest(), k)[0] & 0x7FFFFFFF for k in range(2)}
    reply, message = ROWS[fault]
    server.reply = lambda asked: reply if asked.body["seed"] in seeds else caption(asked)
    summary = run(spec)
    assert (summary.counts.rows, summary.counts.errors) == (20, 1)
    for plain, row in zip(read(str(tmp_path / "plain")), read(spec.output), strict=True):
        if row["row"] == 7:
            assert (row["status"], row["reason"]) == ("error", "model_error")
            assert row["detail"].startswith("captioner remote: AnswerError: ")
            assert re.search(message, row["detail"])
        else:
            assert [text["text"] for text in row["texts"]] == [text["text"] for text in plain["texts"]]


def test_an_empty_caption_is_a_text_with_its_reason(server: ChatServer, make_spec: MakeSpec, tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(n) for n in range(4)])
    server.reply = lambda _: completion("")
    spec = make_spec(captioners=(card(server.url),), sampling=SAMPLING)
    assert run(spec).counts.errors == 0
    assert {text["reason"] for row in read(spec.output) for text in row["texts"][1:]} == {"empty_text"}


# --- what is no row's ---

DOWN = {
    "no key": (trouble(401, f"Incorrect API key provided: {KEY}"), r"answers 401: .*provided: \*\*\*"),
    "no such model": (trouble(404, "The model `vlm` does not exist"), "answers 404: .*does not exist"),
    "moved": (Reply(b"", 301, {"Location": "http://127.0.0.1:9/"}), "answers 301"),
    "down for long": (trouble(503), r"answers 503: .*\(3 attempts\)"),
    "too many for ever": (trouble(429), r"answers 429: .*\(3 attempts\)"),
    "come back tomorrow": (trouble(429, retry_after="86400"), r"\(1 attempts\); it asks to wait 86400 s"),
    "another server": (Reply(b"<html>hello</html>"), "no chat completion"),
    "unlike us": (trouble(400, "unknown parameter: seed"), "does not caption a plain image: .*unknown parameter"),
    "deaf": (Reply(b"", delay=0.6), r"no answer within 0\.1 s \(3 attempts\)"),
}


@pytest.mark.parametrize("fault", DOWN)
def test_an_endpoint_that_captions_no_one_is_found_at_the_start(
    server: ChatServer, connect: Connect, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    reply, message = DOWN[fault]
    server.reply = lambda _: reply
    with pytest.raises(EndpointError, match=f"captioner remote: {server.url} {'.*' + message}") as caught:
        connect(api_key_variable="THE_KEY", timeout=0.1 if fault == "deaf" else 5)
    assert KEY not in str(caught.value)
    assert "run again" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))  # Ray sends it to the driver
    assert str(again) == str(caught.value)


def test_no_endpoint_at_all() -> None:
    with ChatServer() as server:
        url = server.url
    with pytest.raises(EndpointError, match="cannot be reached"):
        EndpointCaptioner(card(url), SAMPLING, pause=0.005)


def test_the_key_is_needed_where_the_card_says_so(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THE_KEY", raising=False)
    with pytest.raises(SpecError, match="api_key_variable: THE_KEY is not set on this machine"):
        connect(api_key_variable="THE_KEY")
    monkeypatch.setenv("THE_KEY", "hunter2\x07hunter2")
    with pytest.raises(SpecError, match="THE_KEY holds is no key") as caught:
        connect(api_key_variable="THE_KEY")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("fault", some(["down for long", "no key", "too many for ever", "gone"], "down for long"))
def test_a_run_stops_where_its_endpoint_does_and_resumes(make_spec: MakeSpec, tmp_path: Path, fault: str) -> None:
    for shard in range(3):
        write_shard(tmp_path / "in" / f"{shard}.parquet", [jpeg(100 * shard + n) for n in range(10)])
    with ChatServer() as server:
        port = server.port
        spec = make_spec(captioners=(card(server.url, concurrency=4),), sampling=SAMPLING, fragment_rows=10)
        run(spec.model_copy(update={"output": str(tmp_path / "plain")}))
        server.asked.clear()

        def reply(asked: Asked) -> Reply:
            if asked.number < 30:  # within the second shard
                return caption(asked)
            if fault == "gone":
                return Reply(b"x" * 100, cut=True)
            return DOWN[fault][0]

        server.reply = reply
        with pytest.raises(EndpointError, match=r"captioner remote: .*run again"):
            run(spec)
        assert len(server.asked) < 100  # it did not go on asking
    done = len(read(spec.output))
    assert done == 10
    assert {row["status"] for row in read(spec.output)} <= {"kept", "dropped"}
    with ChatServer(port=port):
        summary = run(spec)
    assert summary.counts.rows == 20

    def told(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "run": ""}

    assert list(map(told, read(spec.output))) == list(map(told, read(str(tmp_path / "plain"))))


def test_the_key_is_left_nowhere(
    server: ChatServer,
    make_spec: MakeSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ENDPOINT", KEY)  # a name that says nothing of a secret
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(n) for n in range(8)])
    server.reply = lambda asked: caption(asked) if asked.number < 4 else trouble(400, f"who is {KEY}?")
    spec = make_spec(captioners=(card(server.url, api_key_variable="ENDPOINT"),), max_error_fraction=1.0)
    summary = run(spec)
    assert 0 < summary.counts.errors < 8
    written = [path.read_bytes() for path in Path(spec.output).rglob("*") if path.is_file()]
    written += [json.dumps(read(spec.output)).encode(), repr(summary).encode(), "".join(capfd.readouterr()).encode()]
    assert any(b"who is ***" in one for one in written)
    assert not any(KEY.encode() in one for one in written)
    assert any(b"ENDPOINT" in one for one in written)  # the record says where the key is


def test_what_is_waited_for_ends_with_the_captioner(server: ChatServer, connect: Connect) -> None:
    captioner = connect(timeout=60)
    server.reply = lambda _: Reply(b"", delay=2.0)
    rgbs, sha256 = pictures(1)
    pending = captioner.prepare(rgbs[0], sha256[0])
    while len(server.asked) < 3:  # the plain image, and two captions
        time.sleep(0.01)
    begin = time.monotonic()
    captioner.close()
    assert time.monotonic() - begin < 0.9
    assert all(one.cancelled() for one in pending)


def test_an_answer_error_is_the_rows(server: ChatServer, connect: Connect) -> None:
    captioner = connect()
    server.reply = lambda asked: trouble(413) if asked.number == 1 else caption(asked)
    with pytest.raises(AnswerError, match="413"):
        captions(captioner, 1)
