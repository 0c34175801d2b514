"""CLIP and SigLIP as filters: their similarity is transformers' own."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import jpeg
from PIL import Image
from tiny_models import write_clip, write_siglip
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from capfilt.errors import CheckpointError
from capfilt.images import decode
from capfilt.models.checkpoints import quiet
from capfilt.models.dual import DualFilter
from capfilt.spec import DualCard, Images, LocalCheckpoint

TEXTS = ["a red circle", "a dog", "two blue cross on the sky", "water", "a " * 40 + "dog"]
HALF = {"web": 0.5, "synthetic": 0.5}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    with quiet():
        return {"clip": write_clip(folder / "clip"), "siglip": write_siglip(folder / "siglip")}


@pytest.fixture(params=["clip", "siglip"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def load(directory: Path, kind: str, **fields: Any) -> DualFilter:
    own = {"name": "t", "batch_size": 4, "thresholds": HALF, **fields}
    return DualFilter(
        DualCard.model_validate(
            {"role": "filter", "model": kind, "checkpoint": LocalCheckpoint(path=str(directory)), **own}
        ),
        "cpu",
    )


def pictures(count: int) -> list[np.ndarray[Any, Any]]:
    return [decode(jpeg(n, 24 + 8 * (n % 3)), Images()).rgb for n in range(count)]


def score(filter_: DualFilter, rgbs: list[Any], texts: list[list[str]]) -> list[list[tuple[float, float]]]:
    return [[(s.itm, s.itc or 0) for s in own] for own in filter_.score([filter_.prepare(r, "") for r in rgbs], texts)]


def theirs(directory: Path, kind: str, rgbs: list[Any]) -> torch.Tensor:
    """transformers' logits of every image and text [B, N]."""
    with quiet():
        network = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
        images, tokenizer = AutoImageProcessor.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    padding: Any = "max_length" if kind == "siglip" else True
    tokens = tokenizer(TEXTS, padding=padding, truncation=True, max_length=16, return_tensors="pt")
    if kind == "siglip":
        del tokens["attention_mask"]
    seen = images(images=[Image.fromarray(rgb) for rgb in rgbs], return_tensors="pt")
    with torch.inference_mode():
        logits: torch.Tensor = network(**tokens, **seen).logits_per_image
    return logits


def test_the_cosine_is_transformers_own(kind: str, checkpoints: dict[str, Path]) -> None:
    filter_, rgbs = load(checkpoints[kind], kind), pictures(6)
    with quiet():
        network = AutoModel.from_pretrained(checkpoints[kind])
    logits_BN, bias = theirs(checkpoints[kind], kind, rgbs), getattr(network, "logit_bias", torch.tensor(0.0))
    cosine_BN = ((logits_BN - bias.detach()) / network.logit_scale.detach().exp()).tolist()
    scores = score(filter_, rgbs, [TEXTS] * 6)
    for own, expected in zip(scores, cosine_BN, strict=True):
        assert [cosine for _, cosine in own] == pytest.approx(expected, abs=2e-6)
        assert [itm for itm, _ in own] == [max(0.0, cosine) for _, cosine in own]
    assert min(cosine for own in scores for _, cosine in own) < 0 < max(cosine for own in scores for _, cosine in own)


def test_siglips_probability_is_its_own(checkpoints: dict[str, Path]) -> None:
    filter_, rgbs = load(checkpoints["siglip"], "siglip", unit="probability"), pictures(4)
    expected = theirs(checkpoints["siglip"], "siglip", rgbs).sigmoid().tolist()
    for own, row in zip(score(filter_, rgbs, [TEXTS] * 4), expected, strict=True):
        assert [itm for itm, _ in own] == pytest.approx(row, abs=2e-6)


def test_a_calibrated_probability(kind: str, checkpoints: dict[str, Path]) -> None:
    filter_ = load(checkpoints[kind], kind, unit="probability", scale=20.0, bias=-4.0)
    for itm, cosine in score(filter_, pictures(1), [TEXTS])[0]:
        assert itm == pytest.approx(1 / (1 + math.exp(4 - 20 * cosine)))
    extreme = load(checkpoints[kind], kind, unit="probability", scale=1e6, bias=-1e6)
    assert all(0 <= itm <= 1 for itm, _ in score(extreme, pictures(1), [TEXTS])[0])


def test_scores_do_not_depend_on_company(kind: str, checkpoints: dict[str, Path]) -> None:
    rgbs = pictures(7)
    texts = [TEXTS[: n % 5] for n in range(7)]
    together = score(load(checkpoints[kind], kind, batch_size=16), rgbs, texts)
    few = load(checkpoints[kind], kind, batch_size=1)
    for rgb, own, scores in zip(rgbs, texts, together, strict=True):
        (alone,) = score(few, [rgb], [own])
        assert np.allclose(scores, alone, rtol=0, atol=2e-6)
        assert len(scores) == len(own)


def test_an_image_is_seen_once_and_a_text_read_once(checkpoints: dict[str, Path]) -> None:
    filter_, rgbs = load(checkpoints["clip"], "clip", batch_size=16), pictures(6)
    read: list[tuple[str, int]] = []
    network = filter_._network
    network.vision_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: read.append(("image", len(kwargs["pixel_values"]))), with_kwargs=True
    )
    network.text_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: read.append(("text", len(kwargs["input_ids"]))), with_kwargs=True
    )
    score(filter_, rgbs, [TEXTS, [], TEXTS, ["a dog"], [], TEXTS[:2]])
    assert sum(count for what, count in read if what == "image") == 4
    assert sum(count for what, count in read if what == "text") == len(TEXTS)
    assert score(filter_, rgbs[:2], [[], []]) == [[], []]


def test_special_tokens_in_a_text_are_characters(kind: str, checkpoints: dict[str, Path]) -> None:
    """A web text that spells </s> must not end there for the model."""
    filter_, rgbs = load(checkpoints[kind], kind), pictures(1)
    (plain, spelt, letters) = score(filter_, rgbs, [["a dog", "a </s> dog", "a < / s > dog"]])[0]
    assert spelt != plain
    assert spelt == letters


def test_a_huge_text_costs_what_its_beginning_does(kind: str, checkpoints: dict[str, Path]) -> None:
    (long, cut) = score(load(checkpoints[kind], kind), pictures(1), [["a dog " * 200_000, "a dog " * 20]])[0]
    assert long == cut


def test_what_does_not_fit_is_refused(kind: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    other = {"clip": "siglip", "siglip": "clip"}[kind]
    with pytest.raises(CheckpointError, match=f"model_type is '{kind}', and t is a card of `model: {other}`"):
        load(checkpoints[kind], other)
    broken = shutil.copytree(checkpoints[kind], tmp_path / "broken")
    (broken / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="neither preprocessor_config"):
        load(broken, kind)
    wider = shutil.copytree(checkpoints[kind], tmp_path / "wider")
    config = json.loads((wider / "config.json").read_text())
    config["text_config"]["vocab_size"] += 1
    (wider / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"the weights do not fit|cannot load it"):
        load(wider, kind)


def test_weights_that_are_no_numbers(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(checkpoints["clip"], tmp_path / "nan")
    weights = load_file(broken / "model.safetensors")
    weights["visual_projection.weight"][:] = math.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(FloatingPointError, match="not numbers"):
        score(load(broken, "clip"), pictures(1), [TEXTS])
