"""Markdown as text: what is code in it, and what is not."""

from __future__ import annotations

import re
from collections.abc import Callable

_CODE = re.compile(r"^(```+|~~~+).*?^\1[ \t]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Markdown, changed where it is neither in a fenced block nor between backticks."""
    done, at = [], 0
    for code in _CODE.finditer(markdown):
        done += [change(markdown[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*done, change(markdown[at:])])


def cell(text: str) -> str:
    """For a cell of a table: one line, whose bars and angles are shown as they are."""
    line = " ".join(text.split()).replace("|", r"\|")
    return outside_code(line, lambda part: part.replace("<", "&lt;"))
