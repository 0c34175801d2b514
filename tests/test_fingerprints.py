from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from capfilt.errors import CheckpointError
from capfilt.fingerprints import (
    Fingerprints,
    checkpoint_files,
    files_seen,
    fingerprint,
    run_fingerprints,
    weight_files,
)
from capfilt.pipelines.job import Job
from capfilt.spec import (
    CaptionerCard,
    Columns,
    CurateSpec,
    DualCard,
    Duplicates,
    EndpointCard,
    FilterCard,
    GeneratorCard,
    HubCheckpoint,
    Images,
    KeepOut,
    LocalCheckpoint,
    Sampling,
    Thresholds,
)

REVISION = "0" * 40


def card(role: str, name: str, **fields: Any) -> dict[str, Any]:
    checkpoint = {"hub": f"owner/{name}", "revision": REVISION}
    return {"role": role, "name": name, "checkpoint": checkpoint, "image_size": 384, **fields}


def spec_data() -> dict[str, Any]:
    return {
        "kind": "curate",
        "input": {"paths": ["/in"]},
        "output": "/out",
        "captioners": [card("captioner", "c")],
        "filters": [card("filter", "f")],
    }


def prints(**changes: Any) -> Fingerprints:
    """Fingerprints of the spec above with some fields set, `a__0__b` for a.0.b."""
    data = spec_data()
    for path, value in changes.items():
        node: Any = data
        *parents, last = path.split("__")
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
        node[last] = value
    return run_fingerprints(CurateSpec.model_validate(data))


ALL, SCORE, DECIDE, NONE = ("caption", "score", "decide"), ("score", "decide"), ("decide",), ()
OTHER = {"hub": "owner/captioner", "revision": "1" * 40}

CLASSIFIER = {**card("classifier", "n"), "labels": ["unsafe"]}

CHANGES: list[tuple[str, Any, tuple[str, ...]]] = [
    ("captioners__0__checkpoint", OTHER, ALL),
    ("captioners__0__prompt", "", ALL),
    ("captioners__0__image_size", 224, ALL),
    ("captioners__0__dtype", "bfloat16", ALL),
    ("sampling__candidates", 2, ALL),
    ("sampling__top_p", 0.95, ALL),
    ("sampling__top_k", 50, ALL),
    ("sampling__temperature", 0.9, ALL),
    ("sampling__repetition_penalty", 1.0, ALL),
    ("sampling__min_tokens", 5, ALL),
    ("sampling__max_tokens", 30, ALL),
    ("sampling__seed", 1, ALL),
    ("images__max_pixels", 1000, ALL),
    ("images__max_bytes", 1000, ALL),
    ("filters__0__checkpoint", OTHER, SCORE),
    ("filters__0__first_token", "[CLS]", SCORE),
    ("filters__0__max_tokens", 30, SCORE),
    ("filters__0__itc", False, SCORE),
    ("filters__0__image_size", 224, SCORE),
    ("filters__0__dtype", "bfloat16", SCORE),
    ("filters__0__thresholds", {"web": 0.4}, DECIDE),
    ("thresholds", {"web": 0.4}, DECIDE),
    ("thresholds", {"synthetic": 0.4}, DECIDE),
    ("captioners", [card("captioner", "c"), card("captioner", "d")], ALL),
    ("filters", [card("filter", "f"), card("filter", "g")], SCORE),
    ("decision", "vote", DECIDE),
    ("keep", "all-above-threshold", DECIDE),
    ("duplicates", {}, DECIDE),
    ("duplicates__near_bits", 0, SCORE),
    ("duplicates__max_per_image", 2, DECIDE),
    ("duplicates__max_per_url", 2, DECIDE),
    ("keep_out", {}, NONE),
    ("keep_out__domains", ["a.org"], DECIDE),
    ("keep_out__words", ["word"], DECIDE),
    ("keep_out__classifier", CLASSIFIER, SCORE),
    ("captioners__0__name", "other", NONE),
    ("captioners__0__batch_size", 1, NONE),
    ("captioners__0__placement", {"cpus": 3, "max_actors": 2}, NONE),
    ("captioners__0__licence", "mit", NONE),
    ("captioners__0__allow_pickle", True, NONE),
    ("filters__0__name", "other", NONE),
    ("filters__0__batch_size", 1, NONE),
    ("filters__0__placement", {"gpus": 1}, NONE),
    ("filters__0__licence", "mit", NONE),
    ("filters__0__allow_pickle", True, NONE),
    ("images__quarantine_bytes", 0, NONE),
    ("images__max_seconds", 99.0, NONE),
    ("fragment_rows", 7, NONE),
    ("max_error_fraction", 0.5, NONE),
    ("lease_seconds", 30, NONE),
    ("withdrawn", {"urls": ["/gone.txt"]}, NONE),  # of the shards alone that a list hits
    ("retention", {"days": 30}, NONE),
    ("report", False, NONE),
    ("report_against", "/before", NONE),
    ("ray", {"num_cpus": 1}, NONE),
    ("output", "/elsewhere", NONE),
    ("input", {"paths": ["/other"]}, NONE),
    ("input__columns__image", "picture", ALL),
    ("input__columns__text", "alt", SCORE),
    ("input__columns__url", "link", SCORE),
    ("input__columns__key", "id", SCORE),
]


