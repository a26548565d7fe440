"""Who computes when: generations of fresh processes, in each rounds of short blocks in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from effdl.measure import verdict

Progress = Callable[[str, float], None]
MAX_GENERATIONS = 8
ENOUGH_GENERATIONS = 3
"""Fewer than these never end a measurement early."""
ENOUGH_ROUNDS = 12
_MIN_ROUNDS = 4
_BLOCK_MS = (10.0, 100.0)
_LIMIT_SHARE = 1 / 3
_IMPROVING = 0.98
_WARM_BLOCKS = 5
_SECOND = 3.0


class Worker(Protocol):
    """What ``take_turns`` needs of a worker."""

    def block(
        self, *, runs: int = 0, min_ms: float = 0.0, start: int = 0, cpu: int | None = None
    ) -> tuple[list[int], int | None]:
        """Return times of single inferences in ns, and the processor they ran on."""


Start = Callable[[int], AbstractContextManager[Sequence[Worker]]]
"""Starts the workers of a generation, given its number; always as many."""


@dataclass
class Timing:
    """Times as they came.

    Args:
        blocks: per model, generation and round the times of single inferences in ns.
        levels: the same with each block as one number, see ``verdict.block_time``.
        unsettled: models (by number) whose times still fell when a warm-up had to end.
        planned: generations that the time allowed.
    """

    blocks: list[list[list[list[int]]]] = field(default_factory=list)
    levels: list[list[list[float]]] = field(default_factory=list)
    unsettled: set[int] = field(default_factory=set)
    planned: int = 1

    @property
    def generations(self) -> int:
        """Generations that were measured."""
        return len(self.levels[0]) if self.levels else 0

    @property
    def rounds(self) -> int:
        """Rounds of all generations together."""
        return sum(map(len, self.levels[0])) if self.levels else 0

    def runs(self, model: int) -> list[int]:
        """Return the times of all inferences of a model in ns."""
        return [t for generation in self.blocks[model] for block in generation for t in block]

    def open(self, models: int) -> None:
        """Begin a generation."""
        if not self.blocks:
            self.blocks = [[] for _ in range(models)]
            self.levels = [[] for _ in range(models)]
        for k in range(models):
            self.blocks[k].append([])
            self.levels[k].append([])

    def add(self, model: int, times: list[int]) -> None:
        """Add a block to the generation that was begun last."""
        self.blocks[model][-1].append(times)
        self.levels[model][-1].append(verdict.block_time(times))


@dataclass(frozen=True)
class Plan:
    """How long and how often.

    Args:
        seconds: measuring time of all workers together; starting and warming up not counted.
        min_runs: the least number of runs per worker, whatever the time.
        seed: of the order.
        generations: how many, None for as many as starting them is worth.
        same_work: all feeds have the same shapes. If not, every worker runs the same feeds in a
            round, so that block times can be compared.
        same_cpu: within a round all workers run on the processor that the first one was given. Of
            two processors one may be slower for seconds, by what a neighbour of the machine does.
        enough: looks at the times after each generation and says whether they are exact enough.
        clock: seconds.
    """

    seconds: float
    min_runs: int = 5
    seed: int = 0
    generations: int | None = None
    same_work: bool = True
    same_cpu: bool = False
    enough: Callable[[Timing], bool] = lambda timing: False
    clock: Callable[[], float] = time.perf_counter


def take_turns(start: Start, plan: Plan, progress: Progress | None = None) -> Timing:
    """Measure in generations of fresh workers until it is exact enough or the time is spent.

    In every generation each worker is warmed up; then they take blocks in turns, in an order that
    alternates from round to round. Only one computes at a time. There are as many generations as can
    be started in the time that is measured, so that a model that loads slowly is loaded once only.

    Args:
        start: gives the workers of a generation.
        plan: see there.
        progress: called with ``warm-up`` or ``measure`` and the done fraction.
    """
    say = progress or (lambda stage, fraction: None)
    clock, timing, spent = plan.clock, Timing(), 0.0
    orders: Iterator[list[int]] | None = None
    runs: list[int] = []
    while True:
        opened = clock()
        with start(timing.generations) as workers:
            pace = _warm_up_all(workers, plan, timing, say)
            orders = orders or _orders(len(workers), np.random.default_rng(plan.seed))
            if not runs:
                runs = pace.runs(plan.same_work)
                round_s = sum(r * ms for r, ms in zip(runs, pace.run_ms, strict=True)) / 1e3
                timing.planned = plan.generations or _affordable(
                    plan.seconds, clock() - opened, round_s
                )
            left = timing.planned - timing.generations
            share = max(plan.seconds - spent, 0.0) / left
            least = -(-(plan.min_runs - _runs_so_far(timing)) // (min(runs) * left))
            begin, timed = clock(), spent
            for _ in _generation(workers, runs, orders, timing, plan, max(_MIN_ROUNDS, least)):
                passed = clock() - begin
                spent = timed + passed
                say("measure", min(1.0, spent / plan.seconds))
                if passed >= share:
                    break
        if timing.generations >= timing.planned:
            return timing
        exact = timing.generations >= ENOUGH_GENERATIONS and timing.rounds >= ENOUGH_ROUNDS
        if plan.generations is None and exact and plan.enough(timing):
            return timing


def _generation(
    workers: Sequence[Worker],
    runs: Sequence[int],
    orders: Iterator[list[int]],
    timing: Timing,
    plan: Plan,
    least: int,
) -> Iterator[None]:
    """Take one round after the other; yields where it is right to stop, after an even number."""
    timing.open(len(workers))
    first, done = timing.rounds, 0
    while True:
        cpu: int | None = None
        for k in next(orders):
            times, at = workers[k].block(runs=runs[k], start=(first + done) * runs[k], cpu=cpu)
            timing.add(k, times)
            cpu = at if plan.same_cpu else None
        done += 1
        if done >= least and done % 2 == 0:
            yield


def _runs_so_far(timing: Timing) -> int:
    return min((len(timing.runs(k)) for k in range(len(timing.blocks))), default=0)


def _affordable(seconds: float, overhead: float, round_s: float) -> int:
    """As many generations as take no longer to start than to measure, each of some rounds.

    A second one may take longer: a single one knows nothing of what differs between processes.
    """
    started = 1 + int(seconds / max(overhead, 1e-3))
    if started == 1 and overhead < _SECOND * seconds:
        started = 2
    filled = int(seconds / max(round_s, 1e-6) / _MIN_ROUNDS)
    return max(1, min(started, filled, MAX_GENERATIONS))


@dataclass
class _Pace:
    """What warm-up found: ms per run of each worker, and ms that asking costs beyond the runs."""

    run_ms: list[float] = field(default_factory=list)
    asking_ms: float = float("inf")

    def runs(self, same_work: bool) -> list[int]:
        """Return runs per block: short blocks, but long against the way to the worker and back."""
        low, high = _BLOCK_MS
        block_ms = min(max(4 * self.asking_ms, low), high)
        times = self.run_ms if same_work else [max(self.run_ms)] * len(self.run_ms)
        return [max(1, round(block_ms / ms)) for ms in times]


def _warm_up_all(workers: Sequence[Worker], plan: Plan, timing: Timing, say: Progress) -> _Pace:
    pace = _Pace()
    limit = plan.seconds * _LIMIT_SHARE / len(workers)
    for k, worker in enumerate(workers):
        say("warm-up", k / len(workers))
        ms, asking, settled = _warm_up(worker, limit, plan.clock)
        pace.run_ms.append(ms)
        pace.asking_ms = min(pace.asking_ms, asking)
        if not settled:
            timing.unsettled.add(k)
    return pace


def _warm_up(worker: Worker, limit: float, clock: Callable[[], float]) -> tuple[float, float, bool]:
    """Run until two blocks in succession are no faster than the best before, or the time is over.

    Returns:
        ms per run, ms that asking costs, and whether it settled.
    """
    begin = clock()
    seen: list[float] = []
    asking = float("inf")
    while True:
        asked = clock()
        times = worker.block(min_ms=_BLOCK_MS[0])[0]
        asking = min(asking, max((clock() - asked) * 1e3 - sum(times) / 1e6, 0.0))
        seen.append(max(verdict.block_time(times) / 1e6, 1e-6))
        last = float(np.median(seen[-3:]))
        if len(seen) >= _WARM_BLOCKS and min(seen[-2:]) >= _IMPROVING * min(seen[:-2]):
            return last, asking, True
        if clock() - begin >= limit:
            return last, asking, len(seen) < 3 or seen[-1] >= _IMPROVING**2 * seen[-2]


def _orders(count: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Yield orders of ``count`` models; every second one is the reverse of the one before (ABBA)."""
    order = [int(k) for k in rng.permutation(count)]
    while True:
        yield order
        yield order[::-1]
        if count > 2:
            order = [int(k) for k in rng.permutation(count)]
