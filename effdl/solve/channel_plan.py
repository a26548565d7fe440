"""How many channels each group keeps, so that a cost is met at the least error.

The cost of a layer is a product of the lengths of its axes, so that groups depend on each other. The knapsack
of SPDY (Frantar and Alistarh 2022) is solved on the cost as it is around the last answer, again and again;
a greedy descent on the true cost is the other start, and exchanges between groups improve the better of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from effdl.solve.knapsack import knapsack

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_ROUNDS = 8
_EXCHANGES = 400


@dataclass(frozen=True)
class Cost:
    """A sum of products: weight * prod over axes (fixed + share . kept).

    Args:
        weights: [terms].
        fixed: [terms, axes]; share: [terms, axes, groups].
        rest: what does not depend on channels.
    """

    weights: Float
    fixed: Float
    share: Float
    rest: float = 0.0

    def of(self, kept: Float) -> float:
        """Return the cost when groups keep so many channels."""
        axes = self.fixed + self.share @ kept
        return float(self.weights @ axes.prod(1)) + self.rest


@dataclass(frozen=True)
class Choice:
    """What one group may keep.

    Args:
        kept: [options], descending, the first one is all of it.
        errors: [options], what each costs in error, not falling.
    """

    kept: Ints
    errors: Float


def plan(choices: Sequence[Choice], cost: Cost, budget: float) -> list[int] | None:
    """Return the option of each group; None where even the smallest cost more than the budget."""
    least = [len(c.kept) - 1 for c in choices]
    if cost.of(_kept(choices, least)) > budget:
        return None
    starts = [_greedy(choices, cost, budget), *_linearised(choices, cost, budget)]
    fit = [s for s in starts if cost.of(_kept(choices, s)) <= budget]
    best = min(fit or [least], key=lambda s: _error(choices, s))
    return _exchanged(choices, cost, budget, best)


def _kept(choices: Sequence[Choice], options: Sequence[int]) -> Float:
    return np.array([c.kept[o] for c, o in zip(choices, options, strict=True)], np.float64)


def _error(choices: Sequence[Choice], options: Sequence[int]) -> float:
    return float(sum(c.errors[o] for c, o in zip(choices, options, strict=True)))


def _greedy(choices: Sequence[Choice], cost: Cost, budget: float) -> list[int]:
    """Step down where the cost falls most for the error, until the budget is met."""
    at = [0] * len(choices)
    now = cost.of(_kept(choices, at))
    while now > budget:
        best, rate, reached = -1, -1.0, now
        for g, choice in enumerate(choices):
            if at[g] + 1 == len(choice.kept):
                continue
            tried = [*at[:g], at[g] + 1, *at[g + 1 :]]
            after = cost.of(_kept(choices, tried))
            gained = (now - after) / (choice.errors[at[g] + 1] - choice.errors[at[g]] + 1e-12)
            if gained > rate:
                best, rate, reached = g, gained, after
        if best < 0:
            break
        at[best] += 1
        now = reached
    return at


def _linearised(choices: Sequence[Choice], cost: Cost, budget: float) -> list[list[int]]:
    """Solve the knapsack with the cost of each group alone around the last answer."""
    at = _uniform(choices, cost, budget)
    found = [at]
    for _ in range(_ROUNDS):
        base = cost.of(_kept(choices, at))
        changes = []
        for g, choice in enumerate(choices):
            kept = _kept(choices, at)
            change = []
            for k in choice.kept:
                kept[g] = k
                change.append(cost.of(kept) - base)
            changes.append(change)
        tried = knapsack([c.errors.tolist() for c in choices], changes, budget - base, buckets=1024)
        if tried is None:
            break
        # half of the way: far from the answer the groups' costs alone do not add up
        at = [round((a + t) / 2) if a != t else a for a, t in zip(at, tried, strict=True)]
        found += [tried, at]
    return found


def _uniform(choices: Sequence[Choice], cost: Cost, budget: float) -> list[int]:
    """Return options that keep about the same share of every group."""
    low, high = 0.0, 1.0
    best = [len(c.kept) - 1 for c in choices]
    for _ in range(30):
        share = (low + high) / 2
        at = [int(np.argmin(np.abs(c.kept - share * c.kept[0]))) for c in choices]
        if cost.of(_kept(choices, at)) <= budget:
            best, low = at, share
        else:
            high = share
    return best


def uniform(choices: Sequence[Choice], cost: Cost, budget: float) -> list[int] | None:
    """Return options that keep the same share of every group, as far as their steps allow."""
    at = _uniform(choices, cost, budget)
    return at if cost.of(_kept(choices, at)) <= budget else None


def thresholded(
    choices: Sequence[Choice], traces: Sequence[Float], cost: Cost, budget: float
) -> list[int] | None:
    """Return options by one threshold for all groups on what their channels cost one by one.

    Args:
        choices: the options.
        traces: [n + 1] of each group, the error after so many channels are gone.
        cost: of counts kept; ``budget`` what it may be.
    """
    steps = [np.maximum(np.diff(t), 0.0) / max(float(t[-1]), 1e-30) for t in traces]
    levels = np.unique(np.concatenate(steps))
    low, high = 0, len(levels)
    best: list[int] | None = None
    while low <= high:
        middle = (low + high) // 2
        level = levels[middle - 1] if middle else -1.0
        kept = [int((s > level).sum()) for s in steps]
        at = [
            int(np.argmin(np.abs(c.kept - max(k, c.kept[-1]))))
            for c, k in zip(choices, kept, strict=True)
        ]
        if cost.of(_kept(choices, at)) <= budget:
            best, high = at, middle - 1
        else:
            low = middle + 1
    return best


def _exchanged(choices: Sequence[Choice], cost: Cost, budget: float, at: list[int]) -> list[int]:
    """Give one group more and others less, while that lowers the error within the budget."""
    at = list(at)
    for _ in range(_EXCHANGES):
        error, best, gain = _error(choices, at), None, 1e-12
        for up in range(len(choices)):
            if at[up] == 0:
                continue
            grown = [*at[:up], at[up] - 1, *at[up + 1 :]]
            for down in (None, *range(len(choices))):
                tried = _shrunk(choices, cost, budget, grown, down) if down != up else None
                if tried is not None and error - _error(choices, tried) > gain:
                    best, gain = tried, error - _error(choices, tried)
        if best is None:
            break
        at = best
    return at


def _shrunk(
    choices: Sequence[Choice], cost: Cost, budget: float, at: list[int], group: int | None
) -> list[int] | None:
    """Take from one group what is needed to meet the budget."""
    if group is None:
        return at if cost.of(_kept(choices, at)) <= budget else None
    for option in range(at[group] + 1, min(at[group] + 4, len(choices[group].kept))):
        tried = [*at[:group], option, *at[group + 1 :]]
        if cost.of(_kept(choices, tried)) <= budget:
            return tried
    return None
