"""How good a captioner and a filter are: retrieval, captioning, a threshold, and the noise that a run left.

One process, one model in memory at a time. Writes

<output>/evaluation.json    what was measured, on what, and the resolved spec
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from capfilt.errors import CheckpointError
from capfilt.models.captioner import Captioner
from capfilt.models.itm import ItmFilter
from capfilt.models.measures import (
    Agreement,
    Calibrated,
    Captioned,
    calibrate_filter,
    caption_images,
    compare_precision,
    match_probabilities,
)
from capfilt.models.retrieval import Retrieved, retrieve
from capfilt.models.squares import squares
from capfilt.pipelines.run_files import write_json
from capfilt.quality import DatasetQuality, measure_quality
from capfilt.spec import CaptionerCard, EvaluateSpec, FilterCard, Sampling
from capfilt.terminal import say
from capfilt.testset import LabelledImage, LabelledImages, read_test_set
from capfilt.truth import Judge, read_truth

REPORT = "evaluation.json"

SAY_SECONDS = 20.0
"""Between two lines on how far a part has come."""


@dataclass(frozen=True, slots=True)
class PairCounts:
    """The test set.

    Attributes:
        rows: read. Each is one of `texts`, or left out.
        left_out: rows by capfilt.schema.Reason.
    """

    rows: int
    images: int
    texts: int
    left_out: dict[str, int]


@dataclass(frozen=True, slots=True)
class Report:
    """What an evaluation found; None for what was not measured.

    Attributes:
        spec: resolved, as JSON has it.
        capfilt: version of this package.
        device: that the models ran on.
        seconds: by part.
    """

    spec: dict[str, Any]
    capfilt: str
    device: str
    pairs: PairCounts | None = None
    captioning: Captioned | None = None
    retrieval: Retrieved | None = None
    calibration: Calibrated | None = None
    precision: Agreement | None = None
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
        InputError: test pairs or a truth cannot be read or used.
        DatasetError: a dataset to measure is not there.
        CheckpointError: a checkpoint cannot be used, or computes what is no number.
        SpecError: a card or captioning does not fit its checkpoint.
        OSError: the output cannot be written.
    """
    parts = _Parts(console or Console(stderr=True, soft_wrap=True))
    output = Path(spec.output)
    output.mkdir(parents=True, exist_ok=True)  # before the hours of work whose result it is for
    quality = []
    for asked in spec.quality:
        with parts.part("quality", asked.dataset):
            quality.append(measure_quality(asked, spec.max_false_positive_rate))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = _of_pairs(spec, device, parts) if spec.pairs is not None else {}
    report = Report(
        spec=spec.model_dump(mode="json"),
        capfilt=_version(),
        device=device,
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


def _of_pairs(spec: EvaluateSpec, device: str, parts: _Parts) -> dict[str, Any]:
    """What is measured on the test pairs, by the report's names."""
    assert spec.pairs is not None
    with parts.part("read", ", ".join(spec.pairs.paths)):
        judge = read_truth(spec.truth) if spec.truth else None
        pairs = read_test_set(spec.pairs, spec.images)
    found: dict[str, Any] = {"pairs": PairCounts(pairs.rows, len(pairs.images), pairs.texts, pairs.left_out)}
    if spec.captioner is not None and spec.captioning is not None:
        found["captioning"] = _captioning(spec, spec.captioner, pairs, judge, device, parts)
    if spec.filter is not None and (spec.retrieval is not None or spec.calibrate):
        found |= _filtering(spec, spec.filter, pairs, judge, device, parts)
    return found


def _captioning(
    spec: EvaluateSpec, card: CaptionerCard, pairs: LabelledImages, judge: Judge | None, device: str, parts: _Parts
) -> Captioned:
    settings = spec.captioning
    assert settings is not None
    sampling = Sampling(min_tokens=settings.min_tokens, max_tokens=settings.max_tokens, repetition_penalty=1)
    with parts.part("captioning", _size(pairs)) as say, _blamed_on(card):
        captioner = Captioner(card, sampling, device)
        show = _Show(spec, captioner, pairs.images, len(pairs.images), say)
        return caption_images(captioner, show, pairs.images, settings.beams, judge)


def _filtering(
    spec: EvaluateSpec, card: FilterCard, pairs: LabelledImages, judge: Judge | None, device: str, parts: _Parts
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    images, what = pairs.images, _size(pairs)
    with parts.part("load", f"filter {card.name}"), _blamed_on(card):
        filter_ = ItmFilter(card, device)
    if spec.retrieval is not None:
        k_test, pool, cleaned = spec.retrieval.k_test, spec.retrieval.pool, [image.cleaned for image in images]
        with parts.part("retrieval", what) as say, _blamed_on(card):
            show = _Show(spec, filter_, images, 2 * len(images), say)
            found["retrieval"] = retrieve(filter_, show, cleaned, k_test, pool)
    if spec.calibrate:
        with parts.part("calibration", what) as say, _blamed_on(card):
            show = _Show(spec, filter_, images, len(images), say)
            found["calibration"] = calibrate_filter(
                filter_, show, images, judge, spec.seed, spec.max_false_positive_rate
            )
    if spec.calibrate and card.dtype != "float32":
        with parts.part("precision", f"{card.dtype} against float32") as say, _blamed_on(card):
            probabilities = []
            for model in (filter_, ItmFilter(card.model_copy(update={"dtype": "float32"}), device)):
                show = _Show(spec, model, images, len(images), say)
                matched, shuffled = match_probabilities(model, show, images, judge, spec.seed)
                probabilities.append([*matched, *shuffled])
            found["precision"] = compare_precision(probabilities[0], probabilities[1], card.thresholds.web)
    return found


def _size(pairs: LabelledImages) -> str:
    return f"{len(pairs.images):,} images, {pairs.texts:,} texts"


@contextmanager
def _blamed_on(card: CaptionerCard | FilterCard) -> Iterator[None]:
    """A model that computes what is no number is the checkpoint's fault."""
    try:
        yield
    except FloatingPointError as error:
        raise CheckpointError(f"{card.name}: {error}; its weights are broken, or too large for {card.dtype}") from error


class _Show:
    """Test images as a model takes them.

    Args:
        total: images that will be shown in all.
        say: is told how far that is.
    """

    def __init__(
        self,
        spec: EvaluateSpec,
        model: Captioner | ItmFilter,
        images: Sequence[LabelledImage],
        total: int,
        say: Callable[[str], None],
    ) -> None:
        self._limits, self._model, self._images = spec.images, model, images
        self._total, self._say, self._done = total, say, 0

    def __call__(self, start: int, stop: int) -> Iterator[Tensor]:
        """Batches of uint8 [B, 3, S, S] that together are images `start` to `stop`, in order."""
        encoded = [image.image for image in self._images[start:stop]]
        for pixels_BCSS in squares(encoded, self._model.image_size, self._model.batch_size, self._limits):
            yield pixels_BCSS
            self._done += len(pixels_BCSS)
            self._say(f"{self._done / self._total:.0%}")


class _Parts:
    """Times what is done, and says so.

    Attributes:
        seconds: by part.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str, what: str) -> Iterator[Callable[[str], None]]:
        """Yields what says how far the part has come, not too often."""
        begin = last = time.perf_counter()

        def told(progress: str) -> None:
            nonlocal last
            if time.perf_counter() - last > SAY_SECONDS:
                last = time.perf_counter()
                say(f"{name}: {progress}", self._console)

        say(f"{name}: {what}", self._console)
        try:
            yield told
        finally:
            self.seconds[name] += time.perf_counter() - begin
