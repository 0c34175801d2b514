"""Captioners of transformers: what they write is transformers' own, and the same whatever the batch."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import jpeg
from PIL import Image
from tiny_models import EOS, TOKENS, VOCABULARY, write_blip2, write_llava
from transformers import AutoModelForImageTextToText, AutoProcessor

from capfilt.errors import CheckpointError, SpecError
from capfilt.images import decode
from capfilt.models import sampling as draws
from capfilt.models.checkpoints import quiet
from capfilt.models.generator import GeneratorCaptioner
from capfilt.spec import GeneratorCard, Images, LocalCheckpoint, Sampling

PROMPTS: dict[str, dict[str, Any]] = {
    "blip2": {"prompt": "a picture of"},
    "llava": {"prompt": "describe the image", "chat": True},
}
SAMPLING = Sampling(candidates=2, min_tokens=2, max_tokens=8, top_p=0.9, repetition_penalty=1.3, temperature=0.8)
BANNED = [0, 1, 2, 4, *range(len(TOKENS), VOCABULARY)]  # what is no word, and not the end


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    with quiet():
        return {"blip2": write_blip2(folder / "blip2"), "llava": write_llava(folder / "llava")}


@pytest.fixture(params=["blip2", "llava"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def card(directory: Path, **fields: Any) -> GeneratorCard:
    own = {"name": "t", "batch_size": 4, **fields}
    return GeneratorCard(role="captioner", model="transformers", checkpoint=LocalCheckpoint(path=str(directory)), **own)


Make = Callable[..., GeneratorCaptioner]


@pytest.fixture
def make(checkpoints: dict[str, Path]) -> Make:
    def make(kind: str, sampling: Sampling = SAMPLING, tie_tolerance: float | None = None, **fields: Any) -> Any:
        tolerance = draws.TIE_TOLERANCE if tie_tolerance is None else tie_tolerance
        return GeneratorCaptioner(card(checkpoints[kind], **{**PROMPTS[kind], **fields}), sampling, "cpu", tolerance)

    return make


def pictures(count: int) -> tuple[list[np.ndarray[Any, Any]], list[str]]:
    """Of three shapes, and their bytes' sha256."""
    encoded = [jpeg(n, 24 + 8 * (n % 3)) for n in range(count)]
    return [decode(one, Images()).rgb for one in encoded], [hashlib.sha256(one).hexdigest() for one in encoded]


def caption(captioner: GeneratorCaptioner, rgbs: list[Any], sha256: list[str]) -> list[list[str]]:
    return captioner.caption([captioner.prepare(rgb, one) for rgb, one in zip(rgbs, sha256, strict=True)], sha256)


