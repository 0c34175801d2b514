"""Captioners of transformers, BLIP-2 and others: images -> candidate captions, the same whatever the batch.

R  rows, candidates of images    V  vocabulary    L  new tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from capfilt.errors import CheckpointError, SpecError
from capfilt.models import sampling as draws
from capfilt.models.checkpoints import DTYPES
from capfilt.models.fitting import Fitting
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
from capfilt.spec import GeneratorCard, Sampling

_Row = tuple[Inputs, tuple[int, int]]
"""What the network reads for one candidate, and the key of its random numbers."""


class GeneratorCaptioner:
    """Any model of transformers' `AutoModelForImageTextToText`.

    transformers' own `generate` runs it; which token comes next is drawn here, with random numbers that are the row's
    (capfilt.models.sampling). So a caption is reproducible as :class:`capfilt.models.captioner.Captioner`'s is: in
    float32 whatever the batch, for a draw that rounding could change is made again alone; in bfloat16 only the random
    numbers are the row's. Images whose inputs have other shapes are never in one batch: nothing is padded.

    Attributes:
        image_size: None; it looks at whole pictures, and the checkpoint's own processor resizes them.
        rewritten: captions written again alone, so far.
    """

    image_size = None

    def __init__(
        self, card: GeneratorCard, sampling: Sampling, device: str, tie_tolerance: float = draws.TIE_TOLERANCE
    ) -> None:
        """Load the checkpoint, and caption twice to see that it can.

        Args:
            device: as torch names it.
            tie_tolerance: nats; see :data:`capfilt.models.sampling.TIE_TOLERANCE`. Unused in bfloat16.

        Raises:
            CheckpointError: not found, or it cannot be loaded or caption.
            SpecError: its prompt has no place for the image, or is too long with `max_tokens`.
        """
        directory = locate_pretrained(card)
        with reading(directory):
            self._processor: Any = AutoProcessor.from_pretrained(directory, **PROCESSING)
        self._network = load_pretrained(AutoModelForImageTextToText, directory, card, device)
        self._device, self._dtype, self._sampling = torch.device(device), DTYPES[card.dtype], sampling
        self._text, self._options = _asked(self._processor, card, directory)
        self._ends = _ends(self._network, self._processor.tokenizer, directory)
        with reading(directory):
            vocabulary = int(self._network.get_output_embeddings().weight.shape[0])
            self._banned_V = _banned(self._processor.tokenizer, self._ends, vocabulary).to(self._device)
        self._generation = _greedy(self._network, self._ends, self._processor.tokenizer, sampling.max_tokens)
        stretch = sampling.repetition_penalty / sampling.temperature
        self._tolerance = tie_tolerance * stretch if card.dtype == "float32" else 0.0
        self._fitting = Fitting(card.batch_size, card.name)
        self.rewritten = 0
        self._try_out(directory)
        self._fitting.measure(self._try, self._device, card.placement.gpus)

    @property
    def batch_size(self) -> int:
        """Rows in the network at a time, now: candidates are rows of their own."""
        return self._fitting.images

    def prepare(self, rgb: npt.NDArray[np.uint8], _sha256: str) -> Inputs:
        """What the network reads of one picture and the prompt: the checkpoint's own processor says.

        Args:
            rgb: uint8 [H, W, 3], the whole picture.
        """
        # Several threads: the tokenizer, used once before, is only read.
        found = self._processor(images=[Image.fromarray(rgb)], text=[self._text], return_tensors="pt", **self._options)
        return prepared(found, self._dtype)

    def caption(self, images: Sequence[Inputs], sha256: Sequence[str | bytes]) -> list[list[str]]:
        """Write K = `sampling.candidates` captions for every image.

        Args:
            images: from :meth:`prepare`.
            sha256: of each image's bytes as they came: hex digits or 32 bytes.

        Returns:
            Lists of K captions, without the prompt and special tokens, white space to single spaces.

        Raises:
            ValueError: there are not as many sha256, or one is none.
            FloatingPointError: the network gives no finite logits.
            torch.OutOfMemoryError: one row does not fit the device's memory.
        """
        k, seed = self._sampling.candidates, self._sampling.seed
        keys = [[draws.row_key(seed, one, candidate) for candidate in range(k)] for one in sha256]
        captions: list[list[str]] = [[] for _ in images]
        pairs = list(zip(images, keys, strict=True))
        for places in alike([image for image, _ in pairs]):
            rows = [(pairs[place][0], key) for place in places for key in pairs[place][1]]
            texts = self._written(rows)
            for n, place in enumerate(places):
                captions[place] = texts[n * k : (n + 1) * k]
        return captions

    def _written(self, rows: Sequence[_Row]) -> list[str]:
        """Captions of rows that are alike."""
        with exact():
            return self._fitting.run(len(rows), lambda some: self._write_some(rows[some]))

    def _write_some(self, rows: Sequence[_Row]) -> list[str]:
        tolerance = self._tolerance if len(rows) > 1 else 0.0
        drawn = self._draw(rows, tolerance)
        texts = []
        for row, ids, tied in zip(rows, drawn.texts(), drawn.tied_R.tolist(), strict=True):
            if tied:  # the reference that every batch agrees with: alone
                self.rewritten += 1
                (ids,) = self._draw([row], 0.0).texts()
            texts.append(self._text_of(ids))
        return texts

    def _draw(self, rows: Sequence[_Row], tolerance: float) -> _Drawing:
        inputs = batched([row for row, _ in rows], self._device)
        width = draws.WIDTH
        while True:
            keys_R2 = torch.tensor([key for _, key in rows], dtype=torch.int64, device=self._device)
            drawing = _Drawing(self._sampling, keys_R2, self._ends, self._banned_V, tolerance, width)
            try:
                self._network.generate(
                    **inputs, generation_config=self._generation, logits_processor=LogitsProcessorList([drawing])
                )
            except _TooNarrowError:
                width = min(8 * width, len(self._banned_V))  # the first step or two tell
            else:
                return drawing

    def _text_of(self, ids: list[int]) -> str:
        text: str = self._processor.tokenizer.decode(ids, skip_special_tokens=True)
        return " ".join(text.split())

    # --- before any row ---

    def _try(self, rows: int) -> None:
        """Caption so many, to see what that takes."""
        blank = self.prepare(np.zeros((512, 512, 3), np.uint8), "")
        self._written([(blank, (n, n)) for n in range(rows)])

    def _try_out(self, directory: Path) -> None:
        """Caption two unlike pictures: what cannot be done at all is no row's fault."""
        rng = np.random.default_rng(0)
        pictures = [np.zeros((224, 224, 3), np.uint8), rng.integers(0, 256, (224, 224, 3), np.uint8)]
        try:
            rows = [(self.prepare(picture, ""), (0, 0)) for picture in pictures]
        except Exception as error:  # a processor raises anything on a prompt it cannot use
            raise SpecError(
                f"prompt: the processor of {directory} does not take it: {type(error).__name__}: {error}"
            ) from error
        self._require_positions(rows[0][0], directory)
        try:
            with exact():
                drawn = self._draw(rows, 0.0)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except FloatingPointError as error:
            raise CheckpointError(
                f"{directory}: {error}; its weights are broken, or too large for its dtype"
            ) from error
        except Exception as error:  # a network raises anything on inputs it cannot use
            raise SpecError(
                f"prompt: {directory} cannot caption with it: {type(error).__name__}: {error}. Does the text have the "
                "model's image token, once? chat: true puts it there"
            ) from error
        black_V, noise_V = drawn.first_RV
        if bool(torch.allclose(black_V, noise_V, rtol=0, atol=1e-6)):
            raise SpecError(
                f"prompt: {directory} writes the same whatever the image: its text has no place for one. Put the "
                "model's image token into the prompt, or set chat: true (of an old BLIP-2, take a newer revision: its "
                "processor must have num_query_tokens)"
            )

    def _require_positions(self, inputs: Inputs, directory: Path) -> None:
        positions = getattr(self._network.config.get_text_config(), "max_position_embeddings", None)
        prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        needed = prompt + self._sampling.max_tokens
        if positions is not None and needed > positions:
            raise SpecError(
                f"prompt and sampling.max_tokens: {needed} tokens with the image's, but {directory} has {positions} "
                "positions; lower them"
            )


