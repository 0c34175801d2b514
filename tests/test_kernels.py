"""A GPU's kernels against what torch computes: on a GPU, or interpreted on a CPU where Triton is installed."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are made
pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds")
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float16)  # the interpreter has no bfloat16 products
NEAR = 0.02

from capfilt.models import fused, kernels  # noqa: E402


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, DTYPE)


@pytest.mark.parametrize(
    ("heads", "queries", "keys", "width"), [(3, 1, 77, 64), (3, 8, 130, 16), (2, 20, 64, 32), (2, 100, 40, 16)]
)
def test_few_queries_attend_as_torch_says(heads: int, queries: int, keys: int, width: int) -> None:
    q, k, v = (numbers(2, rows, heads, width).transpose(1, 2) for rows in (queries, keys, keys))
    mixed = kernels.attend(q, k, v)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert mixed.shape == expected.shape
    assert (mixed.float() - expected).abs().max() < NEAR
    assert mixed.transpose(1, 2).is_contiguous()  # the layer behind it needs no copy


@pytest.mark.parametrize("last", [0, 6, 19])
def test_keys_behind_the_last_are_not_read(last: int) -> None:
    q, k, v = (numbers(4, 3, rows, 16) for rows in (1, 20, 20))
    k[:, :, last + 1 :], v[:, :, last + 1 :] = torch.nan, torch.nan
    mixed = kernels.attend(q, k, v, torch.tensor([last], device=DEVICE))
    own = slice(last + 1)
    expected = F.scaled_dot_product_attention(q.float(), k[:, :, own].float(), v[:, :, own].float())
    assert (mixed.float() - expected).abs().max() < NEAR


@pytest.mark.parametrize("width", [96, 768, 1024])
def test_a_residual_and_its_norm(width: int) -> None:
    x, branch, weight, bias = numbers(5, 7, width), numbers(5, 6, width)[:, :1] + 1, numbers(width), numbers(width) + 1
    branch = branch.expand_as(x)  # not contiguous
    total, normed = kernels.add_norm(x, branch, weight, bias, 1e-5)
    assert (total.float() - (x.float() + branch.float())).abs().max() < NEAR
    expected = F.layer_norm(total.float(), (width,), weight.float(), bias.float(), 1e-5)
    assert (normed.float() - expected).abs().max() < 2 * NEAR
    assert torch.equal(kernels.add_norm(x, branch, weight, bias, 1e-5, keep=False)[1], normed)


def test_the_sum_of_all_exponentials() -> None:
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 20
    logits[0, :4999], logits[1, 100:] = -torch.inf, -torch.inf
    assert torch.allclose(kernels.log_sum_exp(logits), logits.logsumexp(-1, keepdim=True))


@pytest.mark.parametrize(
    ("queries", "width", "taken"), [(1, 64, True), (128, 16, True), (129, 64, False), (1, 80, False)]
)
def test_what_it_has_no_program_for(queries: int, width: int, taken: bool) -> None:
    assert kernels.takes(torch.empty(1, 1, queries, width)) is taken


@pytest.mark.skipif(not GPU, reason="there is no CUDA device")
def test_the_trial_passes_here() -> None:
    fused._try_out(kernels)
