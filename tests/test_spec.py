"""Specs and cards: what is wrong is named by its path, and every YAML on disk is valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from capfilt.errors import SpecError
from capfilt.spec import (
    CurateSpec,
    FilterCard,
    FilterSettings,
    HubCheckpoint,
    LocalCheckpoint,
    PairSource,
    Thresholds,
    Workers,
    load_card,
    load_spec,
    output_location,
)

ROOT = Path(__file__).parent.parent
CARD = "role: {role}\nname: {role}\ncheckpoint: {{path: ckpt}}\nimage_size: 32\n"


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    (tmp_path / "cards").mkdir()
    for role in ("captioner", "filter"):
        (tmp_path / "cards" / f"{role}.yaml").write_text(CARD.format(role=role))
    path = tmp_path / "specs" / "run.yaml"
    path.parent.mkdir()
    path.write_text(
        "kind: curate\ninput: {paths: ../data}\noutput: out\n"
        "captioner: ../cards/captioner.yaml\nfilter: ../cards/filter.yaml\n"
    )
    return path


def test_paths_resolve_against_the_file_they_are_written_in(spec_file: Path, tmp_path: Path) -> None:
    spec = load_spec(spec_file)
    assert spec.input.paths == (str(tmp_path / "data"),)
    assert spec.output == str(tmp_path / "specs" / "out")
    assert spec.captioner.checkpoint == LocalCheckpoint(path=str(tmp_path / "cards" / "ckpt"))


def test_urls_stay(spec_file: Path) -> None:
    spec = load_spec(spec_file, ["input.paths=[s3://bucket/a, b]", "output=s3://bucket/out"])
    assert spec.input.paths == ("s3://bucket/a", str(spec_file.parent / "b"))
    assert spec.output == "s3://bucket/out"


def test_file_urls_are_paths(spec_file: Path, tmp_path: Path) -> None:
    """Else the output inside an input directory is not recognised as such, and shards have two names."""
    card = CARD.format(role="filter").replace("path: ckpt", "path: file:///models/f")
    (tmp_path / "cards" / "filter.yaml").write_text(card)
    overrides = ["input.paths=['file:///data/../in', 'file://localhost/b', local:///c]", "output=file:///out/"]
    spec = load_spec(spec_file, [*overrides, f"captioner=file://{tmp_path}/cards/captioner.yaml"])
    assert spec.input.paths == ("/in", "/b", "/c")
    assert spec.output == "/out"
    assert spec.filter.checkpoint == LocalCheckpoint(path="/models/f")
    assert spec.captioner.checkpoint == LocalCheckpoint(path=str(tmp_path / "cards" / "ckpt"))
    assert load_spec(spec_file, ["captioner.checkpoint.path=file:///m"]).captioner.checkpoint.path == "/m"  # type: ignore[union-attr]


def test_a_card_in_a_home_directory(spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "cards" / "filter.yaml").write_text(CARD.format(role="filter").replace("path: ckpt", "path: ~/f"))
    spec = load_spec(spec_file, ["captioner=~/cards/captioner.yaml"])
    assert spec.captioner.name == "captioner"
    assert spec.filter.checkpoint == LocalCheckpoint(path=str(tmp_path / "f"))


@pytest.mark.parametrize("output", ["a%20b", "a%b/c", "s3://bucket/a%2Fb", "file:///a%20b"])
def test_a_percent_sign_in_the_output_is_refused(spec_file: Path, output: str) -> None:
    """deltalake would decode it, and write beside what the workers write."""
    with pytest.raises(SpecError, match="output: no % may be in it"):
        load_spec(spec_file, [f"output={output}"])
    with pytest.raises(SpecError, match="no % may be in it"):
        output_location(output)


def test_set_names_a_card_by_path(spec_file: Path, tmp_path: Path) -> None:
    other = CARD.format(role="captioner").replace("name: captioner", "name: other")
    (tmp_path / "cards" / "other.yaml").write_text(other + "batch_size: 5\n")
    named = "captioner=../cards/other.yaml"
    before = load_spec(spec_file, ["captioner.batch_size=3", named]).captioner
    after = load_spec(spec_file, [named, "captioner.batch_size=3"]).captioner
    assert (before.name, before.batch_size) == ("other", 5)
    assert (after.name, after.batch_size) == ("other", 3)
    assert after.checkpoint == LocalCheckpoint(path=str(tmp_path / "cards" / "ckpt"))
    with pytest.raises(SpecError, match=r"gone.yaml: no such file"):
        load_spec(spec_file, ["filter=gone.yaml"])
    (tmp_path / "cards" / "captioner.yaml").unlink()
    assert load_spec(spec_file, [named]).captioner.name == "other"  # the spec's own is not needed


def test_a_threshold_not_given_is_the_cards(spec_file: Path, tmp_path: Path) -> None:
    with (tmp_path / "cards" / "filter.yaml").open("a") as card:
        card.write("thresholds: {web: 0.6, synthetic: 0.7}\n")
    assert load_spec(spec_file).effective_thresholds == Thresholds(web=0.6, synthetic=0.7)
    web = load_spec(spec_file, ["thresholds.web=0.9"])
    assert web.effective_thresholds == Thresholds(web=0.9, synthetic=0.7)
    both = load_spec(spec_file, ["thresholds={web: 0, synthetic: null}"])
    assert both.effective_thresholds == Thresholds(web=0, synthetic=0.7)
    assert CurateSpec.model_validate(web.model_dump(mode="json")) == web


def test_set_reaches_into_cards_and_reads_yaml(spec_file: Path) -> None:
    spec = load_spec(spec_file, ["captioner.batch_size=3", "sampling.top_p=0.85", "thresholds.web=0.7"])
    assert spec.captioner.batch_size == 3
    assert spec.sampling.top_p == 0.85
    assert spec.effective_thresholds.web == 0.7
    assert spec.batch_size == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.topp=1", "sampling.topp: unknown field; did you mean top_p?"),
        ("captioner.batchsize=1", "captioner.batchsize: unknown field; did you mean batch_size?"),
        ("max_errors=1", "max_errors: unknown field; did you mean max_error_fraction?"),
        ("filter.checkpoint={hub: a/b, revision: main}", "filter.checkpoint.revision: String should match pattern"),
        ("filter.checkpoint={hub: a/b}", "filter.checkpoint.revision: required"),
        ("filter.thresholds.web=2", "filter.thresholds.web: Input should be less than or equal to 1 (got 2)"),
        ("fragment_rows=0", "fragment_rows: Input should be greater than or equal to 1 (got 0)"),
        ("captioner.placement={min_actors: 3, max_actors: 2}", "min_actors (3) is above max_actors (2)"),
        ("sampling={min_tokens: 9, max_tokens: 3}", "min_tokens (9) is above max_tokens (3)"),
        ("filter=7", "filter: Input should be a valid dictionary"),
        ("nonsense", "write it as path=value"),
        ("kind=[", "not valid YAML"),
        ("output.x=1", "output is 'out', not a mapping"),
        ("captioner.role=filter", "captioner.role: Input should be 'captioner'"),
        (
            "kind=curat",
            "kind: 'curat' is not one of curate, pretrain, finetune-captioner, finetune-filter, evaluate, bootstrap",
        ),
    ],
)
def test_what_is_wrong_is_named(spec_file: Path, override: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(spec_file, [override])
    assert message in str(caught.value)


def test_a_secret_is_refused_and_not_repeated(spec_file: Path) -> None:
    override = "input.storage_options={client_kwargs: {aws_secret_access_key: hunter2}}"
    with pytest.raises(SpecError, match="looks like a secret") as caught:
        load_spec(spec_file, [override])
    assert "hunter2" not in str(caught.value)


def test_missing_files_and_fields(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nowhere.yaml: no such file"):
        load_spec(tmp_path / "nowhere.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(SpecError, match="expected a mapping"):
        load_spec(tmp_path / "empty.yaml")
    (tmp_path / "list.yaml").write_text("kind: curate")
    with pytest.raises(SpecError, match="input: required"):
        load_spec(tmp_path / "list.yaml")


def test_specs_are_frozen(spec_file: Path) -> None:
    with pytest.raises(ValidationError):
        load_spec(spec_file).fragment_rows = 3  # type: ignore[misc]


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("**/*.yaml")), ids=lambda path: path.name)
def test_every_card_on_disk(path: Path) -> None:
    card = load_card(path)
    assert card.name == path.stem
    if isinstance(card.checkpoint, HubCheckpoint):
        assert card.licence != "unknown"
    if isinstance(card, FilterCard):
        assert card.first_token == "[ENC]"


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("**/*.yaml")), ids=lambda path: path.name)
def test_every_spec_on_disk(path: Path) -> None:
    load_spec(path)


def test_the_cards_of_the_paper_are_there() -> None:
    assert len(list((ROOT / "models").glob("blip-*.yaml"))) == 6


TRAINING = {"image_size": 384, "batch_size": 8}


def test_a_field_set_in_fine_tuning_leaves_the_others_as_they_are() -> None:
    given = {"optimiser": {"lr": 5e-6}, "contrast": {"queue": 100}, "augment": {"flip": 0}}
    settings = FilterSettings.model_validate({**TRAINING, **given})
    assert (settings.optimiser.lr, settings.optimiser.schedule, settings.optimiser.warmup_steps) == (5e-6, "cosine", 0)
    assert (settings.contrast.queue, settings.contrast.by_image, settings.contrast.across_ranks) == (100, True, True)
    assert settings.contrast.alpha_epochs == 1
    assert settings.augment is not None
    assert (settings.augment.flip, settings.augment.min_scale) == (0, 0.5)


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (PairSource, {"pairs": {"paths": "x"}, "texts": ["web"]}, "texts: only of a dataset"),
        (PairSource, {"pairs": {"paths": "x"}, "version": 0}, "version: only of a dataset"),
        (PairSource, {}, "give either dataset or pairs"),
        (PairSource, {"dataset": "x", "pairs": {"paths": "x"}}, "give either dataset or pairs"),
        (Workers, {"count": 2, "gpus": 0.5}, "several workers cannot share a GPU"),
    ],
)
def test_what_would_be_ignored_is_refused(model: type[BaseModel], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model.model_validate(given)
