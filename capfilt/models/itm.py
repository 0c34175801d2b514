"""The filter: images and texts -> match probability and similarity.

B  images    N  texts, of all images    S  side in pixels    T  image tokens    L  text tokens    D  width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from capfilt.models.checkpoints import load
from capfilt.spec import FilterCard

_CHARACTERS_A_TOKEN = 100
"""WordPiece gives up on words longer than this (bert-base-uncased, max_input_chars_per_word): one [UNK] each."""


class Score(NamedTuple):
    """What the filter thinks of one text of one image.

    Attributes:
        itm: the ITM head's probability of a match, in [0, 1]; what CapFilt decides by (BLIP section 3.3).
        itc: cosine of the two unimodal embeddings, in [-1, 1]; recorded, not used in the decision.
    """

    itm: float
    itc: float


class ItmFilter:
    """BLIP's image-text matching and contrastive heads (BLIP section 3.1; salesforce/BLIP, models/blip_itm.py).

    Position 0 of the image-grounded encoder is the card's `first_token`: [ENC], as the head was trained
    (models/blip_retrieval.py), where transformers and the authors' demo feed [CLS]. The unimodal encoder gets [CLS].

    Scores do not depend on the other images or texts of a call but for rounding, 1e-6 or so in float32.

    Attributes:
        image_size: side in pixels of the images it takes.
    """

    def __init__(self, card: FilterCard, device: str) -> None:
        """Load the checkpoint.

        Args:
            device: as torch names it.

        Raises:
            CheckpointError: as :func:`capfilt.models.checkpoints.load`.
            SpecError: `max_tokens` is more than the network's positions.
        """
        self._blip = load(card, device)
        self._blip.require_positions(card.max_tokens, "filter.max_tokens")
        self._first = self._blip.enc if card.first_token == "[ENC]" else self._blip.cls
        self._max_tokens = card.max_tokens
        self._batch_size = card.batch_size
        self.image_size = card.image_size

    def score(self, images_BCSS: Tensor, texts: Sequence[Sequence[str]]) -> list[list[Score]]:
        """Judge every text of every image.

        Args:
            images_BCSS: uint8 [B, 3, S, S], resized RGB. Each goes through the vision transformer once, one without
                texts not at all. Any B; `batch_size` images, then as many texts, are in the network at a time.
            texts: those of each image, cleaned (capfilt.text.clean). Cut to `max_tokens`, [SEP] kept.

        Returns:
            Scores in the shape of `texts`.

        Raises:
            ValueError: shapes do not agree.
            FloatingPointError: a score is not a number.
        """
        if len(images_BCSS) != len(texts):
            raise ValueError(f"{len(images_BCSS)} images, texts of {len(texts)}")
        scores: list[list[Score]] = [[] for _ in texts]
        judged = [image for image, own in enumerate(texts) if own]
        with torch.inference_mode():
            for start in range(0, len(judged), self._batch_size):
                batch = judged[start : start + self._batch_size]
                owners = [image for image in batch for _ in texts[image]]
                flat = [text for image in batch for text in texts[image]]
                for image, score in zip(
                    owners, self._score_batch(images_BCSS[batch], batch, owners, flat), strict=True
                ):
                    scores[image].append(score)
        return scores

    def _score_batch(
        self, images_BCSS: Tensor, batch: Sequence[int], owners: Sequence[int], flat: Sequence[str]
    ) -> list[Score]:
        seen_BTD = self._blip.see(images_BCSS)
        place = {image: position for position, image in enumerate(batch)}
        image_N = torch.tensor([place[image] for image in owners], device=self._blip.device)
        scores: list[Score] = []
        for start in range(0, len(flat), self._batch_size):  # the image's tokens are copied for each text: bound that
            some = slice(start, start + self._batch_size)
            scores += self._score_texts(seen_BTD[image_N[some]], flat[some])
        return scores

    def _score_texts(self, seen_NTD: Tensor, texts: Sequence[str]) -> list[Score]:
        ids_NL, mask_NL = self._tokens(texts)
        model = self._blip.model
        grounded_NLD = model.text_encoder(
            input_ids=ids_NL, attention_mask=mask_NL, encoder_hidden_states=seen_NTD
        ).last_hidden_state
        itm_N = model.itm_head(grounded_NLD[:, 0]).float().softmax(-1)[:, 1]
        unimodal_NL = ids_NL.index_fill(1, torch.zeros(1, dtype=torch.int64, device=ids_NL.device), self._blip.cls)
        text_NLD = model.text_encoder(input_ids=unimodal_NL, attention_mask=mask_NL).last_hidden_state
        image_ND = normalize(model.vision_proj(seen_NTD[:, 0]).float(), dim=-1)
        text_ND = normalize(model.text_proj(text_NLD[:, 0]).float(), dim=-1)
        itc_N = (image_ND * text_ND).sum(-1).clamp(-1, 1)  # rounding may leave the range by 1e-7; NaN stays
        if not bool(torch.isfinite(itm_N + itc_N).all()):
            raise FloatingPointError("the filter's scores are not numbers")
        return [Score(*pair) for pair in zip(itm_N.tolist(), itc_N.tolist(), strict=True)]

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids [N, L] with the first token and [SEP], padded to the longest; mask, 1 where there is text."""
        room = self._max_tokens - 2
        rows = [
            [self._first, *self._blip.ids(text[: room * _CHARACTERS_A_TOKEN])[:room], self._blip.sep] for text in texts
        ]
        longest = max(map(len, rows))
        ids = [row + [self._blip.pad] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return torch.tensor(ids, device=self._blip.device), torch.tensor(mask, device=self._blip.device)