@pytest.mark.parametrize(("field", "value", "stale"), CHANGES, ids=[f"{name}={value}" for name, value, _ in CHANGES])
def test_what_a_field_makes_stale(field: str, value: Any, stale: tuple[str, ...]) -> None:
    before, after = prints(), prints(**{field: value})
    changed = tuple(stage for stage in ALL if getattr(before, stage) != getattr(after, stage))
    assert changed == stale


@pytest.mark.parametrize(
    ("prefix", "model", "constant"),
    [
        ("captioners__0__", CaptionerCard, {"role", "model"}),
        ("filters__0__", FilterCard, {"role", "model"}),
        ("sampling__", Sampling, set()),
        ("images__", Images, set()),
        ("duplicates__", Duplicates, set()),
        ("keep_out__", KeepOut, set()),
        ("input__columns__", Columns, set()),
    ],
)
def test_every_field_has_a_line_above(prefix: str, model: type[BaseModel], constant: set[str]) -> None:
    """A new field must say what it makes stale."""
    listed = {name.removeprefix(prefix) for name, _, _ in CHANGES if name.startswith(prefix)}
    assert listed == set(model.model_fields) - constant


def other(number: int, **fields: Any) -> Fingerprints:
    """Fingerprints where the captioner is transformers' (0) or an endpoint's (1), or the filter a dual one (2)."""
    checkpoint = {"hub": "owner/c", "revision": REVISION}
    thresholds = {"web": 0.3, "synthetic": 0.3}
    asked = {"base_url": "http://h", "served_model": "m", "prompt": "p"}
    cards: list[dict[str, Any]] = [
        {"model": "transformers", "role": "captioner", "name": "c", "checkpoint": checkpoint},
        {"model": "openai", "role": "captioner", "name": "c", **asked},
        {"model": "siglip", "role": "filter", "name": "f", "checkpoint": checkpoint, "thresholds": thresholds},
    ]
    place = "captioners" if number < 2 else "filters"
    return run_fingerprints(CurateSpec.model_validate({**spec_data(), place: [{**cards[number], **fields}]}))


OTHERS: list[tuple[int, dict[str, Any], tuple[str, ...]]] = [
    (0, {"checkpoint": OTHER}, ALL),
    (0, {"prompt": "describe"}, ALL),
    (0, {"chat": True}, ALL),
    (0, {"dtype": "bfloat16"}, ALL),
    (0, {"sampling": {"max_tokens": 40}}, ALL),
    (0, {"name": "other"}, NONE),
    (0, {"licence": "mit"}, NONE),
    (0, {"placement": {"gpus": 1}}, NONE),
    (0, {"batch_size": 1}, NONE),
    (0, {"allow_pickle": True}, NONE),
    (1, {"served_model": "n"}, ALL),
    (1, {"revision": "2"}, ALL),
    (1, {"prompt": "describe"}, ALL),
    (1, {"parameters": "openai", "sampling": {"repetition_penalty": 1, "min_tokens": 0}}, ALL),
    (1, {"sampling": {"top_p": 0.5}}, ALL),
    (1, {"longest_side": 512}, ALL),
    (1, {"base_url": "http://elsewhere"}, NONE),
    (1, {"api_key_variable": "KEY"}, NONE),
    (1, {"concurrency": 4}, NONE),
    (1, {"timeout": 4}, NONE),
    (1, {"retries": 4}, NONE),
    (1, {"name": "other"}, NONE),
    (1, {"licence": "mit"}, NONE),
    (1, {"placement": {"cpus": 2}}, NONE),
    (2, {"checkpoint": OTHER}, SCORE),
    (2, {"unit": "probability"}, SCORE),
    (2, {"unit": "probability", "scale": 1, "bias": 0}, SCORE),
    (2, {"unit": "probability", "bias": 0, "scale": 2}, SCORE),
    (2, {"dtype": "bfloat16"}, SCORE),
    (2, {"model": "clip"}, SCORE),
    (2, {"thresholds": {"web": 0.3, "synthetic": 0.2}}, DECIDE),
    (2, {"name": "other"}, NONE),
    (2, {"licence": "mit"}, NONE),
    (2, {"placement": {"gpus": 1}}, NONE),
    (2, {"batch_size": 1}, NONE),
    (2, {"allow_pickle": True}, NONE),
]


