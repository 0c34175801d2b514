"""Whole evaluations of a tiny pair on rendered webs, against numbers worked out another way."""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import MakeSpec, jpeg, read, write_shard
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score, confusion_matrix, precision_score, recall_score, roc_auc_score
from stubs import HashCaptioner, HashFilter
from transformers import BlipForImageTextRetrieval

from capfilt import toyweb
from capfilt.errors import CheckpointError, DatasetError, InputError
from capfilt.evaluate import bleu4, cider
from capfilt.images import decode
from capfilt.models.captioner import Captioner
from capfilt.models.checkpoints import quiet
from capfilt.models.itm import ItmFilter
from capfilt.models.measures import compare_precision, shuffled_texts
from capfilt.models.preprocess import normalise, resize
from capfilt.models.tiny import write_tiny_pair
from capfilt.pipelines.curate import curate, in_process
from capfilt.pipelines.evaluate import Report, evaluate
from capfilt.schema import Reason
from capfilt.spec import (
    CaptionerCard,
    Captioning,
    CurateSpec,
    EvaluateSpec,
    FilterCard,
    Images,
    Input,
    LocalCheckpoint,
    Quality,
    Retrieval,
    Sampling,
    Thresholds,
    Truth,
)
from capfilt.tables import report_table
from capfilt.testset import LabelledImage, read_test_set
from capfilt.text import clean
from capfilt.toyweb import ATTRIBUTES, SCENES, Scene, Web
from capfilt.truth import Scenes

torch.set_num_threads(1)

CAPTIONS = 2
BATCH = 7


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> tuple[CaptionerCard, FilterCard]:
    """Of a tiny pair, at two image sizes."""
    captioner, filter_ = write_tiny_pair(tmp_path_factory.mktemp("tiny"))
    return (
        CaptionerCard(role="captioner", name="c", checkpoint=at(captioner), image_size=40, batch_size=BATCH),
        FilterCard(role="filter", name="f", checkpoint=at(filter_), image_size=32, batch_size=BATCH),
    )


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Web:
    """16 images in two files, two texts each."""
    return toyweb.render_clean(tmp_path_factory.mktemp("clean"), images=16, captions=CAPTIONS, shards=2)


def at(path: Path) -> LocalCheckpoint:
    return LocalCheckpoint(path=str(path))


def shards(web: Web) -> Input:
    return Input(paths=(str(web.directory / "shards"),))


Measure = Callable[..., Report]


@pytest.fixture
def measure(tmp_path: Path, web: Web, cards: tuple[CaptionerCard, FilterCard]) -> Measure:
    """Evaluates the tiny pair on the web; keyword arguments replace fields of the spec."""

    def run(**fields: Any) -> Report:
        defaults = {"kind": "evaluate", "output": str(tmp_path / "out"), "captioner": cards[0], "filter": cards[1]}
        spec = EvaluateSpec(**{**defaults, "pairs": shards(web), **fields})
        return evaluate(spec, console=Console(file=io.StringIO()))

    return run


@pytest.fixture
def retrieval_only(measure: Measure) -> Measure:
    return lambda **fields: measure(captioner=None, calibrate=False, **fields)


def images_of(pairs: Input) -> list[LabelledImage]:
    return read_test_set(pairs, Images()).images


def pixels(images: Sequence[LabelledImage], size: int) -> torch.Tensor:
    return torch.stack([resize(decode(image.image, Images()).rgb, size) for image in images])


# --- retrieval ---


