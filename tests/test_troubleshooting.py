"""The page about errors says what the code says: its messages are in the source, its classes are the error tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from capfilt import errors
from capfilt.schema import Reason
from capfilt.throughput import FRAGMENTS, MODELS, WAITED_FOR

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = [found[2] for found in re.finditer(r"\*\*(`+) ?(.+?) ?\1\*\*", PAGE)]
ANY = "…"


PROSE = {"help", "short_help", "epilog", "description"}


def templates(source: str) -> set[str]:
    """Every text of a module that may be said, with `…` where a value is put in: docstrings and help are not."""
    found, tree = set(), ast.parse(source)
    nodes = list(ast.walk(tree))
    prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    prose |= {
        id(inner) for node in nodes if isinstance(node, ast.keyword) and node.arg in PROSE for inner in ast.walk(node)
    }
    for node in nodes:
        if id(node) in prose:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else ANY for part in node.values)
            found.add("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(re.sub(r"\{\w*\}", ANY, node.value))
    return found


TEMPLATES = {text for path in (ROOT / "capfilt").rglob("*.py") for text in templates(path.read_text())}


def is_said(message: str) -> bool:
    pattern = re.compile(".*".join(map(re.escape, message.strip(ANY).split(ANY))), re.DOTALL)
    return any(pattern.search(template) for template in TEMPLATES)


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_on_the_page_is_one_of_the_package(message: str) -> None:
    assert len(max(message.split(ANY), key=len)) >= 9, "too little of it is fixed to be found"
    assert is_said(message)


def test_a_message_that_no_one_says_is_found() -> None:
    assert len(MESSAGES) > 80
    assert len(set(MESSAGES)) == len(MESSAGES)
    assert not is_said("…: no such flie; …")
    assert not is_said("no such file; … no such file or directory")
    assert not is_said("What to do, as a clause without a full stop"), "a docstring says nothing to a user"
    assert not is_said("Leave a page for people in `_runs/<run>/report.html`"), "nor does a field's description"


def test_every_class_of_errors_is_on_the_page_with_its_exit_code() -> None:
    tree = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    rows = dict(re.findall(r"^\| `(\w+Error)` \| (\d+) \|", PAGE, re.MULTILINE))
    assert rows == {name: str(kind.exit_code) for name, kind in tree.items()}


def test_what_the_page_names_is_there() -> None:
    for reason in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ", PAGE.partition("### Rows in error")[2], re.MULTILINE):
        assert {Reason(name) for name in re.findall(r"\w+", reason)}
    for held_up in (*WAITED_FOR.values(), MODELS, FRAGMENTS):
        assert f"| {held_up} |" in PAGE
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", PAGE, re.M)
    }
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (link[1:] in headings) if link.startswith("#") else (ROOT / "docs" / link).is_file(), link
