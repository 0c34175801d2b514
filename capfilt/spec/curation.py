"""The spec of a CapFilt run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from capfilt.spec.cards import CaptionerCard, FilterCard, Placement, Thresholds, ThresholdsOverride
from capfilt.spec.fields import Images, Input, Model, OutputLocation, Ray, StorageOptions


class Sampling(Model):
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


class CurateSpec(Model):
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
