"""Greedy and beam search against transformers' generate, and against every text there is."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig

from capfilt.models import decoding
from capfilt.models.blip import CaptioningNetwork, fill
from capfilt.models.checkpoints import quiet
from capfilt.models.sampling import row_key
from capfilt.spec import Sampling

torch.set_num_threads(1)

WORDS, END, PROMPT = 40, 3, (38, 7, 11)
IMAGES = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def networks(seed: int) -> tuple[Any, CaptioningNetwork]:
    """transformers' and ours with the same random weights, whose texts differ by image and end after some words."""
    text = BlipTextConfig(
        vocab_size=WORDS,
        hidden_size=24,
        encoder_hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=24,
        bos_token_id=PROMPT[0],
        pad_token_id=0,
        sep_token_id=END,
        eos_token_id=END,
    )
    vision = BlipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    with quiet():
        theirs = BlipForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(theirs.named_parameters()):
        if weight.dim() > 1:
            std = 0.5 if "embeddings" in name else 1.5 / math.sqrt(weight[0].numel())
            weight.normal_(0, std, generator=generator)
    theirs.text_decoder.cls.predictions.bias[END] = 3.0
    ours = CaptioningNetwork(config).eval()
    fill(ours, theirs.state_dict(), "transformers")
    return theirs, ours


def rules(**sampling: Any) -> decoding.Rules:
    return decoding.Rules(PROMPT, END, torch.zeros(WORDS, dtype=torch.bool), Sampling(**sampling))


def generated(theirs: Any, **how: Any) -> list[list[int]]:
    prompt = torch.tensor([[*PROMPT, 0]]).repeat(len(IMAGES), 1)  # its last, meant for [SEP], is cut
    with quiet(), torch.inference_mode():
        ids = theirs.generate(pixel_values=IMAGES, input_ids=prompt, do_sample=False, **how)
    new = ids[:, len(PROMPT) :].tolist()
    return [row[: row.index(END)] if END in row else row for row in new]


@torch.inference_mode()
def begun(ours: CaptioningNetwork, keep: decoding.Rules) -> tuple[Tensor, decoding.Follow]:
    return decoding.begin(ours.text_decoder, ours.text_decoder.bert.look(ours.vision_model(IMAGES)), keep)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("penalty", [1.0, 1.1])
@pytest.mark.parametrize(("shortest", "longest"), [(0, 12), (4, 9)])
def test_searches_are_transformers(seed: int, penalty: float, shortest: int, longest: int) -> None:
    theirs, ours = networks(seed)
    keep = rules(min_tokens=shortest, max_tokens=longest, repetition_penalty=penalty, temperature=3.0)
    bounds = {"min_new_tokens": shortest, "max_new_tokens": longest, "repetition_penalty": penalty}
    texts = []
    with torch.inference_mode():
        texts.append(decoding.greedy(*begun(ours, keep), keep))
        assert texts[-1] == generated(theirs, **bounds)
        for beams, length_penalty in ((2, 1.0), (3, 1.0), (3, 0.0), (4, 2.0)):
            texts.append(decoding.beam(*begun(ours, keep), keep, beams, length_penalty))
            assert texts[-1] == generated(theirs, num_beams=beams, length_penalty=length_penalty, **bounds)
    lengths = {len(text) for own in texts for text in own}
    assert len(lengths) > 2
    assert min(lengths) >= shortest
    assert max(lengths) <= longest
    assert all(len(set(map(tuple, own))) > 10 for own in texts)  # images matter
    assert sum(one != other for one, other in zip(texts[0], texts[2], strict=True)) > 5  # and so do beams