def _asked(processor: Any, card: GeneratorCard, directory: Path) -> tuple[str, dict[str, Any]]:
    """The text that goes with an image, and how the processor is to read it."""
    if not card.chat:
        return card.prompt, {}
    turn = [{"type": "image"}, *([{"type": "text", "text": card.prompt}] if card.prompt else [])]
    try:
        text: str = processor.apply_chat_template(
            [{"role": "user", "content": turn}], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template raises anything, and may be missing
        raise SpecError(
            f"chat: {directory} has no chat template that takes an image: {error}; write the whole text into prompt"
        ) from error
    begin = processor.tokenizer.bos_token
    return text, {"add_special_tokens": False} if begin and text.startswith(begin) else {}


def _ends(network: Any, tokenizer: Any, directory: Path) -> list[int]:
    """Ids that end a text."""
    text = network.config.get_text_config()
    for ends in (network.generation_config.eos_token_id, getattr(text, "eos_token_id", None), tokenizer.eos_token_id):
        if ends is not None:
            return list(ends) if isinstance(ends, Sequence) else [int(ends)]
    raise CheckpointError(f"{directory}: no end token in generation_config.json, config.json or the tokenizer")


def _banned(tokenizer: Any, ends: list[int], vocabulary: int) -> Tensor:
    """bool [V]: what never enters a caption: special tokens, and ids that the tokenizer has no word for."""
    banned_V = torch.zeros(vocabulary, dtype=torch.bool)
    banned_V[len(tokenizer) :] = True
    special = {*tokenizer.all_special_ids, *(id_ for id_, one in tokenizer.added_tokens_decoder.items() if one.special)}
    banned_V[[token for token in special if token < vocabulary]] = True
    banned_V[ends] = False
    return banned_V


def _greedy(network: Any, ends: list[int], tokenizer: Any, tokens: int) -> GenerationConfig:
    """A search that takes what is drawn here, and nothing of what the checkpoint's own configuration asks for."""
    first = network.generation_config.decoder_start_token_id
    if first is None:
        first = getattr(network.config.get_text_config(), "decoder_start_token_id", None)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    plain = GenerationConfig(
        do_sample=False, max_new_tokens=tokens, eos_token_id=ends, pad_token_id=pad, decoder_start_token_id=first
    )
    for module in network.modules():  # what a configuration leaves open is taken from the network's
        if getattr(module, "generation_config", None) is not None:
            module.generation_config = plain
    return plain


class _TooNarrowError(Exception):
    """A nucleus may be wider than the tokens that raced."""


class _Drawing(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """Draws the next token of every row and leaves `generate` no other choice.

    Attributes:
        first_RV: the logits of the first step, as the network gave them.
        tied_R: which rows met a draw that an error of the tolerance could change: they are unfinished.
    """

    first_RV: Tensor  # noqa: N815  the shape's suffix

    def __init__(
        self, sampling: Sampling, keys_R2: Tensor, ends: list[int], banned_V: Tensor, tolerance: float, width: int
    ) -> None:
        self._sampling, self._keys_R2, self._ends, self._banned_V = sampling, keys_R2, ends, banned_V
        self._tolerance, self._width = tolerance, width
        self._early_V = banned_V.clone()
        self._early_V[ends] = True
        self._done_R = torch.zeros(len(keys_R2), dtype=torch.bool, device=keys_R2.device)
        self._ids_RL = torch.empty((len(keys_R2), 0), dtype=torch.int64, device=keys_R2.device)
        self.tied_R = self._done_R.clone()

    def __call__(self, _input_ids: Tensor, scores_RV: Tensor) -> Tensor:
        """Scores that leave one token of each row, the one that was drawn."""
        step, settings = self._ids_RL.shape[1], self._sampling
        if step == 0:
            self.first_RV = scores_RV.clone()
        banned_V = self._early_V if step < settings.min_tokens else self._banned_V
        logits_RV = draws.adjust(scores_RV, self._ids_RL, banned_V, self._ends[0], step, settings)
        noise = partial(draws.gumbel, self._keys_R2, step)
        drawn = draws.draw(logits_RV, noise, settings.top_k, settings.top_p, self._tolerance, self._width)
        open_R = ~self._done_R
        broken, wide = torch.stack([drawn.broken & open_R, drawn.wide & open_R]).any(1).tolist()
        if broken:
            raise FloatingPointError("the captioner's logits are not finite")
        if wide:
            raise _TooNarrowError
        tied_R = drawn.tied & open_R
        token_R = torch.where(self._done_R | tied_R, self._ends[0], drawn.token)
        self.tied_R = self.tied_R | tied_R
        self._done_R = self._done_R | torch.isin(token_R, torch.tensor(self._ends, device=token_R.device))
        self._ids_RL = torch.cat([self._ids_RL, token_R[:, None]], 1)
        return torch.full_like(scores_RV, -torch.inf).scatter_(1, token_R[:, None], 0.0)

    def texts(self) -> list[list[int]]:
        """New ids of each row, without the end."""
        ends = set(self._ends)
        return [
            row[: next((n for n, token in enumerate(row) if token in ends), len(row))] for row in self._ids_RL.tolist()
        ]
