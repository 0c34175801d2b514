"""Load a model of transformers other than BLIP, or say why not. Never remote code, pickles only where allowed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capfilt.errors import CapfiltError, CheckpointError
from capfilt.fingerprints import PROCESSOR_FILES, model_files
from capfilt.models.checkpoints import DTYPES, locate, quiet
from capfilt.models.memory import keep_freed_memory
from capfilt.spec import DualCard, GeneratorCard
from capfilt.weights import inspect

Inputs = dict[str, Tensor]
"""What a processor makes of one picture, its text or both, by the names of the model's arguments; on the CPU."""

PROCESSING: dict[str, Any] = {"backend": "pil", "local_files_only": True, "trust_remote_code": False}
"""Pillow prepares images, whatever else is installed: another resampling would be other captions and scores."""


def locate_pretrained(card: GeneratorCard | DualCard) -> Path:
    """The directory of a card's checkpoint, downloaded if need be and looked at.

    Raises:
        CheckpointError: as :func:`capfilt.models.checkpoints.locate` and :func:`capfilt.weights.inspect`.
    """
    directory = locate(card.checkpoint, card.allow_pickle, model_files, PROCESSOR_FILES)
    inspect(card, directory)
    return directory


def load_pretrained(kind: Any, directory: Path, card: GeneratorCard | DualCard, device: str) -> Any:
    """A network on its device, evaluating, without gradients.

    Args:
        kind: transformers' class for it.

    Raises:
        CheckpointError: transformers does not know the network, or weights are broken, missing or of other shapes.
    """
    with reading(directory):
        network, found = kind.from_pretrained(
            directory,
            dtype=DTYPES[card.dtype],
            use_safetensors=None if card.allow_pickle else True,
            weights_only=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    wrong = {name: sorted(map(str, found[name])) for name in ("missing_keys", "mismatched_keys") if found[name]}
    if wrong:  # transformers would go on with random weights
        listed = "; ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in wrong.items())
        raise CheckpointError(
            f"{directory}: the weights do not fit config.json: {listed}; fetch the checkpoint again, or name another"
        )
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    return network.to(device).eval().requires_grad_(False)


@contextmanager
def reading(directory: Path) -> Iterator[None]:
    """Around transformers as it reads a checkpoint: quiet, and what it raises names the directory.

    Raises:
        CheckpointError: whatever went wrong, memory excepted.
    """
    try:
        with quiet():
            yield
    except (CapfiltError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises anything from OSError to KeyError
        raise CheckpointError(
            f"{directory}: transformers cannot load it: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        ) from error


def prepared(processed: Any, dtype: torch.dtype) -> Inputs:
    """What a processor returned, its numbers as the network computes with them."""
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in processed.items()
        if isinstance(value, Tensor)
    }


def alike(inputs: list[Inputs]) -> list[list[int]]:
    """Positions of inputs that can be in one batch: they have the same names and shapes, so nothing is padded."""
    groups: dict[Any, list[int]] = {}
    for place, one in enumerate(inputs):
        shapes = tuple(sorted((name, tuple(value.shape)) for name, value in one.items()))
        groups.setdefault(shapes, []).append(place)
    return list(groups.values())


def batched(inputs: list[Inputs], device: torch.device) -> Inputs:
    """Inputs that are alike as one batch: side by side, on the device."""
    return {name: torch.cat([one[name] for one in inputs]).to(device) for name in inputs[0]}


@contextmanager
def exact() -> Iterator[None]:
    """Computing without gradients, and without TF32 in convolutions, whose error is above a captioner's tolerance."""
    with (
        torch.inference_mode(),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        yield
