"""What an ingest would do: its lists looked at, its output, and the difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from capfilt.account import Account
from capfilt.errors import InputError
from capfilt.lists import Columns, ListFile, columns_of, find_lists
from capfilt.shard_store import STALE, Store
from capfilt.spec import IngestSpec
from capfilt.terminal import counted
from capfilt.url_shards import ShardName, cut_lists

SICK_SHARD = 100
"""Rows from which on a shard's failures are taken for those of the network that fetched it."""

_LOOKS = 16


def look_at_lists(spec: IngestSpec) -> dict[ListFile, Columns]:
    """The files of a spec's lists and their columns; what lies in the output is no list, though it has URLs.

    Raises:
        InputError: a list cannot be used; see capfilt.lists.
    """
    files = [file for file in find_lists(spec.urls) if not file.path.startswith(spec.output.rstrip("/") + "/")]
    if not files:
        raise InputError(f"every file of urls.paths lies in the output, {spec.output}; name others")
    with ThreadPoolExecutor(_LOOKS) as pool:
        return dict(zip(files, pool.map(lambda file: columns_of(file, spec.urls), files), strict=True))


@dataclass
class Plan:
    """What a run would do.

    Attributes:
        files: of the lists.
        rows, shards: of the lists. done: of them, accounted for already.
        again: shards that were fetched, see `unsettled`; stale: that the list no longer has.
    """

    files: int
    rows: int = 0
    shards: int = 0
    done_rows: int = 0
    done: int = 0
    again: int = 0
    stale: int = 0

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{counted(self.rows, 'URL')} in {counted(self.files, 'list')}"
        left = self.shards - self.done
        urls = counted(self.rows - self.done_rows, "URL")
        yield f"fetch {urls}, in {counted(left, 'shard')}" if left else "nothing to fetch"
        if self.again:
            yield f"of these, {counted(self.again, 'shard')} again: too many URLs failed, or files are damaged"
        yield f"leave {counted(self.done_rows, 'URL')}, in {counted(self.done, 'shard')}: on record"
        if self.stale:
            yield f"move {counted(self.stale, 'shard')} to {STALE}/: the list no longer has their rows as they were"


def unsettled(there: Mapping[ShardName, Account | None], fraction: float) -> set[ShardName]:
    """Shards to fetch again: files that cannot be read, and those of which more than this fraction failed.

    Of a few rows that says little, of a row that kills whoever fetches it nothing; so shards of less than SICK_SHARD
    rows are left as they are, unless the output as a whole is over.
    """
    accounts = [account for account in there.values() if account]
    whole = sum(account.failed for account in accounts) > fraction * sum(account.rows for account in accounts)
    return {
        name
        for name, account in there.items()
        if account is None or (account.over(fraction) and (whole or name.rows >= SICK_SHARD))
    }


def make_plan(spec: IngestSpec) -> Plan:
    """Read the lists, and the output's listing and footers; say what a run would do.

    Raises:
        InputError: a list cannot be used.
        SpecError: the output was made with other settings.
    """
    files = list(look_at_lists(spec))
    store = Store(spec.output, spec.output_options)
    store.check_settings(spec.settings)
    there = store.shards()
    plan = Plan(len(files))
    again = unsettled(there, spec.max_error_fraction)
    wanted: set[ShardName] = set()
    for shard in cut_lists(spec, files, there, wanted):
        plan.shards += 1
        plan.rows += shard.name.rows
        if shard.name in there.keys() - again:
            plan.done += 1
            plan.done_rows += shard.name.rows
        plan.again += shard.name in again
    plan.stale = len(there.keys() - wanted)
    return plan


def describe(spec: IngestSpec) -> Iterator[str]:
    """What a look at a spec's lists and output finds, for people; no list is read to its end.

    Raises:
        InputError, SpecError: as :func:`make_plan`.
    """
    kinds: dict[tuple[str, Columns], list[str]] = {}
    for file, columns in look_at_lists(spec).items():
        kinds.setdefault((file.format, columns), []).append(file.path)
    for (format_, columns), paths in kinds.items():
        found = f"url={columns.url} caption={columns.caption or '(none)'}"
        yield f"lists: {len(paths):,} of {format_}, {found}; the first is {paths[0]}"
        if columns.caption is None:
            yield "captions: no column has a usual name, so no row will have a text; name it with urls.caption_col"
    Store(spec.output, spec.output_options).check_settings(spec.settings)
    if spec.download.allow_private:
        yield "download.allow_private: the lists may have this machine's and its network's own addresses asked"
