"""Commands on a curated dataset: what it holds, what changed, a report, a page to look at it, and its old files."""

from __future__ import annotations

import json
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Annotated

import typer

from capfilt.arguments import DATASETS, Output, Version, examples, place_of
from capfilt.completion import versions, versions_or_datasets
from capfilt.errors import CapfiltError, DatasetError
from capfilt.printing import print_dataset, print_diff, print_holder, print_runs
from capfilt.terminal import counted, err, say

commands = typer.Typer()


@commands.command(
    rich_help_panel=DATASETS, epilog=examples("capfilt status runs/mine", "capfilt status pipelines/mine.yaml")
)
def status(output: Output) -> None:
    """Say what a curated dataset holds, its versions, and which run holds it.

    Reads the tables' logs and the lease; writes nothing.
    """
    from capfilt.dataset import CuratedDataset
    from capfilt.holder import standing

    place = place_of(output)
    dataset = CuratedDataset.for_reading(*place)
    print_holder(standing(*place))
    print_dataset(dataset)


@commands.command(
    rich_help_panel=DATASETS, epilog=examples("capfilt runs runs/mine", "capfilt runs runs/mine --last 3 --json")
)
def runs(
    output: Output,
    last: Annotated[int, typer.Option(help="How many runs, the newest first.", min=1)] = 20,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all that is on record of them as JSON, instead of a table.")
    ] = False,
) -> None:
    """List the runs on record: when, how long, what came of it, and what it cost.

    Reads _runs/ in the output; writes nothing. With --json, `details.versions.annotations` is the version that a run
    left.
    """
    from capfilt.dataset import CuratedDataset

    records = CuratedDataset.for_reading(*place_of(output)).runs(last)
    if as_json:
        typer.echo(json.dumps([record.as_json() for record in records], indent=1))
    else:
        print_runs(records)


@commands.command(
    rich_help_panel=DATASETS,
    epilog=examples(
        "capfilt report s3://my-bucket/laion-curated",
        "capfilt report runs/mine --to mine.html --version 8 --against 4",
        "capfilt report runs/round-2/curated --against runs/round-1/curated",
        "capfilt report runs/mine --truth mine-marks.parquet",
    ),
)
def report(
    output: Output,
    to: Annotated[
        Path | None,
        typer.Option(help="The HTML file to write; NAME-version-N.html here if not given.", show_default=False),
    ] = None,
    version: Version = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="VERSION|OUTPUT",
            help="Version to compare with; or another curated dataset, as OUTPUT is given, whose newest version it is. "
            "The version that the run before left if not given.",
            show_default=False,
            autocompletion=versions_or_datasets,
        ),
    ] = None,
    truth: Annotated[
        str | None,
        typer.Option(
            help="Which texts are true: a Parquet file of labels (image_sha256, text, true), such as the marks of "
            "`capfilt view`, or the directory of a rendered toy web; no calibration and precision if not given.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write one HTML file about a curated dataset: what was kept, what was not, and why. It opens offline.

    Reads the tables, and images for the gallery; writes the one file, of at most 10 MB.
    """
    from capfilt.dataset import CuratedDataset
    from capfilt.report import make_report
    from capfilt.report.judged import truth_at

    place, options = place_of(output)
    if to and not to.parent.is_dir():
        raise CapfiltError(f"{to}: no such directory; name another file with --to")
    dataset = CuratedDataset.for_reading(place, options)
    known = truth_at(truth) if truth else None
    before: int | CuratedDataset | None = None
    if against:
        before = int(against) if against.isdecimal() else CuratedDataset.for_reading(*place_of(against))
    made = make_report(dataset, options, version=version, against=before, truth=known)
    file = to or Path(f"{place.rstrip('/').rpartition('/')[2]}-version-{made.version}.html")
    try:
        file.write_bytes(made.html)
    except OSError as error:
        raise CapfiltError(f"{file}: cannot be written: {error.strerror}; name another file with --to") from error
    compared = "" if made.against is None else f", compared with version {made.against}"
    compared += f" of {made.other}" if made.other else ""
    say(f"{file}: version {made.version} of {place}, {counted(made.rows, 'row')}{compared}")


@commands.command(
    rich_help_panel=DATASETS,
    epilog=examples(
        "capfilt diff runs/mine 41 57", "capfilt diff runs/mine 41 --json", "capfilt diff runs/mine 41 --rows c.parquet"
    ),
)
def diff(
    output: Output,
    before: Annotated[
        int | None,
        typer.Argument(
            metavar="V1",
            help="Version of the annotations to begin with; the one that the run before left, if not given.",
            min=0,
            show_default=False,
            autocompletion=versions,
        ),
    ] = None,
    after: Annotated[
        int | None,
        typer.Argument(
            metavar="V2",
            help="A later one; the newest if not given.",
            min=0,
            show_default=False,
            autocompletion=versions,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON, instead of tables.")] = False,
    rows: Annotated[
        Path | None,
        typer.Option(
            help="Parquet file to write the rows that changed to, with both outcomes and texts; none if not given.",
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say what changed between two versions: rows gained and lost, other texts, and for which reasons.

    Reads the files of annotations in which the two differ; writes none but --rows.
    """
    from capfilt.dataset import CuratedDataset
    from capfilt.diff import ChangedRows, diff
    from capfilt.records import earlier

    dataset = CuratedDataset.for_reading(*place_of(output))
    if before is None:
        before = earlier(
            dataset.versions()["annotations"], [run.version for run in dataset.runs() if run.version is not None]
        )
        if before is None:
            raise DatasetError(f"{dataset.output}: no run before the last is on record; name a version: V1")
    with ExitStack() as stack:
        sink = stack.enter_context(ChangedRows(rows)) if rows else None
        found = diff(dataset, before, after, sink.write if sink else None)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1))
    else:
        print_diff(found)
        if rows:
            say(f"rows: {rows}")


