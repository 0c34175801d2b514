"""What a run would do, and why: inputs listed, compared with what is committed. Reads no data, loads no model."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from capfilt.dataset import ShardState
from capfilt.fingerprints import Fingerprints, without_copies
from capfilt.inputs import InputFile, list_inputs, stem
from capfilt.spec import CurateSpec


class Stage(StrEnum):
    """Where a shard restarts; it goes through this stage and those above it. In the order in which a run does them."""

    DECIDE = "decide"  # from the scores on record: no model, no image but those that are newly kept
    SCORE = "score"  # from the captions on record: the filters alone
    CAPTION = "caption"  # from the images: everything


class Why(StrEnum):
    """Why a shard is curated, most upstream cause first."""

    NEW = "new"
    INPUT = "input changed"
    CAPTION = "captioners, sampling or preprocessing changed"
    SCORE = "filters changed"
    DECIDE = "thresholds or rules changed"
    COPIES = "other rows are copies"

    @property
    def stage(self) -> Stage:
        """The first stage that is stale."""
        return {Why.SCORE: Stage.SCORE, Why.DECIDE: Stage.DECIDE, Why.COPIES: Stage.DECIDE}.get(self, Stage.CAPTION)


@dataclass(frozen=True)
class Plan:
    """Work of a run.

    Attributes:
        todo: input files to curate, in order, each with its reason.
        done: shards committed and up to date.
        gone: committed shards that are no longer among the inputs; they stay in the dataset.
        moved: how many files have another path than when they were curated, and keep their shards; they are in `todo`
            or `done` like any other.
        rows: of the shards to do whose input is as it was, by shard.
        rows_per_byte: of the inputs that are as they were; None if there are none.
        files: all inputs.
    """

    todo: tuple[tuple[InputFile, Why], ...]
    done: tuple[str, ...]
    gone: tuple[str, ...]
    moved: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)
    rows_per_byte: float | None = None
    files: tuple[InputFile, ...] = ()

    @property
    def reasons(self) -> Counter[Why]:
        """Shards to curate, by reason."""
        return Counter(why for _, why in self.todo)

    @property
    def models(self) -> bool:
        """Whether any shard is to meet the filters."""
        return any(why.stage is not Stage.DECIDE for _, why in self.todo)

    def at(self, stage: Stage) -> list[InputFile]:
        """The files whose shards restart at a stage."""
        return [file for file, why in self.todo if why.stage is stage]


def make_plan(spec: CurateSpec, fingerprints: Fingerprints, committed: Mapping[str, ShardState]) -> Plan:
    """Compare the inputs with the committed shards.

    Raises:
        InputError: the inputs cannot be listed.
    """
    listed = list_inputs(spec.input, exclude=spec.output)
    files = _keep_shards(listed, committed)
    reasons = [(file, why_stale(file, fingerprints, committed.get(file.shard))) for file in files]
    names = {file.shard for file in files}
    return Plan(
        todo=tuple((file, why) for file, why in reasons if why is not None),
        done=tuple(file.shard for file, why in reasons if why is None),
        gone=tuple(sorted(shard for shard in committed if shard not in names)),
        moved=sum(was is not now for was, now in zip(listed, files, strict=True)),
        rows={file.shard: committed[file.shard].rows for file, why in reasons if why not in (None, Why.NEW, Why.INPUT)},
        files=tuple(files),
        rows_per_byte=_rows_per_byte([(file, committed[file.shard]) for file in files if file.shard in committed]),
    )


def _rows_per_byte(known: Sequence[tuple[InputFile, ShardState]]) -> float | None:
    same = [(file.size, state.rows) for file, state in known if state.provenance.input_id == file.input_id]
    size = sum(size for size, _ in same)
    return sum(rows for _, rows in same) / size if size else None


def _keep_shards(files: Sequence[InputFile], committed: Mapping[str, ShardState]) -> list[InputFile]:
    """Give files that were moved the shards they had, which the names of others' paths would make new ones.

    A new file has moved if a shard was made from a file of its name and content that is no longer listed. Of several
    such files and shards, the first by path takes the first by name.
    """
    left: dict[tuple[str, str], deque[str]] = defaultdict(deque)
    for shard in sorted(committed.keys() - {file.shard for file in files}):
        left[stem(shard), committed[shard].provenance.input_id].append(shard)

    def keep(file: InputFile) -> InputFile:
        same = None if file.shard in committed else left.get((stem(file.shard), file.input_id))
        return replace(file, shard=same.popleft()) if same else file

    return [keep(file) for file in files]


def why_stale(file: InputFile, now: Fingerprints, state: ShardState | None) -> Why | None:
    """Why a file's shard is to be curated, given what is committed of it; None where it is up to date."""
    if state is None:
        return Why.NEW
    was = state.provenance
    if was.input_id != file.input_id:
        return Why.INPUT
    if was.caption_fingerprint != now.caption:
        return Why.CAPTION
    if was.score_fingerprint != now.score:
        return Why.SCORE
    if without_copies(was.decide_fingerprint) != now.decide:
        return Why.DECIDE
    return None
