"""The command line: parse, call one function, print. Loads neither torch nor ray until a run begins.

Exit codes: 0 done, 1 failed, 2 bad usage or spec, 3 stopped by the error budget, 4 another run holds
the output, 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from capfilt import logs
from capfilt.arguments import Overrides, SpecFile
from capfilt.errors import (
    CapfiltError,
    CheckpointError,
    ConflictError,
    ErrorBudgetError,
    InputError,
    RunInterruptedError,
    SpecError,
)
from capfilt.job_commands import job_app, submit
from capfilt.last_words import last_words
from capfilt.printing import (
    NO_INPUT,
    print_bootstrap,
    print_dataset,
    print_demo,
    print_diff,
    print_evaluation,
    print_export,
    print_holder,
    print_ingest,
    print_runs,
    print_summary,
    print_training,
)
from capfilt.spec import (
    AnyCard,
    BootstrapSpec,
    Checkpoint,
    CurateSpec,
    EndpointCard,
    EvaluateSpec,
    ExportSpec,
    IngestSpec,
    Input,
    LocalCheckpoint,
    PretrainSettings,
    PretrainSpec,
    Quality,
    RunSpec,
    Truth,
    load_curate_spec,
    load_spec,
    output_location,
)
from capfilt.terminal import err, say

if TYPE_CHECKING:
    from capfilt.fragments import Layout
    from capfilt.pipelines.curate import Summary
    from capfilt.weights import Complete

app = typer.Typer(
    help="Turn noisy web image-text pairs into clean ones with BLIP's CapFilt.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
app.command()(submit)
app.add_typer(job_app, name="job")

Output = Annotated[
    str, typer.Argument(metavar="OUTPUT", help="A curated dataset: its directory or URL, or the spec (.yaml) it is of.")
]
_DEMO_SHARDS = 6
_DEMO_SEED = 1_000  # of a web that no checkpoint was trained on


@app.command()
def run(spec: SpecFile, overrides: Overrides = None) -> None:
    """Do what a spec says. The same command resumes after a crash and recurates after a change."""
    loaded = load_spec(spec, overrides or ())
    if isinstance(loaded, CurateSpec):
        _curate(loaded)
        return
    from capfilt.pipelines.run import run

    try:
        with _native_noise_in_a_file() as console:
            if isinstance(loaded, EvaluateSpec):
                print_evaluation(run(loaded, console=console))
            elif isinstance(loaded, BootstrapSpec):
                print_bootstrap(run(loaded, console=console))
            elif isinstance(loaded, IngestSpec):
                print_ingest(run(loaded, console=console))
            elif isinstance(loaded, ExportSpec):
                print_export(run(loaded, console=console))
            else:
                print_training(run(loaded, console=console))
    except KeyboardInterrupt:
        message = "interrupted; what is done, and the newest state, are kept. Run the same command again"
        raise RunInterruptedError(message) from None


def _curate(spec: CurateSpec) -> Summary:
    from capfilt.pipelines.curate import curate

    summaries: list[Summary] = []
    try:
        with _native_noise_in_a_file() as console:
            console.quiet = logs.begun()  # it says all of it in events
            return curate(spec, console=console, report=summaries.append)
    except KeyboardInterrupt:
        message = "interrupted; what was finished is kept. Run the same command again to resume"
        raise RunInterruptedError(message) from None
    finally:
        for summary in summaries:
            print_summary(summary)


@contextmanager
def _native_noise_in_a_file() -> Iterator[Console]:
    """Keep what Ray's native code writes to descriptor 2 off the terminal, in a file that is left where a run fails.

    Yields a console on the real standard error.
    """
    sys.stderr.flush()
    real = os.dup(2)
    noise = tempfile.NamedTemporaryFile("wb", prefix="capfilt-", suffix=".log", delete=False)  # noqa: SIM115
    os.dup2(noise.fileno(), 2)
    done = False
    try:
        with last_words(noise.name, real), os.fdopen(os.dup(real), "w") as stream:
            yield logs.console() if logs.begun() else Console(file=stream, soft_wrap=True)
        done = True
    except (KeyboardInterrupt, ConflictError, ErrorBudgetError, SpecError, CheckpointError):  # Ray had no part in these
        done = True
        raise
    finally:
        sys.stderr.flush()
        os.dup2(real, 2)
        os.close(real)
        noise.close()
        if done or not os.path.getsize(noise.name):
            os.unlink(noise.name)
        else:
            say(f"capfilt: what Ray had to say is in {noise.name}", err)


@app.command()
def check(spec: SpecFile, overrides: Overrides = None) -> None:
    """Validate a spec: its fields, the inputs it lists, their columns, its cards. Runs nothing, writes nothing."""
    loaded = load_spec(spec, overrides or ())
    for line in [f"{spec}: a valid {loaded.kind} spec", *_checked(loaded)]:  # printed once all is found good
        say(line)


def _checked(loaded: RunSpec) -> Iterator[str]:
    """What a look at a spec's inputs and cards finds."""
    if isinstance(loaded, CurateSpec):
        from capfilt.fingerprints import run_fingerprints

        inputs, layout = _check_input(loaded.input, loaded.output)
        yield inputs
        yield f"columns: image={layout.image} text={layout.text} url={layout.url} key={layout.key}"
        if loaded.withdrawn:
            from capfilt.withdrawn import read_lists

            lists = read_lists(loaded.withdrawn)
            yield f"withdrawn: {len(lists.urls):,} URLs, {len(lists.keys):,} keys"
        yield from _check_cards(*loaded.cards.values())
        prints = run_fingerprints(loaded)
        yield f"fingerprints: caption {prints.caption}, score {prints.score}, decide {prints.decide}"
    elif isinstance(loaded, BootstrapSpec):
        yield from (_check_input(source)[0] for source in (loaded.web, loaded.human, loaded.evaluate.pairs) if source)
        yield from _check_starts(loaded.pretrain)
        yield from _check_truths(loaded.truth, loaded.evaluate.truth)
    elif isinstance(loaded, EvaluateSpec):
        if loaded.pairs:
            yield _check_input(loaded.pairs)[0]
        yield from _check_cards(loaded.captioner, *loaded.judges)
        yield from _check_truths(loaded.truth, *(quality.truth for quality in loaded.quality))
    elif isinstance(loaded, IngestSpec):
        from capfilt.ingest import describe

        yield from describe(loaded)
    elif isinstance(loaded, ExportSpec):
        from capfilt.export.driver import look

        yield from look(loaded)
    else:
        from capfilt.examples import list_parts, oversized

        parts, versions = list_parts(loaded.data)
        yield f"data: {sum(part.rows for part in parts):,} rows in {len({part.url for part in parts}):,} files"
        if said := oversized(parts):
            yield said
        yield from (f"dataset {dataset}: version {version} of its pairs" for dataset, version in versions.items())
        yield from _check_starts(loaded) if isinstance(loaded, PretrainSpec) else _check_cards(loaded.start)


