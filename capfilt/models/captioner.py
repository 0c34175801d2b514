"""The captioner: images -> candidate captions, the same whatever the batch.

B  images    K  candidates an image    R  rows, candidates of images    S  side in pixels    P  prompt tokens with [DEC]
L  new tokens    T  image tokens    D  width    V  vocabulary
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from capfilt.errors import CheckpointError
from capfilt.models import sampling as draws
from capfilt.models.checkpoints import Loaded, load
from capfilt.spec import CaptionerCard, Sampling

# [SEP] ends a caption. The rest are marks, not words: [PAD], [UNK], [CLS], [MASK], [DEC], [ENC] and BERT's [unused12].
_MARK = re.compile(r"\[[A-Za-z]{2,}\d*\]")


class Captioner:
    """BLIP's image-grounded text decoder as a sampler (BLIP section 3.1; salesforce/BLIP, models/blip.py, generate).

    **Reproducible.** A caption is a function of the image's pixels and sha256, the candidate's number, the card and the
    sampling; not of the batch, its order or size, the other candidates, or the worker. The random numbers are the row's
    own (capfilt.models.sampling). The arithmetic is not quite: float32 rounds differently in other batch shapes. So a
    draw that such an error could change is recognised, and its caption is written again alone: one image, one
    candidate. In bfloat16 the errors are too large for that: there only the random numbers are the row's, and captions
    may differ between batch shapes. On other hardware, libraries or thread counts captions written alone may differ.

    Attributes:
        image_size: side in pixels of the images it takes.
        rewritten: captions written again alone, so far; about 0.3% in float32.
    """

    def __init__(
        self, card: CaptionerCard, sampling: Sampling, device: str, tie_tolerance: float = draws.TIE_TOLERANCE
    ) -> None:
        """Load the checkpoint.

        Args:
            device: as torch names it.
            tie_tolerance: nats; see :data:`capfilt.models.sampling.TIE_TOLERANCE`. Unused in bfloat16.

        Raises:
            CheckpointError: as :func:`capfilt.models.checkpoints.load`, or the vocabulary is all marks.
            SpecError: prompt and `sampling.max_tokens` do not fit the network's positions.
        """
        self._blip = load(card, device)
        self._sampling = sampling
        self._batch_size = card.batch_size
        self.image_size = card.image_size
        self.rewritten = 0
        # An error in a logit is stretched by the penalty and the temperature.
        stretch = sampling.repetition_penalty / sampling.temperature
        self._tolerance = tie_tolerance * stretch if card.dtype == "float32" else 0.0
        self._prompt_P = [self._blip.dec, *self._blip.ids(card.prompt)]  # no [CLS], no [SEP]: the decoder continues it
        self._blip.require_positions(
            len(self._prompt_P) + sampling.max_tokens, "captioner.prompt and sampling.max_tokens"
        )
        self._banned_V = _banned(self._blip)

    def caption(self, images_BCSS: Tensor, sha256: Sequence[str | bytes]) -> list[list[str]]:
        """Write K = `sampling.candidates` captions for every image.

        Args:
            images_BCSS: uint8 [B, 3, S, S], resized RGB. Any B; `batch_size` images are in the network at a time.
            sha256: of each image's bytes as they came: hex digits or 32 bytes.

        Returns:
            B lists of K captions, prompt cut, without special tokens; lower case, as bert-base-uncased is. A caption
            can be empty where `min_tokens` is 0.

        Raises:
            ValueError: shapes do not agree, or a sha256 is not one.
            FloatingPointError: the network gives no finite logits.
        """
        if len(images_BCSS) != len(sha256):
            raise ValueError(f"{len(images_BCSS)} images, {len(sha256)} sha256")
        captions: list[list[str]] = []
        with torch.inference_mode():
            for start in range(0, len(sha256), self._batch_size):
                batch = slice(start, start + self._batch_size)
                captions += self._caption_batch(images_BCSS[batch], sha256[batch])
        return captions

    def _caption_batch(self, images_BCSS: Tensor, sha256: Sequence[str | bytes]) -> list[list[str]]:
        seen_BTD = self._blip.see(images_BCSS)
        k = self._sampling.candidates
        keys_R = [draws.row_key(self._sampling.seed, image, candidate) for image in sha256 for candidate in range(k)]
        image_R = torch.arange(len(keys_R), device=self._blip.device) // k
        captions: list[str] = []
        for start in range(0, len(keys_R), self._batch_size):  # rows in the decoder at a time: memory is theirs
            rows = slice(start, start + self._batch_size)
            alone = len(seen_BTD) == 1 and len(keys_R[rows]) == 1
            ids_R, tied_R = self._write(seen_BTD[image_R[rows]], keys_R[rows], 0.0 if alone else self._tolerance)
            for row, tied in enumerate(tied_R, start):
                ids = (
                    self._write_alone(images_BCSS[row // k : row // k + 1], keys_R[row]) if tied else ids_R[row - start]
                )
                captions.append(self._text(ids))
        return [captions[start : start + k] for start in range(0, len(captions), k)]

    def _write_alone(self, images_1CSS: Tensor, key: tuple[int, int]) -> list[int]:
        """The reference that every batch agrees with: one image through the network, one candidate."""
        self.rewritten += 1
        ids_R, _ = self._write(self._blip.see(images_1CSS), [key], 0.0)
        return ids_R[0]

    def _write(
        self, seen_RTD: Tensor, keys_R: Sequence[tuple[int, int]], tolerance: float
    ) -> tuple[list[list[int]], list[bool]]:
        """Decode rows until all have ended: their new ids without the end token, and which met a tie."""
        rows, eos, device = len(keys_R), self._blip.sep, self._blip.device
        ids_RP = torch.tensor(self._prompt_P, device=device).expand(rows, -1)
        used_RV = torch.zeros(rows, len(self._banned_V), dtype=torch.bool, device=device).scatter_(1, ids_RP, True)
        ended_R = torch.zeros(rows, dtype=torch.bool, device=device)
        tied_R = torch.zeros_like(ended_R)
        fed, cache, new_RL = ids_RP, None, []
        for step in range(self._sampling.max_tokens):
            logits_RV, cache = self._next(fed, seen_RTD, cache)
            logits_RV = draws.adjust(logits_RV, used_RV, self._banned_V, eos, step, self._sampling)
            noise_RV = draws.gumbel(keys_R, step, logits_RV.shape[1], device)
            drawn = draws.draw(logits_RV, noise_RV, self._sampling.top_k, self._sampling.top_p, tolerance)
            tied_R |= drawn.tied & ~ended_R
            token_R = torch.where(ended_R, eos, drawn.token)
            new_RL.append(token_R)
            used_RV.scatter_(1, token_R[:, None], True)
            ended_R |= token_R == eos
            if bool((ended_R | tied_R).all()):
                break
            fed = token_R[:, None]
        ids = torch.stack(new_RL, 1).tolist()
        return [row[: row.index(eos)] if eos in row else row for row in ids], tied_R.tolist()

    def _next(self, ids_RL: Tensor, seen_RTD: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits after the last of `ids_RL`, and the cache with their keys and values (the image's too, once)."""
        output = self._blip.model.text_decoder(
            input_ids=ids_RL,
            encoder_hidden_states=seen_RTD,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1], output.past_key_values

    def _text(self, ids: list[int]) -> str:
        text: str = self._blip.tokenizer.decode(ids, skip_special_tokens=True)
        return " ".join(text.removeprefix("##").split())


def _banned(blip: Loaded) -> Tensor:
    """bool [V]: what never enters a caption. Marks, and ids that the tokenizer has no word for."""
    vocabulary = blip.model.config.text_config.vocab_size
    words = (blip.tokenizer.id_to_token(token) for token in range(vocabulary))
    banned = [token != blip.sep and (word is None or bool(_MARK.fullmatch(word))) for token, word in enumerate(words)]
    if sum(banned) >= vocabulary - 1:
        raise CheckpointError(f"{blip.source}: the tokenizer has no words")
    return torch.tensor(banned, device=blip.device)
