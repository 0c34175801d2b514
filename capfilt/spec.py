"""Every model a user writes: model cards and run specs. The spec is the interface.

All are frozen pydantic models that refuse unknown keys. Paths in a file resolve relative to that file; a spec names a
card by path or holds it inline. Only the driver reads YAML; workers receive validated objects.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from capfilt.errors import SpecError

_ROLES = ("captioner", "filter")
_LOCAL_URL = re.compile(r"(?:file|local)://(?:localhost(?=/))?")
_SECRET = re.compile(r"secret|token|password|passwd|credential|access_key|account_key|sas|^key$", re.IGNORECASE)


def _absolute(path: str, base: str | Path) -> str:
    """A local path, or `file://` URL of one, as a plain absolute path; other URLs as they are."""
    if local := _LOCAL_URL.match(path):
        path = path[local.end() :]
    elif "://" in path:
        return path
    return os.path.normpath(os.path.join(os.path.abspath(base), os.path.expanduser(path)))


def _resolve(path: str, info: ValidationInfo) -> str:
    return _absolute(path, (info.context or {}).get("base", os.curdir))


def _no_percent(output: str) -> str:
    if "%" in output:
        raise ValueError("no % may be in it: Delta Lake takes %20 for a space and would write elsewhere; rename it")
    return output


Location = Annotated[str, Field(min_length=1), AfterValidator(_resolve)]
"""A local path or an fsspec URL (``s3://bucket/prefix``)."""

OutputLocation = Annotated[Location, AfterValidator(_no_percent)]
"""A Location that Delta Lake and fsspec read alike."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class HubCheckpoint(_Model):
    """A checkpoint on the hub, at one commit."""

    hub: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="Hub id, `owner/name`.")
    revision: str = Field(
        pattern=r"^[0-9a-f]{40}$", description="Commit hash (40 hex digits): a branch or tag can move."
    )


class LocalCheckpoint(_Model):
    """A checkpoint in a local directory in the hub's format (config.json, model.safetensors, tokenizer files)."""

    path: Location = Field(description="Directory; relative to the card's file.")


def _hub_or_local(value: Any) -> str:
    hub = "hub" in value if isinstance(value, Mapping) else isinstance(value, HubCheckpoint)
    return "hub" if hub else "local"


Checkpoint = Annotated[
    Annotated[HubCheckpoint, Tag("hub")] | Annotated[LocalCheckpoint, Tag("local")], Discriminator(_hub_or_local)
]


class Placement(_Model):
    """What one actor takes from the cluster, and how many actors run. Both models of a run share one actor."""

    gpus: float = Field(default=0, ge=0, le=64, description="GPUs an actor holds; 0 computes on the CPU.")
    cpus: float = Field(default=1, gt=0, le=1024, description="CPU cores an actor holds; also its decoding threads.")
    min_actors: int = Field(default=1, ge=1, description="Actors kept alive.")
    max_actors: int = Field(default=1, ge=1, description="Actors the pool may grow to.")

    @model_validator(mode="after")
    def _ordered(self) -> Placement:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors ({self.min_actors}) is above max_actors ({self.max_actors})")
        return self


class _Card(_Model):
    name: str = Field(pattern=r"^[\w.-]{1,80}$", description="Recorded with every row the model touched.")
    checkpoint: Checkpoint = Field(description="Where the weights come from: `hub` and `revision`, or `path`.")
    image_size: int = Field(ge=8, le=1024, description="Side in pixels; images are resized to a square of it.")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Of weights and activations.")
    batch_size: int = Field(default=16, ge=1, le=4096, description="Images in one forward pass.")
    allow_pickle: bool = Field(
        default=False, description="Load pytorch_model.bin where no safetensors exist (weights only, still no code)."
    )
    licence: str = Field(default="unknown", description="Of the weights, for the dataset card.")
    placement: Placement = Field(default=Placement(), description="Resources of an actor that holds the model.")


class CaptionerCard(_Card):
    """A BLIP captioner (`BlipForConditionalGeneration`)."""

    role: Literal["captioner"]
    prompt: str = Field(
        default="a picture of ",
        max_length=200,
        description="Text the decoder is given first; cut from the caption. COCO-fine-tuned captioners expect it.",
    )


class ThresholdsOverride(_Model):
    """Thresholds in place of a filter card's; what is not given stays the card's."""

    web: float | None = Field(default=None, ge=0, le=1, description="For web texts.")
    synthetic: float | None = Field(default=None, ge=0, le=1, description="For the captioner's texts.")


class Thresholds(ThresholdsOverride):
    """Match probability below which a text is dropped (BLIP section 3.3: unmatched by the ITM head is p < 0.5)."""

    web: float = Field(default=0.5, ge=0, le=1, description="For web texts.")
    synthetic: float = Field(default=0.5, ge=0, le=1, description="For the captioner's texts.")


class FilterCard(_Card):
    """A BLIP filter (`BlipForImageTextRetrieval`)."""

    role: Literal["filter"]
    first_token: Literal["[ENC]", "[CLS]"] = Field(
        default="[ENC]",
        description="Token at position 0 of the image-grounded encoder; the ITM head was trained with [ENC].",
    )
    max_tokens: int = Field(default=35, ge=2, le=512, description="Longer texts are cut (BLIP fine-tunes with 35).")
    thresholds: Thresholds = Field(default=Thresholds(), description="Used where the spec gives none.")


ModelCard = Annotated[CaptionerCard | FilterCard, Field(discriminator="role")]


class Columns(_Model):
    """Input columns. What is not given is recognised: see capfilt.fragments.recognise."""

    image: str | None = Field(default=None, description="Encoded image: binary, or struct with a `bytes` field.")
    text: str | None = Field(default=None, description="Web text: string.")
    url: str | None = Field(default=None, description="Recorded, never fetched.")
    key: str | None = Field(default=None, description="Recorded as the row's key.")


def _no_secrets(options: Mapping[str, Any]) -> Mapping[str, Any]:
    def walk(node: Any, path: str) -> None:
        if isinstance(node, Mapping):
            for name, value in node.items():
                if _SECRET.search(str(name)):
                    raise ValueError(
                        f"{path}{name} looks like a secret; specs never hold secrets, "
                        "the environment does (AWS_ACCESS_KEY_ID, ... or a profile)"
                    )
                walk(value, f"{path}{name}.")

    walk(options, "")
    return options


StorageOptions = Annotated[dict[str, Any], AfterValidator(_no_secrets)]


class Input(_Model):
    """What to curate."""

    paths: tuple[Location, ...] = Field(
        min_length=1, description="Parquet files, globs or directories, local or any fsspec URL."
    )
    columns: Columns = Field(default=Columns(), description="Column names, where recognition is not enough.")
    storage_options: StorageOptions = Field(
        default={}, description="For fsspec: endpoint, profile, region, ... never a secret."
    )

    @field_validator("paths", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Images(_Model):
    """Bounds on what is decoded. Read from the header, before any pixel."""

    max_pixels: int = Field(default=64_000_000, ge=1, le=2**31, description="Width x height.")
    max_bytes: int = Field(default=32 * 2**20, ge=1, le=2**31 - 1, description="Encoded size.")
    quarantine_bytes: int = Field(
        default=2**20, ge=0, le=2**31 - 1, description="Bytes kept of an unusable image; 0 keeps none."
    )


class Sampling(_Model):
    """How the captioner writes (BLIP section 3.3: nucleus sampling, p = 0.9)."""

    candidates: int = Field(default=1, ge=1, le=64, description="Captions per image; the best kept one wins.")
    top_p: float = Field(default=0.9, gt=0, le=1, description="Nucleus: the smallest set with this probability.")
    top_k: int = Field(default=0, ge=0, description="0 is off, as in the paper; transformers' default is 50.")
    temperature: float = Field(default=1.0, gt=0, le=10, description="Divides the logits.")
    repetition_penalty: float = Field(
        default=1.1, ge=1, le=10, description="Divides (multiplies) positive (negative) logits of tokens used."
    )
    min_tokens: int = Field(default=6, ge=0, le=500, description="New tokens before the end token may come.")
    max_tokens: int = Field(default=26, ge=1, le=500, description="New tokens at the most, prompt not counted.")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="Of every caption, with the image's sha256.")

    @model_validator(mode="after")
    def _ordered(self) -> Sampling:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        return self


class Ray(_Model):
    """The Ray cluster a run uses."""

    address: str = Field(default="local", description="`local` starts one here; `auto` or an address joins a cluster.")
    num_cpus: int | None = Field(default=None, ge=1, description="CPUs of a local Ray; all cores if not given.")


class CurateSpec(_Model):
    """One CapFilt run: caption, score, decide, commit."""

    kind: Literal["curate"]
    input: Input
    output: OutputLocation = Field(description="Directory or URL of the curated dataset; without `%`.")
    output_options: StorageOptions = Field(
        default={}, description="For the output's store: endpoint_url, region, ... never a secret."
    )
    captioner: CaptionerCard = Field(description="A card, or the path of one.")
    filter: FilterCard = Field(description="A card, or the path of one.")
    sampling: Sampling = Sampling()
    thresholds: ThresholdsOverride | None = Field(default=None, description="In place of the filter card's, each.")
    images: Images = Images()
    fragment_rows: int = Field(
        default=1000,
        ge=1,
        le=1_000_000,
        description="Rows of one unit of work; what a crash can cost. A row group is cut into eight at most, so a unit "
        "is larger where a row group has more than eight times as many rows.",
    )
    max_error_fraction: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Error rows tolerated, as a fraction of the run's rows. A run of which, after 10,000 rows or more, "
        "most are errors stops early, too.",
    )
    ray: Ray = Ray()

    @property
    def effective_thresholds(self) -> Thresholds:
        """Each threshold: the spec's, else the filter card's."""
        own = self.thresholds.model_dump(exclude_none=True) if self.thresholds else {}
        return self.filter.thresholds.model_copy(update=own)

    @property
    def batch_size(self) -> int:
        """Images per forward pass that both models accept."""
        return min(self.captioner.batch_size, self.filter.batch_size)

    @property
    def placement(self) -> Placement:
        """Resources of the actor that holds both models: the larger of the two cards' demands."""
        a, b = self.captioner.placement, self.filter.placement
        return Placement(
            gpus=max(a.gpus, b.gpus),
            cpus=max(a.cpus, b.cpus),
            min_actors=max(a.min_actors, b.min_actors),
            max_actors=max(a.max_actors, b.max_actors),
        )


