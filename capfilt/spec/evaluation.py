"""The spec of an evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from capfilt.spec.cards import CaptionerCard, FilterCard
from capfilt.spec.curation import Decision, named_apart, require_one_unit
from capfilt.spec.fields import Columns, Images, Input, Location, Model, SharedDirectory, StorageOptions
from capfilt.spec.kinds import AnyCaptioner, AnyFilter
from capfilt.spec.sampling import Sampling

GREEDY = 1e-6
"""A nucleus so small holds the likeliest token alone."""


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
    """Image-text retrieval by ITC, reranked by ITM (salesforce/BLIP, train_retrieval.py); of others by similarity."""

    k_test: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="Candidates that BLIP's ITM head ranks anew; its 256 if not given. Other filters have none.",
    )
    pool: int | None = Field(
        default=None, ge=2, description="Images that compete with each other; all, as on COCO, if not given."
    )


class Captioning(Model):
    """Captioning by greedy or beam search.

    BLIP's own: 3 beams, 5 to 20 tokens with the prompt's 4 (configs/caption_coco.yaml), so 1 to 16 after it.
    """

    beams: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="1 is greedy search; BLIP's 3 if not given. Captioners of other kinds are greedy, whose own "
        "`sampling` goes over the lengths.",
    )
    min_tokens: int = Field(default=1, ge=0, le=500, description="New tokens before the end token may come.")
    max_tokens: int = Field(default=16, ge=1, le=500, description="New tokens at the most, prompt not counted.")

    @model_validator(mode="after")
    def _ordered(self) -> Captioning:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        return self

    def sampling(self, card: AnyCaptioner) -> Sampling:
        """How a captioner writes: the likeliest token each time, unless it is searched with beams.

        Raises:
            ValueError: the card's own sampling does not fit; names the card.
        """
        own = Sampling(
            min_tokens=self.min_tokens, max_tokens=self.max_tokens, repetition_penalty=1, top_p=GREEDY, seed=0
        )
        if isinstance(card, CaptionerCard):
            return own
        return card.sampled(own).model_copy(update={"top_p": GREEDY, "temperature": 1.0})


class Quality(Model):
    """The filter's decisions on a curated dataset whose truth is known."""

    dataset: Location = Field(description="Output of a `curate` run.")
    truth: Truth
    storage_options: StorageOptions = Field(default={}, description="Of the dataset's store; never a secret.")


class EvaluationSettings(Model):
    """What is measured, and how."""

    pairs: Input | None = Field(default=None, description="Test images and texts; rows of one image are one image.")
    truth: Truth | None = Field(
        default=None,
        description="Of the test images: counts captions that are right; filters are judged by its labels.",
    )
    retrieval: Retrieval | None = Field(default=Retrieval(), description="By the filter; null leaves it out.")
    captioning: Captioning | None = Field(default=Captioning(), description="By the captioner; null leaves it out.")
    calibrate: bool = Field(
        default=True, description="Find the filter's threshold that tells the test pairs from shuffled ones."
    )
    max_false_positive_rate: float | None = Field(
        default=None, ge=0, le=1, description="Of the calibrated thresholds; the best F1 if not given."
    )


class EvaluateSpec(EvaluationSettings):
    """How good a captioner and a filter are, of whatever kind."""

    kind: Literal["evaluate"]
    output: SharedDirectory = Field(description="Gets evaluation.json.")
    captioner: AnyCaptioner | None = Field(default=None, description="A card, or the path of one.")
    filter: AnyFilter | None = Field(default=None, description="A card, or the path of one.")
    filters: tuple[AnyFilter, ...] = Field(
        default=(), description="Two or more cards, or their paths, that judge together; in place of `filter`."
    )
    decision: Decision = Field(default="mean", description="Of several filters, as a `curate` spec has it.")
    quality: tuple[Quality, ...] = Field(default=(), description="Curated datasets whose truth is known.")
    images: Images = Images()
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="Of the shuffled pairs.")

    @field_validator("filters")
    @classmethod
    def _several(cls, cards: tuple[AnyFilter, ...]) -> tuple[AnyFilter, ...]:
        if len(cards) == 1:
            raise ValueError("one card goes into `filter`, where retrieval is measured, too")
        return named_apart(cards)

    @model_validator(mode="after")
    def _something(self) -> EvaluateSpec:
        if self.pairs is None and not self.quality:
            raise ValueError("nothing to measure: give pairs, and a captioner or a filter; or quality")
        captions = self.captioner is not None and self.captioning is not None
        matches = self.filter is not None and (self.retrieval is not None or self.calibrate)
        if self.pairs is not None and not (captions or matches or (self.filters and self.calibrate)):
            raise ValueError(
                "pairs are measured with a captioner (captioning), a filter (retrieval, calibrate) or several filters "
                "(calibrate); give one"
            )
        if self.pairs is None and self.truth is not None:
            raise ValueError("truth is that of the test images in pairs; a dataset's goes beside it, in quality")
        return self

    @model_validator(mode="after")
    def _measurable(self) -> EvaluateSpec:
        """What cards of these kinds cannot do is said before a model loads."""
        if self.filter is not None and self.filters:
            raise ValueError("filter and filters: give one of the two, a card or a list of several")
        if self.filters:
            require_one_unit(self.filters, self.decision)
        elif "decision" in self.model_fields_set and self.decision == "vote":
            raise ValueError("decision: a vote takes several filters; list their cards in `filters`")
        dual = self.filter is not None and not isinstance(self.filter, FilterCard)
        if dual and self.retrieval is not None and self.retrieval.k_test is not None:
            raise ValueError(
                f"retrieval.k_test: {self.filter.name} is a `{self.filter.model}` card, which has no ITM head to rank "  # type: ignore[union-attr]
                "candidates anew; leave k_test out, and retrieval is by similarity alone"
            )
        if self.captioner is not None and self.captioning is not None:
            beams = self.captioning.beams
            if not isinstance(self.captioner, CaptionerCard) and beams not in (None, 1):
                raise ValueError(
                    f"captioning.beams: beam search is for BLIP's captioners, and {self.captioner.name} is a "
                    f"`{self.captioner.model}` card; leave beams out, and it is greedy"
                )
            self.captioning.sampling(self.captioner)
        return self

    @property
    def judges(self) -> tuple[AnyFilter, ...]:
        """Cards of all filters."""
        return self.filters or ((self.filter,) if self.filter is not None else ())
