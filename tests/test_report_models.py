"""Reports of datasets that models other than BLIP made: every kind of card, and scores of every unit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from curated_web import cards, curate_web, make_web
from stubs import load_hash
from test_report import Parsed

from capfilt.pipelines.curate import Summary
from capfilt.spec import CurateSpec, DualCard, EndpointCard, GeneratorCard, LocalCheckpoint
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


def curate_with(root: Path, captioners: list[str], filters: list[str], **fields: Any) -> tuple[CurateSpec, Summary]:
    """Curate the web with such cards, for whose models the stubs stand in."""
    every = {**other_cards(root), "writer": cards(root)["captioners"][0], "judge": cards(root)["filters"][0]}
    stubs = cards(root)

    def load(spec: CurateSpec, device: str) -> Any:
        named = {
            part: tuple(stubs[part][0].model_copy(update={"name": card.name}) for card in getattr(spec, part))
            for part in ("captioners", "filters")
        }
        return load_hash(spec.model_copy(update=named), device)

    chosen = {"captioners": tuple(every[name] for name in captioners), "filters": tuple(every[name] for name in filters)}
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
