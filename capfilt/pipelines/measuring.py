"""What an evaluation measures on test pairs, with models of any kind, one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from capfilt.calibration import Floats
from capfilt.errors import CheckpointError, InputError
from capfilt.models.captioner import Captioner
from capfilt.models.captions import Captioned, Write, caption_images, first_captions
from capfilt.models.measures import (
    Sample,
    calibrated,
    compare_precision,
    judged,
    labelled_texts,
    score_samples,
    shuffled_pairs,
)
from capfilt.models.retrieval import K_TEST, Retrieved, retrieve
from capfilt.models.squares import prepared, squares
from capfilt.pipelines.job import load_captioner, load_filter
from capfilt.pipelines.parts import Parts
from capfilt.spec import AnyCaptioner, AnyFilter, EvaluateSpec, LocalCard
from capfilt.testset import LabelledImage, LabelledImages, read_test_set
from capfilt.truth import Judge, Labels, read_truth

if TYPE_CHECKING:
    from capfilt.pipelines.job import LoadedCaptioner, LoadedFilter

BLIP_BEAMS = 3
"""Of BLIP's published captions of COCO."""


def measure_pairs(spec: EvaluateSpec, parts: Parts) -> dict[str, Any]:
    """What is measured on the test pairs, by the names of capfilt.pipelines.evaluate.Report.

    Raises:
        CapfiltError: as :func:`capfilt.pipelines.evaluate.evaluate`.
    """
    assert spec.pairs is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with parts.part("read", ", ".join(spec.pairs.paths)):
        judge = read_truth(spec.truth) if spec.truth else None
        pairs = read_test_set(spec.pairs, spec.images, _only(spec, judge))
    found: dict[str, Any] = {"device": device, "pairs": pairs.counts}
    measuring = _Measuring(spec, device, parts, pairs, judge)
    if spec.captioner is not None and spec.captioning is not None:
        found["captioning"] = measuring.captioning(spec.captioner)
    if spec.filter is not None and spec.retrieval is not None:
        found["retrieval"] = measuring.retrieval(spec.filter)
    return found | (measuring.calibration() if spec.judges and spec.calibrate else {})


def _only(spec: EvaluateSpec, judge: Judge | None) -> set[str] | None:
    """The images that labels know, where nothing else is measured: the pairs may be a whole web."""
    more = (spec.captioner and spec.captioning) or (spec.filter and spec.retrieval)
    return set(judge.images) if isinstance(judge, Labels) and not more else None


