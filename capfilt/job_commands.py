"""`capfilt submit` and `capfilt job`: runs on a cluster, through its job server. Torch is not loaded; Ray is."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from capfilt.arguments import CLUSTERS, OverlapOk, Overrides, SpecFile, examples
from capfilt.completion import environment_names
from capfilt.submit import ENTRYPOINT, STOP_SECONDS, check_name, pack, prepare, runtime_env
from capfilt.terminal import err, escaped, say

if TYPE_CHECKING:
    from capfilt.pipelines.jobs import JobServer, JobState

Address = Annotated[
    str,
    typer.Option(
        metavar="URL",
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
        help="Address of the cluster's job server: the head's dashboard, such as http://head:8265.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job, as `capfilt submit` printed it.")]
_ON = "--address http://head:8265"

commands = typer.Typer()
job_app = typer.Typer(
    help="Look at, follow or stop a run that was submitted to a cluster.",
    epilog=examples(f"capfilt job status ID {_ON}", f"capfilt job logs ID {_ON} --follow"),
    no_args_is_help=True,
)
commands.add_typer(job_app, name="job", rich_help_panel=CLUSTERS)

_MEANINGS = {
    0: "done",
    1: "failed",
    2: "bad usage or spec",
    3: "stopped by the error budget",
    4: "another run holds the output",
    127: "no `python` on the head's PATH: activate the environment that has capfilt before `ray start`",
    130: "stopped; what was finished is kept, submit again to resume",
    137: "killed (SIGKILL), most likely for memory; submit again to resume",
}


@commands.command(
    rich_help_panel=CLUSTERS,
    epilog=examples(
        f"capfilt submit pipelines/mine.yaml {_ON} --follow",
        f"capfilt submit pipelines/mine.yaml {_ON} --env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY",
        f"capfilt submit pipelines/mine.yaml {_ON} --shared /mnt/checkpoints --wheel capfilt-0.1.0-py3-none-any.whl",
        f"capfilt submit pipelines/mine.yaml {_ON} --id mine-2026-11-28 --overlap-ok --follow",
    ),
)
def submit(
    spec: SpecFile,
    address: Address,
    overrides: Overrides = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show its log until it has ended, and exit with its exit code.")
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Give the job this environment variable, with its value here. Repeatable.",
            autocompletion=environment_names,
        ),
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Run this capfilt (a wheel); the one that the cluster has if not given."),
    ] = None,
    pip: Annotated[
        Path | None,
        typer.Option(
            metavar="CONSTRAINTS",
            help="Have pip install capfilt and what it needs on the nodes, at the versions of this file; nothing is "
            "installed if not given.",
        ),
    ] = None,
    shared: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="A directory that all nodes see under the same path: checkpoints in it are not sent. Repeatable.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--id",
            metavar="ID",
            help="The job's id, so that one run is not sent twice: a job of this id that runs or is done is not sent "
            "again. One that failed is, as ID-2, ID-3, ..., and resumes. Ray's choice if not given.",
        ),
    ] = None,
    overlap_ok: OverlapOk = False,
) -> None:
    """Run a spec on a Ray cluster. The same command resumes a run that was lost with its cluster.

    Checks the spec here; sends it, and its local checkpoints up to 100 MiB. Data are never sent: local paths must be
    on a disk that all nodes share. Exit code 0: submitted; with --follow, the run's own.
    """
    from capfilt.pipelines.jobs import JobServer

    if name is not None:
        check_name(name)
    submission = prepare(spec, overrides or (), shared or ())
    with tempfile.TemporaryDirectory(prefix="capfilt-") as folder:
        requirements = pack(submission, Path(folder), wheel, pip, env or ())
        environment = runtime_env(Path(folder), requirements, env or ())
        server = JobServer(address)
        before = server.attempts(name) if name else []
        if before and before[-1].exit_code in (None, 0):
            job = before[-1].id
            say(f"{job} is at {server.address} already ({before[-1].status}), and is not sent again")
        else:
            entrypoint = ENTRYPOINT + " --overlap-ok" * overlap_ok
            new = f"{name}-{len(before) + 1}" if before else name
            job = server.submit(environment, {"spec": spec.name}, entrypoint, new)
            say(f"submitted {job} to {server.address}")
    if "://" not in submission.spec.output:
        say(f"output {submission.spec.output}: must be on a disk that all nodes share")
    if follow:
        _follow(server, job)
    say(f"`capfilt job logs {job} --follow` shows its log, `capfilt job stop {job}` stops it")


@job_app.command(epilog=examples(f"capfilt job status ID {_ON}"))
def status(job: JobId, address: Address) -> None:
    """Say how a job stands, when it began and ended, and with which exit code."""
    from capfilt.pipelines.jobs import JobServer

    state = JobServer(address).state(job)
    say(f"{state.id}: {state.status}" + (f", {_ended(state)}" if state.exit_code is not None else ""))
    say(f"entrypoint: {state.entrypoint}")
    for what, when in (("started", state.started), ("ended", state.ended)):
        if when:
            say(f"{what}: {when:%Y-%m-%d %H:%M:%S} UTC")
    if state.exit_code and state.message:
        say(state.message)


@job_app.command(epilog=examples(f"capfilt job logs ID {_ON} --follow"))
def logs(
    job: JobId,
    address: Address,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on until the job has ended, and exit with its exit code.")
    ] = False,
) -> None:
    """Show what a job has printed."""
    from capfilt.pipelines.jobs import JobServer

    server = JobServer(address)
    if follow:
        _follow(server, job)
    _write(server.logs(job))


@job_app.command(epilog=examples(f"capfilt job stop ID {_ON}", f"capfilt job stop ID {_ON} --no-wait"))
def stop(
    job: JobId,
    address: Address,
    wait: Annotated[
        bool, typer.Option(help="Wait for its end: a run commits what is finished first, within ten minutes.")
    ] = True,
) -> None:
    """Stop a job. Its run commits what is finished, and resumes when it is submitted again."""
    from capfilt.pipelines.jobs import JobServer

    server = JobServer(address)
    if (state := server.state(job)).exit_code is None:
        server.stop(job)
        say(f"{job}: asked to stop; it has {STOP_SECONDS} s to commit what is finished")
        if not wait:
            return
        state = server.wait(job)
    say(f"{job}: {state.status}, {_ended(state)}")


def _follow(server: JobServer, job: str) -> NoReturn:
    """Show a job's log until its end, and exit as it did."""
    try:
        state = server.follow(job, _write)
    except KeyboardInterrupt:
        say(f"\ncapfilt: no longer followed; the job goes on. `capfilt job stop {job}` stops it", err)
        sys.exit(130)
    if "Job entrypoint command failed" not in state.message and state.exit_code == 1:
        say(state.message, err)  # Ray's own trouble, which the log does not show
    say(f"capfilt: {job}: {state.status}, {_ended(state)}", err)
    sys.exit(state.exit_code)


def _ended(state: JobState) -> str:
    code = state.exit_code
    meaning = _MEANINGS.get(code or 0, "")
    return f"exit code {code}" + (f" ({meaning})" if meaning else "")


def _write(text: str) -> None:
    sys.stdout.write("\n".join(map(escaped, text.split("\n"))))
    sys.stdout.flush()
