"""The spec of an evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from capfilt.spec.cards import CaptionerCard, FilterCard
from capfilt.spec.fields import Columns, Images, Input, Location, Model, SharedDirectory, StorageOptions


class Truth(Model):
    """Which texts are true of which images."""

    labels: Input | None = Field(
        default=None, description="Parquet with `image_sha256` (hex), `text` and `true` (boolean)."
    )
    toyweb: Location | None = Field(
        default=None, description="Directory of a rendered toy web, whose grammar judges any text."
    )

    @model_validator(mode="after")
    def _one(self) -> Truth:
        if (self.labels is None) == (self.toyweb is None):
            raise ValueError("give either labels or toyweb")
        if self.labels is not None and self.labels.columns != Columns():
            raise ValueError("labels.columns: the columns of labels are image_sha256, text and true; rename the file's")
        return self


class Retrieval(Model):
    """Image-text retrieval by ITC, reranked by ITM (salesforce/BLIP, train_retrieval.py)."""

    k_test: int = Field(default=256, ge=1, le=65536, description="Candidates that the ITM head ranks anew.")
    pool: int | None = Field(
        default=None, ge=2, description="Images that compete with each other; all, as on COCO, if not given."
    )


class Captioning(Model):
    """Captioning by greedy or beam search.

    BLIP's own: 3 beams, 5 to 20 tokens with the prompt's 4 (configs/caption_coco.yaml), so 1 to 16 after it.
    """

    beams: int = Field(default=3, ge=1, le=64, description="1 is greedy search.")
    min_tokens: int = Field(default=1, ge=0, le=500, description="New tokens before the end token may come.")
    max_tokens: int = Field(default=16, ge=1, le=500, description="New tokens at the most, prompt not counted.")

    @model_validator(mode="after")
    def _ordered(self) -> Captioning:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        return self


class Quality(Model):
    """The filter's decisions on a curated dataset whose truth is known."""

    dataset: Location = Field(description="Output of a `curate` run.")
    truth: Truth
    storage_options: StorageOptions = Field(default={}, description="Of the dataset's store; never a secret.")


class EvaluationSettings(Model):
    """What is measured, and how."""

    pairs: Input | None = Field(default=None, description="Test images and texts; rows of one image are one image.")
    truth: Truth | None = Field(default=None, description="Of the test images: counts captions that are right.")
    retrieval: Retrieval | None = Field(default=Retrieval(), description="By the filter; null leaves it out.")
    captioning: Captioning | None = Field(default=Captioning(), description="By the captioner; null leaves it out.")
    calibrate: bool = Field(
        default=True, description="Find the filter's threshold that tells the test pairs from shuffled ones."
    )
    max_false_positive_rate: float | None = Field(
        default=None, ge=0, le=1, description="Of the calibrated thresholds; the best F1 if not given."
    )


class EvaluateSpec(EvaluationSettings):
    """How good a captioner and a filter are."""

    kind: Literal["evaluate"]
    output: SharedDirectory = Field(description="Gets evaluation.json.")
    captioner: CaptionerCard | None = Field(default=None, description="A card, or the path of one.")
    filter: FilterCard | None = Field(default=None, description="A card, or the path of one.")
    quality: tuple[Quality, ...] = Field(default=(), description="Curated datasets whose truth is known.")
    images: Images = Images()
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="Of the shuffled pairs.")

    @model_validator(mode="after")
    def _something(self) -> EvaluateSpec:
        if self.pairs is None and not self.quality:
            raise ValueError("nothing to measure: give pairs, and a captioner or a filter; or quality")
        captions = self.captioner is not None and self.captioning is not None
        matches = self.filter is not None and (self.retrieval is not None or self.calibrate)
        if self.pairs is not None and not (captions or matches):
            raise ValueError(
                "pairs are measured with a captioner (captioning) or a filter (retrieval, calibrate); give one"
            )
        if self.pairs is None and self.truth is not None:
            raise ValueError("truth is that of the test images in pairs; a dataset's goes beside it, in quality")
        return self
