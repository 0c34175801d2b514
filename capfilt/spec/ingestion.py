"""The spec of an ingest: URL lists in, shards of images out. Fields that img2dataset has as well bear its names."""

from __future__ import annotations

from collections import Counter
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from capfilt.spec.fields import Location, Model, OutputLocation, Ray, StorageOptions

ListFormat = Literal["parquet", "csv", "tsv", "jsonl"]
Interpolation = Literal["nearest", "linear", "cubic", "area", "lanczos"]

RESERVED = {
    *("key", "caption", "url", "width", "height", "original_width", "original_height", "status", "error_message"),
    *("exif", "md5", "sha256", "sha512", "jpg", "png", "webp"),
}
"""Columns of the output that are not the list's to fill."""


class UrlList(Model):
    """URLs to fetch, and what goes with each."""

    paths: tuple[Location, ...] = Field(
        min_length=1, description="Parquet, CSV, TSV or JSONL files (.gz too), globs or directories, on any fsspec URL."
    )
    format: ListFormat | None = Field(default=None, description="Of all files; by their names if not given.")
    column_names: tuple[str, ...] = Field(
        default=(), description="Of CSV and TSV without a header: all of their columns, in order."
    )
    url_col: str | None = Field(default=None, description="Recognised if not given: url, URL, image_url.")
    caption_col: str | None = Field(
        default=None, description="Recognised if not given: caption, text, txt, TEXT, alt_text."
    )
    save_additional_columns: tuple[str, ...] = Field(
        default=(), description="Columns that the output keeps. Parquet's keep their types; others are strings."
    )
    verify_hash_col: str | None = Field(
        default=None, description="Column with the hex hash (of kind compute_hash) that the bytes must have."
    )
    storage_options: StorageOptions = Field(default={}, description="For fsspec; never a secret.")

    @field_validator("paths", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("column_names", "save_additional_columns")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise ValueError(f"named twice: {', '.join(twice)}")
        return names

    @field_validator("save_additional_columns")
    @classmethod
    def _not_ours(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if ours := sorted(RESERVED & set(names)):
            raise ValueError(f"the output has columns of these names itself: {', '.join(ours)}; leave them out")
        return names


class Download(Model):
    """How a URL is fetched, and what it may cost. Only http and https are."""

    thread_count: int = Field(default=128, ge=1, le=2048, description="Downloads at a time, in each process.")
    timeout: float = Field(default=10, gt=0, le=600, description="Seconds to connect, and between parts of an answer.")
    total_timeout: float = Field(
        default=60, gt=0, le=3600, description="Seconds for a URL as a whole, redirects included, each try."
    )
    max_bytes: int = Field(
        default=32 * 2**20, ge=1, le=2**31 - 1, description="Of an answer, redirects included, each try."
    )
    retries: int = Field(default=0, ge=0, le=20, description="Further tries of a URL that failed, at once.")
    allow_private: bool | tuple[IPv4Network | IPv6Network, ...] = Field(
        default=False,
        description="Connect to addresses that are not public, too: of this machine, of private networks, of a cloud's "
        "metadata service; or to those of these networks ([10.1.0.0/16]). Whoever writes a URL into the list, or "
        "answers one, can then have them asked.",
    )
    user_agent_token: str | None = Field(
        default=None, pattern=r"^[\w.-]+$", description="Names the crawler in User-Agent and in X-Robots-Tag."
    )
    disallowed_header_directives: tuple[str, ...] = Field(
        default=("noai", "noimageai", "noindex", "noimageindex"),
        description="An image whose X-Robots-Tag has one of these is not used. An empty list heeds none.",
    )
    compute_hash: Literal["md5", "sha256", "sha512"] | None = Field(
        default="sha256", description="Of the bytes as they came: a column of that name."
    )
    extract_exif: bool = Field(default=True, description="As JSON, in the column exif.")

    @field_validator("allow_private", mode="before")
    @classmethod
    def _networks(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return value
        try:
            if isinstance(value, str):
                raise ValueError("expected a list")
            return tuple(ip_network(str(network)) for network in value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"give true, false, or a list of networks such as [10.1.0.0/16]: {error}") from None


class Resize(Model):
    """What is stored of an image."""

    image_size: int = Field(default=512, ge=1, le=16384, description="Pixels of the side that resize_mode means.")
    resize_mode: Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"] = Field(
        default="keep_ratio", description="The shorter side, or the larger one, is image_size; or both, cut or padded."
    )
    resize_only_if_bigger: bool = Field(default=True, description="Leave smaller images as large as they are.")
    upscale_interpolation: Interpolation = Field(default="lanczos", description="Where an image becomes larger.")
    downscale_interpolation: Interpolation = Field(default="area", description="Where it becomes smaller.")
    encode_format: Literal["jpg", "png", "webp"] = Field(default="jpg", description="And the image column's name.")
    encode_quality: int = Field(default=95, ge=0, le=100, description="Of jpg and webp; of png its compression, 0-9.")
    skip_reencode: bool = Field(default=False, description="Keep the bytes of what is not resized, in its own format.")
    disable_all_reencoding: bool = Field(default=False, description="Keep the bytes as they came; resize nothing.")
    min_image_size: int = Field(default=0, ge=0, description="Of the shorter side; smaller images are left out.")
    max_image_area: float | None = Field(default=None, gt=0, description="In pixels; larger images are left out.")
    max_aspect_ratio: float | None = Field(default=None, ge=1, description="Longer images are left out.")
    max_pixels: int = Field(
        default=64_000_000, ge=1, le=2**30, description="That a header may claim; beyond, nothing is decoded."
    )

    @model_validator(mode="after")
    def _works(self) -> Resize:
        if self.encode_format == "png" and self.encode_quality > 9:
            raise ValueError("encode_quality: of png it is the compression, 0 to 9; set it")
        return self


class IngestSpec(Model):
    """URLs fetched with img2dataset into Parquet shards that `curate` reads: a row for every URL, fetched or not."""

    kind: Literal["ingest"]
    urls: UrlList
    output: OutputLocation = Field(description="Directory or URL of the shards; without `%`.")
    output_options: StorageOptions = Field(
        default={}, description="For the output's store: endpoint_url, region, ... never a secret."
    )
    download: Download = Download()
    resize: Resize = Resize()
    shard_rows: int = Field(
        default=10_000, ge=1, le=1_000_000, description="URLs of a shard at the most; what a crash can cost a process."
    )
    processes: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Shards fetched at a time; as many as this machine, or the cluster, has CPUs if not given.",
    )
    max_error_fraction: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="URLs without an image that are tolerated, as a fraction. A shard with more is fetched again by "
        "the next run, if it has 100 URLs or more, or all shards together are over it.",
    )
    lease_seconds: int = Field(default=60, ge=5, le=3600, description="As of a `curate` run.")
    ray: Ray = Field(
        default=Ray(), description="Processes of this machine while address is `local`; else tasks of that cluster."
    )

    @model_validator(mode="after")
    def _works(self) -> IngestSpec:
        if self.urls.verify_hash_col is not None and self.download.compute_hash is None:
            raise ValueError("urls.verify_hash_col: give download.compute_hash, the kind of the hash")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What an image and its row depend on, besides the URL: all shards of an output have the same."""
        download = {"compute_hash", "extract_exif", "disallowed_header_directives"}
        urls = {"save_additional_columns", "verify_hash_col"}
        return {
            **{f"resize.{name}": value for name, value in self.resize.model_dump(mode="json").items()},
            **{f"download.{name}": getattr(self.download, name) for name in sorted(download)},
            **{f"urls.{name}": getattr(self.urls, name) for name in sorted(urls)},
        }
