"""Nucleus sampling whose random numbers belong to the row, not to the batch.

R  rows: one candidate caption of one image each    V  vocabulary    M  likeliest tokens, falling

A token is drawn by a race (the Gumbel-max trick, Maddison et al., "A* Sampling", NeurIPS 2014, section 2): each token
gets its logit plus a Gumbel variate, and the highest in the nucleus wins. That is sampling from the softmax. Unlike a
walk along the cumulative distribution, it does not care about the order of near-equal probabilities, nor where the
boundaries of a thousand small intervals lie: a rounding error can only change the draw if two tokens finish within it,
or if one of them sits on the nucleus's edge. Those draws are recognised (:func:`draw`): a caption is the same in every
batch, or known to be in doubt.

Only the likeliest tokens race, and only they need random numbers: a nucleus is narrow, a vocabulary is not. One that
may be wider is recognised, too. Nothing here looks at a value on the host: a step of decoding does not wait for it.

The variates are counter-based: SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014) of (key of the row, step, token), in integers, so that any device draws the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from capfilt.models import fused
from capfilt.spec import Sampling

TIE_TOLERANCE = 1e-4
"""Nats by which the difference of two float32 logits may differ between batch shapes.

Measured at base size, 384 px, random weights scaled to logits of std 3.9 (max 16) and an entropy of 4.7 nats, batches
of 1 to 4 images with 1 to 5 candidates, on a core of a Xeon with AVX-512: at most 1.8e-5 for a logit, 3.4e-5 for a
difference; with layers packed and split (AMX) 3.7e-5. `pytest -m slow tests/test_captioner.py` measures it again.
"""

WIDTH = 1024
"""Likeliest tokens that race: enough for a trained captioner's nucleus of 0.9, of tens to a few hundred tokens."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class Draws(NamedTuple):
    """One step for every row.

    Attributes:
        token: int64 [R], the drawn tokens.
        tied: bool [R]; True where an error of the tolerance in the logits could have changed the draw.
        wide: bool [R]; True where the nucleus may reach beyond the tokens that raced: the draw is not valid.
        broken: bool [R]; True where a row has a NaN, or no finite logit: the draw is not valid.
    """

    token: Tensor
    tied: Tensor
    wide: Tensor
    broken: Tensor


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


def gumbel(key_R2: Tensor, step: int, token_RM: Tensor) -> Tensor:
    """Standard Gumbel variates of one step.

    Args:
        key_R2: int64, from :func:`row_key`.
        token_RM: int64, tokens in question.

    Returns:
        float64 [R, M], finite. Entry (r, m) depends on the key of r, the step and the token alone.
    """
    bits_RM = _mix(key_R2[:, :1] + (token_RM + ((step << 32) + 1)) * _signed(_GOLDEN))
    bits_RM = _mix(bits_RM ^ key_R2[:, 1:])  # the second half of the key: no two rows are shifts of one sequence
    uniform_RM = _shift(bits_RM, 12).double().add_(0.5).mul_(2.0**-52)  # 52 bits: exact, never 0, never 1
    return uniform_RM.log_().neg_().log_().neg_()


def adjust(logits_RV: Tensor, used_RL: Tensor, banned_V: Tensor, eos: int, step: int, sampling: Sampling) -> Tensor:
    """The distribution's logits: repetition penalty, bans, temperature, in the order of transformers' processors.

    Args:
        logits_RV: floating, as the network gives them; float32 is overwritten.
        used_RL: int64; tokens of the row so far, prompt included (CTRL, Keskar et al. 2019, section 4.1; as in
            transformers, negative logits are multiplied). One may come twice.
        banned_V: bool; never drawn.
        step: new tokens so far; the end token is banned until there are `min_tokens`.

    Returns:
        float32 [R, V]; -inf where banned.
    """
    # One pass, from whatever type to float32; a penalty afterwards leaves -inf what it is.
    out_V = torch.zeros(len(banned_V), device=logits_RV.device).masked_fill_(banned_V, -torch.inf)
    if step < sampling.min_tokens:
        out_V[eos] = -torch.inf
    logits_RV = logits_RV.add_(out_V) if logits_RV.dtype == torch.float32 else logits_RV + out_V
    penalty = sampling.repetition_penalty
    if penalty != 1:
        used_logits_RL = logits_RV.gather(1, used_RL)
        penalised_RL = torch.where(used_logits_RL < 0, used_logits_RL * penalty, used_logits_RL / penalty)
        logits_RV.scatter_(1, used_RL, penalised_RL)
    return logits_RV if sampling.temperature == 1 else logits_RV.div_(sampling.temperature)