def brute_force(
    card: FilterCard, images: Sequence[LabelledImage], k_test: int
) -> dict[str, dict[str, dict[int, float]]]:
    """R@k, pair by pair: ITC by the filter's own score, the match logit by transformers with [ENC] put in by hand."""
    ours = ItmFilter(card, "cpu")
    texts = [(number, text) for number, image in enumerate(images) for text in image.cleaned]
    with quiet():
        theirs = BlipForImageTextRetrieval.from_pretrained(card.checkpoint.path, local_files_only=True).eval()
    rows = ours.score(pixels(images, card.image_size), [[text for _, text in texts]] * len(images))
    itc = [[round(score.itc, 5) for score in row] for row in rows]
    logit = [[0.0] * len(texts) for _ in images]
    with torch.inference_mode():
        for i, image in enumerate(images):
            shown = normalise(pixels([image], card.image_size), torch.float32)
            for t, (_, text) in enumerate(texts):
                ids = torch.tensor([ours._blip.tokenizer.encode(text).ids])
                ids[0, 0] = ours._blip.enc
                logit[i][t] = round(theirs(input_ids=ids, pixel_values=shown).itm_score[0, 1].item(), 5)

    def rank(scores: list[float], right: list[int]) -> int:
        best = max(scores[n] for n in right)
        return sum(score >= best for n, score in enumerate(scores) if n not in right)

    def after(scores: list[float], logits: list[float]) -> list[float]:
        kept = sorted(range(len(scores)), key=lambda n: -scores[n])[:k_test]
        return [scores[n] + logits[n] if n in kept else -math.inf for n in range(len(scores))]

    def recall(reranked: bool) -> dict[str, dict[int, float]]:
        def final(scores: list[float], logits: list[float]) -> list[float]:
            return after(scores, logits) if reranked else scores

        def column(matrix: list[list[float]], t: int) -> list[float]:
            return [row[t] for row in matrix]

        forth = [
            rank(final(itc[i], logit[i]), [t for t, (owner, _) in enumerate(texts) if owner == i])
            for i in range(len(images))
        ]
        back = [rank(final(column(itc, t), column(logit, t)), [i]) for t, (i, _) in enumerate(texts)]
        ways = {"image_to_text": forth, "text_to_image": back}
        return {way: {k: sum(r < k for r in ranks) / len(ranks) for k in (1, 5, 10)} for way, ranks in ways.items()}

    return {"itc": recall(False), "itm": recall(True)}


def recalls(found: Any) -> dict[str, dict[str, dict[int, float]]]:
    return {
        name: {"image_to_text": part.image_to_text, "text_to_image": part.text_to_image}
        for name, part in (("itc", found.itc), ("itm", found.itm))
    }


def approx(expected: dict[str, dict[str, dict[int, float]]]) -> dict[str, Any]:
    return {name: {way: pytest.approx(ks) for way, ks in ways.items()} for name, ways in expected.items()}


def test_retrieval_is_what_every_pair_alone_gives(
    retrieval_only: Measure, web: Web, cards: tuple[CaptionerCard, FilterCard]
) -> None:
    found = retrieval_only(retrieval=Retrieval(k_test=9)).retrieval
    assert found is not None
    expected = brute_force(cards[1], images_of(shards(web)), 9)
    assert recalls(found) == approx(expected)
    assert expected["itc"] != expected["itm"]
    assert 0 < expected["itm"]["text_to_image"][10] < 1
    assert (found.images, found.texts, found.pools, found.left_out_images, found.k_test) == (16, 32, 1, 0, 9)


def test_images_compete_in_their_pool_only(
    retrieval_only: Measure, tmp_path: Path, web: Web, cards: tuple[CaptionerCard, FilterCard]
) -> None:
    """Pools of 6, then 4 images that fill none; the first image has one text more than the others."""
    rows = [row for shard in web.shards for row in pq.read_table(shard).to_pylist()]
    rows.insert(0, rows[0] | {"caption": "a dog"})
    write_shard(tmp_path / "in" / "0.parquet", [row["jpg"] for row in rows], [row["caption"] for row in rows])
    pairs = Input(paths=(str(tmp_path / "in"),))
    images = images_of(pairs)
    assert [len(image.texts) for image in images] == [3] + [2] * 15
    found = retrieval_only(pairs=pairs, retrieval=Retrieval(k_test=4, pool=6)).retrieval
    assert found is not None
    one, two = brute_force(cards[1], images[:6], 4), brute_force(cards[1], images[6:12], 4)
    expected = {
        name: {
            way: {k: (a * one[name][way][k] + b * two[name][way][k]) / (a + b) for k in (1, 5, 10)}
            for way, (a, b) in {"image_to_text": (6, 6), "text_to_image": (13, 12)}.items()
        }
        for name in ("itc", "itm")
    }
    assert recalls(found) == approx(expected)
    assert (found.images, found.texts, found.pools, found.pool_images, found.left_out_images) == (12, 25, 2, 6, 4)


