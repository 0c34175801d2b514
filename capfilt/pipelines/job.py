"""What workers are given: the run, the stage at which its shards restart, and how the models are made.

It imports neither torch nor ray: a run that only decides again needs no torch.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from capfilt.dataset import Provenance
from capfilt.errors import CapfiltError, SpecError
from capfilt.fingerprints import Fingerprints, files_seen, run_fingerprints, with_withdrawn
from capfilt.inputs import InputFile
from capfilt.plan import Stage
from capfilt.receipts import Receipt
from capfilt.spec import AnyCaptioner, AnyCard, AnyFilter, CaptionerCard, CurateSpec, EndpointCard, FilterCard, Sampling

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from capfilt.models.captioner import Captioner as BlipCaptioner
    from capfilt.models.dual import DualFilter
    from capfilt.models.endpoint import EndpointCaptioner
    from capfilt.models.generator import GeneratorCaptioner
    from capfilt.models.itm import ItmFilter

    LoadedCaptioner = BlipCaptioner | GeneratorCaptioner | EndpointCaptioner
    LoadedFilter = ItmFilter | DualFilter


class Captioner(Protocol):
    """Writes captions. See capfilt.models.captioner.Captioner.

    Attributes:
        image_size: S; it takes images as uint8 [B, 3, S, S]. None of a :class:`Preparing` one.
        batch_size: images that it takes at a time; more are no gain.
    """

    @property
    def image_size(self) -> int | None: ...

    @property
    def batch_size(self) -> int: ...

    def caption(self, images: Any, sha256: Sequence[str]) -> list[list[str]]:
        """For each image its candidates in order.

        Raises:
            EndpointError: no row is to blame; the run ends.
            Exception: anything else is the fault of one of the rows.
        """
        ...


class Filter(Protocol):
    """Scores texts. See capfilt.models.itm.ItmFilter.

    Attributes:
        image_size, batch_size: as a captioner's.
    """

    @property
    def image_size(self) -> int | None: ...

    @property
    def batch_size(self) -> int: ...

    def score(self, images: Any, texts: Sequence[Sequence[str]]) -> Sequence[Sequence[tuple[float, float | None]]]:
        """For each image, for each of its texts, (P(match), cosine similarity if its card wants one)."""
        ...


@runtime_checkable
class Preparing(Protocol):
    """A captioner or filter that makes of whole pictures what it then takes: a sequence of what `prepare` returned."""

    def prepare(self, rgb: npt.NDArray[np.uint8], sha256: str) -> Any:
        """Look at one picture, uint8 [H, W, 3], whose memory is used again afterwards. Called by several threads.

        Raises:
            Exception: the row is an error.
        """
        ...


Models = tuple[Sequence[Captioner], Sequence[Filter]]

LoadModels = Callable[[CurateSpec, str], Models]
"""Makes the models of a spec's cards, in their order, on a device ("cpu", "cuda"); called once in each worker.

