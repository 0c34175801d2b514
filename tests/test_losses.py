"""The three losses against the formulas of the paper, written once more: NumPy, float64, one row at a time.

The functions of this file's first part share nothing with capfilt.models.losses; tests/test_med.py uses them too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from capfilt.errors import TrainingError
from capfilt.models.losses import (
    IGNORED,
    PRIOR_COLLAPSE,
    Contrast,
    contrast,
    hard_negatives,
    itc_loss,
    itm_loss,
    lm_labels,
    lm_loss,
    one_hot_targets,
)

torch.set_num_threads(1)
Array = np.ndarray[Any, Any]


# The paper once more --------------------------------------------------------------------------------------------------


def log_softmax(row: Array) -> Array:
    top = row.max()
    result: Array = row - top - math.log(np.exp(row - top).sum())
    return result


def soft_targets(teacher_K: Array, target_K: Array, alpha: float) -> Array:
    """ALBEF, equation 6: what a row of the contrast should be."""
    return alpha * np.exp(log_softmax(teacher_K)) + (1 - alpha) * target_K


def numpy_itc(
    image_BE: Array,
    text_BE: Array,
    image_m_BE: Array,
    text_m_BE: Array,
    images_KE: Array,
    texts_KE: Array,
    targets_BK: Array,
    temperature: float,
    alpha: float,
) -> float:
    """ITC: student and twin (`_m`) of the rows, the twin of all candidates."""
    total = 0.0
    for row, target_K in enumerate(targets_BK):
        for own, own_m, candidates in ((image_BE, image_m_BE, texts_KE), (text_BE, text_m_BE, images_KE)):
            soft_K = soft_targets(candidates @ own_m[row] / temperature, target_K, alpha)
            total -= float(soft_K @ log_softmax(candidates @ own[row] / temperature))
    return total / 2 / len(targets_BK)


def numpy_targets(own: Sequence[int], candidates: Sequence[int], by_image: bool) -> Array:
    """Mass of a row: on itself, which is the candidate in its place; or shared by all candidates of its image."""
    rows = []
    for row, image in enumerate(own):
        right = [other == image if by_image else place == row for place, other in enumerate(candidates)]
        rows.append([is_right / sum(right) for is_right in right])
    return np.array(rows)


def numpy_negatives(logits_BM: Array, own: Sequence[int], candidates: Sequence[int], noise_BM: Array) -> list[int]:
    """Of exponential clocks with these rates, the first to ring: a draw in proportion to the weights."""
    drawn = []
    for row, image in enumerate(own):
        rates = np.exp(log_softmax(logits_BM[row])) + 1e-4
        times = [
            math.inf if other == image else -math.log(noise_BM[row, place]) / rates[place]
            for place, other in enumerate(candidates)
        ]
        drawn.append(times.index(min(times)))
    return drawn


def numpy_itm(logits_N2: Array, matches: Sequence[int]) -> float:
    """Cross-entropy of pairs; 1 where they match."""
    return -sum(float(log_softmax(row)[match]) for row, match in zip(logits_N2, matches, strict=True)) / len(matches)


def numpy_lm(logits: Sequence[Array], texts: Sequence[Sequence[int]], prompt: int, smoothing: float) -> float:
    """Mean over tokens of the smoothed cross-entropy of each, given those before it.

    Args:
        logits: of each text, [L, V] or longer.
        texts: token ids without padding, [DEC] first, then `prompt` tokens that nobody has to say.
    """
    terms = []
    for logits_LV, text in zip(logits, texts, strict=True):
        for place in range(1 + prompt, len(text)):
            logs_V = log_softmax(logits_LV[place - 1])
            wanted_V = np.full(len(logs_V), smoothing / len(logs_V))
            wanted_V[text[place]] += 1 - smoothing
            terms.append(-float(wanted_V @ logs_V))
    return sum(terms) / len(terms)


# What the tests draw from ---------------------------------------------------------------------------------------------


def units(rng: np.random.Generator, rows: int, width: int) -> Array:
    drawn = rng.normal(size=(rows, width))
    result: Array = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return result


def tensor(array: Array) -> Tensor:
    return torch.tensor(array, dtype=torch.float32)


SEEDS = st.integers(0, 2**32 - 1)
TEMPERATURES = st.floats(0.03, 0.5)
ALPHAS = st.floats(0, 1)


@st.composite
def contrasts(draw: st.DrawFn) -> tuple[Contrast, Contrast, Tensor]:
    """Student, teacher, targets: of one to five rows, and as many candidates or more."""
    rng = np.random.default_rng(draw(SEEDS))
    rows = draw(st.integers(1, 5))
    candidates = rows + draw(st.integers(0, 4))
    ids = rng.integers(0, 3, candidates)
    student, teacher = (
        Contrast(*tensor(rng.normal(size=(2, rows, candidates)) * draw(st.sampled_from([0.1, 3.0, 20.0]))))
        for _ in range(2)
    )
    return student, teacher, one_hot_targets(torch.tensor(ids[:rows]), torch.tensor(ids))


# ITC ------------------------------------------------------------------------------------------------------------------


def test_targets_of_a_table_to_check_by_eye() -> None:
    own, candidates = torch.tensor([7, 8, 7]), torch.tensor([7, 8, 7, 8, -1, 9, 7])
    third, half = 1 / 3, 1 / 2
    expected = [
        [third, 0, third, 0, 0, 0, third],
        [0, half, 0, half, 0, 0, 0],
        [third, 0, third, 0, 0, 0, third],
    ]
    assert torch.equal(one_hot_targets(own, candidates), torch.tensor(expected))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.lists(st.integers(-1, 4), max_size=6))
def test_targets_are_distributions_over_the_rows_own_image(batch: list[int], queue: list[int]) -> None:
    candidates = batch + queue
    targets_BK = one_hot_targets(torch.tensor(batch), torch.tensor(candidates)).numpy()
    np.testing.assert_allclose(targets_BK.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(targets_BK, numpy_targets(batch, candidates, by_image=True), rtol=1e-6)


def test_images_look_for_texts_and_texts_for_images() -> None:
    rng = np.random.default_rng(0)
    image_BE, text_BE, images_KE, texts_KE = (units(rng, rows, 8) for rows in (3, 3, 5, 5))
    logits = contrast(*map(tensor, (image_BE, text_BE, images_KE, texts_KE)), torch.tensor(0.07))
    for row in range(3):
        for candidate in range(5):
            forth = math.fsum(image_BE[row] * texts_KE[candidate]) / 0.07
            back = math.fsum(text_BE[row] * images_KE[candidate]) / 0.07
            assert float(logits.image_to_text[row, candidate]) == pytest.approx(forth, abs=1e-5)
            assert float(logits.text_to_image[row, candidate]) == pytest.approx(back, abs=1e-5)


def test_contrast_is_exact_under_autocast() -> None:
    """A cosine in bfloat16 is off by 0.002; over the lowest temperature that is two nats."""
    rng = np.random.default_rng(0)
    rows, temperature = [tensor(units(rng, n, 64)) for n in (6, 6, 9, 9)], torch.tensor(0.001)
    exact = contrast(*rows, temperature)
    with torch.autocast("cpu", torch.bfloat16):
        under = contrast(*rows, temperature)
    for one, other in zip(exact, under, strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


@pytest.mark.parametrize("by_image", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_itc_is_the_papers(alpha: float, by_image: bool) -> None:
    rng = np.random.default_rng(1)
    own, queued = [4, 2, 4, 9], [-1, 2, 4, -1, -1]  # rows of one image in the batch and in the queue
    features = [units(rng, 4, 8) for _ in range(4)]  # images, texts, and the twin's
    queue_images, queue_texts = units(rng, 5, 8), units(rng, 5, 8)
    images_KE, texts_KE = np.concatenate([features[2], queue_images]), np.concatenate([features[3], queue_texts])
    targets_BK = numpy_targets(own, own + queued, by_image)
    expected = numpy_itc(*features, images_KE, texts_KE, targets_BK, 0.07, alpha)

    temperature = torch.tensor(0.07)
    student, teacher = (
        contrast(*map(tensor, (*pair, images_KE, texts_KE)), temperature) for pair in (features[:2], features[2:])
    )
    targets = one_hot_targets(torch.tensor(own), torch.tensor(own + queued)) if by_image else tensor(targets_BK)
    assert float(itc_loss(student, teacher, targets, alpha)) == pytest.approx(expected, abs=1e-5)


def test_gradient_of_itc_is_prediction_less_target_and_none_to_the_teacher() -> None:
    rng = np.random.default_rng(2)
    logits, opinions = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 5))
    targets_BK = np.eye(3, 5)
    student, teacher = ([tensor(x).requires_grad_() for x in pair] for pair in (logits, opinions))
    itc_loss(Contrast(*student), Contrast(*teacher), tensor(targets_BK), 0.4).backward()
    for direction in range(2):
        assert teacher[direction].grad is None
        for row in range(3):
            wanted = soft_targets(opinions[direction, row], targets_BK[row], 0.4)
            slope = (np.exp(log_softmax(logits[direction, row])) - wanted) / (2 * 3)
            np.testing.assert_allclose(student[direction].grad[row].numpy(), slope, atol=1e-7)


@given(contrasts(), ALPHAS)
def test_itc_is_at_least_the_entropy_of_its_targets(case: tuple[Contrast, Contrast, Tensor], alpha: float) -> None:
    student, teacher, targets_BK = case
    entropy = 0.0
    for opinions_BK in teacher:
        for row, target_K in zip(opinions_BK.double().numpy(), targets_BK.double().numpy(), strict=True):
            wanted = soft_targets(row, target_K, alpha)
            entropy -= float(wanted @ np.log(np.where(wanted > 0, wanted, 1))) / 2 / len(targets_BK)
    assert float(itc_loss(student, teacher, targets_BK, alpha)) >= entropy - 1e-5
    # ... and no more when the student agrees with the teacher, who alone sets the targets
    agreed = float(itc_loss(teacher, teacher, targets_BK, 1.0))
    alone = -sum((x.softmax(1) * x.log_softmax(1)).sum(1).mean() / 2 for x in teacher)
    assert agreed == pytest.approx(float(alone), abs=1e-5)


@given(SEEDS, st.permutations(range(4)), TEMPERATURES, ALPHAS)
def test_itc_does_not_depend_on_the_order_of_rows_or_queue(
    seed: int, order: list[int], temperature: float, alpha: float
) -> None:
    rng = np.random.default_rng(seed)
    features = [tensor(units(rng, 4, 8)) for _ in range(4)]
    queues = [tensor(units(rng, 4, 8)) for _ in range(2)]
    own, queued = torch.tensor(rng.integers(0, 3, (2, 4)))

    def loss(rows: list[int], places: list[int]) -> float:
        image, text, image_m, text_m = (x[rows] for x in features)
        images_KE, texts_KE = torch.cat([image_m, queues[0][places]]), torch.cat([text_m, queues[1][places]])
        heat = torch.tensor(temperature)
        student = contrast(image, text, images_KE, texts_KE, heat)
        teacher = contrast(image_m, text_m, images_KE, texts_KE, heat)
        targets = one_hot_targets(own[rows], torch.cat([own[rows], queued[places]]))
        return float(itc_loss(student, teacher, targets, alpha))

    assert loss(order, order[::-1]) == pytest.approx(loss([0, 1, 2, 3], [0, 1, 2, 3]), rel=1e-5, abs=1e-5)


# ITM ------------------------------------------------------------------------------------------------------------------


def uniform(rows: int, candidates: int, seed: int) -> Tensor:
    drawn = torch.rand(rows, candidates, generator=torch.Generator().manual_seed(seed))
    return drawn.clamp(1e-7, 1 - 1e-7)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=7).filter(lambda ids: len(set(ids)) > 1), SEEDS)
def test_a_negative_is_of_another_image_and_equal_noise_draws_the_same(ids: list[int], seed: int) -> None:
    logits_BM = torch.randn(len(ids), len(ids), generator=torch.Generator().manual_seed(seed)) * 10
    noise_BM, own = uniform(len(ids), len(ids), seed), torch.tensor(ids)
    drawn = hard_negatives(logits_BM, own, own, noise_BM)
    assert (own[drawn] != own).all()
    assert torch.equal(drawn, hard_negatives(logits_BM, own, own, noise_BM))
    # ... for a part of the rows too, which is what a rank has
    assert torch.equal(drawn[1:], hard_negatives(logits_BM[1:], own[1:], own, noise_BM[1:]))


def test_the_draw_is_a_race() -> None:
    own, candidates = [0, 1, 2, 3] * 50, [0, 1, 2, 3, 1]
    logits_BM = np.random.default_rng(7).normal(size=(200, 5)) * 4
    noise_BM = uniform(200, 5, 7)
    drawn = hard_negatives(tensor(logits_BM), torch.tensor(own), torch.tensor(candidates), noise_BM)
    assert drawn.tolist() == numpy_negatives(logits_BM, own, candidates, noise_BM.double().numpy())


@pytest.mark.parametrize(
    ("logits", "ids"),
    [
        ([1.0, 0.0, 2.0, -1.0, 1.5, 0.0], [0, 1, 2, 3, 0, 4]),  # candidate 4 is of the row's image too
        ([12.0, 0.0, 2.0, 3.0, 1.0, -9.0], [0, 1, 2, 3, 4, 5]),  # what the softmax leaves is of the floor's size
        ([60.0, 0.0, 9.0, 1.0, 3.0, -60.0], [0, 1, 2, 3, 4, 5]),  # only the floor: all alike
    ],
)
def test_negatives_are_drawn_by_softmax_plus_floor(logits: list[float], ids: list[int]) -> None:
    draws = 40_000
    logits_BM, noise_BM = torch.tensor([logits]).expand(draws, -1), uniform(draws, len(ids), 3)
    drawn = hard_negatives(logits_BM, torch.zeros(draws, dtype=torch.int64), torch.tensor(ids), noise_BM)
    weights = np.exp(log_softmax(np.array(logits))) + 1e-4
    weights[np.array(ids) == 0] = 0
    share = weights / weights.sum()
    counted = np.bincount(drawn.numpy(), minlength=len(ids)) / draws
    np.testing.assert_array_less(np.abs(counted - share), 5 * np.sqrt(share * (1 - share) / draws) + 1e-12)


def test_a_row_without_another_image_has_no_negative() -> None:
    ids, logits_BM, noise_BM = torch.tensor([5, 5, 5]), torch.zeros(3, 3), uniform(3, 3, 0)
    with pytest.raises(TrainingError, match="raise batch_size"):
        hard_negatives(logits_BM, ids, ids, noise_BM)
    with pytest.raises(TrainingError, match="raise batch_size"):  # one of two rows is enough
        hard_negatives(logits_BM[:2], torch.tensor([5, 6]), ids, noise_BM[:2])
    assert hard_negatives(logits_BM[:1], torch.tensor([6]), ids, noise_BM[:1]).item() in range(3)


def test_draws_carry_no_gradient_and_take_half_precision() -> None:
    rows = 64
    logits_BM = torch.randn(rows, rows, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    own, noise_BM = torch.arange(rows), uniform(rows, rows, 1)
    drawn = hard_negatives(logits_BM, own, own, noise_BM)
    assert not drawn.requires_grad
    assert torch.equal(drawn, hard_negatives(logits_BM.float(), own, own, noise_BM))


def test_itm_is_the_papers_with_one_match_in_three() -> None:
    logits_N2 = np.random.default_rng(4).normal(size=(12, 2)) * 3
    expected = numpy_itm(logits_N2, [1] * 4 + [0] * 8)
    assert float(itm_loss(tensor(logits_N2), 4)) == pytest.approx(expected, abs=1e-6)
    # class 1 is a match: certain and right costs nothing, certain and wrong costs its margin
    assert float(itm_loss(torch.tensor([[-20.0, 20.0], [20.0, -20.0], [20.0, -20.0]]), 1)) == pytest.approx(0, abs=1e-6)
    assert float(itm_loss(torch.tensor([[20.0, -20.0], [-20.0, 20.0], [-20.0, 20.0]]), 1)) == pytest.approx(40)


def test_prior_collapse_is_the_loss_of_a_model_that_knows_only_the_ratio() -> None:
    def loss(match: float) -> float:
        return float(itm_loss(torch.tensor([math.log(1 - match), math.log(match)]).expand(12, 2), 4))

    assert loss(1 / 3) == pytest.approx(PRIOR_COLLAPSE, abs=5e-5)
    assert f"{-(math.log(1 / 3) / 3 + math.log(2 / 3) * 2 / 3):.4f}" == str(PRIOR_COLLAPSE)
    assert all(loss(match) > loss(1 / 3) for match in (0.1, 0.3, 0.4, 0.5, 0.9))


# LM -------------------------------------------------------------------------------------------------------------------


def test_labels_of_a_table_to_check_by_eye() -> None:
    no = IGNORED
    ids = torch.tensor([[9, 4, 5, 6, 2, 0, 0], [9, 4, 5, 7, 8, 3, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    before = ids.clone()
    assert lm_labels(ids, mask, 0).tolist() == [[no, 4, 5, 6, 2, no, no], [no, 4, 5, 7, 8, 3, 2]]
    assert lm_labels(ids, mask, 2).tolist() == [[no, no, no, 6, 2, no, no], [no, no, no, 7, 8, 3, 2]]
    assert lm_labels(ids, mask, 3).tolist() == [[no, no, no, no, 2, no, no], [no, no, no, no, 8, 3, 2]]
    assert torch.equal(ids, before)


def test_the_published_prompt_hides_four_positions() -> None:
    """[DEC] a picture of: models/blip.py counts four, [DEC] among them; here it is not counted."""
    ids = torch.arange(10, 18)[None]
    assert (lm_labels(ids, torch.ones_like(ids), 3) == IGNORED).sum() == 4


TEXTS = [[9, 4, 5, 6, 2], [9, 4, 5, 7, 8, 3, 2], [9, 4, 5, 2]]


def padded(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, texts))
    ids = [[*text, *[0] * (longest - len(text))] for text in texts]
    return torch.tensor(ids), torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])


@pytest.mark.parametrize("prompt", [0, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_lm_is_the_papers(smoothing: float, prompt: int) -> None:
    logits = np.random.default_rng(5).normal(size=(3, 7, 11)) * 3
    labels_NL = lm_labels(*padded(TEXTS), prompt)
    expected = numpy_lm(list(logits), TEXTS, prompt, smoothing)
    assert float(lm_loss(tensor(logits), labels_NL, smoothing)) == pytest.approx(expected, abs=1e-5)


def test_a_token_is_predicted_from_the_one_before_it() -> None:
    """Gradients reach the logits one place before each labelled token, and no others."""
    logits = torch.zeros(3, 7, 11, requires_grad=True)
    lm_loss(logits, lm_labels(*padded(TEXTS), 2), 0.0).backward()
    assert logits.grad is not None
    reached = logits.grad.abs().sum(2) > 0
    assert reached.int().tolist() == [[0, 0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0, 0]]
    pushed = logits.grad.argmin(2)  # the word to be said is the one that is raised
    assert [pushed[n, place].item() for n, place in ((0, 2), (0, 3), (1, 2), (1, 5), (2, 2))] == [6, 2, 7, 2, 2]


@given(arrays(np.float64, (2, 4, 6), elements=st.floats(-30, 30)), st.floats(0, 0.9))
def test_lm_is_at_least_the_entropy_of_its_smoothed_targets(logits: Array, smoothing: float) -> None:
    text = [5, 1, 3, 2]
    labels_NL = lm_labels(*padded([text, text]), 0)
    wanted = np.full(6, smoothing / 6)
    wanted[0] += 1 - smoothing
    entropy = -float(wanted @ np.log(np.where(wanted > 0, wanted, 1)))
    assert float(lm_loss(tensor(logits), labels_NL, smoothing)) >= entropy - 1e-5
    best = np.log(np.where(wanted > 0, wanted, 1e-30))
    rolled = np.stack([np.roll(best, word) for word in (*text[1:], 0)])
    reached = float(lm_loss(tensor(np.stack([rolled, rolled])), labels_NL, smoothing))
    assert reached == pytest.approx(entropy, abs=1e-5)


def test_losses_of_half_precision_are_computed_in_float32() -> None:
    rng = np.random.default_rng(6)
    words, pairs = tensor(rng.normal(size=(3, 7, 11))).bfloat16(), tensor(rng.normal(size=(6, 2))).bfloat16()
    labels_NL = lm_labels(*padded(TEXTS), 0)
    assert torch.equal(lm_loss(words, labels_NL, 0.1), lm_loss(words.float(), labels_NL, 0.1))
    assert torch.equal(itm_loss(pairs, 2), itm_loss(pairs.float(), 2))
