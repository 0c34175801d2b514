"""What a run would do, and why: inputs listed, compared with what is committed. Loads no model, reads no data.

(But for the URLs and keys of annotations that were not compared yet with the lists of what is withdrawn.)
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from capfilt.dataset import CuratedDataset, ShardState
from capfilt.errors import DatasetError
from capfilt.fingerprints import Fingerprints, without_copies, without_withdrawn
from capfilt.inputs import InputFile, list_inputs, stem
from capfilt.spec import CurateSpec
from capfilt.withdrawn import Withdrawals, look

_NOTHING = Withdrawals()


class Stage(StrEnum):
    """Where a shard restarts; it goes through this stage and those above it. In the order in which a run does them."""

    WITHDRAW = "withdraw"  # what withdrawn rows held is taken out; nothing is judged, no image read
    DECIDE = "decide"  # from the scores on record: no model, no image but those that are newly kept
    SCORE = "score"  # from the captions on record: the filters alone
    CAPTION = "caption"  # from the images: everything


class Why(StrEnum):
    """Why a shard is curated, most upstream cause first."""

    NEW = "new"
    INPUT = "input changed"
    CAPTION = "captioners, sampling or preprocessing changed"
    RETURNED = "rows are on no list of withdrawn ones any more"
    SCORE = "filters changed"
    DECIDE = "thresholds or rules changed"
    WITHDRAWN = "rows were withdrawn"
    COPIES = "other rows are copies"

    @property
    def stage(self) -> Stage:
        """The first stage that is stale."""
        own = {
            Why.SCORE: Stage.SCORE,
            Why.DECIDE: Stage.DECIDE,
            Why.COPIES: Stage.DECIDE,
            Why.WITHDRAWN: Stage.WITHDRAW,
        }
        return own.get(self, Stage.CAPTION)


@dataclass(frozen=True)
class Plan:
    """Work of a run.

    Attributes:
        todo: input files to curate, in order, each with its reason; then committed shards of which rows were withdrawn,
            which may be among them too: rows are taken out first, whatever becomes of the rest.
        done: shards committed and up to date.
        gone: committed shards that are no longer among the inputs; they stay in the dataset.
        moved: how many files have another path than when they were curated, and keep their shards; they are in `todo`
            or `done` like any other.
        rows: of the shards to do whose input is as it was, by shard.
        rows_per_byte: of the inputs that are as they were; None if there are none.
        withdrawals: what the spec's lists mean for what is committed.
        files: all inputs.
    """

    todo: tuple[tuple[InputFile, Why], ...]
    done: tuple[str, ...]
    gone: tuple[str, ...]
    moved: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)
    rows_per_byte: float | None = None
    withdrawals: Withdrawals = _NOTHING
    files: tuple[InputFile, ...] = ()

    @property
    def reasons(self) -> Counter[Why]:
        """Shards to curate, by reason."""
        return Counter(why for _, why in self.todo)

    @property
    def models(self) -> bool:
        """Whether any shard is to meet the filters."""
        return any(why.stage in (Stage.SCORE, Stage.CAPTION) for _, why in self.todo)

    def at(self, stage: Stage) -> list[InputFile]:
        """The files whose shards restart at a stage."""
        return [file for file, why in self.todo if why.stage is stage]


def plan_run(spec: CurateSpec, fingerprints: Fingerprints) -> Plan:
    """Compare the inputs, and the lists of what is withdrawn, with the dataset as it is.

    Raises:
        InputError: the inputs cannot be listed; or a list, or annotations not compared with it yet, cannot be read.
        SpecError: rows of the dataset were withdrawn, and the spec names no lists.
    """
    dataset = CuratedDataset.if_any(spec.output, spec.output_options)
    committed = dataset.committed() if dataset else {}
    return make_plan(spec, fingerprints, committed, look(spec, dataset, committed))


def make_plan(
    spec: CurateSpec,
    fingerprints: Fingerprints,
    committed: Mapping[str, ShardState],
    withdrawals: Withdrawals = _NOTHING,
) -> Plan:
    """Compare the inputs with the committed shards.

    Raises:
        InputError: the inputs cannot be listed.
        DatasetError: rows were withdrawn of a shard that capfilt did not write, and whose input is gone.
    """
    listed = list_inputs(spec.input, exclude=spec.output)
    files = keep_shards(listed, committed)
    reasons = [(file, why_stale(file, fingerprints, committed.get(file.shard), withdrawals)) for file in files]
    paths = {file.shard: file.path for file in files}
    stale = [(file, why) for file, why in reasons if why is not None]
    hit = [
        _committed_file(shard, committed[shard], paths.get(shard))
        for shard in sorted(withdrawals.hits)
        if shard in committed
    ]
    if beyond := [shard for shard in withdrawals.hits if shard not in committed and shard not in paths]:
        raise DatasetError(
            f"{spec.output}: shard {beyond[0]} holds withdrawn rows, and another tool rewrote its files, which capfilt "
            "does not touch. Give its input back under input.paths, or delete the rows with that tool"
        )
    return Plan(
        todo=(*stale, *((file, Why.WITHDRAWN) for file in hit)),
        done=tuple(file.shard for file, why in reasons if why is None and file.shard not in withdrawals.hits),
        gone=tuple(sorted(shard for shard in committed if shard not in paths)),
        moved=sum(was is not now for was, now in zip(listed, files, strict=True)),
        rows={file.shard: committed[file.shard].rows for file, why in stale if why not in (Why.NEW, Why.INPUT)}
        | {file.shard: committed[file.shard].rows for file in hit},
        files=tuple(files),
        rows_per_byte=_rows_per_byte([(file, committed[file.shard]) for file in files if file.shard in committed]),
        withdrawals=withdrawals,
    )


def _committed_file(shard: str, state: ShardState, path: str | None) -> InputFile:
    """The input that a committed shard was made from, which no one will read."""
    return InputFile(path or f"the input of shard {shard}, which is gone", shard, state.provenance.input_id, 0)


def _rows_per_byte(known: Sequence[tuple[InputFile, ShardState]]) -> float | None:
    same = [(file.size, state.rows) for file, state in known if state.provenance.input_id == file.input_id]
    size = sum(size for size, _ in same)
    return sum(rows for _, rows in same) / size if size else None


def keep_shards(files: Sequence[InputFile], committed: Mapping[str, ShardState]) -> list[InputFile]:
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


def why_stale(
    file: InputFile, now: Fingerprints, state: ShardState | None, withdrawals: Withdrawals = _NOTHING
) -> Why | None:
    """Why a file's shard is to be curated, given what is committed of it; None where it is up to date."""
    if state is None:
        return Why.NEW
    was = state.provenance
    if was.input_id != file.input_id:
        return Why.INPUT
    if was.caption_fingerprint != now.caption:
        return Why.CAPTION
    if file.shard in withdrawals.returned:
        return Why.RETURNED
    if was.score_fingerprint != now.score:
        return Why.SCORE
    if without_copies(without_withdrawn(was.decide_fingerprint)) != now.decide:
        return Why.DECIDE
    return None
