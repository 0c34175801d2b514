"""What lies between a network's matrix products, each in as few passes over memory as the device allows.

In bfloat16 on a GPU that computes and does not learn: kernels of our own (capfilt.models.kernels), cuDNN's attention
and the matrix product's own epilogue, if a trial finds that the kernels and it compute the same; of logits, which are
float32 whatever the network is, the sum of exponentials. Anywhere else what torch has, operation by operation.

B  images    N  texts, or rows    H  heads    L  queries    T  keys    E  width of a head    W  width
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  torch's own name for it

_log = logging.getLogger(__name__)


_TOLERANCE = 0.03
"""Largest difference from float32's result allowed in a trial, of numbers up to 4: twice what bfloat16 rounds."""


@cache
def _kernels() -> ModuleType | None:
    """None where torch came without Triton, or they do not compute what they should on this GPU."""
    try:
        from capfilt.models import kernels

        _try_out(kernels)
    except Exception as error:  # noqa: BLE001  a compiler's errors have no common root; torch computes the same
        _log.warning("this GPU computes more slowly than it could, by torch's operations alone: %s", error)
        return None
    return kernels


@torch.inference_mode()
def _try_out(kernels: ModuleType) -> None:
    """Compute small examples, of a real network's widths.

    Raises:
        ArithmeticError: a result is wrong.
    """
    generator = torch.Generator("cuda").manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device="cuda")
        return drawn.clamp(-4, 4).bfloat16()

    def check(what: str, found: Tensor, expected: Tensor) -> None:
        gap = float((found.float() - expected).abs().max())
        if not gap <= _TOLERANCE:
            raise ArithmeticError(f"{what} is off by {gap}")

    for queries, keys, last in ((1, 577, None), (9, 577, None), (1, 20, 6)):
        q_BHME, k_BHTE, v_BHTE = (numbers(2, n, 3, 64).transpose(1, 2) for n in (queries, keys, keys))
        stop = keys if last is None else last + 1
        last_1 = None if last is None else torch.tensor([last], device="cuda")
        read = (q_BHME.float(), k_BHTE[:, :, :stop].float(), v_BHTE[:, :, :stop].float())
        expected = F.scaled_dot_product_attention(*read)
        check("attention", kernels.attend(q_BHME, k_BHTE, v_BHTE, last_1), expected)
    for width in (768, 1024):
        x_NW, branch_NW, weight_W, bias_W = numbers(5, width), numbers(5, width), numbers(width) / 4, numbers(width) / 4
        total_NW, normed_NW = kernels.add_norm(x_NW, branch_NW, weight_W, bias_W, 1e-5)
        check("a residual", total_NW, (x_NW + branch_NW).float())
        check("its norm", normed_NW, F.layer_norm(total_NW.float(), (width,), weight_W.float(), bias_W.float(), 1e-5))
        weight_WW = numbers(width, width) / 32
        flat_NW = torch._addmm_activation(bias_W, x_NW, weight_WW.t(), use_gelu=True)
        check("GELU", flat_NW, F.gelu(F.linear(x_NW.float(), weight_WW.float(), bias_W.float())))
    x_NW = numbers(5, 30_522).float()
    check("a sum of exponentials", kernels.log_sum_exp(x_NW), x_NW.logsumexp(-1, keepdim=True))


def kernels_for(x: Tensor) -> ModuleType | None:
    """Our kernels, where they can compute with it."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or torch.is_grad_enabled():
        return None
    return _kernels()


def add_norm(x_NW: Tensor, branch_NW: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """A residual, and its norm."""
    if kernels := kernels_for(x_NW):
        total, normed = kernels.add_norm(x_NW, branch_NW, norm.weight, norm.bias, norm.eps)
        return total, normed
    total_NW = x_NW + branch_NW
    return total_NW, norm(total_NW)


def normed_sum(x_NW: Tensor, branch_NW: Tensor, norm: nn.Module) -> Tensor:
    """The norm of a residual alone."""
    if isinstance(norm, nn.LayerNorm) and (kernels := kernels_for(x_NW)):
        normed: Tensor = kernels.add_norm(x_NW, branch_NW, norm.weight, norm.bias, norm.eps, keep=False)[1]
        return normed
    out: Tensor = norm(branch_NW + x_NW)
    return out


def gelu(linear: nn.Module, x_NW: Tensor) -> Tensor:
    """A linear layer and GELU.

    The matrix product's epilogue knows GELU by its tanh approximation alone (Hendrycks and Gimpel, 2016, section 2),
    which is at most 5e-4 off: less than bfloat16 resolves where it is at its largest.
    """
    if kernels_for(x_NW) and isinstance(linear, nn.Linear):
        flat_NW = torch._addmm_activation(linear.bias, x_NW.flatten(0, -2), linear.weight.t(), use_gelu=True)
        return flat_NW.view(*x_NW.shape[:-1], -1)
    return F.gelu(linear(x_NW))


def attend(
    q_BHLE: Tensor,
    k_BHTE: Tensor,
    v_BHTE: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    last_1: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention of texts' tokens, few to an image.

    Args:
        mask, causal, dropout: as torch's `scaled_dot_product_attention`.
        last_1: int64, the last key that is there, where only the device knows; `mask` says the same.
    """
    plain = not causal and not dropout and (mask is None or last_1 is not None)
    if plain and (kernels := kernels_for(q_BHLE)) and kernels.takes(q_BHLE):
        out: Tensor = kernels.attend(q_BHLE, k_BHTE, v_BHTE, last_1)
        return out
    return F.scaled_dot_product_attention(q_BHLE, k_BHTE, v_BHTE, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def attend_all(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention of all of an image's tokens to each other."""
    if not dropout and kernels_for(q_BHTE) and (out := _cudnn(q_BHTE, k_BHTE, v_BHTE)) is not None:
        return out
    return F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, dropout_p=dropout)


_without_cudnn: set[torch.device] = set()


def _cudnn(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> Tensor | None:
    """cuDNN's attention; None where it has none for this GPU. It is asked by name: torch would take another.

    It plans every new shape anew, so its callers keep to a few (capfilt.models.checkpoints.Loaded.see).
    """
    if q_BHTE.device in _without_cudnn:
        return None
    try:
        out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q_BHTE, k_BHTE, v_BHTE, None, False, 0.0, False, False
        )[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _without_cudnn.add(q_BHTE.device)
        _log.warning("no attention by cuDNN here, going on with torch's: %s", error)
        return None
    return out


def log_sum_exp(x_NW: Tensor) -> Tensor:
    """[N, 1]: of each row, the logarithm of the sum of all exponentials."""
    if x_NW.is_cuda and x_NW.dtype == torch.float32 and not torch.is_grad_enabled() and (kernels := _kernels()):
        out: Tensor = kernels.log_sum_exp(x_NW)
        return out
    return x_NW.logsumexp(-1, keepdim=True)
