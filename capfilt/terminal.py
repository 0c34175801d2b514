"""What is shown on a terminal. Names, captions and error texts are strangers': they are shown, never obeyed."""

from __future__ import annotations

import unicodedata

from rich.console import Console
from rich.table import Table
from rich.text import Text

from capfilt.redaction import redacted

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

_WIDE = 1_000


def escaped(text: str) -> str:
    """In one line, with nothing that a terminal obeys or that hides: such characters are shown as `\\x1b`, `\\n`.

    These are control characters, line ends, those that turn or join text unseen, and bytes that are no UTF-8.
    """
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def shown(text: str) -> Text:
    """A stranger's text as a table's cell or title: escaped, and no markup."""
    return Text(escaped(text))


def show(table: Table) -> None:
    """Print a table: folded to a terminal's width, and as wide as it needs to be in a file or a pipe.

    Its title stands above it in one line, be the table as narrow as it may.
    """
    console = out if out.is_terminal else Console(file=out.file, width=_WIDE)
    title, table.title = table.title, None
    if title:
        console.print(title if isinstance(title, Text) else Text(title), style="table.title", soft_wrap=True)
    console.print(table, soft_wrap=False)


def counted(number: int, noun: str) -> str:
    """A number and its noun: `1 shard`, `2,400 shards`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def say(message: str, console: Console = out) -> None:
    """Print a message, without secrets. Its further lines are indented: none of them is taken for one of ours."""
    lines = (escaped(line) for line in redacted(message).split("\n"))
    console.print(Text("\n    ".join(lines)), highlight=False, soft_wrap=True)
