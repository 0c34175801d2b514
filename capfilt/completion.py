"""What a shell is told when Tab is pressed: from this machine's files alone, and in a fraction of a second.

Nothing is asked over a network, and neither torch, Ray nor Delta Lake is loaded. A file that cannot be read completes
nothing: the command itself will say why. Each function takes what is typed so far of a value.

Names of files and columns may be hostile, and what is offered becomes part of a command line: bash takes it as it is,
and zsh evaluates what typer answers. So a value is offered only if no shell sees more than a word in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import suppress
from glob import iglob
from pathlib import Path
from textwrap import shorten
from time import localtime, strftime
from typing import Any

import typer
from rich.markup import escape

from capfilt.errors import SpecError
from capfilt.spec.paths import FieldPath, field_paths, raw_data
from capfilt.spec.reading import read_yaml

Candidates = list[tuple[str, str]]
"""Values, and what is said of each."""

_PLAIN = re.compile(r"(?!-)[\w./=:,@+%~-]+")  # nor is it taken for an option
_TAKEN_APART = "_CAPFILT_COMPLETE_BEFORE"
_COMMIT = re.compile(r"(\d{20})\.json")
_KIND = re.compile(r"^kind:\s*([\w-]+)", re.MULTILINE)


def mend_bash_words(environment: MutableMapping[str, str] = os.environ) -> None:
    """Undo that bash takes words apart at `=` and `:`, where it asks for completions: `--set a=b` is two words to us.

    What stands before the part that bash will replace is kept in the environment, for :func:`_replacing`.
    """
    if environment.get("_CAPFILT_COMPLETE") != "complete_bash":
        return
    words = environment.get("COMP_WORDS", "").split("\n")
    at = int(environment.get("COMP_CWORD", "0"))
    joined: list[str] = []
    open_ended = False
    for word in [*words[:at], ""]:
        mark = bool(word) and not word.strip("=:")
        if joined and (mark or open_ended):
            joined[-1] += word
        else:
            joined.append(word)
        open_ended = mark
    before, typed = joined.pop(), words[at] if at < len(words) else ""
    if typed and not typed.strip("=:"):  # the mark itself: what comes after it is completed
        before, typed = (joined.pop() if joined and not before else before) + typed, ""
    if before.startswith("--"):
        option, _, before = before.partition("=")
        joined.append(option)
    environment.update(COMP_WORDS="\n".join([*joined, typed]), COMP_CWORD=str(len(joined)), **{_TAKEN_APART: before})


def _replacing(incomplete: str, candidates: Callable[[str], Iterable[tuple[str, str]]]) -> Candidates:
    """Candidates for the whole value that are plain, without what a shell leaves as it is."""
    before = os.environ.get(_TAKEN_APART, "")
    typed = before + incomplete
    with suppress(SpecError, OSError, ValueError):  # the last of a name with a NUL in it
        plain = [(value, said) for value, said in candidates(typed) if _PLAIN.fullmatch(value)]
        return [(value[len(before) :], _short(said)) for value, said in plain if value.startswith(typed)]
    return []


def _short(text: str) -> str:
    """As long as typer's help of a command: it breaks a longer one into lines, which fish takes for candidates."""
    return escape(shorten(text, 45, placeholder="..."))


def specs(incomplete: str) -> Candidates:
    """Files of run specs, each with its kind, and directories."""
    return _replacing(incomplete, lambda typed: _below(typed, _spec))


def datasets(incomplete: str) -> Candidates:
    """Curated datasets, curate specs, and directories."""
    return _replacing(incomplete, lambda typed: _below(typed, _dataset))


def versions(ctx: typer.Context, incomplete: str) -> Candidates:
    """Versions of the dataset that the command names, if it is on this machine, the newest first."""
    output = _given(ctx, "output")
    return _replacing(incomplete, lambda _: _commits(_place(output), "annotations") if output else [])


def versions_or_datasets(ctx: typer.Context, incomplete: str) -> Candidates:
    """As :func:`versions`, then as :func:`datasets`."""
    return versions(ctx, incomplete) + datasets(incomplete)


def environment_names(incomplete: str) -> Candidates:
    """Variables of the environment; never their values."""
    return _replacing(incomplete, lambda _: [(name, "") for name in sorted(os.environ)])


def assignments(ctx: typer.Context, incomplete: str) -> Candidates:
    """`--set`'s: the fields of the spec that the command names, then values of the one that is written."""
    file = _given(ctx, "spec")
    return _replacing(incomplete, lambda typed: _assignments(Path(file), typed) if file else [])


def _given(ctx: typer.Context, argument: str) -> str:
    """The command's first argument, which the parser leaves alone where the last option has no value yet."""
    value = ctx.params.get(argument) or next((word for word in ctx.args if not word.startswith("-")), "")
    return os.path.expanduser(str(value))