def test_greedy_is_transformers_own(kind: str, make: Make, checkpoints: dict[str, Path]) -> None:
    """One candidate of the likeliest token: generate(do_sample=False), picture by picture."""
    sampling = Sampling(candidates=1, top_k=1, top_p=1, repetition_penalty=1, min_tokens=3, max_tokens=8)
    rgbs, sha256 = pictures(6)
    ours = caption(make(kind, sampling), rgbs, sha256)
    with quiet():
        network = AutoModelForImageTextToText.from_pretrained(checkpoints[kind], dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(checkpoints[kind])
    text = "a picture of" if kind == "blip2" else "user : <image> describe the image assistant :"
    theirs = []
    for rgb in rgbs:
        inputs = processor(images=Image.fromarray(rgb), text=text, return_tensors="pt")
        with quiet():
            written = network.generate(
                **inputs, do_sample=False, max_new_tokens=8, min_new_tokens=3, suppress_tokens=BANNED, pad_token_id=1
            )
        theirs.append(processor.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert [own for (own,) in ours] == [" ".join(text.split()) for text in theirs]
    assert len(set(theirs)) > 3  # the pictures are looked at


@pytest.mark.parametrize("tolerance", [None, pytest.param(0.2, marks=pytest.mark.slow)], ids=["usual", "many ties"])
def test_captions_do_not_depend_on_the_batch(kind: str, make: Make, tolerance: float | None) -> None:
    rgbs, sha256 = pictures(10)
    plain = make(kind, tie_tolerance=tolerance, batch_size=1)
    alone = [caption(plain, [rgb], [one])[0] for rgb, one in zip(rgbs, sha256, strict=True)]
    for size in (3, 16):
        captioner = make(kind, tie_tolerance=tolerance, batch_size=size)
        assert caption(captioner, rgbs, sha256) == alone
        assert caption(captioner, rgbs[::-1], sha256[::-1]) == alone[::-1]
        if tolerance:
            assert captioner.rewritten > 5
    texts = [text for own in alone for text in own]
    assert len(set(texts)) > 15
    assert all(text == " ".join(text.split()) and not set("<>") & set(text.split()) for text in texts)


def test_random_numbers_are_the_rows(make: Make) -> None:
    rgbs, sha256 = pictures(4)
    first = caption(make("llava"), rgbs, sha256)
    more = caption(make("llava", SAMPLING.model_copy(update={"candidates": 3})), rgbs, sha256)
    assert [own[:2] for own in more] == first
    other = caption(make("llava", SAMPLING.model_copy(update={"seed": 1})), rgbs, sha256)
    assert not {text for own in first for text in own} & {text for own in other for text in own}
    assert caption(make("llava"), rgbs, sha256[::-1]) != first  # of the bytes' hash, not of the pixels


def test_lengths(make: Make) -> None:
    rgbs, sha256 = pictures(5)
    sampling = Sampling(candidates=4, min_tokens=5, max_tokens=5, top_p=1)
    captions = caption(make("blip2", sampling), rgbs, sha256)
    assert {len(text.split()) for own in captions for text in own} == {5}
    longer = Sampling(candidates=4, min_tokens=0, max_tokens=12, top_p=1)
    lengths = {len(text.split()) for own in caption(make("blip2", longer), rgbs, sha256) for text in own}
    assert len(lengths) > 3  # the end is drawn, too


def test_a_draw_is_ours(make: Make, checkpoints: dict[str, Path]) -> None:
    """Token by token from the whole text, without a cache: our penalty, nucleus and random numbers."""
    captioner = make("llava", SAMPLING.model_copy(update={"candidates": 1}))
    rgbs, sha256 = pictures(1)
    (text,) = caption(captioner, rgbs, sha256)[0]
    with quiet():
        network = AutoModelForImageTextToText.from_pretrained(checkpoints["llava"], dtype=torch.float32).eval()
    inputs = captioner.prepare(rgbs[0], "")
    key = torch.tensor([draws.row_key(0, sha256[0], 0)])
    banned = torch.zeros(VOCABULARY, dtype=torch.bool)
    banned[BANNED] = True
    ids: list[int] = []
    while len(ids) < SAMPLING.max_tokens:
        whole = torch.cat([inputs["input_ids"], torch.tensor([ids], dtype=torch.int64)], 1)
        with torch.inference_mode():
            logits = network(pixel_values=inputs["pixel_values"], input_ids=whole).logits[:, -1]
        logits = logits.clone()  # no longer an inference tensor: it is written to
        logits = draws.adjust(logits, torch.tensor([ids], dtype=torch.int64), banned, EOS, len(ids), SAMPLING)
        step = len(ids)
        drawn = draws.draw(logits, lambda tokens, step=step: draws.gumbel(key, step, tokens), 0, 0.9, 0.0, VOCABULARY)
        if int(drawn.token) == EOS:
            break
        ids.append(int(drawn.token))
    assert text == " ".join(TOKENS[token] for token in ids)


def test_bfloat16_computes_in_it(make: Make) -> None:
    captioner = make("llava", dtype="bfloat16")
    rgbs, sha256 = pictures(2)
    assert captioner.prepare(rgbs[0], "")["pixel_values"].dtype == torch.bfloat16
    assert all(len(own) == 2 and all(own) for own in caption(captioner, rgbs, sha256))


# --- what cannot be used ---


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("llava", {"prompt": "describe", "chat": False}, "does not take it: .*<image> tokens"),
        ("blip2", {"prompt": "describe", "chat": True}, "no chat template"),
        ("llava", {"prompt": "dog " * 150}, "has 128 positions; lower"),
    ],
)
def test_prompts_that_cannot_be_used(make: Make, kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make(kind, **fields)


def test_a_model_that_does_not_look_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """BLIP-2's first revisions have a processor that puts no image tokens into the text: captions of nothing."""
    old = shutil.copytree(checkpoints["blip2"], tmp_path / "old")
    file = old / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_query_tokens": None}))
    with pytest.raises(SpecError, match="the same whatever the image"):
        GeneratorCaptioner(card(old, prompt="a picture of"), SAMPLING, "cpu")


def test_broken_checkpoints(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(checkpoints["llava"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    gone = next(name for name in weights if "layers.1.self_attn.q_proj" in name)
    save_file(
        {name: one for name, one in weights.items() if name != gone}, broken / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=r"do not fit config.json: \d missing_keys: .*q_proj"):
        GeneratorCaptioner(card(broken, **PROMPTS["llava"]), SAMPLING, "cpu")
    (broken / "model.safetensors").write_bytes(b"\x08" + bytes(20))
    with pytest.raises(CheckpointError, match=r"transformers cannot load it: "):
        GeneratorCaptioner(card(broken, **PROMPTS["llava"]), SAMPLING, "cpu")
    torch.save(weights, broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="a pickle, which the card does not allow"):
        GeneratorCaptioner(card(broken, **PROMPTS["llava"]), SAMPLING, "cpu")


def test_a_pickle_where_the_card_allows_one(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    pickled = shutil.copytree(checkpoints["llava"], tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    rgbs, sha256 = pictures(2)
    ours = GeneratorCaptioner(card(pickled, allow_pickle=True, **PROMPTS["llava"]), SAMPLING, "cpu")
    theirs = GeneratorCaptioner(card(checkpoints["llava"], **PROMPTS["llava"]), SAMPLING, "cpu")
    assert caption(ours, rgbs, sha256) == caption(theirs, rgbs, sha256)


@pytest.mark.parametrize("where", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_no_code_of_a_checkpoint_runs(checkpoints: dict[str, Path], tmp_path: Path, where: str) -> None:
    hostile = shutil.copytree(checkpoints["llava"], tmp_path / "hostile")
    (hostile / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    names = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer")
    file = hostile / where
    content = json.loads(file.read_text()) | {"auto_map": dict.fromkeys(names, "evil.Evil")}
    if where == "config.json":
        content["model_type"] = "evil"
    else:
        content |= {"processor_class": "Evil", "tokenizer_class": "Evil"}
    file.write_text(json.dumps(content))
    refused = pytest.raises(CheckpointError, match=re.escape(str(hostile)))
    with refused if where == "config.json" else suppress(CheckpointError):  # else config.json may say enough
        GeneratorCaptioner(card(hostile, **PROMPTS["llava"]), SAMPLING, "cpu")
    assert not (tmp_path / "ran").exists()
