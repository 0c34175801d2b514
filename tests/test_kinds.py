"""Cards of models other than BLIP, and specs that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from capfilt.cli import app
from capfilt.errors import CheckpointError, SpecError
from capfilt.spec import (
    AnyCard,
    CaptionerCard,
    CurateSpec,
    DualCard,
    EndpointCard,
    FilterCard,
    GeneratorCard,
    LocalCheckpoint,
    Sampling,
    load_card,
    load_spec,
)
from capfilt.submit import prepare
from capfilt.weights import inspect

ROOT = Path(__file__).parent.parent
CHECKPOINT = {"path": "there"}
CAPTIONERS: dict[str, dict[str, Any]] = {
    "blip": {"role": "captioner", "name": "c", "checkpoint": CHECKPOINT, "image_size": 32},
    "transformers": {"role": "captioner", "model": "transformers", "name": "c", "checkpoint": CHECKPOINT},
    "openai": {
        "role": "captioner",
        "model": "openai",
        "name": "c",
        "base_url": "http://h:1/v1/",
        "served_model": "m",
        "prompt": "p",
    },
}
HALF = {"web": 0.3, "synthetic": 0.3}
FILTERS: dict[str, dict[str, Any]] = {
    "blip": {"role": "filter", "name": "f", "checkpoint": CHECKPOINT, "image_size": 32},
    "clip": {"role": "filter", "model": "clip", "name": "f", "checkpoint": CHECKPOINT, "thresholds": HALF},
    "siglip": {"role": "filter", "model": "siglip", "name": "f", "checkpoint": CHECKPOINT, "thresholds": HALF},
}
CALIBRATED = {"unit": "probability", "scale": 10, "bias": -3}


def spec(tmp_path: Path, captioner: dict[str, Any], *filters: dict[str, Any], **fields: Any) -> CurateSpec:
    data = {"kind": "curate", "input": {"paths": "in"}, "output": "out", "captioners": [captioner], **fields}
    data["filters"] = list(filters) or [FILTERS["blip"]]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    loaded = load_spec(tmp_path / "run.yaml")
    assert isinstance(loaded, CurateSpec)
    return loaded


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (CAPTIONERS["blip"], CaptionerCard),
        ({**CAPTIONERS["blip"], "model": "blip"}, CaptionerCard),
        (CAPTIONERS["transformers"], GeneratorCard),
        (CAPTIONERS["openai"], EndpointCard),
        (FILTERS["blip"], FilterCard),
        (FILTERS["clip"], DualCard),
        (FILTERS["siglip"], DualCard),
    ],
)
def test_model_says_which_card_it_is(tmp_path: Path, fields: dict[str, Any], kind: type[AnyCard]) -> None:
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(fields))
    card = load_card(tmp_path / "card.yaml")
    assert type(card) is kind
    role = "captioner" if card.role == "captioner" else "filter"
    cards = (fields, FILTERS["blip"]) if role == "captioner" else (CAPTIONERS["blip"], fields)
    found = getattr(spec(tmp_path, *cards), f"{role}s")[0]
    assert type(found) is kind
    assert CurateSpec.model_validate_json(spec(tmp_path, *cards).model_dump_json()) == spec(tmp_path, *cards)


# fmt: off
WRONG: list[tuple[str, str, dict[str, Any], str]] = [
    ("captioner", "blip", {"model": "gpt"}, "captioners.0: `model` says what it is: expected blip or"),
    ("captioner", "blip", {"chat": True}, "captioners.0.chat: unknown field"),
    ("captioner", "transformers", {"image_size": 32}, "captioners.0.image_size: unknown field"),
    ("captioner", "transformers", {"promt": "x"}, "captioners.0.promt: unknown field; did you mean prompt?"),
    ("captioner", "transformers", {"sampling": {"seed": 1}}, "captioners.0.sampling.seed: unknown field"),
    ("captioner", "transformers", {"sampling": {"top_p": 2}}, "captioners.0.sampling.top_p: Input should be less"),
    ("captioner", "transformers", {"sampling": {"max_tokens": 3}}, r"captioner c: sampling: min_tokens \(6\) is above"),
    ("captioner", "openai", {"checkpoint": CHECKPOINT}, "captioners.0.checkpoint: unknown field"),
    ("captioner", "openai", {"base_url": "h:1/v1"}, "captioners.0.base_url: expected http:// or https://"),
    ("captioner", "openai", {"base_url": "http://h/v1?x=1"}, "captioners.0.base_url: give the address alone"),
    ("captioner", "openai", {"api_key_variable": "sk-123"}, "captioners.0.api_key_variable: String should match"),
    ("captioner", "openai", {"parameters": "openai"}, "has no repetition_penalty, min_tokens; write sampling: "),
    ("filter", "clip", {"thresholds": None}, "filters.0.thresholds: "),
    ("filter", "clip", {"thresholds": {"web": 0.3}}, "filters.0.thresholds.synthetic: required"),
    ("filter", "clip", {"unit": "probability"}, "filters.0: a probability of CLIP's needs scale and bias"),
    ("filter", "siglip", {"unit": "probability", "scale": 2}, "filters.0: scale and bias go together"),
    ("filter", "siglip", {"scale": 2, "bias": 0}, "filters.0: scale and bias make a probability; write unit"),
    ("filter", "clip", {"first_token": "[ENC]"}, "filters.0.first_token: unknown field"),
    ("filter", "blip", {"unit": "cosine"}, "filters.0.unit: unknown field"),
    ("filter", "blip", {"model": "openai"}, "filters.0: `model` says what it is: expected blip or clip or siglip"),
]
# fmt: on


@pytest.mark.parametrize(("role", "kind", "fields", "message"), WRONG, ids=[f"{r}-{k}-{f}" for r, k, f, _ in WRONG])
def test_wrong_cards(tmp_path: Path, role: str, kind: str, fields: dict[str, Any], message: str) -> None:
    cards = {"captioner": CAPTIONERS["blip"], "filter": FILTERS["blip"]}
    cards[role] = {**(CAPTIONERS if role == "captioner" else FILTERS)[kind], **fields}
    with pytest.raises(SpecError, match=message):
        spec(tmp_path, cards["captioner"], cards["filter"])


@pytest.mark.parametrize("url", ["http://me:hunter2@h/v1", "https://h/v1?api-token=hunter2"])
def test_a_secret_in_a_url_is_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    with pytest.raises(SpecError, match=r"captioners.0.base_url: .*looks like a secret") as caught:
        spec(tmp_path, {**CAPTIONERS["openai"], "base_url": url})
    assert "hunter2" not in str(caught.value)


def test_a_card_of_another_kind_cannot_be_trained(tmp_path: Path) -> None:
    data = {"kind": "finetune-captioner", "output": "out", "start": CAPTIONERS["openai"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(SpecError, match=r"start.model: Input should be 'blip' \(got 'openai'\)"):
        load_spec(tmp_path / "run.yaml")


def test_sampling_of_a_card_goes_over_the_specs(tmp_path: Path) -> None:
    card = {**CAPTIONERS["transformers"], "sampling": {"max_tokens": 60, "top_p": 0.5}}
    loaded = spec(tmp_path, card, sampling={"candidates": 3, "seed": 7, "top_k": 9})
    (captioner,) = loaded.captioners
    assert isinstance(captioner, GeneratorCard)
    expected = Sampling(candidates=3, seed=7, top_k=9, max_tokens=60, top_p=0.5)
    assert captioner.sampled(loaded.sampling) == expected


def test_filters_of_unlike_units_only_vote(tmp_path: Path) -> None:
    blip, clip = FILTERS["blip"], {**FILTERS["clip"], "name": "g"}
    message = r"unlike units \(f: probability, g: cosine\).*decision: vote"
    with pytest.raises(SpecError, match=message):
        spec(tmp_path, CAPTIONERS["blip"], blip, clip)
    with pytest.raises(SpecError, match=message):
        spec(tmp_path, CAPTIONERS["blip"], blip, clip, decision="vote", thresholds={"web": 0.5})
    vote = spec(tmp_path, CAPTIONERS["blip"], blip, clip, decision="vote")
    assert [(own.web, own.synthetic) for own in vote.effective_thresholds] == [(0.5, 0.5), (0.3, 0.3)]
    mean = spec(tmp_path, CAPTIONERS["blip"], blip, {**clip, **CALIBRATED})
    assert [own.web for own in mean.effective_thresholds] == [0.4]


# --- checkpoints, without loading them ---


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "there"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "clip"}')
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "preprocessor_config.json").write_text("{}")
    (made / "vocab.json").write_text("{}")
    return made


def dual(directory: Path, **fields: Any) -> DualCard:
    return DualCard.model_validate({**FILTERS["clip"], "checkpoint": LocalCheckpoint(path=str(directory)), **fields})


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("config.json", "config.json: no such file"),
        ("model.safetensors", "no weights"),
        ("preprocessor_config.json", "neither preprocessor_config"),
        ("vocab.json", "no tokenizer.json"),
    ],
)
def test_what_is_missing_is_named(directory: Path, gone: str, message: str) -> None:
    inspect(dual(directory))
    (directory / gone).unlink()
    with pytest.raises(CheckpointError, match=message) as caught:
        inspect(dual(directory))
    assert str(directory) in str(caught.value)


def test_what_does_not_fit_is_named(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="model_type is 'clip', and f is a card of `model: siglip`"):
        inspect(dual(directory, model="siglip"))
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="a pickle, which the card does not allow"):
        inspect(dual(directory))
    inspect(dual(directory, allow_pickle=True))
    for content in ("{", "[]", '{"model_type": 3}'):
        (directory / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            inspect(dual(directory, allow_pickle=True))


def test_a_changed_file_is_another_filter(directory: Path, tmp_path: Path) -> None:
    from capfilt.fingerprints import run_fingerprints

    def score() -> str:
        return run_fingerprints(spec(tmp_path, CAPTIONERS["openai"], FILTERS["clip"])).score

    seen = {score()}
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "vocab.json"):
        (directory / name).write_bytes((directory / name).read_bytes() + b" ")
        seen.add(score())
    assert len(seen) == 5
    (directory / "README.md").write_text("not part of the model")
    assert score() in seen


def test_check_says_where_models_are(directory: Path, tmp_path: Path) -> None:
    from conftest import jpeg, write_shard

    write_shard(tmp_path / "in" / "0.parquet", [jpeg(0)])
    spec(tmp_path, CAPTIONERS["openai"], FILTERS["clip"])
    done = CliRunner().invoke(app, ["check", str(tmp_path / "run.yaml")])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "captioner c: m at http://h:1/v1: will be asked when a run begins" in said
    assert f"filter f: found in {directory}" in said
    (directory / "vocab.json").unlink()
    assert CliRunner().invoke(app, ["check", str(tmp_path / "run.yaml")]).exit_code == 1


def test_a_submitted_job_takes_the_checkpoint_along(directory: Path, tmp_path: Path) -> None:
    spec(tmp_path, CAPTIONERS["openai"], FILTERS["clip"])
    submission = prepare(tmp_path / "run.yaml", ())
    assert list(submission.checkpoints.values()) == [directory]
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        prepare(tmp_path / "run.yaml", ())


@pytest.mark.parametrize("file", sorted((ROOT / "models" / "other").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_examples_are_cards(file: Path) -> None:
    card = load_card(file)
    assert not isinstance(card, CaptionerCard | FilterCard)
    if not isinstance(card, DualCard):
        card.sampled(Sampling())
    assert file.name in (ROOT / "docs" / "models.md").read_text()
