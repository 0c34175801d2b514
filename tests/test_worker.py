"""The worker in a plain loop: every row gets its fate, in order, whatever the rows and however they are cut."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeSpec, jpeg, read, write_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from stubs import load_hash, load_raising

from capfilt.dataset import CuratedDataset
from capfilt.decide import FilterScore, Text, as_stored, decide
from capfilt.errors import CapfiltError, CheckpointError, ErrorBudgetError, SpecError
from capfilt.fingerprints import Fingerprints, files_seen, run_fingerprints
from capfilt.fragments import Fragment, read_footer
from capfilt.inputs import list_inputs
from capfilt.models.tiny import write_tiny_pair
from capfilt.pipelines.curate import Summary, curate, in_process
from capfilt.pipelines.job import Job, load_models
from capfilt.pipelines.worker import Worker
from capfilt.schema import Source
from capfilt.spec import CaptionerCard, Columns, CurateSpec, FilterCard, LocalCheckpoint, Sampling, Thresholds
from capfilt.text import clean


def run(spec: CurateSpec, load: Any = load_hash) -> Summary:
    return curate(spec, load=load, execute=in_process, console=Console(file=io.StringIO()))


BAD: dict[str, tuple[bytes | None, str]] = {
    "null": (None, "no_image"),
    "empty": (b"", "empty_image"),
    "html": (b"<!doctype html><html><body>404</body></html>", "not_an_image"),
    "truncated": (jpeg(1)[:-200], "truncated_image"),
}


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
            "captioners": (base.captioners[0].model_copy(update={"batch_size": batch}),),
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


@pytest.mark.parametrize(
    ("rows", "even", "full"),
    [
        (5, [5], [5]),
        (8, [8], [8]),
        (12, [6, 6], [8, 4]),
        (17, [6, 6, 5], [8, 8, 1]),
        (57, [8, 7, 7, 7, 7, 7, 7, 7], [8] * 7 + [1]),
    ],
)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_batches_are_even(
    rows: int, even: list[int], full: list[int], on_gpu: bool, tmp_path: Path, make_spec: MakeSpec
) -> None:
    """Of at most 8 images; after full ones a small one would be left over. A GPU is made ready for full ones."""
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(rows)])
    spec = make_spec()
    CuratedDataset.for_writing(spec.output, {}).register("run", {})
    (file,) = list_inputs(spec.input)
    sizes: list[int] = []
    worker = Worker(
        Job(spec, run_fingerprints(spec), "run"), load_hash, on_batch=lambda images, _seconds: sizes.append(images)
    )
    worker.models()
    worker._on_gpu = on_gpu
    worker.process(Fragment(file, read_footer(file, Columns(), {}).layout, 0, rows, rows))
    assert sizes == (full if on_gpu else even)


def test_a_worker_reads_checkpoints_again_only_where_they_may_be_others(
    tmp_path: Path, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(0)])
    roles = dict(zip(("captioner", "filter"), write_tiny_pair(tmp_path / "tiny"), strict=True))
    local = {role: LocalCheckpoint(path=str(path)) for role, path in roles.items()}
    spec = make_spec(
        captioners=(CaptionerCard(role="captioner", name="c", checkpoint=local["captioner"], image_size=32),),
        filters=(FilterCard(role="filter", name="f", checkpoint=local["filter"], image_size=32),),
    )

    def read_again(_spec: CurateSpec) -> Fingerprints:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr("capfilt.pipelines.job.run_fingerprints", read_again)
        assert run(spec, load_models).counts.rows == 1  # the driver has read them
    job = Job(spec, run_fingerprints(spec), "run", files_seen=files_seen(spec))
    weights = roles["filter"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="the checkpoints here are not those the driver has"):
        Worker(job).models()


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
        assert [t["captioner"] for t in row["texts"]] == [None, *["stub-captioner"] * 3]
        for text in row["texts"]:  # the mean of one filter is its own
            assert text["scores"] == [{"filter": "stub-filter", "itm": text["itm"], "itc": text["itc"]}]
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
            assert (text["itm"] is None) == (text["itc"] is None) == (text["scores"] == [])
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
    assert errors[7] == "filter stub-filter: RuntimeError: device-side assert"
    assert errors[31] == "ValueError: stub-filter: ITM score nan is not a probability"


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


# --- ensembles ---


class Script:
    """A captioner that writes the same for every image, and a filter that knows its texts' scores; both take notes."""

    def __init__(self, image_size: int, candidates: Sequence[str] = (), itm: Mapping[str, float] | None = None) -> None:
        self.image_size, self.batch_size = image_size, 8
        self._candidates, self._itm = candidates, itm or {}
        self.memory: list[int] = []
        self.read: list[list[str]] = []

    def caption(self, images_BCHW: torch.Tensor, sha256: Sequence[str]) -> list[list[str]]:
        self._look(images_BCHW, len(sha256))
        return [list(self._candidates) for _ in sha256]

    def score(self, images_BCHW: torch.Tensor, texts: Sequence[Sequence[str]]) -> list[list[tuple[float, float]]]:
        self._look(images_BCHW, len(texts))
        self.read += map(list, texts)
        return [[(self._itm[text], self._itm[text] / 2) for text in row] for row in texts]

    def _look(self, images_BCHW: torch.Tensor, count: int) -> None:
        assert images_BCHW.shape == (count, 3, self.image_size, self.image_size)
        self.memory.append(images_BCHW.data_ptr())


