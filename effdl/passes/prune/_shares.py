"""How many zeros every weight gets so that all together have the share asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from effdl.passes.prune._found import Weight
from effdl.solve.knapsack import knapsack

LEVELS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.965, 0.98, 0.99)
"""Shares of zeros that ``plan`` chooses from."""
_BETWEEN = 4
"""Shares between two of them, whose errors are interpolated."""


def uniform(sizes: Sequence[int], share: float) -> list[int]:
    """Return the same share of every weight."""
    return [round(share * n) for n in sizes]


def erk(weights: Sequence[Weight], sizes: Sequence[int], share: float) -> list[int]:
    """Return counts by which wide weights lose more: densities go with the sum of dimensions per weight.

    Source: Evci et al. 2020, "Rigging the Lottery", section 3 (Erdos-Renyi-Kernel).
    """
    parts = np.array([_dimensions(w) for w in weights], np.float64)
    size = np.array(sizes, np.float64)
    dense = np.zeros(len(sizes), bool)
    while True:
        kept = (1 - share) * size.sum() - size[dense].sum()
        scale = kept / max(float((parts * size)[~dense].sum()), 1e-300)
        densities = np.where(dense, 1.0, scale * parts)
        over = (densities > 1) & ~dense
        if kept <= 0 or not over.any():
            break
        dense |= over
    found = np.rint(size * (1 - np.clip(densities, 0, 1))).astype(np.int64)
    return [int(n) for n in found]


def _dimensions(weight: Weight) -> float:
    outputs, positions, summed = weight.view().shape
    return float((outputs + summed + 2 * positions**0.5) / (outputs * summed * positions))


def planned(errors: Sequence[Sequence[float]], sizes: Sequence[int], count: int) -> list[int]:
    """Return the counts of least error in sum that reach ``count`` zeros.

    Args:
        errors: of every weight at each of ``LEVELS``.
        sizes: of the weights.
        count: zeros wanted.
    """
    fine = np.interp(
        np.arange((len(LEVELS) - 1) * _BETWEEN + 1) / _BETWEEN, np.arange(len(LEVELS)), LEVELS
    )
    options = [[round(float(s) * n) for s in fine] for n in sizes]
    costs = [[float(n - c) for c in counts] for n, counts in zip(sizes, options, strict=True)]
    rising = [np.interp(fine, LEVELS, np.maximum.accumulate(e)).tolist() for e in errors]
    chosen = knapsack(rising, costs, float(sum(sizes) - count))
    if chosen is None:  # more zeros than the highest level has
        return [-(-count * n // sum(sizes)) for n in sizes]
    return [counts[k] for counts, k in zip(options, chosen, strict=True)]
