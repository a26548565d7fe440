"""One option for each of many things, so that the sum of errors is least within a budget of costs.

The multiple-choice knapsack problem by dynamic programming over buckets of cost (Dudzinski and Walukiewicz
1987; SPDY, Frantar and Alistarh 2022, section 3.2, uses it for layers of networks).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BUCKETS = 4096
_TINY = 1e-200
"""Room where there is none: what costs more than the cheapest option does not fit."""


def knapsack(
    errors: Sequence[Sequence[float]],
    costs: Sequence[Sequence[float]],
    budget: float,
    *,
    buckets: int = _BUCKETS,
) -> list[int] | None:
    """Return the number of the option to take for each thing; None where even the cheapest are too much.

    Costs are rounded up to buckets above the cheapest choice, so that the budget always holds; the result
    is the best for costs that are multiples of ``budget / buckets``, and close to it for others.

    Args:
        errors: of each option of each thing, finite; ``costs`` alike.
        budget: what the costs may sum up to.
        buckets: into which the budget is cut.
    """
    if not errors:
        return []
    least = np.array([min(c) for c in costs], np.float64)
    room = budget - float(least.sum())
    slack = 1e-9 * max(abs(budget), float(np.abs(least).sum()))
    if room < -slack:
        return None
    step = max(room, slack, _TINY) / buckets
    best = np.zeros(buckets + 1)
    taken: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    for error, cost, base in zip(errors, costs, least, strict=True):
        table = np.full((len(error), buckets + 1), np.inf)
        for k, (e, c) in enumerate(zip(error, cost, strict=True)):
            above = int(np.ceil((c - base) / step - 1e-9))
            if above <= buckets:
                table[k, above:] = best[: buckets + 1 - above] + e
        choice = np.argmin(table, axis=0)
        taken.append(choice)
        best = np.take_along_axis(table, choice[None], axis=0)[0]
    found, left = list[int](), buckets
    for cost, base, choice in zip(reversed(costs), reversed(least), reversed(taken), strict=True):
        k = int(choice[left])
        found.append(k)
        left -= int(np.ceil((cost[k] - base) / step - 1e-9))
    return found[::-1]
