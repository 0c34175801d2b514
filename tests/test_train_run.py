"""Whole training runs on Ray: what they end as, that they resume to the same step, and how they refuse."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray.data
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from capfilt.errors import CapfiltError, ConflictError, SpecError, TrainingError
from capfilt.models import checkpoints
from capfilt.models.tiny import write_tiny_pair
from capfilt.pipelines.run_files import States, only_one, read_log
from capfilt.pipelines.session import lacking
from capfilt.pipelines.train import _check_capacity, _end, train
from capfilt.pipelines.training_progress import TrainingDisplay
from capfilt.spec import TrainSpec, load_card, load_spec
from capfilt.toyweb import render_clean

ARCHITECTURE = {
    "vision": {"width": 32, "depth": 1, "heads": 2, "mlp": 64, "patch": 8},
    "text": {"width": 32, "depth": 1, "heads": 2, "mlp": 64, "positions": 32},
    "joint": 16,
}
COMMON: dict[str, Any] = {
    "name": "small",
    "image_size": 32,
    "max_tokens": 20,
    "batch_size": 8,
    "optimiser": {"lr": 1e-3, "warmup_steps": 2, "schedule": "cosine"},
    "data": [{"pairs": {"paths": "pairs/shards"}}],
}
PRETRAIN = {
    **COMMON,
    "kind": "pretrain",
    "architecture": ARCHITECTURE,
    "tokenizer": {"path": "tiny/captioner"},
    "contrast": {"queue": 32},
    "steps": 20,
    "state_steps": 5,
    "output": "run",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:  # noqa: ARG001  for all runs here
    """Pairs in many small files, and tiny checkpoints."""
    directory = tmp_path_factory.mktemp("train")
    render_clean(directory / "pairs", images=96, shards=32, pixels=(32, 40))
    write_tiny_pair(directory / "tiny")
    return directory


def spec_in(home: Path, content: dict[str, Any], **changes: Any) -> TrainSpec:
    file = home / f"{changes.get('output') or content['output']}.yaml"
    file.write_text(yaml.safe_dump({**content, **changes}))
    spec = load_spec(file)
    assert isinstance(spec, TrainSpec)
    return spec


def curve(output: str) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    return [{name: value for name, value in line.items() if name != "samples_per_s"} for line in read_log(Path(output))]


@pytest.fixture(scope="module")
def pretrained(home: Path) -> TrainSpec:
    spec = spec_in(home, PRETRAIN, output="whole")
    summary = train(spec)
    assert (summary.steps, summary.rows, summary.resumed_at) == (20, 96, 0)
    return spec


def test_pretraining_ends_as_a_captioner_and_a_filter(pretrained: TrainSpec) -> None:
    output = Path(pretrained.output)
    kinds = {"captioner": BlipForConditionalGeneration, "filter": BlipForImageTextRetrieval}
    for role, kind in kinds.items():
        card = load_card(output / f"{role}.yaml")
        assert (card.role, card.name, card.image_size) == (role, f"small-{role}", 32)
        ours = checkpoints.load(card, "cpu").model.state_dict()
        theirs, info = kind.from_pretrained(output / role, output_loading_info=True)
        assert not any(info.values()), info
        state = theirs.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in ours.items())
    assert yaml.safe_load((output / "filter.yaml").read_text())["first_token"] == "[ENC]"
    assert not (output / "state").exists()
    assert list((output / "tensorboard").glob("events.*"))


def test_every_step_is_on_record(pretrained: TrainSpec) -> None:
    lines = read_log(Path(pretrained.output))
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert {"itc", "itm", "lm", "temperature", "alpha", "learning_rate", "samples_per_s"} <= set(lines[0])
    assert [line["epoch"] for line in lines] == [0] * 12 + [1] * 8  # 96 rows are 12 steps
    record = json.loads((Path(pretrained.output) / "run.json").read_text())
    assert (record["rows"], record["steps_per_epoch"], record["total"]) == (96, 12, 20)


def test_a_run_that_is_done_is_left_alone(pretrained: TrainSpec) -> None:
    before = (Path(pretrained.output) / "captioner" / "model.safetensors").stat().st_mtime_ns
    summary = train(pretrained)
    assert summary.last["step"] == 20
    assert (Path(pretrained.output) / "captioner" / "model.safetensors").stat().st_mtime_ns == before


def test_workers_that_end_without_a_card_are_not_done(home: Path, pretrained: TrainSpec) -> None:
    """As where rank 0 wrote on a disk of its own: what the driver's disk has of the run stays."""
    output = home / "not-shared"
    shutil.copytree(pretrained.output, output)
    (output / "filter.yaml").unlink()
    spec = spec_in(home, PRETRAIN, output="not-shared")
    states = States(output)
    states.write(5, {})
    with pytest.raises(TrainingError, match=r"not-shared/filter\.yaml: no such file.* that all workers share"):
        _end(spec, states)
    assert states.newest() == 5
    shutil.copy(Path(pretrained.output) / "filter.yaml", output)
    _end(spec, states)
    assert states.newest() is None


