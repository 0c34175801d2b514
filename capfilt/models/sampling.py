"""Nucleus sampling whose random numbers belong to the row, not to the batch.

R  rows: one candidate caption of one image each    V  vocabulary    P  prompt tokens    L  new tokens

A token is drawn by a race (the Gumbel-max trick, Maddison et al., "A* Sampling", NeurIPS 2014, section 2): each token
gets its logit plus a Gumbel variate, and the highest in the nucleus wins. That is sampling from the softmax. Unlike a
walk along the cumulative distribution, it does not care about the order of near-equal probabilities, nor where the
boundaries of a thousand small intervals lie: a rounding error can only change the draw if two tokens finish within it,
or if the winner sits on the nucleus's edge. Those draws are recognised (:func:`draw`): a caption is the same in every
batch, or known to be in doubt.

The variates are counter-based: SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014) of (key of the row, step, token), in integers, so that any device draws the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from capfilt.spec import Sampling

TIE_TOLERANCE = 1e-4
"""Nats by which the difference of two float32 logits may differ between batch shapes.

Measured at base size, 384 px, random weights scaled to logits of std 3.9 (max 16) and an entropy of 4.7 nats, batches
of 1 to 4 images with 1 to 5 candidates, on a core of a Xeon with AVX-512: at most 1.8e-5 for a logit, 3.4e-5 for a
difference. `pytest -m slow tests/test_captioner.py` measures it again.
"""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class Draws(NamedTuple):
    """One step for every row.

    Attributes:
        token: int64 [R], the drawn tokens.
        tied: bool [R]; True where an error of the tolerance in the logits could have changed the draw.
    """

    token: Tensor
    tied: Tensor


def row_key(seed: int, sha256: str | bytes, candidate: int) -> tuple[int, int]:
    """The key of a row's random numbers: 128 bits of (seed, image, candidate), as two signed 64-bit integers.

    Args:
        sha256: of the image's bytes: 64 hex digits, or 32 bytes.

    Raises:
        ValueError: not a sha256.
    """
    image = bytes.fromhex(sha256) if isinstance(sha256, str) else bytes(sha256)
    if len(image) != 32:
        raise ValueError(f"expected a sha256 of 32 bytes, got {len(image)}")
    words = (seed.to_bytes(8, "little"), image, candidate.to_bytes(4, "little"))
    digest = hashlib.blake2b(b"".join(words), digest_size=16, person=b"capfilt.caption").digest()
    return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:], "little", signed=True)


def gumbel(keys_R: Sequence[tuple[int, int]], step: int, vocabulary: int, device: torch.device) -> Tensor:
    """Standard Gumbel variates of one step.

    Returns:
        float64 [R, V], finite. Entry (r, v) depends on the key of r, the step and v alone.
    """
    key_R2 = torch.tensor(keys_R, dtype=torch.int64, device=device).view(-1, 2)
    count_V = torch.arange(vocabulary, dtype=torch.int64, device=device) + (step << 32) + 1
    bits_RV = _mix(key_R2[:, :1] + count_V * _signed(_GOLDEN))
    bits_RV = _mix(bits_RV ^ key_R2[:, 1:])  # the second half of the key: no two rows are shifts of one sequence
    uniform_RV = _shift(bits_RV, 12).double().add_(0.5).mul_(2.0**-52)  # 52 bits: exact, never 0, never 1
    return uniform_RV.log_().neg_().log_().neg_()


def adjust(logits_RV: Tensor, used_RV: Tensor, banned_V: Tensor, eos: int, step: int, sampling: Sampling) -> Tensor:
    """The distribution's logits: repetition penalty, bans, temperature, in the order of transformers' processors.

    Args:
        logits_RV: floating, as the network gives them.
        used_RV: bool; tokens of the row so far, prompt included (CTRL, Keskar et al. 2019, section 4.1; as in
            transformers, negative logits are multiplied).
        banned_V: bool; never drawn.
        step: new tokens so far; the end token is banned until there are `min_tokens`.

    Returns:
        float32 [R, V]; -inf where banned.
    """
    logits_RV = logits_RV.float()
    penalty = sampling.repetition_penalty
    penalised_RV = torch.where(logits_RV < 0, logits_RV * penalty, logits_RV / penalty)
    logits_RV = torch.where(used_RV, penalised_RV, logits_RV).masked_fill(banned_V, -torch.inf)
    if step < sampling.min_tokens:
        logits_RV[:, eos] = -torch.inf
    return logits_RV / sampling.temperature


def draw(logits_RV: Tensor, noise_RV: Tensor, top_k: int, top_p: float, tolerance: float) -> Draws:
    """Draw a token for every row from its nucleus.

    The nucleus is every token with less than `top_p` of probability above it (Holtzman et al., ICLR 2020, section 3.1),
    among the `top_k` most likely if that is not 0. Tokens of exactly equal probability are in or out together.

    Args:
        logits_RV: float32, -inf for tokens that are out; from :func:`adjust`.
        noise_RV: float64, from :func:`gumbel`.
        tolerance: nats by which the difference of two logits may be wrong; 0 ties nothing.

    Raises:
        FloatingPointError: a row has no finite logit, or a NaN.
    """
    rows = len(logits_RV)
    highest_R = logits_RV.amax(-1)
    if not bool(torch.isfinite(highest_R).all()):  # a NaN is its row's maximum
        raise FloatingPointError("the captioner's logits are not finite")
    tied_R = torch.zeros(rows, dtype=torch.bool, device=logits_RV.device)
    if 0 < top_k < logits_RV.shape[1]:
        logits_RV, tied_R = _top_k(logits_RV, top_k, tolerance)
    token_R = torch.zeros(rows, dtype=torch.int64, device=logits_RV.device)
    # Race all tokens. A winner outside the nucleus is struck out with every token not above it, and the rest race
    # again: the first to win from inside is the nucleus's own winner. About 1 / top_p rounds, and no sort.
    open_R = torch.arange(rows, device=logits_RV.device)
    probability_RV = logits_RV.double().softmax(-1)
    race_RV = logits_RV + noise_RV
    while len(open_R):
        (first_R, second_R), (winner_R, _) = (part.unbind(-1) for part in race_RV.topk(2))
        level_R1 = logits_RV.gather(1, winner_R[:, None])
        inside_R, unsure_R = _inside(logits_RV, probability_RV, winner_R[:, None], level_R1, top_p, tolerance)
        token_R[open_R] = winner_R
        tied_R[open_R] |= unsure_R | (inside_R & (first_R - second_R < tolerance))
        again = ~(inside_R | tied_R[open_R])
        open_R, logits_RV, probability_RV = open_R[again], logits_RV[again], probability_RV[again]
        race_RV = race_RV[again].masked_fill(logits_RV <= level_R1[again], -torch.inf)
    return Draws(token_R, tied_R)


def _inside(
    logits_RV: Tensor, probability_RV: Tensor, winner_R1: Tensor, level_R1: Tensor, top_p: float, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Whether each winner is in the nucleus, and whether an error of the tolerance could change that."""

    def mass(above_RV: Tensor) -> Tensor:
        return torch.where(above_RV, probability_RV, 0.0).sum(-1)

    if top_p >= 1:
        inside_R = torch.ones(len(logits_RV), dtype=torch.bool, device=logits_RV.device)
        return inside_R, torch.zeros_like(inside_R)
    inside_R = mass(logits_RV > level_R1) < top_p
    if tolerance == 0:
        return inside_R, torch.zeros_like(inside_R)
    # Logits off by at most t / 2 each change the log-odds of any set by at most t, so its probability by at most t / 4.
    slack = tolerance / 4
    most_R = mass((logits_RV >= level_R1 - tolerance).scatter(1, winner_R1, False)) + slack
    least_R = mass(logits_RV > level_R1 + tolerance) - slack
    return inside_R, (least_R < top_p) & (most_R >= top_p)


def _top_k(logits_RV: Tensor, top_k: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Strike out all but the k most likely; tied where the k-th and the next are too close to tell."""
    best_RK = logits_RV.topk(top_k + 1).values
    last_R1, next_R1 = best_RK[:, -2:-1], best_RK[:, -1:]
    close_R1 = torch.isfinite(next_R1) & (last_R1 - next_R1 < tolerance)
    return logits_RV.masked_fill(logits_RV < last_R1, -torch.inf), close_R1.squeeze(-1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, modulo 2**64 in signed integers."""
    z = (z ^ _shift(z, 30)).mul_(_signed(_MIX_1))
    z = z.bitwise_xor_(_shift(z, 27)).mul_(_signed(_MIX_2))
    return z.bitwise_xor_(_shift(z, 31))


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift right; torch's is arithmetic."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
