"""What a captioner of any kind writes of test images, against their texts and the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from capfilt.errors import EndpointError
from capfilt.evaluate import bleu4, cider
from capfilt.models.completions import AnswerError
from capfilt.models.squares import Show
from capfilt.testset import LabelledImage
from capfilt.truth import Judge

Write = Callable[[Any, Sequence[str]], Sequence[str | None]]
"""Captions of a batch that Show gave, and of the sha256 of its images; None where an image gets none."""


@dataclass(frozen=True, slots=True)
class Captioned:
    """Captions against the images' own texts, and against the truth.

    Attributes:
        bleu4: in [0, 1].
        cider: in [0, 10]; None for a single image, of which it says nothing.
        mean_words: of a caption.
        distinct: different captions.
        judged: captions whose truth is known.
        true: fraction of the judged that are true; None where none is judged.
        exact: fraction that are true and leave nothing out; None where the truth does not say.
        refused: images that an endpoint did not caption. They are left out of all the others.
    """

    bleu4: float
    cider: float | None
    mean_words: float
    distinct: int
    judged: int
    true: float | None
    exact: float | None
    refused: int = 0


def caption_images(write: Write, show: Show, images: Sequence[LabelledImage], judge: Judge | None) -> Captioned:
    """Caption every image, and compare.

    Raises:
        FloatingPointError: the network gives no finite logits.
        EndpointError: an endpoint captions none of the images.
    """
    written: list[str | None] = []
    for batch in show(0, len(images)):
        some = images[len(written) : len(written) + len(batch)]
        written += write(batch, [image.sha256 for image in some])
    known = [(image, text) for image, text in zip(images, written, strict=True) if text is not None]
    if not known:
        raise EndpointError(f"the endpoint refused all {len(images):,} images of pairs; ask it for one by hand")
    captions, references = [text for _, text in known], [image.texts for image, _ in known]
    both = [(image.sha256, caption) for image, caption in known] if judge else []
    true = [judge.is_true(*pair) for pair in both] if judge else []
    exact = [judge.names_whole(*pair) for pair in both] if judge else []
    return Captioned(
        bleu4=bleu4(captions, references),
        cider=cider(captions, references) if len(captions) > 1 else None,
        mean_words=float(np.mean([len(caption.split()) for caption in captions])),
        distinct=len(set(captions)),
        judged=sum(verdict is not None for verdict in true),
        true=_fraction(true),
        exact=_fraction(exact),
        refused=len(images) - len(known),
    )


def first_captions(captioner: Any) -> Write:
    """The first candidate of a captioner that looks at whole pictures.

    Args:
        captioner: capfilt.models.generator.GeneratorCaptioner, or an endpoint's.
    """

    def write(batch: Sequence[Any], sha256: Sequence[str]) -> list[str | None]:
        try:
            return [own[0] for own in captioner.caption(batch, sha256)]
        except AnswerError:  # of one of them; what the others' answers are is known already
            return [_one(image, digest) for image, digest in zip(batch, sha256, strict=True)]

    def _one(image: Any, digest: str) -> str | None:
        try:
            return str(captioner.caption([image], [digest])[0][0])
        except AnswerError:
            return None

    return write


def _fraction(verdicts: Sequence[bool | None]) -> float | None:
    known = [verdict for verdict in verdicts if verdict is not None]
    return sum(known) / len(known) if known else None