# --- training ---


class Tower(_Model):
    """A transformer."""

    width: int = Field(ge=8, le=8192, description="Of hidden states; a multiple of heads.")
    depth: int = Field(ge=1, le=96, description="Layers.")
    heads: int = Field(ge=1, le=128)
    mlp: int = Field(ge=8, le=65536, description="Width of the feed-forward layer.")

    @model_validator(mode="after")
    def _divides(self) -> Tower:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) is not a multiple of heads ({self.heads})")
        return self


class VisionTower(Tower):
    """The vision transformer."""

    patch: int = Field(default=16, ge=2, le=64, description="Side of a patch in pixels.")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="Of the last layer; rises from 0.")


class TextTower(Tower):
    """The text transformer, BERT with attention to images."""

    positions: int = Field(default=512, ge=8, le=8192, description="Longest text in tokens.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Of hidden states and attention.")


class Architecture(_Model):
    """A MED. `base` and `large` are BLIP's ViT-B/16 and ViT-L/16, both with a text transformer like BERT-base."""

    vision: VisionTower
    text: TextTower
    joint: int = Field(default=256, ge=8, le=4096, description="Width of the embeddings that ITC compares.")


_BERT_BASE = TextTower(width=768, depth=12, heads=12, mlp=3072)
ARCHITECTURES = {
    "base": Architecture(vision=VisionTower(width=768, depth=12, heads=12, mlp=3072), text=_BERT_BASE),
    "large": Architecture(vision=VisionTower(width=1024, depth=24, heads=16, mlp=4096, drop_path=0.1), text=_BERT_BASE),
}


