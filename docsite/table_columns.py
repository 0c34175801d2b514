"""The tables' columns and the reasons: names and types from capfilt/schema.py, meanings from its comments."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pyarrow as pa
from markdown_text import cell

from capfilt import schema

Meanings = Mapping[tuple[str, str], str]

_SHARED = ("_IDENTITY", "_PICTURE")
_SCHEMAS = {
    schema.ANNOTATIONS: "ANNOTATION_FILE_SCHEMA",
    schema.PAIRS: "PAIR_FILE_SCHEMA",
    schema.QUARANTINE: "QUARANTINE_FILE_SCHEMA",
}


@cache
def _source() -> tuple[ast.Module, dict[int, str]]:
    """schema.py, and its comments by line."""
    text = Path(schema.__file__).read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    return ast.parse(text), comments


@cache
def column_meanings() -> Meanings:
    """Of each column, by the name of the list or struct that it stands in, and its own."""
    tree, comments = _source()
    found = {}
    for statement in tree.body:
        if not (isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)):
            continue
        for node in ast.walk(statement.value):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "field"
            if called and isinstance(name := node.args[0], ast.Constant):
                found[statement.targets[0].id, name.value] = comments.get(node.end_lineno or 0, "")
    return found


@cache
def reason_meanings() -> dict[str, dict[str, str]]:
    """Of each reason, in groups that comments between them name."""
    tree, comments = _source()
    groups: dict[str, dict[str, str]] = {}
    (enum,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Reason")
    members = {node.lineno: node for node in enum.body if isinstance(node, ast.Assign)}
    for line in range(enum.lineno, (enum.end_lineno or 0) + 1):
        if line in members and isinstance(value := members[line].value, ast.Constant):
            groups[list(groups)[-1]][value.value] = comments.get(line, "")
        elif line in comments:
            groups[comments[line]] = {}
    return groups


def reason_sections() -> str:
    """A table of reasons for each group."""
    parts = []
    for group, reasons in reason_meanings().items():
        rows = [f"| `{reason}` | {cell(meaning)} |" for reason, meaning in reasons.items()]
        parts += [f"### {group[0].upper()}{group[1:]}", "\n".join(["| reason | |", "|---|---|", *rows])]
    return "\n\n".join(parts)


def column_sections() -> str:
    """A table of columns for each table, and for what its columns hold."""
    parts = []
    for table, name in _SCHEMAS.items():
        parts += [f"### `{table}`", *_sections(schema.FILE_SCHEMAS[table], (name, *_SHARED), table)]
    return "\n\n".join(parts)


def _sections(fields: pa.Schema | pa.StructType, lists: tuple[str, ...], path: str) -> Iterator[str]:
    rows = ["| column | type | |", "|---|---|---|"]
    if path in _SCHEMAS:
        rows.append(f"| `{schema.SHARD}` | string | the input file; the tables are partitioned by it |")
    rows += [f"| `{field.name}` | {_type(field.type)} | {cell(meaning(lists, field.name))} |" for field in fields]
    yield "\n".join(rows)
    for field in fields:
        inner = field.type.value_type if pa.types.is_list(field.type) else field.type
        if pa.types.is_struct(inner):
            yield f"#### `{path}.{field.name}`"
            yield from _sections(inner, (_name(inner),), f"{path}.{field.name}")


def meaning(lists: tuple[str, ...], column: str) -> str:
    """What a column means; the first of these lists and structs that has it says so."""
    return next(column_meanings()[where, column] for where in lists if (where, column) in column_meanings())


def _name(struct: pa.StructType) -> str:
    """Of the variable that holds a struct."""
    return next(name for name, value in vars(schema).items() if name.endswith("_STRUCT") and value == struct)


def _type(type_: pa.DataType) -> str:
    if pa.types.is_list(type_):
        return f"list of {_type(type_.value_type)}"
    return "struct" if pa.types.is_struct(type_) else str(type_)
