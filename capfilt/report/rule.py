"""How the rows of a version were decided: the thresholds and the decision of the runs that wrote them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from capfilt.records import RunRecord
from capfilt.report.tally import WEB, Tally
from capfilt.schema import Status
from capfilt.spec import CurateSpec, Decision, Thresholds
from capfilt.spec.cards import Unit


@dataclass(frozen=True)
class Rule:
    """How most rows of a version were decided.

    Attributes:
        run: the run that wrote most of these rows; None where no row's run is on record.
        spec: its spec; None where `run` is, or another version of capfilt wrote the spec.
        decision: how several filters judge.
        unit: of the scores; None where it is not on record, or not one for all.
        thresholds: one for all filters.
        exact: whether these thresholds, held against every row's scores, decide as was decided.
        others: rows that were decided by another rule, or by one that is not on record.
    """

    run: str | None
    spec: CurateSpec | None
    decision: Decision
    unit: Unit | None
    thresholds: Thresholds
    exact: bool
    others: int

    @property
    def elsewhere(self) -> bool:
        """Whether rows that match may be dropped for their URL, their image, or a copy of it."""
        if self.spec is None:
            return False
        lists = self.spec.keep_out
        return self.spec.duplicates is not None or (lists is not None and bool(lists.domains or lists.classifier))


def find_rule(tally: Tally, records: Mapping[str, RunRecord]) -> Rule:
    """The rule of most rows; makes the tally's other tables by it.

    Args:
        records: of the runs on record, by id.
    """
    rows: Counter[tuple[Decision, tuple[Thresholds, ...]]] = Counter()
    runs: dict[tuple[Decision, tuple[Thresholds, ...]], tuple[str, CurateSpec]] = {}
    units: set[Unit] = set()
    unknown = 0
    query = (
        f"SELECT run, count(*) AS n FROM rows WHERE status <> '{Status.ERROR}' GROUP BY run ORDER BY n DESC, run DESC"
    )
    for run, count in tally.ask(query):
        record = records.get(run)
        spec = record.spec if record else None
        if spec is None:
            unknown += count
            continue
        rule = spec.decision, spec.effective_thresholds
        rows[rule] += count
        units |= {card.unit for card in spec.filters}
        runs.setdefault(rule, (run, spec))
    if not rows:
        tally.flatten("mean")
        return Rule(None, None, "mean", None, _seen(tally), False, unknown)
    ((decision, thresholds), most), *_ = rows.most_common(1)
    run, spec = runs[decision, thresholds]
    tally.flatten(decision)
    mean = Thresholds(**{name: fmean(getattr(one, name) for one in thresholds) for name in Thresholds.model_fields})
    others = rows.total() - most + unknown
    unit = units.pop() if len(units) == 1 else None
    return Rule(run, spec, decision, unit, mean, len(set(thresholds)) == 1 and not others, others)


def _seen(tally: Tally) -> Thresholds:
    """The lowest scores that were kept: as good as the thresholds that kept them."""
    lowest = dict(tally.ask("SELECT source = $web, min(score) FROM texts WHERE kept GROUP BY 1", web=WEB))
    return Thresholds(web=_or_half(lowest.get(True)), synthetic=_or_half(lowest.get(False)))


def _or_half(score: float | None) -> float:
    return 0.5 if score is None else score
