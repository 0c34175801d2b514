"""Writing texts about images, a token a step: by sampling, greedily, or by beam search.

B  images    K  texts an image    R  rows, B x K texts, those of an image side by side    M  continuations in question
L  new tokens    V  vocabulary    H  heads    T  image tokens    E  width of a head    D  text width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from capfilt.models import sampling as draws
from capfilt.models.blip import Cache, Keys, TextDecoder
from capfilt.spec import Sampling


class Rules(NamedTuple):
    """What every text keeps to.

    Attributes:
        prompt: ids it begins with, [DEC] first; they count as used for the repetition penalty.
        end: id that ends it.
        banned_V: bool; what never enters it.
        sampling: its lengths and repetition penalty. The rest concerns :func:`sample` alone; a temperature divides all
            scores of a search alike.
    """

    prompt: Sequence[int]
    end: int
    banned_V: Tensor  # noqa: N815  the shape's suffix
    sampling: Sampling


class Follow(Protocol):
    """Goes on with texts."""

    def __call__(self, token_R: Tensor, rows_R: Tensor | None = None) -> Tensor:
        """Give every row its next token.

        Args:
            rows_R: first take these rows, in this order; a row may come twice. Those of an image stay side by side, as
                many of each. As they are if not given.

        Returns:
            Logits [R, V] of what comes then.
        """
        ...


def begin(decoder: TextDecoder, image: Sequence[Keys], rules: Rules) -> tuple[Tensor, Follow]:
    """Read the prompt, once for each image.

    Args:
        image: what the texts read of B images, from `look`; shared by all texts of an image, never copied.

    Returns:
        Logits [B, V] after the prompt, and what goes on from there for `sampling.max_tokens` tokens.
    """
    images, like = len(image[0].keys), image[0].keys
    cache = Cache(decoder.bert.config, images, len(rules.prompt) + rules.sampling.max_tokens, like)

    def read(ids_RL: Tensor) -> Tensor:
        hidden_RLD = decoder.bert(ids_RL, image=image, causal=True, cache=cache)
        return decoder.logits(hidden_RLD[:, -1:])[:, 0]

    def follow(token_R: Tensor, rows_R: Tensor | None = None) -> Tensor:
        if rows_R is not None:
            cache.select(rows_R)
        return read(token_R[:, None])

    return read(torch.tensor(rules.prompt, device=like.device).expand(images, -1)), follow


def sample(
    logits_BV: Tensor, follow: Follow, rules: Rules, keys_R: Sequence[tuple[int, int]], tolerance: float
) -> tuple[list[list[int]], list[bool]]:
    """Draw texts with random numbers of their own.

    Args:
        logits_BV, follow: from :func:`begin`.
        keys_R: from :func:`capfilt.models.sampling.row_key`; K of an image side by side.
        tolerance: see :func:`capfilt.models.sampling.draw`.

    Returns:
        The rows' new ids, without the end; and which met a tie: those are unfinished.

    Raises:
        FloatingPointError: logits are not finite.
    """
    settings = rules.sampling

    def choose(logits_RV: Tensor, step: int) -> draws.Draws:
        noise_RV = draws.gumbel(keys_R, step, logits_RV.shape[1], logits_RV.device)
        return draws.draw(logits_RV, noise_RV, settings.top_k, settings.top_p, tolerance)

    ids, tied_R = _write(logits_BV, follow, rules, len(keys_R) // len(logits_BV), choose)
    return ids, tied_R.tolist()


def greedy(logits_BV: Tensor, follow: Follow, rules: Rules) -> list[list[int]]:
    """Always the likeliest token: transformers' `generate(do_sample=False)`.

    Args:
        logits_BV, follow: from :func:`begin`.

    Returns:
        New ids of one text for each image, without the end.

    Raises:
        FloatingPointError: logits are not finite.
    """

    def choose(logits_RV: Tensor, _step: int) -> draws.Draws:
        best_R, token_R = _finite(logits_RV).max(-1)
        return draws.Draws(token_R, torch.zeros_like(best_R, dtype=torch.bool))

    return _write(logits_BV, follow, rules, 1, choose)[0]


def _write(
    logits_BV: Tensor, follow: Follow, rules: Rules, each: int, choose: Callable[[Tensor, int], draws.Draws]
) -> tuple[list[list[int]], Tensor]:
    """Write `each` texts an image until all have ended or are tied: their new ids without the end, and which are tied.

    Args:
        choose: the rows' tokens, given their logits [R, V] and the number of tokens so far.
    """
    images, end = len(logits_BV), rules.end
    rows_R = torch.arange(images, device=logits_BV.device).repeat_interleave(each)
    logits_RV, used_RV = logits_BV[rows_R], _used(rules, len(rows_R))
    ended_R = torch.zeros_like(rows_R, dtype=torch.bool)
    tied_R = torch.zeros_like(ended_R)
    new_RL: list[Tensor] = []
    for step in range(rules.sampling.max_tokens):
        if step:
            logits_RV = follow(new_RL[-1], rows_R if step == 1 and each > 1 else None)
        logits_RV = draws.adjust(logits_RV, used_RV, rules.banned_V, end, step, rules.sampling)
        drawn = choose(logits_RV, step)
        tied_R |= drawn.tied & ~ended_R
        token_R = torch.where(ended_R, end, drawn.token)
        new_RL.append(token_R)
        used_RV.scatter_(1, token_R[:, None], True)
        ended_R |= token_R == end
        if bool((ended_R | tied_R).all()):
            break
    return _until_end(torch.stack(new_RL, 1), end), tied_R


def beam(logits_BV: Tensor, follow: Follow, rules: Rules, beams: int, length_penalty: float = 1.0) -> list[list[int]]:
    """Beam search: transformers' `generate(num_beams=beams)`, which is what BLIP captions COCO with.

    An image's search ends when it has `beams` ended texts, and the best open one, were it to end now, would not beat
    the worst of them.

    Args:
        logits_BV, follow: from :func:`begin`.
        beams: texts kept open for each image.
        length_penalty: an ended text's score is its log-probability over tokens ** this, the end being a token.

    Returns:
        New ids of the best text for each image, without the end.

    Raises:
        FloatingPointError: logits are not finite.
    """
    (images, words), device, limit = logits_BV.shape, logits_BV.device, rules.sampling.max_tokens
    first_R = torch.arange(images, device=device).repeat_interleave(beams) * beams
    rows_R, logits_RV, used_RV = first_R // beams, logits_BV.repeat_interleave(beams, 0), _used(rules, len(first_R))
    open_BKL = torch.empty(images, beams, 0, dtype=torch.int64, device=device)
    score_BK = torch.full((images, beams), -torch.inf, device=device)
    score_BK[:, 0] = 0  # all are the same at the start: let one go on
    ended_BKL, result_BK = open_BKL, torch.full_like(score_BK, -torch.inf)
    searching_B = torch.ones(images, dtype=torch.bool, device=device)
    for step in range(limit):
        if step:
            logits_RV = follow(open_BKL[:, :, -1].flatten(), rows_R)
        # transformers' processors meet log-probabilities here, and logits in greedy search
        gain_RV = draws.adjust(
            logits_RV.float().log_softmax(-1), used_RV, rules.banned_V, rules.end, step, rules.sampling
        )
        total_BX = (score_BK.view(-1, 1) + _finite(gain_RV)).view(images, -1)
        score_BM, place_BM = total_BX.topk(2 * beams)  # at least `beams` of them go on: each can end in one way
        from_BM, token_BM = place_BM // words, place_BM % words
        text_BML = torch.cat([_rows_of(open_BKL, from_BM), token_BM[..., None]], -1)
        ends_BM = token_BM == rules.end if step + 1 < limit else torch.ones_like(token_BM, dtype=torch.bool)

        counts_BM = ends_BM & searching_B[:, None]
        counts_BM[:, beams:] = False  # of the others, none is among the best
        candidate_BM = torch.where(counts_BM, score_BM / (step + 1) ** length_penalty, -torch.inf)
        result_BK, kept_BK = torch.cat([result_BK, candidate_BM], 1).topk(beams)
        ended_BKL = _rows_of(torch.cat([pad(ended_BKL, (0, 1), value=rules.end), text_BML], 1), kept_BK)

        score_BK, on_BK = score_BM.masked_fill(ends_BM, -torch.inf).topk(beams)
        open_BKL, from_BK = _rows_of(text_BML, on_BK), from_BM.gather(1, on_BK)
        searching_B &= score_BK[:, 0] / (step + 1) ** length_penalty > result_BK[:, -1]
        if not bool(searching_B.any()):
            break
        rows_R = first_R + from_BK.flatten() if step else rows_R
        used_RV = used_RV[first_R + from_BK.flatten()].scatter_(1, open_BKL[:, :, -1].view(-1, 1), True)
    return _until_end(ended_BKL[:, 0], rules.end)


def _rows_of(text_BKL: Tensor, rows_BM: Tensor) -> Tensor:
    """[B, M, L]: of each image, these texts."""
    return text_BKL.gather(1, rows_BM[..., None].expand(-1, -1, text_BKL.shape[2]))


def _used(rules: Rules, rows: int) -> Tensor:
    """bool [R, V]: tokens of each row so far."""
    prompt_P = torch.tensor(rules.prompt, device=rules.banned_V.device)
    return torch.zeros_like(rules.banned_V).index_fill_(0, prompt_P, True).repeat(rows, 1)


def _finite(logits_RV: Tensor) -> Tensor:
    if not bool(torch.isfinite(logits_RV.amax(-1)).all()):  # a NaN is its row's maximum
        raise FloatingPointError("the captioner's logits are not finite")
    return logits_RV


def _until_end(ids_RL: Tensor, end: int) -> list[list[int]]:
    return [row[: row.index(end)] if end in row else row for row in ids_RL.tolist()]