Where captions stay, the spec has no captioner."""


def load_models(spec: CurateSpec, device: str) -> Models:
    """Load the captioners and filters that the spec's cards name.

    Raises:
        CheckpointError: a checkpoint cannot be found, trusted or loaded.
        EndpointError: an endpoint does not caption.
        SpecError: a card or the sampling asks for more than its checkpoint can do; names the card.
    """
    captioners = []
    for card in spec.captioners:
        sampling = spec.sampling if isinstance(card, CaptionerCard) else card.sampled(spec.sampling)
        captioners.append(load_captioner(card, sampling, device))
    return captioners, [load_filter(card, device) for card in spec.filters]


def load_captioner(card: AnyCaptioner, sampling: Sampling, device: str) -> LoadedCaptioner:
    """Load a captioner, of whatever kind; raises as :func:`load_models`.

    Args:
        sampling: the card's own has gone over it.
    """
    with _named(card):
        if isinstance(card, CaptionerCard):
            from capfilt.models.captioner import Captioner as BlipCaptioner  # transformers loads where models do

            return BlipCaptioner(card, sampling, device)
        if isinstance(card, EndpointCard):
            from capfilt.models.endpoint import EndpointCaptioner

            return EndpointCaptioner(card, sampling)
        from capfilt.models.generator import GeneratorCaptioner

        return GeneratorCaptioner(card, sampling, device)


def load_filter(card: AnyFilter, device: str) -> LoadedFilter:
    """Load a filter, of whatever kind; raises as :func:`load_models`."""
    with _named(card):
        if isinstance(card, FilterCard):
            from capfilt.models.itm import ItmFilter

            return ItmFilter(card, device)
        from capfilt.models.dual import DualFilter

        return DualFilter(card, device)


@contextmanager
def _named(card: AnyCard) -> Iterator[None]:
    """The network knows neither the card's name nor its place in the spec."""
    try:
        yield
    except SpecError as error:
        raise SpecError(f"{card.role} {card.name}: {error}") from error


class Work(Protocol):
    """Rows [start, stop) of an input file of `file_rows` rows; `name` is unique within a run.

    `withdrawn` are the rows of the whole file that are withdrawn.
    """

    @property
    def file(self) -> InputFile: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def file_rows(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def withdrawn(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Job:
    """What every worker of a run is given.

    Attributes:
        stage: at which the job's shards restart.
        generation: of the rows that it scores; see CuratedDataset.generation.
        files_seen: when the fingerprints were taken; see :func:`capfilt.fingerprints.files_seen`. Empty if unknown.
    """

    spec: CurateSpec
    fingerprints: Fingerprints
    run: str
    stage: Stage = Stage.CAPTION
    generation: int = 0
    files_seen: str = ""

    def same_checkpoints(self) -> bool:
        """Whether the checkpoints here are those of the fingerprints. Reads them where they may be others.

        Raises:
            CheckpointError: one is not here.
        """
        return self.files_seen == files_seen(self.spec) or run_fingerprints(self.spec) == self.fingerprints

    @property
    def models(self) -> CurateSpec:
        """The spec with the cards of the models that this stage needs: no captioner where captions stay."""
        return self.spec if self.stage is Stage.CAPTION else self.spec.model_copy(update={"captioners": ()})

    def provenance(self, input_id: str, withdrawn: Sequence[int] = ()) -> Provenance:
        """Of rows this run makes from an input file, of whose rows these are withdrawn."""
        fp = self.fingerprints
        return Provenance(
            input_id=input_id,
            caption_fingerprint=fp.caption,
            score_fingerprint=fp.score,
            decide_fingerprint=with_withdrawn(fp.decide, withdrawn),
            run=self.run,
        )

    def failed(self, work: Work, why: str) -> Receipt:
        """That the input, or what an earlier run made of it, cannot be read just now."""
        return Receipt(
            shard=work.file.shard,
            start=work.start,
            stop=work.stop,
            file_rows=work.file_rows,
            provenance=self.provenance(work.file.input_id, work.withdrawn),
            stage=self.stage,
            failure=why,
        )


@dataclass(frozen=True)
class Failure:
    """What went wrong in a worker that is no row's fault: the models do not load, the output cannot be written.

    Attributes:
        error: ends the run. The worker's own, where it is one of ours; else one that names the fragment, with the
            worker's traceback as its note.
    """

    error: CapfiltError

    @classmethod
    def of(cls, error: Exception, name: str) -> Failure:
        """Of what a worker raised on the fragment of this name; called while it is handled."""
        if isinstance(error, CapfiltError):  # says itself what is wrong
            return cls(error)
        failure = cls(
            CapfiltError(
                f"a worker failed on {name}: {type(error).__name__}: {error}. What was finished is kept; run "
                "again to resume"
            )
        )
        failure.error.add_note(traceback.format_exc())
        return failure
