"""Load a BLIP checkpoint in the hub's format, or say why not. Never remote code; pickles only where the card allows.

B  images in a batch    S  side in pixels    T  image tokens, 1 + patches    D  width
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval
from transformers.utils import logging as transformers_logging

from capfilt.errors import CheckpointError, SpecError
from capfilt.fingerprints import TOKENIZER_FILES, checkpoint_files, weight_files
from capfilt.models.preprocess import normalise
from capfilt.models.tokenizer import read_tokenizer, token_ids
from capfilt.spec import CaptionerCard, FilterCard, HubCheckpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SAFETENSORS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
_PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A BLIP checkpoint on its device.

    Attributes:
        model: transformers' network, evaluating, without gradients.
        tokenizer: without padding or truncation; reads `[SEP]` and its like in a text as plain characters. Safe to use
            from several threads.
        source: directory or hub id, for messages.
        dec, enc, cls, sep, pad: token ids of [DEC], [ENC], [CLS], [SEP], [PAD].
    """

    model: Any
    tokenizer: Tokenizer
    source: str
    image_size: int
    device: torch.device
    dtype: torch.dtype
    dec: int
    enc: int
    cls: int
    sep: int
    pad: int

    def see(self, images_BCSS: Tensor) -> Tensor:
        """The vision transformer's output tokens.

        Args:
            images_BCSS: uint8 [B, 3, S, S], S the card's image_size.

        Returns:
            [B, T, D], CLS first, after the final norm.

        Raises:
            ValueError: another shape or dtype.
        """
        expected = (3, self.image_size, self.image_size)
        if images_BCSS.dtype != torch.uint8 or tuple(images_BCSS.shape[1:]) != expected:
            raise ValueError(f"expected uint8 [B, {expected}], got {images_BCSS.dtype} {tuple(images_BCSS.shape)}")
        # One memory layout whatever the caller's: a row's pixels must meet the same kernels in every run.
        pixels = normalise(images_BCSS.to(self.device).contiguous(), self.dtype)
        resized = self.image_size != self.model.config.vision_config.image_size
        # The patch convolution would use TF32 by default, whose error is far above the captioner's tie tolerance.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            seen = self.model.vision_model(pixel_values=pixels, interpolate_pos_encoding=resized)
        hidden: Tensor = seen.last_hidden_state
        return hidden

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def require_positions(self, tokens: int, field: str) -> None:
        """Refuse sequences longer than the position table.

        Raises:
            SpecError: naming `field`.
        """
        positions = self.model.config.text_config.max_position_embeddings
        if tokens > positions:
            raise SpecError(f"{field}: {tokens} tokens, but {self.source} has {positions} positions; lower it")


def load(card: CaptionerCard | FilterCard, device: str) -> Loaded:
    """Load the checkpoint of a card, downloading from the hub what its cache lacks.

    Args:
        device: as torch names it: "cpu", "cuda", "cuda:1".

    Raises:
        CheckpointError: not found, not reachable, a pickle that the card does not allow, the other role's checkpoint,
            a broken file, missing or unexpected weights.
        SpecError: the card's image_size does not fit the checkpoint's patches.
    """
    directory = locate(card)
    source = card.checkpoint.hub if isinstance(card.checkpoint, HubCheckpoint) else str(directory)
    network = BlipForConditionalGeneration if card.role == "captioner" else BlipForImageTextRetrieval
    config = _config(directory, network.__name__, card.role)
    _check_readable(directory, card.allow_pickle)
    model = _weights(directory, network, config, DTYPES[card.dtype])
    patch = model.config.vision_config.patch_size
    if card.image_size % patch:
        raise SpecError(f"{card.name}: image_size {card.image_size} is not a multiple of the patch size {patch}")
    tokenizer = read_tokenizer(directory)
    return Loaded(
        model=model.to(torch.device(device)),
        tokenizer=tokenizer,
        source=source,
        image_size=card.image_size,
        device=torch.device(device),
        dtype=DTYPES[card.dtype],
        **token_ids(tokenizer, model.config.text_config, directory),
    )


