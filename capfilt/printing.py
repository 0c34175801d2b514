"""What commands print: summaries and datasets, as tables for a terminal. Strangers' text is shown as text."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table

from capfilt.tables import report_table
from capfilt.terminal import counted, say, show, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from capfilt.dataset import CuratedDataset
    from capfilt.demo import Findings
    from capfilt.diff import Diff
    from capfilt.export.driver import ExportSummary
    from capfilt.holder import Standing
    from capfilt.pipelines.bootstrap import BootstrapSummary
    from capfilt.pipelines.curate import Summary
    from capfilt.pipelines.evaluate import Report
    from capfilt.pipelines.ingest import IngestSummary
    from capfilt.pipelines.train import TrainSummary
    from capfilt.quality import DatasetQuality
    from capfilt.records import RunRecord

_CHANGES = {
    "gained": "gained: kept now, not before",
    "lost": "lost: kept before, not now",
    "image": "kept, of another image",
    "text": "kept, with other texts",
    "outcome": "not kept in either, of another outcome",
}
NO_INPUT = "no input is left: every file that input.paths matches lies in the output, {output}"


def print_summary(summary: Summary) -> None:
    """What a CapFilt run did."""
    if summary.outcome != "done" and not summary.shards and not summary.failures:
        return
    if not summary.shards and not summary.failures:
        done = f"{counted(summary.skipped, 'shard')} up to date in {summary.output}"
        say(f"nothing to do: {done if summary.skipped else NO_INPUT.format(output=summary.output)}")
        return
    counts, seconds = summary.counts, summary.elapsed
    rows = Table("rows", "", title=f"run {summary.run}", title_justify="left")
    rows.add_row(f"{counts.rows:,}", f"in {counted(summary.shards, 'shard')}, in {seconds:,.1f} s")
    for name, count in (("kept", counts.kept), ("dropped", counts.dropped), ("errors", counts.errors)):
        rows.add_row(f"{count:,}", f"{name} ({count / max(1, counts.rows):.1%})")
    for reason, count in summary.reasons.most_common():
        if ":" not in reason and reason != "kept":
            rows.add_row(f"{count:,}", shown(f"  {reason}"))
    show(rows)
    texts = Table("texts", "source", "verdict")
    for reason, count in sorted(summary.reasons.items()):
        if ":" in reason:
            texts.add_row(f"{count:,}", *map(shown, reason.split(":")))
    if texts.row_count:
        show(texts)
    for stage, pace in summary.stages.items():
        done = f"{counted(pace.captions, 'caption')} written, {counted(pace.images, 'image')} read"
        copied = f", {pace.copied:,} copied from earlier pairs" if pace.copied else ""
        say(f"restarted at {stage}: {counted(pace.rows, 'row')}; {done}{copied}")
    if summary.copies:
        say(f"dropped as copies of others: {counted(summary.copies, 'row')} of the dataset")
    if summary.skipped:
        say(f"up to date: {counted(summary.skipped, 'shard')}")
    if summary.adopted_rows:
        say(f"taken over from an interrupted run: {counted(summary.adopted_rows, 'row')}")
    for message in summary.failures.values():
        say(f"not curated: {message}")
    if summary.gone:
        say(f"no longer among the inputs: {counted(summary.gone, 'shard')}; their rows stay in the dataset")
    spent = sorted(summary.seconds.items(), key=lambda item: -item[1])
    stages = ", ".join(f"{name} {time:,.1f} s" for name, time in spent)
    if stages:
        say(f"stages, summed over workers: {stages}")
    if summary.busy is not None:
        say(f"the models were busy {summary.busy:.0%} of the time; the bottleneck: {summary.bottleneck}")
    if "annotations" in summary.versions:
        say(f"version: {summary.versions['annotations']}")
    if summary.report:
        say(f"report: {summary.output}/_runs/{summary.run}/{summary.report}")
    say_where(summary.output)


def print_dataset(dataset: CuratedDataset) -> None:
    """What a curated dataset holds."""
    states = dataset.committed().values()
    say(f"{dataset.output}: versions {', '.join(f'{name} {v}' for name, v in dataset.versions().items())}")
    say(f"{counted(len(states), 'shard')}, {counted(sum(state.rows for state in states), 'row')}")
    table = Table("rows", "status", "reason")
    for (state, reason), count in dataset.reasons().items():
        table.add_row(f"{count:,}", shown(state), shown(reason or ""))
    if table.row_count:
        show(table)
    say_where(dataset.output)


def print_holder(lease: Standing) -> None:
    """Who holds a dataset, if anyone does."""
    if lease.free:
        return
    if lease.holder is None:
        say("held by a run that has just begun, or broke off while it did")
        return
    lives = {True: "held by", False: "left by a run that died:", None: "held, as far as can be told from here, by"}
    say(f"{lives[lease.holder.lives()]} {lease.holder}")


def print_runs(records: Sequence[RunRecord]) -> None:
    """Runs on record, the newest first."""
    gpus = any(one.device_seconds.get("gpu_held") for one in records)
    table = Table(Column("run", overflow="fold"), Column("version", justify="right"), "outcome")
    for column in ("took", "shards", "rows", "images/s", "errors", *(["GPU s"] if gpus else []), "CPU s"):
        table.add_column(column, justify="right")
    for one in records:
        took = "" if one.seconds is None else str(timedelta(seconds=round(one.seconds)))
        speed = "" if one.images_per_second is None else f"{one.images_per_second:,.1f}"
        cost = [one.device_seconds.get(name) for name in ("gpu_held", "cpu_held")[not gpus :]]
        table.add_row(
            *map(shown, (one.run, str(one.version or ""), one.outcome.partition(":")[0], took)),
            *(f"{count:,}" for count in (one.shards, one.rows)),
            *(speed, f"{one.errors:,}"),
            *("" if seconds is None else f"{seconds:,.0f}" for seconds in cost),
        )
    if table.row_count:
        show(table)
    if not records:
        say("no run is on record")


def print_diff(found: Diff) -> None:
    """What changed between two versions."""
    shards = found.shards
    say(f"version {found.before} -> {found.after}: {counted(shards['before'], 'shard')} -> {shards['after']:,}")
    say(f"{shards['changed']:,} of them differ in files; the others were not read")
    table = Table(Column("rows", justify="right"), "", title="what became of rows", title_justify="left")
    for change, rows in found.changes.most_common():
        table.add_row(f"{rows:,}", _CHANGES[change])
    if not table.row_count:
        say("no row changed")
        return
    show(table)
    if found.outcomes:
        outcomes = Table(Column("rows", justify="right"), "before", "after")
        for (before, after), rows in found.outcomes.most_common():
            outcomes.add_row(f"{rows:,}", shown(before), shown(after))
        show(outcomes)


def say_where(output: str) -> None:
    """Where the tables are."""
    say(f"dataset: {output}/pairs, every row and reason: {output}/annotations")


def print_training(summary: TrainSummary) -> None:
    """What a training run did."""
    last = summary.last
    table = Table(Column(shown(f"{summary.kind} {summary.name}")), "")
    table.add_row("steps", f"{summary.steps:,}")
    table.add_row("rows an epoch", f"{summary.rows:,}")
    if summary.resumed_at:
        table.add_row("resumed after step", f"{summary.resumed_at:,}")
    for name in ("itc", "itm", "lm"):
        if name in last:
            table.add_row(f"{name} loss, last step", f"{last[name]:.4f}")
    table.add_row("seconds", f"{summary.elapsed:,.1f}")
    show(table)
    for warning in summary.warnings:
        say(warning)
    for role, card in summary.cards.items():
        say(f"{role}: {card}")


def print_evaluation(report: Report) -> None:
    """What an evaluation found."""
    for table in report_table(report.record()):
        show(table)


def print_bootstrap(summary: BootstrapSummary) -> None:
    """The table of rounds and settings, and what each round made of the web."""
    records = [(str(result.round), result.setting, result.evaluation) for result in summary.results]
    models = _table(
        "models, each pretrained anew and measured as it is (all times 100)",
        *("round", "texts", "TR@1", "IR@1", "TR@1 ITM", "IR@1 ITM", "CIDEr", "BLEU-4", "true and whole"),
    )
    for number, setting, found in records:
        retrieval, captioning = found.get("retrieval") or {}, found.get("captioning") or {}
        recalls = (_recall(retrieval, how, way) for how in ("itc", "itm") for way in ("image_to_text", "text_to_image"))
        captions = (captioning.get(name) for name in ("cider", "bleu4", "exact"))
        models.add_row(number, setting, *map(_times_100, (*recalls, *captions)))
    show(models)
    webs = _table(
        "the web, curated",
        *("round", "web noise", "noise kept", "AUC web", "precision", "recall", "AUC synthetic", "precision", "kept"),
    )
    for number, _, found in records:
        for dataset in found.get("quality", ()):
            web, own = (dataset["sources"].get(source, {}) for source in ("web", "synthetic"))
            numbers = [web.get("noise_before"), dataset["noise_after"]]
            numbers += [web.get(name) for name in ("roc_auc", "precision", "recall")]
            numbers += [own.get(name) for name in ("roc_auc", "precision")]
            webs.add_row(number, *map(_percent, numbers), f"{dataset['kept']:,}")
    if webs.row_count:
        show(webs)
    say(f"tables: {summary.output}/bootstrap.json; stages: {sum(summary.seconds.values()):,.0f} s of work")


def print_ingest(summary: IngestSummary) -> None:
    """What became of every URL of the lists."""
    account, fetched = summary.account, summary.fetched
    table = Table("URLs", "", title=f"run {summary.run}", title_justify="left")
    table.add_row(f"{summary.rows:,}", f"in {counted(summary.lists, 'list')}; accounted for: {account.rows:,}")
    for status, count in account.statuses.most_common():
        table.add_row(f"{count:,}", shown(f"{status} ({count / account.rows:.1%})"))
    for message, count in account.errors.most_common(10):
        table.add_row(f"{count:,}", shown(f"  {message}"))
    if (more := len(account.errors) - 10) > 0:
        table.add_row("", f"  and {more:,} more kinds of errors: {shown(summary.output)}/_ingest/report.json")
    show(table)
    if summary.fetched_shards:
        pace = f"{counted(fetched.rows, 'URL')} in {summary.elapsed:,.1f} s, {fetched.rows / summary.elapsed:,.1f}/s"
        say(f"fetched {pace}: {counted(summary.fetched_shards, 'shard')}, {summary.bytes / 2**20:,.1f} MiB")
    if summary.kept_shards:
        say(f"there already: {counted(summary.kept_shards, 'shard')}")
    if summary.stale:
        say(
            f"moved to {summary.output}/_stale, as the list has their rows no longer: {counted(summary.stale, 'shard')}"
        )
    say(f"shards: {summary.output}; point input.paths of a `curate` spec there")


def print_export(summary: ExportSummary) -> None:
    """What an export wrote."""
    if summary.nothing:
        say(f"nothing to do: {summary.output} holds this export already")
    else:
        again = f"; {summary.resumed:,} of them an earlier try had written" if summary.resumed else ""
        say(f"{counted(summary.files, 'file')}, {summary.bytes:,} bytes, in {summary.elapsed:,.1f} s{again}")
    texts = ", ".join(f"{count:,} {source}" for source, count in summary.sources.items())
    say(f"{counted(summary.rows, 'row')} of version {summary.version} in {summary.output}; texts: {texts}")


def print_demo(quality: DatasetQuality, found: Findings) -> None:
    """The demo's curated web against its truth."""
    rates = [("web texts", quality.sources["web"].noise_before), ("kept texts", quality.noise_after)]
    say("noise: texts that are not true of their picture")
    for name, rate in rates:
        say(f"  {name:<11}{_bar(rate)} {_percent(rate)}")
    kinds = _table("web texts by what they are", "kind", "scored", "kept")
    for kind, (scored, kept) in found.kinds.items():
        kinds.add_row(str(kind), f"{scored:,}", f"{kept:,} ({kept / scored:.0%})")
    show(kinds)
    judged = _table("the filter's verdicts", "texts", "judged", "precision", "recall", "ROC AUC", "kept")
    for source, own in quality.sources.items():
        numbers = map(_percent, (own.precision, own.recall, own.roc_auc))
        judged.add_row(source, f"{own.judged:,}", *numbers, f"{own.kept:,}")
    show(judged)
    rows = Table("web text is", "source", "text", "ITM", "kept", "true", title="some rows", title_justify="left")
    for sample in found.samples:
        for number, (source, text, itm, kept, true) in enumerate(sample.texts):
            name = "" if number else str(sample.kind)
            rows.add_row(name, source, shown(text), f"{itm:.3f}", "yes" if kept else "no", "yes" if true else "no")
    show(rows)


def _bar(rate: float | None, width: int = 40) -> str:
    filled = round(width * (rate or 0))
    return "█" * filled + "░" * (width - filled)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _recall(retrieval: dict[str, Any], how: str, way: str) -> float | None:
    found: float | None = retrieval.get(how, {}).get(way, {}).get("1")
    return found


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def _times_100(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