def test_a_pool_of_all_or_more_is_all(retrieval_only: Measure) -> None:
    whole = retrieval_only().retrieval
    assert whole is not None
    assert (whole.pools, whole.pool_images) == (1, 16)
    assert retrieval_only(retrieval=Retrieval(pool=16)).retrieval == whole
    assert retrieval_only(retrieval=Retrieval(pool=99)).retrieval == whole


def test_equal_texts_of_several_images(
    retrieval_only: Measure, tmp_path: Path, cards: tuple[CaptionerCard, FilterCard]
) -> None:
    """What no one can tell apart counts as missed: such a text never has its image's text first."""
    same = ["A dog.", "a dog", "a dog", "a cat", "a red circle", "a blue square", "a house"]
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(n) for n in (0, 0, 1, 2, 3, 4, 5)], same)
    pairs = Input(paths=(str(tmp_path / "in"),))
    images = images_of(pairs)
    report = retrieval_only(pairs=pairs, retrieval=Retrieval(k_test=5))
    assert report.pairs is not None
    assert (report.pairs.rows, report.pairs.images, report.pairs.texts) == (7, 6, 6)
    assert report.pairs.left_out == {Reason.DUPLICATE_TEXT: 1}
    assert recalls(report.retrieval) == approx(brute_force(cards[1], images, 5))
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(n) for n in range(3)], ["a dog"] * 3)
    found = retrieval_only(pairs=pairs).retrieval
    assert found is not None
    assert found.itm.image_to_text == {1: 0, 5: 1, 10: 1}


# --- the filter's parts for retrieval ---


def test_the_filters_parts_are_its_score(cards: tuple[CaptionerCard, FilterCard], web: Web) -> None:
    filter_, images = ItmFilter(cards[1], "cpu"), images_of(shards(web))
    shown = pixels(images, 32)
    texts = ["a dog", "", "a large red circle on a white background, " * 9, *(f"{n} circles" for n in range(20))]
    scores = filter_.score(shown, [texts] * len(images))
    tokens = filter_.tokens(texts)
    itc_IN = filter_.embed_images(shown) @ filter_.embed_texts(tokens).T
    assert itc_IN.tolist() == [pytest.approx([score.itc for score in own], abs=1e-5) for own in scores]
    wanted = [list(range(len(texts)))[n % 5 :: 2][::-1] for n in range(len(images))]
    wanted[3] = []
    logits = filter_.match(shown, tokens, wanted)
    assert [len(own) for own in logits] == [len(own) for own in wanted]
    head = filter_._blip.model.itm_head
    with torch.no_grad():  # the other class says nothing: then the probability is the logit's sigmoid
        head.weight[0], head.bias[0] = 0, 0
    alone = filter_.score(shown, [[texts[n] for n in own] for own in wanted])
    for own, judged in zip(logits, alone, strict=True):
        assert own.sigmoid().tolist() == pytest.approx([score.itm for score in judged], abs=1e-5)
    with pytest.raises(ValueError, match="16 images, texts of 2"):
        filter_.match(shown, tokens, [[0], [1]])


# --- captions ---


def test_captions_against_texts_and_truth(measure: Measure, web: Web, cards: tuple[CaptionerCard, FilterCard]) -> None:
    settings = Captioning(beams=2, min_tokens=2, max_tokens=9)
    report = measure(filter=None, captioning=settings, truth=Truth(toyweb=str(web.directory)))
    found, images = report.captioning, images_of(shards(web))
    assert found is not None
    sampling = Sampling(min_tokens=2, max_tokens=9, repetition_penalty=1)
    captioner = Captioner(cards[0], sampling, "cpu")
    captions = [captioner.describe(pixels([image], 40), beams=2)[0] for image in images]
    texts = [image.texts for image in images]
    assert (found.bleu4, found.cider) == pytest.approx((bleu4(captions, texts), cider(captions, texts)))
    assert found.cider is not None
    assert found.distinct == len(set(captions)) > 1
    assert found.mean_words == pytest.approx(np.mean([len(caption.split()) for caption in captions]))
    scenes = scenes_of(web)
    true = [toyweb.is_true(caption, scenes[image.sha256]) for caption, image in zip(captions, images, strict=True)]
    assert (found.judged, found.true, found.exact) == (16, sum(true) / 16, 0)
    assert report.retrieval is report.calibration is None


