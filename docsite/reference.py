"""The reference: pages of it that are made from the code when the site is built, so that they cannot differ from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import get_args

import typer
from markdown_text import outside_code
from spec_fields import card_sections, spec_sections
from table_columns import column_sections, reason_sections
from typer.cli import get_docs_for_click
from typer.main import get_command

from capfilt import errors
from capfilt.cli import app
from capfilt.pipelines.metrics import METRICS
from capfilt.spec import RunSpec


def commands() -> str:
    """Every command, as its `--help` has it."""
    command = get_command(app)
    docs = get_docs_for_click(obj=command, ctx=typer.Context(command), name="capfilt")
    prose = re.compile(r"^(?! {4}).*$", re.MULTILINE)  # what is indented is code, too
    escaped = partial(prose.sub, lambda line: line[0].replace("<", "&lt;"))
    return outside_code(docs[docs.index("\n## ") :], escaped)


def exit_codes() -> str:
    """Exit codes, and the errors that end a run with each."""
    tree = [error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, Exception)]
    codes: dict[int, list[type[errors.CapfiltError]]] = {}
    for error in tree:
        codes.setdefault(error.exit_code, []).append(error)
    rows = [
        f"| {code} | `{error.__name__}` | {(error.__doc__ or '').splitlines()[0].replace('``', '`')} |"
        for code in sorted(codes)
        for error in codes[code]
    ]
    return "\n".join(["| code | error | when |", "|---|---|---|", "| 0 | | Done. |", *rows])


def metrics() -> str:
    """What Prometheus reads."""
    suffix = {"counter": "_total", "gauge": "", "histogram": "_bucket"}
    rows = [
        f"| `ray_{name}{suffix[metric.kind]}` | {metric.kind} | {', '.join(f'`{label}`' for label in metric.labels)} "
        f"| {metric.meaning} |"
        for name, metric in METRICS.items()
    ]
    return "\n".join(["| name | kind | labels | meaning |", "|---|---|---|---|", *rows])


PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "cards": card_sections,
    "columns": column_sections,
    "reasons": reason_sections,
    "exit-codes": exit_codes,
    "metrics": metrics,
    **{spec.model_fields["kind"].annotation.__args__[0]: partial(spec_sections, spec) for spec in get_args(RunSpec)},
}
"""By the name in a page's `<!-- reference: NAME -->`."""
