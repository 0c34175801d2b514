"""A classifier of what is to be kept out: a real ViT of width 32, which has learnt nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import MakeSpec, jpeg, read, write_shard
from PIL import Image
from test_duplicates import no_models, run, tables
from transformers import ViTConfig, ViTForImageClassification

from capfilt.errors import CheckpointError, SpecError
from capfilt.models.classifier import Classifier
from capfilt.models.preprocess import resize
from capfilt.plan import Stage
from capfilt.spec import ClassifierCard, CurateSpec, KeepOut, LocalCheckpoint, Thresholds, load_curate_spec

MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.2, 0.25]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        id2label={0: "safe", 1: "drawing", 2: "nsfw"},
    )
    model = ViTForImageClassification(config)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


def card(checkpoint: Path, labels: tuple[str, ...] = ("nsfw",), threshold: float = 0.5) -> ClassifierCard:
    return ClassifierCard(
        role="classifier",
        name="n",
        checkpoint=LocalCheckpoint(path=str(checkpoint)),
        image_size=16,
        batch_size=3,
        labels=labels,
        threshold=threshold,
    )


def pixels(count: int) -> torch.Tensor:
    images = [np.asarray(Image.open(io.BytesIO(jpeg(seed))).convert("RGB")) for seed in range(count)]
    return torch.stack([resize(image, 16) for image in images])


def test_scores_are_the_models_own(checkpoint: Path) -> None:
    images = pixels(7)
    normalised = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.inference_mode():
        model = ViTForImageClassification.from_pretrained(checkpoint).eval()
        expected = model(pixel_values=normalised).logits.softmax(1)
    assert Classifier(card(checkpoint), "cpu").score(images) == pytest.approx(expected[:, 2].tolist(), abs=1e-5)
    both = Classifier(card(checkpoint, ("drawing", "nsfw")), "cpu").score(images)
    assert both == pytest.approx(expected[:, 1:].sum(1).tolist(), abs=1e-5)


def test_what_cannot_be_used_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="has no label porn; it has safe, drawing, nsfw"):
        Classifier(card(checkpoint, ("porn",)), "cpu")
    with pytest.raises(CheckpointError, match=r"keep_out.classifier: .*no image classifier"):
        Classifier(card(tmp_path), "cpu")


def with_classifier(spec: CurateSpec, checkpoint: Path, threshold: float) -> CurateSpec:
    return spec.model_copy(update={"keep_out": KeepOut(classifier=card(checkpoint, threshold=threshold))})


def test_images_are_kept_out_and_a_threshold_needs_no_model(
    make_spec: MakeSpec, tmp_path: Path, checkpoint: Path
) -> None:
    images = [*(jpeg(seed) for seed in range(20)), b"<html>"]
    write_shard(tmp_path / "in" / "a.parquet", images)
    base = make_spec(thresholds=Thresholds(web=0.0, synthetic=0.0))
    run(base)
    assert {row["unsafe"] for row in read(base.output)} == {None}
    spec = with_classifier(base, checkpoint, 1.0)
    assert list(run(spec).stages) == [Stage.SCORE]
    scores = [row["unsafe"] for row in read(spec.output)]
    assert scores[:20] == pytest.approx(Classifier(card(checkpoint), "cpu").score(pixels(20)), abs=1e-4)
    assert scores[20] is None
    middle = sorted(scores[:20])[10]
    spec = with_classifier(base, checkpoint, middle)
    summary = run(spec, no_models)
    assert list(summary.stages) == [Stage.DECIDE]
    assert summary.reasons["kept_out_image"] == 10
    out = [row["row"] for row in read(spec.output) if row["reason"] == "kept_out_image"]
    assert out == [row for row, score in enumerate(scores[:20]) if score >= middle]
    fresh = spec.model_copy(update={"output": f"{spec.output}-fresh"})
    run(fresh)
    assert tables(spec.output) == tables(fresh.output)


def test_a_spec_names_the_card_by_its_path(make_spec: MakeSpec, tmp_path: Path, checkpoint: Path) -> None:
    spec = make_spec().model_dump(mode="json")
    (tmp_path / "cards").mkdir()
    written = card(checkpoint).model_dump(mode="json")
    (tmp_path / "cards" / "n.yaml").write_text(yaml.safe_dump(written))
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({**spec, "keep_out": {"classifier": "cards/n.yaml"}}))
    loaded = load_curate_spec(tmp_path / "spec.yaml", ["keep_out.classifier.threshold=0.9"])
    assert loaded.keep_out == KeepOut(classifier=card(checkpoint, threshold=0.9))
