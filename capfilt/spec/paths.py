"""What `--set PATH=VALUE` can say of a spec: the path of each field, what it means, and values that are known."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from capfilt.spec.reading import KINDS, models_in, of_kind, open_cards, read_yaml


class FieldPath(NamedTuple):
    """One field that can be set."""

    path: str
    description: str
    values: tuple[str, ...]
    """Those of a closed list, else the default, if it is a number, a word or a switch."""


def field_paths(data: Mapping[str, Any]) -> list[FieldPath]:
    """Every field of a spec, cards' fields included, given its raw data; none if its kind is unknown."""
    model = KINDS.get(str(data.get("kind")))
    return list({field.path: field for field in _walk({model}, data, "")}.values()) if model else []


def raw_data(path: Path) -> dict[str, Any]:
    """A spec's raw data, with its cards' in place of their paths.

    Raises:
        SpecError: it, or a card, cannot be read.
    """
    data = read_yaml(path)
    open_cards(data, path.parent)
    return data


def _walk(models: set[type[BaseModel]], data: Any, prefix: str) -> Iterator[FieldPath]:
    given = data if isinstance(data, Mapping) else {}
    of_this_kind = of_kind(models, given.get("model", "blip")) or models  # of cards
    for model in sorted(of_this_kind, key=lambda model: model.__name__):
        for name, field in model.model_fields.items():
            path, inner, here = f"{prefix}{name}", models_in(field.annotation), given.get(name)
            if inner and isinstance(here, list):
                for number, entry in enumerate(here):
                    yield from _walk(inner, entry, f"{path}.{number}.")
            elif inner and not _holds_many(field.annotation):
                yield from _walk(inner, here, f"{path}.")
            else:
                yield FieldPath(path, field.description or "", _values(field.annotation) or _default(field.default))


def _holds_many(annotation: Any) -> bool:
    """Whether a field holds a list or mapping of models, whose entries have paths only where there are some."""
    if get_origin(annotation) in (list, tuple, dict):
        return True
    return any(_holds_many(inner) for inner in get_args(annotation))


def _values(annotation: Any) -> tuple[str, ...]:
    """All values of an annotation, as YAML; none if they are not a closed list."""
    if annotation is bool:
        return ("true", "false")
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return tuple(str(member.value) for member in annotation)
    if get_origin(annotation) is Literal:
        return tuple(str(value) for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(value for inner in get_args(annotation) for value in _values(inner))
    return ()


def _default(value: Any) -> tuple[str, ...]:
    return (str(value),) if isinstance(value, (int, float, str)) and value != "" else ()
