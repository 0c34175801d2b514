"""The command line: its commands, and what becomes of an error. Loads neither torch nor ray until a run begins.

Exit codes: 0 done, 1 failed, 2 bad usage or spec, 3 stopped by the error budget, 4 another run holds
the output, 130 interrupted.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from capfilt import dataset_commands, job_commands, logs, run_commands, toy_commands
from capfilt.arguments import examples
from capfilt.causes import said
from capfilt.completion import mend_bash_words
from capfilt.errors import CapfiltError
from capfilt.remedies import remedy
from capfilt.terminal import err, say

app = typer.Typer(
    help="Turn noisy web image-text pairs into clean ones with BLIP's CapFilt. A spec (YAML) says what is done; "
    "`capfilt COMMAND --help` says more of a command.",
    epilog=examples("capfilt check pipelines/mine.yaml", "capfilt run pipelines/mine.yaml", "capfilt report runs/mine")
    + "\n\nExit codes: 0 done, 1 failed, 2 bad usage or spec, 3 stopped by the error budget, 4 another run holds the "
    "output, 130 interrupted.",
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"capfilt {version('capfilt')}")
        raise typer.Exit


_NO_MEMORY = (
    "there is not enough memory; what was finished is kept: take fewer actors, a smaller batch_size or fragment_rows, "
    "or a machine with more, and run again to resume"
)


@app.callback()
def capfilt(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print capfilt's version and nothing else.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    """The command without a subcommand; its help is above."""
    del version  # its callback has printed it


for group in (run_commands, dataset_commands, job_commands, toy_commands):
    app.add_typer(group.commands)


def main() -> None:
    """The `capfilt` command: prints an error in one line and exits with its code. A bug shows its traceback."""
    try:
        logs.begin()
        mend_bash_words()
        app()
    except CapfiltError as error:
        _fail(error, str(error), error.exit_code, getattr(error, "__notes__", ()))  # a worker's, of what no one foresaw
    except Exception as error:  # noqa: BLE001 - reported, with its traceback where no one foresaw it
        from deltalake.exceptions import DeltaError

        message = said(error)
        if isinstance(error, OSError | DeltaError):
            what = remedy(error) or "mend this"
            _fail(error, message, 1, hint=f"what was finished is kept; {what} and run again to resume")
        if isinstance(error, MemoryError):
            _fail(error, message, 1, hint=_NO_MEMORY)
        _fail(error, message, 1, [traceback.format_exc()], "this is a bug of capfilt; what was finished is kept")


def _fail(error: Exception, message: str, code: int, tracebacks: Sequence[str] = (), hint: str = "") -> NoReturn:
    if logs.begun():
        kind, trace = type(error).__name__, "".join(tracebacks)
        logs.event("failed", logging.ERROR, error=kind, message=message, hint=hint, exit_code=code, traceback=trace)
    else:
        for trace in tracebacks:
            say(trace.rstrip(), err)
        say(f"capfilt: {message}", err)
        if hint:
            say(hint, err)
    sys.exit(code)
