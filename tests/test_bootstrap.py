"""Bootstrapping: which stages there are, what they depend on, and a whole small run, killed and undisturbed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from curated_web import curate_web, make_web
from rich.console import Console
from typer.testing import CliRunner

from capfilt.cli import app
from capfilt.errors import CapfiltError, SpecError, TrainingError
from capfilt.models.tiny import write_tiny_pair
from capfilt.pipelines.bootstrap import bootstrap, plan_stages
from capfilt.pipelines.stages import Stage, StageError, _Running, run_stages, to_begin
from capfilt.spec import BootstrapSpec, CurateSpec, EvaluateSpec, Input, ThresholdsOverride, Truth, load_spec
from capfilt.toyweb import render, render_clean

TRAINING: dict[str, Any] = {
    "image_size": 32,
    "max_tokens": 16,
    "batch_size": 16,
    "steps": 6,
    "augment": None,
    "state_steps": 2,
    "optimiser": {"lr": 1e-3, "warmup_steps": 1, "schedule": "cosine"},
}
SPEC: dict[str, Any] = {
    "kind": "bootstrap",
    "name": "small",
    "web": {"paths": "web/shards"},
    "human": {"paths": "human/shards"},
    "output": "out",
    "pretrain": {
        **TRAINING,
        "architecture": {
            "vision": {"width": 32, "depth": 1, "heads": 2, "mlp": 64, "patch": 8},
            "text": {"width": 32, "depth": 1, "heads": 2, "mlp": 64, "positions": 32},
            "joint": 16,
        },
        "tokenizer": {"path": "tiny/captioner"},
        "contrast": {"queue": 32},
    },
    "captioner": {**TRAINING, "prompt": ""},
    "filter": {**TRAINING, "contrast": {"queue": 32, "by_image": True}},
    "curate": {
        "sampling": {"min_tokens": 1, "max_tokens": 8},
        "thresholds": {"web": 0.0, "synthetic": 0.0},
        "fragment_rows": 40,
        "max_error_fraction": 0.2,
    },
    "evaluate": {
        "pairs": {"paths": "test/shards"},
        "truth": {"toyweb": "test"},
        "retrieval": {"k_test": 4},
        "captioning": {"beams": 1, "max_tokens": 8},
    },
    "truth": {"toyweb": "web"},
    "parallel": 2,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bootstrap")
    render(directory / "web", images=120, shards=2, pixels=(32, 40))
    render_clean(directory / "human", images=64, pixels=(32, 40), seed=1)
    render_clean(directory / "test", images=24, pixels=(32, 40), seed=2)
    write_tiny_pair(directory / "tiny")
    return directory


def spec_in(home: Path, name: str, **changes: Any) -> BootstrapSpec:
    (home / f"{name}.yaml").write_text(yaml.safe_dump({**SPEC, "output": name} | changes))
    spec = load_spec(home / f"{name}.yaml")
    assert isinstance(spec, BootstrapSpec)
    return spec


def test_stages_of_two_rounds_with_the_ablation(home: Path) -> None:
    spec = spec_in(home, "planned", rounds=2, ablation=True)
    stages = {stage.name: set(stage.needs) for stage in plan_stages(spec)}
    assert stages == {
        "round-0/model": set(),
        "round-0/evaluation": {"round-0/model"},
        "round-1/captioner": {"round-0/model"},
        "round-1/filter": {"round-0/model"},
        "round-1/curated": {"round-1/captioner", "round-1/filter"},
        "round-1/model": {"round-1/curated"},
        "round-1/evaluation": {"round-1/model", "round-1/curated"},
        "round-2/captioner": {"round-1/model"},
        "round-2/filter": {"round-1/model"},
        "round-2/curated": {"round-2/captioner", "round-2/filter"},
        "round-2/model": {"round-2/curated"},
        "round-2/evaluation": {"round-2/model", "round-2/curated"},
        "round-1/model-F": {"round-1/curated"},
        "round-1/evaluation-F": {"round-1/model-F"},
        "round-1/unfiltered": {"round-1/captioner", "round-1/filter"},
        "round-1/model-C": {"round-1/unfiltered"},
        "round-1/evaluation-C": {"round-1/model-C"},
    }


def test_a_rounds_report_is_against_the_round_before(home: Path) -> None:
    """The stage of a round names its captioner, and its output, anew: the run itself knows of nothing before it."""
    spec = spec_in(home, "compared", rounds=3, ablation=True)
    output = Path(spec.output)
    for number in (1, 2, 3):
        for role in ("captioner", "filter"):
            card = {"role": role, "name": f"{role}-{number}", "checkpoint": {"path": str(home / "tiny" / role)}}
            folder = output / f"round-{number}" / role
            folder.mkdir(parents=True)
            (folder / f"{role}.yaml").write_text(yaml.safe_dump({**card, "image_size": 32}))
    made = {stage.name: stage.make() for stage in plan_stages(spec) if stage.name.endswith(("curated", "unfiltered"))}
    assert {name: stage.report_against for name, stage in made.items() if isinstance(stage, CurateSpec)} == {
        "round-1/curated": None,
        "round-1/unfiltered": None,
        "round-2/curated": str(output / "round-1" / "curated"),
        "round-3/curated": str(output / "round-2" / "curated"),
    }
    assert all(stage.report for stage in made.values() if isinstance(stage, CurateSpec))


def test_the_alarms_of_every_round_are_said(home: Path) -> None:
    """All stages are done; of the second round's texts none is kept."""
    spec = spec_in(home, "alarming", rounds=2)
    output, told = Path(spec.output), io.StringIO()
    for stage in plan_stages(spec):
        (output / "stages" / stage.name).parent.mkdir(parents=True, exist_ok=True)
        (output / "stages" / f"{stage.name}.json").write_text('{"seconds": 1}')
        (output / stage.name).mkdir(parents=True)
        (output / stage.name / "evaluation.json").write_text("{}")
    make_web(home / "pictures")
    for number, least in ((1, 0.0), (2, 1.0)):
        thresholds = ThresholdsOverride(web=least, synthetic=least)
        curated = str(output / f"round-{number}" / "curated")
        _, summary = curate_web(home / "pictures", output=curated, thresholds=thresholds)
    assert summary.alarms == ["Nothing is kept. No text of any row reaches its threshold."]
    bootstrap(spec, console=Console(file=told, width=500))
    assert [line for line in told.getvalue().splitlines() if "curated: " in line] == [
        f"capfilt: round-2/curated: {summary.alarms[0]}"
    ]


