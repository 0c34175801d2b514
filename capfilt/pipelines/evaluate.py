"""How good a captioner and a filter are: retrieval, captioning, a threshold, and the noise that a run left.

One process, one model in memory at a time. What is on record of a curated dataset is measured without a model, and
without torch. Writes

<output>/evaluation.json    what was measured, on what, and the resolved spec
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from capfilt.pipelines.parts import Parts
from capfilt.pipelines.run_files import write_json
from capfilt.quality import DatasetQuality, measure_quality
from capfilt.spec import EvaluateSpec
from capfilt.testset import PairCounts

if TYPE_CHECKING:
    from capfilt.models.captions import Captioned
    from capfilt.models.measures import Agreement, Calibrated, Judged
    from capfilt.models.retrieval import Retrieved

REPORT = "evaluation.json"


@dataclass(frozen=True, slots=True)
class Report:
    """What an evaluation found; None for what was not measured.

    Attributes:
        spec: resolved, as JSON has it.
        capfilt: version of this package.
        device: that the models ran on; None where there was none.
        calibration: of `filter`, on test pairs and shuffled ones.
        labelled: filters on the texts that labels know.
        ensemble: several filters, on test pairs and shuffled ones.
        seconds: by part.
    """

    spec: dict[str, Any]
    capfilt: str
    device: str | None
    pairs: PairCounts | None = None
    captioning: Captioned | None = None
    retrieval: Retrieved | None = None
    calibration: Calibrated | None = None
    precision: Agreement | None = None
    labelled: Judged | None = None
    ensemble: Judged | None = None
    quality: tuple[DatasetQuality, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As evaluation.json has it: plain containers, keys of text, None for what is no number."""
        record: dict[str, Any] = json.loads(json.dumps(_finite(asdict(self)), allow_nan=False))
        return record


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate(spec: EvaluateSpec, console: Console | None = None) -> Report:
    """Measure what the spec asks for, and write `<output>/evaluation.json`, in place of one that is there.

    On a CUDA device where there is one.

    Args:
        console: where progress is shown; standard error unless given.

    Raises:
        InputError: test pairs, labels or a truth cannot be read or used.
        EndpointError: an endpoint does not caption.
        DatasetError: a dataset to measure is not there.
        CheckpointError: a checkpoint cannot be used, or computes what is no number.
        SpecError: a card or captioning does not fit its checkpoint.
        OSError: the output cannot be written.
    """
    parts = Parts(console or Console(stderr=True, soft_wrap=True))
    output = Path(spec.output)
    output.mkdir(parents=True, exist_ok=True)  # before the hours of work whose result it is for
    quality = []
    for asked in spec.quality:
        with parts.part("quality", asked.dataset):
            quality.append(measure_quality(asked, spec.max_false_positive_rate))
    found: dict[str, Any] = {"device": None}
    if spec.pairs is not None:
        from capfilt.pipelines.measuring import measure_pairs  # torch loads where models do

        found = measure_pairs(spec, parts)
    report = Report(
        spec=spec.model_dump(mode="json"),
        capfilt=_version(),
        quality=tuple(quality),
        **found,
        seconds={name: round(seconds, 3) for name, seconds in parts.seconds.items()},
    )
    write_json(output / REPORT, report.record())
    return report


def _version() -> str:
    try:
        return version("capfilt")
    except PackageNotFoundError:  # shipped to a cluster as a folder
        return "not installed"