def _check_input(source: Input, output: str | None = None) -> tuple[str, Layout]:
    """List an input and read its first footer: a line on it, and its columns."""
    from capfilt.fragments import read_footer
    from capfilt.inputs import list_inputs

    files = list_inputs(source, exclude=output)
    if not files:
        raise InputError(f"{NO_INPUT.format(output=output)}; name others")
    footer = read_footer(files[0], source.columns, source.storage_options)
    size = sum(file.size for file in files)
    line = f"inputs: {len(files):,} files, {size:,} bytes; the first has {footer.rows:,} rows"
    return line, footer.layout


def _check_cards(*cards: AnyCard | None) -> Iterator[str]:
    from capfilt.weights import files_of, inspect

    for card in cards:
        if isinstance(card, EndpointCard):
            yield f"{card.role} {card.name}: {card.served_model} at {card.base_url}: will be asked when a run begins"
        elif card is not None:
            inspect(card)
            yield f"{card.role} {card.name}: {_whereabouts(card.checkpoint, files_of(card))}"


def _check_starts(settings: PretrainSettings) -> Iterator[str]:
    from capfilt.weights import inspect_starts

    for field, (checkpoint, complete) in inspect_starts(settings).items():
        yield f"{field}: {_whereabouts(checkpoint, complete)}"


def _check_truths(*truths: Truth | None) -> Iterator[str]:
    from capfilt.truth import read_truth

    for truth in truths:
        if truth is not None:
            read_truth(truth)
            yield f"truth: read from {', '.join(truth.labels.paths) if truth.labels else truth.toyweb}"


