"""A GPU's kernels of our own (Triton): what torch does in several passes over memory, in one.

A network in bfloat16 waits for memory wherever it does not multiply large matrices, as where a residual is added and
normed, and where a token reads its image. Each function says what it computes in torch's words; tests hold it to that.
Imported where a GPU computes and nowhere else: Triton comes with torch's CUDA builds only.

B  images    H  heads    M  queries of an image    T  keys    E  width of a head    N  rows    W  their width
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_QUERIES = 128
"""Of one head that a program holds; for more of them torch's kernels are made."""

_SMALLEST = 16
"""Rows of the smallest matrix product."""

KEYS_AT_A_TIME, WARPS, STAGES = 64, 4, 3


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(x, branch, weight, bias, total, normed, width, eps, KEEP: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row + at, inside, other=0.0).to(tl.float32)
    value += tl.load(branch + row + at, inside, other=0.0).to(tl.float32)
    rounded = value.to(total.dtype.element_ty)
    if KEEP:
        tl.store(total + row + at, rounded, inside)
    value = rounded.to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, 0) / width, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    scale = tl.load(weight + at, inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + at, inside, other=0.0).to(tl.float32)
    out = centred / deviation * scale + shift
    tl.store(normed + row + at, out.to(normed.dtype.element_ty), inside)


def add_norm(
    x_NW: Tensor, branch_NW: Tensor, weight_W: Tensor, bias_W: Tensor, eps: float, keep: bool = True
) -> tuple[Tensor, Tensor]:
    """`total = x + branch; return total, layer_norm(total)`, of contiguous rows.

    Args:
        keep: whether the sum is wanted; the norm stands in its place where it is not.
    """
    x_NW, branch_NW = x_NW.contiguous(), branch_NW.contiguous()
    width = x_NW.shape[-1]
    normed_NW = torch.empty_like(x_NW)
    total_NW = torch.empty_like(x_NW) if keep else normed_NW
    grid = (x_NW.numel() // width,)
    block = triton.next_power_of_2(width)
    _add_norm[grid](
        x_NW, branch_NW, weight_W, bias_W, total_NW, normed_NW, width, eps, keep, block, num_warps=max(1, block // 256)
    )
    return total_NW, normed_NW


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, out, last, scale, heads, queries, keys,
    q_b, q_h, q_m, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_m,
    UNTIL: tl.constexpr, M: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    image, head = program // heads, program % heads
    m, e = tl.arange(0, M)[:, None], tl.arange(0, E)
    stop = keys
    if UNTIL:
        stop = (tl.load(last) + 1).to(tl.int32)
    q_ME = tl.load(q + image * q_b + head * q_h + m * q_m + e[None, :], m < queries, other=0.0)
    k += image * k_b + head * k_h
    v += image * v_b + head * v_h
    top_M = tl.full((M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((M,), tl.float32)
    mixed_ME = tl.zeros((M, E), tl.float32)
    for start in range(0, stop, T):
        t = start + tl.arange(0, T)
        inside = t[:, None] < stop
        k_TE = tl.load(k + t[:, None] * k_t + e[None, :], inside, other=0.0)
        v_TE = tl.load(v + t[:, None] * v_t + e[None, :], inside, other=0.0)
        score_MT = tl.dot(q_ME, tl.trans(k_TE)) * scale
        score_MT = tl.where(t[None, :] < stop, score_MT, float("-inf"))
        now_M = tl.maximum(top_M, tl.max(score_MT, 1))
        part_MT = tl.exp(score_MT - now_M[:, None])
        fade_M = tl.exp(top_M - now_M)
        sum_M = sum_M * fade_M + tl.sum(part_MT, 1)
        mixed_ME = mixed_ME * fade_M[:, None] + tl.dot(part_MT.to(v_TE.dtype), v_TE)
        top_M = now_M
    mixed_ME = mixed_ME / sum_M[:, None]
    tl.store(out + image * o_b + head * o_h + m * o_m + e[None, :], mixed_ME.to(out.dtype.element_ty), m < queries)


def takes(q_BHME: Tensor) -> bool:
    """Whether :func:`attend` has a program for them."""
    _, _, queries, width = q_BHME.shape
    return queries <= _MOST_QUERIES and width >= _SMALLEST and width == triton.next_power_of_2(width)


def attend(q_BHME: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, last_1: Tensor | None = None) -> Tensor:
    """`scaled_dot_product_attention(q, k, v)` for few queries of each head: [B, H, M, E], M's tokens side by side.

    Flash attention (Dao et al., NeurIPS 2022), a program for a head of an image: it reads the keys once, in order.

    Args:
        q_BHME: what :func:`takes` says; rows of E contiguous, as of the others.
        last_1: int64; the last key that is read, where the host does not know: those behind it are not there.
    """
    (images, heads, queries, width), keys = q_BHME.shape, k_BHTE.shape[2]
    out_BHME = torch.empty((images, queries, heads, width), device=q_BHME.device, dtype=q_BHME.dtype).transpose(1, 2)
    many = keys > 2 * _SMALLEST
    block = KEYS_AT_A_TIME if many else 2 * _SMALLEST
    _attend[(images * heads,)](
        q_BHME, k_BHTE, v_BHTE, out_BHME, last_1, width**-0.5, heads, queries, keys,
        *q_BHME.stride()[:3], *k_BHTE.stride()[:3], *v_BHTE.stride()[:3], *out_BHME.stride()[:3],
        UNTIL=last_1 is not None, M=max(_SMALLEST, triton.next_power_of_2(queries)), T=block, E=width,
        num_warps=WARPS if many else 1, num_stages=STAGES,
    )  # fmt: skip
    return out_BHME


@triton.jit  # type: ignore[untyped-decorator]
def _log_sum_exp(x, out, stride, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    at = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        value = tl.load(x + start + at, start + at < width, other=float("-inf"))
        now = tl.maximum(top, value)
        base = tl.where(now == float("-inf"), 0.0, now)  # nothing but -inf so far: no difference of infinities
        total = total * tl.exp(top - base) + tl.exp(value - base)
        top = now
    most = tl.max(top, 0)
    tl.store(out + row, most + tl.log(tl.sum(total * tl.exp(top - most), 0)))


def log_sum_exp(x_NW: Tensor) -> Tensor:
    """`x.logsumexp(-1, keepdim=True)` of float32 rows with a finite number, read once."""
    out_N1 = torch.empty((len(x_NW), 1), device=x_NW.device, dtype=x_NW.dtype)
    _log_sum_exp[(len(x_NW),)](x_NW, out_N1, x_NW.stride(0), x_NW.shape[1], 2048, num_warps=8)
    return out_N1
