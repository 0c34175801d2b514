"""How captioners write."""

from __future__ import annotations

from pydantic import Field, ValidationError, model_validator

from capfilt.spec.fields import Model


class Sampling(Model):
    """How captioners write (BLIP section 3.3: nucleus sampling, p = 0.9)."""

    candidates: int = Field(default=1, ge=1, le=64, description="Captions that each captioner writes for an image.")
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


class SamplingOverride(Model):
    """How one captioner writes, in place of the spec's `sampling`; what is not given stays the spec's."""

    top_p: float | None = Field(default=None, gt=0, le=1, description="As `sampling` has it.")
    top_k: int | None = Field(default=None, ge=0, description="As `sampling` has it.")
    temperature: float | None = Field(default=None, gt=0, le=10, description="As `sampling` has it.")
    repetition_penalty: float | None = Field(
        default=None, ge=1, le=10, description="As `sampling` has it, but a prompt's tokens do not count as used."
    )
    min_tokens: int | None = Field(default=None, ge=0, le=500, description="As `sampling` has it.")
    max_tokens: int | None = Field(default=None, ge=1, le=500, description="As `sampling` has it.")

    def over(self, sampling: Sampling) -> Sampling:
        """The spec's, with what is given here.

        Raises:
            ValueError: they do not go together.
        """
        given = self.model_dump(exclude_none=True)
        try:
            return Sampling(**(sampling.model_dump() | given))
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
