"""solve/two_forms.py against trying everything."""

import itertools
import math

import numpy as np
import pytest

from effdl.solve.two_forms import Flow, Loss, Problem, cheapest, within


def random_problem(seed: int, parts: int = 7) -> Problem:
    rng = np.random.default_rng(seed)
    first = [float(c) for c in rng.integers(1, 20, parts)]
    second = [None if rng.random() < 0.15 else float(c) for c in rng.integers(1, 20, parts)]
    flows = []
    for k in range(-1, parts - 1):
        readers = [r for r in range(k + 1, parts) if rng.random() < 0.4]
        if readers:
            into, back = (float(c) for c in rng.integers(0, 9, 2))
            flows.append(Flow(None if k < 0 else k, tuple(readers), into, back))
    losses = [
        Loss(
            tuple(int(p) for p in rng.choice(parts, rng.integers(1, 3), replace=False)),
            float(rng.integers(1, 10)),
        )
        for _ in range(6)
    ]
    return Problem(first, second, flows, losses)


def choices(problem: Problem) -> list[list[bool]]:
    return [list(c) for c in itertools.product((False, True), repeat=len(problem.first))]


@pytest.mark.parametrize("seed", range(40))
def test_the_cheapest_choice_is_that_of_trying_all(seed: int) -> None:
    problem = random_problem(seed)
    for price in (0.0, 0.7, 3.0):

        def total(choice: list[bool], price: float = price) -> float:
            return problem.cost(choice) + price * problem.lost(choice)

        best = min(total(c) for c in choices(problem))
        assert total(cheapest(problem, price)) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(40))
def test_a_limit_is_kept_and_the_cost_is_near_the_least(seed: int) -> None:
    problem = random_problem(seed)
    everything = [s is not None for s in problem.second]
    for share in (0.0, 0.3, 0.6, 1.0):
        limit = share * problem.lost(everything)
        found = within(problem, limit)
        assert problem.lost(found) <= limit
        allowed = [problem.cost(c) for c in choices(problem) if problem.lost(c) <= limit]
        worst = problem.cost([False] * len(problem.first))
        assert problem.cost(found) <= worst
        # what a price cannot reach is small: a third of what there is to gain at the most
        assert problem.cost(found) - min(allowed) <= max(worst - min(allowed), 0) / 3 + 1e-9


def test_an_island_must_pay_for_its_border() -> None:
    chain = (Flow(0, (1,), 3.0, 3.0), Flow(1, (2,), 3.0, 3.0))
    assert cheapest(Problem([1, 9, 1], [None, 4, None], chain)) == [False, False, False]
    assert cheapest(Problem([1, 11, 1], [None, 4, None], chain)) == [False, True, False]
    # what would stay float between two that gain goes along, though it loses
    assert cheapest(Problem([9, 1, 9], [4, 2, 4], chain)) == [True, True, True]


def test_what_has_no_second_form_costs_infinitely_in_it() -> None:
    assert math.isinf(Problem([1.0], [None], ()).cost([True]))
    assert cheapest(Problem([5.0], [None], ())) == [False]
    assert within(Problem([5.0], [1.0], (), [Loss((0,), 2.0)]), 1.0) == [False]
    assert within(Problem([5.0], [1.0], (), [Loss((0,), 2.0)]), 2.0) == [True]