class _Measuring:
    """The parts of it; each loads the model that it needs, unless the one before did."""

    _held: tuple[AnyFilter, LoadedFilter] | None

    def __init__(
        self, spec: EvaluateSpec, device: str, parts: Parts, pairs: LabelledImages, judge: Judge | None
    ) -> None:
        self._spec, self._device, self._parts, self._judge = spec, device, parts, judge
        self._images, self._held = pairs.images, None
        self._size = f"{len(pairs.images):,} images, {pairs.texts:,} texts"

    def captioning(self, card: AnyCaptioner) -> Captioned:
        settings = self._spec.captioning
        assert settings is not None
        with self._parts.part("captioning", self._size) as say, _blamed_on(card):
            captioner = load_captioner(card, settings.sampling(card), self._device)
            show = self._show(captioner, 1, say)
            write: Write = first_captions(captioner)
            if isinstance(captioner, Captioner):
                beams, blip = settings.beams or BLIP_BEAMS, captioner
                write = lambda pixels_BCSS, _: blip.describe(pixels_BCSS, beams)  # noqa: E731
            return caption_images(write, show, self._images, self._judge)

    def retrieval(self, card: AnyFilter) -> Retrieved:
        asked = self._spec.retrieval
        assert asked is not None
        filter_ = self._load(card)
        with self._parts.part("retrieval", self._size) as say, _blamed_on(card):
            show = self._show(filter_, 2, say)
            texts = [image.cleaned for image in self._images]
            return retrieve(filter_, show, texts, asked.k_test or K_TEST, asked.pool)

    def calibration(self) -> dict[str, Any]:
        """Filters on shuffled pairs, on labels where there are any, and against themselves in float32."""
        spec, limit = self._spec, self._spec.max_false_positive_rate
        samples = {"shuffled": shuffled_pairs(self._images, self._judge, spec.seed)}
        if isinstance(self._judge, Labels):
            samples["labelled"] = labelled_texts(self._images, self._judge)
            if not len(samples["labelled"].true_N):
                raise InputError("truth.labels: they know none of the images of pairs; name the labels of these images")
        scores: dict[str, dict[str, Floats]] = {name: {} for name in samples}
        for card in spec.judges:
            for name, own_N in zip(samples, self._scores(card, samples.values(), "calibration"), strict=True):
                scores[name][card.name] = own_N
        found: dict[str, Any] = {}
        if "labelled" in samples:
            found["labelled"] = judged(scores["labelled"], samples["labelled"], spec.judges, spec.decision, limit)
        if spec.filters:
            found["ensemble"] = judged(scores["shuffled"], samples["shuffled"], spec.judges, spec.decision, limit)
            return found
        (card,), shuffled = spec.judges, samples["shuffled"]
        found["calibration"] = calibrated(scores["shuffled"][card.name], shuffled, card.unit, limit)
        if card.dtype != "float32" and len(shuffled.true_N):
            exact = card.model_copy(update={"dtype": "float32"})
            (exact_N,) = self._scores(exact, [shuffled], "precision")
            found["precision"] = compare_precision(scores["shuffled"][card.name], exact_N, card.thresholds.web)
        return found

    def _scores(self, card: AnyFilter, samples: Iterable[Sample], part: str) -> list[Floats]:
        filter_ = self._load(card)
        what = self._size if part == "calibration" else f"against {card.dtype}"
        with self._parts.part(part, what) as say, _blamed_on(card):
            return score_samples(filter_, self._show(filter_, 1, say), list(samples))

    def _load(self, card: AnyFilter) -> LoadedFilter:
        if self._held is None or self._held[0] != card:
            self._held = None  # one in memory at a time
            with self._parts.part("load", f"filter {card.name}"), _blamed_on(card):
                self._held = card, load_filter(card, self._device)
        return self._held[1]

    def _show(self, model: LoadedCaptioner | LoadedFilter, times: int, say: Callable[[str], None]) -> _Show:
        return _Show(self._spec, model, self._images, times * len(self._images), say)


@contextmanager
def _blamed_on(card: AnyCaptioner | AnyFilter) -> Iterator[None]:
    """A model that computes what is no number is the checkpoint's fault."""
    try:
        yield
    except FloatingPointError as error:
        dtype = card.dtype if isinstance(card, LocalCard) else "its dtype"
        raise CheckpointError(f"{card.name}: {error}; its weights are broken, or too large for {dtype}") from error


class _Show:
    """Test images as a model takes them.

    Args:
        total: images that will be shown in all.
        say: is told how far that is.
    """

    def __init__(
        self,
        spec: EvaluateSpec,
        model: LoadedCaptioner | LoadedFilter,
        images: Sequence[LabelledImage],
        total: int,
        say: Callable[[str], None],
    ) -> None:
        self._limits, self._model, self._images = spec.images, model, images
        self._total, self._say, self._done = total, say, 0

    def __call__(self, start: int, stop: int) -> Iterator[Any]:
        """Batches that together are images `start` to `stop`, in order."""
        some, model = self._images[start:stop], self._model
        if model.image_size is None:  # it looks at whole pictures
            batches: Iterator[Any] = prepared(some, model.prepare, model.batch_size, self._limits)
        else:
            batches = squares([one.image for one in some], model.image_size, model.batch_size, self._limits)
        for batch in batches:
            yield batch
            self._done += len(batch)
            self._say(f"{self._done / self._total:.0%}")