def _assignments(file: Path, typed: str) -> Candidates:
    data = raw_data(file)
    fields = {field.path: field for field in field_paths(data) if field.path != "kind"}  # another one is another spec
    path, equals, _ = typed.partition("=")
    if equals:
        field = fields.get(path)
        return [(f"{path}={value}", said) for value, said in _values(field, data, file)] if field else []
    matching = [name for name in fields if name.startswith(typed)]
    steps = _steps(matching, len(typed))
    if len(steps) == 1 and steps[0] in fields:  # its values, too, so that a shell does not end the word at the `=`
        (name,) = steps
        values = [(f"{name}={value}", said) for value, said in _values(fields[name], data, file)]
        return [(f"{name}=", fields[name].description), *values]
    return [
        (f"{step}=" if step in fields else step, fields[step].description if step in fields else "") for step in steps
    ]


def _steps(paths: list[str], start: int) -> list[str]:
    """Paths up to their next dot, or several dots on where there is no choice."""
    steps = list(dict.fromkeys(path[: dot + 1] if (dot := path.find(".", start)) >= 0 else path for path in paths))
    if len(steps) == 1 and steps[0].endswith("."):
        return _steps(paths, len(steps[0]))
    return steps


def _values(field: FieldPath, data: dict[str, Any], file: Path) -> Candidates:
    parent = field.path.rpartition(".")[0]
    if parent.endswith("columns"):
        return [(column, "") for column in _columns(data, parent, file.parent)]
    if data.get("kind") == "export" and field.path == "version":
        return _commits(str(file.parent / str(data.get("dataset"))), "pairs")
    return [(value, "") for value in field.values]


def _columns(data: Any, parent: str, base: Path) -> list[str]:
    """Columns of the first Parquet file of an input, by the path of its field `columns`."""
    for key in parent.split(".")[:-1]:
        data = data[int(key)] if isinstance(data, list) else data.get(key)
        if not isinstance(data, (dict, list)):
            return []
    paths = data.get("paths")
    for path in [paths] if isinstance(paths, str) else paths if isinstance(paths, list) else []:
        if "://" not in str(path) and (found := _first_file(base / str(path))):
            from pyarrow import ArrowException
            from pyarrow.parquet import read_schema

            with suppress(ArrowException):
                return [str(name) for name in read_schema(found).names]
    return []


def _first_file(path: Path) -> str | None:
    if path.is_file():
        return str(path)
    return next(iglob(str(path / "*.parquet" if path.is_dir() else path)), None)


def _place(output: str) -> str:
    """Where a dataset is, by its location or its spec, which need not be whole for that."""
    if output.endswith((".yaml", ".yml")):
        return os.path.join(os.path.dirname(output), str(read_yaml(Path(output)).get("output")))
    return output


def _commits(place: str, table: str) -> Candidates:
    """Versions of a table on this machine, by its log; none of one elsewhere."""
    if "://" in place:
        return []
    with os.scandir(Path(place) / table / "_delta_log") as log:
        found = {int(match[1]): entry.stat().st_mtime for entry in log if (match := _COMMIT.fullmatch(entry.name))}
    newest_first = sorted(found.items(), reverse=True)
    return [(str(version), strftime("of %Y-%m-%d %H:%M", localtime(when))) for version, when in newest_first]


def _spec(entry: os.DirEntry[str]) -> str | None:
    """A spec's kind; None of other files."""
    if entry.name.endswith((".yaml", ".yml")) and entry.is_file():
        with suppress(PermissionError), open(entry.path, encoding="utf-8", errors="replace") as file:
            kind = _KIND.search(file.read(64 * 1024))
            return kind[1] if kind else None
    return None


def _dataset(entry: os.DirEntry[str]) -> str | None:
    """What kind of dataset a directory is, or a spec is of; None of others."""
    if not entry.is_dir():
        return "its output" if _spec(entry) == "curate" else None
    return "a curated dataset" if os.path.isdir(f"{entry.path}/annotations/_delta_log") else None


def _below(typed: str, what: Callable[[os.DirEntry[str]], str | None], deepest: int = 16) -> Candidates:
    """Files and directories that are something, and other directories; what is in one, where there is but that one."""
    parent, name = os.path.split(typed)
    found = []
    with os.scandir(os.path.expanduser(parent) or ".") as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.name.startswith(name) or (entry.name.startswith(".") and not name):
                continue
            said = what(entry)
            if said is not None or entry.is_dir():
                found.append((os.path.join(parent, entry.name) + ("/" if said is None else ""), said or ""))
    if len(found) == 1 and found[0][0].endswith("/") and deepest:
        return _below(found[0][0], what, deepest - 1) or found
    return found
