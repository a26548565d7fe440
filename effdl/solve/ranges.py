"""Which part of a tensor's values an 8-bit grid should span, chosen from a histogram."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Function = Callable[[Float], Float]
Method = Literal["minmax", "percentile", "entropy", "mse"]

_SHRINK = np.linspace(1.0, 0.05, 96)
_ENTROPY_STEPS = 128
_EPSILON = 1e-9


@dataclass(frozen=True)
class Histogram:
    """How often a tensor held which values.

    Args:
        counts: samples per bin; the bins have equal width.
        low: left edge of the first bin, ``high``: right edge of the last.
        minimum: smallest value seen, ``maximum``: largest (exact, also where bins hold a subsample).
    """

    counts: Float
    low: float
    high: float
    minimum: float
    maximum: float

    @property
    def centers(self) -> Float:
        """The middle of each bin."""
        width = (self.high - self.low) / self.counts.size
        position = np.arange(self.counts.size, dtype=np.float64) + 0.5
        middles: Float = np.float64(self.low) + np.float64(width) * position
        return middles


def select_range(
    histogram: Histogram,
    method: Method = "mse",
    *,
    levels: int = 256,
    percentile: float = 99.99,
    symmetric: bool = False,
    through: Function | None = None,
) -> tuple[float, float]:
    """Return the range (low, high) that the quantization grid should span; it contains zero.

    Args:
        histogram: the values of the tensor.
        method: ``minmax`` takes all, ``percentile`` cuts the same share off both ends, ``entropy``
            keeps the distribution (Kullback-Leibler), ``mse`` keeps the values (squared error).
        levels: number of grid points.
        percentile: share of values to keep, for ``percentile``.
        symmetric: the range is [-r, r].
        through: for ``mse``: the error that counts is that of this function of the value.
    """
    if method == "minmax":
        low, high = histogram.minimum, histogram.maximum
    elif method == "percentile":
        low, high = _percentile(histogram, percentile)
    elif method == "entropy":
        low, high = _entropy(histogram, levels)
    else:
        low, high = _mse(histogram, levels, symmetric, through)
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    return low, high


def squared_error(
    histogram: Histogram,
    low: Float | float,
    high: Float | float,
    levels: int = 256,
    through: Function | None = None,
) -> Float:
    """Return the mean squared error of the grid [low, high] on the histogram's values.

    Args:
        histogram: the values.
        low: lower ends, at most 0; ``high``: upper ends, at least 0 (arrays of one length, or numbers).
        levels: grid points; zero is one of them.
        through: compare this function of the values instead of the values.
    """
    used = histogram.counts > 0
    x, weight = histogram.centers[used], histogram.counts[used]
    lo, hi = np.broadcast_arrays(np.atleast_1d(low), np.atleast_1d(high))
    step = np.maximum((hi - lo) / (levels - 1), 1e-300)[:, None]
    zero = np.clip(np.round(-lo[:, None] / step), 0, levels - 1)
    grid = np.clip(np.round(x[None, :] / step) + zero, 0, levels - 1)
    got = (grid - zero) * step
    difference = got - x[None, :] if through is None else through(got) - through(x)[None, :]
    error: Float = np.square(difference).dot(weight) / weight.sum()
    return error


def _percentile(histogram: Histogram, percentile: float) -> tuple[float, float]:
    total = histogram.counts.sum()
    if total == 0:
        return histogram.minimum, histogram.maximum
    tail = (1.0 - percentile / 100.0) / 2.0
    edges = np.linspace(histogram.low, histogram.high, histogram.counts.size + 1)
    share = np.concatenate([[0.0], np.cumsum(histogram.counts)]) / total
    # The last edge with at most `tail` of the values below it, the first with at most that above.
    low = edges[np.searchsorted(share, tail, side="right") - 1]
    high = edges[min(int(np.searchsorted(share, 1.0 - tail, side="left")), edges.size - 1)]
    return max(float(low), histogram.minimum), min(float(high), histogram.maximum)


def silu(x: Float) -> Float:
    """Return x * sigmoid(x), what most of a value below -6 or so does not reach the end of."""
    result: Float = x / (1.0 + np.exp(-np.clip(x, -60.0, 60.0)))
    return result


def _mse(
    histogram: Histogram, levels: int, symmetric: bool, through: Function | None
) -> tuple[float, float]:
    """Shrink both ends in turn, three rounds (for a symmetric range: both at once)."""
    low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
    if histogram.counts.sum() == 0 or low == high:
        return low, high
    if symmetric:
        radius = max(-low, high) * _SHRINK
        best = radius[np.argmin(squared_error(histogram, -radius, radius, levels, through))]
        return -float(best), float(best)
    full_low, full_high = low, high
    for _ in range(3):
        before = (low, high)
        if full_high > 0:
            ends = full_high * _SHRINK
            high = float(ends[np.argmin(squared_error(histogram, low, ends, levels, through))])
        if full_low < 0:
            ends = full_low * _SHRINK
            low = float(ends[np.argmin(squared_error(histogram, ends, high, levels, through))])
        if (low, high) == before:
            break
    return low, high


def _entropy(histogram: Histogram, levels: int) -> tuple[float, float]:
    """Clip both ends by the same factor so that the quantized distribution diverges least.

    The divergence is that of the clipped distribution, outliers counted at its ends, from the same
    bins averaged down to ``levels`` (TensorRT's entropy calibration, Migacz 2017).
    """
    low, high = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
    if histogram.counts.sum() == 0 or low == high:
        return low, high
    width = (histogram.high - histogram.low) / histogram.counts.size
    counts = histogram.counts.copy()
    zero = int(-histogram.low / width)
    counts[min(zero, counts.size - 1)] = 0  # zero is exact on every grid, and often most values
    best, best_range = np.inf, (low, high)
    for factor in np.linspace(1.0, min(1.0, levels / counts.size), _ENTROPY_STEPS):
        first = max(int(np.floor((low * factor - histogram.low) / width)), 0)
        last = min(int(np.ceil((high * factor - histogram.low) / width)), counts.size)
        if last - first < 2:
            break
        divergence = _divergence(counts, first, last, levels)
        if divergence < best:
            best, best_range = divergence, (low * factor, high * factor)
    return best_range


def _divergence(counts: Float, first: int, last: int, levels: int) -> float:
    inner = counts[first:last]
    if inner.sum() == 0:
        return float(np.inf)
    reference = inner.copy()
    reference[0] += counts[:first].sum()
    reference[-1] += counts[last:].sum()
    level = np.arange(inner.size) * levels // inner.size
    used = (reference > 0).astype(np.float64)
    mass = np.bincount(level, weights=inner)
    members = np.bincount(level, weights=used)
    coarse = np.divide(mass, members, out=np.zeros_like(mass), where=members > 0)[level] * used
    p = reference / reference.sum()
    q = np.maximum(coarse / coarse.sum(), _EPSILON)
    seen = p > 0
    return float(np.sum(p[seen] * np.log(p[seen] / q[seen])))