def _whereabouts(checkpoint: Checkpoint, complete: Complete) -> str:
    """Where a checkpoint is. A local one has been looked at; of a hub's, only the cache is.

    Args:
        complete: raises CheckpointError where a directory lacks what is needed of it.
    """
    from capfilt.weights import cached

    if isinstance(checkpoint, LocalCheckpoint):
        return f"found in {checkpoint.path}"
    name = f"{checkpoint.hub} at {checkpoint.revision[:12]}"
    directory = cached(checkpoint)
    if directory is None:
        return f"{name} is not in the cache: will be fetched from the hub at first use"
    try:
        complete(directory)
    except CheckpointError:
        return f"{name} is in the cache in part: the rest will be fetched from the hub at first use"
    return f"{name} is in the cache: {directory}"


@app.command()
def plan(spec: SpecFile, overrides: Overrides = None) -> None:
    """Say what a run would do, why, and how long it would take. Reads listings, logs and run records only.

    (And annotations' URLs and keys, where they were not compared yet with the lists of what is withdrawn.)
    """
    from capfilt.dataset import CuratedDataset
    from capfilt.fingerprints import run_fingerprints
    from capfilt.pace import NEWEST, costs, last_paces
    from capfilt.plan import plan_run

    if isinstance(loaded := load_spec(spec, overrides or ()), IngestSpec):
        from capfilt.ingest import make_plan as plan_ingest

        for line in plan_ingest(loaded).lines():
            say(line)
        return
    loaded = load_curate_spec(spec, overrides or ())
    work = plan_run(loaded, run_fingerprints(loaded))
    for why, count in work.reasons.items():
        size = sum(file.size for file, reason in work.todo if reason is why)
        say(f"curate {count:,} shards{f' ({size:,} bytes)' if size else ''}: {why}")
    records = CuratedDataset(loaded.output, loaded.output_options).runs(NEWEST)
    for cost in costs(work, last_paces(records)):
        say(str(cost))
    if hits := work.withdrawals.hits:
        say(f"withdraw {sum(map(len, hits.values())):,} rows of {len(hits):,} shards that are in the dataset")
    say(f"leave {len(work.done):,} shards: up to date")
    if work.moved:
        say(f"{work.moved:,} files have moved and keep their shards")
    if work.gone:
        say(f"keep {len(work.gone):,} shards that are no longer among the inputs")
    copies = loaded.duplicates and (work.todo or not CuratedDataset.settled_in(loaded.output, loaded.output_options))
    if copies:
        say("then look for copies among all rows, and decide those shards anew whose copies are others")
    elif not work.todo:
        say("nothing to do" if work.done else f"nothing to do: {NO_INPUT.format(output=loaded.output)}")


@app.command()
def status(output: Output) -> None:
    """Say what a curated dataset holds, from its tables alone, and which run holds it."""
    from capfilt.dataset import CuratedDataset
    from capfilt.holder import standing

    place = _place(output)
    print_dataset(CuratedDataset.for_reading(*place))
    print_holder(standing(*place))


@app.command()
def runs(
    output: Output,
    last: Annotated[int, typer.Option(help="Of the newest runs, so many.", min=1)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="All that is on record of them, for machines.")] = False,
) -> None:
    """List the runs on record: when, how long, what came of it, and what it cost."""
    from capfilt.dataset import CuratedDataset

    records = CuratedDataset.for_reading(*_place(output)).runs(last)
    if as_json:
        typer.echo(json.dumps([record.as_json() for record in records], indent=1))
    else:
        print_runs(records)


def _place(output: str) -> tuple[str, dict[str, Any]]:
    """A dataset's location and its storage options, from the command line's OUTPUT."""
    if output.endswith((".yaml", ".yml")) and Path(output).is_file():
        spec = load_curate_spec(output)
        return spec.output, spec.output_options
    return output_location(output), {}


