"""`capfilt check`, `plan` and `run`: what is done with a spec. Torch and Ray are loaded when a run begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from capfilt import logs
from capfilt.arguments import RUNS, OverlapOk, Overrides, SpecFile, examples
from capfilt.errors import ConflictError
from capfilt.native_noise import native_noise_in_a_file
from capfilt.printing import (
    NO_INPUT,
    print_bootstrap,
    print_evaluation,
    print_export,
    print_ingest,
    print_summary,
    print_training,
)
from capfilt.spec import (
    BootstrapSpec,
    CurateSpec,
    EvaluateSpec,
    ExportSpec,
    IngestSpec,
    RunSpec,
    load_curate_spec,
    load_spec,
)
from capfilt.terminal import counted, err, say

if TYPE_CHECKING:
    from capfilt.pipelines.curate import Summary

commands = typer.Typer()


@commands.command(
    rich_help_panel=RUNS,
    epilog=examples("capfilt check pipelines/mine.yaml", "capfilt check pipelines/mine.yaml --set input.paths=new/"),
)
def check(spec: SpecFile, overrides: Overrides = None) -> None:
    """Look whether a spec can be run: its fields, inputs, columns, model cards and checkpoints.

    Reads the spec, listings, one footer and the checkpoints' configurations. Runs nothing, writes nothing. Exit code 2:
    the spec is wrong; 1: what it names is.
    """
    from capfilt.check import look

    loaded = load_spec(spec, overrides or ())
    for line in [f"{spec}: a valid {loaded.kind} spec", *look(loaded)]:  # printed once all is found good
        say(line)


@commands.command(
    rich_help_panel=RUNS,
    epilog=examples("capfilt plan pipelines/mine.yaml", "capfilt plan pipelines/mine.yaml --set thresholds.web=0.4"),
)
def plan(spec: SpecFile, overrides: Overrides = None) -> None:
    """Say what a run would do, why, and how long it would take. For specs of kind curate and ingest.

    Reads listings, logs and run records (and annotations' URLs and keys, where they were not compared yet with the
    lists of what is withdrawn). Runs nothing, writes nothing.
    """
    from capfilt.dataset import CuratedDataset
    from capfilt.fingerprints import run_fingerprints
    from capfilt.pace import costs, last_paces
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
        say(f"curate {counted(count, 'shard')}{f' ({size:,} bytes)' if size else ''}: {why}")
    records = CuratedDataset(loaded.output, loaded.output_options).each_run()
    for cost in costs(work, last_paces(records)):
        say(str(cost))
    if hits := work.withdrawals.hits:
        say(f"withdraw {counted(sum(map(len, hits.values())), 'row')} of {counted(len(hits), 'shard')} in the dataset")
    say(f"leave {counted(len(work.done), 'shard')}: up to date")
    if work.moved:
        say(f"moved: {counted(work.moved, 'file')}, shards kept")
    if work.gone:
        say(f"keep {counted(len(work.gone), 'shard')}: no longer among the inputs")
    copies = loaded.duplicates and (work.todo or not CuratedDataset.settled_in(loaded.output, loaded.output_options))
    if copies:
        say("then look for copies among all rows, and decide those shards anew whose copies are others")
    elif not work.todo:
        say("nothing to do" if work.done else f"nothing to do: {NO_INPUT.format(output=loaded.output)}")


@commands.command(
    rich_help_panel=RUNS,
    epilog=examples(
        "capfilt run pipelines/mine.yaml",
        "capfilt run pipelines/mine.yaml --set thresholds.web=0.4 --set captioners.0.batch_size=128",
    ),
)
def run(spec: SpecFile, overrides: Overrides = None, overlap_ok: OverlapOk = False) -> None:
    """Do what a spec says: ingest, curate, pretrain, fine-tune, evaluate, bootstrap or export.

    Reads the spec's inputs and writes to its output, and nowhere else. The same command resumes after a crash, and does
    again what a change made stale. Exit codes: 0 done, 1 failed, 2 bad spec, 3 stopped by the error budget, 4 another
    run holds the output, 130 interrupted. After any of them the same command goes on from what was finished.
    """
    loaded = load_spec(spec, overrides or ())
    try:
        _run_here(loaded)
    except ConflictError as error:
        if not overlap_ok:
            raise
        say(f"capfilt: {error}. Exit code 0, as --overlap-ok asks", err)


def _run_here(loaded: RunSpec) -> None:
    """Run, and print what comes of it."""
    if isinstance(loaded, CurateSpec):
        curate_here(loaded)
        return
    with native_noise_in_a_file() as console:
        from capfilt.pipelines.run import run

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


def curate_here(spec: CurateSpec) -> Summary:
    """Curate, and print the summary whatever comes of it.

    Raises:
        RunInterruptedError: Ctrl-C or SIGTERM.
    """
    summaries: list[Summary] = []
    try:
        with native_noise_in_a_file() as console:
            from capfilt.pipelines.curate import curate

            console.quiet = logs.begun()  # it says all of it in events
            return curate(spec, console=console, report=summaries.append)
    finally:
        for summary in summaries:
            print_summary(summary)
