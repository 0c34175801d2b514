"""The command line: parse, call one function, print. Loads neither torch nor ray until a run begins.

Exit codes: 0 done, 1 failed, 2 bad usage or spec, 3 stopped by the error budget, 130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from capfilt.errors import (
    CapfiltError,
    CheckpointError,
    ErrorBudgetError,
    InputError,
    RunInterruptedError,
    SpecError,
)
from capfilt.spec import CurateSpec, HubCheckpoint, LocalCheckpoint, load_curate_spec, output_location

if TYPE_CHECKING:
    from capfilt.dataset import CuratedDataset
    from capfilt.pipelines.curate import Summary

app = typer.Typer(
    help="Turn noisy web image-text pairs into clean ones with BLIP's CapFilt.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="A run spec (YAML). Paths in it are relative to it.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Set a field of the spec, e.g. captioner.batch_size=8. Repeatable."
    ),
]
Output = Annotated[
    str, typer.Argument(metavar="OUTPUT", help="A curated dataset: its directory or URL, or the spec (.yaml) it is of.")
]
_DEMO_SHARDS = 6
_NO_INPUT = "no input is left: every file that input.paths matches lies in the output, {output}"


@app.command()
def run(spec: SpecFile, overrides: Overrides = None) -> None:
    """Do what a spec says. The same command resumes after a crash and recurates after a change."""
    _run(load_curate_spec(spec, overrides or ()))


def _run(spec: CurateSpec) -> Summary:
    from capfilt.pipelines.curate import curate

    summaries: list[Summary] = []
    try:
        with _native_noise_in_a_file() as console:
            return curate(spec, console=console, report=summaries.append)
    except KeyboardInterrupt:
        message = "interrupted; what was finished is kept. Run the same command again to resume"
        raise RunInterruptedError(message) from None
    finally:
        for summary in summaries:
            _print_summary(summary)


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
        with os.fdopen(os.dup(real), "w") as stream:
            yield Console(file=stream, soft_wrap=True)
        done = True
    except (KeyboardInterrupt, ErrorBudgetError, SpecError, CheckpointError):  # Ray had no part in these
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
            _say(f"capfilt: what Ray had to say is in {noise.name}", err)


@app.command()
def check(spec: SpecFile, overrides: Overrides = None) -> None:
    """Validate a spec: its fields, inputs, columns and checkpoints. Runs nothing, writes nothing."""
    from capfilt.fingerprints import run_fingerprints
    from capfilt.fragments import read_footer
    from capfilt.inputs import list_inputs
    from capfilt.weights import inspect

    loaded = load_curate_spec(spec, overrides or ())
    files = list_inputs(loaded.input, exclude=loaded.output)
    if not files:
        raise InputError(f"{spec}: {_NO_INPUT.format(output=loaded.output)}; name others")
    footer = read_footer(files[0], loaded.input.columns, loaded.input.storage_options)
    for card in (loaded.captioner, loaded.filter):
        inspect(card)
    prints = run_fingerprints(loaded)
    _say(f"{spec}: a valid {loaded.kind} spec")
    _say(
        f"inputs: {len(files):,} files, {sum(file.size for file in files):,} bytes; the first has {footer.rows:,} rows"
    )
    layout = footer.layout
    _say(f"columns: image={layout.image} text={layout.text} url={layout.url} key={layout.key}")
    for card in (loaded.captioner, loaded.filter):
        _say(f"{card.role} {card.name}: {_whereabouts(card.checkpoint)}")
    _say(f"fingerprints: caption {prints.caption}, score {prints.score}, decide {prints.decide}")


def _whereabouts(checkpoint: HubCheckpoint | LocalCheckpoint) -> str:
    """Where a checkpoint is. A local one was read for its fingerprint; of a hub's, only the cache is looked at."""
    from capfilt.fingerprints import checkpoint_files
    from capfilt.weights import cached

    if isinstance(checkpoint, LocalCheckpoint):
        return f"found in {checkpoint.path}"
    name = f"{checkpoint.hub} at {checkpoint.revision[:12]}"
    directory = cached(checkpoint)
    if directory is None:
        return f"{name} is not in the cache: will be fetched from the hub at first use"
    try:
        checkpoint_files(directory)
    except CheckpointError:
        return f"{name} is in the cache in part: the rest will be fetched from the hub at first use"
    return f"{name} is in the cache: {directory}"


