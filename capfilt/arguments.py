"""Arguments that several commands take, and how commands are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from capfilt.completion import assignments, datasets, specs, versions
from capfilt.spec import load_curate_spec, output_location

RUNS, DATASETS, CLUSTERS, TOYS = "Run a spec", "Look after a dataset", "On a cluster", "Try it on a toy web"
"""The panels of `capfilt --help`, in their order."""

SpecFile = Annotated[
    Path,
    typer.Argument(
        metavar="SPEC", help="A run spec (YAML file). Paths in it are relative to it.", autocompletion=specs
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Set a field of the spec for this time, the value written as YAML: fragment_rows=500, "
        "captioners.0.batch_size=8, thresholds.web=0.4. A relative path in it is relative to the spec. Repeatable; "
        "the last one counts.",
        autocompletion=assignments,
    ),
]
OverlapOk = Annotated[
    bool,
    typer.Option(
        "--overlap-ok",
        help="Exit with code 0, not 4, where another run holds the output, or took it over: for schedulers that take "
        "any other code for a failure.",
    ),
]
Output = Annotated[
    str,
    typer.Argument(
        metavar="OUTPUT",
        help="A curated dataset: its directory or URL, or the curate spec (.yaml) whose output it is. Where its store "
        "needs output_options, give the spec.",
        autocompletion=datasets,
    ),
]
Version = Annotated[
    int | None,
    typer.Option(
        help="Version of the dataset's annotations; the newest if not given.",
        min=0,
        show_default=False,
        autocompletion=versions,
    ),
]


def examples(*lines: str) -> str:
    """The end of a command's help: commands that a user could type."""
    return "\n\n".join(("Examples:", *(f"    {line}" for line in lines)))  # indented: code, on a page made of it


def place_of(output: str) -> tuple[str, dict[str, Any]]:
    """A dataset's location and its storage options.

    Args:
        output: a directory or URL, or the file (.yaml) of the curate spec whose output it is.

    Raises:
        SpecError: the file cannot be used as such, or it is no location.
    """
    if output.endswith((".yaml", ".yml")) and Path(output).is_file():
        spec = load_curate_spec(output)
        return spec.output, spec.output_options
    return output_location(output), {}