class Optimiser(_Model):
    """AdamW and its learning rate. The defaults are BLIP's pretraining of ViT-B (configs/pretrain.yaml)."""

    lr: float = Field(default=3e-4, gt=0, le=1, description="Peak learning rate.")
    schedule: Literal["decay", "cosine"] = Field(
        default="decay", description="`decay`: times decay_rate an epoch (pretraining); `cosine`: to min_lr at the end."
    )
    decay_rate: float = Field(default=0.9, gt=0, le=1)
    min_lr: float = Field(default=1e-6, ge=0, le=1)
    warmup_steps: int = Field(default=3000, ge=0, description="Linear from warmup_lr.")
    warmup_lr: float = Field(default=1e-6, ge=0, le=1)
    weight_decay: float = Field(default=0.05, ge=0, le=1)
    betas: tuple[float, float] = Field(default=(0.9, 0.999))
    accumulate: int = Field(default=1, ge=1, le=4096, description="Batches a step.")
    clip_norm: float | None = Field(default=None, gt=0, description="Of the gradient; as published, none.")


class Augment(_Model):
    """Random views of training images (salesforce/BLIP, data/__init__.py); the defaults are pretraining's."""

    min_scale: float = Field(
        default=0.2, gt=0, le=1, description="Smallest crop, of the image's area; BLIP fine-tunes with 0.5."
    )
    flip: float = Field(
        default=0.5, ge=0, le=1, description="Probability of mirroring; 0 where captions say left or right."
    )
    operations: int = Field(
        default=2, ge=0, le=10, description="RandAugment's, drawn for each image; each is applied half the time."
    )
    magnitude: float = Field(default=5, ge=0, le=10, description="Of the operations.")


