"""Reading specs and cards from YAML: overrides, cards by path, and errors that name the field."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from capfilt.errors import SpecError
from capfilt.spec.bootstrap import BootstrapSpec
from capfilt.spec.curation import CurateSpec
from capfilt.spec.evaluation import EvaluateSpec
from capfilt.spec.export import ExportSpec
from capfilt.spec.fields import absolute
from capfilt.spec.ingestion import IngestSpec
from capfilt.spec.kinds import AnyCard, ModelCard
from capfilt.spec.training import FinetuneCaptionerSpec, FinetuneFilterSpec, PretrainSpec

RunSpec = (
    CurateSpec
    | PretrainSpec
    | FinetuneCaptionerSpec
    | FinetuneFilterSpec
    | EvaluateSpec
    | BootstrapSpec
    | ExportSpec
    | IngestSpec
)
"""One spec for each kind of run."""

KINDS: dict[str, type[RunSpec]] = {
    "curate": CurateSpec,
    "pretrain": PretrainSpec,
    "finetune-captioner": FinetuneCaptionerSpec,
    "finetune-filter": FinetuneFilterSpec,
    "evaluate": EvaluateSpec,
    "bootstrap": BootstrapSpec,
    "ingest": IngestSpec,
    "export": ExportSpec,
}
_TOO_DEEP = "lists or mappings lie in each other hundreds deep; a spec's are a handful"
_CARDS = ("captioner", "filter", "start")
"""Fields that hold a card, or its path."""

_NO_MAPPING = ("model_type", "model_attributes_type", "dict_type")
"""Pydantic's names of what is wrong with a value that should hold fields."""

_CARD_LISTS = ("captioners", "filters")
"""Fields that hold a list of such."""


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a run spec.

    Args:
        path: a YAML file. Paths in it, and in overrides, resolve relative to it.
        overrides: `a.b=value` assignments, the value read as YAML; applied in order before validation. An entry of a
            list goes by its number, from 0. They reach a card (`filters.1=card.yaml`) and into its own fields
            (`filters.1.batch_size=8`), too.

    Raises:
        SpecError: naming the file and each field that is wrong, with the nearest known name for an unknown key.
    """
    path = Path(path)
    data = read_yaml(path)
    for override in overrides:
        _assign(data, override, path.parent)
    open_cards(data, path.parent)
    spec: RunSpec = _validated(_kind(data, path), data, path)
    return spec


def _kind(data: Mapping[str, Any], path: Path) -> type[RunSpec]:
    kind = data.get("kind")
    if isinstance(kind, str) and kind in KINDS:
        return KINDS[kind]
    near = difflib.get_close_matches(str(kind), KINDS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    found = f"{_short(kind)} is not one of" if "kind" in data else "required: one of"
    raise SpecError(f"{path}: kind: {found} {', '.join(KINDS)}{hint}")


def load_curate_spec(path: str | Path, overrides: Sequence[str] = ()) -> CurateSpec:
    """Read the spec of a CapFilt run.

    Raises:
        SpecError: as :func:`load_spec`, or it is a spec of another kind.
    """
    spec = load_spec(path, overrides)
    if not isinstance(spec, CurateSpec):
        raise SpecError(
            f"{path}: kind: this needs a spec of kind `curate`, and its kind is `{spec.kind}`; name another "
            "file (`capfilt check` takes every kind, `capfilt plan` `ingest`, too)"
        )
    return spec


def load_card(path: str | Path) -> AnyCard:
    """Read a model card.

    Raises:
        SpecError: as :func:`load_spec`.
    """
    card: AnyCard = _validated(ModelCard, read_yaml(Path(path)), Path(path))
    return card


def open_cards(data: dict[str, Any], base: Path) -> None:
    """Put the raw fields of every card that a spec names by path in the path's place."""
    for field in _CARDS:
        _open_card(data, field, base)
    for field in _CARD_LISTS:
        if isinstance(cards := data.get(field), list):
            for number in range(len(cards)):
                _open_card(cards, number, base)
    if isinstance(kept_out := data.get("keep_out"), dict):
        _open_card(kept_out, "classifier", base)


def _open_card(holder: Any, key: str | int, base: Path) -> None:
    """Put a card's raw fields in place of its path, its checkpoint's path made absolute against the card's own file.

    Args:
        holder: the mapping or list that holds it, at `key`; if anything is there.
    """
    named = holder.get(key) if isinstance(holder, dict) else holder[key]
    if not isinstance(named, str):
        return
    path = Path(absolute(named, base))
    card = read_yaml(path)
    checkpoint = card.get("checkpoint")
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("path"), str):
        card["checkpoint"] = {**checkpoint, "path": absolute(checkpoint["path"], path.parent)}
    holder[key] = card


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        here = [file.name for file in path.parent.glob("*.yaml")]
        near = difflib.get_close_matches(path.name, here, n=1, cutoff=0.8)
        known = "a spec is a YAML file of yours, a card's path is relative to it"
        hint = f"did you mean {path.parent / near[0]}?" if near else known
        raise SpecError(f"{path}: no such file; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}; a spec or card is a text file, in UTF-8") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML: {error}") from error
    except RecursionError:
        raise SpecError(f"{path}: not valid YAML: {_TOO_DEEP}") from None
    if not isinstance(data, dict):
        raise SpecError(f"{path}: expected a mapping of fields, found {type(data).__name__}")
    return data