def start(spec_file: Path, **environment: str) -> subprocess.Popen[bytes]:
    code = "import sys, capfilt; capfilt.run(capfilt.load_spec(sys.argv[1]))"
    return subprocess.Popen([sys.executable, "-c", code, str(spec_file)], env={**os.environ, **environment})


def wait_for_step(output: str, step: int, process: subprocess.Popen[bytes], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if any(line["step"] >= step for line in read_log(Path(output))):
            return
        time.sleep(0.01)
    raise AssertionError(f"the run never came to step {step}")


def test_a_killed_driver_resumes_to_the_same_curve(home: Path, pretrained: TrainSpec) -> None:
    spec = spec_in(home, PRETRAIN, output="killed")
    with start(home / "killed.yaml") as process:
        wait_for_step(spec.output, 7, process)
        process.send_signal(signal.SIGKILL)
    assert States(Path(spec.output)).newest() is not None
    summary = train(spec)
    assert summary.resumed_at in (5, 10, 15)
    assert curve(spec.output) == curve(pretrained.output)
    for role in ("captioner", "filter"):
        ours, theirs = (load_file(Path(s.output) / role / "model.safetensors") for s in (spec, pretrained))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def two_workers(home: Path, output: str) -> TrainSpec:
    workers = {"count": 2, "cpus": 0.5}
    return spec_in(home, PRETRAIN, output=output, workers=workers, batch_size=4, state_steps=4)


@pytest.fixture(scope="module")
def by_two(home: Path) -> TrainSpec:
    spec = two_workers(home, "two")
    train(spec)
    return spec


def test_two_workers_train_one_model(by_two: TrainSpec) -> None:
    lines = curve(by_two.output)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1]["lm"] < lines[0]["lm"]
    assert load_card(Path(by_two.output) / "filter.yaml").max_tokens == 20
    assert not (Path(by_two.output) / "ray").exists()


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_curve_is_the_same(home: Path, by_two: TrainSpec) -> None:
    spec = two_workers(home, "worker-killed")
    with start(home / "worker-killed.yaml") as process:
        wait_for_step(spec.output, 6, process)
        family = psutil.Process(process.pid).children(recursive=True)
        victim = next(one for one in family if "TrainWorker" in " ".join(one.cmdline()))
        victim.send_signal(signal.SIGKILL)
        assert process.wait(300) == 0
    assert curve(spec.output) == curve(by_two.output)


@pytest.mark.usefixtures("pretrained")
def test_captioner_and_filter_are_fine_tuned_apart(home: Path) -> None:
    captioner = {**COMMON, "kind": "finetune-captioner", "steps": 3, "start": "whole/captioner.yaml"}
    spec = spec_in(home, captioner, output="captioner", prompt="a picture of ")
    assert set(train(spec).cards) == {"captioner"}
    card = load_card(Path(spec.output) / "captioner.yaml")
    assert card.role == "captioner"
    assert card.prompt == "a picture of "
    judge = {**COMMON, "kind": "finetune-filter", "steps": 3, "start": "whole/filter.yaml"}
    spec = spec_in(home, judge, output="filter", contrast={"queue": 16, "by_image": True})
    assert set(train(spec).last) >= {"itc", "itm", "temperature"}
    before, after = (load_file(p / "filter" / "model.safetensors") for p in (home / "whole", Path(spec.output)))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("pretrained")
