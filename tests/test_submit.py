"""What a cluster is sent: the resolved spec, checkpoints, environment. No cluster here; see test_jobs.py."""

from __future__ import annotations

import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import jpeg, write_shard

from capfilt.errors import CapfiltError, CheckpointError, SpecError
from capfilt.fingerprints import run_fingerprints
from capfilt.models.tiny import write_tiny_pair
from capfilt.pipelines.jobs import OLDEST_RAY
from capfilt.spec import CurateSpec, LocalCheckpoint, PretrainSpec, TrainSpec, load_spec
from capfilt.submit import MAX_BYTES, SPEC, Submission, extras, pack, prepare, runtime_env

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: specs in one place, cards in another, models in a third."""
    folder = tmp_path_factory.mktemp("project")
    write_tiny_pair(folder / "weights")
    for role in ("captioner", "filter"):
        card = folder / "cards" / f"{role}.yaml"
        card.parent.mkdir(exist_ok=True)
        card.write_text(
            f"role: {role}\nname: tiny-{role}\ncheckpoint: {{path: ../weights/{role}}}\nimage_size: 32\nbatch_size: 8\n"
        )
    (folder / "specs").mkdir()
    (folder / "specs" / "run.yaml").write_text(
        "kind: curate\ninput: {paths: [../data, s3://bucket/x]}\noutput: ../out\n"
        "captioners: [../cards/captioner.yaml]\nfilters: [../cards/filter.yaml]\nfragment_rows: 20\n"
        "ray: {num_cpus: 3}\n"
    )
    return folder


def sent(submission: Submission, folder: Path) -> CurateSpec:
    """The spec as the cluster reads it, from another folder than the user's."""
    pack(submission, folder)
    spec = load_spec(folder / SPEC)
    assert isinstance(spec, CurateSpec)
    return spec


def test_what_is_sent_is_what_was_written(project: Path, tmp_path: Path) -> None:
    there = sent(prepare(project / "specs" / "run.yaml", ["captioners.0.batch_size=4"]), tmp_path)
    here = load_spec(project / "specs" / "run.yaml", ["captioners.0.batch_size=4", "ray={address: auto}"])
    assert isinstance(here, CurateSpec)
    assert there.input.paths == (str(project / "data"), "s3://bucket/x")
    assert there.output == str(project / "out")
    assert there.ray.model_dump() == {"address": "auto", "num_cpus": None, "metrics_port": None}
    paths = [card.checkpoint.path for card in there.cards.values() if isinstance(card.checkpoint, LocalCheckpoint)]
    assert paths == [str(tmp_path / "checkpoints" / "0-captioner"), str(tmp_path / "checkpoints" / "1-filter")]
    assert run_fingerprints(there) == run_fingerprints(here)  # nothing is done again for having been sent
    moved = {"captioners": there.captioners, "filters": there.filters}
    assert here.model_copy(update=moved) == there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", SPEC]


def test_what_a_user_left_out_stays_out(project: Path, tmp_path: Path) -> None:
    """So that a cluster with an older capfilt is not told of fields that it does not know."""
    sent(prepare(project / "specs" / "run.yaml"), tmp_path)
    assert "sampling" not in (tmp_path / SPEC).read_text()


def test_one_checkpoint_named_twice_is_sent_once(project: Path, tmp_path: Path) -> None:
    second = "{role: captioner, name: b, image_size: 32, checkpoint: {path: ../weights/captioner}}"
    submission = prepare(project / "specs" / "run.yaml", [f"captioners=[../cards/captioner.yaml, {second}]"])
    assert list(submission.checkpoints) == ["checkpoints/0-captioner", "checkpoints/1-filter"]
    assert len(sent(submission, tmp_path).captioners) == 2


