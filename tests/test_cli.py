"""The command line, in processes of its own: what it prints, how it exits, and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import jpeg, read, write_shard

from capfilt.dataset import CuratedDataset
from capfilt.fingerprints import checkpoint_files
from capfilt.models.tiny import write_tiny_pair

ROOT = Path(__file__).parent.parent
CAPFILT = [
    sys.executable,
    "-c",
    # a background job of a shell is born deaf to SIGINT, and so would its tests be
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from capfilt.cli import main; main()",
]


def capfilt(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [*CAPFILT, *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "120", "PYTHONWARNINGS": "default"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment, check=False)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """A spec over two shards with the tiny models, as a user would write it."""
    for s in range(2):
        write_shard(tmp_path / "data" / f"{s:05d}.parquet", [jpeg(100 * s + i) for i in range(60)])
    captioner, filter_ = write_tiny_pair(tmp_path / "models")
    for role, directory in (("captioner", captioner), ("filter", filter_)):
        card = f"role: {role}\nname: {role}\ncheckpoint: {{path: {directory}}}\nimage_size: 32\nbatch_size: 16\n"
        (tmp_path / f"{role}.yaml").write_text(card)
    path = tmp_path / "run.yaml"
    path.write_text(
        "kind: curate\ninput: {paths: data}\noutput: out\ncaptioners: [captioner.yaml]\nfilters: [filter.yaml]\n"
        "sampling: {min_tokens: 2, max_tokens: 6}\nfragment_rows: 20\n"
    )
    return path


def test_a_user_goes_through_every_command(spec: Path) -> None:
    checked = capfilt("check", spec)
    assert checked.returncode == 0, checked.stderr
    assert "2 files" in checked.stdout
    assert "image=jpg text=caption" in checked.stdout
    assert f"filter filter: found in {spec.parent / 'models' / 'filter'}" in checked.stdout
    planned = capfilt("plan", spec)
    assert planned.returncode == 0, planned.stderr
    assert "curate 2 shards" in planned.stdout
    assert "new" in planned.stdout
    assert "restart at caption: 2 shards, rows not known yet; no run on record" in planned.stdout
    assert not (spec.parent / "out").exists()

    done = capfilt("run", spec)
    assert done.returncode == 0, done.stderr
    assert "120" in done.stdout
    assert "in 2 shards" in done.stdout
    assert "ray" not in done.stderr.lower().replace("starting ray", "")  # Ray's own noise stays off the terminal
    rows = read(str(spec.parent / "out"))
    assert len(rows) == 120

    state = capfilt("status", spec.parent / "out")
    assert state.returncode == 0, state.stderr
    assert "2 shards, 120 rows" in state.stdout
    assert capfilt("status", spec).stdout == state.stdout
    assert "up to date" in capfilt("plan", spec).stdout
    changed = capfilt("plan", spec, "--set", "thresholds={web: 0.9}").stdout
    assert "thresholds or rules changed" in changed
    assert "restart at decide: 2 shards, 120 rows; no run on record was at the decide stage" in changed
    changed = capfilt("plan", spec, "--set", "sampling.seed=1").stdout
    assert re.search(
        r"restart at caption: 2 shards, 120 rows; at most about \d:\d\d:\d\d: run \S+ was too short", changed
    )
    assert "nothing to do: 2 shards" in capfilt("run", spec).stdout
    swept = capfilt("vacuum", spec.parent / "out", "--hours", "0")
    assert swept.returncode == 0, swept.stderr
    assert "0 files removed" in capfilt("vacuum", spec).stdout
    assert read(str(spec.parent / "out")) == rows


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "nowhere.yaml"], 2, "nowhere.yaml: no such file; a spec is a YAML file"),
        (["run", "rum.yaml"], 2, "rum.yaml: no such file; did you mean run.yaml?"),
        (["run", "run.yaml", "--set", "fragment_row=3"], 2, "did you mean fragment_rows?"),
        (["run", "run.yaml", "--set", "input.paths=[elsewhere]"], 1, "elsewhere: no such file or directory"),
        (["run", "run.yaml", "--set", "captioners.0.checkpoint.path=gone"], 1, "gone"),
        (["status", "nowhere"], 1, "nowhere"),
        (["status", "data"], 1, "data"),
        (["status", "a%20b"], 2, "a%20b: no % may be in it"),
        (["status", "options.yaml"], 1, "colour"),
        (["vacuum", "options.yaml"], 1, "colour"),
        (["vacuum", "typo"], 1, "typo"),
        (["vacuum", "typo", "--hours", "0.5"], 2, "Invalid value for '--hours'"),
        (["check", "run.yaml", "--set", "output=."], 1, "no input is left"),
        (["frobnicate"], 2, "No such command"),
        (["run"], 2, "Missing argument"),
    ],
)
def test_errors_are_one_line_and_a_code(spec: Path, arguments: list[str], code: int, message: str) -> None:
    (spec.parent / "options.yaml").write_text(spec.read_text() + "output_options: {colour: blue}\n")
    done = capfilt(*arguments, cwd=spec.parent)
    assert not (spec.parent / "typo").exists()
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_inputs_that_all_lie_in_the_output(spec: Path) -> None:
    for command in ("plan", "run"):
        done = capfilt(command, spec, "--set", "output=.")
        assert done.returncode == 0, done.stderr
        assert "nothing to do: no input is left" in done.stdout


def test_check_looks_for_hub_checkpoints_in_the_cache(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(spec.parent / "cache"))
    for role in ("captioner", "filter"):
        (spec.parent / f"{role}.yaml").write_text(
            f"role: {role}\nname: {role}\ncheckpoint: {{hub: o/{role}, revision: {'a' * 40}}}\nimage_size: 32\n"
        )
    snapshot = spec.parent / "cache" / "models--o--captioner" / "snapshots" / ("a" * 40)
    shutil.copytree(spec.parent / "models" / "captioner", snapshot)
    checked = capfilt("check", spec)
    assert checked.returncode == 0, checked.stderr
    assert f"captioner captioner: o/captioner at aaaaaaaaaaaa is in the cache: {snapshot}" in checked.stdout
    assert "filter filter: o/filter at aaaaaaaaaaaa is not in the cache: will be fetched" in checked.stdout
    (snapshot / "model.safetensors").unlink()
    assert "o/captioner at aaaaaaaaaaaa is in the cache in part" in capfilt("check", spec).stdout


def test_check_says_that_row_groups_are_large(tmp_path: Path) -> None:
    """Else training takes the memory of 8 parts of 5,000 images a reader, and says nothing."""
    table = pa.table({"jpg": pa.array([b"x"] * 40_000, pa.binary()), "caption": ["text"] * 40_000})
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=40_000)
    (tmp_path / "pretrain.yaml").write_text(
        "kind: pretrain\nname: p\ndata: [{pairs: {paths: 0.parquet}}]\noutput: out\narchitecture: base\n"
        f"tokenizer: {{path: {ROOT / 'models' / 'tiny' / 'tokenizer'}}}\nimage_size: 32\nbatch_size: 8\n"
    )
    checked = capfilt("check", tmp_path / "pretrain.yaml")
    assert checked.returncode == 0, checked.stderr
    assert f"in {tmp_path}/0.parquet 5,000. Rewrite" in checked.stdout
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=250)
    assert "row groups" not in capfilt("check", tmp_path / "pretrain.yaml").stdout


def test_check_looks_at_every_card(spec: Path) -> None:
    for role in ("captioner", "filter"):
        card = (spec.parent / f"{role}.yaml").read_text()
        (spec.parent / f"other-{role}.yaml").write_text(card.replace(f"name: {role}", f"name: other-{role}"))
    lists = (
        "--set",
        "captioners=[captioner.yaml, other-captioner.yaml]",
        "--set",
        "filters=[filter.yaml, other-filter.yaml]",
    )
    checked = capfilt("check", spec, *lists)
    assert checked.returncode == 0, checked.stderr
    for name in ("captioner captioner", "captioner other-captioner", "filter filter", "filter other-filter"):
        assert f"\n{name}: found in " in checked.stdout
    wrong = capfilt("check", spec, *lists, "--set", "filters.1.image_size=36")
    assert wrong.returncode == 2, wrong.stderr
    assert "other-filter: image_size 36 is not a multiple of the patch size 8" in wrong.stderr


def pickled(models: Path) -> None:
    (models / "captioner" / "model.safetensors").rename(models / "captioner" / "pytorch_model.bin")


def swapped(models: Path) -> None:
    (models / "filter").rename(models / "a")
    (models / "captioner").rename(models / "filter")
    (models / "a").rename(models / "captioner")


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize(
    ("harm", "override", "code", "message"),
    [
        (swapped, [], 1, "a captioner is a BlipForConditionalGeneration; this is a BlipForImageTextRetrieval"),
        (None, ["captioners.0.image_size=30"], 2, "captioner: image_size 30 is not a multiple of the patch size 8"),
        (None, ["filters.0.image_size=36"], 2, "filter: image_size 36 is not a multiple of the patch size 8"),
        (pickled, [], 1, "pytorch_model.bin: a pickle, which the card does not allow"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_found_before_ray_starts(
    spec: Path, command: str, harm: Callable[[Path], None] | None, override: list[str], code: int, message: str
) -> None:
    if harm:
        harm(spec.parent / "models")
    done = capfilt(command, spec, *(part for field in override for part in ("--set", field)))
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("capfilt: ")
    assert message in line
    assert done.stdout == ""
    assert not (spec.parent / "out").exists()


@pytest.fixture
def classifier(spec: Path) -> Path:
    """The folder of a classifier, whose weights no one looks at; the spec keeps out what is `nsfw` by it."""
    folder = spec.parent / "models" / "nsfw"
    folder.mkdir()
    config = {"architectures": ["ViTForImageClassification"], "id2label": {"0": "safe", "1": "nsfw"}}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "preprocessor_config.json"):
        (folder / name).write_text("{}")
    (spec.parent / "nsfw.yaml").write_text(
        "role: classifier\nname: guard\ncheckpoint: {path: models/nsfw}\nimage_size: 32\nlabels: [nsfw]\n"
    )
    spec.write_text(spec.read_text() + "keep_out: {classifier: nsfw.yaml}\n")
    return folder


def test_check_looks_at_the_classifier(spec: Path, classifier: Path) -> None:
    done = capfilt("check", spec)
    assert done.returncode == 0, done.stderr
    assert f"\nclassifier guard keeps out nsfw: found in {classifier}\n" in done.stdout


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize(
    ("harm", "override", "code", "message"),
    [
        (None, "labels=[porn]", 2, "keep_out.classifier.labels: guard has no label porn; it has safe, nsfw"),
        (None, "checkpoint.path=nowhere", 1, "nowhere: no such directory"),
        ({"config.json": "[]"}, "", 1, "keep_out.classifier: models/nsfw/config.json: not a model configuration"),
        ({"config.json": '{"architectures": ["ViTModel"]}'}, "", 1, "ForImageClassification; this is a ViTModel"),
        ({"model.safetensors": None, "pytorch_model.bin": ""}, "", 1, "keep_out.classifier: models/nsfw/pytorch_model"),
        ({"preprocessor_config.json": None}, "", 1, "preprocessor_config.json: no such file"),
    ],
)
def test_a_classifier_that_cannot_be_used_is_found_before_ray_starts(
    spec: Path,
    classifier: Path,
    command: str,
    harm: dict[str, str | None] | None,
    override: str,
    code: int,
    message: str,
) -> None:
    for name, content in (harm or {}).items():
        (classifier / name).unlink(missing_ok=True)
        if content is not None:
            (classifier / name).write_text(content)
    done = capfilt(command, spec, *(("--set", f"keep_out.classifier.{override}") if override else ()))
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert message in line.replace(f"{spec.parent}/", "")
    assert not (spec.parent / "out").exists()


def test_check_loads_neither_torch_nor_ray(spec: Path) -> None:
    loaded = "sorted({'torch', 'transformers', 'ray'} & set(sys.modules))"
    code = (
        f"import sys, atexit; atexit.register(lambda: print('loaded:', {loaded}))\nfrom capfilt.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "check", str(spec)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "a valid curate spec" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_a_mistyped_input_leaves_nothing_at_the_output(spec: Path) -> None:
    done = capfilt("run", spec, "--set", "input.paths=[elsewhere]")
    assert done.returncode == 1, done.stderr
    assert "elsewhere: no such file or directory" in done.stderr
    assert not (spec.parent / "out").exists()


def test_what_a_worker_finds_wrong_with_the_spec_is_said_as_such(spec: Path) -> None:
    done = capfilt("run", spec, "--set", "filters.0.max_tokens=512")
    assert done.returncode == 2, done.stderr
    assert "\ncapfilt: filter filter: filter.max_tokens: 512 tokens, but " in f"\n{done.stderr}"
    for elsewhere in ("00000-", "Traceback", "what Ray had to say"):  # no fragment's, worker's or Ray's doing
        assert elsewhere not in done.stderr


def test_an_output_that_a_worker_cannot_write_names_the_place(spec: Path) -> None:
    receipts = spec.parent / "out" / "_runs" / "receipts"
    receipts.parent.mkdir(parents=True)
    receipts.write_text("a file where a directory must be")
    done = capfilt("run", spec)
    assert done.returncode == 1
    line = r"^capfilt: .*/out.* cannot be written: (FileExists|NotADirectory)Error: .*run again to resume$"
    assert re.search(line, done.stderr, re.M), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "line", "hint"),
    [
        (
            "OSError(28, 'No space left on device', '/out')",
            "capfilt: OSError: [Errno 28] No space left on device: '/out'",
            "what was finished is kept; free some room there and run again to resume",
        ),
        (
            "deltalake.exceptions.DeltaError('the\\n\\x1b[31mstore')",
            "capfilt: DeltaError: the store",
            "what was finished is kept; mend this and run again to resume",
        ),
        (
            "MemoryError('40 GiB')",
            "capfilt: MemoryError: 40 GiB",
            "there is not enough memory; what was finished is kept: take fewer actors, a smaller batch_size or "
            "fragment_rows, or a machine with more, and run again to resume",
        ),
        ("KeyError('a bug')", None, None),
    ],
)
def test_what_a_disk_or_a_store_raises_is_one_line(error: str, line: str | None, hint: str | None) -> None:
    imports = "import deltalake.exceptions\nfrom capfilt.cli import app, main"
    code = f"{imports}\n@app.command()\ndef fail():\n    raise {error}"
    command = [sys.executable, "-c", f"{code}\nmain()", "fail"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    if line is None:
        assert "Traceback" in done.stderr
    else:
        assert done.stderr.splitlines() == [line, hint]


def test_a_log_in_json_says_what_to_do_too() -> None:
    code = (
        "from capfilt.cli import app, main\n@app.command()\ndef fail():\n    raise OSError(28, 'No space left', '/out')"
    )
    command = [sys.executable, "-c", f"{code}\nmain()", "fail"]
    environment = {**os.environ, "CAPFILT_LOG_FORMAT": "json"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 1
    (event,) = map(json.loads, done.stderr.splitlines())
    assert event["hint"] == "what was finished is kept; free some room there and run again to resume"


def test_demo(spec: Path) -> None:
    (spec.parent / "web").mkdir()
    spec.write_text(spec.read_text().replace("data", "web/shards") + "max_error_fraction: 1\n")
    first = capfilt("demo", spec, "--images", "24")
    assert first.returncode == 0, first.stderr
    assert "rendering 24 images" in first.stdout
    assert "in 6 shards" in first.stdout
    for part in ("noise: texts that are not true", "web texts by what they are", "the filter's verdicts", "some rows"):
        assert part in first.stdout
    again = capfilt("demo", spec)
    assert again.returncode == 0, again.stderr
    assert "nothing to do: 6 shards up to date" in again.stdout
    assert "6 shards, 24 rows" in again.stdout
    assert f"dataset: {spec.parent}/out/pairs" in again.stdout
    other = capfilt("demo", spec, "--images", "30")
    assert other.returncode == 1
    assert "holds 24 images, not 30; delete it" in other.stderr


def test_tiny_models_are_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "filter").mkdir()
    (tmp_path / "filter" / "model.safetensors.index.json").write_text("of another model")
    pair = write_tiny_pair(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(pair)
    for directory in pair:
        assert {file.name for file in checkpoint_files(directory)} >= {"config.json", "model.safetensors", "vocab.txt"}
        assert not (directory / "model.safetensors.index.json").exists()


def test_a_sick_run_exits_3(spec: Path) -> None:
    write_shard(spec.parent / "data" / "00009.parquet", [b"garbage"] * 60)
    done = capfilt("run", spec)
    assert done.returncode == 3, done.stderr
    assert "max_error_fraction" in done.stderr
    assert "in 2 shards" in done.stdout  # what was good, before the error
    assert "Traceback" not in done.stderr


def test_an_actor_that_does_not_fit_is_refused_at_once(spec: Path) -> None:
    done = capfilt("run", spec, "--set", "captioners.0.placement={gpus: 1}")
    assert done.returncode == 1
    assert "an actor needs 1 GPU and this machine has 0; lower captioners.0.placement.gpus, or join" in done.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_keeps_what_is_finished(spec: Path, name: str) -> None:
    """To the whole process group, as a terminal sends it."""
    for s in range(2, 12):
        write_shard(spec.parent / "data" / f"{s:05d}.parquet", [jpeg(100 * s + i) for i in range(60)])
    process = subprocess.Popen(
        [*CAPFILT, "run", str(spec)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    receipts = spec.parent / "out" / "_runs" / "receipts"
    deadline = time.monotonic() + 120
    while not list(receipts.rglob("*.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "stopping, which may take some seconds" in errors
    assert "Run the same command again to resume" in errors
    assert "Traceback" not in errors
    (record,) = CuratedDataset.for_reading(str(spec.parent / "out"), {}).runs()
    assert record.outcome == "interrupted"
    done = capfilt("run", spec)
    assert done.returncode == 0, done.stderr
    assert "taken over from an interrupted run" in done.stdout or "up to date" in done.stdout
    assert [row["row"] for row in read(str(spec.parent / "out"))] == list(range(60)) * 12


def test_the_wheel_holds_one_package(tmp_path: Path) -> None:
    """`models` and `pipelines` at the top would be shadowed by, or shadow, a user's own folders on Ray's workers."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, ROOT]
    done = subprocess.run([str(part) for part in build], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"capfilt"}


def test_ray_ships_every_card_and_spec() -> None:
    """Ray leaves out of a job's working directory what .gitignore names; a bare `models/` would lose the cards."""
    lines = (ROOT / ".gitignore").read_text().split()
    assert "/runs/" in lines
    assert not any("models" in line or "pipelines" in line for line in lines)