def test_captions_that_labels_know(measure: Measure, tmp_path: Path, web: Web) -> None:
    """Greedy captions of two images, one labelled true and one not; labels do not say what is whole."""
    images = images_of(shards(web))
    first = measure(filter=None).captioning
    assert first is not None
    assert (first.judged, first.true, first.exact) == (0, None, None)
    truth = tmp_path / "labels.parquet"
    captioner = Captioner(
        CaptionerCard.model_validate(measure(filter=None).spec["captioner"]),
        Sampling(min_tokens=1, max_tokens=16, repetition_penalty=1),
        "cpu",
    )
    two = [images[2], images[5]]
    captions = [captioner.describe(pixels([image], 40))[0] for image in two]
    columns = {"image_sha256": [image.sha256 for image in two], "text": captions, "true": [True, False]}
    pq.write_table(pa.table(columns), truth)
    found = measure(filter=None, truth=Truth(labels=Input(paths=(str(truth),)))).captioning
    assert found is not None
    assert (found.judged, found.true, found.exact) == (2, 0.5, None)


def scenes_of(web: Web) -> dict[str, Scene]:
    """By sha256; broken pictures, too."""
    rows = {shard.name: pq.read_table(shard, columns=["sha256"]).to_pylist() for shard in web.shards}
    return {
        rows[truth["shard"]][truth["row"]]["sha256"]: Scene(**{name: truth[name] for name in ATTRIBUTES})
        for truth in pq.read_table(web.truth).to_pylist()
    }


# --- the threshold ---


def test_calibration_is_scikit_learns(measure: Measure, web: Web, cards: tuple[CaptionerCard, FilterCard]) -> None:
    found = measure(captioner=None, retrieval=None, seed=5, max_false_positive_rate=0.25).calibration
    images = images_of(shards(web))
    wrong = shuffled_texts(images, None, 5)
    filter_ = ItmFilter(cards[1], "cpu")
    scores, true = [], []
    for image, others in zip(images, wrong, strict=True):
        own = filter_.score(pixels([image], 32), [[*image.cleaned, *others]])[0]
        scores += [score.itm for score in own]
        true += [True] * len(image.cleaned) + [False] * len(others)
    assert found is not None
    assert (found.matched, found.shuffled, found.left_out, found.problem) == (32, 32, 0, None)
    assert found.roc_auc == pytest.approx(roc_auc_score(true, scores), abs=0.01)
    assert found.average_precision == pytest.approx(average_precision_score(true, scores), abs=0.01)
    assert found.threshold is not None
    kept = np.array(scores) >= found.threshold - 3e-7  # it is one of the scores, in a batch of another shape
    assert found.precision == pytest.approx(precision_score(true, kept))
    assert found.recall == pytest.approx(recall_score(true, kept))
    assert found.false_positive_rate == pytest.approx(kept[~np.array(true)].mean())
    assert found.false_positive_rate <= 0.25