def test_settings_are_compared_at_equal_steps_only(home: Path) -> None:
    pretrain = {name: value for name, value in SPEC["pretrain"].items() if name != "steps"}
    with pytest.raises(SpecError, match=r"compared at equal steps; give pretrain\.steps"):
        spec_in(home, "unequal", ablation=True, pretrain=pretrain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": {}}, "evaluate: give pairs to measure each model with"),
        ({"workers": {"gpus": 1}}, "parallel: stages would meet on one GPU"),
        ({"output": "out%20"}, "no % may be in it"),
    ],
)
def test_what_would_fail_only_days_later_is_refused_at_once(home: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_in(home, "late", **changes)


MISTYPED = pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truth": {"toyweb": "wbe"}}, "wbe is not a rendered toy web"),
        ({"evaluate": {**SPEC["evaluate"], "truth": {"toyweb": "tset"}}}, "tset is not a rendered toy web"),
        ({"evaluate": {**SPEC["evaluate"], "pairs": {"paths": "tset"}}}, "tset: no such file or directory"),
        (
            {"pretrain": {**SPEC["pretrain"], "tokenizer": {"path": "tniy"}}},
            "tokenizer: .*tniy: neither tokenizer.json",
        ),
        (
            {"pretrain": {**SPEC["pretrain"], "initial": {"vision": {"path": "vit"}}}},
            r"initial\.vision: .*vit: no such directory",
        ),
    ],
)


@MISTYPED
def test_what_is_mistyped_is_found_before_the_first_stage(home: Path, changes: dict[str, Any], message: str) -> None:
    spec = spec_in(home, "mistyped", **changes)
    with pytest.raises(CapfiltError, match=message):
        bootstrap(spec, console=Console(quiet=True))
    assert not (Path(spec.output) / "run.json").exists()


@MISTYPED
def test_check_finds_what_is_mistyped(home: Path, changes: dict[str, Any], message: str) -> None:
    spec_in(home, "mistyped", **changes)
    done = CliRunner().invoke(app, ["check", str(home / "mistyped.yaml")])
    assert isinstance(done.exception, CapfiltError)
    assert re.search(message, str(done.exception))
    assert done.stdout == ""


