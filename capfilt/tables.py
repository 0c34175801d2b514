"""An evaluation's report as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from capfilt.terminal import counted, shown

Record = Mapping[str, Any]

_OF_THRESHOLD = ("precision", "recall", "false_positive_rate")
_OF_FILTER = ("roc_auc", "average_precision", "precision", "recall", "false_positive_rate")


def report_table(report: Record) -> list[Table]:
    """A table for each part that was measured.

    Args:
        report: what evaluation.json holds: capfilt.pipelines.evaluate.Report.record().
    """
    makers = {
        **{"pairs": _pairs, "captioning": _captioning, "retrieval": _retrieval},
        **{"calibration": _calibration, "precision": _precision},
        **{"labelled": _labelled, "ensemble": _ensemble},
    }
    tables = [make(report[part]) for part, make in makers.items() if report.get(part)]
    return tables + [_quality(dataset) for dataset in report.get("quality", ())]


def _titled(title: str, *columns: str) -> Table:
    table = Table(title=shown(title), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _pairs(pairs: Record) -> Table:
    table = _titled("test pairs", "", "rows")
    table.add_row(
        f"used: {counted(pairs['images'], 'image')}, {counted(pairs['texts'], 'text')}", f"{pairs['texts']:,}"
    )
    for reason, count in pairs["left_out"].items():
        table.add_row(shown(f"left out: {reason}"), f"{count:,}")
    return table


def _captioning(found: Record) -> Table:
    table = _titled("captioning", "", "")
    table.add_row("CIDEr", _times_100(found["cider"]))
    table.add_row("BLEU-4", _times_100(found["bleu4"]))
    table.add_row("words", f"{found['mean_words']:.1f}")
    table.add_row("different captions", f"{found['distinct']:,}")
    if found["judged"]:
        table.add_row(f"true, of {found['judged']:,}", _percent(found["true"]))
        table.add_row("true and whole", _percent(found["exact"]))
    if found.get("refused"):
        table.add_row("images that the endpoint did not caption", f"{found['refused']:,}")
    return table


def _retrieval(found: Record) -> Table:
    ways = {"image_to_text": "TR", "text_to_image": "IR"}
    pools = f", {counted(found['pools'], 'pool')} of {found['pool_images']:,}" if found["pools"] > 1 else ""
    title = f"retrieval: {counted(found['images'], 'image')}, {counted(found['texts'], 'text')}{pools}"
    if found["left_out_images"]:
        title += f"; {counted(found['left_out_images'], 'image')} left out"
    columns = [(way, k) for way in ways for k in found["itc"][way]]
    table = _titled(title, "", *(f"{ways[way]}@{k}" for way, k in columns))
    rows = {"itc": "ITC", "itm": f"ITM, best {found['k_test']:,}"} if found["itm"] else {"itc": "similarity"}
    for name, label in rows.items():
        table.add_row(label, *(_percent(found[name][way][k]) for way, k in columns))
    return table


def _calibration(found: Record) -> Table:
    title = f"filter: {counted(found['matched'], 'pair')}, {found['shuffled']:,} shuffled"
    table = _titled(title, "", "")
    if found["problem"]:
        table.add_row("no threshold", shown(found["problem"]))
    else:
        table.add_row(f"threshold, of {found['unit']}", f"{found['threshold']:.4f}")
    for name in _OF_FILTER:
        if found[name] is not None:
            table.add_row(_words(name), _percent(found[name]))
    return table


def _precision(found: Record) -> Table:
    table = _titled("the filter's decisions against float32's", "", "")
    table.add_row(f"decided otherwise, of {found['texts']:,} at {found['threshold']:.2f}", f"{found['flipped']:,}")
    table.add_row("of all", f"{found['fraction']:.2%}")
    table.add_row("largest difference of a score", f"{found['largest']:.4f}")
    return table


def _labelled(found: Record) -> Table:
    return _judged("texts that labels know", found)


def _ensemble(found: Record) -> Table:
    return _judged("test pairs and shuffled ones", found)


def _judged(what: str, found: Record) -> Table:
    """Filters on texts whose truth is known: a column for each, and for what they decide together."""
    columns = {f"{name} ({found['units'][name]})": own for name, own in found["filters"].items()}
    if found["together"]:
        columns[f"all, by {found['decision']}"] = found["together"]
    title = f"{what}: {found['texts']:,}, {found['true']:,} of them true"
    table = _titled(f"{title}; {found['left_out']:,} left out" if found["left_out"] else title, "", *columns)
    for name in ("roc_auc", "average_precision"):
        table.add_row(_words(name), *(_percent(own[name]) for own in columns.values()))
    for part, label in (("in_use", "threshold in use"), ("best", "best threshold")):
        _add_thresholds(table, label, [own[part] or {} for own in columns.values()])
    for label, own in columns.items():
        if own["problem"]:
            table.add_row(shown(f"no best threshold, {label}"), shown(own["problem"]))
    return _cautioned(table, found.get("chosen", 0))


def _add_thresholds(table: Table, label: str, found: Sequence[Record]) -> None:
    """Rows of thresholds, and of what each does; none where there is none."""
    if any(found):
        table.add_row(
            shown(label), *("n/a" if own.get("threshold") is None else f"{own['threshold']:.4f}" for own in found)
        )
        for name in _OF_THRESHOLD:
            table.add_row(f"  its {_words(name)}", *(_percent(own.get(name)) for own in found))


def _quality(found: Record) -> Table:
    sources = found["sources"]
    table = _titled(f"quality of {found['dataset']}, version {found['version']}", "", *sources, "all")
    for name in ("texts", "judged", "scored", "kept"):
        counts = [own[name] for own in sources.values()]
        table.add_row(name, *(f"{count:,}" for count in (*counts, sum(counts))))
    for name in ("noise_before", "noise_after"):
        table.add_row(_words(name), *(_percent(own[name]) for own in (*sources.values(), found)))
    for name in _OF_FILTER:
        table.add_row(_words(name), *(_percent(own[name]) for own in sources.values()))
    _add_thresholds(table, "best threshold", [own.get("calibrated") or {} for own in sources.values()])
    for name in dict.fromkeys(name for own in sources.values() for name in own.get("filters", ())):
        alone = [own.get("filters", {}).get(name) or {} for own in sources.values()]
        table.add_row(shown(f"ROC AUC of {name} alone"), *(_percent(own.get("roc_auc")) for own in alone))
        _add_thresholds(table, f"best threshold of {name}", [own.get("best") or {} for own in alone])
    for source, own in sources.items():
        if own.get("problem"):
            table.add_row(f"no best threshold, {source}", shown(own["problem"]))
    return _cautioned(table, *(own.get("chosen", 0) for own in sources.values()))


def _cautioned(table: Table, *chosen: int) -> Table:
    """Say of marks that are no fair sample that they are none."""
    if any(chosen):
        said = "of the marked texts were not drawn at random from all rows: the rates are not the dataset's"
        table.caption = f"{sum(chosen):,} {said}"
        table.caption_justify = "left"
    return table


def _words(name: str) -> str:
    return name.replace("_", " ").replace("roc auc", "ROC AUC")


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f}%"


def _times_100(value: float | None) -> str:
    """As papers print CIDEr and BLEU."""
    return "n/a" if value is None else f"{100 * value:.1f}"
