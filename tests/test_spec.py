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
    LocalCard,
    LocalCheckpoint,
    PairSource,
    Placement,
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
        "captioners: [../cards/captioner.yaml]\nfilters: [../cards/filter.yaml]\n"
    )
    return path


def test_paths_resolve_against_the_file_they_are_written_in(spec_file: Path, tmp_path: Path) -> None:
    spec = load_spec(spec_file)
    assert spec.input.paths == (str(tmp_path / "data"),)
    assert spec.output == str(tmp_path / "specs" / "out")
    assert spec.captioners[0].checkpoint == LocalCheckpoint(path=str(tmp_path / "cards" / "ckpt"))


def test_urls_stay(spec_file: Path) -> None:
    spec = load_spec(spec_file, ["input.paths=[s3://bucket/a, b]", "output=s3://bucket/out"])
    assert spec.input.paths == ("s3://bucket/a", str(spec_file.parent / "b"))
    assert spec.output == "s3://bucket/out"


def test_file_urls_are_paths(spec_file: Path, tmp_path: Path) -> None:
    """Else the output inside an input directory is not recognised as such, and shards have two names."""
    card = CARD.format(role="filter").replace("path: ckpt", "path: file:///models/f")
    (tmp_path / "cards" / "filter.yaml").write_text(card)
    overrides = ["input.paths=['file:///data/../in', 'file://localhost/b', local:///c]", "output=file:///out/"]
    spec = load_spec(spec_file, [*overrides, f"captioners.0=file://{tmp_path}/cards/captioner.yaml"])
    assert spec.input.paths == ("/in", "/b", "/c")
    assert spec.output == "/out"
    assert spec.filters[0].checkpoint == LocalCheckpoint(path="/models/f")
    assert spec.captioners[0].checkpoint == LocalCheckpoint(path=str(tmp_path / "cards" / "ckpt"))
    assert load_spec(spec_file, ["captioners.0.checkpoint.path=file:///m"]).captioners[0].checkpoint.path == "/m"


def test_a_card_in_a_home_directory(spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "cards" / "filter.yaml").write_text(CARD.format(role="filter").replace("path: ckpt", "path: ~/f"))
    spec = load_spec(spec_file, ["captioners.0=~/cards/captioner.yaml"])
    assert spec.captioners[0].name == "captioner"
    assert spec.filters[0].checkpoint == LocalCheckpoint(path=str(tmp_path / "f"))


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
    named = "captioners.0=../cards/other.yaml"
    (before,) = load_spec(spec_file, ["captioners.0.batch_size=3", named]).captioners
    (after,) = load_spec(spec_file, [named, "captioners.0.batch_size=3"]).captioners
    assert (before.name, before.batch_size) == ("other", 5)
    assert (after.name, after.batch_size) == ("other", 3)
    assert after.checkpoint == LocalCheckpoint(path=str(tmp_path / "cards" / "ckpt"))
    with pytest.raises(SpecError, match=r"gone.yaml: no such file"):
        load_spec(spec_file, ["filters.0=gone.yaml"])
    (tmp_path / "cards" / "captioner.yaml").unlink()
    assert load_spec(spec_file, [named]).captioners[0].name == "other"  # the spec's own is not needed


def test_a_threshold_not_given_is_the_cards(spec_file: Path, tmp_path: Path) -> None:
    with (tmp_path / "cards" / "filter.yaml").open("a") as card:
        card.write("thresholds: {web: 0.6, synthetic: 0.7}\n")
    assert load_spec(spec_file).effective_thresholds == (Thresholds(web=0.6, synthetic=0.7),)
    web = load_spec(spec_file, ["thresholds.web=0.9"])
    assert web.effective_thresholds == (Thresholds(web=0.9, synthetic=0.7),)
    both = load_spec(spec_file, ["thresholds={web: 0, synthetic: null}"])
    assert both.effective_thresholds == (Thresholds(web=0, synthetic=0.7),)
    assert CurateSpec.model_validate(web.model_dump(mode="json")) == web


