"""Every field of the specs and cards, as their pydantic models have it: type, bounds, default, description."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from markdown_text import cell
from pydantic import BaseModel

from capfilt import spec

Schema = Mapping[str, Any]

CARDS = (
    spec.CaptionerCard,
    spec.FilterCard,
    spec.GeneratorCard,
    spec.EndpointCard,
    spec.DualCard,
    spec.ClassifierCard,
)
_CARD_NAMES = {card.__name__ for card in CARDS}


def spec_sections(model: type[BaseModel]) -> str:
    """The fields of a kind of run, and of what they hold; cards are on a page of their own."""
    schema = model.model_json_schema()
    return "\n\n".join(_sections(schema, schema, "", 2))


def card_sections() -> str:
    """The fields of every kind of card."""
    parts = []
    for card in CARDS:
        schema = card.model_json_schema()
        parts += [f"## {card.__name__}", *_sections(schema, schema, "", 3, own=card.__name__)]
    return "\n\n".join(parts)


def _sections(model: Schema, root: Schema, path: str, level: int, own: str = "") -> Iterator[str]:
    """A model's description and table, then those of the models that its fields hold.

    Args:
        root: has the definitions.
        path: of the field that holds the model; empty for the whole.
        level: of headings.
        own: in front of anchors, where several models share a page.
    """
    if "description" in model:
        yield _linked("\n\n".join(map(cell, model["description"].split("\n\n"))))
    required = set(model.get("required", ()))
    rows, inner = ["| field | type | default | |", "|---|---|---|---|"], []
    for name, field in sorted(model["properties"].items(), key=lambda item: item[0] not in ("kind", "role")):
        full = f"{path}.{name}" if path else name
        held = [one for one in _models(field, root) if one not in _CARD_NAMES]
        several = len(held) > 1
        anchors = {one: _anchor(own, full, one if several else "") for one in held}
        default = "**required**" if name in required else _default(field, bool(held))
        meaning = _linked(cell(_meaning(field, held, root)))
        place = "" if len(held) == 1 else f'<a id="{_anchor(own, full)}"></a>'  # else its section is that
        rows.append(f"| {place}`{name}` | {_type(field, root, anchors)} | {default} | {meaning} |")
        inner += [(f"`{full}`{f': {one}' if several else ''}", one, full, anchor) for one, anchor in anchors.items()]
    yield "\n".join(rows)
    for heading, one, full, anchor in inner:
        yield f"{'#' * min(level, 6)} {heading} {{#{anchor}}}"
        yield from _sections(root["$defs"][one], root, full, level + 1, own)


def _linked(text: str) -> str:
    """With links to the pages that it names."""
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](../\1)", text)


def _anchor(*parts: str) -> str:
    return "-".join(filter(None, parts)).replace(".", "-").lower()


def _meaning(field: Schema, held: list[str], root: Schema) -> str:
    """A field's description; where it has none, that of the model that it holds."""
    if described := field.get("description"):
        return str(described)
    if held:
        return str(root["$defs"][held[0]].get("description", "")).split("\n\n")[0]
    return "Always this." if "const" in field else ""


def _models(field: Schema, root: Schema) -> list[str]:
    """Names of the models that a field may hold."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return [name] if "properties" in root["$defs"][name] else []
    inner = [*field.get("anyOf", ()), *field.get("oneOf", ()), *field.get("prefixItems", ())]
    inner += [field["items"]] if "items" in field else []
    return list(dict.fromkeys(name for one in inner for name in _models(one, root)))


def _type(field: Schema, root: Schema, anchors: Mapping[str, str]) -> str:
    """In words, with bounds; models are links to where they stand."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        if name in _CARD_NAMES:
            return f"[{name}](cards.md#{name.lower()})"
        return f"[mapping](#{anchors[name]})" if name in anchors else _type(root["$defs"][name], root, anchors)
    if union := field.get("anyOf") or field.get("oneOf"):
        types = list(dict.fromkeys(_type(one, root, anchors) for one in union))
        return (", or " if any(", " in one for one in types) else " or ").join(types)
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if "prefixItems" in field:
        types = [_type(one, root, anchors) for one in field["prefixItems"]]
        return f"list of {len(types)}: {'; '.join(types)}"
    if "items" in field:
        return f"list of {_type(field['items'], root, anchors)}" + (", not empty" if field.get("minItems") else "")
    names = {"boolean": "true or false", "integer": "whole number", "object": "mapping", "string": "text"}
    name = field.get("format", names.get(field["type"], field["type"]))
    return ", ".join([name, *_bounds(field)])


def _bounds(field: Schema) -> Iterator[str]:
    low, high = field.get("minimum"), field.get("maximum")
    if "exclusiveMinimum" in field:
        yield f"above {_number(field['exclusiveMinimum'])}"
    if low is not None and high is not None:
        yield f"{_number(low)} to {_number(high)}"
    elif low is not None:
        yield f"at least {_number(low)}"
    elif high is not None:
        yield f"at most {_number(high)}"
    if "exclusiveMaximum" in field:
        yield f"below {_number(field['exclusiveMaximum'])}"
    if "maxLength" in field:
        yield f"at most {field['maxLength']:,} characters"
    if "pattern" in field:
        yield f"as `{field['pattern']}`"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _default(field: Schema, holds_models: bool) -> str:
    value = field.get("default")
    if holds_models and isinstance(value, Mapping):
        return "as below"
    return f"`{json.dumps(value, ensure_ascii=False)}`"
