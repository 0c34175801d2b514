"""BLIP's loop as a graph of stages, each a run of its own in a process of its own; a stage that is done stays done.

<output>/run.json            the resolved spec, and where the run was begun
<output>/stages/<stage>.yaml the spec of each stage, which `capfilt run` takes as well
<output>/stages/<stage>.json its outcome; where it exists, the stage is done
<output>/<stage>/            what it made
<output>/bootstrap.json      the tables
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from capfilt.dataset import CuratedDataset
from capfilt.errors import TrainingError
from capfilt.inputs import list_inputs
from capfilt.interrupts import interruptible
from capfilt.pipelines.run_files import compare_record, only_one, read_record, write_json
from capfilt.pipelines.session import surroundings
from capfilt.pipelines.stages import Stage, run_stages
from capfilt.spec import (
    BootstrapSpec,
    CurateSpec,
    EvaluateSpec,
    FinetuneCaptionerSpec,
    FinetuneFilterSpec,
    LocalCard,
    PairSource,
    PretrainSpec,
    Quality,
    RunSpec,
    ThresholdsOverride,
    load_card,
)
from capfilt.terminal import say
from capfilt.truth import read_truth
from capfilt.weights import inspect_starts

NONE, FILTERED, CAPTIONED, BOTH = "none", "F", "C", "C+F"
"""BLIP's table 1: pretraining on the web as it is; what the filter keeps of it; web and synthetic texts unfiltered;
what the filter keeps of both."""


_SPEED: dict[str, Any] = dict.fromkeys(("state_steps", "checkpointing"), True)
_MAY_CHANGE: dict[str, Any] = {
    **dict.fromkeys(("ray", "parallel", "output"), True),
    **dict.fromkeys(("pretrain", "captioner", "filter"), _SPEED),
    "curate": {"batch_size", "placement"},
    "workers": {"retries"},
}
"""Fields that change nothing about what is made: a run resumes with others."""


@dataclass(frozen=True)
class Result:
    """How good one pretrained model is.

    Attributes:
        round: of bootstrapping; 0 is the model of the raw web.
        setting: of table 1.
        evaluation: the contents of its evaluation.json.
    """

    round: int
    setting: str
    evaluation: dict[str, Any]


@dataclass(frozen=True)
class BootstrapSummary:
    """What a bootstrap run did.

    Attributes:
        seconds: stage -> wall-clock time of the attempt that finished it.
        elapsed: seconds of this attempt.
    """

    output: str
    results: tuple[Result, ...]
    seconds: dict[str, float]
    elapsed: float


def bootstrap(spec: BootstrapSpec, *, console: Console | None = None) -> BootstrapSummary:
    """Run the rounds of a spec, or what is left of them.

    Raises:
        CheckpointError, InputError: what the spec names is not there; found before the first stage begins.
        ConflictError: another run is at work in the output.
        StageError, ErrorBudgetError: a stage failed; its log is named.
        TrainingError: the output holds a run of another spec.
        KeyboardInterrupt: what is done stays done, and stages resume.
    """
    console = console or Console(stderr=True)
    begin, output = time.monotonic(), Path(spec.output)
    with only_one(output):
        record = read_record(output / "run.json")
        about = {"spec": spec.model_dump(mode="json", exclude=_MAY_CHANGE)}
        if record is None:
            _look(spec)
            write_json(output / "run.json", {**about, "output": spec.output, **surroundings()})
        else:
            compare_record(output / "run.json", record, about)
            _refuse_if_moved(output, record)
        plan = _Plan(spec)
        with interruptible():
            seconds = run_stages(plan.stages, output / "stages", spec.parallel, console)
        results = tuple(
            Result(number, setting, json.loads((output / stage / "evaluation.json").read_text(encoding="utf-8")))
            for number, setting, stage in plan.evaluations
        )
        for stage in plan.curated:
            for alarm in _alarms(output / stage):
                say(f"capfilt: {stage}: {alarm}", console)
        summary = BootstrapSummary(spec.output, results, seconds, time.monotonic() - begin)
        write_json(output / "bootstrap.json", {"spec": about["spec"], **asdict(summary)})
    return summary


def _look(spec: BootstrapSpec) -> None:
    """Look for all that a later stage opens, hours from now.

    Raises:
        CheckpointError, InputError: it is not there.
    """
    for source in (spec.web, spec.human, spec.evaluate.pairs):
        if source is not None:
            list_inputs(source)
    for truth in (spec.truth, spec.evaluate.truth):
        if truth is not None:
            read_truth(truth)
    inspect_starts(spec.pretrain)


def _refuse_if_moved(output: Path, record: Mapping[str, Any]) -> None:
    """A stage names what others made by its whole path, so that one which has begun resumes in the same place only.

    Raises:
        TrainingError: the run was begun in another place.
    """
    if (begun := record.get("output", str(output))) != str(output):
        raise TrainingError(
            f"{output / 'run.json'}: the run was begun in {begun}, and its stages name files there; move it back to "
            "resume, or take another output"
        )


def _alarms(curated: Path) -> list[str]:
    """Those of the report that a round left, which compares it with the round before."""
    records = CuratedDataset.for_reading(str(curated), {}).runs()
    return next((list(record.details.get("alarms", ())) for record in records if record.details.get("report")), [])


def plan_stages(spec: BootstrapSpec) -> list[Stage]:
    """The stages of a run, those first that others wait for."""
    return _Plan(spec).stages


class _Plan:
    """The stages of a run, those first that others wait for."""

    def __init__(self, spec: BootstrapSpec) -> None:
        self.spec, self.output = spec, Path(spec.output)
        self.stages: list[Stage] = []
        self.evaluations: list[tuple[int, str, str]] = []
        self.curated: list[str] = []
        self.human = PairSource(pairs=spec.human, weight=spec.human_weight)
        start = self._add("round-0/model", lambda: self._pretrain("round-0/model", PairSource(pairs=spec.web)))
        self._evaluate(0, NONE, "round-0", start, None)
        for number in range(1, spec.rounds + 1):
            start = self._round(number, start)
        if spec.ablation:
            self._ablation()

    def _add(self, name: str, make: Callable[[], RunSpec], *needs: str, aside: bool = False) -> str:
        self.stages.append(Stage(name, make, needs, aside))
        return name

    def _round(self, number: int, start: str) -> str:
        """Its stages; the name of the one that makes the new model."""
        here = f"round-{number}"
        captioner = self._add(f"{here}/captioner", lambda: self._captioner(f"{here}/captioner", start), start)
        judge = self._add(f"{here}/filter", lambda: self._filter(f"{here}/filter", start), start)
        curated = self._add(
            f"{here}/curated",
            lambda: self._curate(f"{here}/curated", captioner, judge, self.spec.curate.thresholds),
            captioner,
            judge,
        )
        self.curated.append(curated)
        data = PairSource(dataset=self._path(curated))
        model = self._add(f"{here}/model", lambda: self._pretrain(f"{here}/model", data), curated)
        self._evaluate(number, BOTH, here, model, curated)
        return model

    def _ablation(self) -> None:
        """Table 1's other settings, with round 1's captioner and filter."""
        curated, captioner, judge = (f"round-1/{name}" for name in ("curated", "captioner", "filter"))
        filtered = PairSource(dataset=self._path(curated), texts=("web",))
        model = self._add("round-1/model-F", lambda: self._pretrain("round-1/model-F", filtered), curated, aside=True)
        self._evaluate(1, FILTERED, "round-1", model, None)
        everything = ThresholdsOverride(web=0, synthetic=0)
        unfiltered = self._add(
            "round-1/unfiltered",
            lambda: self._curate("round-1/unfiltered", captioner, judge, everything),
            captioner,
            judge,
            aside=True,
        )
        captioned = PairSource(dataset=self._path(unfiltered))
        model = self._add(
            "round-1/model-C", lambda: self._pretrain("round-1/model-C", captioned), unfiltered, aside=True
        )
        self._evaluate(1, CAPTIONED, "round-1", model, None)

    def _evaluate(self, number: int, setting: str, here: str, model: str, curated: str | None) -> None:
        name = f"{here}/evaluation" + ("" if setting in (NONE, BOTH) else f"-{setting}")
        needs = [stage for stage in (model, curated) if stage]
        self._add(name, lambda: self._evaluation(name, model, curated), *needs, aside=True)
        self.evaluations.append((number, setting, name))

    # --- the spec of each stage ---

    def _path(self, stage: str) -> str:
        return str(self.output / stage)

    def _training(self, stage: str) -> dict[str, Any]:
        spec = self.spec
        return {
            "name": f"{spec.name}-{stage.replace('/', '-')}",
            "output": self._path(stage),
            "seed": spec.seed,
            "images": spec.images,
            "workers": spec.workers,
            "ray": spec.ray,
        }

    def _pretrain(self, stage: str, data: PairSource) -> PretrainSpec:
        settings = dict(self.spec.pretrain)
        return PretrainSpec(kind="pretrain", data=(data, self.human), **settings, **self._training(stage))

    def _captioner(self, stage: str, model: str) -> FinetuneCaptionerSpec:
        return FinetuneCaptionerSpec(
            kind="finetune-captioner",
            start=self._card(model, "captioner"),
            data=(PairSource(pairs=self.spec.human),),
            **dict(self.spec.captioner),
            **self._training(stage),
        )

    def _filter(self, stage: str, model: str) -> FinetuneFilterSpec:
        return FinetuneFilterSpec(
            kind="finetune-filter",
            start=self._card(model, "filter"),
            data=(PairSource(pairs=self.spec.human),),
            **dict(self.spec.filter),
            **self._training(stage),
        )

    def _card(self, stage: str, role: str) -> Any:
        card = load_card(Path(self._path(stage)) / f"{role}.yaml")
        settings = self.spec.curate
        kept = {"batch_size": settings.batch_size, "dtype": settings.dtype, "placement": settings.placement}
        assert isinstance(card, LocalCard)  # of this run's own stages
        return card.model_copy(update=kept)

    def _curate(self, stage: str, captioner: str, judge: str, thresholds: ThresholdsOverride | None) -> CurateSpec:
        spec, settings = self.spec, self.spec.curate
        number = int(stage.split("/")[0].removeprefix("round-"))
        before = self._path(f"round-{number - 1}/curated") if number > 1 else None
        return CurateSpec(
            kind="curate",
            input=spec.web,
            output=self._path(stage),
            captioners=(self._card(captioner, "captioner"),),
            filters=(self._card(judge, "filter"),),
            sampling=settings.sampling.model_copy(update={"seed": settings.sampling.seed + spec.seed + number}),
            thresholds=thresholds,
            images=spec.images,
            fragment_rows=settings.fragment_rows,
            max_error_fraction=settings.max_error_fraction,
            report_against=before,
            ray=spec.ray,
        )

    def _evaluation(self, stage: str, model: str, curated: str | None) -> EvaluateSpec:
        spec = self.spec
        quality = (Quality(dataset=self._path(curated), truth=spec.truth),) if curated and spec.truth else ()
        return EvaluateSpec(
            kind="evaluate",
            output=self._path(stage),
            captioner=self._card(model, "captioner"),
            filter=self._card(model, "filter"),
            quality=quality,
            images=spec.images,
            seed=spec.seed,
            **dict(spec.evaluate),
        )
