"""One rank of a training run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from capfilt.errors import SpecError
from capfilt.models.feed import Feed, Place
from capfilt.models.med import Batch
from capfilt.models.train import Training
from capfilt.models.trainee import Trainee, trainee, write_checkpoints
from capfilt.pipelines.rows import Data, rank_rows
from capfilt.pipelines.run_files import Log, States
from capfilt.spec import TrainSpec

_Standing = tuple[int, int, dict[str, int]]
"""A rank's epoch, row, and rows passed over by reason."""


@dataclass(frozen=True)
class Task:
    """A training run.

    Attributes:
        steps_per_epoch, total: of the optimiser.
    """

    spec: TrainSpec
    data: Data
    steps_per_epoch: int
    total: int


def train_here(task: Task) -> None:
    """Be a rank of the run: the only one, or one of torch.distributed's, from the newest state to the last step.

    Raises:
        CapfiltError: as :func:`capfilt.pipelines.train.train`.
    """
    spec = task.spec
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = _device(spec)
    with _threads(max(1, int(spec.workers.cpus))):
        trained = trainee(spec, device)
        training = _training(task, trained, rank, ranks)
        states = States(Path(spec.output))
        place, passed_over = _restore(training, states, rank)
        _run(task, training, trained, states, place, passed_over, rank, ranks)
        if rank == 0:
            write_checkpoints(spec, trained)


def _restore(training: Training, states: States, rank: int) -> tuple[Place, Counter[str]]:
    """Go on from the newest state, if there is one: where this rank stands in its data, and what it passed over."""
    newest = of_first_rank(states.newest())
    if newest is None:
        return Place(0, 0), Counter()
    state = states.read(newest)
    training.restore(state)
    epoch, row, passed_over = state["ranks"][rank]
    return Place(epoch, row), Counter(passed_over)


def of_first_rank(value: Any) -> Any:
    """Rank 0's value, on every rank: what a shared disk shows may differ between machines for a while."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _training(task: Task, trained: Trainee, rank: int, ranks: int) -> Training:
    spec = task.spec
    wrapped: Any = trained.objective
    if ranks > 1:
        wrapped = DistributedDataParallel(trained.objective, broadcast_buffers=False)
    return Training(
        wrapped,
        trained.objective,
        spec.optimiser,
        steps_per_epoch=task.steps_per_epoch,
        total=task.total,
        alpha_target=trained.contrast.alpha,
        alpha_epochs=trained.contrast.alpha_epochs,
        autocast=spec.bfloat16,
        seed=spec.seed,
        rank=rank,
        ranks=ranks,
    )


def _run(
    task: Task,
    training: Training,
    trained: Trainee,
    states: States,
    place: Place,
    passed_over: Counter[str],
    rank: int,
    ranks: int,
) -> None:
    spec, begun = task.spec, training.clock.step
    left = (task.total - begun) * spec.optimiser.accumulate * spec.batch_size
    feed = Feed(
        trained.texts,
        spec.image_size,
        spec.batch_size,
        random_views=spec.augment,
        seed=spec.seed,
        limits=spec.images,
        threads=max(1, int(spec.workers.cpus)),
        device=training.device,
    )
    feed.passed_over.update(passed_over)
    here = place

    def batches(rows: Any) -> Generator[Batch, None, None]:
        nonlocal here
        for batch, behind in feed.batches(rows):
            here = behind
            yield batch

    log = Log(Path(spec.output), begun) if rank == 0 else None

    def write(metrics: dict[str, float]) -> None:
        if log:
            log.write(training.clock.step, {**metrics, "passed_over": feed.passed_over.total()})

    def warn(message: str) -> None:
        if log:
            log.warn(training.clock.step, message)

    try:
        with closing(rank_rows(task.data, rank, ranks, place, left)) as rows, closing(batches(rows)) as some:
            for clock in training.run(some, write, warn):
                if clock.step % spec.state_steps == 0 and clock.step < task.total:
                    every = _of_all_ranks((here.epoch, here.row, dict(feed.passed_over)), ranks)
                    if rank == 0:
                        states.write(clock.step, {**training.state(), "ranks": every})
            if feed.passed_over:
                found = ", ".join(f"{reason} {rows:,}" for reason, rows in feed.passed_over.most_common())
                warn(f"rows of rank {rank} that could not be used and were passed over: {found}")
    finally:
        if log:
            log.close()


def _of_all_ranks(own: _Standing, ranks: int) -> list[_Standing]:
    if ranks == 1:
        return [own]
    every = [own] * ranks
    dist.all_gather_object(every, own)
    return every


def _device(spec: TrainSpec) -> torch.device:
    if not spec.workers.gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SpecError("workers.gpus: this process sees no CUDA device; set it to 0, or go where there is one")
    import ray.train.torch

    device: torch.device = ray.train.torch.get_device() if dist.is_initialized() else torch.device("cuda")
    return device


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
