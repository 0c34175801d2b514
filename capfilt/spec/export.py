"""The spec of an export: one version of a curated dataset, written as a trainer reads it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from capfilt.spec.fields import Location, Model, StorageOptions

ExportFormat = Literal["webdataset", "parquet", "huggingface", "authors", "mds", "litdata"]
TextRule = Literal["best", "web-first", "mixture", "all"]


class ExportSpec(Model):
    """Write the kept pairs of one version of a curated dataset for training elsewhere. Reads, never changes it."""

    kind: Literal["export"]
    dataset: Location = Field(description="Output of a `curate` run.")
    version: int | None = Field(default=None, ge=0, description="Of its pairs table; the newest if not given.")
    storage_options: StorageOptions = Field(default={}, description="Of the dataset's store; never a secret.")
    output: Location = Field(description="Directory or URL; must be empty, absent, or hold the same export.")
    output_options: StorageOptions = Field(default={}, description="Of the output's store; never a secret.")
    format: ExportFormat = Field(
        description="`webdataset`: tars, as OpenCLIP reads them. `parquet`: flat pairs. `huggingface`: a directory for "
        "datasets.load_dataset. `authors`: BLIP's JSON, image files beside it. `mds`: MosaicML Streaming. `litdata`: "
        "LitData, by capfilt[litdata]."
    )
    text: TextRule = Field(
        default="best",
        description="Each image's text: the `best` by ITM; `web-first`, the web's where it was kept; a `mixture` of "
        "the web's and the best synthetic one; or the best, and `all` kept ones beside it as captions.",
    )
    web_probability: float = Field(
        default=0.5, ge=0, le=1, description="Of a mixture: how often the web's text, where both kinds were kept."
    )
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="Of a mixture, with the image's sha256.")
    shard_bytes: int = Field(
        default=256 * 2**20, ge=1, le=2**40, description="Target of a file: its images and texts, about."
    )
    shard_rows: int | None = Field(default=None, ge=1, description="Rows of a file at most; any number if not given.")
    writers: int = Field(
        default=4,
        ge=1,
        le=256,
        description="Files written at a time. Each holds a row group or two in memory; of mds and litdata, its file.",
    )

    @model_validator(mode="after")
    def _sensible(self) -> ExportSpec:
        given = {"web_probability", "seed"} & self.model_fields_set
        if given and self.text != "mixture":
            raise ValueError(f"{', '.join(sorted(given))}: only of text: mixture, and text is {self.text}")
        if f"{self.output}/".startswith(f"{self.dataset.rstrip('/')}/"):
            raise ValueError(f"output: {self.output} lies in the dataset that is exported; give a place beside it")
        return self
