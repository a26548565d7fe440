"""A layer's weight fitted to the outputs it should have, by ridge regression towards the weight it has.

min_V  E |t - V x|^2 + lam |V - W|^2   gives   V = W + (T - W G) inv(G + lam I)

with G = cov(x, x), T = cov(t, x), both about their means; the bias takes the means. x is what the layer sees
behind layers that are compressed already, t what its output was before: the error of the layers before it is
made up for as well (He et al. 2017, "Channel Pruning", section 3; "asymmetric" reconstruction).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
SHRINK = (1e-4, 1e-3, 1e-2, 1e-1)
"""Values of lam that are tried, in shares of the mean of diag G."""
_LEAST_GAIN = 0.001
"""Share of the held-out error that a fit must take away."""


@dataclass(frozen=True)
class Moments:
    """What was seen of inputs x and wanted outputs t of a layer, in any number of groups.

    Args:
        rows: how many.
        mean_in: [groups, K]; ``mean_out``: [groups, N].
        inner: [groups, K, K], cov(x, x).
        cross: [groups, N, K], cov(t, x).
        spread: [groups, N], var(t).
    """

    rows: int
    mean_in: Float
    mean_out: Float
    inner: Float
    cross: Float
    spread: Float

    def error(self, weight: Float) -> float:
        """Return E |t - V x - b|^2 for a weight [groups, N, K] with the best bias, relative to var(t)."""
        both = np.sum((weight @ self.inner) * weight) - 2 * np.sum(weight * self.cross)
        total = float(self.spread.sum())
        return (total + float(both)) / total if total > 0 else 0.0

    def with_(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows."""
        n = self.rows + other.rows
        a, b = self.rows / n, other.rows / n
        d_in, d_out = self.mean_in - other.mean_in, self.mean_out - other.mean_out
        return Moments(
            n,
            a * self.mean_in + b * other.mean_in,
            a * self.mean_out + b * other.mean_out,
            a * self.inner + b * other.inner + a * b * d_in[:, :, None] * d_in[:, None, :],
            a * self.cross + b * other.cross + a * b * d_out[:, :, None] * d_in[:, None, :],
            a * self.spread + b * other.spread + a * b * d_out**2,
        )

    def about_zero(self) -> Moments:
        """Return x x^T and its like instead, for a layer without a bias."""
        return Moments(
            self.rows,
            np.zeros_like(self.mean_in),
            np.zeros_like(self.mean_out),
            self.inner + self.mean_in[:, :, None] * self.mean_in[:, None, :],
            self.cross + self.mean_out[:, :, None] * self.mean_in[:, None, :],
            self.spread + self.mean_out**2,
        )


@dataclass(frozen=True)
class Fit:
    """A fitted layer.

    Args:
        weight: [groups, N, K].
        bias: [groups, N].
        shrink: the lam that was best on held-out rows, None where the old weight was.
        before, after: relative errors on held-out rows with the old weight and the new one.
    """

    weight: Float
    bias: Float
    shrink: float | None
    before: float
    after: float


def refit(weight: Float, seen: Moments, held: Moments) -> Fit:
    """Fit a weight to ``seen``, shrunk as is best on ``held``, and then to both.

    Args:
        weight: [groups, N, K], what it is shrunk towards.
        seen: of the rows that are fitted.
        held: of rows held out, which also decide whether the old weight stays.
    """
    before = held.error(weight)
    best, after = None, before * (1 - _LEAST_GAIN)
    for shrink in SHRINK:
        error = held.error(ridge(weight, seen, shrink))
        if error < after:
            best, after = shrink, error
    every = seen.with_(held)
    made = weight if best is None else ridge(weight, every, best)
    bias = every.mean_out - np.einsum("gnk,gk->gn", made, every.mean_in)
    return Fit(made, bias, best, before, before if best is None else after)


def ridge(weight: Float, seen: Moments, shrink: float) -> Float:
    """Return the weight that fits best, with ``shrink`` times the mean of diag G as the price of changes."""
    return towards(weight, seen.inner, seen.cross, shrink)


def towards(weight: Float, inner: Float, cross: Float, shrink: float) -> Float:
    """Return the ridge regression that is drawn towards a weight, see the head of this file.

    Args:
        weight: W, [groups, N, K].
        inner: G, [groups, K, K]; ``cross``: T, [groups, N, K].
        shrink: lam, in shares of the mean of diag G.
    """
    at = np.arange(inner.shape[1])
    lam = shrink * inner[:, at, at].mean(1, keepdims=True)
    lifted = inner.copy()
    lifted[:, at, at] += np.where(lam > 0, lam, 1.0)
    right = cross - weight @ inner
    return weight + np.linalg.solve(lifted, right.transpose(0, 2, 1)).transpose(0, 2, 1)
