"""What a library says of an error, in one line: without what only its authors can read."""

from __future__ import annotations

import re

_LONGEST = 500

_COLOURS = re.compile(r"\x1b\[[0-9;]*m|↳")

_FRAMES = re.compile(r"^ *0: .*\n(?: *\d+: .*\n?| +at .*\n?)+", re.MULTILINE)
"""A backtrace of Rust's, at the end of a message."""

_STRUCT = re.compile(r"\b[A-Z]\w+ \{ [^{}]* \}")
"""As Rust prints it for its authors; innermost first."""

_WRAPPED = re.compile(
    r"\b(?:(?:Kernel error|Generic delta kernel error|External error|Invalid Input Error)(?:: | -> )|"
    r"Generic LocalFileSystem error:? |reading the stream registered as '\w+' failed: )"
)
_ARROWS = re.compile(r"(?:\[Errno \d+\] )?Failed to \w+ local file '(.*?)'\. Detail: \[errno \d+\] ")


def said(error: BaseException) -> str:
    """The error's kind and text, on one line, without colours, backtraces and the names of the layers it passed.

    Of a long text not the middle: causes come last.
    """
    text = _FRAMES.sub("", _COLOURS.sub("", str(error)) + "\n")
    while (shorter := _STRUCT.sub("…", text)) != text:
        text = shorter
    text = _ARROWS.sub(r"\1: ", _WRAPPED.sub("", " ".join(text.split()) + " ")).rstrip(". ")
    return f"{type(error).__name__}: {text if len(text) <= _LONGEST else f'{text[:200]} ... {text[-300:]}'}"