@app.command()
def diff(
    output: Output,
    before: Annotated[
        int, typer.Argument(metavar="V1", help="A version of the annotations; `status` and `runs` say which.", min=0)
    ],
    after: Annotated[
        int | None, typer.Argument(metavar="[V2]", help="A later one; the newest if not given.", min=0)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The counts, for machines.")] = False,
    rows: Annotated[
        Path | None, typer.Option(help="Write the rows that changed to this Parquet file.", dir_okay=False)
    ] = None,
) -> None:
    """Say what changed between two versions: rows gained and lost, other texts, and for which reasons."""
    from capfilt.dataset import CuratedDataset
    from capfilt.diff import ChangedRows, diff

    dataset = CuratedDataset.for_reading(*_place(output))
    with ExitStack() as stack:
        sink = stack.enter_context(ChangedRows(rows)) if rows else None
        found = diff(dataset, before, after, sink.write if sink else None)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1))
    else:
        print_diff(found)
        if rows:
            say(f"rows: {rows}")


@app.command()
def report(
    output: Output,
    to: Annotated[
        Path | None, typer.Option(help="The file; <name>-version-<N>.html if not given.", show_default=False)
    ] = None,
    version: Annotated[int | None, typer.Option(help="Of the dataset; the newest if not given.", min=0)] = None,
    against: Annotated[
        int | None, typer.Option(help="A version to compare with; what the run before left, if not given.", min=0)
    ] = None,
    truth: Annotated[
        str | None, typer.Option(help="Labels (Parquet), or a rendered toy web: which texts are true.")
    ] = None,
) -> None:
    """Write one HTML file about a curated dataset: what was kept, what was not, and why. It opens offline."""
    from capfilt.dataset import CuratedDataset
    from capfilt.report import make_report
    from capfilt.report.judged import truth_at

    place, options = _place(output)
    if to and not to.parent.is_dir():
        raise CapfiltError(f"{to}: no such directory; name another file with --to")
    dataset = CuratedDataset.for_reading(place, options)
    known = truth_at(truth) if truth else None
    made = make_report(dataset, options, version=version, against=against, truth=known)
    file = to or Path(f"{place.rstrip('/').rpartition('/')[2]}-version-{made.version}.html")
    try:
        file.write_bytes(made.html)
    except OSError as error:
        raise CapfiltError(f"{file}: cannot be written: {error.strerror}; name another file with --to") from error
    compared = "" if made.against is None else f", compared with version {made.against}"
    say(f"{file}: version {made.version} of {place}, {made.rows:,} rows{compared}")


@app.command()
def vacuum(
    output: Output,
    hours: Annotated[int, typer.Option(help="Keep what old versions need if they are younger than this.", min=0)] = 168,
) -> None:
    """Delete files that only versions older than --hours use; those versions can no longer be read then.

    Refused, with exit code 4, while a run holds the output.
    """
    from capfilt.dataset import CuratedDataset
    from capfilt.lease import Lease

    place, options = _place(output)
    CuratedDataset.for_reading(place, options)  # which makes none, where the name is mistyped
    with Lease(place, options, "vacuum", say=lambda line: say(f"capfilt: {line}", err)):
        removed = CuratedDataset.for_writing(place, options).vacuum(retain_hours=hours)
    say(f"{removed:,} files removed")


@app.command()
def view(
    output: Output,
    version: Annotated[int | None, typer.Option(help="Of the annotations; the newest if not given.", min=0)] = None,
    against: Annotated[int | None, typer.Option(help="Another version, to show what changed.", min=0)] = None,
    port: Annotated[int, typer.Option(help="On this machine's loopback address; 0 is any.", min=0, max=65535)] = 0,
    marks: Annotated[
        Path | None, typer.Option(help="Parquet file for marks; NAME-marks.parquet here if not given.")
    ] = None,
    index: Annotated[Path | None, typer.Option(help="Search index; in the user's cache if not given.")] = None,
) -> None:
    """Serve a page to look through a curated dataset, compare two versions, and mark texts right or wrong.

    For this machine's users who have the address it prints; Ctrl-C ends it. Marks are labels for `kind: evaluate`.
    """
    try:
        from capfilt.view.explorer import Explorer
        from capfilt.view.server import Server
    except ModuleNotFoundError as error:
        raise CapfiltError(f"view needs {error.name}: pip install 'capfilt[view]'") from None

    place, options = _place(output)
    file = str(marks or f"{Path(place.rstrip('/')).name}-marks.parquet")
    with closing(Explorer(place, options, version, against, file, str(index) if index else None)) as explorer:
        server = Server(explorer, port)
        explorer.index.build()
        say(f"open {server.url}")
        with suppress(KeyboardInterrupt):
            server.run()


