"""Linear layers whose float32 products are made of bfloat16's."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from capfilt.models import packed, split
from capfilt.models.blip import CaptioningNetwork, RetrievalNetwork
from capfilt.models.initial import blip_config
from capfilt.models.packed import PackedLinear, pack
from capfilt.models.split import SplitLinear, _product, splits
from capfilt.models.tokenizer import bert_tokenizer
from capfilt.spec.training import Architecture, TextTower, VisionTower

torch.set_num_threads(1)

amx = pytest.mark.skipif(_product() is None, reason="no matrix units for bfloat16 here, or another torch than PyPI's")


def layer(width: int, out: int, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(width, out, bias=bias)
    linear.weight.requires_grad_(False).normal_(std=0.05)
    return linear


@amx
@torch.inference_mode()
@pytest.mark.parametrize(("width", "out"), [(768, 2304), (768, 768), (3072, 768), (1024, 4096)])
def test_how_exact_it_is(width: int, out: int) -> None:
    """What the module's documentation says."""
    torch.manual_seed(0)
    linear = layer(width, out)
    x = torch.randn(700, width) * torch.logspace(-3, 3, 700)[:, None]  # rows of any size
    exact = F.linear(x.double(), linear.weight.double())
    linear.bias.zero_()
    error = (SplitLinear(linear)(x) - exact).abs() / exact.std(1, keepdim=True)
    assert 1e-7 < error.max() < 3e-5
    assert error.square().mean().sqrt() < 6e-6


@amx
@torch.inference_mode()
def test_a_row_is_the_same_in_any_batch_but_for_rounding() -> None:
    torch.manual_seed(0)
    layered, x = SplitLinear(layer(768, 768)), torch.randn(1500, 768)
    whole = layered(x)
    for some in (slice(0, 1), slice(3, 80), slice(500, 1077)):
        torch.testing.assert_close(layered(x[some]), whole[some], rtol=0, atol=1e-5)


@amx
@torch.inference_mode()
def test_what_is_not_finite_stays_so() -> None:
    x = torch.ones(3, 64)
    x[0, 5], x[1, 5] = torch.inf, torch.nan
    assert torch.isfinite(SplitLinear(layer(64, 32))(x)).all(1).tolist() == [False, False, True]


@amx
def test_torch_sees_the_operation() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.inference_mode():
        SplitLinear(layer(64, 32))(torch.ones(3, 64))
    assert any(event.key == "capfilt::split_linear" for event in profile.key_averages())


# --- where it is used ---


@pytest.fixture
def ask_again() -> Iterator[None]:
    """Whether there is such a product is asked once a process; and here, for a while, anew."""
    _product.cache_clear()
    yield
    _product.cache_clear()


@pytest.mark.usefixtures("ask_again")
def test_a_processor_without_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    assert not splits(layer(768, 768))


@pytest.mark.usefixtures("ask_again")
@pytest.mark.parametrize("library", ["missing", "without it"])
def test_a_torch_without_the_product(
    library: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def opened(_name: str) -> Any:
        if library == "missing":
            raise OSError("no such file")
        return object()

    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", opened)
    with caplog.at_level(logging.INFO):
        assert not splits(layer(768, 768))
    assert "no bfloat16 product" in caplog.text


@amx
def test_narrow_layers_gain_nothing() -> None:
    assert splits(layer(512, 512))
    assert not splits(layer(256, 1024))
    assert not splits(layer(1024, 256))


TOWERS = Architecture(
    vision=VisionTower(width=512, depth=2, heads=8, mlp=1024), text=TextTower(width=512, depth=2, heads=8, mlp=1024)
)


def networks() -> list[CaptioningNetwork | RetrievalNetwork]:
    """Two layers, wide enough to be split; of weights whose results are of order 1."""
    config = blip_config(TOWERS, 64, bert_tokenizer({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}))
    made: list[CaptioningNetwork | RetrievalNetwork] = []
    for kind in (CaptioningNetwork, RetrievalNetwork):
        torch.manual_seed(0)
        network = kind(config).eval().requires_grad_(False)
        for weight in network.parameters():
            weight.normal_(std=0.05) if weight.dim() > 1 else weight.fill_(0.1)
        made.append(network)
    return made


def kinds(network: nn.Module) -> dict[str, str]:
    """By the layers' names, those of the first layer alone."""
    fast = (PackedLinear, SplitLinear)
    found = {name: type(part).__name__ for name, part in network.named_modules() if isinstance(part, fast)}
    return {name: kind for name, kind in found.items() if ".1." not in name}


@amx
def test_which_layers_are_split() -> None:
    captioning, retrieval = networks()
    pack(captioning)
    pack(retrieval)
    written, judged = kinds(captioning), kinds(retrieval)
    steps = {name for name, kind in written.items() if kind == "PackedLinear"}
    assert "text_decoder.bert.encoder.layer.0.crossattention.self.query" in steps
    assert "text_decoder.cls.predictions.decoder" in steps
    assert all(name.startswith("text_decoder.") for name in steps)
    assert {name for name in written if name.startswith("text_decoder.")} - steps == {
        f"text_decoder.bert.encoder.layer.0.crossattention.self.{name}" for name in ("key", "value")
    }
    assert set(judged.values()) == {"SplitLinear"}


@amx
@torch.inference_mode()
def test_a_network_computes_the_same() -> None:
    plain, fast = networks()[1], networks()[1]
    pack(fast)
    torch.manual_seed(1)
    pixels, ids = torch.randn(3, 3, 64, 64), torch.randint(0, 5, (6, 9))

    def judged(network: Any) -> Tensor:
        hidden = network.text_encoder(ids, image=network.text_encoder.look(network.vision_model(pixels)), first=True)
        probability: Tensor = network.match(hidden).softmax(-1)
        return probability

    torch.testing.assert_close(judged(fast), judged(plain), rtol=0, atol=2e-5)


@torch.inference_mode()
def test_where_it_is_not_to_be_had_layers_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL, so nothing is packed")
    monkeypatch.setattr(split, "_product", lambda: None)
    network = networks()[1]
    pack(network)
    assert set(kinds(network).values()) == {"PackedLinear"}


@pytest.mark.usefixtures("ask_again")
def test_what_does_not_agree_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "splits", lambda _linear: True)
    monkeypatch.setattr(packed, "_serves", lambda kind: kind is PackedLinear)
    network = networks()[1]
    pack(network)
    assert set(kinds(network).values()) <= {"PackedLinear"}
