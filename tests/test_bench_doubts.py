"""Warnings of a bench: what is doubtful, and what to do about it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from effdl.measure.doubts import (
    drift_warnings,
    machine_warnings,
    timing_warnings,
    verdict_warnings,
)
from effdl.measure.rounds import Timing
from effdl.report import BenchResult, Latency

STEADY = Latency(1.0, 1.1, 1.2, 0.9, 1.0, 0.02, 1000)


def result(**changes: object) -> BenchResult:
    plain = BenchResult("m.onnx", "", 1, 1, 5.0, 2.0, 1, STEADY, 1.0, (0.99, 1.01), "same")
    return replace(plain, **changes)  # type: ignore[arg-type]


def timing(*models: list[list[float]]) -> Timing:
    return Timing(levels=[[list(g) for g in m] for m in models])


def test_times_that_vary_or_are_few() -> None:
    shaky = Latency(1.0, 1.9, 3.0, 0.5, 1.2, 0.31, 8)
    said = timing_warnings({"a.onnx": STEADY, "b.onnx": shaky}, {1}, min_runs=5)
    assert all(s.startswith("b.onnx") and "seconds" in s for s in said)
    assert [("±31%" in s, "8 runs" in s, "warm-up" in s) for s in said] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert timing_warnings({"a.onnx": STEADY}, set(), min_runs=5) == []


def test_a_busy_machine_and_too_many_threads() -> None:
    assert machine_warnings(1, 4, 0.3) == []
    assert machine_warnings(1, 4, None) == []
    assert "share 4 cores" in machine_warnings(8, 4, 0.0)[0]
    assert "close them" in machine_warnings(1, 2, 1.8)[0]
    assert "fewer than 4 threads" in machine_warnings(0, 4, 2.0)[0]


def test_a_verdict_that_is_none() -> None:
    noisy = result(verdict="noisy", ci=(0.9, 1.2))
    said = verdict_warnings(["a", "b"], [result(verdict="reference"), noisy], 4)
    assert len(said) == 1
    assert "b: the interval [0.90, 1.20] is too wide" in said[0]


def test_a_slow_first_run_is_told_with_how_slow() -> None:
    said = verdict_warnings(["a"], [result(first_ms=80.0)], 4)
    assert "80 ms, 80 times the median" in said[0]
    assert verdict_warnings(["a"], [result(first_ms=9.0)], 4) == []
    # A small model's first run is always slow, and nobody minds.
    assert verdict_warnings(["a"], [result(first_ms=30.0)], 4) == []


def test_a_single_process_of_each_is_told() -> None:
    two = [result(verdict="reference"), result()]
    assert "loaded once only" in verdict_warnings(["a", "b"], two, 1)[0]
    assert verdict_warnings(["a", "b"], two, 2) == []
    assert verdict_warnings(["a"], two[:1], 1) == []


def test_a_machine_that_slows_down() -> None:
    base = [list(np.linspace(1.0, 1.1, 10)), list(np.linspace(1.1, 1.3, 10))]
    said = drift_warnings(["a", "b"], timing(base, base))
    assert len(said) == 1
    assert "% slower during the run" in said[0]
    back = [g[::-1] for g in base[::-1]]
    assert "% faster" in drift_warnings(["a", "b"], timing(back, back))[0]
    steady = [[1.0] * 10, [1.0] * 10]
    assert drift_warnings(["a", "b"], timing(steady, steady)) == []


def test_a_model_that_changes_within_its_process() -> None:
    base = [[1.0] * 8, [1.0] * 8, [1.0] * 8]
    warming = [[1.2] * 4 + [1.1] * 4] * 3
    said = drift_warnings(["a", "b"], timing(base, warming))
    assert said == ["b: its ratio moves by 9% within each process; measure longer (seconds)"]
    both_ways = [[1.2] * 4 + [1.1] * 4, [1.1] * 4 + [1.2] * 4, [1.1] * 8]
    assert drift_warnings(["a", "b"], timing(base, both_ways)) == []