def several(spec_file: Path, role: str, **fields: str) -> None:
    """Cards `a`, `b`, ... of a role beside the spec, each with fields of its own (`name=value` lines), in its list."""
    for name, extra in fields.items():
        card = CARD.format(role=role).replace(f"name: {role}", f"name: {name}")
        (spec_file.parent / f"{name}.yaml").write_text(card + extra)
    listed = f"{role}s: [{', '.join(f'{name}.yaml' for name in fields)}]"
    spec_file.write_text(spec_file.read_text().replace(f"{role}s: [../cards/{role}.yaml]", listed))


def test_cards_in_lists(spec_file: Path, tmp_path: Path) -> None:
    """Each by its path or inline, opened relative to the spec, its checkpoint relative to its own file."""
    several(spec_file, "captioner", a="batch_size: 4\n", b="batch_size: 9\nplacement: {gpus: 1, max_actors: 3}\n")
    several(spec_file, "filter", c="batch_size: 5\nplacement: {cpus: 2, min_actors: 2, max_actors: 2}\n")
    spec = load_spec(spec_file, ["captioners.1.batch_size=128", "captioners.0=../cards/captioner.yaml"])
    assert [(card.name, card.batch_size) for card in spec.captioners] == [("captioner", "auto"), ("b", 128)]
    assert spec.captioners[0].checkpoint == LocalCheckpoint(path=str(tmp_path / "cards" / "ckpt"))
    assert spec.captioners[1].checkpoint == LocalCheckpoint(path=str(tmp_path / "specs" / "ckpt"))
    assert list(spec.cards) == ["captioners.0", "captioners.1", "filters.0"]
    assert spec.placement == Placement(gpus=1, cpus=2, min_actors=2, max_actors=3)
    inline = "{role: captioner, name: d, image_size: 32, checkpoint: {path: here}}"
    spec = load_spec(spec_file, [f"captioners=[a.yaml, {inline}]", "captioners.1.checkpoint.path=there"])
    assert [card.name for card in spec.captioners] == ["a", "d"]
    assert spec.captioners[1].checkpoint == LocalCheckpoint(path=str(tmp_path / "specs" / "there"))
    assert CurateSpec.model_validate(spec.model_dump(mode="json")) == spec


def test_set_reaches_into_every_list(spec_file: Path) -> None:
    spec = load_spec(spec_file, ["input.paths=[a, b]", "input.paths.1=s3://bucket/c"])
    assert spec.input.paths == (str(spec_file.parent / "a"), "s3://bucket/c")


def test_cards_of_one_name_are_refused(spec_file: Path) -> None:
    several(spec_file, "filter", a="", b="")
    assert [card.name for card in load_spec(spec_file).filters] == ["a", "b"]
    with pytest.raises(SpecError, match=r"filters: 2 cards, of which several are named a; .* give each its own"):
        load_spec(spec_file, ["filters.1.name=a"])
    assert load_spec(spec_file, ["filters.0.name=captioner"]).filters[0].name == "captioner"  # of another role


def test_thresholds_of_several_filters(spec_file: Path) -> None:
    """One mean of the cards' where the filters decide by their mean, each card's where they vote; the spec's first."""
    several(spec_file, "filter", a="thresholds: {web: 0.25}\n", b="thresholds: {web: 0.75, synthetic: 0.125}\n")
    given = "thresholds.synthetic=0.25"
    assert load_spec(spec_file).effective_thresholds == (Thresholds(web=0.5, synthetic=0.3125),)
    assert load_spec(spec_file, [given]).effective_thresholds == (Thresholds(web=0.5, synthetic=0.25),)
    vote = load_spec(spec_file, ["decision=vote"]).effective_thresholds
    assert vote == (Thresholds(web=0.25, synthetic=0.5), Thresholds(web=0.75, synthetic=0.125))
    vote = load_spec(spec_file, ["decision=vote", given]).effective_thresholds
    assert vote == (Thresholds(web=0.25, synthetic=0.25), Thresholds(web=0.75, synthetic=0.25))


def test_a_spec_of_one_captioner_and_one_filter_is_told_of_the_lists(spec_file: Path) -> None:
    spec_file.write_text(
        spec_file.read_text().replace("captioners: [", "captioner: [").replace("filters: [", "filter: [")
    )
    with pytest.raises(SpecError) as caught:
        load_spec(spec_file)
    for role in ("captioner", "filter"):
        assert f"{role}: unknown field; did you mean {role}s?" in str(caught.value)


