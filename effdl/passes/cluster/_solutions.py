"""Codebooks for one weight: one solution, or a ladder of them from accurate to small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from effdl.observe.drift import Drift
from effdl.observe.moments import Moments
from effdl.solve import codebooks as solve
from effdl.solve.refit import towards

Doubles = npt.NDArray[np.float64]
_RUNGS = (2.0, 8.0, 20.0, 50.0, 125.0, 300.0, 800.0, 2000.0)
"""Prices of a bit, in errors of a weight at the most accurate solution."""
_SHRINK = 0.01
"""How much weights that make up for others are drawn towards what they were, see ``solve.refit``."""
PRUNED = 0.05
"""Share of exact zeros from which a weight counts as pruned."""


@dataclass(frozen=True)
class Shared:
    """A weight whose numbers are entries of codebooks.

    Args:
        solution: codes [sets * N, K] and codebooks.
        relative: error at the outputs, as a share of their square, about their mean where ``shift`` is known.
        shift: [sets * N], by how much the mean of the outputs moves; None where inputs are not known.
        price: of a bit, as a share of the square of the outputs.
    """

    solution: solve.Solution
    relative: float
    shift: Doubles | None
    price: float = 0.0

    @property
    def matrix(self) -> Doubles:
        """[sets * N, K], the numbers themselves."""
        return solve.decode(self.solution.codes, self.solution.books)


def problem_of(matrix: Doubles, seen: Moments | None, centred: bool) -> solve.Problem:
    """Return the problem of a weight [sets, N, K].

    Args:
        matrix: the weight.
        seen: moments of its inputs, None where they are not known.
        centred: a bias takes the mean of the error, so that only its spread counts.
    """
    moments = None if seen is None else (seen.covariance if centred else seen.second)
    zeros = matrix == 0
    fixed = zeros if zeros.mean() > PRUNED else None
    return solve.Problem(matrix, moments, fixed)


def ladder(
    problem: solve.Problem, entries: int, groups: int, seen: Moments | None, limit: float | None
) -> Sequence[Shared]:
    """Return solutions from the most accurate to the smallest whose relative error is within ``limit``.

    The first is always there, and alone where there is no limit.
    """
    zero = problem.fixed is not None or limit is not None
    books = _books(problem, entries, groups, zero=zero)
    last = solve.solve(problem, books, zero=zero)
    found = [_shared(problem, last, seen, 0.0)]
    unit = last.error / problem.weight.size
    for rung in _RUNGS if limit is not None and unit > 0 else ():
        price = rung * unit
        now = solve.solve(problem, last.books, zero=zero, bit_price=price, start=last.codes)
        if limit is not None and now.error > limit * problem.size:
            break
        if now.bits < last.bits:
            found.append(_shared(problem, now, seen, price))
            last = now
    return found


def _books(problem: solve.Problem, entries: int, groups: int, *, zero: bool) -> Doubles:
    """Return codebooks to start from; zeros that are fixed have an entry for themselves."""
    fixed, shape = problem.fixed, problem.weight.shape
    weight = problem.weight if fixed is None else np.where(fixed, 0.0, problem.weight)
    rows = weight.reshape(-1, shape[2])
    importance = np.broadcast_to(problem.importance, shape).reshape(rows.shape)
    return solve.codebooks(rows, importance, entries, groups, zero=zero, apart=fixed is not None)


def _shared(
    problem: solve.Problem, solution: solve.Solution, seen: Moments | None, price: float
) -> Shared:
    size = problem.size or 1.0
    if seen is None:
        return Shared(solution, solution.error / size, None, price / size)
    change = solve.decode(solution.codes, solution.books).reshape(problem.weight.shape)
    shift = np.einsum("snk,sk->sn", change - problem.weight, seen.mean)
    return Shared(solution, solution.error / size, shift.ravel(), price / size)


def compensated(shared: Shared, problem: solve.Problem, seen: Drift, centred: bool) -> Shared:
    """Return a solution that makes up for what the layers before it changed.

    Args:
        shared: as it was planned: how many entries, and the price of a bit.
        problem: of the weight as it was.
        seen: what the layer reads, before and now.
        centred: a bias takes the mean of the error.
    """
    moments, cross = seen.covariance, seen.cross
    if not centred:
        moments = moments + seen.moved[:, :, None] * seen.moved[:, None, :]
        cross = cross + seen.mean[:, :, None] * seen.moved[:, None, :]
    wanted = towards(problem.weight, moments, problem.weight @ cross, _SHRINK)
    goal = solve.Problem(wanted, moments, problem.fixed)
    old = shared.solution.books
    zero = problem.fixed is not None or bool((old == 0).any())
    groups, entries = old.shape
    books = _books(goal, entries, groups, zero=zero)
    # Not from where the plan ended: single changes hardly lead from there to what is wanted now.
    price = shared.price * goal.size
    now = solve.solve(goal, books, zero=zero, bit_price=price, rounds=5, sweeps=3)
    after = solve.decode(now.codes, now.books).reshape(wanted.shape)
    shift = np.einsum("snk,sk->sn", after, seen.moved)
    shift -= np.einsum("snk,sk->sn", problem.weight, seen.mean)
    return Shared(now, now.error / (goal.size or 1.0), shift.ravel(), shared.price)
