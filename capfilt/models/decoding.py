"""Writing texts about images, a token a step: by sampling, greedily, or by beam search.

B  images    K  texts an image    R  rows, B x K texts, those of an image side by side    M  continuations in question
L  new tokens    V  vocabulary    H  heads    T  image tokens    E  width of a head    D  text width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from capfilt.models import sampling as draws
from capfilt.models.blip import Cache, Keys, TextDecoder
from capfilt.models.recorded import Player
from capfilt.spec import Sampling

_STEPS_UNSEEN = 4
"""Steps on a GPU between looks at what has ended: a look makes the device wait for the host."""

_WORTH = 0.75
"""Rows leave when at most so many of them would be left: what stays is copied, of an image all that its texts read."""

_WORTH_PLAYED = 0.5
"""The same on a GPU: what is left goes on without the recorded step."""

_NOT_FINITE = "the captioner's logits are not finite"


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

    def __call__(self, token_R: Tensor, rows_R: Tensor | None = None, images_B: Tensor | None = None) -> Tensor:
        """Give every row its next token.

        Args:
            rows_R: first take these rows, in this order; a row may come twice. Those of an image stay side by side, as
                many of each. As they are if not given.
            images_B: and these images, where rows of some are left out.

        Returns:
            Logits [R, V] of what comes then.
        """
        ...


def begin(
    decoder: TextDecoder, image: Sequence[Keys], rules: Rules, player: Player | None = None
) -> tuple[Tensor, Follow]:
    """Read the prompt, once for each image.

    Args:
        image: what the texts read of B images, from `look`; shared by all texts of an image, never copied.
        player: plays recorded steps, until the first texts leave. Not for a search that moves its rows at every step.

    Returns:
        Logits [B, V] after the prompt, and what goes on from there for `sampling.max_tokens` tokens.
    """
    images, like, shown = len(image[0].keys), image[0].keys, image
    cache = Cache(decoder.bert.config, images, len(rules.prompt) + rules.sampling.max_tokens, like)

    def read(ids_RL: Tensor) -> Tensor:
        hidden_RLD = decoder.bert(ids_RL, image=shown, causal=True, cache=cache)
        return decoder.logits(hidden_RLD[:, -1:])[:, 0]

    untried, playing = player is not None, None

    def follow(token_R: Tensor, rows_R: Tensor | None = None, images_B: Tensor | None = None) -> Tensor:
        nonlocal shown, cache, untried, playing
        if images_B is not None:
            shown = [Keys(layer.keys[images_B], layer.values[images_B]) for layer in shown]
        if rows_R is not None:
            cache, playing = (playing.cache if playing else cache).selected(rows_R), None
        if player is not None and untried:
            untried, playing = False, player.load(shown, cache, len(token_R))
        return playing(token_R) if playing else read(token_R[:, None])

    return read(torch.tensor(rules.prompt, device=like.device).expand(images, -1)), follow


def sample(
    logits_BV: Tensor, follow: Follow, rules: Rules, keys_R: Sequence[tuple[int, int]], tolerance: float, width: int
) -> tuple[list[list[int]], list[bool]] | None:
    """Draw texts with random numbers of their own.

    Args:
        logits_BV, follow: from :func:`begin`.
        keys_R: from :func:`capfilt.models.sampling.row_key`; K of an image side by side.
        tolerance, width: see :func:`capfilt.models.sampling.draw`. The width has no say in what is written.

    Returns:
        The rows' new ids, without the end; and which met a tie: those are unfinished. None where a nucleus may be wider
        than `width`: begin again, with more.

    Raises:
        FloatingPointError: logits are not finite.
    """
    settings, key_R2 = rules.sampling, torch.tensor(keys_R, dtype=torch.int64, device=logits_BV.device).view(-1, 2)

    def choose(logits_RV: Tensor, text_R: Tensor, step: int) -> draws.Draws:
        noise = partial(draws.gumbel, key_R2[text_R], step)
        return draws.draw(logits_RV, noise, settings.top_k, settings.top_p, tolerance, width)

    return _write(logits_BV, follow, rules, len(keys_R) // len(logits_BV), choose)


def greedy(logits_BV: Tensor, follow: Follow, rules: Rules) -> list[list[int]]:
    """Always the likeliest token: transformers' `generate(do_sample=False)`.

    Args:
        logits_BV, follow: from :func:`begin`.

    Returns:
        New ids of one text for each image, without the end.

    Raises:
        FloatingPointError: logits are not finite.
    """

    def choose(logits_RV: Tensor, _texts: Tensor, _step: int) -> draws.Draws:
        best_R, token_R = logits_RV.max(-1)
        no_R = torch.zeros_like(best_R, dtype=torch.bool)
        return draws.Draws(token_R, no_R, no_R, ~torch.isfinite(best_R))  # a NaN is its row's maximum

    written = _write(logits_BV, follow, rules, 1, choose)
    assert written is not None  # no nucleus, none too wide
    return written[0]


def _write(
    logits_BV: Tensor, follow: Follow, rules: Rules, each: int, choose: Callable[[Tensor, Tensor, int], draws.Draws]
) -> tuple[list[list[int]], list[bool]] | None:
    """Write `each` texts an image until all have ended or are tied: their new ids without the end, and which are tied.

    Texts that are done leave the batch where that is worth it. On a GPU the host looks at what happened every few steps
    only, and the device never waits for it in between.

    Args:
        choose: the rows' tokens, given their logits [R, V], which texts they are, and the number of tokens so far.
    """
    images, end, device = len(logits_BV), rules.end, logits_BV.device
    every, worth = (1, _WORTH) if device.type == "cpu" else (_STEPS_UNSEEN, _WORTH_PLAYED)
    rows_R = torch.arange(images, device=device).repeat_interleave(each)
    text_R = torch.arange(len(rows_R), device=device)
    ids_NL = torch.full((len(rows_R), rules.sampling.max_tokens), end, device=device)
    tied_N = torch.zeros(len(rows_R), dtype=torch.bool, device=device)
    logits_RV, done_R = logits_BV[rows_R], torch.zeros_like(tied_N)
    trouble_2 = torch.zeros(2, dtype=torch.bool, device=device)  # broken, wide
    moved = _Moved(rows_R) if each > 1 else _Moved()
    for step in range(rules.sampling.max_tokens):
        if step:
            logits_RV, moved = follow(ids_NL[text_R, step - 1], *moved), _Moved()
        used_RL = _used(rules, ids_NL[text_R, :step])
        logits_RV = draws.adjust(logits_RV, used_RL, rules.banned_V, end, step, rules.sampling)
        drawn = choose(logits_RV, text_R, step)
        trouble_2 |= (torch.stack([drawn.broken, drawn.wide]) & ~done_R).any(1)
        tied_R = drawn.tied & ~done_R
        token_R = torch.where(done_R, end, drawn.token)
        ids_NL[text_R, step] = token_R
        tied_N[text_R] |= tied_R
        done_R = done_R | tied_R | (token_R == end)
        if (step + 1) % every and step + 1 < rules.sampling.max_tokens:
            continue
        (broken, wide), done_BK = _seen(trouble_2, done_R, each)
        if broken:
            raise FloatingPointError(_NOT_FINITE)
        if wide:
            return None
        if done_BK.all():
            break
        if (still := _still(done_BK, worth)) is not None:
            rows_R, kept_B = (index.to(device) for index in still)
            whole = len(kept_B) == len(done_BK)
            text_R, done_R, each = text_R[rows_R], done_R[rows_R], len(rows_R) // len(kept_B)
            moved = _Moved(rows_R if moved.rows_R is None else moved.rows_R[rows_R], None if whole else kept_B)
    return _until_end(ids_NL, end), tied_N.tolist()


class _Moved(NamedTuple):
    """What :class:`Follow` takes."""

    rows_R: Tensor | None = None  # noqa: N815  the shape's suffix
    images_B: Tensor | None = None  # noqa: N815


def _seen(trouble_2: Tensor, done_R: Tensor, each: int) -> tuple[list[bool], Tensor]:
    """Both on the host, in one transfer: as a list, and as bool [B, K]."""
    seen = torch.cat([trouble_2, done_R]).cpu()
    return seen[:2].tolist(), seen[2:].view(-1, each)


def _still(done_BK: Tensor, worth: float) -> tuple[Tensor, Tensor] | None:
    """Rows and images to go on with, as many rows of each image; None where too few would leave to be worth a copy."""
    open_B = (~done_BK).sum(1)
    images_B, most = open_B.nonzero()[:, 0], int(open_B.max())
    if len(images_B) * most > worth * done_BK.numel():
        return None
    first_BK = done_BK[images_B].int().argsort(stable=True, dim=1)[:, :most]  # those still open
    return (images_B[:, None] * done_BK.shape[1] + first_BK).flatten(), images_B


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
    rows_R, logits_RV = first_R // beams, logits_BV.repeat_interleave(beams, 0)
    open_BKL = torch.empty(images, beams, 0, dtype=torch.int64, device=device)
    score_BK = torch.full((images, beams), -torch.inf, device=device)
    score_BK[:, 0] = 0  # all are the same at the start: let one go on
    ended_BKL, result_BK = open_BKL, torch.full_like(score_BK, -torch.inf)
    searching_B = torch.ones(images, dtype=torch.bool, device=device)
    for step in range(limit):
        if step:
            logits_RV = follow(open_BKL[:, :, -1].flatten(), rows_R)
        # transformers' processors meet log-probabilities here, and logits in greedy search
        used_RL = _used(rules, open_BKL.flatten(0, 1))
        gain_RV = draws.adjust(
            logits_RV.float().log_softmax(-1), used_RL, rules.banned_V, rules.end, step, rules.sampling
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
    return _until_end(ended_BKL[:, 0], rules.end)


def _rows_of(text_BKL: Tensor, rows_BM: Tensor) -> Tensor:
    """[B, M, L]: of each image, these texts."""
    return text_BKL.gather(1, rows_BM[..., None].expand(-1, -1, text_BKL.shape[2]))


def _used(rules: Rules, text_RL: Tensor) -> Tensor:
    """[R, P + L]: tokens of each row so far, the prompt's among them."""
    prompt_P = torch.tensor(rules.prompt, device=text_RL.device)
    return torch.cat([prompt_P.expand(len(text_RL), -1), text_RL], 1)


def _finite(logits_RV: Tensor) -> Tensor:
    if not bool(torch.isfinite(logits_RV.amax(-1)).all()):  # a NaN is its row's maximum
        raise FloatingPointError(_NOT_FINITE)
    return logits_RV


def _until_end(ids_RL: Tensor, end: int) -> list[list[int]]:
    return [row[: row.index(end)] if end in row else row for row in ids_RL.tolist()]
