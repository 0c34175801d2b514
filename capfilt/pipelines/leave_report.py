"""The page that a run leaves at its end. The run is done by then: nothing that goes wrong here makes it fail."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from capfilt.dataset import CuratedDataset
from capfilt.logs import event
from capfilt.spec import CurateSpec
from capfilt.stores import one_line

if TYPE_CHECKING:
    from capfilt.pipelines.curate import Summary

PAGE = "report.html"

_ENDED = ("done", "ErrorBudgetError")


def leave_report(
    dataset: CuratedDataset, spec: CurateSpec, summary: Summary, record: Callable[[], None], say: Callable[[str], None]
) -> None:
    """Write the page of what the dataset holds now to the run's folder, unless the run was broken off or did nothing.

    Sets `summary.report` and `summary.alarms`, which are logged; or `summary.report_error`, which is said, too.

    Args:
        record: writes the summary anew.
    """
    if not summary.shards or summary.outcome.partition(":")[0] not in _ENDED:
        return
    try:
        try:
            from capfilt.report import AT_END, make_report  # not before it is needed: it takes a moment to load

            other = spec.report_against
            against = CuratedDataset.for_reading(other, spec.output_options) if other else None
            made = make_report(dataset, spec.output_options, against=against, limits=AT_END)
            dataset.write_run_page(summary.run, PAGE, made.html)
            summary.report = PAGE
            summary.alarms = [f"{alarm.title}. {alarm.detail}" for alarm in made.alarms]
            for alarm in summary.alarms:
                event("report_alarm", logging.WARNING, run=summary.run, alarm=alarm)
        except Exception as error:
            summary.report_error = one_line(error)
            raise
        finally:
            record()
    except Exception as error:  # noqa: BLE001  said, logged and, as far as the store allows, recorded
        event("report_failed", logging.WARNING, run=summary.run, error=one_line(error))
        say(f"the run's report could not be written: {one_line(error)}. `capfilt report {spec.output}` tries again")
