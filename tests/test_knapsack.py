"""The choice of options against trying all of them."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.solve.knapsack import knapsack


def brute(errors: list[list[float]], costs: list[list[float]], budget: float) -> float | None:
    every = itertools.product(*(range(len(e)) for e in errors))
    fits = [
        sum(e[k] for e, k in zip(errors, choice, strict=True))
        for choice in every
        if sum(c[k] for c, k in zip(costs, choice, strict=True)) <= budget
    ]
    return min(fits, default=None)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[list[float]], float]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    errors = [[float(draw(st.integers(0, 50))) for _ in range(n)] for n in sizes]
    costs = [[float(draw(st.integers(0, 20))) for _ in range(n)] for n in sizes]
    return errors, costs, float(draw(st.integers(0, 60)))


@given(problems())
@settings(max_examples=200, deadline=None)
def test_equals_trying_all(problem: tuple[list[list[float]], list[list[float]], float]) -> None:
    errors, costs, budget = problem
    room = round(budget - sum(min(c) for c in costs))
    found = knapsack(errors, costs, budget, buckets=max(1, room))  # whole costs: exact
    best = brute(errors, costs, budget)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert sum(c[k] for c, k in zip(costs, found, strict=True)) <= budget
    assert sum(e[k] for e, k in zip(errors, found, strict=True)) == best


def test_any_costs_hold_the_budget_and_come_close() -> None:
    rng = np.random.default_rng(0)
    errors = [sorted(rng.random(4).tolist(), reverse=True) for _ in range(6)]
    costs = [sorted(rng.random(4).tolist()) for _ in range(6)]
    for budget in (1.0, 2.0, 3.0):
        found = knapsack(errors, costs, budget)
        best = brute(errors, costs, budget)
        assert (found is None) == (best is None)
        if found is not None and best is not None:
            assert sum(c[k] for c, k in zip(costs, found, strict=True)) <= budget
            assert sum(e[k] for e, k in zip(errors, found, strict=True)) <= best * 1.02 + 1e-9


def test_nothing_to_choose() -> None:
    assert knapsack([[0.0, 0.0]], [[1.0, 0.0]], 0.0, buckets=1) == [1]
    assert knapsack([], [], 0.0) == []
    assert knapsack([[1.0, 0.0]], [[0.0, 0.0]], 0.0) == [1]
