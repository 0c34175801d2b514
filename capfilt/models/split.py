"""Linear layers on a CPU that has matrix units for bfloat16 (AMX): float32's products, of three of bfloat16.

The sum of two bfloat16 numbers, high and low, holds the first 16 of a float32 number's 24 bits. So

    x w = x_high w_high + x_high w_low + x_low w_high + x_low w_low

of which the last is left out, as small as what the others round away; sums are float32's (Henry, Tang and Heinecke,
2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", arXiv 1904.06376).
It is what `torch.set_float32_matmul_precision` calls "high". A result is off by 3e-5 of the results' standard
deviation at the most (tests/test_split.py), a few times what float32's own product is.

N  rows    I  width in    O  width out
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)

_LEAST = 512
"""Width of a layer, in and out, that gains by it."""

_AT_A_TIME = 131_072
"""Numbers a thread splits at a time: they stay in its cache."""


class SplitLinear(nn.Module):
    """A linear layer whose float32 weight is split; for inference, where :func:`splits` says so."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach()
        out, width = weight_OI.shape
        self.bias = linear.bias
        self._low_high_OJ = weight_OI.new_empty(out, 2 * width, dtype=torch.bfloat16)  # J: 2 I
        _split(weight_OI, self._low_high_OJ[:, width:], self._low_high_OJ[:, :width])

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        out: Tensor = torch.ops.capfilt.split_linear(x, self._low_high_OJ, self.bias)
        return out


def splits(linear: nn.Linear) -> bool:
    """Whether a layer is faster so, on this processor, by the operations that torch came with."""
    return min(linear.weight.shape) >= _LEAST and _product() is not None


@cache
def _product() -> Callable[..., None] | None:
    """MKL's bfloat16 product with float32 sums and results, which torch has inside and no operation of its own for."""
    if not torch.backends.mkl.is_available() or not torch.cpu._init_amx():  # type: ignore[no-untyped-call]
        return None  # no matrix units, or the system does not let this process use them
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function: Any = ctypes.CDLL(str(library)).GEMM_BF16BF16F32
    except (OSError, AttributeError) as error:
        _log.info("this torch has no bfloat16 product with float32 results inside: %s", error)
        return None
    function.restype = None
    product: Callable[..., None] = function
    return product


def _multiply(x_NJ: Tensor, weight_OJ: Tensor, out_NO: Tensor, *, add: bool) -> None:
    """out = x w^T, or what it was and that. Rows may lie apart, a row's numbers not."""
    product = _product()
    assert product is not None
    rows, inner = x_NJ.shape

    def number(value: int) -> Any:
        return ctypes.byref(ctypes.c_int(value))

    def address(matrix: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(matrix.data_ptr())

    one, kept = ctypes.c_float(1), ctypes.c_float(float(add))
    # It counts columns first, and so sees every matrix transposed.
    product(
        b"T", b"N", number(len(weight_OJ)), number(rows), number(inner), ctypes.byref(one),
        address(weight_OJ), number(weight_OJ.stride(0)), address(x_NJ), number(x_NJ.stride(0)), ctypes.byref(kept),
        address(out_NO), number(out_NO.stride(0)),
    )  # fmt: skip


def _split(x_NI: Tensor, high_NI: Tensor, low_NI: Tensor) -> None:
    """Write both halves of every number."""
    width = x_NI.shape[1]
    rows = max(1, _AT_A_TIME * torch.get_num_threads() // width)
    rounded = x_NI.new_empty(min(rows, len(x_NI)), width)
    for first in range(0, len(x_NI), rows):
        some = slice(first, first + rows)
        x, high, low = x_NI[some], high_NI[some], low_NI[some]
        part = rounded[: len(x)].copy_(high.copy_(x))
        low.copy_(torch.sub(x, part, out=part))


def _split_linear(x: Tensor, low_high_OJ: Tensor, bias_O: Tensor | None) -> Tensor:
    width = x.shape[-1]
    x_NI = x.reshape(-1, width)
    out_NO = x.new_empty(len(x_NI), len(low_high_OJ))
    if bias_O is not None:
        out_NO.copy_(bias_O)
    if len(x_NI):
        high_low_NJ = x.new_empty(len(x_NI), 2 * width, dtype=torch.bfloat16)
        _split(x_NI, high_low_NJ[:, :width], high_low_NJ[:, width:])
        _multiply(high_low_NJ, low_high_OJ, out_NO, add=bias_O is not None)
        _multiply(high_low_NJ[:, :width], low_high_OJ[:, width:], out_NO, add=True)
    return out_NO.view(*x.shape[:-1], len(low_high_OJ))


# An operation of torch's, so that its profiler and its counter of FLOPs know it.
torch.library.define("capfilt::split_linear", "(Tensor x, Tensor low_high, Tensor? bias) -> Tensor")
torch.library.impl("capfilt::split_linear", "CPU", _split_linear)
