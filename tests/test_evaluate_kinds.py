"""Evaluations of captioners and filters other than BLIP's, of filters together, and by labels."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from chat_server import Asked, ChatServer, Reply, caption, completion
from conftest import read
from PIL import Image
from pydantic import ValidationError
from rich.console import Console
from sklearn.metrics import average_precision_score, precision_score, recall_score, roc_auc_score
from tiny_models import TOKENS, VOCABULARY, write_blip2, write_clip, write_siglip
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from typer.testing import CliRunner
from viewing import make_dataset

from capfilt import toyweb
from capfilt.cli import app
from capfilt.errors import InputError, SpecError
from capfilt.evaluate import bleu4, recall_at_k
from capfilt.images import decode
from capfilt.models.checkpoints import quiet
from capfilt.models.dual import DualFilter
from capfilt.models.itm import ItmFilter
from capfilt.models.measures import shuffled_pairs, shuffled_texts
from capfilt.models.preprocess import resize
from capfilt.models.tiny import write_tiny_pair
from capfilt.pipelines.evaluate import Report, evaluate
from capfilt.spec import (
    CurateSpec,
    DualCard,
    EndpointCard,
    EvaluateSpec,
    FilterCard,
    GeneratorCard,
    Images,
    Input,
    LocalCheckpoint,
    Quality,
    Retrieval,
    SamplingOverride,
    Truth,
    load_spec,
)
from capfilt.spec.kinds import DualThresholds
from capfilt.tables import report_table
from capfilt.testset import LabelledImage, read_test_set
from capfilt.text import clean
from capfilt.toyweb import Web
from capfilt.truth import Labels

torch.set_num_threads(1)

IMAGES, CAPTIONS, BATCH = 14, 2, 5
UNKNOWN = "0" * 64
BANNED = [0, 1, 2, 4, *range(len(TOKENS), VOCABULARY)]  # what is no word, and not the end


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    with quiet():
        return {
            "blip2": write_blip2(folder / "blip2"),
            "clip": write_clip(folder / "clip"),
            "siglip": write_siglip(folder / "siglip"),
            "blip": write_tiny_pair(folder / "blip")[1],
        }


@pytest.fixture(scope="module")
def cards(checkpoints: dict[str, Path]) -> dict[str, Any]:
    at = {name: LocalCheckpoint(path=str(path)) for name, path in checkpoints.items()}
    dual: dict[str, Any] = {"role": "filter", "thresholds": DualThresholds(web=0.05, synthetic=0.05)}
    return {
        "clip": DualCard(name="clip", model="clip", checkpoint=at["clip"], batch_size=BATCH, **dual),
        "siglip": DualCard(name="siglip", model="siglip", checkpoint=at["siglip"], batch_size=BATCH, **dual),
        "likely": DualCard(
            name="likely", model="siglip", checkpoint=at["siglip"], batch_size=BATCH, unit="probability", **dual
        ),
        "blip": FilterCard(role="filter", name="blip", checkpoint=at["blip"], image_size=32, batch_size=BATCH),
        "blip2": GeneratorCard(
            role="captioner",
            model="transformers",
            name="blip2",
            checkpoint=at["blip2"],
            prompt="a picture of",
            batch_size=BATCH,
        ),
    }


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Web:
    return toyweb.render_clean(tmp_path_factory.mktemp("clean"), images=IMAGES, captions=CAPTIONS, shards=2)


@pytest.fixture(scope="module")
def images(web: Web) -> list[LabelledImage]:
    return read_test_set(shards(web), Images()).images


def shards(web: Web) -> Input:
    return Input(paths=(str(web.directory / "shards"),))


Measure = Callable[..., Report]


@pytest.fixture
def measure(tmp_path: Path, web: Web) -> Measure:
    def run(**fields: Any) -> Report:
        spec = EvaluateSpec(**{"kind": "evaluate", "output": str(tmp_path / "out"), "pairs": shards(web), **fields})
        return evaluate(spec, console=Console(file=io.StringIO()))

    return run


def printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(*report_table(report.record()))
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def rgb(image: LabelledImage) -> np.ndarray[Any, Any]:
    return decode(image.image, Images()).rgb


# --- retrieval ---


def cosines(directory: Path, siglip: bool, images: list[LabelledImage], texts: list[str]) -> Any:
    """By transformers alone [I, T]."""
    with quiet():
        network = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
        processor, tokenizer = AutoImageProcessor.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    padding: Any = "max_length" if siglip else True
    tokens = tokenizer(texts, padding=padding, truncation=True, max_length=16, return_tensors="pt")
    if siglip:
        del tokens["attention_mask"]
    seen = processor(images=[Image.fromarray(rgb(image)) for image in images], return_tensors="pt")
    with torch.inference_mode():
        found = network(**tokens, **seen)
        return (found.image_embeds @ found.text_embeds.T).numpy()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_retrieval_is_by_similarity_alone(
    measure: Measure, cards: dict[str, Any], checkpoints: dict[str, Path], images: list[LabelledImage], kind: str
) -> None:
    report = measure(filter=cards[kind], calibrate=False)
    found = report.retrieval
    assert found is not None
    texts = [text for image in images for text in image.cleaned]
    owner = np.repeat(np.arange(IMAGES), CAPTIONS)
    expected = recall_at_k(np.round(cosines(checkpoints[kind], kind == "siglip", images, texts), 5), owner)
    assert found.itc.image_to_text == pytest.approx(expected.image_to_text, abs=1 / IMAGES)
    assert found.itc.text_to_image == pytest.approx(expected.text_to_image, abs=1 / len(texts))
    assert 0 < found.itc.text_to_image[5] < 1
    assert (found.itm, found.k_test, found.images, found.texts) == (None, None, IMAGES, len(texts))
    assert "similarity" in printed(report)
    assert "ITM" not in printed(report)
    pooled = measure(filter=cards[kind], calibrate=False, retrieval=Retrieval(pool=5)).retrieval
    assert pooled is not None
    assert (pooled.pools, pooled.left_out_images) == (2, 4)


# --- the filter ---


def scores_of(cards: dict[str, Any], name: str, images: list[LabelledImage], texts: list[list[str]]) -> list[float]:
    """Image by image."""
    card, found = cards[name], []
    if isinstance(card, FilterCard):
        blip = ItmFilter(card, "cpu")
        for image, own in zip(images, texts, strict=True):
            found += [score.itm for score in blip.score(resize(rgb(image), 32)[None], [own])[0]]
        return found
    dual = DualFilter(card, "cpu")
    for image, own in zip(images, texts, strict=True):
        found += [score.itm for score in dual.score([dual.prepare(rgb(image), "")], [own])[0]]
    return found


@pytest.mark.parametrize(("kind", "unit"), [("clip", "cosine"), ("likely", "probability")])
def test_a_threshold_in_the_cards_unit(
    measure: Measure, cards: dict[str, Any], images: list[LabelledImage], kind: str, unit: str
) -> None:
    report = measure(filter=cards[kind], retrieval=None, seed=3, max_false_positive_rate=0.25)
    found = report.calibration
    assert found is not None
    wrong = shuffled_texts(images, None, 3)
    texts = [[*image.cleaned, *others] for image, others in zip(images, wrong, strict=True)]
    true = [n < CAPTIONS for own in texts for n in range(len(own))]
    scores = np.array(scores_of(cards, kind, images, texts))
    assert (found.matched, found.shuffled, found.unit) == (IMAGES * CAPTIONS, IMAGES * CAPTIONS, unit)
    assert found.roc_auc == pytest.approx(roc_auc_score(true, scores), abs=0.01)
    assert found.average_precision == pytest.approx(average_precision_score(true, scores), abs=0.01)
    assert found.threshold is not None
    kept = scores >= found.threshold - 1e-6
    assert found.recall == pytest.approx(recall_score(true, kept))
    assert found.false_positive_rate is not None
    assert found.false_positive_rate <= 0.25
    assert f"threshold, of {unit}" in printed(report)


def test_coarse_weights_of_clip_are_compared_with_float32(measure: Measure, cards: dict[str, Any]) -> None:
    coarse = cards["clip"].model_copy(update={"dtype": "bfloat16"})
    found = measure(filter=coarse, retrieval=None).precision
    assert found is not None
    assert (found.texts, found.threshold) == (2 * IMAGES * CAPTIONS, 0.05)
    assert 0 < found.largest < 0.1


# --- labels ---


@pytest.fixture
def labels(images: list[LabelledImage], tmp_path: Path) -> Truth:
    """Of six images: their own texts, of which two are wrong, and texts that no one wrote for a test set; and of an
    image that is not there."""
    rows: list[tuple[str, str, bool]] = []
    for n, image in enumerate(images[:6]):
        rows += [(image.sha256, image.texts[0].upper(), n not in (1, 4)), (image.sha256, "a dog in the car", n == 2)]
        rows += [(image.sha256, f"two {'red' if n % 2 else 'blue'} dots", bool(n % 2))]
    rows += [(UNKNOWN, "a cat", True), (UNKNOWN, "a house", False)]
    path = tmp_path / "labels.parquet"
    sha256, texts, true = zip(*rows, strict=True)
    drawn = ['{"sort":"random"}', "{}"] * (len(rows) // 2)
    pq.write_table(pa.table({"image_sha256": sha256, "text": texts, "true": true, "drawn": drawn}), path)
    return Truth(labels=Input(paths=(str(path),)))


def labelled(images: list[LabelledImage], labels: Truth) -> tuple[list[list[str]], list[bool]]:
    assert labels.labels is not None
    rows = pq.read_table(labels.labels.paths[0]).to_pylist()
    of = [[row for row in rows if row["image_sha256"] == image.sha256] for image in images]
    return [[clean(row["text"]) for row in own] for own in of], [row["true"] for own in of for row in own]


@pytest.mark.parametrize("kind", ["blip", "clip"])
def test_labels_judge_a_filter_of_any_kind(
    measure: Measure, cards: dict[str, Any], images: list[LabelledImage], labels: Truth, kind: str
) -> None:
    report = measure(filter=cards[kind], retrieval=None, truth=labels)
    found = report.labelled
    assert found is not None
    assert report.pairs is not None
    assert report.pairs.images == 6  # no other is needed
    texts, true = labelled(images[:6], labels)
    scores = np.array(scores_of(cards, kind, images[:6], texts))
    own = found.filters[kind]
    assert (found.texts, found.true, found.left_out, found.together) == (18, sum(true), 2, None)
    assert (own.texts, own.true) == (18, sum(true))
    assert own.roc_auc == pytest.approx(roc_auc_score(true, scores), abs=0.02)
    assert own.average_precision == pytest.approx(average_precision_score(true, scores), abs=0.02)
    least = cards[kind].thresholds.web
    kept = scores >= least
    assert own.in_use is not None
    assert (own.in_use.threshold, own.in_use.recall) == (least, pytest.approx(recall_score(true, kept)))
    if kept.any():
        assert own.in_use.precision == pytest.approx(precision_score(true, kept))
    assert own.best is not None
    above = scores >= own.best.threshold - 1e-6
    assert own.best.recall == pytest.approx(recall_score(true, above))
    assert "texts that labels know: 18" in printed(report)
    assert found.chosen == 9
    assert "9 of the marked texts were not drawn at random" in printed(report)
    whole = measure(filter=cards[kind], truth=labels)  # retrieval takes all images
    assert whole.pairs is not None
    assert whole.labelled is not None
    assert (whole.pairs.images, whole.labelled.texts, whole.labelled.left_out) == (IMAGES, 18, 2)


def test_labels_of_other_images_are_refused(measure: Measure, cards: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"image_sha256": [UNKNOWN], "text": ["a cat"], "true": [True]}), path)
    other = Truth(labels=Input(paths=(str(path),)))
    with pytest.raises(InputError, match="none is of the 1 images that the labels know; name the files"):
        measure(filter=cards["clip"], retrieval=None, truth=other)
    with pytest.raises(InputError, match=r"truth\.labels: they know none of the images of pairs"):
        measure(filter=cards["clip"], truth=other)


def test_a_text_that_is_known_to_be_wrong_is_no_match(images: list[LabelledImage]) -> None:
    wrong = {(images[n].sha256, images[n].cleaned[0]): False for n in (0, 3)}
    blind, seeing = shuffled_pairs(images, None, 1), shuffled_pairs(images, Labels(wrong), 1)
    assert blind.true_N.sum() - seeing.true_N.sum() == 2
    assert [len(own) for own in blind.texts[:4]] == [4, 4, 4, 4]
    assert [len(own) for own in seeing.texts[:4]] == [3, 4, 4, 3]
    assert images[0].cleaned[0] not in seeing.texts[0]


# --- several filters ---


@pytest.mark.parametrize("decision", ["mean", "vote"])
def test_filters_that_judge_together(
    measure: Measure, cards: dict[str, Any], images: list[LabelledImage], labels: Truth, decision: str
) -> None:
    names = ("blip", "likely") if decision == "mean" else ("blip", "clip", "likely")
    report = measure(filters=tuple(cards[name] for name in names), decision=decision, truth=labels)
    texts, true = labelled(images[:6], labels)
    scores = {name: np.array(scores_of(cards, name, images[:6], texts)) for name in names}
    least = {name: cards[name].thresholds.web for name in names}
    found = report.labelled
    assert found is not None
    assert list(found.filters) == list(names)
    assert found.units == {name: "cosine" if name == "clip" else "probability" for name in names}
    for name in names:
        assert found.filters[name].roc_auc == pytest.approx(roc_auc_score(true, scores[name]), abs=0.02)
    together = found.together
    assert found.decision == decision
    assert together is not None
    assert together.in_use is not None
    if decision == "mean":
        mean = np.mean(list(scores.values()), axis=0)
        kept = mean >= np.mean(list(least.values()))
        assert together.in_use.threshold == pytest.approx(np.mean(list(least.values())))
        assert together.roc_auc == pytest.approx(roc_auc_score(true, mean), abs=0.02)
        assert together.best is not None
    else:
        kept = 2 * sum(scores[name] >= least[name] for name in names) > len(names)
        assert np.isnan(together.in_use.threshold)
        assert (together.roc_auc, together.best) == (None, None)
    assert together.in_use.recall == pytest.approx(recall_score(true, kept))
    assert report.record()["labelled"]["together"]["in_use"]["recall"] == together.in_use.recall
    assert report.calibration is None
    assert report.ensemble is not None
    assert report.ensemble.true == sum(len(image.cleaned) for image in images[:6]) - 2  # those that labels know untrue
    assert f"all, by {decision}" in printed(report)


# --- captioners ---


def test_captions_of_a_generator_are_transformers_greedy_ones(
    measure: Measure, cards: dict[str, Any], checkpoints: dict[str, Path], images: list[LabelledImage], web: Web
) -> None:
    card = cards["blip2"].model_copy(update={"sampling": SamplingOverride(max_tokens=7, min_tokens=2, top_p=0.5)})
    report = measure(captioner=card, truth=Truth(toyweb=str(web.directory)))
    with quiet():
        network = AutoModelForImageTextToText.from_pretrained(checkpoints["blip2"], dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(checkpoints["blip2"])
    theirs = []
    for image in images:
        inputs = processor(images=Image.fromarray(rgb(image)), text="a picture of", return_tensors="pt")
        with quiet():
            written = network.generate(
                **inputs, do_sample=False, max_new_tokens=7, min_new_tokens=2, suppress_tokens=BANNED, pad_token_id=1
            )
        text = processor.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        theirs.append(" ".join(text.split()))
    found = report.captioning
    assert found is not None
    assert found.distinct == len(set(theirs)) > 3
    assert found.mean_words == pytest.approx(np.mean([len(text.split()) for text in theirs]))
    assert found.bleu4 == pytest.approx(bleu4(theirs, [image.texts for image in images]))
    assert (found.judged, found.refused) == (IMAGES, 0)


def test_captions_of_an_endpoint(measure: Measure, images: list[LabelledImage], web: Web) -> None:
    """One image is refused; it is counted, and the others are measured."""
    refused: list[str] = []

    def reply(asked: Asked) -> Reply:
        if asked.body["seed"]:  # not the trial with a plain image
            refused.append(asked.name)
            if asked.name == refused[0]:
                return completion(None, refusal="I cannot help with that")
        return caption(asked) if not asked.body["seed"] else completion(images[2].texts[0])

    with ChatServer(reply) as server:
        card = EndpointCard(
            role="captioner",
            model="openai",
            name="remote",
            base_url=server.url,
            served_model="m",
            prompt="Describe.",
            parameters="openai",
            concurrency=3,
            sampling=SamplingOverride(min_tokens=0),
        )
        report = measure(captioner=card, truth=Truth(toyweb=str(web.directory)))
        bodies = [asked.body for asked in server.asked]
    found = report.captioning
    assert found is not None
    assert found.refused >= 1
    assert found.judged == IMAGES - found.refused
    assert found.distinct == 1
    assert found.true is not None
    assert found.true >= 1 / IMAGES
    assert {(body["temperature"], body["top_p"], body["max_tokens"]) for body in bodies} == {(1.0, 1e-6, 16)}
    assert "images that the endpoint did not caption" in printed(report)


# --- what a kind cannot do ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"filter": "clip", "retrieval": {"k_test": 256}},
            r"retrieval\.k_test: clip is a `clip` card, which has no ITM head .*leave k_test out",
        ),
        ({"captioner": "blip2", "captioning": {"beams": 3}}, r"captioning\.beams: beam search is for BLIP's"),
        ({"filters": ["clip"]}, "one card goes into `filter`"),
        ({"filters": ["clip", "clip"]}, "several are named clip"),
        ({"filters": ["clip", "blip"]}, r"unlike units \(clip: cosine, blip: probability\).*use decision: vote"),
        ({"filter": "clip", "filters": ["clip", "siglip"]}, "filter and filters: give one of the two"),
        ({"filter": "clip", "decision": "vote"}, "a vote takes several filters; list their cards in `filters`"),
        ({"filters": ["clip", "siglip"], "calibrate": False}, "pairs are measured with"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(
    cards: dict[str, Any], web: Web, fields: dict[str, Any], message: str
) -> None:
    def card(name: Any) -> Any:
        return cards.get(name, name)

    given = {
        name: [card(one) for one in value]
        if isinstance(value, list)
        else card(value)
        if isinstance(value, str)
        else value
        for name, value in fields.items()
    }
    with pytest.raises(ValidationError, match=message):
        EvaluateSpec.model_validate({"kind": "evaluate", "output": "out", "pairs": shards(web), **given})


def test_a_spec_names_cards_by_their_files(cards: dict[str, Any], web: Web, tmp_path: Path) -> None:
    for name in ("clip", "likely"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(cards[name].model_dump(mode="json", exclude_unset=True)))
    data = {"kind": "evaluate", "output": "out", "pairs": {"paths": [str(web.directory / "shards")]}}
    file = tmp_path / "evaluate.yaml"
    file.write_text(yaml.safe_dump({**data, "filters": ["clip.yaml", "likely.yaml"], "decision": "vote"}))
    spec = load_spec(file)
    assert isinstance(spec, EvaluateSpec)
    assert [card.name for card in spec.judges] == ["clip", "likely"]
    checked = CliRunner().invoke(app, ["check", str(file), "--set", "filters.1.thresholds.web=0.2"])
    assert checked.exit_code == 0, checked.output
    assert "filter likely" in checked.stdout
    file.write_text(yaml.safe_dump({**data, "filter": "clip.yaml", "retrieval": {"k_test": 9}}))
    with pytest.raises(SpecError, match=r"evaluate\.yaml: .*leave k_test out"):
        load_spec(file)
    server = {"role": "captioner", "model": "openai", "name": "r", "base_url": "http://127.0.0.1:9/v1"}
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({**server, "served_model": "m", "prompt": "?", "parameters": "openai"})
    )
    file.write_text(yaml.safe_dump({**data, "captioner": "r.yaml"}))
    with pytest.raises(SpecError, match=r"captioner r: OpenAI's interface has no min_tokens"):
        load_spec(file)


# --- what is on record, without a model ---


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CurateSpec]:
    """The same web by two filters, by mean and by vote."""
    return {
        decision: make_dataset(tmp_path_factory.mktemp(decision), decision=decision, report=False)
        for decision in ("mean", "vote")
    }


def marks(output: str, path: Path) -> tuple[Quality, list[dict[str, Any]]]:
    """Every web text that was scored, marked by its hash."""
    texts = [
        {**row["texts"][0], "sha256": row["image_sha256"]}
        for row in read(output)
        if row["image_sha256"] and row["texts"] and row["texts"][0]["itm"] is not None
    ]
    for text in texts:
        text["true"] = hashlib.sha256(text["text"].encode()).digest()[0] % 2 == 0
    columns = {"image_sha256": [t["sha256"] for t in texts], "text": [t["text"] for t in texts]}
    pq.write_table(pa.table({**columns, "true": [t["true"] for t in texts]}), path)
    return Quality(dataset=output, truth=Truth(labels=Input(paths=(str(path),)))), texts


@pytest.mark.parametrize("decision", ["mean", "vote"])
def test_marks_calibrate_each_filter_on_record(
    measure: Measure, curated: dict[str, CurateSpec], tmp_path: Path, decision: str
) -> None:
    quality, texts = marks(curated[decision].output, tmp_path / "marks.parquet")
    report = measure(pairs=None, quality=(quality,))
    (found,) = report.quality
    web = found.sources["web"]
    true = np.array([text["true"] for text in texts])
    assert (found.decision, list(web.filters)) == (decision, ["stub-filter-0", "stub-filter-1"])
    for number, own in enumerate(web.filters.values()):
        scores = np.array([text["scores"][number]["itm"] for text in texts])
        assert (own.texts, own.true) == (len(texts), true.sum())
        assert own.roc_auc == pytest.approx(roc_auc_score(true, scores))
        assert own.best is not None
        above = scores >= own.best.threshold
        assert (own.best.precision, own.best.recall) == pytest.approx(
            (precision_score(true, above), recall_score(true, above))
        )
    assert (web.calibrated is None) == (decision == "vote")
    assert web.roc_auc == pytest.approx(roc_auc_score(true, [text["itm"] for text in texts]))
    assert "best threshold of stub-filter-1" in printed(report)


def test_what_is_on_record_is_measured_without_torch(curated: dict[str, CurateSpec], tmp_path: Path) -> None:
    quality, _ = marks(curated["vote"].output, tmp_path / "marks.parquet")
    spec = EvaluateSpec(kind="evaluate", output=str(tmp_path / "out"), quality=(quality,))
    code = (
        "import sys, capfilt; from capfilt.spec import EvaluateSpec\n"
        f"capfilt.run(EvaluateSpec(**{spec.model_dump()!r}))\n"
        "sys.exit(', '.join(m for m in ('torch', 'ray', 'transformers') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "evaluation.json").exists()