def test_a_card_that_is_wrong_makes_no_second_line_about_its_list(spec_file: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(spec_file, ["captioners.0.batchsize=1"])
    assert len(str(caught.value).splitlines()) == 1


def test_set_reaches_into_cards_and_reads_yaml(spec_file: Path) -> None:
    spec = load_spec(spec_file, ["captioners.0.batch_size=3", "sampling.top_p=0.85", "thresholds.web=0.7"])
    assert spec.captioners[0].batch_size == 3
    assert spec.sampling.top_p == 0.85
    assert spec.effective_thresholds[0].web == 0.7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.topp=1", "sampling.topp: unknown field; did you mean top_p?"),
        ("captioners.0.batchsize=1", "captioners.0.batchsize: unknown field; did you mean batch_size?"),
        ("captioner.batch_size=1", "captioner: unknown field; did you mean captioners?"),
        ("filter=../cards/filter.yaml", "filter: unknown field; did you mean filters?"),
        ("captioners=../cards/captioner.yaml", "captioners: expected a list (got '../cards/captioner.yaml')"),
        ("filters=[]", "filters: Tuple should have at least 1 item"),
        ("filters=[7]", "filters.0: expected a mapping (got 7)"),
        ("thresholds=0.4", "thresholds: expected a mapping of web, synthetic (got 0.4)"),
        ("captioners.0.checkpoint=7", "captioners.0.checkpoint: expected a mapping (got 7)"),
        ("captioners=[gone.yaml]", "gone.yaml: no such file"),
        ("captioners=[../cards/filter.yaml]", "captioners.0.role: Input should be 'captioner'"),
        ("captioners=[../cards/captioner.yaml, ../cards/captioner.yaml]", "several are named captioner"),
        ("captioners.1.batch_size=1", "captioners is a list, and 1 is none of it: its entries are captioners.0 to "),
        ("filters.1=../cards/filter.yaml", "filters is a list, and 1 is none of it: its entries are filters.0 to "),
        ("filters.-1.batch_size=1", "filters is a list, and -1 is none of it"),
        ("filters.batch_size=1", "filters is a list, and batch_size is none of it"),
        ("filters.0.name.x=1", "filters.0.name is 'filter', not a mapping or a list"),
        ("decision=median", "decision: Input should be 'mean' or 'vote'"),
        ("keep=all", "keep: Input should be 'best' or 'all-above-threshold'"),
        ("max_errors=1", "max_errors: unknown field; did you mean max_error_fraction?"),
        (
            "filters.0.checkpoint={hub: a/b, revision: main}",
            "revision: String should match pattern '^[0-9a-f]{40}$' (got 'main') (Commit hash (40 hex digits): a "
            "branch or tag can move)",
        ),
        ("filters.0.checkpoint={hub: a/b}", "filters.0.checkpoint.revision: required (Commit hash (40 hex digits): a"),
        ("filters.0.thresholds.web=2", "filters.0.thresholds.web: Input should be less than or equal to 1 (got 2)"),
        ("fragment_rows=0", "fragment_rows: Input should be greater than or equal to 1 (got 0)"),
        ("captioners.0.placement={min_actors: 3, max_actors: 2}", "min_actors (3) is above max_actors (2)"),
        ("sampling={min_tokens: 9, max_tokens: 3}", "min_tokens (9) is above max_tokens (3)"),
        ("filters=7", "filters: expected a list (got 7)"),
        ("nonsense", "write it as path=value"),
        ("kind=[", "not valid YAML"),
        ("kind=" + "[" * 5000, "the value is not valid YAML: lists or mappings lie in each other hundreds deep"),
        ("output.x=1", "output is 'out', not a mapping"),
        ("captioners.0.role=filter", "captioners.0.role: Input should be 'captioner'"),
        (
            "kind=curat",
            "kind: 'curat' is not one of curate, pretrain, finetune-captioner, finetune-filter, evaluate, bootstrap, "
            "ingest",
        ),
    ],
)
def test_what_is_wrong_is_named(spec_file: Path, override: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(spec_file, [override])
    assert message in str(caught.value)


def test_a_file_of_lists_within_lists_is_no_bug(tmp_path: Path) -> None:
    file = tmp_path / "deep.yaml"
    file.write_text("a: " + "[" * 5000 + "]" * 5000)
    with pytest.raises(SpecError, match=r"deep.yaml: not valid YAML: lists or mappings lie in each other"):
        load_spec(file)


@pytest.mark.parametrize(
    "override",
    [
        "input.storage_options={client_kwargs: {aws_secret_access_key: hunter2}}",
        "input.storage_options={connection_string: hunter2}",
        "input.storage_options={account: x, apikey: hunter2}",
        "input.storage_options={headers: [{Authorization: hunter2}]}",
        "input.storage_options={endpoint_url: 'https://me:hunter2@store.example.org'}",
        "output_options={endpoint: 'https://x.example.org/?sv=1&sig=hunter2'}",
        "output_options={nested: [a, 'AccountName=x;AccountKey=hunter2']}",
        "input.paths=ftp://me:hunter2@example.org/in",
        "input.paths=[in, 'https://b.example.org/0.parquet?X-Amz-Signature=hunter2']",
        "output=s3://key:hunter2@bucket/out",
        "captioners.0.checkpoint={path: 'https://me:hunter2@example.org/x'}",
    ],
)
def test_a_secret_is_refused_and_not_repeated(spec_file: Path, override: str) -> None:
    with pytest.raises(SpecError, match="looks like a secret; specs never hold secrets") as caught:
        load_spec(spec_file, [override])
    assert "hunter2" not in str(caught.value)


def test_what_is_no_secret_is_not_refused(spec_file: Path) -> None:
    options = "{anon: true, profile: nightly, client_kwargs: {endpoint_url: 'http://127.0.0.1:9000', region_name: x}}"
    taken = ["input.paths=s3://a:b/c@d/*.parquet", "output=s3://bucket/user@host", f"input.storage_options={options}"]
    assert load_spec(spec_file, taken).kind == "curate"


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
    if isinstance(card, LocalCard) and isinstance(card.checkpoint, HubCheckpoint):
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


PRETRAIN = (
    "kind: pretrain\nname: p\ndata: [{pairs: {paths: x}}]\noutput: out\narchitecture: base\ntokenizer: {path: t}\n"
    "image_size: 32\nbatch_size: 8\n"
)


def test_an_entry_of_a_list_of_values_is_named_by_its_list(tmp_path: Path) -> None:
    (tmp_path / "pretrain.yaml").write_text(PRETRAIN)
    with pytest.raises(SpecError, match=r"data\.0\.texts\.1: Input should be 'web' or 'synthetic'"):
        load_spec(tmp_path / "pretrain.yaml", ["data=[{dataset: x, texts: [web, human]}]"])


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ("[0.9, 1]", "optimiser.betas.1: Input should be less than 1 (got 1)"),
        ("[1.5, 0.999]", "optimiser.betas.0: Input should be less than 1 (got 1.5)"),
        ("[-0.1, 0.999]", "optimiser.betas.0: Input should be greater than or equal to 0 (got -0.1)"),
    ],
)
def test_betas_that_adamw_would_refuse_are_refused(tmp_path: Path, betas: str, message: str) -> None:
    """AdamW's own ValueError would come as a traceback, from a worker."""
    (tmp_path / "pretrain.yaml").write_text(PRETRAIN)
    with pytest.raises(SpecError) as caught:
        load_spec(tmp_path / "pretrain.yaml", [f"optimiser.betas={betas}"])
    assert message in str(caught.value)
    spec = load_spec(tmp_path / "pretrain.yaml", ["optimiser.betas=[0, 0.98]"])
    assert spec.optimiser.betas == (0, 0.98)


@pytest.mark.parametrize("value", ["0", "4097", "many", "1.5", "true"])
def test_a_batch_size_that_is_none_is_named(spec_file: Path, value: str) -> None:
    with pytest.raises(
        SpecError, match=r"captioners\.0\.batch_size: .*expected `auto`, or a whole number from 1 to 4096"
    ):
        load_spec(spec_file, [f"captioners.0.batch_size={value}"])
    assert load_spec(spec_file, ["captioners.0.batch_size=auto"]).captioners[0].batch_size == "auto"
