"""The command line: parse, call one function, print. Loads neither torch nor ray until a run begins.

Exit codes: 0 done, 1 failed, 2 bad usage or spec, 3 stopped by the error budget, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from capfilt.errors import CapfiltError, RunInterruptedError
from capfilt.spec import CurateSpec, load_spec

if TYPE_CHECKING:
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
Output = Annotated[str, typer.Argument(metavar="OUTPUT", help="Directory or URL of a curated dataset.")]


@app.command()
def run(spec: SpecFile, overrides: Overrides = None) -> None:
    """Do what a spec says. The same command resumes after a crash and recurates after a change."""
    _run(load_spec(spec, overrides or ()))


def _run(spec: CurateSpec) -> None:
    from capfilt.pipelines.curate import curate

    try:
        with _native_noise_in_a_file() as console:
            summary = curate(spec, console=console)
    except KeyboardInterrupt:
        message = "interrupted; what was finished is kept. Run the same command again to resume"
        raise RunInterruptedError(message) from None
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
    except KeyboardInterrupt:
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
    from capfilt.fragments import list_inputs, read_footer

    loaded = load_spec(spec, overrides or ())
    files = list_inputs(loaded.input, exclude=loaded.output)
    footer = read_footer(files[0], loaded.input.columns, loaded.input.storage_options)
    prints = run_fingerprints(loaded)
    _say(f"{spec}: a valid {loaded.kind} spec")
    _say(
        f"inputs: {len(files):,} files, {sum(file.size for file in files):,} bytes; the first has {footer.rows:,} rows"
    )
    layout = footer.layout
    _say(f"columns: image={layout.image} text={layout.text} url={layout.url} key={layout.key}")
    _say(f"captioner {loaded.captioner.name}, filter {loaded.filter.name}: checkpoints found")
    _say(f"fingerprints: caption {prints.caption}, score {prints.score}, decide {prints.decide}")


@app.command()
def plan(spec: SpecFile, overrides: Overrides = None) -> None:
    """Say what a run would do, and why. Reads listings and the dataset's log only."""
    from capfilt.dataset import CuratedDataset
    from capfilt.fingerprints import run_fingerprints
    from capfilt.plan import make_plan

    loaded = load_spec(spec, overrides or ())
    committed = CuratedDataset.committed_in(loaded.output, loaded.output_options)
    work = make_plan(loaded, run_fingerprints(loaded), committed)
    for why, count in work.reasons.items():
        size = sum(file.size for file, reason in work.todo if reason is why)
        _say(f"curate {count:,} shards ({size:,} bytes): {why}")
    _say(f"leave {len(work.done):,} shards: up to date")
    if work.gone:
        _say(f"keep {len(work.gone):,} shards that are no longer among the inputs")
    if not work.todo:
        _say("nothing to do")


@app.command()
def status(output: Output) -> None:
    """Say what a curated dataset holds, from its tables alone."""
    from capfilt.dataset import CuratedDataset

    dataset = CuratedDataset.for_reading(output, {})
    states = dataset.committed().values()
    _say(f"{output}: versions {', '.join(f'{name} {v}' for name, v in dataset.versions().items())}")
    rows = sum(state.rows for state in states)
    _say(f"{len(states):,} shards, {rows:,} rows")
    table = Table("rows", "status", "reason")
    for (state, reason), count in dataset.reasons().items():
        table.add_row(f"{count:,}", state, reason or "")
    out.print(table)


@app.command()
def vacuum(
    output: Output,
    hours: Annotated[
        float, typer.Option(help="Keep what old versions need if they are younger than this.", min=0)
    ] = 168,
) -> None:
    """Delete files that only versions older than --hours use; those versions can no longer be read then.

    A run that is writing to the output meanwhile is stopped by it, with nothing lost.
    """
    from capfilt.dataset import CuratedDataset

    removed = CuratedDataset.for_writing(output, {}).vacuum(retain_hours=hours)
    _say(f"{removed:,} files removed")


@app.command()
def demo(
    spec: Annotated[Path, typer.Argument(help="The spec to run once its inputs are made.")] = Path(
        "pipelines/demo.yaml"
    ),
    images: Annotated[int, typer.Option(help="Images to render.", min=1)] = 2400,
) -> None:
    """Render a small noisy web, make a pair of tiny random checkpoints, and curate the one with the other."""
    from capfilt.spec import LocalCheckpoint
    from capfilt.toyweb import render

    loaded = load_spec(spec)
    web = Path(loaded.input.paths[0]).parent
    checkpoint = loaded.captioner.checkpoint
    if not isinstance(checkpoint, LocalCheckpoint):
        raise CapfiltError(f"{spec}: the demo makes its own checkpoints; its cards name a local path")
    if not web.exists():
        _say(f"rendering {images:,} images of a small noisy web in {web}")
        render(web, images=images)
    models = Path(checkpoint.path).parent
    if not models.exists():
        from capfilt.models.tiny import write_tiny_pair

        _say(f"writing a tiny captioner and filter with random weights in {models}")
        write_tiny_pair(models)
    _run(loaded)


# --- printing ---


def _say(line: str, console: Console = out) -> None:
    console.print(Text(_printable(line)), highlight=False)


def _printable(text: str) -> str:
    """Without control characters: file names and captions are strangers' text, and terminals obey escapes."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _print_summary(summary: Summary) -> None:
    if not summary.shards and not summary.failures:
        _say(f"nothing to do: {summary.skipped:,} shards are up to date in {summary.output}")
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
    spent = sorted(summary.seconds.items(), key=lambda item: -item[1])
    stages = ", ".join(f"{name} {time:,.1f} s" for name, time in spent)
    if stages:
        _say(f"stages, summed over workers: {stages}")
    _say(f"dataset: {summary.output}/pairs, every row and reason: {summary.output}/annotations")


def main() -> None:
    """The `capfilt` command: prints an error in one line and exits with its code."""
    try:
        app()
    except CapfiltError as error:
        _say(f"capfilt: {error}", err)
        sys.exit(error.exit_code)