def test_coarse_weights_are_compared_with_float32(
    measure: Measure, web: Web, cards: tuple[CaptionerCard, FilterCard], tmp_path: Path
) -> None:
    assert measure(captioner=None, retrieval=None).precision is None  # nothing to compare
    images = images_of(shards(web))
    wrong = shuffled_texts(images, None, 3)
    scores = {}
    for dtype in ("float32", "bfloat16"):
        judge = ItmFilter(cards[1].model_copy(update={"dtype": dtype}), "cpu")
        texts = [[*image.cleaned, *others] for image, others in zip(images, wrong, strict=True)]
        scores[dtype] = np.array([[score.itm for score in row] for row in judge.score(pixels(images, 32), texts)])
    middle = float(np.median(scores["float32"]))  # where many decisions are close
    card = cards[1].model_copy(update={"dtype": "bfloat16", "thresholds": Thresholds(web=middle)})
    found = measure(captioner=None, retrieval=None, seed=3, filter=card).precision
    assert found is not None
    assert (found.texts, found.threshold) == (64, middle)
    assert found.largest == pytest.approx(np.abs(scores["bfloat16"] - scores["float32"]).max(), abs=2e-3)
    assert 0 < found.largest < 0.1
    flipped = (scores["bfloat16"] >= middle) != (scores["float32"] >= middle)
    assert found.flipped == pytest.approx(flipped.sum(), abs=3)  # in other batches a score rounds otherwise
    assert found.fraction == found.flipped / 64
    shown = Console(file=io.StringIO(), width=100)
    for table in report_table(json.loads((tmp_path / "out" / "evaluation.json").read_text())):
        shown.print(table)
    assert f"decided otherwise, of 64 at {middle:.2f}" in shown.file.getvalue()  # type: ignore[attr-defined]


def test_precision_to_check_by_eye() -> None:
    found = compare_precision([0.1, 0.5, 0.49, 0.9], [0.1, 0.49, 0.5, 0.8], 0.5)
    assert (found.texts, found.flipped, found.fraction) == (4, 2, 0.5)
    assert found.largest == pytest.approx(0.1)


def test_a_shuffled_text_is_anothers_and_not_true() -> None:
    """30 images of three scenes: without the truth many a shuffle is true all the same."""
    rng = random.Random(0)
    images, scenes = [], {}
    for number in range(30):
        sha256 = hashlib.sha256(bytes([number])).hexdigest()
        scenes[sha256] = SCENES[number % 3]
        texts = list(dict.fromkeys(toyweb.caption(scenes[sha256], rng) for _ in range(2)))
        images.append(LabelledImage(b"", sha256, texts, [clean(text) for text in texts]))
    judge, everyone = Scenes(scenes), {text for image in images for text in image.cleaned}

    def still_true(wrong: list[list[str]]) -> int:
        both = zip(images, wrong, strict=True)
        return sum(judge.is_true(image.sha256, text) is True for image, own in both for text in own)

    for seed in range(3):
        blind, seeing = shuffled_texts(images, None, seed), shuffled_texts(images, judge, seed)
        assert all(set(own) <= everyone - set(image.cleaned) for image, own in zip(images, blind, strict=True))
        assert [len(own) for own in blind] == [len(image.texts) for image in images]
        assert sum(map(len, blind)) - sum(map(len, seeing)) == still_true(blind) > 5
        assert still_true(seeing) == 0
        assert blind == shuffled_texts(images, None, seed) != shuffled_texts(images, None, seed + 1)


@pytest.mark.parametrize(
    ("scene", "texts"),
    [(SCENES[0], ["a small thing", "something white"]), (SCENES[1], ["a small red circle on black"] * 2)],
    ids=["true of both", "equal"],
)
def test_no_pair_can_be_shuffled(measure: Measure, tmp_path: Path, scene: Scene, texts: list[str]) -> None:
    assert (SCENES[0].size, SCENES[0].background) == ("small", "white")
    images = [jpeg(0), jpeg(1)]
    truth = tmp_path / "labels.parquet"
    pairs = [(hashlib.sha256(image).hexdigest(), text) for image in images for text in dict.fromkeys(texts)]
    known = {"image_sha256": [sha256 for sha256, _ in pairs], "text": [text for _, text in pairs]}
    pq.write_table(pa.table({**known, "true": [toyweb.is_true(text, scene) for _, text in pairs]}), truth)
    write_shard(tmp_path / "in" / "0.parquet", images, texts)
    report = measure(
        captioner=None,
        retrieval=None,
        pairs=Input(paths=(str(tmp_path / "in"),)),
        truth=Truth(labels=Input(paths=(str(truth),))),
    )
    found = report.calibration
    assert found is not None
    assert (found.matched, found.shuffled, found.left_out) == (2, 0, 2)
    assert found.problem == "no image has a text of another that is not true of it too; give more images"
    assert found.threshold is found.roc_auc is None


