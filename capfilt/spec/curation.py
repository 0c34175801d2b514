"""The spec of a CapFilt run."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, TypeVar

import idna
import regex
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from capfilt.spec.cards import CaptionerCard, Card, ClassifierCard, Placement, Thresholds, ThresholdsOverride
from capfilt.spec.fields import Images, Input, Location, Model, OutputLocation, Ray, StorageOptions, absolute
from capfilt.spec.kinds import AnyCaptioner, AnyCard, AnyFilter
from capfilt.spec.removal import Retention, Withdrawn
from capfilt.spec.sampling import Sampling

Decision = Literal["mean", "vote"]
Keep = Literal["best", "all-above-threshold"]

_Card = TypeVar("_Card", bound=Card)


class Duplicates(Model):
    """Copies: rows whose image, or URL, another row that is kept has. Found over all shards once they are decided."""

    near_bits: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Images whose perceptual hashes differ in at most so many of 128 bits are copies, too; 16 finds "
        "images resized, recompressed or cropped by up to 5%. None compares bytes (sha256) alone.",
    )
    max_per_image: int = Field(default=1, ge=1, description="Rows of one image that stay, each with its own texts.")
    max_per_url: int | None = Field(default=None, ge=1, description="Rows of one URL that stay; all if not given.")


def _listed(value: Any, info: ValidationInfo) -> Any:
    """A list, or the lines of the file that is named in its place; relative to the spec's."""
    if not isinstance(value, str):
        return value
    path = Path(absolute(value, (info.context or {}).get("base", os.curdir)))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}; a list is given as such, or as a text file") from error
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _domain(name: str) -> str:
    """In ASCII, lower case."""
    try:
        ascii_ = name.strip().lower() if name.isascii() else idna.encode(name.strip(), uts46=True).decode()
    except idna.IDNAError as error:
        raise ValueError(f"{name} is no domain: {error}") from error
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", ascii_, re.ASCII):
        raise ValueError(f"{name} is no domain; write `example.org`, which keeps its subdomains out, too")
    return ascii_


def _phrase(text: str) -> str:
    if not regex.search(r"[\p{L}\p{N}]", text):
        raise ValueError(f"{text!r} has no letter or digit, so it is in no text")
    return text.strip()


def _in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))  # neither order nor repetition makes decisions stale


class KeepOut(Model):
    """What is not to be in the dataset, whatever its scores. A list may be a text file of one a line."""

    domains: Annotated[
        tuple[Annotated[str, AfterValidator(_domain)], ...], BeforeValidator(_listed), AfterValidator(_in_order)
    ] = Field(default=(), description="Rows whose URL is under one of these are dropped; `example.org`, any script.")
    words: Annotated[
        tuple[Annotated[str, AfterValidator(_phrase)], ...], BeforeValidator(_listed), AfterValidator(_in_order)
    ] = Field(default=(), description="Texts that have one of these words or phrases, in any case, are dropped.")
    classifier: ClassifierCard | None = Field(
        default=None, description="Card of an image classifier, or its path; for images not safe for work, say."
    )


def named_apart(cards: tuple[_Card, ...]) -> tuple[_Card, ...]:
    """The cards, if no two have one name; else ValueError."""
    if twice := [name for name, times in Counter(card.name for card in cards).items() if times > 1]:
        raise ValueError(
            f"{len(cards)} cards, of which several are named {twice[0]}; what each writes or scores is recorded "
            "under its name: give each its own"
        )
    return cards


def require_one_unit(filters: Sequence[AnyFilter], decision: Decision) -> None:
    """Raise ValueError where filters are to have a mean, or a threshold for all, and their scores have unlike units."""
    units = {card.name: card.unit for card in filters}
    if len(set(units.values())) > 1 and decision == "mean":
        listed = ", ".join(f"{name}: {unit}" for name, unit in units.items())
        raise ValueError(
            f"the filters' scores have unlike units ({listed}): no mean, and no threshold for all, has a meaning; "
            "use decision: vote and leave thresholds to the cards"
        )