def draw(
    logits_RV: Tensor, noise: Callable[[Tensor], Tensor], top_k: int, top_p: float, tolerance: float, width: int
) -> Draws:
    """Draw a token for every row from its nucleus.

    The nucleus is every token with less than `top_p` of probability above it (Holtzman et al., ICLR 2020, section 3.1),
    among the `top_k` most likely if that is not 0. Tokens of exactly equal probability are in or out together.

    Args:
        logits_RV: float32, -inf for tokens that are out; from :func:`adjust`.
        noise: of tokens int64 [R, M], float64 [R, M]; from :func:`gumbel`.
        tolerance: nats by which the difference of two logits may be wrong; 0 ties nothing.
        width: tokens that race, 2 or more; more than `top_k` in any case, and all if there is no limit.
    """
    rows, vocabulary = logits_RV.shape
    limited = 0 < top_k < vocabulary
    if top_p >= 1 and not limited:  # the nucleus is everything: no order is needed
        best_RM, token_RM = logits_RV, torch.arange(vocabulary, device=logits_RV.device).expand(rows, -1)
    else:
        best_RM, token_RM = logits_RV.topk(min(max(width, top_k + 1 if limited else 0), vocabulary))
    broken_R = ~torch.isfinite(best_RM.amax(-1))  # a NaN is its row's maximum
    doubtful_R = torch.zeros_like(broken_R)
    if limited:
        best_RM, doubtful_R = _top_k(best_RM, top_k, tolerance)
    may_RM = must_RM = torch.isfinite(best_RM)
    if top_p < 1:
        total_R1 = fused.log_sum_exp(best_RM if limited else logits_RV)
        near_RM, sure_RM = _nucleus(best_RM, total_R1, top_p, tolerance)
        may_RM, must_RM = may_RM & near_RM, must_RM & sure_RM
    unseen_RM = may_RM & (best_RM - tolerance <= best_RM[:, -1:])  # tokens that did not race may be as near
    wide_R = unseen_RM.any(-1) & (best_RM.shape[1] < vocabulary)
    race_RM = torch.where(may_RM, best_RM + noise(token_RM), -torch.inf)
    first_R2, place_R2 = race_RM.topk(2)
    winner_R1 = place_R2[:, :1]
    close_R = first_R2[:, 0] - first_R2[:, 1] < tolerance
    edge_R = ~must_RM.gather(1, winner_R1)[:, 0]
    return Draws(token_RM.gather(1, winner_R1)[:, 0], doubtful_R | close_R | edge_R, wide_R, broken_R)


def _nucleus(best_RM: Tensor, total_R1: Tensor, top_p: float, tolerance: float) -> tuple[Tensor, Tensor]:
    """Which tokens may be in the nucleus if logits are off by the tolerance, and which are in it even so.

    Args:
        best_RM: falling.
        total_R1: logarithm of the sum of all exponentials.
    """
    probability_RM = (best_RM.double() - total_R1).exp()
    mass_RN = pad(probability_RM.cumsum(-1), (1, 0))  # of the n likeliest
    rising_RM = -best_RM

    def above(level_RM: Tensor, *, or_at: bool = False) -> Tensor:
        return mass_RN.gather(1, torch.searchsorted(rising_RM, (-level_RM).contiguous(), right=or_at))

    if tolerance == 0:
        inside_RM = above(best_RM) < top_p
        return inside_RM, inside_RM
    # Logits off by at most t / 2 each change the log-odds of any set by at most t, so its probability by at most t / 4.
    slack = tolerance / 4
    least_RM = above(best_RM + tolerance) - slack
    most_RM = above(best_RM - tolerance, or_at=True) - probability_RM + slack
    return least_RM < top_p, most_RM < top_p


def _top_k(best_RM: Tensor, top_k: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Strike out all but the k likeliest, and their equals; in doubt where the k-th and the next are close."""
    last_R1, next_R1 = best_RM[:, top_k - 1 : top_k], best_RM[:, top_k : top_k + 1]
    close_R = (torch.isfinite(next_R1) & (last_R1 - next_R1 < tolerance)).squeeze(-1)
    return best_RM.masked_fill(best_RM < last_R1, -torch.inf), close_R


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