def broken_filter(card: FilterCard, directory: Path, value: float) -> FilterCard:
    """With a matching head that says the same of everything."""
    _, filter_ = write_tiny_pair(directory)
    weights = load_file(filter_ / "model.safetensors")
    weights["itm_head.weight"] = torch.full_like(weights["itm_head.weight"], value)
    save_file(weights, filter_ / "model.safetensors", metadata={"format": "pt"})
    return card.model_copy(update={"checkpoint": at(filter_)})


def test_a_limit_that_cannot_be_met_is_reported(
    measure: Measure, tmp_path: Path, cards: tuple[CaptionerCard, FilterCard]
) -> None:
    card = broken_filter(cards[1], tmp_path / "tiny", 0.0)
    report = measure(captioner=None, retrieval=None, filter=card, max_false_positive_rate=0.1)
    assert report.calibration is not None
    assert report.calibration.problem is not None
    assert "32 of 32 untrue pairs have the highest score of all" in report.calibration.problem
    assert report.calibration.threshold is None
    assert report.calibration.roc_auc == 0.5


def test_a_model_that_gives_no_numbers_is_named(
    measure: Measure, tmp_path: Path, cards: tuple[CaptionerCard, FilterCard]
) -> None:
    card = broken_filter(cards[1], tmp_path / "tiny", math.nan)
    for part in ({"calibrate": False}, {"retrieval": None}):
        with pytest.raises(CheckpointError, match="f: the filter's scores are not numbers; its weights are broken"):
            measure(captioner=None, filter=card, **part)
    assert not (tmp_path / "out" / "evaluation.json").exists()


# --- quality ---


class GuessingCaptioner(HashCaptioner):
    """Names a colour, sometimes the right one; three candidates, of which two may be equal."""

    def caption(self, images_BCHW: torch.Tensor, sha256: Sequence[str]) -> list[list[str]]:
        assert len(images_BCHW) == len(sha256)
        colours = [random.Random(digest).choices(["red", "blue", "green"], k=3) for digest in sha256]
        return [[f"a {colour} thing" for colour in some] for some in colours]


def load_guessing(spec: CurateSpec, _device: str) -> tuple[list[HashCaptioner], list[HashFilter]]:
    captioners: list[HashCaptioner] = [GuessingCaptioner(card, spec.sampling) for card in spec.captioners]
    return captioners, [HashFilter(card) for card in spec.filters]


@pytest.fixture
def curated(make_spec: MakeSpec, tmp_path: Path) -> Quality:
    """A noisy web of 160 rows, some broken, curated by models that guess."""
    web = toyweb.render(tmp_path / "web", images=160, shards=2, noise=0.5, broken=0.1)
    spec = make_spec(input=shards(web), sampling=Sampling(candidates=3))
    curate(spec, load=load_guessing, execute=in_process, console=Console(file=io.StringIO()))
    return Quality(dataset=spec.output, truth=Truth(toyweb=str(web.directory)))