def _assign(data: dict[str, Any], override: str, base: Path) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise SpecError(f"--set {override}: write it as path=value, for example fragment_rows=500")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {override}: the value is not valid YAML: {error}") from error
    except RecursionError:
        raise SpecError(f"--set {_short(override)}: the value is not valid YAML: {_TOO_DEEP}") from None
    node: Any = data
    for depth, key in enumerate(keys[:-1]):
        at = _place(node, key, keys[:depth], override)
        in_list = depth == 1 and keys[0] in _CARD_LISTS and isinstance(node, list)
        kept_out = depth == 1 and keys[:2] == ["keep_out", "classifier"] and isinstance(node, dict)
        if in_list or kept_out or (depth == 0 and key in _CARDS):
            _open_card(node, at, base)
        node = node.setdefault(at, {}) if isinstance(node, dict) else node[at]
    node[_place(node, keys[-1], keys[:-1], override)] = value


def _place(node: Any, key: str, parents: Sequence[str], override: str) -> str | int:
    """Where an override's key stands in a mapping or a list."""
    if isinstance(node, dict):
        return key
    where = ".".join(parents)
    if not isinstance(node, list):
        raise SpecError(f"--set {override}: {where} is {_short(node)}, not a mapping or a list")
    places = {str(number): number for number in range(len(node))}
    if key not in places:
        known = f"its entries are {where}.0 to {where}.{len(node) - 1}" if node else "it has no entries"
        raise SpecError(f"--set {override}: {where} is a list, and {key} is none of it: {known}")
    return places[key]


def _validated(what: Any, data: dict[str, Any], path: Path) -> Any:
    try:
        return TypeAdapter(what).validate_python(data, context={"base": path.parent})
    except ValidationError as error:
        items = [item for item in error.errors(include_url=False) if not _follows(item, error)]
        secrets = [item for item in items if item["type"] == "secret"]  # first: others may repeat them
        lines = [_explain(item, what) for item in secrets or items]
        raise SpecError("\n".join(f"{path}: {line}" for line in dict.fromkeys(lines))) from None


def _follows(item: Any, error: ValidationError) -> bool:
    """Whether it says of a list that it is too short, because entries of it are wrong, which is said of each."""
    depth = len(item["loc"])
    others = (other["loc"] for other in error.errors(include_url=False) if len(other["loc"]) > depth)
    return item["type"] == "too_short" and any(loc[:depth] == item["loc"] for loc in others)


def models_in(annotation: Any) -> set[type[BaseModel]]:
    """The models an annotation mentions, through unions, containers and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for inner in get_args(annotation) for model in models_in(inner)}


def of_kind(models: set[type[BaseModel]], tag: Any) -> set[type[BaseModel]]:
    """Those of the models whose field `model` may hold the tag: the cards of a kind."""
    fields = {model: model.model_fields.get("model") for model in models}
    return {model for model, field in fields.items() if field and tag in get_args(field.annotation)}


def _explain(item: Any, what: Any) -> str:
    """One line for one pydantic error: the field's path, what is wrong and, for an unknown key, the nearest name."""
    models, path = models_in(what), []
    for part, following in itertools.pairwise(item["loc"]):
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        inner = {model for field in fields for model in models_in(field.annotation)}
        if inner or isinstance(part, int) or (fields and isinstance(following, int)):
            path.append(str(part))
        # a union's tag in the location is no field, though it may be named as one
        models = inner or of_kind(models, part) or models
    last = str(item["loc"][-1]) if item["loc"] else ""
    unknown = not any(last in model.model_fields for model in models)
    if unknown and (of_kind(models, last) or (item["type"] in _NO_MAPPING and isinstance(item["loc"][-1], str))):
        last = ""  # a union's tag, of a card that is wrong as a whole
    field = ".".join([*path, last]).removesuffix(".") if path else last
    known = [model.model_fields[last] for model in models if last in model.model_fields]
    meaning = f" ({known[0].description.rstrip('.')})" if known and known[0].description else ""
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(last, {name for model in models for name in model.model_fields}, n=1)
        return f"{field}: unknown field" + (f"; did you mean {near[0]}?" if near else "")
    if item["type"] == "missing":
        return f"{field}: required{meaning}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "tuple_type":
        message = "expected a list"
    if item["type"] in _NO_MAPPING:  # pydantic names the class
        own = {name: None for model in models if last in model.model_fields for name in _names(model, last)}
        message = "expected a mapping" + (f" of {', '.join(own)}" if own else "")
    if item["type"] == "secret" or last.endswith("_options"):
        return f"{field}: {message}"  # the value may be the secret that was refused
    said = f"{field}: {message} (got {_short(item['input'])})"
    return said + meaning if item["type"] == "string_pattern_mismatch" else said  # a pattern alone tells few


def _names(model: type[BaseModel], field: str) -> list[str]:
    """The fields that a field's own model has."""
    return [name for inner in models_in(model.model_fields[field].annotation) for name in inner.model_fields]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
