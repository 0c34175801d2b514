"""Where a run's time went: how busy the models were, and what held them up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

BUSY = 0.9
"""Models that were busy for so much of the time are what the run waited for."""

WAITED_FOR = {"read": "reading the input", "wait": "decoding", "write": "writing the output"}
"""Stages in which a worker's call is not on the models, and what they wait for."""

FRAGMENTS = "fragments to work on"
MODELS = "the models"


@dataclass
class Throughput:
    """Sums over the workers of a run.

    Attributes:
        seconds: by stage. `model` is on the models, `decode` in the decoding threads; `read`, `wait` and `write` are
            those of the worker's calls, of which one may be on the models meanwhile.
        spans: for each worker, when its first batch met the models and its last one left them, in seconds of a clock
            that no one sets.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    _between: float = 0.0  # sum of the spans, kept as they grow: a run asks after every fragment

    def add(self, worker: str, seconds: Mapping[str, float], span: tuple[float, float] | None) -> None:
        """Add a fragment."""
        for stage, spent in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
        if span is not None:
            begin, end = span
            first, last = self.spans.get(worker, (begin, begin))
            self.spans[worker] = min(first, begin), max(last, end)
            self._between += self.spans[worker][1] - self.spans[worker][0] - (last - first)

    @property
    def busy(self) -> float | None:
        """Of the time between each worker's first and last batch, the part in which its models computed; in [0, 1].

        None where nothing met the models.
        """
        return min(1.0, self.seconds.get("model", 0.0) / self._between) if self._between > 0 else None

    def device_seconds(self, gpus: float, cpus: float) -> dict[str, float]:
        """What the run's workers cost: each device's seconds from its worker's first batch to its last (`held`), and
        those of them in which its models computed (`busy`). Loading models, and Ray's own start, are not in it.

        Args:
            gpus, cpus: of a worker.
        """
        spent = {"held": self._between, "busy": min(self.seconds.get("model", 0.0), self._between)}
        devices = {"gpu": gpus, "cpu": cpus}
        return {f"{name}_{how}": round(n * s, 3) for name, n in devices.items() for how, s in spent.items()}

    @property
    def bottleneck(self) -> str | None:
        """What more of would have made the run faster. None where nothing met the models.

        The models where they were busy; else the stage that their workers' calls spent the most time in; else, where
        all of these account for less than half of the models' idle time, fragments: Ray or the driver was late.
        """
        if self.busy is None:
            return None
        if self.busy >= BUSY:
            return MODELS
        idle = self._between - self.seconds.get("model", 0.0)
        waits = {stage: self.seconds.get(stage, 0.0) for stage in WAITED_FOR}
        if sum(waits.values()) < idle / 2:
            return FRAGMENTS
        return WAITED_FOR[max(waits, key=waits.__getitem__)]