def test_checkpoints_that_the_cluster_has_are_not_sent(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor looked for: this machine may not see them."""
    monkeypatch.chdir(project)
    override = "captioners.0.checkpoint.path=/models/captioner"
    with pytest.raises(CheckpointError, match="/models/captioner"):
        prepare("specs/run.yaml", [override], shared=["weights"])
    submission = prepare("specs/run.yaml", [override], shared=["/models", "weights"])
    assert submission.checkpoints == {}
    there = sent(submission, tmp_path)
    assert there.captioners[0].checkpoint == LocalCheckpoint(path="/models/captioner")
    assert there.filters[0].checkpoint == LocalCheckpoint(path=str(project / "weights" / "filter"))


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("fragment_row=3", SpecError, "did you mean fragment_rows?"),
        ("ray.address=other:6379", SpecError, "ray.address: other:6379 names a cluster"),
        ("filters.0.image_size=36", SpecError, "36 is not a multiple of the patch size"),
        ("output_options={secret_key: x}", SpecError, "looks like a secret"),
    ],
)
def test_a_spec_is_checked_before_it_is_sent(
    project: Path, override: str, error: type[CapfiltError], message: str
) -> None:
    with pytest.raises(error) as caught:
        prepare(project / "specs" / "run.yaml", [override])
    assert message in str(caught.value)


def test_a_classifiers_labels_are_checked_before_it_is_sent(project: Path) -> None:
    folder = project / "weights" / "nsfw"
    folder.mkdir()
    (folder / "config.json").write_text('{"id2label": {"0": "safe"}}')
    for name in ("model.safetensors", "preprocessor_config.json"):
        (folder / name).write_text("{}")
    (project / "cards" / "nsfw.yaml").write_text(
        "{role: classifier, name: guard, checkpoint: {path: ../weights/nsfw}, image_size: 32, labels: [nsfw]}"
    )
    kept_out = ["keep_out={classifier: ../cards/nsfw.yaml}"]
    with pytest.raises(SpecError, match=r"keep_out\.classifier\.labels: guard has no label nsfw; it has safe"):
        prepare(project / "specs" / "run.yaml", kept_out)
    prepare(project / "specs" / "run.yaml", kept_out, shared=[str(project / "weights")])  # the cluster's to look at
    submission = prepare(project / "specs" / "run.yaml", [*kept_out, "keep_out.classifier.labels=[safe]"])
    assert folder in submission.checkpoints.values()


def test_checkpoints_that_ray_would_not_take_are_refused(project: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.mkdir()
    with (big / "model.safetensors").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    submission = Submission(prepare(project / "specs" / "run.yaml").spec, {"checkpoints/0-big": big})
    with pytest.raises(CheckpointError, match=rf"100 MiB are more than .*{big} 100 MiB.*--shared"):
        pack(submission, tmp_path)


def test_every_kind_of_spec_can_be_sent(project: Path, tmp_path: Path) -> None:
    """Where its checkpoints are not those of cards."""
    (project / "specs" / "pretrain.yaml").write_text(
        "kind: pretrain\nname: p\ndata: [{pairs: {paths: ../data}}]\noutput: ../trained\narchitecture: base\n"
        "tokenizer: {path: ../weights/captioner}\nimage_size: 32\nbatch_size: 8\n"
    )
    submission = prepare(project / "specs" / "pretrain.yaml")
    pack(submission, tmp_path)
    spec = load_spec(tmp_path / SPEC)
    assert isinstance(spec, PretrainSpec)
    assert spec.tokenizer == LocalCheckpoint(path=str(tmp_path / "checkpoints" / "0-captioner"))
    assert spec.ray.address == "auto"
    (project / "specs" / "evaluate.yaml").write_text(
        "kind: evaluate\noutput: ../found\npairs: {paths: ../data}\nfilter: ../cards/filter.yaml\n"
    )
    assert list(prepare(project / "specs" / "evaluate.yaml").checkpoints) == ["checkpoints/0-filter"]


def make_wheel(folder: Path, **extra: str) -> Path:
    """A wheel of this capfilt; `extra` is appended to modules."""
    path = folder / "capfilt-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for module in (ROOT / "capfilt").rglob("*.py"):
            name = str(module.relative_to(ROOT))
            archive.writestr(name, module.read_text() + extra.get(module.stem, ""))
    return path


def test_a_wheel_lies_open_in_the_folder(project: Path, tmp_path: Path) -> None:
    wheel, folder = make_wheel(tmp_path), tmp_path / "folder"
    folder.mkdir()
    assert pack(prepare(project / "specs" / "run.yaml"), folder, wheel) == []
    assert (folder / "capfilt" / "cli.py").is_file()
    assert (folder / "capfilt" / "models" / "blip.py").is_file()
    other = tmp_path / "other-1.0-py3-none-any.whl"
    other.write_bytes(wheel.read_bytes())
    for wrong in (other, tmp_path / "capfilt-gone.whl"):
        with pytest.raises(CapfiltError, match=r"not a wheel of capfilt; make one"):
            pack(prepare(project / "specs" / "run.yaml"), folder, wrong)


def test_requirements_of_pip(project: Path, tmp_path: Path) -> None:
    """Their paths change with what is in the files: Ray keeps an environment by its requirements' text."""
    wheel, constraints = make_wheel(tmp_path), tmp_path / "constraints.txt"
    seen = []
    for number, pins in enumerate(["ray==2.60.0\n", "ray==2.60.1\n"]):
        constraints.write_text(pins)
        folder = tmp_path / str(number)
        folder.mkdir()
        seen.append(pack(prepare(project / "specs" / "run.yaml"), folder, wheel, constraints))
        for line, file in zip(seen[-1], (constraints, wheel), strict=True):
            place = line.removeprefix("-c ").replace("${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}", str(folder))
            assert Path(place).read_bytes() == file.read_bytes()
    assert not set(seen[0]) & set(seen[1])
    folder = tmp_path / "index"
    folder.mkdir()
    assert pack(prepare(project / "specs" / "run.yaml"), folder, None, constraints)[1].startswith("capfilt==")
    with pytest.raises(CapfiltError, match=r"gone.txt: no such file"):
        pack(prepare(project / "specs" / "run.yaml"), folder, None, tmp_path / "gone.txt")


@pytest.mark.parametrize(
    ("text", "forward", "needed"),
    [
        ("", [], []),
        ("input: {paths: gs://bucket/laion}", [], ["gcs"]),
        ("output: abfss://container@account.dfs.core.windows.net/curated", ["PATH"], ["azure"]),
        ("withdrawn: {urls: [az://container/withdrawn.csv]}\noutput: gcs://bucket/x", [], ["azure", "gcs"]),
        ("", ["OTEL_SERVICE_NAME"], []),
        ("", ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"], ["otel"]),
        ("kind: ingest\nurls: {paths: urls.csv}", ["OTEL_EXPORTER_OTLP_ENDPOINT"], ["ingest", "otel"]),
        ("kind: export\ndataset: s3://bucket/x\noutput: ../y\nformat: parquet", [], []),
        ("kind: export\ndataset: gs://bucket/x\noutput: ../y\nformat: litdata", [], ["gcs", "litdata"]),
    ],
)
def test_extras_are_those_that_a_run_needs(
    project: Path, tmp_path: Path, text: str, forward: list[str], needed: list[str]
) -> None:
    given = yaml.safe_load(text) or {}
    if "kind" not in given:
        given = yaml.safe_load((project / "specs" / "run.yaml").read_text()) | given
    given.setdefault("output", "../out")
    path = project / "specs" / "other.yaml"
    path.write_text(yaml.safe_dump(given))
    (constraints := tmp_path / "constraints.txt").write_text("ray==2.60.0\n")
    (folder := tmp_path / "folder").mkdir()
    requirement = pack(prepare(path), folder, make_wheel(tmp_path), constraints, forward)[-1]
    assert requirement.partition(".whl")[2] == (f"[{','.join(needed)}]" if needed else "")


def test_every_kind_of_training_needs_the_extra() -> None:
    for path in sorted((ROOT / "pipelines").glob("*.yaml")):
        spec = load_spec(path)
        assert ("train" in extras(spec)) == (spec.kind == "bootstrap" or isinstance(spec, TrainSpec)), path


def test_variables_are_forwarded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_PASSWORD", "hush")
    environment = runtime_env(tmp_path, [], ["STORE_PASSWORD"])
    assert environment["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600", "STORE_PASSWORD": "hush"}
    with pytest.raises(SpecError, match="--env NOT_SET: not set here"):
        runtime_env(tmp_path, [], ["NOT_SET"])
    with pytest.raises(SpecError) as caught:
        runtime_env(tmp_path, [], ["STORE_PASSWORD=other"])
    assert "give the variable's name alone" in str(caught.value)
    assert "other" not in str(caught.value)


def test_the_oldest_ray_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"ray[data]>={OLDEST_RAY[0]}.{OLDEST_RAY[1]},<{OLDEST_RAY[0] + 1}" in project["dependencies"]


def test_a_shard_is_not_sent(project: Path, tmp_path: Path) -> None:
    write_shard(project / "data" / "0.parquet", [jpeg(0)])
    sent(prepare(project / "specs" / "run.yaml"), tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))