@app.command()
def toyweb(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Gets web/, human/ and test/.")],
    images: Annotated[int, typer.Option(help="Of the web.", min=1)] = 10_000,
    noise: Annotated[float, typer.Option(help="Fraction of the web's texts.", min=0, max=1)] = 0.8,
    human: Annotated[int, typer.Option(help="Clean pairs.", min=1)] = 4_000,
    test: Annotated[int, typer.Option(help="Test pairs; 576 scenes are one set.", min=1)] = 576,
    shards: Annotated[int, typer.Option(help="Files of the web.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.", min=0)] = 0,
) -> None:
    """Render a small learnable web: noisy pairs with their truth, clean pairs, and a test set."""
    from capfilt.toyweb import render, render_clean

    try:
        web = render(directory / "web", images=images, noise=noise, shards=shards, seed=seed)
        render_clean(directory / "human", images=human, seed=2 * seed + 1)
        render_clean(directory / "test", images=test, seed=2 * seed)
    except ValueError as error:
        raise SpecError(f"toyweb: {error}") from None
    say(f"{directory}: {web.images:,} pictures of the web, {human:,} clean pairs, {test:,} to test with")


@app.command()
def demo(
    spec: Annotated[Path, typer.Argument(help="The spec to run once its inputs are made.")] = Path(
        "pipelines/demo.yaml"
    ),
    images: Annotated[
        int | None, typer.Option(help="Images to render; 2400 if not given.", min=_DEMO_SHARDS, show_default=False)
    ] = None,
) -> None:
    """Render a small noisy web, curate it with small trained models, and compare the outcome with the truth."""
    from capfilt.dataset import CuratedDataset
    from capfilt.demo import findings
    from capfilt.fragments import read_footer
    from capfilt.inputs import list_inputs
    from capfilt.quality import measure_quality
    from capfilt.toyweb import render

    loaded = load_curate_spec(spec)
    web = Path(loaded.input.paths[0]).parent
    if not (web / "shards").exists():
        count = images or 2400
        say(f"rendering {count:,} images of a small noisy web in {web}")
        render(web, images=count, shards=_DEMO_SHARDS, seed=_DEMO_SEED)
    elif images is not None:
        source = loaded.input
        footers = (read_footer(file, source.columns, source.storage_options) for file in list_inputs(source))
        if (there := sum(footer.rows for footer in footers)) != images:
            raise CapfiltError(f"{web} holds {there:,} images, not {images:,}; delete it to render it anew")
    ran = _curate(loaded)
    dataset = CuratedDataset.for_reading(loaded.output, loaded.output_options)
    if not ran.shards:  # what an earlier run did is to be seen as well
        print_dataset(dataset)
    quality = measure_quality(Quality(dataset=loaded.output, truth=Truth(toyweb=str(web))))
    print_demo(quality, findings(dataset, web))


def main() -> None:
    """The `capfilt` command: prints an error in one line and exits with its code. A bug shows its traceback."""
    try:
        logs.begin()
        app()
    except CapfiltError as error:
        _fail(error, str(error), error.exit_code, getattr(error, "__notes__", ()))  # a worker's, of what no one foresaw
    except Exception as error:  # noqa: BLE001 - reported, with its traceback where no one foresaw it
        from deltalake.exceptions import DeltaError

        message = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
        message = f"{type(error).__name__}: {message}"
        if isinstance(error, OSError | DeltaError):
            _fail(error, message, 1, hint="what was finished is kept; mend this and run again to resume")
        _fail(error, message, 1, [traceback.format_exc()], "this is a bug of capfilt; what was finished is kept")


def _fail(error: Exception, message: str, code: int, tracebacks: Sequence[str] = (), hint: str = "") -> NoReturn:
    if logs.begun():
        kind, trace = type(error).__name__, "".join(tracebacks)
        logs.event("failed", logging.ERROR, error=kind, message=message, exit_code=code, traceback=trace)
    else:
        for trace in tracebacks:
            say(trace.rstrip(), err)
        say(f"capfilt: {message}", err)
        if hint:
            say(hint, err)
    sys.exit(code)
