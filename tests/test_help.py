"""`--help`, of every command there is: complete, by purpose, and quick."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from capfilt.arguments import CLUSTERS, DATASETS, RUNS, TOYS
from capfilt.cli import app

PANELS = {
    RUNS: ["check", "plan", "run"],
    DATASETS: ["status", "runs", "report", "diff", "view", "vacuum"],
    CLUSTERS: ["submit", "job"],
    TOYS: ["toyweb", "demo"],
}


def tree(command: Any, name: str = "capfilt") -> Iterator[tuple[str, Any]]:
    """Every command, by what is typed."""
    yield name, command
    for inner, subcommand in getattr(command, "commands", {}).items():
        yield from tree(subcommand, f"{name} {inner}")


COMMANDS = dict(tree(typer.main.get_command(app)))


def shown(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


def test_every_command_stands_in_a_panel_of_its_purpose() -> None:
    panels: dict[str, list[str]] = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert not command.hidden
        panels.setdefault(command.rich_help_panel, []).append(name)
    assert panels == PANELS
    text = shown("--help")
    places = [text.index(f"─ {panel} ─") for panel in PANELS]
    assert places == sorted(places)
    assert "─ Commands ─" not in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_parameter_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    assert command.help.split("\n\n")[0].rstrip().endswith("."), "a sentence"
    assert command.epilog, "an example"
    assert re.search(rf"^    {name}\b", command.epilog, re.MULTILINE), "an example of this command"
    text = " ".join(shown(*name.split()[1:], "--help").split())
    for parameter in command.params:
        if parameter.name in ("install_completion", "show_completion"):  # typer's
            continue
        assert parameter.help, parameter.name
        assert parameter.help.endswith("."), parameter.name
        off = getattr(parameter, "is_flag", False) and not parameter.secondary_opts  # it says what it does if given
        if not (parameter.required or off or parameter.multiple):
            assert parameter.show_default or "if not given" in parameter.help, parameter.name
    for word in ("Usage: ", "Examples: "):
        assert word in text


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_commands_that_parse(name: str) -> None:
    """Their options exist, and their values are in range; files are not looked at."""
    for line in COMMANDS[name].epilog.split("\n\n"):
        if not line.startswith("    capfilt "):
            continue
        _, *words = line.split()
        command = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context("capfilt", words).close()


def test_the_version_is_told() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"capfilt {version('capfilt')}\n")