def locate(card: CaptionerCard | FilterCard) -> Path:
    """The directory that holds a card's checkpoint; from the hub, after a download if the cache lacks it.

    Raises:
        CheckpointError: the hub cannot be reached, or has no such checkpoint.
    """
    checkpoint = card.checkpoint
    if not isinstance(checkpoint, HubCheckpoint):
        return Path(checkpoint.path)
    try:
        return _fetch(card, checkpoint, local_only=True)  # a revision never changes: ask the cache first, alone
    except CheckpointError:
        pass
    try:
        return _fetch(card, checkpoint, local_only=False)
    except CheckpointError as error:
        raise CheckpointError(
            f"{checkpoint.hub} at {checkpoint.revision} is not in the cache and could not be downloaded: {error}\n"
            f"On a connected machine: hf download {checkpoint.hub} --revision {checkpoint.revision} --local-dir DIR\n"
            "then give the card `checkpoint: {path: DIR}`, or set HF_HOME to a cache that holds it."
            + ("" if card.allow_pickle else "\nIf the revision has a pytorch_model.bin only: allow_pickle: true.")
        ) from error


def _fetch(card: CaptionerCard | FilterCard, checkpoint: HubCheckpoint, local_only: bool) -> Path:
    """The hub's snapshot of a revision, with the files a model needs; a pickle only for want of safetensors."""

    def snapshot(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                checkpoint.hub, revision=checkpoint.revision, allow_patterns=patterns, local_files_only=local_only
            )
        )

    try:
        directory = snapshot(["config.json", *TOKENIZER_FILES, *_SAFETENSORS])
        if card.allow_pickle and not any((directory / name).exists() for name in _SAFETENSORS):
            directory = snapshot(_PICKLES)
    except Exception as error:  # huggingface_hub's, httpx's and the file system's have no common root
        raise CheckpointError(f"{type(error).__name__}: {error}") from error
    checkpoint_files(directory)
    return directory


def _config(directory: Path, architecture: str, role: str) -> BlipConfig:
    file = directory / "config.json"
    try:
        raw = json.loads(file.read_bytes())
        declared = raw.get("architectures") or [architecture]
        kind = raw.get("model_type")
    except FileNotFoundError:
        checkpoint_files(directory)  # says which part is missing
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a model configuration: {error}") from error
    if kind != "blip" or architecture not in declared:
        raise CheckpointError(f"{file}: a {role} is a {architecture}; this is a {', '.join(declared)} ({kind})")
    try:
        with quiet():
            return BlipConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{file}: transformers cannot read it: {error}") from error


def _check_readable(directory: Path, allow_pickle: bool) -> None:
    """Refuse pickles, and find the broken file before transformers fails without naming it."""
    checkpoint_files(directory)
    for file in weight_files(directory):
        if file.suffix == ".bin" and not allow_pickle:
            raise CheckpointError(
                f"{file}: a pickle, which the card does not allow; convert it to model.safetensors, or set "
                "allow_pickle: true (it is read as weights only, no code runs)"
            )
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as opened:
                    opened.keys()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: truncated or not safetensors: {error}; fetch it again") from error


def _weights(directory: Path, network: Any, config: BlipConfig, dtype: torch.dtype) -> Any:
    """The network with every weight from the checkpoint. transformers would only warn and draw what is missing."""
    try:
        with quiet():
            model, report = network.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=weight_files(directory)[0].name.startswith("model.safetensors"),
                weights_only=True,
                output_loading_info=True,
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{directory}: the weights do not load: {error}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in report[what])
        if keys:
            raise CheckpointError(
                f"{directory}: {len(keys)} {what.replace('_', ' ')} for a {network.__name__}: {', '.join(keys[:5])}"
                + (", ..." if len(keys) > 5 else "")
            )
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and load reports: what they say is checked, and raised, here."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