@commands.command(
    rich_help_panel=DATASETS,
    epilog=examples(
        "capfilt view runs/mine",
        "capfilt view runs/mine --version 12 --against 11",
        "capfilt view runs/mine --port 8123",
        "ssh -L 8123:127.0.0.1:8123 HOST   (on your own machine, if that runs on HOST)",
    ),
)
def view(
    output: Output,
    version: Version = None,
    against: Annotated[
        int | None,
        typer.Option(
            help="Another version, to show beside it what changed; none if not given.",
            min=0,
            show_default=False,
            autocompletion=versions,
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(help="Port on this machine's loopback address; 0 is any that is free.", min=0, max=65535)
    ] = 0,
    marks: Annotated[
        Path | None,
        typer.Option(
            help="Parquet file that marks are kept in, made when there is none; NAME-marks.parquet here if not given.",
            show_default=False,
        ),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(
            help="File of the search index, made when there is none; in ~/.cache/capfilt/view if not given.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a page to look through a curated dataset, compare two versions, and mark texts right or wrong.

    Needs `pip install 'capfilt[view]'`. For this machine's users who have the address it prints; Ctrl-C ends it. Reads
    the tables, and images from the pairs or the input; writes the index and the marks, which are labels for
    `kind: evaluate`.
    """
    place, options = place_of(output)
    say(f"capfilt: opening {place}", err)  # what is imported, and the log, may take some seconds to read
    try:
        from capfilt.view.explorer import Explorer
        from capfilt.view.server import Server
    except ModuleNotFoundError as error:
        raise CapfiltError(f"view needs {error.name}: pip install 'capfilt[view]'") from None

    file = str(marks or f"{Path(place.rstrip('/')).name}-marks.parquet")
    with closing(Explorer(place, options, version, against, file, str(index) if index else None)) as explorer:
        server = Server(explorer, port)
        say(f"open {server.url}")
        explorer.index.build()  # not before: it takes all cores
        with suppress(KeyboardInterrupt):
            server.run()


@commands.command(
    rich_help_panel=DATASETS, epilog=examples("capfilt vacuum runs/mine", "capfilt vacuum runs/mine --hours 0")
)
def vacuum(
    output: Output,
    hours: Annotated[
        int, typer.Option(help="Hours that a file stays which only older versions need; 168 are a week.", min=0)
    ] = 168,
) -> None:
    """Delete files that only versions older than --hours use; those versions can no longer be read then.

    What the newest version holds is never touched. Refused, with exit code 4, while a run holds the output.
    """
    from capfilt.dataset import CuratedDataset
    from capfilt.lease import Lease

    place, options = place_of(output)
    CuratedDataset.for_reading(place, options)  # which makes none, where the name is mistyped
    with Lease(place, options, "vacuum", say=lambda line: say(f"capfilt: {line}", err)):
        removed = CuratedDataset.for_writing(place, options).vacuum(retain_hours=hours)
    say(f"{counted(removed, 'file')} removed")
