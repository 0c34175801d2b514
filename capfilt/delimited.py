"""CSV and TSV cut into rows, of which none may vanish: a quote that is left open takes no later row with it.

A CSV is read as RFC 4180 has it. A TSV has no quotes by its own standard, but many programs write them: there a field
is quoted that is quoted as a whole, and any other quote is a character.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator

from capfilt.errors import InputError
from capfilt.terminal import counted

csv.field_size_limit(2**24)  # of the process; its default, 2**17, is less than a data: URL can be

URL = re.compile(r"\s*https?://", re.IGNORECASE)
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')


def cut_rows(path: str, lines: Iterable[bytes], mark: str, names: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """The rows of a list, the header first where it has one; empty lines are left out.

    Args:
        path: for errors.
        lines: with their ends.
        mark: between fields; a tab means TSV.
        names: of the columns, where the list has no header.

    Raises:
        InputError: a line is not UTF-8 or has another number of fields, or a quote is left open; names the line.
    """
    ahead = _Lines(path, lines)
    width = len(names) or None
    while (line := ahead.take()) is not None:
        number, bare = ahead.number, _bare(line)
        if not bare:
            continue
        if '"' not in line:
            row = bare.split(mark)
        else:
            row = _tabbed(ahead, line, width) if mark == "\t" else _quoted(ahead, line, mark, width)
        width = width or len(row)
        if len(row) != width:
            wanted = "urls.column_names" if names else "its header"
            found = counted(len(row), "field")
            raise InputError(f"{path}: line {number:,} has {found}, and {wanted} {width}; mend that line")
        yield row


class _Lines:
    """Lines as text, and a look at the next.

    Attributes:
        number: of the line taken last, from 1.
    """

    def __init__(self, path: str, lines: Iterable[bytes]) -> None:
        self.path, self.number = path, 0
        self._lines = iter(lines)
        self._held: str | None = None

    def take(self) -> str | None:
        line = self.peek()
        self._held, self.number = None, self.number + 1
        return line

    def peek(self) -> str | None:
        """The next line; None at the end."""
        if self._held is None and (raw := next(self._lines, None)) is not None:
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{self.path}: line {self.number + 1:,} is not UTF-8: {error}; write the list in UTF-8"
                ) from None
            self._held = text if self.number else text.removeprefix("\ufeff")
        return self._held


def _bare(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _tabbed(ahead: _Lines, line: str, width: int | None) -> list[str]:
    """A row of TSV that begins with a line with quotes in it."""
    fields = _bare(line).split("\t")
    opens = fields[-1].startswith('"') and not _QUOTED.fullmatch(fields[-1])
    further = ahead.peek() if opens else None
    if len(fields) == (width or len(fields)) and (further is None or _stands(further, "\t", width)):
        return [said[1].replace('""', '"') if (said := _QUOTED.fullmatch(field)) else field for field in fields]
    return _quoted(ahead, line, "\t", width)


def _quoted(ahead: _Lines, line: str, mark: str, width: int | None) -> list[str]:
    """A row as RFC 4180 has it, with as many of the next lines as its quotes reach over."""
    number = ahead.number

    def reached() -> Iterator[str]:
        yield line
        while (further := ahead.peek()) is not None:  # asked for while a quote is open
            if '"' not in further.replace('""', "") and _stands(further, mark, width):
                raise _swallows(ahead.path, number, ahead.number + 1)
            ahead.take()
            yield further
        raise InputError(
            f"{ahead.path}: line {number:,} opens a quote that nothing closes; close it, or write the value in quotes "
            'and its own quotes twice ("")'
        )

    try:
        row = next(csv.reader(reached(), delimiter=mark))
    except csv.Error as error:
        raise InputError(f"{ahead.path}: line {number:,} cannot be parsed: {error}; mend that line") from None
    if any(_spans_rows(value, place, mark, len(row)) for place, value in enumerate(row) if "\n" in value):
        raise _swallows(ahead.path, number, ahead.number)
    return row


def _swallows(path: str, number: int, other: int) -> InputError:
    return InputError(
        f"{path}: line {number:,} opens a quote, and within it line {other:,} is a row of its own; close the quote, or "
        'write the value in quotes and its own quotes twice ("")'
    )


def _stands(line: str, mark: str, width: int | None) -> bool:
    """Whether a line within an open quote is rather a row: its fields are as many; and of CSV's, one is a URL."""
    fields = _bare(line).split(mark)
    return len(fields) == width and (mark == "\t" or any(map(URL.match, fields)))


def _spans_rows(value: str, place: int, mark: str, width: int) -> bool:
    """Whether a value of several lines is rather the end of a row and the beginning of another, cut at its place."""
    lines = value.split("\n")
    end, beginning = lines[0].split(mark), lines[-1].split(mark)
    return len(end) == width - place and len(beginning) == place + 1 and any(map(URL.match, end + beginning))
