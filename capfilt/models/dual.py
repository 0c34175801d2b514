"""Filters with a tower for images and one for texts, CLIP and SigLIP: how alike are their vectors?

B  images    N  texts    J  width of the vectors    L  text tokens
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from capfilt.models.blip import TEXTS_AN_IMAGE
from capfilt.models.checkpoints import DTYPES
from capfilt.models.fitting import Fitting
from capfilt.models.itm import Score
from capfilt.models.pretrained import (
    PROCESSING,
    Inputs,
    alike,
    batched,
    exact,
    load_pretrained,
    locate_pretrained,
    prepared,
    reading,
)
from capfilt.spec import DualCard

_CHARACTERS_A_TOKEN = 100
"""A text is cut to so many for each token that fits, before a tokenizer spends time on the rest."""


class DualFilter:
    """CLIP (Radford et al., ICML 2021) or SigLIP (Zhai et al., ICCV 2023) as transformers has them.

    The score of a text is what its card's `unit` says: the cosine of the two vectors, 0 where it is negative (CLIPScore
    without its factor; Hessel et al., EMNLP 2021), or sigmoid(scale * cosine + bias). Both are in [0, 1]. The cosine
    itself is recorded as the score's `itc`.

    Scores do not depend on the other images or texts of a call but for rounding.

    Attributes:
        image_size: None; it looks at whole pictures, and the checkpoint's own processor resizes them.
    """

    image_size = None

    def __init__(self, card: DualCard, device: str) -> None:
        """Load the checkpoint.

        Args:
            device: as torch names it.

        Raises:
            CheckpointError: not found, not what the card says it is, or it cannot be loaded.
        """
        directory = locate_pretrained(card)
        with reading(directory):
            self._images: Any = AutoImageProcessor.from_pretrained(directory, **PROCESSING)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        self._network = load_pretrained(AutoModel, directory, card, device)
        self._device, self._dtype = torch.device(device), DTYPES[card.dtype]
        self._positions = int(self._network.config.text_config.max_position_embeddings)
        self._siglip = card.model == "siglip"
        self._probable = _sigmoid(card, self._network) if card.unit == "probability" else None
        self._fitting = Fitting(card.batch_size, card.name)
        with reading(directory):
            self._try(1)  # what cannot be done at all is no row's fault
        self._fitting.measure(self._try, self._device, card.placement.gpus)

    @property
    def batch_size(self) -> int:
        """Images in the network at a time, now."""
        return self._fitting.images

    def _try(self, images: int) -> None:
        """Judge as many texts of so many, as long as they can be, to see what that takes."""
        blank = self.prepare(np.zeros((224, 224, 3), np.uint8), "")
        texts = ["a " * self._positions] * (images * TEXTS_AN_IMAGE)
        with exact():
            self._embed_images([blank] * images)
            self._embed_texts(texts)

    def prepare(self, rgb: npt.NDArray[np.uint8], _sha256: str) -> Inputs:
        """What the network sees of one picture: the checkpoint's own processor says.

        Args:
            rgb: uint8 [H, W, 3], the whole picture.
        """
        return prepared(self._images(images=Image.fromarray(rgb), return_tensors="pt"), self._dtype)

    def score(self, images: Sequence[Inputs], texts: Sequence[Sequence[str]]) -> list[list[Score]]:
        """Judge every text of every image.

        Args:
            images: from :meth:`prepare`. Each goes through its tower once, one without texts not at all.
            texts: those of each image, cleaned (capfilt.text.clean). Cut to what the model takes.

        Returns:
            Scores in the shape of `texts`. A text that several images have is read once.

        Raises:
            ValueError: shapes do not agree.
            FloatingPointError: a score is not a number.
        """
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images, texts of {len(texts)}")
        places = {text: place for place, text in enumerate(dict.fromkeys(text for own in texts for text in own))}
        if not places:
            return [[] for _ in texts]
        judged = [image for image, own in enumerate(texts) if own]
        with exact():
            text_NJ = self._embed_texts(list(places))
            seen = dict(zip(judged, self._look([images[image] for image in judged]), strict=True))
        scores: list[list[Score]] = []
        for image, own in enumerate(texts):
            cosine_N = text_NJ[[places[text] for text in own]] @ seen[image] if own else torch.empty(0)
            scores.append([self._score(cosine) for cosine in cosine_N.tolist()])
        return scores

    def embed_images(self, images: Sequence[Inputs]) -> Tensor:
        """Vectors of images, from :meth:`prepare`: float32 [B, J] of length 1, on the CPU.

        Raises:
            FloatingPointError: they are not numbers.
        """
        with exact():
            return _finite(torch.stack(self._look(images)))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Vectors of texts, cleaned and cut as :meth:`score`'s: float32 [N, J] of length 1, on the CPU.

        Raises:
            FloatingPointError: they are not numbers.
        """
        with exact():
            return _finite(self._embed_texts(texts))

    def _score(self, cosine: float) -> Score:
        if not math.isfinite(cosine):
            raise FloatingPointError("the filter's scores are not numbers")
        cosine = min(1.0, max(-1.0, cosine))  # rounding may leave the range
        if self._probable is None:
            return Score(max(0.0, cosine), cosine)
        scale, bias = self._probable
        return Score(1 / (1 + math.exp(-max(-700.0, min(700.0, scale * cosine + bias)))), cosine)

    def _look(self, images: Sequence[Inputs]) -> list[Tensor]:
        """Vectors of images, those that are alike together."""
        seen: dict[int, Tensor] = {}
        for group in alike(list(images)):
            seen |= zip(group, self._seen([images[place] for place in group]), strict=True)
        return [seen[place] for place in range(len(images))]

    def _seen(self, images: Sequence[Inputs]) -> list[Tensor]:
        return self._fitting.run(len(images), lambda some: list(self._embed_images(images[some])))

    def _embed_images(self, images: Sequence[Inputs]) -> Tensor:
        """Vectors of images that are alike: float32 [B, J] of length 1, on the CPU."""
        inputs = batched(list(images), self._device)
        found = self._network.get_image_features(**inputs)
        return normalize(found.pooler_output.float(), dim=-1).cpu()

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Vectors of texts: float32 [N, J] of length 1, on the CPU."""
        most, room = self._fitting.images * TEXTS_AN_IMAGE, self._positions * _CHARACTERS_A_TOKEN
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))  # little of what is read is padding
        parts = [
            self._read([texts[n][:room] for n in order[start : start + most]]) for start in range(0, len(order), most)
        ]
        inverse_N = torch.tensor(order).argsort()
        return torch.cat(parts)[inverse_N]

    def _read(self, texts: list[str]) -> Tensor:
        # SigLIP was trained on texts padded to the full length, without a mask. Web texts may spell a special token:
        # they are read as the characters they are.
        tokens = self._tokenizer(
            texts,
            padding="max_length" if self._siglip else True,
            truncation=True,
            max_length=self._positions,
            split_special_tokens=True,
            return_tensors="pt",
        ).to(self._device)
        mask = {} if self._siglip else {"attention_mask": tokens["attention_mask"]}
        found = self._network.get_text_features(input_ids=tokens["input_ids"], **mask)
        return normalize(found.pooler_output.float(), dim=-1).cpu()


def _finite(vectors: Tensor) -> Tensor:
    if not bool(torch.isfinite(vectors).all()):
        raise FloatingPointError("the filter's scores are not numbers")
    return vectors


def _sigmoid(card: DualCard, network: Any) -> tuple[float, float]:
    """Scale and bias of the probability: the card's, else what the network was trained with."""
    if card.scale is not None and card.bias is not None:
        return card.scale, card.bias
    return float(network.logit_scale.float().exp()), float(network.logit_bias.float())
