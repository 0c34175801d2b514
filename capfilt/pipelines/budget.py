"""The error budget of a run: when its errors are too many to go on, or to be taken for the input's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping

from capfilt.dataset import Counts, ShardState
from capfilt.plan import Plan
from capfilt.receipts import Receipt

SICK_ROWS = 10_000
"""A run is stopped early when its errors exceed the budget of all its rows; or, after so many, when most are errors."""

SICK_FILES = 1_000
"""And after so many files, when most cannot be read."""


class ErrorBudget:
    """Errors against `max_error_fraction`: the same verdict however often the work was interrupted.

    Rows in error count against the rows of this run and of those that it resumes (runs no vacuum has closed). Files
    that cannot be read count against all inputs, each as many rows as the others have on average: one that stays
    broken night after night does not make a night without other work a failure.
    """

    def __init__(
        self, fraction: float, committed: Mapping[str, ShardState], plan: Plan, closed: Container[str]
    ) -> None:
        done = [committed[shard] for shard in plan.done]
        resumed = [state.counts for state in done if state.provenance.run not in closed]
        self._fraction = fraction
        self._seen = sum(resumed, Counts())
        self._resumed_rows = self._seen.rows
        self._done_files, self._done_rows = len(done), sum(state.rows for state in done)
        self._todo_files, self._known_files, self._known_rows = len(plan.todo), 0, 0
        self._lost_files = 0
        self._reasons: Counter[str] = Counter()

    def file_has(self, rows: int) -> None:
        """A footer was read."""
        self._known_files += 1
        self._known_rows += rows

    def saw(self, receipt: Receipt) -> None:
        """A fragment is finished."""
        self._seen += receipt.counts
        self._reasons.update(receipt.reasons)

    def lost_a_file(self, receipts: Iterable[Receipt]) -> None:
        """A file cannot be curated; what was seen of it does not count."""
        self._lost_files += 1
        for receipt in receipts:
            self._seen += Counts(-receipt.counts.kept, -receipt.counts.dropped, -receipt.counts.errors)
            self._reasons.subtract(receipt.reasons)

    @property
    def _mean_rows(self) -> int:
        return max(1, (self._done_rows + self._known_rows) // max(1, self._done_files + self._known_files))

    @property
    def all_rows(self) -> int:
        """Rows this run is known, or expected by the mean file, to have."""
        return self._known_rows + (self._todo_files - self._known_files) * self._mean_rows

    def over(self) -> bool:
        """Whether the run as a whole is over the budget."""
        inputs = max(1, self._done_rows + self.all_rows)
        lost = self._lost_files * self._mean_rows > self._fraction * inputs
        return lost or self._seen.errors > self._fraction * self._seen.rows

    def sure_to_be_over(self) -> bool:
        """Whether the run may stop now: its errors are over the budget of all its rows, or most of SICK_ROWS and more.

        A few unreadable files stop nothing early: they cost no work, and what is good is committed first. Most of
        SICK_FILES and more do: the store is down.
        """
        seen, share = self._seen, max(0.5, self._fraction)
        most = seen.rows >= SICK_ROWS and seen.errors > share * seen.rows
        files = self._known_files + self._lost_files
        down = files >= SICK_FILES and self._lost_files > share * files
        return most or down or seen.errors > self._fraction * max(seen.rows, self._resumed_rows + self.all_rows)

    def __str__(self) -> str:
        errors, rows = self._seen.errors, self._seen.rows
        common = [f"{reason} {count:,}" for reason, count in self._reasons.most_common() if ":" not in reason and count]
        return (
            f"{errors:,} of {rows:,} rows are errors, {errors / max(1, rows):.1%}, and {self._lost_files:,} of "
            f"{self._todo_files:,} files are unreadable: over max_error_fraction = {self._fraction:.1%}. "
            f"Rows: {', '.join(common) or 'none'}."
        )