class PairSource(_Model):
    """Image-text pairs to train on: a curated dataset, or plain Parquet (human pairs, or a raw web)."""

    dataset: Location | None = Field(default=None, description="Output of a `curate` run.")
    version: int | None = Field(default=None, ge=0, description="Of its pairs table; the newest if not given.")
    texts: tuple[Literal["web", "synthetic"], ...] = Field(
        default=("web", "synthetic"), min_length=1, description="Which kept texts of a dataset; each image draws one."
    )
    pairs: Input | None = Field(default=None, description="Parquet files of images and texts, in place of a dataset.")
    weight: float = Field(default=1.0, gt=0, le=1000, description="Passes over it in one epoch; 0.5 is half of it.")
    storage_options: StorageOptions = Field(default={}, description="Of the dataset's store; never a secret.")

    @model_validator(mode="after")
    def _one(self) -> PairSource:
        if (self.dataset is None) == (self.pairs is None):
            raise ValueError("give either dataset or pairs")
        return self


RunSpec = CurateSpec
"""One spec per kind of run; a discriminated union once there is a second kind."""


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a run spec.

    Args:
        path: a YAML file. Paths in it, and in overrides, resolve relative to it.
        overrides: `a.b=value` assignments, the value read as YAML; applied in order before validation, to the card
            (`captioner=card.yaml`) and into the card's own fields (`captioner.batch_size=8`) too.

    Raises:
        SpecError: naming the file and each field that is wrong, with the nearest known name for an unknown key.
    """
    path = Path(path)
    data = _read_yaml(path)
    for override in overrides:
        _assign(data, override, path.parent)
    for role in _ROLES:
        _open_card(data, role, path.parent)
    spec: RunSpec = _validated(RunSpec, data, path)
    return spec


def load_card(path: str | Path) -> CaptionerCard | FilterCard:
    """Read a model card.

    Raises:
        SpecError: as :func:`load_spec`.
    """
    card: CaptionerCard | FilterCard = _validated(ModelCard, _read_yaml(Path(path)), Path(path))
    return card


def output_location(text: str) -> str:
    """An output given without a spec, as a spec's `output` would be read from the working directory.

    Raises:
        SpecError: it holds a `%`.
    """
    try:
        return _no_percent(_absolute(text, os.curdir))
    except ValueError as error:
        raise SpecError(f"{text}: {error}") from None


def _open_card(data: dict[str, Any], role: str, base: Path) -> None:
    """Put a card's raw fields in place of its path, its checkpoint's path made absolute against the card's own file."""
    if not isinstance(data.get(role), str):
        return
    path = Path(_absolute(data[role], base))
    card = _read_yaml(path)
    checkpoint = card.get("checkpoint")
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("path"), str):
        card["checkpoint"] = {**checkpoint, "path": _absolute(checkpoint["path"], path.parent)}
    data[role] = card


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML: {error}") from error
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
    if len(keys) > 1 and keys[0] in _ROLES:
        _open_card(data, keys[0], base)
    node = data
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise SpecError(f"--set {override}: {key} is {child!r}, not a mapping")
        node = child
    node[keys[-1]] = value


def _validated(what: Any, data: dict[str, Any], path: Path) -> Any:
    try:
        return TypeAdapter(what).validate_python(data, context={"base": path.parent})
    except ValidationError as error:
        lines = [_explain(item, what) for item in error.errors(include_url=False)]
        raise SpecError("\n".join(f"{path}: {line}" for line in dict.fromkeys(lines))) from None


def _models(annotation: Any) -> set[type[BaseModel]]:
    """The models an annotation mentions, through unions, containers and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for inner in get_args(annotation) for model in _models(inner)}


def _explain(item: Any, what: Any) -> str:
    """One line for one pydantic error: the field's path, what is wrong and, for an unknown key, the nearest name."""
    models, path = _models(what), []
    for part in item["loc"][:-1]:
        inner = {
            m for model in models if part in model.model_fields for m in _models(model.model_fields[part].annotation)
        }
        if inner or isinstance(part, int):
            path.append(str(part))
        models = inner or models  # a union's tag in the location is no field
    last = str(item["loc"][-1]) if item["loc"] else ""
    field = ".".join([*path, last])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(last, {name for model in models for name in model.model_fields}, n=1)
        return f"{field}: unknown field" + (f"; did you mean {near[0]}?" if near else "")
    if item["type"] == "missing":
        return f"{field}: required"
    message = item["msg"].removeprefix("Value error, ")
    if last.endswith("_options"):
        return f"{field}: {message}"  # the value may be the secret that was refused
    return f"{field}: {message} (got {_short(item['input'])})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
