"""Cards of models other than BLIP, and which kind a card is: its field `model` says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from capfilt.spec.cards import CaptionerCard, Card, FilterCard, LocalCard, Thresholds, Unit
from capfilt.spec.fields import no_secret
from capfilt.spec.sampling import Sampling, SamplingOverride


class _Writes(Card):
    role: Literal["captioner"]
    sampling: SamplingOverride = Field(
        default=SamplingOverride(), description="In place of the spec's `sampling`, each of its fields."
    )

    def sampled(self, sampling: Sampling) -> Sampling:
        """How it writes where the spec's sampling is this.

        Raises:
            ValueError: the two do not go together; names the card.
        """
        try:
            return self.sampling.over(sampling)
        except ValueError as error:
            raise ValueError(f"captioner {self.name}: sampling: {error}") from None


class GeneratorCard(_Writes, LocalCard):
    """A captioner of transformers' `AutoModelForImageTextToText`: BLIP-2, LLaVA, ..."""

    model: Literal["transformers"]
    prompt: str = Field(
        default="",
        max_length=4000,
        description="Text the model is given with the image; what it writes after that is the caption. A model that "
        "marks the image's place in its text needs the mark here, unless `chat` puts it there.",
    )
    chat: bool = Field(
        default=False,
        description="Give the prompt, after the image, as the user's turn in the checkpoint's chat template.",
    )

    @property
    def traits(self) -> tuple[str, ...]:
        return (self.model, *super().traits)


OPENAI_LACKS = {"top_k": 0, "repetition_penalty": 1, "min_tokens": 0}
"""Of `sampling`, what OpenAI's own interface has no parameter for, and the value that means none is needed."""


def _base(url: str) -> str:
    if set("?#@") & set(no_secret(url)):  # what stands there may be a key: it is not repeated
        raise PydanticCustomError("secret", "give the address alone, for example http://localhost:8000/v1")
    if not url.startswith(("http://", "https://")):
        raise ValueError("expected http:// or https://, for example http://localhost:8000/v1")
    return url.rstrip("/")


class EndpointCard(_Writes):
    """A captioner behind an endpoint that speaks OpenAI's chat completions: vLLM and its like."""

    model: Literal["openai"]
    base_url: Annotated[str, AfterValidator(_base)] = Field(
        description="Up to and without `/chat/completions`: `http://localhost:8000/v1`. Every worker asks it."
    )
    served_model: str = Field(min_length=1, max_length=200, description="What the endpoint calls the model.")
    revision: str = Field(
        default="",
        max_length=200,
        description="Of the served model, in your words: the endpoint does not tell. Another one captions anew.",
    )
    api_key_variable: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_]\w*$",
        description="Name of the environment variable that holds the key, on every worker. The key itself stands in no "
        "card.",
    )
    prompt: str = Field(min_length=1, max_length=4000, description="Sent after the image, as the user's message.")
    parameters: Literal["vllm", "openai"] = Field(
        default="vllm",
        description="Which parameters the endpoint knows: `openai` has no top_k, repetition_penalty and min_tokens.",
    )
    longest_side: int = Field(
        default=1024, ge=16, le=8192, description="Pixels; larger images are scaled down before they are sent."
    )
    concurrency: int = Field(default=32, ge=1, le=1024, description="Requests of a worker at a time.")
    timeout: float = Field(default=120, gt=0, le=3600, description="Seconds an answer may take.")
    retries: int = Field(
        default=6, ge=0, le=20, description="Of a request that fails for a moment; the pauses grow from a second to 60."
    )

    @property
    def traits(self) -> tuple[str, ...]:
        revision = (f"revision {self.revision}",) if self.revision else ()
        return (self.model, self.served_model, *revision, *super().traits)

    def sampled(self, sampling: Sampling) -> Sampling:
        """As a generator's; raises ValueError, too, where the endpoint does not know a parameter that is set."""
        own = super().sampled(sampling)
        unknown = [name for name, off in OPENAI_LACKS.items() if getattr(own, name) != off]
        if self.parameters == "openai" and unknown:
            off = ", ".join(f"{name}: {OPENAI_LACKS[name]}" for name in unknown)
            raise ValueError(
                f"captioner {self.name}: OpenAI's interface has no {', '.join(unknown)}; write sampling: {{{off}}} in "
                "the card, or parameters: vllm if the endpoint has them"
            )
        return own


class DualThresholds(Thresholds):
    """In the card's own unit, so without defaults: cosines of a matching pair are about 0.3 for CLIP."""

    web: float = Field(ge=0, le=1, description="For web texts.")
    synthetic: float = Field(ge=0, le=1, description="For captioners' texts.")


class DualCard(LocalCard):
    """A filter by the similarity of an image's and a text's vectors: CLIP, SigLIP."""

    role: Literal["filter"]
    model: Literal["clip", "siglip"] = Field(description="Whose two towers and processor the checkpoint has.")
    thresholds: DualThresholds = Field(description="In this card's unit; used where the spec gives none.")
    unit: Unit = Field(
        default="cosine",
        description="Of scores and thresholds: cosine similarity, 0 where it is negative; or sigmoid(scale * cosine + "
        "bias).",
    )
    scale: float | None = Field(
        default=None, gt=0, le=1e6, description="Of the probability; SigLIP's own if not given, CLIP has none."
    )
    bias: float | None = Field(default=None, ge=-1e6, le=1e6, description="Of the probability; as `scale`.")

    @property
    def traits(self) -> tuple[str, ...]:
        return (self.model, self.unit, *super().traits)

    @model_validator(mode="after")
    def _calibrated(self) -> DualCard:
        given = (self.scale is not None) + (self.bias is not None)
        if self.unit == "cosine" and given:
            raise ValueError("scale and bias make a probability; write unit: probability, or leave them out")
        if given == 1:
            raise ValueError("scale and bias go together; give both")
        if self.unit == "probability" and self.model == "clip" and not given:
            raise ValueError(
                "a probability of CLIP's needs scale and bias, fitted on pairs known to match or not: CLIP was trained "
                "to rank, not to tell; or write unit: cosine"
            )
        return self


AnyCard = CaptionerCard | GeneratorCard | EndpointCard | FilterCard | DualCard


def _by(field: str, default: str | None, *known: str) -> Discriminator:
    """Tells cards apart by a field, which may be left out if there is a default."""

    def tag(card: Any) -> Any:
        # What is neither a mapping nor a card meets the first kind, which says so.
        return card.get(field, default) if isinstance(card, Mapping) else getattr(card, field, known[0])

    return Discriminator(
        tag,
        custom_error_type="kind",
        custom_error_message=f"`{field}` says what it is: expected {' or '.join(known)}",
    )


AnyCaptioner = Annotated[
    Annotated[CaptionerCard, Tag("blip")]
    | Annotated[GeneratorCard, Tag("transformers")]
    | Annotated[EndpointCard, Tag("openai")],
    _by("model", "blip", "blip", "transformers", "openai"),
]
"""A captioner's card of any kind."""

AnyFilter = Annotated[
    Annotated[FilterCard, Tag("blip")] | Annotated[DualCard, Tag("clip")] | Annotated[DualCard, Tag("siglip")],
    _by("model", "blip", "blip", "clip", "siglip"),
]
"""A filter's card of any kind."""

ModelCard = Annotated[
    Annotated[AnyCaptioner, Tag("captioner")] | Annotated[AnyFilter, Tag("filter")],
    _by("role", None, "captioner", "filter"),
]
"""A card."""
