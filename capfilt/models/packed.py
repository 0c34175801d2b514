"""Linear layers on a CPU: weights laid out once as its matrix product reads them, or split.

A matrix product first copies its operands into blocks that fit the caches. A weight never changes, so here its copy is
made once, in MKL's packed format, and takes the weight's place. The fewer rows are multiplied with it, as when a token
of each text is, the more that saves.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  torch's own name for it

from capfilt.models.split import SplitLinear, splits

_ROWS = 577
"""Rows that a weight is packed for: an image's tokens. MKL chooses the blocks by them."""

_TRIED = (1, 2, 3, 4, 5, 8, 9, 16, 24, 31, 48, 64, 72, 100, 144, 577, 1154)
"""Rows that a packed weight must serve as well, by trial: MKL promises it for those that it was packed for only."""

_TOLERANCE = 1e-4
"""Largest difference allowed in a trial, relative to the largest result."""


class PackedLinear(nn.Module):
    """A linear layer whose float32 weight is packed; for inference."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.bias = linear.bias
        self._packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, _ROWS)
        self._shape = weight.new_empty(1).expand(weight.shape)  # that of the weight, without its memory

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        rows = x.shape[:-1].numel()
        out: Tensor = torch.ops.mkl._mkl_linear(x, self._packed, self._shape, self.bias, rows)
        return out


def pack(network: nn.Module) -> None:
    """Make the linear layers of a float32 network's parts on the CPU fast, in place; without MKL nothing happens.

    Layers that multiply hundreds of rows at a time are split (:mod:`capfilt.models.split`) where the processor gains by
    it, all others packed. Which, is a matter of the layer alone, not of a batch's rows: a row's result is the same in
    every batch, but for rounding.

    Results differ from the plain layers' by rounding. What is packed is no parameter any more: it can compute, not be
    saved or trained.
    """
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return
    for name, parent in list(network.named_modules())[1:]:
        for child_name, child in list(parent.named_children()):
            if type(child) is not nn.Linear:
                continue
            if not _a_token_at_a_time(f"{name}.{child_name}") and splits(child) and _serves(SplitLinear):
                setattr(parent, child_name, SplitLinear(child))
            elif _serves(PackedLinear):
                setattr(parent, child_name, PackedLinear(child))


def _a_token_at_a_time(name: str) -> bool:
    """Whether a layer, by its name, is a decoder's that reads one token of each text, and not the image."""
    reads_the_image = name.endswith(("crossattention.self.key", "crossattention.self.value"))
    return name.startswith("text_decoder.") and not reads_the_image


_Fast = type[PackedLinear] | type[SplitLinear]


@cache
def _serves(kind: _Fast) -> bool:
    """Whether this processor's MKL multiplies any number of rows with what was made for :data:`_ROWS`."""
    return all(_agrees(kind, width, out) for width, out in ((64, 96), (768, 3072), (3072, 768)))


@torch.inference_mode()
def _agrees(kind: _Fast, width: int, out: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(width, out)
    linear.weight.normal_(generator=generator)
    packed, x = kind(linear), torch.randn(max(_TRIED), width, generator=generator)
    exact = F.linear(x, linear.weight, linear.bias)
    most = _TOLERANCE * exact.abs().max()
    return all(bool((packed(x[:n]) - exact[:n]).abs().max() <= most) for n in _TRIED)
