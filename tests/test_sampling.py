from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from capfilt.models.sampling import Draws, adjust, gumbel, row_key
from capfilt.models.sampling import draw as draw_among
from capfilt.spec import Sampling

torch.set_num_threads(1)
SHA = hashlib.sha256(b"image").hexdigest()


def keys(count: int, seed: int = 0) -> list[tuple[int, int]]:
    return [row_key(seed, SHA, candidate) for candidate in range(count)]


def noise_of(keys: list[tuple[int, int]], step: int, vocabulary: int) -> Tensor:
    """Every token's."""
    return gumbel(torch.tensor(keys), step, torch.arange(vocabulary).expand(len(keys), -1))


def draw(logits: Tensor, noise: Tensor, top_k: int, top_p: float, tolerance: float, width: int | None = None) -> Draws:
    """With a whole table of noise; all tokens race if no width is given."""
    width = width or logits.shape[1]
    return draw_among(logits, lambda token: noise.gather(1, token), top_k, top_p, tolerance, width)


def random_logits(rows: int, vocabulary: int, seed: int, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def test_splitmix64() -> None:
    """The first output for seed 0 is 0xE220A8397B1DCDAF in every implementation; a key of (0, 0) mixes it twice."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    uniform = ((mix(0xE220A8397B1DCDAF) >> 12) + 0.5) * 2**-52
    assert noise_of([(0, 0)], 0, 1).item() == pytest.approx(-math.log(-math.log(uniform)), rel=1e-15)


def test_noise_is_the_rows_own() -> None:
    four = keys(4)
    whole = noise_of(four, 3, 50)
    assert torch.equal(noise_of(four[2:3], 3, 50), whole[2:3])
    assert torch.equal(noise_of(four, 3, 20), whole[:, :20])
    assert torch.equal(noise_of(four[::-1], 3, 50), whole.flip(0))
    assert not torch.isclose(noise_of(four, 4, 50), whole).any()


def test_noise_is_gumbel() -> None:
    noise = noise_of(keys(200), 1, 5000).flatten()
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772157, abs=0.005)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.015)
    uniform = torch.exp(-torch.exp(-noise))
    counts = torch.histc(uniform, 100, 0, 1)
    assert ((counts - 10_000) ** 2 / 10_000).sum().item() < 160  # chi2 with 99 degrees: p = 1e-4


def test_key() -> None:
    assert row_key(0, SHA, 0) == row_key(0, bytes.fromhex(SHA), 0)
    others = {
        row_key(0, SHA, 0),
        row_key(1, SHA, 0),
        row_key(0, SHA, 1),
        row_key(0, "0" * 64, 0),
        row_key(2**63 - 1, SHA, 0),
    }
    assert len(others) == 5
    for wrong in ("", "00", "zz" * 32, b"short"):
        with pytest.raises(ValueError, match=r"sha256|hexadecimal"):
            row_key(0, wrong, 0)


@pytest.mark.parametrize("penalty", [1.0, 1.1, 3.0])
def test_adjust_is_transformers(penalty: float) -> None:
    logits = random_logits(3, 30, 0)
    ids = torch.tensor([[1, 2, 2, 5], [29, 0, 7, 7], [3, 4, 5, 6]])
    banned = torch.zeros(30, dtype=torch.bool)
    ours = adjust(
        logits.clone(), ids, banned, 9, 5, Sampling(repetition_penalty=penalty, temperature=0.7, min_tokens=5)
    )
    theirs = TemperatureLogitsWarper(0.7)(ids, RepetitionPenaltyLogitsProcessor(penalty)(ids, logits))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_adjust_bans() -> None:
    logits, used = random_logits(2, 10, 0), torch.zeros(2, 0, dtype=torch.int64)
    banned = torch.zeros(10, dtype=torch.bool)
    banned[4] = True
    early = adjust(logits.clone(), used, banned, 9, 4, Sampling(min_tokens=5))
    assert early[:, [4, 9]].isinf().all()
    assert early.isinf().sum() == 4
    assert adjust(logits, used, banned, 9, 5, Sampling(min_tokens=5)).isinf().sum() == 2


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (0, 0.3), (0, 1.0), (5, 1.0), (5, 0.9), (7, 0.5), (40, 0.9)])
def test_nucleus_is_transformers(top_k: int, top_p: float) -> None:
    logits = random_logits(20, 40, 1)
    kept = logits
    if top_k:
        kept = TopKLogitsWarper(top_k)(None, kept)
    if top_p < 1:
        kept = TopPLogitsWarper(top_p)(None, kept)
    for token in range(40):  # a token that wins every race is drawn if and only if it is in the nucleus
        noise = torch.zeros(20, 40, dtype=torch.float64)
        noise[:, token] = 1e6
        drawn = draw(logits, noise, top_k, top_p, 0).token == token
        assert torch.equal(drawn, kept[:, token].isfinite()), token


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.9), (4, 0.8)])
def test_frequencies(top_k: int, top_p: float) -> None:
    logits = random_logits(1, 12, 5, scale=1.0)
    kept = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    expected = (TopPLogitsWarper(top_p)(None, kept) if top_p < 1 else kept).softmax(-1)[0] * 40_000
    token = draw(logits.expand(40_000, -1), noise_of(keys(40_000), 2, 12), top_k, top_p, 0).token
    counts = torch.bincount(token, minlength=12)
    assert (counts[expected == 0] == 0).all()
    seen = expected > 0
    chi2 = ((counts - expected)[seen] ** 2 / expected[seen]).sum().item()
    assert chi2 < 40  # 11 degrees at the most: p = 4e-5


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    top_k=st.sampled_from([0, 3, 8]),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    scale=st.sampled_from([0.01, 0.3, 3.0]),
)
def test_an_untied_draw_survives_any_error_of_the_tolerance(seed: int, top_k: int, top_p: float, scale: float) -> None:
    tolerance = 0.05
    logits = random_logits(200, 25, seed, scale)
    noise = noise_of(keys(200), seed, 25)
    drawn = draw(logits, noise, top_k, top_p, tolerance)
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(5):
        sign = torch.randint(0, 2, logits.shape, generator=generator) * 2 - 1  # the worst errors are the largest
        other = draw(logits + sign * tolerance / 2 * 0.999, noise, top_k, top_p, 0).token
        assert torch.equal(other[~drawn.tied], drawn.token[~drawn.tied])


def test_ties_are_few_and_real() -> None:
    """Among 20,000 draws the tied ones are about as many as the tolerance says, and errors do change some of them."""
    tolerance = 0.02
    logits, noise = random_logits(20_000, 100, 3), noise_of(keys(20_000), 0, 100)
    drawn = draw(logits, noise, 0, 0.9, tolerance)
    assert 0.2 * tolerance < drawn.tied.double().mean().item() < 3 * tolerance
    errors = (torch.rand(logits.shape, generator=torch.Generator().manual_seed(4)) - 0.5) * tolerance
    changed = draw(logits + errors, noise, 0, 0.9, 0).token != drawn.token
    assert changed.sum() > 20
    assert (drawn.tied | ~changed).all()


def test_nothing_ties_without_tolerance() -> None:
    logits = torch.zeros(50, 10)  # all equal
    assert not draw(logits, noise_of(keys(50), 0, 10), 3, 0.9, 0).tied.any()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(2, 40),
    top_k=st.sampled_from([0, 3, 8]),
    top_p=st.sampled_from([0.5, 0.9, 0.999]),
    tolerance=st.sampled_from([0, 0.05]),
    scale=st.sampled_from([0.0, 0.3, 3.0]),
)
def test_a_narrow_race_is_the_whole_one_or_says_so(
    seed: int, width: int, top_k: int, top_p: float, tolerance: float, scale: float
) -> None:
    logits, noise = random_logits(100, 40, seed, scale), noise_of(keys(100), seed, 40)
    narrow, whole = (draw(logits, noise, top_k, top_p, tolerance, some) for some in (width, 40))
    assert not whole.wide.any()
    valid = ~narrow.wide
    for ours, theirs in ((narrow.token, whole.token), (narrow.tied, whole.tied)):
        assert torch.equal(ours[valid], theirs[valid])


def test_a_nucleus_is_wide_where_it_is() -> None:
    logits = torch.stack([torch.zeros(50), torch.arange(50.0) * 2])
    assert draw(logits, noise_of(keys(2), 0, 50), 0, 0.9, 0, width=10).wide.tolist() == [True, False]
    assert draw(logits, noise_of(keys(2), 0, 50), 5, 0.9, 0, width=2).wide.tolist() == [True, False]  # all are 5th


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (0, 1.0), (3, 0.9), (3, 1.0)])
def test_logits_that_are_not_numbers(bad: float, top_k: int, top_p: float) -> None:
    logits = random_logits(3, 10, 0)
    logits[1] = bad
    assert draw(logits, noise_of(keys(3), 0, 10), top_k, top_p, 0).broken.tolist() == [False, True, False]
    if math.isnan(bad):
        logits[1, 1:] = 0
        assert draw(logits, noise_of(keys(3), 0, 10), top_k, top_p, 0, 4).broken.tolist() == [False, True, False]