@pytest.mark.parametrize(("number", "fields", "stale"), OTHERS, ids=[f"{n}-{fields}" for n, fields, _ in OTHERS])
def test_what_a_field_of_another_card_makes_stale(number: int, fields: dict[str, Any], stale: tuple[str, ...]) -> None:
    before, after = other(number), other(number, **fields)
    assert tuple(stage for stage in ALL if getattr(before, stage) != getattr(after, stage)) == stale


def test_every_field_of_other_cards_has_a_line_above() -> None:
    for number, model in enumerate((GeneratorCard, EndpointCard, DualCard)):
        listed = {name for n, fields, _ in OTHERS if n == number for name in fields}
        assert listed | {"role", "model"} == set(model.model_fields) | {"role", "model"}


def test_a_scale_is_no_bias() -> None:
    probable = [{"unit": "probability", "scale": scale, "bias": bias} for scale, bias in ((1, 0), (2, 0), (1, 1))]
    assert len({other(2, **fields).score for fields in probable}) == 3


def test_fingerprints_of_blips_cards_are_what_they_were() -> None:
    """A dataset that was curated before there were other models is up to date."""
    assert prints() == Fingerprints("d4574d8b4475726b", "62a816ca807ce111", "08bc5d8f3b7cfa65")


def test_form() -> None:
    found = prints()
    for stage in ALL:
        assert len(getattr(found, stage)) == 16
        int(getattr(found, stage), 16)
    assert len({found.caption, found.score, found.decide}) == 3
    assert found == prints()


def test_thresholds_written_out_are_the_defaults() -> None:
    assert prints(thresholds={"web": 0.5, "synthetic": 0.5}) == prints()
    assert prints(thresholds=Thresholds(), filters__0__thresholds={"web": 0.1}) == prints()
    card = {"web": 0.6, "synthetic": 0.7}
    assert prints(thresholds={"web": 0.6}, filters__0__thresholds=card) == prints(filters__0__thresholds=card)


def test_the_order_of_models_counts() -> None:
    """Of captioners for ties, of filters for the order of scores; not what the cards are called."""
    two = [card("captioner", "c"), card("captioner", "d")]
    one, other = prints(captioners=two), prints(captioners=two[::-1])
    assert one.caption != other.caption
    judges = [card("filter", "f"), card("filter", "g")]
    one, other = prints(filters=judges), prints(filters=judges[::-1])
    assert (one.caption, one.score == other.score) == (other.caption, False)
    renamed = [{**card, "name": card["name"] * 2} for card in judges]
    assert prints(filters=renamed) == one


def test_thresholds_of_several_filters() -> None:
    """The mean has one threshold, a vote each filter's."""
    low, high = (card("filter", name, thresholds={"web": web}) for name, web in (("f", 0.25), ("g", 0.75)))
    even = [card("filter", name) for name in "fg"]
    assert prints(filters=[low, high]) == prints(filters=even)
    assert prints(filters=[low, high], decision="vote").decide != prints(filters=even, decision="vote").decide
    own = {"web": 0.5, "synthetic": 0.5}
    assert prints(filters=[low, high], decision="vote", thresholds=own) == prints(filters=even, decision="vote")


def test_needs_no_torch() -> None:
    code = "import sys, capfilt.fingerprints; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "tokenizer.json").write_text("{}")
    return directory