def ensemble(base: CurateSpec, **fields: Any) -> CurateSpec:
    """Captioners a and b, filters f and g of unlike thresholds, at two image sizes."""
    captioners = [
        base.captioners[0].model_copy(update={"name": name, "image_size": size})
        for name, size in (("a", 16), ("b", 24))
    ]
    filters = [
        base.filters[0].model_copy(update={"name": name, "image_size": size, "thresholds": thresholds})
        for name, size, thresholds in (("f", 16, Thresholds(web=0.5, synthetic=0.25)), ("g", 24, Thresholds()))
    ]
    return base.model_copy(update={"captioners": tuple(captioners), "filters": tuple(filters), **fields})


KEPT, BELOW, WORSE, EQUAL, EMPTY = "kept", "below_threshold", "not_best", "duplicate_text", "empty_text"
# fmt: off
TOGETHER = [
    # of                             Web!   A dog. a cat  A cat!    A CAT  web    ""
    #                                       by a:                   by b:                   captions of the pair
    ("mean", "best",                [KEPT,  KEPT, WORSE, WORSE,     WORSE, EQUAL, EMPTY], ["Web!", "A dog."]),
    ("mean", "all-above-threshold", [KEPT,  KEPT, KEPT,  EQUAL,     EQUAL, EQUAL, EMPTY], ["Web!", "A dog.", "a cat"]),
    ("vote", "best",                [BELOW, KEPT, WORSE, WORSE,     WORSE, BELOW, EMPTY], ["A dog."]),
    ("vote", "all-above-threshold", [BELOW, KEPT, KEPT,  EQUAL,     EQUAL, BELOW, EMPTY], ["A dog.", "a cat"]),
]
# fmt: on


@pytest.mark.parametrize(("decision", "keep", "expected", "captions"), TOGETHER)
def test_two_captioners_and_two_filters(
    tmp_path: Path, make_spec: MakeSpec, decision: str, keep: str, expected: list[str], captions: list[str]
) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(10)], ["Web!"] * 10)
    spec = ensemble(make_spec(sampling=Sampling(candidates=3)), decision=decision, keep=keep)
    captioners = Script(16, ["A dog.", "a cat", "A cat!"]), Script(24, ["A CAT", "web", ""])
    f = Script(16, itm={"web": 0.75, "a dog": 0.5, "a cat": 0.25})
    g = Script(24, itm={"web": 0.25, "a dog": 0.75, "a cat": 0.875})
    run(spec, lambda *_: (captioners, (f, g)))

    assert f.read == g.read == [["web", "a dog", "a cat"]] * 10  # each text once, whoever wrote it
    assert captioners[0].memory == f.memory  # resized once for both
    assert captioners[1].memory == g.memory
    means = {"web": 0.5, "a dog": 0.625, "a cat": 0.5625}
    for row in read(spec.output):
        texts = row["texts"]
        assert [(t["captioner"], t["candidate"], t["text"]) for t in texts] == [
            (None, 0, "Web!"), ("a", 0, "A dog."), ("a", 1, "a cat"), ("a", 2, "A cat!"),
            ("b", 0, "A CAT"), ("b", 1, "web"), ("b", 2, ""),
        ]  # fmt: skip
        assert [t["reason"] or "kept" for t in texts] == expected
        for text in texts[:-1]:
            of_f, of_g = text["scores"]
            assert (of_f["filter"], of_g["filter"]) == ("f", "g")
            assert (text["itm"], text["itc"]) == (means[clean(text["text"])], means[clean(text["text"])] / 2)
            assert text["itm"] == (of_f["itm"] + of_g["itm"]) / 2
        assert (texts[-1]["itm"], texts[-1]["itc"], texts[-1]["scores"]) == (None, None, [])
    assert len(read(spec.output, "pairs")) == 10
    for pair in read(spec.output, "pairs"):
        assert pair["text"] == "A dog."
        assert [caption["text"] for caption in pair["captions"]] == captions
        assert all(c["captioner"] == (None if c["source"] == "web" else "a") for c in pair["captions"])