@torch.inference_mode()
def test_what_is_banned_is_not_written() -> None:
    theirs, ours = networks(0)
    keep = rules(min_tokens=2, max_tokens=8, repetition_penalty=1.0)
    often = {token for text in decoding.greedy(*begun(ours, keep), keep) for token in text}
    banned = sorted(often)[: len(often) // 2]
    keep.banned_V[banned] = True
    bounds = {"min_new_tokens": 2, "max_new_tokens": 8, "suppress_tokens": banned}
    for beams in (1, 3):
        write = decoding.greedy if beams == 1 else decoding.beam
        texts = write(*begun(ours, keep), keep, *([] if beams == 1 else [beams]))
        assert texts == generated(theirs, num_beams=beams, **bounds)
        assert not {token for text in texts for token in text} & set(banned)


# --- against every text there is ---


class Automaton:
    """Follows texts through a table: what may come next is a matter of everything so far."""

    def __init__(self, table_SV: Tensor, state_R: Tensor) -> None:
        self.table_SV, self.state_R = table_SV, state_R

    def __call__(self, token_R: Tensor, rows_R: Tensor | None = None, _images: Tensor | None = None) -> Tensor:
        state_R = self.state_R if rows_R is None else self.state_R[rows_R]
        self.state_R = self.after(state_R, token_R)
        return self.table_SV[self.state_R]

    def after(self, state: Any, token: Any) -> Any:
        return (state * 7 + token * 3 + 1) % len(self.table_SV)


def tables(seed: int, words: int) -> tuple[Tensor, Tensor]:
    """Logits of 53 states, and where 3 images start."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(53, words, generator=generator) * 2, torch.randint(0, 53, (3,), generator=generator)


def small(words: int, longest: int, shortest: int = 0) -> decoding.Rules:
    limits = Sampling(min_tokens=shortest, max_tokens=longest, repetition_penalty=1.0)
    return decoding.Rules((1,), 0, torch.zeros(words, dtype=torch.bool), limits)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31), length_penalty=st.sampled_from([-1.0, 0.0, 1.0, 2.0]), shortest=st.sampled_from([0, 2])
)
def test_a_beam_as_wide_as_everything_finds_the_best(seed: int, length_penalty: float, shortest: int) -> None:
    words, longest = 4, 3
    table, starts = tables(seed, words)
    machine = Automaton(table, starts)
    found = decoding.beam(table[starts], machine, small(words, longest, shortest), 64, length_penalty)
    for start, text in zip(starts.tolist(), found, strict=True):
        scores = {}
        for length in range(1, longest + 1):
            for ids in itertools.product(range(words), repeat=length):
                if 0 in ids[:-1] or (ids[-1] != 0 and length < longest) or (ids[-1] == 0 and length <= shortest):
                    continue  # goes on after its end, or ends before it, or too early
                state, score = start, 0.0
                for token in ids:
                    score += table[state].double().log_softmax(-1)[token].item()
                    state = machine.after(state, token)
                scores[ids] = score / length**length_penalty
        best = max(scores, key=scores.__getitem__)
        assert text == [token for token in best if token]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), words=st.integers(2, 9), shortest=st.integers(0, 4))
def test_one_beam_is_greedy(seed: int, words: int, shortest: int) -> None:
    table, starts = tables(seed, words)
    keep = small(words, 6, shortest)
    one = decoding.beam(table[starts], Automaton(table, starts), keep, 1)
    assert one == decoding.greedy(table[starts], Automaton(table, starts), keep)


@pytest.mark.parametrize("each", [1, 3])
def test_texts_that_are_done_leave_with_their_images(monkeypatch: pytest.MonkeyPatch, each: int) -> None:
    """What is written is the same whether they leave at once or never; rows and images stay those of each other."""
    table, _ = tables(5, 9)
    table[:, 0] += 2  # texts end, some early
    starts = torch.arange(12)
    keep = small(9, 10)._replace(sampling=Sampling(max_tokens=10, min_tokens=0, repetition_penalty=1.3))
    keys = [row_key(0, bytes([image]) * 32, candidate) for image in range(12) for candidate in range(each)]

    class Watched(Automaton):
        images = torch.arange(12)

        def __call__(self, token_R: Tensor, rows_R: Tensor | None = None, images_B: Tensor | None = None) -> Tensor:
            self.images = self.images if images_B is None else self.images[images_B]
            sizes.append((len(token_R), len(self.images)))
            return super().__call__(token_R, rows_R, images_B)

    written = {}
    for worth in (1.0, 0.75, 0.0):  # of the rows, at most so many are left when some leave
        monkeypatch.setattr(decoding, "_WORTH", worth)
        sizes: list[tuple[int, int]] = []
        written[worth] = decoding.sample(table[starts], Watched(table, starts), keep, keys, 0.0, 9)
        if worth:
            assert len({rows for rows, _ in sizes}) > 2
            assert sizes[-1][1] < 12
        else:
            assert {rows for rows, _ in sizes} == {12 * each}
        assert all(rows % images == 0 for rows, images in sizes)
    assert written[1.0] == written[0.75] == written[0.0]
    assert len({len(ids) for ids in written[0.0][0]}) > 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("step", [0, 1])
def test_logits_that_are_not_numbers(bad: float, step: int) -> None:
    table, starts = tables(0, 5)
    first = table[starts]
    if step:
        table = torch.full_like(table, bad)
    else:
        first[1, 2] = bad
    keep = small(5, 4, 3)
    with pytest.raises(FloatingPointError):
        decoding.greedy(first, Automaton(table, starts), keep)
    with pytest.raises(FloatingPointError):
        decoding.beam(first, Automaton(table, starts), keep, 2)
