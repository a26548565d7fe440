from __future__ import annotations

import itertools
import math
import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.solve.paired import (
    bootstrap,
    bootstrap_mean,
    expanded_percentiles,
    mcnemar,
    mean_interval,
    paired_difference,
    paired_shares,
)

F = np.float64


@given(st.integers(0, 8), st.integers(0, 8))
def test_mcnemar_is_the_two_sided_coin(gained: int, lost: int) -> None:
    pairs = gained + lost
    if pairs > 12:
        return
    as_rare = [
        abs(2 * sum(toss) - pairs) >= abs(gained - lost) for toss in product((0, 1), repeat=pairs)
    ]
    assert mcnemar(gained, lost) == pytest.approx(sum(as_rare) / len(as_rare))


def test_nothing_differs_still_has_a_width() -> None:
    found = paired_shares(0, 0, 500)
    z = 1.959964
    assert found.value == 0
    # Tango's interval has this closed form when no pair differs.
    assert found.high == pytest.approx(z**2 / (500 + z**2), rel=1e-5)
    assert found.low == pytest.approx(-found.high)


def test_few_pairs_are_held_to_the_exact_test() -> None:
    assert mcnemar(4, 0) == 0.125
    assert paired_shares(4, 0, 500).low == 0.0
    assert mcnemar(6, 0) < 0.05
    assert paired_shares(6, 0, 500).low > 0
    mirrored = paired_shares(0, 6, 500)
    assert mirrored.high == pytest.approx(-paired_shares(6, 0, 500).low)


def score_statistic(gained: int, lost: int, n: int, d: float) -> float:
    """The score statistic with the restricted maximum-likelihood estimate found by search."""
    grid = np.linspace(max(0.0, -d), (1 - d) / 2, 200_001)[1:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = (
            gained * np.log(grid + d)
            + lost * np.log(grid)
            + (n - gained - lost) * np.log(1 - 2 * grid - d)
        )
    q = grid[np.nanargmax(logs)]
    return float((gained - lost - n * d) / math.sqrt(n * (2 * q + d * (1 - d))))


@pytest.mark.parametrize(("gained", "lost", "n"), [(30, 12, 400), (41, 10, 10_000), (3, 60, 200)])
def test_bounds_are_where_the_score_statistic_is_196(gained: int, lost: int, n: int) -> None:
    found = paired_shares(gained, lost, n)
    assert found.value == (gained - lost) / n
    assert score_statistic(gained, lost, n, found.low) == pytest.approx(1.96, abs=0.01)
    assert score_statistic(gained, lost, n, found.high) == pytest.approx(-1.96, abs=0.01)


@settings(max_examples=60)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(60, 400))
def test_interval_holds_the_value_and_zero_when_not_proven(g: int, c: int, n: int) -> None:
    found = paired_shares(g, c, n)
    assert -1 <= found.low <= found.value <= found.high <= 1
    if mcnemar(g, c) >= 0.05:
        assert found.low <= 0 <= found.high
    other = paired_shares(c, g, n)
    assert other.low == pytest.approx(-found.high, abs=1e-9)


def coverage(draw: object, true: float, runs: int = 400) -> float:
    hits = 0
    for k in range(runs):
        found = draw(np.random.default_rng(k), k)  # type: ignore[operator]
        hits += found.low <= true <= found.high
    return hits / runs


def test_intervals_cover_what_they_promise() -> None:
    def shares(rng: np.random.Generator, k: int) -> object:
        gained, lost, _ = rng.multinomial(800, [0.02, 0.05, 0.93])
        return paired_shares(int(gained), int(lost), 800)

    def means(rng: np.random.Generator, k: int) -> object:
        return bootstrap_mean(rng.exponential(size=60), k)

    assert coverage(shares, -0.03) > 0.92
    assert coverage(means, 1.0) > 0.90


def test_two_kinds_of_paired_difference() -> None:
    right = np.array([1.0, 1, 1, 0] * 100)
    wrong = np.array([1.0, 0, 1, 0] * 100)
    assert paired_difference(right, wrong) == paired_shares(0, 100, 400)
    rng = np.random.default_rng(0)
    before = rng.normal(size=300)
    after = before - 0.1 + 0.01 * rng.normal(size=300)
    found = paired_difference(before, after, seed=1)
    assert found.low < -0.1 < found.high < 0
    assert found.high - found.low < 0.01, "paired: what both share cancels"
    assert paired_difference(before, after, seed=1) == found


def test_few_distinct_values_are_resampled_the_same_way() -> None:
    values = np.repeat([0.0, 0.25, 1.0], [30, 50, 20]).astype(F)
    quick = bootstrap_mean(values, 3)
    slow = bootstrap_mean(values + 1e-9 * np.arange(100), 3)
    assert quick.value == pytest.approx(slow.value, abs=1e-6)
    assert (quick.low, quick.high) == pytest.approx((slow.low, slow.high), abs=0.02)


def test_one_sample_says_nothing() -> None:
    assert bootstrap_mean(np.array([0.5])).low == -math.inf
    assert bootstrap(lambda i: 0.5, 1).high == math.inf
    assert bootstrap(lambda i: math.nan, 9).low == -math.inf


def test_bootstrap_of_a_statistic_agrees_with_that_of_a_mean() -> None:
    values = np.random.default_rng(5).normal(size=200)
    found = bootstrap(lambda i: float(values[i].mean()), 200, 1)
    known = bootstrap_mean(values, 2)
    assert found.value == known.value
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=0.03)


@pytest.mark.parametrize(
    ("count", "resamples"), [(10, 1000), (2000, 1000), (4000, 500), (10**5, 100)]
)
def test_resamples_hang_on_the_samples_alone(
    count: int, resamples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for hours in (0.0, 1.0):  # the clock of a quiet machine, and of one that is busy elsewhere
        ticks = itertools.count(0.0, 3600 * hours)
        monkeypatch.setattr(time, "perf_counter", lambda ticks=ticks: next(ticks))
        calls: list[int] = []

        def statistic(indices: np.ndarray, calls: list[int] = calls) -> float:
            calls.append(1)
            return float(indices[0])

        found.append(bootstrap(statistic, count, 3))
        assert len(calls) == resamples + 1
    assert found[0] == found[1]


def test_wilson_and_percentiles() -> None:
    found = mean_interval(np.array([1.0] * 503 + [0.0]))
    assert (found.low, found.high) == pytest.approx((0.98884, 0.99965), abs=1e-4)
    assert mean_interval(np.ones(20)).high == 1.0
    # Student's t with 9 degrees of freedom is 2.262.
    low, high = expanded_percentiles(10)
    assert low == pytest.approx(0.5 * math.erfc(2.262 * math.sqrt(10 / 9) / math.sqrt(2)), abs=1e-4)
    assert low + high == 1
