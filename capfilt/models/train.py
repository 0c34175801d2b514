"""One training run on one rank: optimiser, schedules, precision, metrics, and a state that resumes to the same step.

It knows nothing of where batches come from or how many ranks there are; capfilt.pipelines does.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from capfilt.errors import TrainingError
from capfilt.models.losses import PRIOR_COLLAPSE
from capfilt.models.med import Batch, CaptionObjective, Losses, MatchObjective, gathered
from capfilt.spec import Optimiser

PLATEAU_STEPS = 200
"""Steps over which an ITM loss that stays at the prior is called collapsed."""

PLATEAU_WIDTH = 0.003
"""How near the prior's loss the mean over those steps must be."""

PLATEAU_LEFT = 0.03
"""How far from it the mean must be for a collapse to be over; ten widths, so that noise at the edge ends none."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Where a run stands.

    Attributes:
        step: steps of the optimiser done.
        steps_per_epoch: of the optimiser.
        total: steps of the whole run.
    """

    step: int
    steps_per_epoch: int
    total: int

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to, from 0."""
        return self.step // self.steps_per_epoch


def learning_rate(clock: Clock, optimiser: Optimiser) -> float:
    """Of the next step.

    `decay` (pretraining): linear warm-up by steps, then lr * decay_rate ** epoch, never below min_lr
    (salesforce/BLIP, utils.py, warmup_lr_schedule and step_lr_schedule). `cosine` (fine-tuning): from lr to min_lr over
    the run (utils.py, cosine_lr_schedule; there once an epoch, here every step), after the warm-up if there is one.
    """
    if clock.step < optimiser.warmup_steps:
        return optimiser.warmup_lr + (optimiser.lr - optimiser.warmup_lr) * clock.step / optimiser.warmup_steps
    if optimiser.schedule == "decay":
        return max(optimiser.min_lr, optimiser.lr * optimiser.decay_rate**clock.epoch)
    done = (clock.step - optimiser.warmup_steps) / max(1, clock.total - optimiser.warmup_steps)
    return optimiser.min_lr + (optimiser.lr - optimiser.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def alpha(clock: Clock, target: float, ramp_epochs: float) -> float:
    """Weight of the twin's opinion before the next step: 0 to `target`, linear over the first `ramp_epochs`.

    BLIP ramps over two epochs (salesforce/BLIP, pretrain.py and models/blip_pretrain.py).
    """
    ramp = ramp_epochs * clock.steps_per_epoch
    return target * min(1.0, clock.step / ramp) if ramp else target


@dataclass
class Watch:
    """Says in words what the losses mean when they go wrong."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=PLATEAU_STEPS))
    warned: bool = False

    def see(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """A warning, once a collapse, if the matching head has collapsed to the prior.

        Raises:
            TrainingError: a loss is not a number.
        """
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"step {step}: {name} is {value}. Training has diverged: lower optimiser.lr, lengthen "
                    "optimiser.warmup_steps, or set optimiser.clip_norm (1.0); the run then resumes from its last state"
                )
        if "itm" not in metrics:
            return None
        self.recent.append(metrics["itm"])
        mean = sum(self.recent) / len(self.recent)
        gap = abs(mean - PRIOR_COLLAPSE)
        if gap > PLATEAU_LEFT:
            self.warned = False
        if self.warned or gap >= PLATEAU_WIDTH or len(self.recent) < PLATEAU_STEPS:
            return None
        self.warned = True
        return (
            f"step {step}: the ITM loss has stood at {mean:.4f} for {PLATEAU_STEPS} steps. {PRIOR_COLLAPSE} is what a "
            "model gets that answers 'one pair in three matches' whatever it sees. If it stays: lower optimiser.lr, "
            "use larger batches, or clean the data"
        )


