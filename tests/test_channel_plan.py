"""How many channels each group keeps, against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from effdl.solve.channel_plan import Choice, Cost, plan, thresholded, uniform


def problem(seed: int, groups: int = 4) -> tuple[list[Choice], Cost]:
    """A chain of layers, each as costly as its inputs times its outputs."""
    rng = np.random.default_rng(seed)
    choices = []
    for _ in range(groups):
        kept = np.arange(48, 8, -8)
        errors = np.concatenate([[0.0], np.cumsum(np.sort(rng.random(len(kept) - 1)))])
        choices.append(Choice(kept, errors * rng.uniform(0.1, 3)))
    share = np.zeros((groups + 1, 2, groups))
    fixed = np.zeros((groups + 1, 2))
    for layer in range(groups + 1):
        for side, group in enumerate((layer - 1, layer)):
            if 0 <= group < groups:
                share[layer, side, group] = 1 / 48
            else:
                fixed[layer, side] = 1.0
    return choices, Cost(rng.uniform(1, 5, groups + 1), fixed, share, 0.5)


def cost_of(choices: list[Choice], cost: Cost, at: list[int]) -> float:
    return cost.of(np.array([c.kept[a] for c, a in zip(choices, at, strict=True)], np.float64))


def error_of(choices: list[Choice], at: list[int]) -> float:
    return sum(float(c.errors[a]) for c, a in zip(choices, at, strict=True))


@pytest.mark.parametrize("share", [0.8, 0.5, 0.25])
@pytest.mark.parametrize("seed", range(6))
def test_close_to_the_best_of_all(seed: int, share: float) -> None:
    choices, cost = problem(seed)
    budget = share * cost_of(choices, cost, [0] * 4)
    found = plan(choices, cost, budget)
    assert found is not None
    assert cost_of(choices, cost, found) <= budget
    every = itertools.product(*(range(len(c.kept)) for c in choices))
    fits = [error_of(choices, list(a)) for a in every if cost_of(choices, cost, list(a)) <= budget]
    assert error_of(choices, found) <= 1.1 * min(fits) + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_uniform_and_global_hold_the_budget_and_are_no_better(seed: int) -> None:
    choices, cost = problem(seed)
    budget = 0.5 * cost_of(choices, cost, [0] * 4)
    best = plan(choices, cost, budget)
    assert best is not None
    traces = [np.linspace(0, c.errors[-1], 49) for c in choices]
    for found in (uniform(choices, cost, budget), thresholded(choices, traces, cost, budget)):
        assert found is not None
        assert cost_of(choices, cost, found) <= budget
        assert error_of(choices, found) >= error_of(choices, best) - 1e-9


def test_uniform_keeps_about_the_same_share_of_each() -> None:
    choices, cost = problem(0)
    found = uniform(choices, cost, 0.5 * cost_of(choices, cost, [0] * 4))
    assert found is not None
    assert max(found) - min(found) <= 1


def test_out_of_reach() -> None:
    choices, cost = problem(0)
    assert plan(choices, cost, 0.4) is None
    assert uniform(choices, cost, 0.4) is None


def test_nothing_to_remove() -> None:
    choices, cost = problem(1)
    assert plan(choices, cost, 2 * cost_of(choices, cost, [0] * 4)) == [0] * 4