def test_check_loads_neither_torch_nor_ray(home: Path) -> None:
    """And says where all is that a bootstrap, and a pretraining and an evaluation of its own, start from."""
    spec_in(home, "checked")
    pretrain = {**SPEC["pretrain"], "kind": "pretrain", "name": "alone", "output": "alone"}
    (home / "pretrain.yaml").write_text(yaml.safe_dump({**pretrain, "data": [{"pairs": SPEC["human"]}]}))
    asked = evaluation(home, "measured", truth=Truth(toyweb=str(home / "test")))()
    (home / "evaluate.yaml").write_text(yaml.safe_dump(asked.model_dump(mode="json")))
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from capfilt.cli import app\n"
        "for spec in sys.argv[1:]:\n"
        "    print(CliRunner().invoke(app, ['check', spec], catch_exceptions=False).stdout)\n"
        "print('loaded:', sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))\n"
    )
    specs = [str(home / f"{name}.yaml") for name in ("checked", "pretrain", "evaluate")]
    done = subprocess.run([sys.executable, "-c", code, *specs], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"
    assert done.stdout.count(f"\ntokenizer: found in {home / 'tiny' / 'captioner'}\n") == 2
    assert done.stdout.count(f"\ntruth: read from {home / 'test'}\n") == 2
    assert done.stdout.count(f"\ntruth: read from {home / 'web'}\n") == 1


def metrics(output: str) -> list[dict[str, Any]]:
    """Everything in the tables but what a clock or a file name says."""
    found = json.loads((Path(output) / "bootstrap.json").read_text())["results"]
    for result in found:
        for name in ("seconds", "spec"):
            del result["evaluation"][name]
        for quality in result["evaluation"]["quality"]:
            del quality["dataset"], quality["version"]
    assert isinstance(found, list)
    return found


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> BootstrapSpec:
    spec = spec_in(home, "out")
    summary = bootstrap(spec, console=Console(quiet=True))
    assert [(result.round, result.setting) for result in summary.results] == [(0, "none"), (1, "C+F")]
    return spec


def test_a_round(undisturbed: BootstrapSpec) -> None:
    output = Path(undisturbed.output)
    none, both = metrics(undisturbed.output)
    for result in (none, both):
        assert result["evaluation"]["retrieval"]["images"] == 24
        assert result["evaluation"]["captioning"]["judged"] == 24
    (quality,) = both["evaluation"]["quality"]
    assert {"web", "synthetic"} == set(quality["sources"])
    assert quality["noise_before"] == quality["noise_after"]  # thresholds of 0 keep all
    record = json.loads((output / "round-1" / "model" / "run.json").read_text())
    assert list(record["versions"]) == [str(output / "round-1" / "curated")]
    spec = load_spec(output / "stages" / "round-1" / "evaluation.yaml")
    assert isinstance(spec, EvaluateSpec)


def test_what_is_done_is_not_done_again(undisturbed: BootstrapSpec) -> None:
    before = metrics(undisturbed.output)
    begin = time.monotonic()
    bootstrap(undisturbed, console=Console(quiet=True))
    assert time.monotonic() - begin < 5
    assert metrics(undisturbed.output) == before


def test_another_run_in_the_output_is_refused(home: Path, undisturbed: BootstrapSpec) -> None:
    assert undisturbed.rounds == 1
    with pytest.raises(TrainingError, match="has another rounds"):
        bootstrap(spec_in(home, "out", rounds=2))


class Impatient(io.StringIO):
    """A terminal where Ctrl-C is pressed at the first line."""

    def write(self, line: str) -> int:
        raise KeyboardInterrupt(line)


def test_an_output_that_was_moved_is_refused(home: Path) -> None:
    """Its stages would be other runs than those that have begun, which say where their data and checkpoints are."""
    begun = spec_in(home, "begun")
    with pytest.raises(KeyboardInterrupt):
        bootstrap(begun, console=Console(file=Impatient()))
    assert (Path(begun.output) / "stages" / "round-0" / "model.log").exists()
    Path(begun.output).rename(home / "moved")
    with pytest.raises(TrainingError, match=f"begun in {begun.output}, and its stages name files there; move it back"):
        bootstrap(spec_in(home, "moved"), console=Console(file=Impatient()))


def at_work(driver: psutil.Process) -> set[str]:
    """The stages that a driver runs at this moment."""
    found = set()
    for child in driver.children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "capfilt.stage" in (command := child.cmdline()):
                found.add(re.sub(r".*/stages/(.*)\.yaml", r"\1", command[-1]))
    return found


KILLS = 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_kills_change_nothing(home: Path) -> None:
    """SIGKILL of the driver while stages run, at seeded moments of as many stages as there are kills; stages end with
    it, and the last attempt ends with the same table."""
    whole = bootstrap(spec_in(home, "whole", ablation=True), console=Console(quiet=True))
    spec = spec_in(home, "killed", ablation=True)
    stages = [stage.name for stage in plan_stages(spec)]
    code = "import sys, capfilt; capfilt.run(capfilt.load_spec(sys.argv[1]))"
    rng, hits = random.Random(7), dict.fromkeys(stages, 0)
    for kill in range(KILLS):
        left = [stage for stage in stages if not (Path(spec.output) / "stages" / f"{stage}.json").exists()]
        aim = min(left, key=hits.__getitem__)  # the first that was hit least
        hits[aim] += 1
        with subprocess.Popen([sys.executable, "-c", code, str(home / "killed.yaml")]) as run:
            driver = psutil.Process(run.pid)
            while run.poll() is None and aim not in at_work(driver):
                time.sleep(0.05)
            end = time.monotonic() + rng.uniform(0, 0.9) * whole.seconds[aim]
            while run.poll() is None and not (time.monotonic() > end and at_work(driver)):
                time.sleep(0.05)
            assert run.poll() is None, f"the run ended by itself after {kill} kills; make it longer"
            run.send_signal(signal.SIGKILL)
        assert run.returncode == -signal.SIGKILL
    bootstrap(spec, console=Console(quiet=True))
    found = metrics(spec.output)
    assert [(result["round"], result["setting"]) for result in found] == [(0, "none"), (1, "C+F"), (1, "F"), (1, "C")]
    assert found == metrics(whole.output)


# --- the runner of stages ---


def evaluation(home: Path, name: str, **fields: Any) -> Any:
    """A stage that measures nothing but a data set that is not there, or one that is."""
    card = {
        "role": "captioner",
        "name": "x",
        "checkpoint": {"path": str(home / "tiny" / "captioner")},
        "image_size": 32,
    }
    given = {"captioner": card, "pairs": Input(paths=(str(home / "test" / "shards"),)), "retrieval": None, **fields}
    return lambda: EvaluateSpec(kind="evaluate", output=str(home / name), **given)


def test_stages_that_are_aside_let_the_others_by(home: Path) -> None:
    """The loop of rounds is never late for the ablation: with three places, it has two whenever it can use them."""
    stages = plan_stages(spec_in(home, "planned", rounds=2, ablation=True, parallel=3))
    done: list[str] = []
    running = to_begin(stages, done, [], 3)
    begun = [[stage.name for stage in running]]
    while running:
        done.append(running[0].name)  # the first to begin ends first
        running = running[1:]
        new = to_begin(stages, done, running, 3)
        begun.append([stage.name for stage in new])
        running += new
    assert sorted(done) == sorted(stage.name for stage in stages)
    assert begun[:6] == [
        ["round-0/model"],
        ["round-0/evaluation", "round-1/captioner", "round-1/filter"],
        [],
        [],
        ["round-1/curated", "round-1/unfiltered"],
        ["round-1/model"],
    ]
    assert to_begin(stages, done[:1], [], 1)[0].name == "round-0/evaluation"


@pytest.mark.parametrize("nicer", [0, 5, 15])
def test_a_stage_that_is_aside_is_nicer_than_the_run(home: Path, tmp_path: Path, nicer: int) -> None:
    """However nice the run is; the system lets no one be nicer than 19."""
    gone = evaluation(home, "gone", pairs=Input(paths=(str(home / "gone"),)))

    def nicenesses() -> list[int]:
        found = [os.nice(nicer)]
        for aside in (False, True):
            one = _Running(Stage(f"aside-{aside}", gone, aside=aside), tmp_path, 1)
            found.append(os.getpriority(os.PRIO_PROCESS, one._process.pid))
            one.stop()
            one.wait()
        return found

    with ThreadPoolExecutor(1) as thread:  # niceness is a thread's, and no one gets back what they gave
        own, loop, aside = thread.submit(nicenesses).result()
    assert (loop, aside) == (own, min(19, own + 10))


def test_a_stage_that_fails_is_named_with_its_last_words(home: Path, tmp_path: Path) -> None:
    gone = evaluation(home, "gone", pairs=Input(paths=(str(home / "gone"),)))
    with pytest.raises(
        StageError, match=r"(?s)first failed with exit code 1; .*first\.log ends:.*no Parquet file there"
    ):
        run_stages([Stage("first", gone), Stage("second", gone, ("first",))], tmp_path, 2, Console(quiet=True))
    assert not (tmp_path / "second.log").exists()


def test_a_stage_ends_with_the_process_that_started_it(home: Path) -> None:
    """The parent is killed; the child notices that the pipe is closed."""
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'capfilt.stage', sys.argv[1]], stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    (home / "orphan.yaml").write_text(
        yaml.safe_dump(
            {
                **{name: value for name, value in SPEC["pretrain"].items() if name != "steps"},
                **{"kind": "pretrain", "name": "orphan", "output": "orphan", "steps": 10**6},
                "data": [{"pairs": {"paths": "human/shards"}}],
            }
        )
    )
    spec = home / "orphan.yaml"
    with subprocess.Popen([sys.executable, "-c", code, str(spec)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        time.sleep(0.5)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        end = time.monotonic() + 10
        while time.monotonic() < end and Path(f"/proc/{child}").exists():
            if Path(f"/proc/{child}/status").read_text().split("State:")[1].split()[0] == "Z":
                break
            time.sleep(0.05)
        else:
            assert not Path(f"/proc/{child}").exists(), "the stage outlives the run"