class Training:
    """Steps an objective.

    Args:
        objective: of capfilt.models.med, on its device; wrapped for several ranks or not.
        inner: the same, not wrapped.
        optimiser: learning rate, schedule, decay, accumulation, clipping.
        autocast: bfloat16 for the forward pass; weights stay float32.
        seed: of dropout and negatives; the same on every rank but for dropout.
        rank: of this process, of so many `ranks`.
    """

    def __init__(
        self,
        objective: Callable[[Batch, float, torch.Generator], Losses],
        inner: CaptionObjective | MatchObjective,
        optimiser: Optimiser,
        *,
        steps_per_epoch: int,
        total: int,
        alpha_target: float,
        alpha_epochs: float,
        autocast: bool,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.objective, self.inner, self.settings = objective, inner, optimiser
        self.parameters = [p for p in inner.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.adam = torch.optim.AdamW(
            self.parameters, lr=optimiser.lr, betas=optimiser.betas, weight_decay=optimiser.weight_decay, fused=True
        )
        self.clock = Clock(0, steps_per_epoch, total)
        self.watch = Watch()
        self._alpha = (alpha_target, alpha_epochs)
        self._autocast, self._seed, self._rank, self._ranks = autocast, seed, rank, ranks

    def run(
        self, batches: Iterable[Batch], log: Callable[[dict[str, float]], None], warn: Callable[[str], None]
    ) -> Iterator[Clock]:
        """Train until the run's last step or the batches end; yields after every step.

        Args:
            batches: `optimiser.accumulate` of them make a step.
            log: called after every step with its metrics.
            warn: called with what a person should know.

        Raises:
            TrainingError: a loss or gradient is not a number.
        """
        self.inner.train()
        rest = iter(batches)
        while self.clock.step < self.clock.total:
            begin = time.perf_counter()
            some = list(itertools.islice(rest, self.settings.accumulate))
            if len(some) < self.settings.accumulate:
                return
            metrics = self._step(some)
            rows = sum(len(batch.ids) for batch in some)
            metrics["samples_per_s"] = rows * self._ranks / (time.perf_counter() - begin)
            log(metrics)
            if said := self.watch.see(self.clock.step, metrics):
                warn(said)
            yield self.clock

    def _step(self, batches: list[Batch]) -> dict[str, float]:
        clock, settings = self.clock, self.settings
        rate = learning_rate(clock, settings)
        for group in self.adam.param_groups:
            group["lr"] = rate
        weight = alpha(clock, *self._alpha)
        # The step's own seeds: a run that resumes draws as one that never stopped.
        noise = torch.Generator().manual_seed(_mixed(self._seed, clock.step))
        torch.manual_seed(_mixed(self._seed + 1, clock.step * self._ranks + self._rank))
        self.inner.follow()
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, 1):
            with self._alone() if number < len(batches) else nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
                    losses: Losses = self.objective(batch, weight, noise)
                torch.autograd.backward(losses.total() / len(batches))
            for name, loss in losses._asdict().items():
                if loss is not None:
                    sums[name] = sums.get(name, torch.zeros((), device=loss.device)) + loss.detach() / len(batches)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, settings.clip_norm, norm)
        means = gathered(torch.stack(list(sums.values()))[None]).mean(0)  # over ranks: all of them see what one sees
        metrics = dict(zip(sums, means.tolist(), strict=True))
        metrics |= {"gradient_norm": float(norm), "learning_rate": rate, "epoch": float(clock.epoch)}
        if (temperature := getattr(self.inner, "temperature", None)) is not None:
            metrics |= {"temperature": float(temperature.detach()), "alpha": weight}
        if math.isfinite(metrics["gradient_norm"]):  # else the weights stay good; the watch ends the run
            self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.clock = Clock(clock.step + 1, clock.steps_per_epoch, clock.total)
        return metrics

    def _alone(self) -> AbstractContextManager[None]:
        """Within it gradients of ranks do not meet; they do once a step, with its last batch."""
        no_sync: Callable[[], AbstractContextManager[None]] = getattr(self.objective, "no_sync", nullcontext)
        return no_sync()

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, but for the batches."""
        return {
            "objective": self.inner.state_dict(),
            "adam": self.adam.state_dict(),
            "step": self.clock.step,
            "recent_itm": list(self.watch.recent),
            "warned": self.watch.warned,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.inner.load_state_dict(state["objective"])
        self.adam.load_state_dict(state["adam"])
        for group in self.adam.param_groups:  # the settings' own: a person may have changed them
            group["weight_decay"] = self.settings.weight_decay
        self.clock = Clock(state["step"], self.clock.steps_per_epoch, self.clock.total)
        self.watch.recent.extend(state["recent_itm"])
        self.watch.warned = state["warned"]


def _mixed(seed: int, number: int) -> int:
    """Another seed for every number."""
    return (seed * 1_000_003 + number) % 2**63
