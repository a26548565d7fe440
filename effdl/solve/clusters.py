"""The best clusters of numbers on a line: exact k-means in one dimension."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.floating[Any]]
Doubles = npt.NDArray[np.float64]
BINS = 4096
"""Positions that numbers are taken together to."""


def distinct(values: Float, importance: Float, bins: int = BINS) -> tuple[Doubles, Doubles]:
    """Return ascending positions and their weights: every value, or the means of narrow bins of them.

    Args:
        values, importance: [n]; importance is not negative.
        bins: at most so many positions; with more distinct values those of a bin are taken together.
    """
    x = np.asarray(values, np.float64).ravel()
    h = np.asarray(importance, np.float64).ravel()
    places, where = np.unique(x, return_inverse=True)
    if len(places) > bins:
        low, high = places[0], places[-1]
        where = np.minimum(((x - low) * (bins / (high - low))).astype(np.int64), bins - 1)
    count = int(where.max()) + 1 if len(where) else 0
    mass = np.bincount(where, h, count)
    full = np.bincount(where, minlength=count) > 0
    # Values without importance still need a place: they count for next to nothing.
    least = max(float(mass.max(initial=0.0)), 1e-30) * 1e-12
    mass = mass + least * np.bincount(where, minlength=count)
    middle = np.bincount(where, (h + least) * x, count)
    weights = np.asarray(mass[full], np.float64)
    return middle[full] / weights, weights


def cluster(positions: Doubles, mass: Doubles, k: int) -> Doubles:
    """Return the k centres of least sum of mass * (position - centre)^2, the global optimum.

    Optimal clusters of sorted numbers are runs of them: dynamic programming over where the last run
    starts, which never moves left as more numbers come in, so that divide and conquer finds all starts in
    n log n (Wu, Optimal quantization by matrix searching, 1991; Groenlund et al., Fast exact k-means in
    1D, 2017).

    Args:
        positions: [n], ascending.
        mass: [n], positive.
        k: how many centres; all of ``positions`` where there are no more.
    """
    n = len(positions)
    if n <= k:
        return positions.copy()
    centre = float(positions @ mass / mass.sum())
    x = positions - centre  # sums of squares of small numbers stay exact
    sums = [np.concatenate(([0.0], np.cumsum(mass * x**p))) for p in range(3)]
    best = _run_costs(sums, np.zeros(n + 1, np.int64), np.arange(n + 1))
    starts = np.zeros((k, n + 1), np.int64)
    for j in range(1, k):
        best, starts[j] = _one_more(sums, best, j)
    found, end = np.empty(k), n
    for j in range(k - 1, -1, -1):
        start = int(starts[j, end])
        found[j] = (sums[1][end] - sums[1][start]) / (sums[0][end] - sums[0][start])
        end = start
    return found + centre


def _run_costs(sums: list[Doubles], start: Any, end: Any) -> Doubles:
    """Return the squared error of the runs [start, end) about their means."""
    mass = sums[0][end] - sums[0][start]
    first = sums[1][end] - sums[1][start]
    square = sums[2][end] - sums[2][start]
    cost: Doubles = square - first**2 / np.where(mass > 0, mass, 1.0)
    return np.maximum(cost, 0.0)


def _one_more(
    sums: list[Doubles], before: Doubles, runs: int
) -> tuple[Doubles, npt.NDArray[np.int64]]:
    """Return the costs of the first i numbers in ``runs + 1`` runs, and where the last of these starts."""
    n = len(before) - 1
    best = np.full(n + 1, np.inf)
    starts = np.zeros(n + 1, np.int64)
    # Intervals of ends whose starts are known to lie within [low, high]: a level of the recursion at a time.
    first, last = np.array([runs + 1]), np.array([n])
    low, high = np.array([runs]), np.array([n - 1])
    while len(first):
        end = (first + last) // 2
        top = np.minimum(high, end - 1)
        length = top - low + 1
        offset = np.concatenate(([0], np.cumsum(length)))
        owner = np.repeat(np.arange(len(end)), length)
        start = np.arange(offset[-1]) - offset[owner] + low[owner]
        cost = before[start] + _run_costs(sums, start, end[owner])
        least = np.minimum.reduceat(cost, offset[:-1])
        hits = np.flatnonzero(cost == least[owner])
        chosen = np.empty(len(end), np.int64)
        chosen[owner[hits][::-1]] = start[hits][::-1]  # the first of equal ones
        best[end], starts[end] = least, chosen
        left, right = first < end, end < last
        first, last, low, high = (
            np.concatenate((first[left], end[right] + 1)),
            np.concatenate((end[left] - 1, last[right])),
            np.concatenate((low[left], chosen[right])),
            np.concatenate((chosen[left], high[right])),
        )
    return best, starts