def test_the_tables_decide_as_the_run_did(tmp_path: Path, make_spec: MakeSpec) -> None:
    """Scores are stored as they were compared, so that other thresholds can be tried on them."""
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(60)])
    spec = ensemble(make_spec(), decision="mean", keep="all-above-threshold")
    run(spec)
    for row in read(spec.output):
        texts = []
        for t in row["texts"]:
            scores = tuple(FilterScore(**score) for score in t["scores"])
            assert t["itm"] == as_stored(sum(score.itm for score in scores) / 2)
            texts.append(Text(Source(t["source"]), t["candidate"], t["text"], clean(t["text"]), t["captioner"], scores))
        again = decide(texts, spec.effective_thresholds, spec.decision, spec.keep)
        assert [(text.itm, text.kept, text.reason) for text in again] == [
            (t["itm"], t["kept"], t["reason"]) for t in row["texts"]
        ]


def test_a_model_for_each_card(tmp_path: Path, make_spec: MakeSpec) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(0)])
    with pytest.raises(CapfiltError, match="1 captioners and 2 filters were made for the spec's 2 and 2 cards"):
        run(ensemble(make_spec()), lambda *_: ([Script(16)], [Script(16), Script(24)]))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LocalCheckpoint]:
    captioner, filter_ = write_tiny_pair(tmp_path_factory.mktemp("tiny"))
    return {"captioner": LocalCheckpoint(path=str(captioner)), "filter": LocalCheckpoint(path=str(filter_))}


def test_real_models_together_do_what_each_does_alone(
    tmp_path: Path, make_spec: MakeSpec, tiny: dict[str, LocalCheckpoint]
) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(12)])
    captioners = tuple(
        CaptionerCard(
            role="captioner", name=name, checkpoint=tiny["captioner"], image_size=size, batch_size=5, prompt=prompt
        )
        for name, size, prompt in (("a", 32, "a picture of "), ("b", 40, ""))
    )
    filters = tuple(
        FilterCard(role="filter", name=token.strip("[]"), checkpoint=tiny["filter"], image_size=32, first_token=token)
        for token in ("[ENC]", "[CLS]")
    )
    sampling = Sampling(candidates=2, min_tokens=2, max_tokens=6)

    def texts(**fields: Any) -> list[dict[str, Any]]:
        spec = make_spec(output=str(tmp_path / f"out{len(list(tmp_path.iterdir()))}"), sampling=sampling, **fields)
        run(spec, load_models)
        return [text for row in read(spec.output) for text in row["texts"]]

    together = texts(captioners=captioners, filters=filters)
    assert len(together) == 12 * 5
    for captioner in captioners:
        for n, filter_ in enumerate(filters):
            alone = texts(captioners=(captioner,), filters=(filter_,))
            own = [text for text in together if text["captioner"] in (None, captioner.name)]
            assert [text["text"] for text in own] == [text["text"] for text in alone]
            for text, lone in zip(own, alone, strict=True):
                assert text["scores"][n]["filter"] == filter_.name
                assert text["scores"][n]["itm"] == pytest.approx(lone["itm"], abs=1e-5)
    assert all(text["scores"][0]["itm"] != text["scores"][1]["itm"] for text in together)


def test_what_a_checkpoint_cannot_do_names_the_card(
    tmp_path: Path, make_spec: MakeSpec, tiny: dict[str, LocalCheckpoint]
) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(0)])
    card = CaptionerCard(role="captioner", name="c", checkpoint=tiny["captioner"], image_size=32)
    filters = tuple(
        FilterCard(role="filter", name=name, checkpoint=tiny["filter"], image_size=32, max_tokens=tokens)
        for name, tokens in (("short", 35), ("long", 512))
    )
    with pytest.raises(SpecError, match=r"filter long: .*512 tokens"):
        run(make_spec(captioners=(card,), filters=filters), load_models)
