"""A machine that is not there: workers whose processes differ, on a machine that drifts and stutters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from effdl.measure import verdict
from effdl.measure.rounds import Plan, Timing, take_turns


class Clock:
    """Time that passes only while a worker computes or starts."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Machine:
    """What disturbs every worker alike.

    Args:
        drift: the growth of all times per second.
        noise: spread of one inference; ``spikes`` the share of them that takes five times as long.
        waves: spread of a disturbance that lasts some blocks, one of its own for each worker.
    """

    clock: Clock
    seed: int
    drift: float = 0.0
    noise: float = 0.02
    spikes: float = 0.02
    waves: float = 0.0
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)


class FakeWorker:
    """A process of a model; ``warm`` inferences are three times as slow at first."""

    def __init__(self, machine: Machine, ms: float, *, warm: int = 0, asking: float = 0.0) -> None:
        self.machine, self.ms, self.warm, self.asking = machine, ms, warm, asking
        self.wave = 0.0
        self.runs = 0
        self.calls: list[tuple[float, int, int]] = []
        self.cpus: list[int | None] = []

    def block(
        self, *, runs: int = 0, min_ms: float = 0.0, start: int = 0, cpu: int | None = None
    ) -> tuple[list[int], int | None]:
        machine = self.machine
        self.cpus.append(cpu)
        self.calls.append((machine.clock.now, runs, start))
        count = runs or max(1, int(min_ms / self.ms))
        times = self.ms * machine.rng.lognormal(0.0, machine.noise, count)
        if machine.waves:
            self.wave = 0.5 * self.wave + machine.rng.normal(0, machine.waves * np.sqrt(0.75))
        times *= np.exp(self.wave) * (1 + machine.drift * machine.clock.now)
        times[: max(self.warm - self.runs, 0)] *= 3
        times[machine.rng.random(count) < machine.spikes] *= 5
        self.runs += count
        machine.clock.now += float(times.sum()) / 1e3 + self.asking
        return [int(t * 1e6) for t in times], len(self.calls) % 3


@dataclass
class Lab:
    """Starts generations of workers.

    Args:
        ms: time of an inference of each model; ``process`` how much processes of each differ, as a
            spread of the logarithm.
        start_s: what starting one worker takes.
    """

    machine: Machine
    ms: Sequence[float]
    process: Sequence[float]
    start_s: float = 0.1
    workers: list[list[FakeWorker]] = field(default_factory=list)

    @contextmanager
    def start(self, generation: int) -> Iterator[list[FakeWorker]]:
        assert generation == len(self.workers)
        self.machine.clock.now += self.start_s * len(self.ms)
        shift = self.machine.rng.normal(0.0, self.process)
        workers = [
            FakeWorker(self.machine, m * float(np.exp(s)))
            for m, s in zip(self.ms, shift, strict=True)
        ]
        self.workers.append(workers)
        yield workers


@dataclass(frozen=True)
class Outcome:
    """What a simulated bench of a base and a candidate came to."""

    word: str
    comparison: verdict.Comparison
    timing: Timing


def bench_ab(
    true_ratio: float,
    seed: int,
    *,
    process: float = 0.007,
    others: float | None = None,
    control: bool = True,
    seconds: float = 2.0,
    ms: float = 2.0,
    min_effect: float = verdict.MIN_EFFECT,
    start_s: float = 0.1,
    **machine: float,
) -> Outcome:
    """Simulate a bench of a model of ``ms`` against one that is ``true_ratio`` times as fast.

    Args:
        process: spread between processes of the base; ``others`` of the candidate, when different.
        seconds: of measuring per model.
    """
    clock = Clock()
    room = Machine(clock, seed, **machine)
    count = 3 if control else 2
    spreads = [process] * count
    spreads[1] = process if others is None else others
    lab = Lab(room, [ms, ms / true_ratio, ms][:count], spreads, start_s)

    def compare(timing: Timing) -> verdict.Comparison:
        twin = timing.levels[2] if control else None
        return verdict.compare(timing.levels[0], timing.levels[1], twin, seed)

    def enough(timing: Timing) -> bool:
        return compare(timing).ratio.half_width <= np.log1p(min_effect) / 2

    timing = take_turns(lab.start, Plan(2 * seconds, seed=seed, enough=enough, clock=clock))
    found = compare(timing)
    floor = max(min_effect, found.noise)
    return Outcome(verdict.judge(found.ratio, floor, min_effect), found, timing)
