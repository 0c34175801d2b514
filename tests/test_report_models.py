"""Reports of datasets that models other than BLIP made: every kind of card, and scores of every unit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import read
from curated_web import cards, curate_web, make_web
from stubs import HashCaptioner, HashFilter
from test_report import Parsed

from capfilt.dataset import CuratedDataset
from capfilt.pipelines.curate import Summary
from capfilt.report import make_report
from capfilt.report.drift import alarms
from capfilt.report.judged import truth_at
from capfilt.report.statistics import measure, tallied
from capfilt.spec import AnyCard, CurateSpec, DualCard, EndpointCard, GeneratorCard, LocalCheckpoint
from capfilt.spec.kinds import DualThresholds


def other_cards(root: Path) -> dict[str, Any]:
    """Of every kind but BLIP's, by name; their checkpoints are there and are no models."""
    cards(root)
    (root / "checkpoint" / "preprocessor_config.json").write_text("{}")
    at = LocalCheckpoint(path=str(root / "checkpoint"))
    dual: dict[str, Any] = {"role": "filter", "checkpoint": at}
    cosine, chance = DualThresholds(web=0.3, synthetic=0.3), DualThresholds(web=0.01, synthetic=0.01)
    served = {"base_url": "http://localhost:8000/v1", "served_model": "llava-7b", "revision": "of May"}
    return {
        "generator": GeneratorCard(role="captioner", name="generator", model="transformers", checkpoint=at),
        "served": EndpointCard(role="captioner", name="served", model="openai", prompt="Describe.", **served),
        "clip": DualCard(name="clip", model="clip", thresholds=cosine, **dual),
        "siglip": DualCard(name="siglip", model="siglip", unit="probability", thresholds=chance, **dual),
    }


class Cosines(HashFilter):
    """Uniform over [0, 0.4], as CLIP's cosines are at their highest."""

    def _score(self, image: torch.Tensor, text: str) -> tuple[float, float]:
        score, _ = super()._score(image, text)
        return 0.4 * score, 0.4 * score


def curate_with(root: Path, captioners: list[str], filters: list[str], **fields: Any) -> tuple[CurateSpec, Summary]:
    """Curate the web with such cards, for whose models the stubs stand in."""
    every = {**other_cards(root), "writer": cards(root)["captioners"][0], "judge": cards(root)["filters"][0]}
    stubs = cards(root)

    def load(spec: CurateSpec, _device: str) -> Any:
        def stub(part: str, card: AnyCard) -> Any:
            return stubs[part][0].model_copy(update={"name": card.name})

        captioners = [HashCaptioner(stub("captioners", card), spec.sampling) for card in spec.captioners]
        return captioners, [
            (Cosines if card.model == "clip" else HashFilter)(stub("filters", card)) for card in spec.filters
        ]

    chosen = {
        "captioners": tuple(every[name] for name in captioners),
        "filters": tuple(every[name] for name in filters),
    }
    return curate_web(root, load=load, **{**chosen, **fields})


def page_of(spec: CurateSpec, summary: Summary) -> tuple[str, dict[str, Any]]:
    """What the run's report says, and the data of its scripts."""
    assert summary.report_error is None
    page = Parsed((Path(spec.output) / "_runs" / summary.run / "report.html").read_bytes())
    (data,) = [json.loads(source) for source in page.raw["script"] if source.startswith("{")]
    return " ".join(" ".join(page.text).split()), data


@pytest.mark.parametrize(
    ("captioners", "filters", "said"),
    [
        (["generator"], ["clip"], ("generator (transformers, float32)", "clip (clip, cosine, float32)")),
        (
            ["served", "writer"],
            ["siglip", "judge"],
            (
                "served (openai, llava-7b, revision of May), writer (16 px, float32)",
                "siglip (siglip, probability, float32), judge-0 (16 px, float32)",
            ),
        ),
    ],
)
def test_a_run_with_models_of_any_kind_leaves_its_report(
    tmp_path: Path, captioners: list[str], filters: list[str], said: tuple[str, str]
) -> None:
    make_web(tmp_path)
    text, _ = page_of(*curate_with(tmp_path, captioners, filters))
    assert f"Captioners {said[0]} Filters {said[1]} Decision" in text


# --- units ---


def alarmed(spec: CurateSpec, deviation: float) -> list[str]:
    """Titles of the alarms if the captioner's scores had this standard deviation."""
    dataset = CuratedDataset.for_reading(spec.output, {})
    with tallied(dataset, dataset.versions()["annotations"], None) as tally:
        now = measure(tally, 1, {record.run: record for record in dataset.runs()})
    means = {**now.scores.means, "writer": {"itm": (0.01, deviation)}}
    return [alarm.title for alarm in alarms(replace(now, scores=replace(now.scores, means=means)))]


def labels(spec: CurateSpec, path: Path) -> str:
    """Truth for every text."""
    texts = [(row["image_sha256"], text["text"]) for row in read(spec.output) for text in row["texts"] if text["itm"]]
    true = [n % 2 == 0 for n in range(len(texts))]
    pq.write_table(
        pa.table({"image_sha256": [one for one, _ in texts], "text": [one for _, one in texts], "true": true}), path
    )
    return str(path)


def test_cosines_are_not_taken_for_probabilities(tmp_path: Path) -> None:
    make_web(tmp_path)
    spec, summary = curate_with(tmp_path, ["writer"], ["clip"])
    text, data = page_of(spec, summary)
    assert "The filters’ cosine similarity of text and image" in text
    assert "probability" not in text
    assert data["unit"] == "cosine"
    alike = "The filters find all texts of writer alike"  # below 4% of the threshold, 0.3
    assert (alike in alarmed(spec, 0.0119), alike in alarmed(spec, 0.0121)) == (True, False)

    dataset = CuratedDataset.for_reading(spec.output, {})
    page = Parsed(make_report(dataset, {}, truth=truth_at(labels(spec, tmp_path / "labels.parquet"))).html)
    assert not [about for _, about in page.elements if about.get("id") == "chart-calibration"]
    assert [about for _, about in page.elements if about.get("id") == "chart-precision"]
    assert "Calibration is left out: the scores are no probabilities." in " ".join(" ".join(page.text).split())
    (data,) = [json.loads(source) for source in page.raw["script"] if source.startswith("{")]
    assert {(own["calibration_error"], *own["bins"]) for own in data["judged"].values()} == {(None,)}


def test_small_probabilities_are_no_false_alarm(tmp_path: Path) -> None:
    make_web(tmp_path)
    spec, summary = curate_with(tmp_path, ["writer"], ["siglip"])
    text, data = page_of(spec, summary)
    assert "The filters’ probability that a text matches its image." in text
    assert data["unit"] == "probability"
    alike = "The filters find all texts of writer alike"  # below 4% of the threshold, 0.01
    assert (alike in alarmed(spec, 0.00039), alike in alarmed(spec, 0.00041)) == (True, False)


def test_scores_of_unlike_units_have_none(tmp_path: Path) -> None:
    """Several filters that vote, and two versions of which each has its own."""
    make_web(tmp_path)
    text, data = page_of(*curate_with(tmp_path, ["writer"], ["clip", "siglip", "judge"], decision="vote"))
    assert "The filters’ scores, which are not all in one unit, or in one that is not on record." in text
    assert data["unit"] is None
    curate_with(tmp_path, ["writer"], ["judge"], report=False)
    text, data = page_of(*curate_with(tmp_path, ["writer"], ["clip"]))
    assert (data["unit"], data["before"]["unit"]) == ("cosine", "probability")
    assert "The two versions’ scores are not known to be in one unit: how far they moved may say nothing." in text
