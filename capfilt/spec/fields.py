"""What the specs have in common: locations, checkpoints, inputs, bounds."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from capfilt.errors import SpecError

_LOCAL_URL = re.compile(r"(?:file|local)://(?:localhost(?=/))?")
_SECRET = re.compile(
    r"secret|token|passw|passphrase|credential|access_key|account_key|api_?key|private_?key|connection_string"
    r"|authorization|cookie|signature|sas|^(key|auth|pwd|sig)$",
    re.IGNORECASE,
)
"""Names of what no spec holds."""
_SECRET_VALUE = re.compile(
    r"^[\w+.-]+://[^/?#\s]*:[^/?#@\s]*@"  # a password in a URL
    r"|[?&;](sig|signature|[\w-]*token|X-(Amz|Goog)-(Signature|Credential))="  # a signed URL
    r"|(AccountKey|SharedAccessSignature|SharedAccessKey)="
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----",
    re.IGNORECASE,
)
"""Values that are secrets, whatever they are called."""


def absolute(path: str, base: str | Path) -> str:
    """A local path, or `file://` URL of one, as a plain absolute path; other URLs as they are."""
    if local := _LOCAL_URL.match(path):
        path = path[local.end() :]
    elif "://" in path:
        return path
    return os.path.normpath(os.path.join(os.path.abspath(base), os.path.expanduser(path)))


def _secret(what: str) -> PydanticCustomError:
    """An error whose input is not repeated (see capfilt.spec.reading): it may be the secret."""
    why = "specs never hold secrets, the environment does (AWS_ACCESS_KEY_ID, ... or a profile)"
    return PydanticCustomError("secret", "{what} looks like a secret; {why}", {"what": what, "why": why})


def no_secret(url: str) -> str:
    if _SECRET_VALUE.search(url):
        raise _secret("what stands in this URL")
    return url


def _resolve(path: str, info: ValidationInfo) -> str:
    return absolute(no_secret(path), (info.context or {}).get("base", os.curdir))


def no_percent(output: str) -> str:
    if "%" in output:
        raise ValueError("no % may be in it: Delta Lake takes %20 for a space and would write elsewhere; rename it")
    return output


Location = Annotated[str, Field(min_length=1), AfterValidator(_resolve)]
"""A local path or an fsspec URL (``s3://bucket/prefix``)."""

OutputLocation = Annotated[Location, AfterValidator(no_percent)]
"""A Location that Delta Lake and fsspec read alike."""


def _local(directory: str) -> str:
    if "://" in directory:
        raise ValueError("give a directory on this machine, or on a disk that all workers share; object stores cannot")
    return directory


SharedDirectory = Annotated[Location, AfterValidator(_local)]
"""A directory that the driver and every worker can write."""


class Model(BaseModel):
    """Frozen; refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class HubCheckpoint(Model):
    """A checkpoint on the hub, at one commit."""

    hub: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="Hub id, `owner/name`.")
    revision: str = Field(
        pattern=r"^[0-9a-f]{40}$", description="Commit hash (40 hex digits): a branch or tag can move."
    )


class LocalCheckpoint(Model):
    """A checkpoint in a local directory in the hub's format (config.json, model.safetensors, tokenizer files)."""

    path: Location = Field(description="Directory; relative to the card's file.")


def _hub_or_local(value: Any) -> str:
    hub = "hub" in value if isinstance(value, Mapping) else isinstance(value, HubCheckpoint)
    return "hub" if hub else "local"


Checkpoint = Annotated[
    Annotated[HubCheckpoint, Tag("hub")] | Annotated[LocalCheckpoint, Tag("local")], Discriminator(_hub_or_local)
]


class Columns(Model):
    """Input columns. What is not given is recognised by its usual names (docs/inputs.md)."""

    image: str | None = Field(default=None, description="Encoded image: binary, or struct with a `bytes` field.")
    text: str | None = Field(default=None, description="Web text: string.")
    url: str | None = Field(default=None, description="Recorded, never fetched.")
    key: str | None = Field(default=None, description="Recorded as the row's key.")


def _no_secrets(options: Mapping[str, Any]) -> Mapping[str, Any]:
    def walk(node: Any, path: str) -> None:
        if isinstance(node, Mapping):
            for name, value in node.items():
                if _SECRET.search(str(name)):
                    raise _secret(f"{path}{name}")
                walk(value, f"{path}{name}.")
        elif isinstance(node, (list, tuple)):
            for number, value in enumerate(node):
                walk(value, f"{path}{number}.")
        elif isinstance(node, str) and _SECRET_VALUE.search(node):
            raise _secret(f"the value of {path[:-1]}")

    walk(options, "")
    return options


StorageOptions = Annotated[dict[str, Any], AfterValidator(_no_secrets)]


class Input(Model):
    """Image-text pairs: the files that hold them, and their columns."""

    paths: tuple[Location, ...] = Field(
        min_length=1,
        description="Parquet, .tar (WebDataset) or .arrow files, globs or directories, local or any fsspec URL.",
    )
    columns: Columns = Field(default=Columns(), description="Column names, where recognition is not enough.")
    storage_options: StorageOptions = Field(
        default={}, description="For fsspec: endpoint, profile, region, ... never a secret."
    )

    @field_validator("paths", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Images(Model):
    """Bounds on what is decoded. Sizes are read from the header, before any pixel."""

    max_pixels: int = Field(default=64_000_000, ge=1, le=2**31, description="Width x height.")
    max_bytes: int = Field(default=32 * 2**20, ge=1, le=2**31 - 1, description="Encoded size.")
    max_seconds: float = Field(
        default=30,
        ge=1,
        description="Time that one image may take, on Ray. Its worker is ended then, and the row recorded as one that "
        "kills its worker. No hostile image of a hundred thousand took half a second.",
    )
    quarantine_bytes: int = Field(
        default=2**20, ge=0, le=2**31 - 1, description="Bytes kept of an unusable image; 0 keeps none."
    )


class Ray(Model):
    """The Ray cluster a run uses."""

    address: str = Field(default="local", description="`local` starts one here; `auto` or an address joins a cluster.")
    num_cpus: int | None = Field(default=None, ge=1, description="CPUs of a local Ray; all cores if not given.")
    metrics_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Of a local Ray: where Prometheus finds its metrics, at /metrics. Needs capfilt[cluster].",
    )

    @property
    def watched(self) -> bool:
        """Whether someone is meant to read this Ray's metrics."""
        return self.address != "local" or self.metrics_port is not None


def output_location(text: str) -> str:
    """An output given without a spec, as a spec's `output` would be read from the working directory.

    Raises:
        SpecError: it holds a `%`.
    """
    try:
        return no_percent(absolute(text, os.curdir))
    except ValueError as error:
        raise SpecError(f"{text}: {error}") from None
