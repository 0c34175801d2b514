"""The training loop: schedules, what it warns of, and resuming to the same step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import BlipConfig

from capfilt.errors import TrainingError
from capfilt.models.blip import CaptioningNetwork, initialise
from capfilt.models.losses import PRIOR_COLLAPSE
from capfilt.models.med import Batch, CaptionObjective, MatchSettings, Med, PretrainObjective, Tokens
from capfilt.models.train import PLATEAU_STEPS, Clock, Training, Watch, alpha, learning_rate
from capfilt.spec import Optimiser

TOKENS = Tokens(enc=62, dec=63)


def config(dropout: float = 0.1) -> BlipConfig:
    text = {"hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    ids = {"bos_token_id": 63, "sep_token_id": 2, "eos_token_id": 2}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    return BlipConfig(
        text_config={**text, **ids, **drop, "vocab_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 16},
        vision_config={**vision, "num_hidden_layers": 2},
        image_text_hidden_size=8,
    )


def batches(start: int = 0) -> Iterator[Batch]:
    """Endless; the n-th is always the same."""
    for n in itertools.count(start):
        g = torch.Generator().manual_seed(n)
        ids = torch.randint(5, 60, (6, 7), generator=g)
        mask = torch.ones_like(ids)
        mask[0, 5:] = 0
        yield Batch(torch.randn(6, 3, 16, 16, generator=g), ids, mask, torch.arange(6))


def training(
    total: int, *, objective: Any = None, autocast: bool = False, rank: int = 0, ranks: int = 1, **optimiser: Any
) -> Training:
    if objective is None:
        g = torch.Generator().manual_seed(0)
        med = Med(config())
        initialise(med, g)
        objective = PretrainObjective(med, TOKENS, MatchSettings(queue=32), 0.1, g)
    settings = Optimiser(**{"lr": 1e-3, "warmup_steps": 2, **optimiser})
    return Training(
        objective,
        objective,
        settings,
        steps_per_epoch=4,
        total=total,
        alpha_target=0.4,
        alpha_epochs=2,
        autocast=autocast,
        seed=7,
        rank=rank,
        ranks=ranks,
    )


def curve(run: Training, start: int = 0, stop: int | None = None) -> list[dict[str, float]]:
    """Metrics of the steps from `start`, without the speed."""
    log: list[dict[str, float]] = []
    taken = itertools.islice(batches(start * run.settings.accumulate), stop)
    for _ in run.run(taken, log.append, lambda said: pytest.fail(said)):
        log[-1].pop("samples_per_s")
    return log


def test_pretraining_warms_up_then_decays_by_epochs() -> None:
    optimiser = Optimiser()
    rates = {step: learning_rate(Clock(step, 5000, 100_000), optimiser) for step in (0, 1500, 2999, 3000, 5000, 10_001)}
    assert rates[0] == 1e-6
    assert rates[1500] == pytest.approx((1e-6 + 3e-4) / 2)
    assert rates[2999] < rates[3000] == 3e-4
    assert rates[5000] == pytest.approx(2.7e-4)
    assert rates[10_001] == pytest.approx(2.43e-4)
    assert learning_rate(Clock(10**7, 5000, 10**8), optimiser) == 1e-6


def test_fine_tuning_follows_a_cosine() -> None:
    optimiser = Optimiser(lr=1e-5, schedule="cosine", warmup_steps=0, min_lr=0)
    rates = [learning_rate(Clock(step, 10, 100), optimiser) for step in (0, 50, 100)]
    assert rates == pytest.approx([1e-5, 5e-6, 0])


def test_alpha_ramps_over_its_epochs() -> None:
    assert [alpha(Clock(step, 10, 100), 0.4, 2) for step in (0, 5, 20, 90)] == pytest.approx([0, 0.1, 0.4, 0.4])
    assert alpha(Clock(0, 10, 100), 0.4, 0) == 0.4


def test_a_step_reports_all_that_moves() -> None:
    first = curve(training(1))[0]
    assert first.keys() == {
        "itc", "itm", "lm", "gradient_norm", "learning_rate", "epoch", "temperature", "alpha"
    }  # fmt: skip
    assert first["lm"] == pytest.approx(math.log(64), rel=0.05)
    assert (first["alpha"], first["learning_rate"]) == (0, 1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_step_of_every_rank_has_dropout_of_its_own(ranks: int) -> None:
    seeds = []
    for rank in range(ranks):
        run = training(4, rank=rank, ranks=ranks)
        seeds += [torch.initial_seed() for _ in run.run(batches(), lambda _: None, print)]
    assert len(set(seeds)) == 4 * ranks
    if ranks == 1:
        assert seeds == [8_000_024, 8_000_025, 8_000_026, 8_000_027]  # published results are of these


@pytest.mark.parametrize("stop", [1, 5])
def test_a_run_that_resumes_has_the_same_curve(stop: int) -> None:
    whole = curve(training(9))
    first = training(9)
    begun = curve(first, stop=stop)
    second = training(9)
    second.restore(first.state())
    assert begun + curve(second, start=stop) == whole
    assert len(whole) == 9


def test_accumulated_batches_make_one_step() -> None:
    run = training(3, accumulate=2)
    assert len(curve(run, stop=5)) == 2  # the fifth batch alone makes no step
    assert run.clock.step == 2


def test_accumulation_is_the_mean_of_gradients() -> None:
    objectives = []
    for _ in range(2):
        torch.manual_seed(0)
        network = CaptioningNetwork(config(dropout=0.0))
        initialise(network, torch.Generator().manual_seed(0))
        objectives.append(CaptionObjective(network, TOKENS, 0, 0.1))
    one, other = (
        training(1, objective=objective, accumulate=n) for objective, n in zip(objectives, (1, 2), strict=True)
    )
    batch = next(batches())
    metrics = []
    for run, count in ((one, 1), (other, 2)):
        log: list[dict[str, float]] = []
        list(run.run([batch] * count, log.append, print))
        metrics.append(log[0])
    assert metrics[0]["gradient_norm"] == pytest.approx(metrics[1]["gradient_norm"], rel=1e-5)
    assert metrics[0].keys() == {"lm", "gradient_norm", "learning_rate", "epoch", "samples_per_s"}


def test_clipping_bounds_what_the_optimiser_sees_and_reports_the_norm() -> None:
    free, clipped = training(1), training(1, clip_norm=1e-3)
    norm = curve(free)[0]["gradient_norm"]
    assert curve(clipped)[0]["gradient_norm"] == pytest.approx(norm)
    for run, seen in ((free, norm), (clipped, 1e-3)):
        first_moments = [state["exp_avg"] for state in run.adam.state.values()]
        total = math.sqrt(sum(float(moment.norm() ** 2) for moment in first_moments))
        assert total == pytest.approx((1 - run.settings.betas[0]) * seen, rel=1e-3)


def test_training_learns_one_batch() -> None:
    run = training(100, lr=1e-2)
    batch = next(batches())
    log: list[dict[str, float]] = []
    list(run.run([batch] * 100, log.append, print))
    assert log[-1]["lm"] < log[0]["lm"] - 1
    assert all(metrics["samples_per_s"] > 0 for metrics in log)


def test_bfloat16_is_near_float32() -> None:
    assert curve(training(1, autocast=True))[0]["lm"] == pytest.approx(curve(training(1))[0]["lm"], rel=0.02)


def test_a_loss_that_is_not_a_number_ends_the_run_with_good_weights() -> None:
    run = training(3)
    before = [p.detach().clone() for p in run.parameters[:5]]
    bad = next(batches())
    bad.pixels[0, 0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"diverged: lower optimiser\.lr"):
        list(run.run([bad], lambda _: None, print))
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters[:5], strict=True))


def test_the_priors_plateau_is_said_once() -> None:
    watch = Watch()
    said = [watch.see(step, {"itm": PRIOR_COLLAPSE}) for step in range(3 * PLATEAU_STEPS)]
    assert [n for n, text in enumerate(said) if text] == [PLATEAU_STEPS - 1]
    assert "one pair in three" in (said[PLATEAU_STEPS - 1] or "")


def test_a_second_collapse_is_said_again() -> None:
    """A plateau early in a warm-up is common and harmless; it must not use up the warning."""
    watch = Watch()
    losses = [0.6365] * 300 + [0.2] * 1000 + [0.6365] * 1000
    said = [step for step, loss in enumerate(losses) if watch.see(step, {"itm": loss})]
    assert len(said) == 2
    assert said[0] == PLATEAU_STEPS - 1
    assert 1300 < said[1] <= 1300 + PLATEAU_STEPS


def test_a_mean_that_strays_at_the_bands_edge_is_one_collapse() -> None:
    watch = Watch()
    losses = [0.6365 + 0.005 * (step // 300 % 2) for step in range(3000)]
    assert sum(watch.see(step, {"itm": loss}) is not None for step, loss in enumerate(losses)) == 1


@pytest.mark.parametrize("losses", [[0.60], [0.5, 0.6], [0.6365]])
def test_other_losses_are_no_plateau(losses: list[float]) -> None:
    watch = Watch()
    steps = itertools.islice(itertools.cycle(losses), PLATEAU_STEPS - (losses == [0.6365]))
    assert not any(watch.see(step, {"itm": value}) for step, value in enumerate(steps))
