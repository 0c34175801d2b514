"""The dashboard: every panel draws something that is measured."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
from manifests import DEPLOY

from capfilt.pipelines.metrics import METRICS

DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
ENDINGS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count")}
EXPORTED = {f"ray_{name}{ending}" for name, metric in METRICS.items() for ending in ENDINGS[metric.kind]}
RAYS_OWN = {"ray_node_mem_used"}
LABELS = {label for metric in METRICS.values() for label in metric.labels} | {
    *("le", "instance"),  # Prometheus'
    *("NodeAddress", "WorkerId"),  # Ray's
}


def expressions() -> Iterator[str]:
    for panel in PANELS:
        yield from (target["expr"] for target in panel["targets"])


def metrics(expression: str) -> set[str]:
    """Names that an expression reads; what is no PromQL raises."""
    text = promql_parser.parse(expression.replace("$run", ".*")).prettify()
    return set(re.findall(r"\bray_\w+", text))


def test_every_expression_is_promql_over_known_metrics() -> None:
    used = set().union(*(metrics(expression) for expression in expressions()))
    assert used - RAYS_OWN <= EXPORTED, "metrics that capfilt does not have"
    shown = {name for name in METRICS if any(f"ray_{name}" in metric for metric in used)}
    assert shown == METRICS.keys(), "metrics that are not shown"
    for expression in expressions():
        for group in re.findall(r"by \(([^)]*)\)", expression):
            assert {label.strip() for label in group.split(",")} <= LABELS, expression


def test_counters_are_rated() -> None:
    """A counter as it is says little and falls to zero with every new worker; shards, a sum so far, are meant so."""
    for expression in expressions():
        for name in re.findall(r"(rate\()?(ray_capfilt_(?!shards|rows)\w+_total)", expression):
            assert name[0] == "rate(", expression


def test_variables_and_sources_are_defined() -> None:
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    text = json.dumps(DASHBOARD)
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__all"}
    assert used == variables
    assert all(target["datasource"]["uid"] == "${datasource}" for panel in PANELS for target in panel["targets"])


def test_panels_lie_side_by_side() -> None:
    assert len({panel["id"] for panel in PANELS}) == len({panel["title"] for panel in PANELS}) == len(PANELS)
    cells = [set(_cells(panel["gridPos"])) for panel in PANELS]
    for one, other in itertools.combinations(cells, 2):
        assert not one & other
    assert all(x < 24 for panel in cells for x, _ in panel)


def _cells(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    columns, rows = (range(place[a], place[a] + place[b]) for a, b in (("x", "w"), ("y", "h")))
    yield from itertools.product(columns, rows)