def test_a_group_is_one_block_however_large(home: Path) -> None:
    """Ray Data cuts what a task gives back at its target size; a group's rows must stay together."""
    context = ray.data.DataContext.get_current()
    before, context.target_max_block_size = context.target_max_block_size, 1_000
    try:
        train(spec_in(home, PRETRAIN, output="cut", steps=1))
    finally:
        context.target_max_block_size = before


def test_large_row_groups_are_pointed_out(home: Path) -> None:
    row = pq.read_table(home / "pairs" / "shards" / "00000.parquet").slice(0, 1)
    (home / "large").mkdir()
    pq.write_table(row.take([0] * 40_000), home / "large" / "0.parquet", row_group_size=40_000)
    said = io.StringIO()
    spec = spec_in(home, PRETRAIN, output="large-groups", data=[{"pairs": {"paths": "large"}}], max_tokens=400)
    with pytest.raises(SpecError, match="max_tokens"):  # before a row is read
        train(spec, console=Console(file=said))
    assert "capfilt: data: 8 of 8 parts have more than 4,000 rows" in said.getvalue()


def test_what_a_person_turns_when_training_diverges_may_change(home: Path) -> None:
    spec = spec_in(home, PRETRAIN, output="turned", steps=2)
    train(spec)
    for role in ("captioner", "filter"):  # as if it had not ended
        (Path(spec.output) / f"{role}.yaml").unlink()
    optimiser = {**COMMON["optimiser"], "lr": 1e-4, "clip_norm": 1.0}
    train(spec_in(home, PRETRAIN, output="turned", steps=2, optimiser=optimiser, checkpointing=True))
    record = json.loads((Path(spec.output) / "run.json").read_text())
    assert [(was["after_step"], was["optimiser"]["lr"]) for was in record["optimisers"]] == [(0, 1e-3), (0, 1e-4)]


def test_fine_tuning_at_another_size_writes_that_size(home: Path, pretrained: TrainSpec) -> None:
    assert pretrained.image_size == 32
    captioner = {**COMMON, "kind": "finetune-captioner", "steps": 1, "start": "whole/captioner.yaml", "image_size": 48}
    spec = spec_in(home, captioner, output="larger", dropout=0.3, drop_path=0.1)
    train(spec)
    output = Path(spec.output)
    assert json.loads((output / "captioner" / "preprocessor_config.json").read_text())["size"]["height"] == 48
    assert load_file(output / "captioner" / "model.safetensors")[
        "vision_model.embeddings.position_embedding"
    ].shape == (1, 37, 32)
    card = load_card(output / "captioner.yaml")
    assert (card.image_size, card.licence) == (48, "unknown")
    checkpoints.load(card, "cpu")