@app.command()
def plan(spec: SpecFile, overrides: Overrides = None) -> None:
    """Say what a run would do, and why. Reads listings and the dataset's log only."""
    from capfilt.dataset import CuratedDataset
    from capfilt.fingerprints import run_fingerprints
    from capfilt.plan import make_plan

    loaded = load_curate_spec(spec, overrides or ())
    committed = CuratedDataset.committed_in(loaded.output, loaded.output_options)
    work = make_plan(loaded, run_fingerprints(loaded), committed)
    for why, count in work.reasons.items():
        size = sum(file.size for file, reason in work.todo if reason is why)
        _say(f"curate {count:,} shards ({size:,} bytes): {why}")
    _say(f"leave {len(work.done):,} shards: up to date")
    if work.moved:
        _say(f"{work.moved:,} files have moved and keep their shards")
    if work.gone:
        _say(f"keep {len(work.gone):,} shards that are no longer among the inputs")
    if not work.todo:
        _say("nothing to do" if work.done else f"nothing to do: {_NO_INPUT.format(output=loaded.output)}")


@app.command()
def status(output: Output) -> None:
    """Say what a curated dataset holds, from its tables alone."""
    from capfilt.dataset import CuratedDataset

    _print_dataset(CuratedDataset.for_reading(*_place(output)))


def _place(output: str) -> tuple[str, dict[str, Any]]:
    """A dataset's location and its storage options, from the command line's OUTPUT."""
    if output.endswith((".yaml", ".yml")) and Path(output).is_file():
        spec = load_curate_spec(output)
        return spec.output, spec.output_options
    return output_location(output), {}


@app.command()
def vacuum(
    output: Output,
    hours: Annotated[int, typer.Option(help="Keep what old versions need if they are younger than this.", min=0)] = 168,
) -> None:
    """Delete files that only versions older than --hours use; those versions can no longer be read then.

    A run that is writing to the output meanwhile is stopped by it, with nothing lost.
    """
    from capfilt.dataset import CuratedDataset

    place, options = _place(output)
    CuratedDataset.for_reading(place, options)  # which makes none, where the name is mistyped
    removed = CuratedDataset.for_writing(place, options).vacuum(retain_hours=hours)
    _say(f"{removed:,} files removed")


@app.command()
def demo(
    spec: Annotated[Path, typer.Argument(help="The spec to run once its inputs are made.")] = Path(
        "pipelines/demo.yaml"
    ),
    images: Annotated[
        int | None, typer.Option(help="Images to render; 2400 if not given.", min=_DEMO_SHARDS, show_default=False)
    ] = None,
) -> None:
    """Render a small noisy web, make a pair of tiny random checkpoints, and curate the one with the other."""
    from capfilt.dataset import CuratedDataset
    from capfilt.fragments import read_footer
    from capfilt.inputs import list_inputs
    from capfilt.toyweb import render

    loaded = load_curate_spec(spec)
    web = Path(loaded.input.paths[0]).parent
    checkpoint = loaded.captioner.checkpoint
    if not isinstance(checkpoint, LocalCheckpoint):
        raise CapfiltError(f"{spec}: the demo makes its own checkpoints; its cards name a local path")
    if not (web / "shards").exists():
        count = images or 2400
        _say(f"rendering {count:,} images of a small noisy web in {web}")
        render(web, images=count, shards=_DEMO_SHARDS)
    elif images is not None:
        source = loaded.input
        footers = (read_footer(file, source.columns, source.storage_options) for file in list_inputs(source))
        if (there := sum(footer.rows for footer in footers)) != images:
            raise CapfiltError(f"{web} holds {there:,} images, not {images:,}; delete it to render it anew")
    models = Path(checkpoint.path).parent
    if not all((models / role).exists() for role in ("captioner", "filter")):
        from capfilt.models.tiny import write_tiny_pair

        _say(f"writing a tiny captioner and filter with random weights in {models}")
        write_tiny_pair(models)
    if not _run(loaded).shards:  # what an earlier run did is to be seen as well
        _print_dataset(CuratedDataset.for_reading(loaded.output, loaded.output_options))


