"""Packed linear layers, and memory that is kept."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from capfilt.models.packed import PackedLinear, _serves, pack
from capfilt.models.split import SplitLinear, _product

torch.set_num_threads(1)

mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch has no MKL, so nothing is packed")


KINDS = [
    pytest.param(PackedLinear, 1e-5, marks=mkl),
    pytest.param(SplitLinear, 1e-4, marks=pytest.mark.skipif(_product() is None, reason="no product to split for")),
]


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "tolerance"), KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (2, 3), (4, 9), (8, 9, 5), (577,), (2, 577), (0, 4)])
def test_it_is_the_layer(
    rows: tuple[int, ...], bias: bool, kind: type[PackedLinear | SplitLinear], tolerance: float
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 160, bias=bias)
    x = torch.randn(*rows, 96)
    torch.testing.assert_close(kind(linear)(x), linear(x), rtol=tolerance, atol=tolerance)


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "tolerance"), KINDS)
def test_input_that_is_not_contiguous(kind: type[PackedLinear | SplitLinear], tolerance: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    x = torch.randn(7, 5, 64).transpose(0, 1)
    torch.testing.assert_close(kind(linear)(x), linear(x), rtol=tolerance, atol=tolerance)


@mkl
@torch.inference_mode()
def test_a_network_is_packed_in_place() -> None:
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(64, 96), nn.ModuleDict({"a": nn.Linear(8, 8)}), nn.LayerNorm(96))
    x = torch.randn(3, 64)
    expected = part[0](x)
    pack(nn.Sequential(part))
    assert _serves(PackedLinear)
    assert isinstance(part[0], PackedLinear)
    assert isinstance(part[1]["a"], PackedLinear)
    assert isinstance(part[2], nn.LayerNorm)
    torch.testing.assert_close(part[0](x), expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_agree_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capfilt.models.packed._serves", lambda _kind: False)
    part = nn.Sequential(nn.Linear(8, 8), nn.Linear(512, 512))
    pack(nn.Sequential(part))
    assert [type(layer) for layer in part] == [nn.Linear, nn.Linear]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc keeps memory its own way")
def test_freed_memory_is_kept() -> None:
    """Large blocks, taken and freed again and again, cost the system no new pages."""
    script = textwrap.dedent("""
        import resource, sys, torch
        from capfilt.models.memory import keep_freed_memory
        if sys.argv[1] == "keep":
            keep_freed_memory()
        def work():
            for _ in range(20):
                torch.ones(12 * 2**20).add(1)
        work()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        work()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """)
    faults = {
        how: int(subprocess.run([sys.executable, "-c", script, how], capture_output=True, check=True).stdout)
        for how in ("keep", "give back")
    }
    assert faults["keep"] < 1000
    assert faults["give back"] > 10 * max(1, faults["keep"])


_LARGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not _LARGE.exists() or "[never]" in _LARGE.read_text(), reason="this system gives no large pages to who asks"
)
def test_memory_is_of_large_pages() -> None:
    """In any thread: Ray calls a worker in one that is not the first."""
    script = textwrap.dedent("""
        import threading
        import capfilt.models
        import torch
        blocks = []
        thread = threading.Thread(target=lambda: blocks.append(torch.ones(16 * 2**20)))
        thread.start(), thread.join()
        lines = open("/proc/self/smaps_rollup").read().splitlines()
        print(next(line.split()[1] for line in lines if line.startswith("AnonHugePages")))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    assert int(done.stdout) > 32 * 1024