def test_progress_shows_each_step_once_though_the_log_is_begun_anew(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    display = TrainingDisplay(console, tmp_path, begun=3, total=9)
    log = tmp_path / "metrics.jsonl"

    def write(steps: range) -> None:
        staged = tmp_path / "staged"
        staged.write_text("".join(json.dumps({"step": step, "lm": 1.0, "samples_per_s": 5}) + "\n" for step in steps))
        staged.replace(log)

    def shown() -> list[int]:
        return [line["step"] for line in display.news()]

    write(range(1, 6))
    assert shown() == [4, 5]
    with log.open("a") as file:
        file.write('{"step": 6, "lm"')  # cut short
    assert shown() == []
    write(range(1, 9))  # workers that began anew at an earlier state
    assert shown() == [6, 7, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 21}, "has another steps"),
        ({"optimiser": {"accumulate": 2}}, "has another optimiser"),
        ({"data": [{"pairs": {"paths": "pairs/shards/00000.parquet"}}], "batch_size": 2}, "has another data"),
    ],
)
def test_another_run_in_the_output_is_refused(home: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        train(spec_in(home, {**PRETRAIN, **changes}, output="whole"))


def test_data_that_changed_since_the_run_began_are_refused(home: Path) -> None:
    render_clean(home / "moving", images=16, pixels=(32, 40))
    changes = {"data": [{"pairs": {"paths": "moving/shards"}}], "steps": 1, "output": "moved"}
    train(spec_in(home, PRETRAIN, **changes))
    (home / "moving" / "shards" / "00000.parquet").rename(home / "moving" / "shards" / "00001.parquet")
    with pytest.raises(TrainingError, match="the data changed since the run began"):
        train(spec_in(home, PRETRAIN, **changes))


def test_a_loss_that_is_not_a_number_ends_the_run_in_words(home: Path) -> None:
    write_tiny_pair(home / "sick")
    file = home / "sick" / "filter" / "model.safetensors"
    weights = load_file(file)
    weights["itm_head.weight"][:] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    card = {"role": "filter", "name": "sick", "checkpoint": {"path": "sick/filter"}, "image_size": 32}
    judge = {**COMMON, "kind": "finetune-filter", "steps": 3, "start": card, "contrast": {"queue": 16}}
    with pytest.raises(TrainingError, match=r"step 1: itm is nan\. Training has diverged: lower optimiser\.lr"):
        train(spec_in(home, judge, output="diverged"))


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ({"count": 3}, r"workers\.count x workers\.cpus is 3 x 1 CPU and this machine has 2; lower .* ray\.num_cpus"),
        ({"count": 2, "gpus": 1}, r"workers\.gpus is 2 x 1 GPU and this machine has 0; lower workers\.count or"),
    ],
)
def test_workers_that_do_not_fit_this_machine_are_refused(home: Path, workers: dict[str, Any], message: str) -> None:
    with pytest.raises(CapfiltError, match=message):
        train(spec_in(home, PRETRAIN, output=f"too-many-{workers['count']}", workers=workers))


def test_workers_that_do_not_fit_a_cluster_yet_are_said_to_wait(home: Path) -> None:
    said = io.StringIO()
    spec = spec_in(home, PRETRAIN, output="waiting", workers={"count": 3}, ray={"address": "auto"})
    _check_capacity(spec, Console(file=said))
    waits = r"workers\.count x workers\.cpus is 3 x 1 CPU and the cluster has [\d.]+ free; the run waits .+"
    assert re.fullmatch(f"capfilt: {waits}\n", said.getvalue())


def test_what_a_ray_has_less_of_than_is_needed() -> None:
    assert lacking({"CPU": 2.0}, gpus=0, cpus=2) == {}
    assert lacking({"CPU": 2.0}, gpus=1, cpus=2) == {"gpus": 0}
    assert lacking({"CPU": 2.0, "GPU": 1.0}, gpus=1, cpus=2.5) == {"cpus": 2}


@pytest.mark.slow
@pytest.mark.parametrize("retries", [0, 3])
def test_what_a_worker_refuses_is_heard_once(home: Path, retries: int) -> None:
    """An error of ours is not retried, and comes out as itself."""
    workers = {"count": 2, "cpus": 0.5, "retries": retries}
    spec = spec_in(home, PRETRAIN, output=f"refused-{retries}", workers=workers, max_tokens=400)
    begin = time.monotonic()
    with pytest.raises(SpecError, match="max_tokens: 400, but the network has 32 positions"):
        train(spec)
    assert time.monotonic() - begin < 120


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 100}, TrainingError, "96 rows make no step of 100"),
        ({"max_tokens": 400}, SpecError, "max_tokens: 400, but the network has 32 positions"),
        ({"image_size": 30}, SpecError, "image_size: 30 is not a multiple"),
    ],
)
def test_what_does_not_fit_is_refused(
    home: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    output = f"refused-{next(iter(changes))}"
    with pytest.raises(error, match=message):
        train(spec_in(home, {**PRETRAIN, **changes}, output=output))


@pytest.mark.usefixtures("pretrained")
def test_a_prompt_that_leaves_no_room_is_refused(home: Path) -> None:
    captioner = {**COMMON, "kind": "finetune-captioner", "steps": 1, "start": "whole/captioner.yaml", "max_tokens": 5}
    with pytest.raises(SpecError, match="leave no room for a text after the prompt's 3"):
        train(spec_in(home, captioner, output="no-room"))


def test_a_second_run_in_the_same_output_is_refused(pretrained: TrainSpec) -> None:
    with only_one(Path(pretrained.output)), pytest.raises(ConflictError, match="another run is at work there"):
        train(pretrained)