class CurateSpec(Model):
    """One CapFilt run: caption, score, decide, commit."""

    kind: Literal["curate"]
    input: Input
    output: OutputLocation = Field(description="Directory or URL of the curated dataset; without `%`.")
    output_options: StorageOptions = Field(
        default={}, description="For the output's store: endpoint_url, region, ... never a secret."
    )
    captioners: tuple[AnyCaptioner, ...] = Field(
        min_length=1, description="Cards, or their paths; each captions every image. Of equal scores the first's wins."
    )
    filters: tuple[AnyFilter, ...] = Field(
        min_length=1, description="Cards, or their paths; each scores every text. Texts are ranked by the mean."
    )
    sampling: Sampling = Sampling()
    thresholds: ThresholdsOverride | None = Field(default=None, description="In place of the filter cards', each.")
    decision: Decision = Field(
        default="mean",
        description="A text matches by `mean` when the filters' mean ITM probability is at least the threshold (by "
        "default the mean of their cards'); by `vote` when that of more than half of them is (by default each card's).",
    )
    keep: Keep = Field(
        default="best",
        description="Which of an image's synthetic texts that match stay: the best one, or all that differ. A web text "
        "is judged by itself.",
    )
    duplicates: Duplicates | None = Field(default=None, description="Drop copies; not looked for if not given.")
    keep_out: KeepOut | None = Field(default=None, description="Domains, words and kinds of images; none if not given.")
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
    lease_seconds: int = Field(
        default=60,
        ge=5,
        le=3600,
        description="A run holds its output. One on another machine that gives no sign of life for so long loses it to "
        "the next run.",
    )
    withdrawn: Withdrawn | None = Field(default=None, description="Lists of what owners withdrew; see docs/removal.md.")
    retention: Retention | None = Field(default=None, description="Which old versions stay readable; without it all.")
    report: bool = Field(
        default=True,
        description="Leave a page for people in `_runs/<run>/report.html`, with small pictures of some rows. Of more "
        "than 200,000 rows it looks at a sample; `capfilt report` looks at all.",
    )
    report_against: Location | None = Field(
        default=None,
        description="Another curated dataset, whose newest version the page compares this one with; opened with "
        "output_options. The version that the run before left if not given.",
    )
    ray: Ray = Ray()

    @field_validator("captioners", "filters")
    @classmethod
    def _named_apart(cls, cards: tuple[_Card, ...]) -> tuple[_Card, ...]:
        return named_apart(cards)

    @model_validator(mode="after")
    def _understood(self) -> CurateSpec:
        """What only the spec as a whole can tell of a card."""
        for card in self.captioners:
            if not isinstance(card, CaptionerCard):
                card.sampled(self.sampling)
        require_one_unit(self.filters, "mean" if self.thresholds else self.decision)
        return self

    @property
    def cards(self) -> dict[str, AnyCard]:
        """Of all models of the run, by their place in the spec: `captioners.0`, ..., `filters.0`, ..."""
        captioners: dict[str, AnyCard] = {f"captioners.{number}": card for number, card in enumerate(self.captioners)}
        return captioners | {f"filters.{number}": card for number, card in enumerate(self.filters)}

    @property
    def effective_thresholds(self) -> tuple[Thresholds, ...]:
        """What :func:`capfilt.decide.decide` compares scores with: one for the mean, each filter's for a vote.

        Each threshold is the spec's; where it gives none, the mean of the filter cards' or, for a vote, the card's own.
        """
        own = self.thresholds.model_dump(exclude_none=True) if self.thresholds else {}
        cards = [card.thresholds for card in self.filters]
        if self.decision == "mean":
            mean = {name: fmean(getattr(card, name) for card in cards) for name in Thresholds.model_fields}
            cards = [Thresholds(**mean)]
        return tuple(card.model_copy(update=own) for card in cards)

    @property
    def placement(self) -> Placement:
        """Resources of the actor that holds all models: the largest of the cards' demands, each."""
        placements = [card.placement for card in self.cards.values()]
        return Placement(**{name: max(getattr(own, name) for own in placements) for name in Placement.model_fields})