def identity(directory: Path) -> str:
    return fingerprint(LocalCheckpoint(path=str(directory)))


def test_hub_identity() -> None:
    assert fingerprint(HubCheckpoint(hub="a/b", revision=REVISION)) == f"hub:a/b@{REVISION}"


def test_a_copy_is_the_same_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "README.md").write_text("not part of the model")
    assert identity(copy) == identity(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_changed_byte_is_another_checkpoint(checkpoint: Path, name: str) -> None:
    before = identity(checkpoint)
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes() + b" ")
    assert identity(checkpoint) != before


def test_contents_do_not_run_into_names(checkpoint: Path) -> None:
    before = identity(checkpoint)
    (checkpoint / "tokenizer.json").rename(checkpoint / "vocab.txt")
    assert identity(checkpoint) != before


def of_local_checkpoints(directory: Path, tmp_path: Path) -> CurateSpec:
    """A captioner, a filter and a classifier, in directories of their own."""
    data = spec_data()
    for name in ("captioner", "filter", "classifier"):
        shutil.copytree(directory, tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").write_text("{}")
        card = {"name": name, "image_size": 32, "checkpoint": {"path": str(tmp_path / name)}}
        if name == "classifier":
            data["keep_out"] = {"classifier": {**card, "role": "classifier", "labels": ["bad"], "threshold": 0.5}}
        else:
            data[f"{name}s"] = [{**card, "role": name}]
    return CurateSpec.model_validate(data)


@pytest.mark.parametrize("role", ["captioner", "filter", "classifier"])
def test_files_are_read_again_only_where_they_may_be_others(
    role: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = of_local_checkpoints(checkpoint, tmp_path)
    job = Job(spec, run_fingerprints(spec), "run", files_seen=files_seen(spec))
    readings: list[CurateSpec] = []

    def counted(spec: CurateSpec) -> Fingerprints:
        readings.append(spec)
        return run_fingerprints(spec)

    monkeypatch.setattr("capfilt.pipelines.job.run_fingerprints", counted)
    assert job.same_checkpoints()
    assert not readings
    file = tmp_path / role / "model.safetensors"
    content, seen = file.read_bytes(), file.stat()
    time.sleep(0.05)  # some systems tell changes apart by a clock of few ticks
    file.write_bytes(content.swapcase())  # as many bytes
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))  # by a clock that anyone can set, at the same time
    assert not job.same_checkpoints()
    file.write_bytes(content)  # what it was, but only reading tells
    assert job.same_checkpoints()
    assert len(readings) == 2
    assert Job(spec, job.fingerprints, "run").same_checkpoints()  # nothing is known of the files
    (tmp_path / "filter" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"filter: neither tokenizer\.json"):
        job.same_checkpoints()


def test_files_seen_are_those_of_one_machine(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = of_local_checkpoints(checkpoint, tmp_path)
    here = files_seen(spec)
    assert files_seen(spec) == here
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    assert files_seen(spec) != here


def test_weights_in_the_loaders_order(checkpoint: Path) -> None:
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    assert [file.name for file in weight_files(checkpoint)] == ["model.safetensors"]
    (checkpoint / "model.safetensors").unlink()
    assert [file.name for file in weight_files(checkpoint)] == ["pytorch_model.bin"]


def test_shards(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    assert [file.name for file in weight_files(checkpoint)] == [index.name, "model-00001-of-00001.safetensors"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"a": "missing.safetensors"}}', "missing.safetensors.*incomplete"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "not beside it"),
        ('{"weight_map": {"a": 3}}', "not an index"),
        ('{"weight_map": []}', "not an index"),
        ("[]", "not an index"),
        ("{", "not an index"),
    ],
)
def test_broken_index(checkpoint: Path, index: str, message: str) -> None:
    shutil.copy(checkpoint / "model.safetensors", checkpoint.parent)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=f"index.json.*{message}"):
        identity(checkpoint)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("config.json", "config.json: no such file"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "vocab.txt"),
    ],
)
def test_missing_files(checkpoint: Path, gone: str, message: str) -> None:
    (checkpoint / gone).unlink()
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint_files(checkpoint)
    assert str(checkpoint) in str(caught.value)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        identity(tmp_path / "nowhere")