# --- printing ---


def _say(line: str, console: Console = out) -> None:
    console.print(Text(_printable(line)), highlight=False)


def _printable(text: str) -> str:
    """Without control characters: file names and captions are strangers' text, and terminals obey escapes."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _print_summary(summary: Summary) -> None:
    if summary.outcome != "done" and not summary.shards and not summary.failures:
        return
    if not summary.shards and not summary.failures:
        done = f"{summary.skipped:,} shards are up to date in {summary.output}"
        _say(f"nothing to do: {done if summary.skipped else _NO_INPUT.format(output=summary.output)}")
        return
    counts, seconds = summary.counts, summary.elapsed
    rows = Table("rows", "", title=f"run {summary.run}", title_justify="left")
    rows.add_row(f"{counts.rows:,}", f"in {summary.shards:,} shards, in {seconds:,.1f} s")
    for name, count in (("kept", counts.kept), ("dropped", counts.dropped), ("errors", counts.errors)):
        rows.add_row(f"{count:,}", f"{name} ({count / max(1, counts.rows):.1%})")
    for reason, count in summary.reasons.most_common():
        if ":" not in reason and reason != "kept":
            rows.add_row(f"{count:,}", f"  {reason}")
    out.print(rows)
    texts = Table("texts", "source", "verdict")
    for reason, count in sorted(summary.reasons.items()):
        if ":" in reason:
            texts.add_row(f"{count:,}", *reason.split(":"))
    if texts.row_count:
        out.print(texts)
    if summary.skipped:
        _say(f"{summary.skipped:,} shards were up to date")
    if summary.adopted_rows:
        _say(f"{summary.adopted_rows:,} rows were taken over from an interrupted run")
    for message in summary.failures.values():
        _say(f"not curated: {message}")
    if summary.gone:
        _say(f"{summary.gone:,} shards are no longer among the inputs; their rows stay in the dataset")
    spent = sorted(summary.seconds.items(), key=lambda item: -item[1])
    stages = ", ".join(f"{name} {time:,.1f} s" for name, time in spent)
    if stages:
        _say(f"stages, summed over workers: {stages}")
    _say_where(summary.output)


def _print_dataset(dataset: CuratedDataset) -> None:
    states = dataset.committed().values()
    _say(f"{dataset.output}: versions {', '.join(f'{name} {v}' for name, v in dataset.versions().items())}")
    _say(f"{len(states):,} shards, {sum(state.rows for state in states):,} rows")
    table = Table("rows", "status", "reason")
    for (state, reason), count in dataset.reasons().items():
        table.add_row(f"{count:,}", state, reason or "")
    out.print(table)
    _say_where(dataset.output)


def _say_where(output: str) -> None:
    _say(f"dataset: {output}/pairs, every row and reason: {output}/annotations")


def main() -> None:
    """The `capfilt` command: prints an error in one line and exits with its code. A bug shows its traceback."""
    try:
        app()
    except CapfiltError as error:
        for traceback in getattr(error, "__notes__", ()):  # a worker's, of what no one foresaw
            _say(traceback.rstrip(), err)
        _say(f"capfilt: {error}", err)
        sys.exit(error.exit_code)
    except Exception as error:
        from deltalake.exceptions import DeltaError

        if not isinstance(error, OSError | DeltaError):
            raise
        message = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
        _say(f"capfilt: {type(error).__name__}: {message}", err)
        _say("what was finished is kept; mend this and run again to resume", err)
        sys.exit(1)
