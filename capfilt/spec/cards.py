"""Model cards: what all have in common, and those of BLIP. Those of other models: capfilt.spec.kinds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from capfilt.spec.fields import Checkpoint, Model


class Placement(Model):
    """What one actor takes from the cluster, and how many actors run. All models of a run share one actor."""

    gpus: float = Field(default=0, ge=0, le=64, description="GPUs an actor holds; 0 computes on the CPU.")
    cpus: float = Field(default=1, gt=0, le=1024, description="CPU cores an actor holds; also its decoding threads.")
    min_actors: int = Field(default=1, ge=1, description="Actors kept alive.")
    max_actors: int = Field(default=1, ge=1, description="Actors the pool may grow to.")

    @model_validator(mode="after")
    def _ordered(self) -> Placement:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors ({self.min_actors}) is above max_actors ({self.max_actors})")
        return self


def _batch_size(value: Any) -> Any:
    if value != "auto" and not (type(value) is int and 1 <= value <= 4096):
        raise ValueError("expected `auto`, or a whole number from 1 to 4096")
    return value


BatchSize = Annotated[
    int | Literal["auto"],
    BeforeValidator(_batch_size),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1, "maximum": 4096}]}),
]
"""Images in one forward pass."""

Unit = Literal["cosine", "probability"]
"""What a filter's scores, and so its thresholds, are."""


class Card(Model):
    """What every card has, whatever its model is."""

    name: str = Field(pattern=r"^[\w.-]{1,80}$", description="Recorded with every text the model wrote or scored.")
    licence: str = Field(default="unknown", description="Of the weights, for the dataset card.")
    placement: Placement = Field(default=Placement(), description="Resources of an actor that holds the model.")

    @property
    def traits(self) -> tuple[str, ...]:
        """What people are told of the model beside its name."""
        return ()


class LocalCard(Card):
    """What a card has whose model runs here."""

    checkpoint: Checkpoint = Field(description="Where the weights come from: `hub` and `revision`, or `path`.")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Of weights and activations.")
    batch_size: BatchSize = Field(
        default="auto",
        description="Images in one forward pass; `auto` is what a GPU's memory holds, up to 256, and 32 on a CPU.",
    )
    allow_pickle: bool = Field(
        default=False, description="Load pytorch_model.bin where no safetensors exist (weights only, still no code)."
    )

    @property
    def traits(self) -> tuple[str, ...]:
        return (*super().traits, self.dtype)


class _BlipCard(LocalCard):
    model: Literal["blip"] = Field(default="blip", description="Other models have cards of their own.")
    image_size: int = Field(ge=8, le=1024, description="Side in pixels; images are resized to a square of it.")

    @property
    def traits(self) -> tuple[str, ...]:
        return (f"{self.image_size} px", *super().traits)


class CaptionerCard(_BlipCard):
    """A BLIP captioner (`BlipForConditionalGeneration`)."""

    role: Literal["captioner"]
    prompt: str = Field(
        default="a picture of ",
        max_length=200,
        description="Text the decoder is given first; cut from the caption. COCO-fine-tuned captioners expect it.",
    )


class ThresholdsOverride(Model):
    """Thresholds in place of the filter cards'; what is not given stays the cards'."""

    web: float | None = Field(default=None, ge=0, le=1, description="For web texts.")
    synthetic: float | None = Field(default=None, ge=0, le=1, description="For captioners' texts.")


class Thresholds(ThresholdsOverride):
    """Match probability below which a text is dropped (BLIP section 3.3: unmatched by the ITM head is p < 0.5)."""

    web: float = Field(default=0.5, ge=0, le=1, description="For web texts.")
    synthetic: float = Field(default=0.5, ge=0, le=1, description="For captioners' texts.")


class FilterCard(_BlipCard):
    """A BLIP filter (`BlipForImageTextRetrieval`)."""

    role: Literal["filter"]
    first_token: Literal["[ENC]", "[CLS]"] = Field(
        default="[ENC]",
        description="Token at position 0 of the image-grounded encoder; the ITM head was trained with [ENC].",
    )
    max_tokens: int = Field(default=35, ge=2, le=512, description="Longer texts are cut (BLIP fine-tunes with 35).")
    thresholds: Thresholds = Field(default=Thresholds(), description="Used where the spec gives none.")
    itc: bool = Field(
        default=True,
        description="Score image-text contrast, too: recorded, never decided by; another pass over every text.",
    )

    @property
    def unit(self) -> Unit:
        """What its scores are."""
        return "probability"


class ClassifierCard(Model):
    """An image classifier (transformers' `AutoModelForImageClassification`) of what is to be kept out."""

    role: Literal["classifier"]
    name: str = Field(pattern=r"^[\w.-]{1,80}$", description="For messages.")
    checkpoint: Checkpoint = Field(description="config.json, safetensors and preprocessor_config.json.")
    image_size: int = Field(ge=8, le=1024, description="Side in pixels; images are resized to a square of it.")
    batch_size: int = Field(default=16, ge=1, le=4096, description="Images in one forward pass.")
    labels: tuple[str, ...] = Field(min_length=1, description="The model's labels for what is to be kept out.")
    threshold: float = Field(
        default=0.5, ge=0, le=1, description="Of the labels' probability, together: from it on a row is dropped."
    )
    licence: str = Field(default="unknown", description="Of the weights, for the dataset card.")
