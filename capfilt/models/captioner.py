"""The captioner: images -> candidate captions, the same whatever the batch.

B  images    K  candidates an image    R  rows, candidates of images    S  side in pixels    T  image tokens
W  vision width    V  vocabulary
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from capfilt.errors import CheckpointError
from capfilt.models import decoding
from capfilt.models import sampling as draws
from capfilt.models.blip import TEXTS_AN_IMAGE, CaptioningNetwork, Keys
from capfilt.models.checkpoints import Loaded, load_to_run
from capfilt.models.fitting import Fitting
from capfilt.models.recorded import Player, cuda_graph
from capfilt.spec import CaptionerCard, Sampling

# [SEP] ends a caption. The rest are marks, not words: [PAD], [UNK], [CLS], [MASK], [DEC], [ENC] and BERT's [unused12].
_MARK = re.compile(r"\[[A-Za-z]{2,}\d*\]")


class Captioner:
    """BLIP's image-grounded text decoder as a writer (BLIP section 3.1; salesforce/BLIP, models/blip.py, generate).

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
        self._blip = load_to_run(card, device)
        self._sampling = sampling
        decoder = self._blip.model.text_decoder
        self._player = Player(decoder, cuda_graph) if self._blip.device.type == "cuda" else None
        self._fitting = Fitting(card.batch_size, card.name, self._player.forget if self._player else None)
        self.image_size = card.image_size
        self.rewritten = 0
        # An error in a logit is stretched by the penalty and the temperature.
        stretch = sampling.repetition_penalty / sampling.temperature
        self._tolerance = tie_tolerance * stretch if card.dtype == "float32" else 0.0
        prompt = [self._blip.dec, *self._blip.ids(card.prompt)]  # no [CLS], no [SEP]: the decoder continues it
        self._blip.require_positions(len(prompt) + sampling.max_tokens, "captioner.prompt and sampling.max_tokens")
        self._rules = decoding.Rules(prompt, self._blip.sep, _banned(self._blip), sampling)
        self._fitting.measure(self._try, self._blip.device, card.placement.gpus)
        if self._player and card.batch_size != "auto":  # which has tried already
            with torch.inference_mode():
                self._try(min(2, card.batch_size))  # what cannot be recorded here is no row's fault

    @property
    def batch_size(self) -> int:
        """Images in the network at a time, now."""
        return self._fitting.images

    def _try(self, images: int) -> None:
        """Caption so many, to see what that takes."""
        blank_BCSS = torch.zeros((images, 3, self.image_size, self.image_size), dtype=torch.uint8)
        self._caption_batch(blank_BCSS, [bytes(32)] * images)

    def caption(self, images_BCSS: Tensor, sha256: Sequence[str | bytes]) -> list[list[str]]:
        """Write K = `sampling.candidates` captions for every image.

        Args:
            images_BCSS: uint8 [B, 3, S, S], resized RGB. Any B; `batch_size` images are in the network at a time,
                with at most 8 times as many captions; half as many, from then on, where the device's memory ran out.
            sha256: of each image's bytes as they came: hex digits or 32 bytes.

        Returns:
            B lists of K captions, prompt cut, without special tokens; lower case, as bert-base-uncased is. A caption
            can be empty where `min_tokens` is 0.

        Raises:
            ValueError: shapes do not agree, or a sha256 is not one.
            FloatingPointError: the network gives no finite logits.
            torch.OutOfMemoryError: one image does not fit the device's memory.
        """
        if len(images_BCSS) != len(sha256):
            raise ValueError(f"{len(images_BCSS)} images, {len(sha256)} sha256")
        with torch.inference_mode():
            return self._fitting.run(len(sha256), lambda some: self._caption_batch(images_BCSS[some], sha256[some]))

    def describe(self, images_BCSS: Tensor, beams: int = 3, length_penalty: float = 1.0) -> list[str]:
        """Write the likeliest caption of every image, for evaluation: beam search, or greedy with one beam.

        `sampling`'s lengths and repetition penalty hold, the rest of it does not. Published captions of COCO come from
        3 beams, a repetition penalty of 1, and 1 to 16 tokens after the prompt (salesforce/BLIP, configs/
        caption_coco.yaml: 5 to 20 with it). Batches may change the choice between captions of almost equal score.

        Args:
            images_BCSS: as :meth:`caption`'s.
            beams: 1 or more.
            length_penalty: as :func:`capfilt.models.decoding.beam`'s.

        Returns:
            B captions, as :meth:`caption`'s.

        Raises:
            ValueError, FloatingPointError: as :meth:`caption`.
        """
        with torch.inference_mode():
            return self._fitting.run(
                len(images_BCSS), lambda some: self._describe_batch(images_BCSS[some], beams, length_penalty)
            )

    def _describe_batch(self, images_BCSS: Tensor, beams: int, length_penalty: float) -> list[str]:
        ids_B: list[list[int]] = []
        for _, image in self._looks(self._blip.see(images_BCSS), beams):
            if beams == 1:
                ids_B += decoding.greedy(*self._begin(image, self._player), self._rules)
            else:
                ids_B += decoding.beam(*self._begin(image, None), self._rules, beams, length_penalty)
        return [self._text(ids) for ids in ids_B]

    def _caption_batch(self, images_BCSS: Tensor, sha256: Sequence[str | bytes]) -> list[list[str]]:
        seen_BTW = self._blip.see(images_BCSS)
        k, most, captions = self._sampling.candidates, self._rows, []
        for images, image in self._looks(seen_BTW, k):
            for first in range(0, k, most):  # more than one turn only if one image has so many candidates
                candidates = range(first, min(first + most, k))
                rows = [(row, candidate) for row in images for candidate in candidates]
                keys_R = [draws.row_key(self._sampling.seed, sha256[row], candidate) for row, candidate in rows]
                alone = len(seen_BTW) == len(rows) == 1
                played = not alone and len(candidates) == min(k, most)  # a recording has one number of candidates
                player = self._player if played else None
                ids_R, tied_R = self._write(image, keys_R, 0.0 if alone else self._tolerance, player)
                for (row, _), key, ids, tied in zip(rows, keys_R, ids_R, tied_R, strict=True):
                    captions.append(self._text(self._write_alone(images_BCSS[row : row + 1], key) if tied else ids))
        return [captions[start : start + k] for start in range(0, len(captions), k)]

    @property
    def _rows(self) -> int:
        """In the decoder at a time."""
        return self._fitting.images * TEXTS_AN_IMAGE

    def _looks(self, seen_BTW: Tensor, each: int) -> Iterator[tuple[range, list[Keys]]]:
        """As many images at a time as have the most rows, `each` of one: which, and what their texts read of them."""
        few = max(1, self._rows // each)
        for start in range(0, len(seen_BTW), few):
            some_BTW = seen_BTW[start : start + few]
            yield range(start, start + len(some_BTW)), self._blip.model.text_decoder.bert.look(some_BTW)

    def _write_alone(self, images_1CSS: Tensor, key: tuple[int, int]) -> list[int]:
        """The reference that every batch agrees with: one image through the network, one candidate."""
        self.rewritten += 1
        image = self._blip.model.text_decoder.bert.look(self._blip.see(images_1CSS))
        return self._write(image, [key], 0.0, None)[0][0]

    def _begin(self, image: list[Keys], player: Player | None) -> tuple[Tensor, decoding.Follow]:
        return decoding.begin(self._blip.model.text_decoder, image, self._rules, player)

    def _write(
        self, image: list[Keys], keys_R: Sequence[tuple[int, int]], tolerance: float, player: Player | None
    ) -> tuple[list[list[int]], list[bool]]:
        width, vocabulary = draws.WIDTH, len(self._rules.banned_V)
        while True:
            written = decoding.sample(*self._begin(image, player), self._rules, keys_R, tolerance, width)
            if written is not None:
                return written
            width = min(8 * width, vocabulary)  # the first step or two tell: little is written in vain

    def _text(self, ids: list[int]) -> str:
        text: str = self._blip.tokenizer.decode(ids, skip_special_tokens=True)
        return " ".join(text.removeprefix("##").split())


def _banned(blip: Loaded[CaptioningNetwork]) -> Tensor:
    """bool [V]: what never enters a caption. Marks, and ids that the tokenizer has no word for."""
    vocabulary = blip.model.config.text_config.vocab_size
    words = (blip.tokenizer.id_to_token(token) for token in range(vocabulary))
    banned = [token != blip.sep and (word is None or bool(_MARK.fullmatch(word))) for token, word in enumerate(words)]
    if sum(banned) >= vocabulary - 1:
        raise CheckpointError(f"{blip.source}: the tokenizer has no words")
    return torch.tensor(banned, device=blip.device)