def test_quality_is_scikit_learns(measure: Measure, curated: Quality, tmp_path: Path) -> None:
    report = measure(pairs=None, captioner=None, filter=None, quality=(curated,))
    (found,) = report.quality
    root = Path(str(curated.truth.toyweb))
    scenes = scenes_of(Web(root, tuple(sorted((root / "shards").iterdir())), root / "truth.parquet", 160, {}, {}))
    rows = [
        {**text, "good": toyweb.is_true(text["text"], scenes[row["image_sha256"]])}
        for row in read(curated.dataset)
        for text in row["texts"]
        if row["status"] != "error" and row["image_sha256"] and text["text"]
    ]
    assert set(found.sources) == {"web", "synthetic"}
    for source, own in found.sources.items():
        some = [row for row in rows if row["source"] == source]
        true, score = [row["good"] for row in some], [row["itm"] for row in some]
        kept = [row for row in some if row["kept"]]
        decided = [row for row in some if row["kept"] or row["reason"] == "below_threshold"]
        verdicts = [row["good"] for row in decided], [row["kept"] for row in decided]
        assert (own.judged, own.scored, own.kept) == (len(some), len(some), len(kept))
        assert own.noise_before == own.noise_of_all == pytest.approx(1 - np.mean(true))
        assert own.noise_after == pytest.approx(1 - np.mean([row["good"] for row in kept]))
        assert own.roc_auc == pytest.approx(roc_auc_score(true, score))
        assert own.average_precision == pytest.approx(average_precision_score(true, score))
        assert own.precision == pytest.approx(precision_score(*verdicts))
        assert own.recall == pytest.approx(recall_score(*verdicts))
        negatives = confusion_matrix(*verdicts)[0]
        assert own.false_positive_rate == pytest.approx(negatives[1] / negatives.sum())
        assert own.not_decided == len(some) - len(decided)
    assert found.sources["web"].not_decided == 0
    assert found.sources["synthetic"].not_decided > 20
    assert found.sources["web"].texts > found.sources["web"].judged  # of broken pictures
    assert found.noise_before == pytest.approx(1 - np.mean([row["good"] for row in rows]))
    assert found.noise_after == pytest.approx(1 - np.mean([row["good"] for row in rows if row["kept"]]))
    assert found.kept == sum(row["kept"] for row in rows)
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["quality"][0]["sources"]["web"]["noise_after"] == found.sources["web"].noise_after
    assert record["pairs"] is record["retrieval"] is record["captioning"] is record["calibration"] is None


def test_labels_of_a_few_texts_leave_what_they_do_not_tell_open(
    measure: Measure, curated: Quality, tmp_path: Path
) -> None:
    """A web text that was kept, and one on a broken picture, which no filter read."""
    rows = read(curated.dataset)
    kept = next(row for row in rows if row["texts"][0]["kept"])
    broken = next(row for row in rows if row["status"] == "error" and row["image_bytes"] and row["texts"][0]["text"])
    columns = {
        "image_sha256": [row["image_sha256"] for row in (kept, broken)],
        "text": [row["texts"][0]["text"] for row in (kept, broken)],
        "true": [True, False],
    }
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    truth = Truth(labels=Input(paths=(str(tmp_path / "labels.parquet"),)))
    report = measure(pairs=None, quality=(curated.model_copy(update={"truth": truth}), curated))
    web, synthetic = (report.quality[0].sources[source] for source in ("web", "synthetic"))
    assert (web.judged, web.scored, web.kept, web.precision, web.recall) == (2, 1, 1, 1, 1)
    assert (web.noise_of_all, web.noise_before, web.noise_after) == (0.5, 0, 0)
    assert web.false_positive_rate is web.roc_auc is web.average_precision is None
    assert (synthetic.judged, synthetic.noise_before, synthetic.precision) == (0, None, None)
    assert len(report.quality) == 2


def test_a_truth_that_knows_nothing_of_a_dataset_is_refused(measure: Measure, curated: Quality, web: Web) -> None:
    other = curated.model_copy(update={"truth": Truth(toyweb=str(web.directory))})
    with pytest.raises(InputError, match=r"out: the truth knows none of its \d+ texts; give the labels"):
        measure(pairs=None, quality=(other,))
    gone = curated.model_copy(update={"dataset": curated.dataset + "gone"})
    with pytest.raises(DatasetError, match="no curated dataset there"):
        measure(pairs=None, quality=(gone,))


# --- the whole ---


