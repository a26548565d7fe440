"""Who computes when: turns, generations, warm-up, and when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from effdl.measure import rounds
from effdl.measure.rounds import MAX_GENERATIONS, Plan, Timing, take_turns
from tests.bench_lab import Clock, FakeWorker, Lab, Machine


def lab(*ms: float, seed: int = 0, start_s: float = 0.1, **machine: float) -> Lab:
    return Lab(Machine(Clock(), seed, **machine), ms, [0.0] * len(ms), start_s)


def run(room: Lab, **plan: object) -> Timing:
    return take_turns(room.start, Plan(clock=room.machine.clock, **plan))  # type: ignore[arg-type]


def test_blocks_alternate_and_only_one_worker_computes() -> None:
    room = lab(2.0, 3.0)
    timing = run(room, seconds=1.0, generations=1)
    assert timing.rounds == len(timing.blocks[1][0])
    assert timing.rounds % 2 == 0
    timed = sorted(
        (t, k) for k, w in enumerate(room.workers[0]) for t, runs, _ in w.calls if runs
    )  # after warm-up
    order = [k for _, k in timed]
    assert order in (
        [0, 1, 1, 0] * (timing.rounds // 2),
        [1, 0, 0, 1] * (timing.rounds // 2),
    )
    assert len({t for t, _ in timed}) == len(timed)


def test_a_round_stays_on_the_processor_it_began_on() -> None:
    room = lab(2.0, 3.0)
    timing = run(room, seconds=1.0, same_cpu=True, generations=1)
    given = [w.cpus[-timing.rounds :] for w in room.workers[0]]
    assert all((a is None) != (b is None) for a, b in zip(*given, strict=True))
    assert given[0].count(None) == given[1].count(None) == timing.rounds // 2


def test_every_place_comes_equally_often_with_three_models() -> None:
    orders = rounds._orders(3, np.random.default_rng(0))
    taken = [next(orders) for _ in range(200)]
    assert all(sorted(o) == [0, 1, 2] for o in taken)
    assert all(b == a[::-1] for a, b in zip(taken[::2], taken[1::2], strict=True))
    assert len({tuple(o) for o in taken}) == 6


class Slowing(Lab):
    """Workers that get faster with every block, or start cold."""

    warm = 0
    factor = 1.0

    @contextmanager
    def start(self, generation: int) -> Iterator[list[FakeWorker]]:
        with super().start(generation) as workers:
            for worker in workers:
                worker.warm = self.warm
                self._change(worker)
            yield workers

    def _change(self, worker: FakeWorker) -> None:
        block = worker.block

        def changing(**options: int) -> tuple[list[int], int | None]:
            worker.ms *= self.factor if len(worker.calls) < 40 else 1.0
            return block(**options)  # type: ignore[arg-type]

        worker.block = changing  # type: ignore[method-assign, assignment]


def test_warm_up_is_dropped_in_every_generation() -> None:
    room = Slowing(Machine(Clock(), 0, noise=0.001), [2.0, 2.0], [0.0, 0.0])
    room.warm = 15
    timing = run(room, seconds=4.0)
    assert timing.generations > 2
    assert np.percentile([t / 1e6 for t in timing.runs(0)], 95) < 2.2
    assert not timing.unsettled


def test_a_warm_up_that_does_not_end_is_reported() -> None:
    room = Slowing(Machine(Clock(), 0, noise=0.001), [5.0], [0.0])
    room.factor = 0.9
    assert run(room, seconds=0.3, min_runs=1).unsettled == {0}


def test_a_slow_model_gets_its_runs_and_no_more() -> None:
    timing = run(lab(1000.0, 1500.0), seconds=2.0, min_runs=5)
    assert timing.generations == 1
    assert [len(timing.runs(k)) for k in (0, 1)] == [6, 6]


def test_feeds_of_different_shapes_are_run_by_all_alike() -> None:
    room = lab(0.5, 5.0)
    run(room, seconds=1.0, same_work=False)
    for workers in room.workers:
        done = [[(runs, start) for _, runs, start in w.calls if runs] for w in workers]
        assert done[0] == done[1]


def test_feeds_go_on_where_the_last_generation_ended() -> None:
    room = lab(2.0, 2.0)
    timing = run(room, seconds=4.0)
    assert timing.generations > 1
    starts = [s for workers in room.workers for _, runs, s in workers[0].calls if runs]
    per_block = len(timing.blocks[0][0][0])
    assert starts == [k * per_block for k in range(timing.rounds)]


@pytest.mark.parametrize(
    ("start_s", "expected"),
    [(0.01, MAX_GENERATIONS), (0.3, 6), (1.0, 2), (5.0, 2), (20.0, 1)],
)
def test_there_are_as_many_generations_as_starting_is_worth(start_s: float, expected: int) -> None:
    """Starting takes no longer than measuring, but for a second generation, which is worth more."""
    timing = run(lab(2.0, 2.0, start_s=start_s), seconds=4.0)
    assert timing.generations == timing.planned == expected


def test_generations_can_be_asked_for() -> None:
    timing = run(lab(2.0, 2.0), seconds=1.0, generations=3, enough=lambda timing: True)
    assert timing.generations == 3
    assert all(len(g) >= 4 and len(g) % 2 == 0 for g in timing.levels[0])


def test_it_ends_when_enough_is_known_but_not_before_three_generations() -> None:
    asked: list[int] = []

    def enough(timing: Timing) -> bool:
        asked.append(timing.generations)
        return timing.generations >= 4

    timing = run(lab(2.0, 2.0), seconds=8.0, enough=enough)
    assert timing.generations == 4
    assert asked == [3, 4]


def test_the_time_is_spent_and_not_much_more() -> None:
    room = lab(2.0, 3.0, start_s=0.05)
    run(room, seconds=6.0)
    measured = sum(
        runs * w.ms / 1e3 for workers in room.workers for w in workers for _, runs, _ in w.calls
    )
    assert 5.0 < measured < 7.0
    assert room.machine.clock.now < 10.0


def test_blocks_are_long_against_the_way_to_the_worker() -> None:
    near, far = lab(1.0, 1.0), lab(1.0, 1.0)
    runs = len(run(near, seconds=2.0).blocks[0][0][0])

    @contextmanager
    def start(generation: int) -> Iterator[list[FakeWorker]]:
        with far.start(generation) as workers:
            for worker in workers:
                worker.asking = 0.015
            yield workers

    timing = take_turns(start, Plan(2.0, clock=far.machine.clock))
    assert runs == pytest.approx(10, abs=1)
    assert len(timing.blocks[0][0][0]) == pytest.approx(60, abs=6)


def test_progress_goes_up_to_one() -> None:
    said: list[tuple[str, float]] = []
    room = lab(2.0, 2.0)
    plan = Plan(2.0, clock=room.machine.clock)
    take_turns(room.start, plan, lambda stage, share: said.append((stage, share)))
    measured = [share for stage, share in said if stage == "measure"]
    assert measured == sorted(measured)
    assert measured[-1] == 1.0
    assert {stage for stage, _ in said} == {"warm-up", "measure"}