def test_the_report_is_written_whole_and_without_nan(
    measure: Measure, tmp_path: Path, web: Web, curated: Quality
) -> None:
    report = measure(truth=Truth(toyweb=str(web.directory)), quality=(curated,), retrieval=Retrieval(pool=5))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    file = tmp_path / "out" / "evaluation.json"
    record = json.loads(file.read_text(), parse_constant=refuse)
    assert record == report.record()
    assert EvaluateSpec.model_validate(record["spec"]).pairs == shards(web)
    assert set(record["seconds"]) == {"quality", "read", "captioning", "load", "retrieval", "calibration"}
    assert record["pairs"] == {"rows": 32, "images": 16, "texts": 32, "left_out": {}}
    assert record["retrieval"]["itm"]["text_to_image"].keys() == {"1", "5", "10"}
    assert [path.name for path in file.parent.iterdir() if path.name.endswith(".json")] == ["evaluation.json"]
    console = Console(file=io.StringIO(), width=160)
    console.print(*report_table(record))
    shown = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    for words in ("TR@1", "CIDEr", "threshold", "ROC AUC", "3 pools of 5; 1 image left out", "synthetic"):
        assert words in shown


def test_a_single_image(measure: Measure, tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(1)], ["a dog"])
    report = measure(pairs=Input(paths=(str(tmp_path / "in"),)))
    assert report.captioning is not None
    assert report.captioning.cider is None
    assert report.retrieval is not None
    assert report.retrieval.itm.image_to_text == {1: 1, 5: 1, 10: 1}
    assert report.calibration is not None
    assert report.calibration.problem
    console = Console(file=io.StringIO(), width=200)
    console.print(*report_table(report.record()))
    assert "no image has a text of another" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_path_is_shown_as_it_is() -> None:
    """Square brackets are rich's markup."""
    quality = {"version": 3, "sources": {}, "kept": 0, "noise_before": None, "noise_after": None}
    (table,) = report_table({"quality": [{**quality, "dataset": "/data/[red]x"}]})
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    assert "/data/[red]x" in "".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_every_row_is_a_text_or_is_counted(measure: Measure, tmp_path: Path) -> None:
    images = [jpeg(0), None, jpeg(1), jpeg(2), b"<html>", b"<html>", jpeg(0), jpeg(0), jpeg(1), b""]
    texts = ["one", "two", None, "  . ", "three", "four", "ONE!", "five", "six", "seven"]
    write_shard(tmp_path / "in" / "0.parquet", images, texts)
    report = measure(captioner=None, calibrate=False, pairs=Input(paths=(str(tmp_path / "in"),)))
    assert report.pairs is not None
    assert (report.pairs.rows, report.pairs.images, report.pairs.texts) == (10, 2, 3)
    assert report.pairs.left_out == {
        "no_text": 2,
        "not_an_image": 2,
        "no_image": 1,
        "duplicate_text": 1,
        "empty_image": 1,
    }
    assert [image.texts for image in images_of(Input(paths=(str(tmp_path / "in"),)))] == [["one", "five"], ["six"]]


def test_pairs_of_which_none_can_be_used(measure: Measure, tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [None, b"<html>", jpeg(1), None], ["a", "b", "", "c"])
    message = r"pairs: no row of .*in has a usable image and a text: 2 no_image, 1 not_an_image, 1 no_text"
    with pytest.raises(InputError, match=message):
        measure(pairs=Input(paths=(str(tmp_path / "in"),)))
    with pytest.raises(InputError, match="no such file"):
        measure(pairs=Input(paths=(str(tmp_path / "gone"),)))


def test_a_spec_that_measures_nothing_is_refused(cards: tuple[CaptionerCard, FilterCard], web: Web) -> None:
    for fields, message in [
        ({}, "nothing to measure"),
        ({"pairs": shards(web)}, "pairs are measured with a captioner"),
        ({"pairs": shards(web), "captioner": cards[0], "captioning": None}, "pairs are measured with a captioner"),
        (
            {"pairs": shards(web), "filter": cards[1], "retrieval": None, "calibrate": False},
            "pairs are measured with a captioner",
        ),
        (
            {"quality": [{"dataset": "d", "truth": {"toyweb": "w"}}], "truth": {"toyweb": "w"}},
            "truth is that of the test images",
        ),
        ({"pairs": shards(web), "captioner": cards[0], "captioning": {"min_tokens": 9, "max_tokens": 3}}, "is above"),
    ]:
        with pytest.raises(ValidationError, match=message):
            EvaluateSpec.model_validate({"kind": "evaluate", "output": "out", **fields})
