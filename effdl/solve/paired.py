"""Confidence intervals of a score, and of the difference of two scores on the same samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Indices = npt.NDArray[np.integer[Any]]
_Z = NormalDist().inv_cdf(0.975)
_RESAMPLES = 4000
_FEWEST, _MOST = 100, 1000
_DRAWN = 2_000_000
"""Samples that a bootstrap draws in all for a statistic that is no mean."""
_CHUNK = 4_000_000
_DISTINCT = 64
_EXACT = 2000
"""Discordant pairs up to which the exact test is asked as well; above, both say the same."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def is_binary(*scores: Floats) -> bool:
    """Whether every score is 0 or 1: right or wrong."""
    return all(bool(((s == 0) | (s == 1)).all()) for s in scores)


def mean_interval(scores: Floats, seed: int = 0) -> Interval:
    """Return the mean of a score per sample: Wilson's interval for right or wrong, else a bootstrap.

    Args:
        scores: [samples].
        seed: of the resampling.
    """
    if not is_binary(scores):
        return bootstrap_mean(scores, seed)
    n, p = len(scores), float(scores.mean())
    # Wilson, Probable inference, JASA 1927.
    middle, width = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
    share = 1 + _Z**2 / n
    return Interval(p, min((middle - width) / share, p), max((middle + width) / share, p))


def paired_difference(before: Floats, after: Floats, seed: int = 0) -> Interval:
    """Return by how much the mean score rose from one model to another on the same samples.

    Scores of 0 and 1 get Tango's interval, which the exact test of McNemar may widen to reach 0;
    others a bootstrap over samples.

    Args:
        before: [samples], the scores of the first model.
        after: the same of the other, in the same order.
        seed: of the resampling.
    """
    if is_binary(before, after):
        gained = int(np.count_nonzero(after > before))
        lost = int(np.count_nonzero(after < before))
        return paired_shares(gained, lost, len(before))
    return bootstrap_mean(np.asarray(after, np.float64) - np.asarray(before, np.float64), seed)


def paired_shares(gained: int, lost: int, count: int) -> Interval:
    """Return the difference of two shares on the same samples.

    Score interval of Tango, Equivalence test and confidence interval for the difference in
    proportions for the paired-sample design, Statistics in Medicine 17 (1998), equations 11 and 18.
    Where few pairs differ it is a little too sure: it is made to reach 0 unless McNemar's exact test
    finds a difference at 5 %.

    Args:
        gained: samples that only the second model has right.
        lost: samples that only the first model has right.
        count: all samples.
    """
    value = (gained - lost) / count
    low = _tango(gained, lost, count, -1)
    high = _tango(gained, lost, count, 1)
    if gained + lost <= _EXACT and mcnemar(gained, lost) >= 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    return Interval(value, min(low, value), max(high, value))


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p of McNemar's exact test: a fair coin decides each differing pair."""
    pairs = gained + lost
    tail = sum(math.comb(pairs, k) for k in range(min(gained, lost) + 1))
    return min(1.0, float(2 * tail / 2**pairs))


def _tango(gained: int, lost: int, n: int, side: int) -> float:
    """Find the difference whose score statistic is ``-side`` * 1.96, by bisection."""

    def statistic(d: float) -> float:
        b = -gained - lost + (2 * n - gained + lost) * d
        c = -lost * d * (1 - d)
        q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * q + d * (1 - d))
        gap = gained - lost - n * d
        if variance <= 0:
            return math.copysign(math.inf, gap) if gap else 0.0
        return gap / math.sqrt(variance)

    value = (gained - lost) / n
    near, far = value, float(side)
    for _ in range(60):
        middle = (near + far) / 2
        if abs(statistic(middle)) < _Z:
            near = middle
        else:
            far = middle
    return near


def bootstrap_mean(values: Floats, seed: int = 0) -> Interval:
    """Return the mean with the expanded percentile interval of a bootstrap.

    Percentiles are moved outwards as Student's t is wider than the normal distribution, see
    ``expanded_percentiles``. One value alone says nothing: its interval is infinite.

    Args:
        values: [samples].
        seed: of the resampling.
    """
    mean = float(np.mean(values))
    n = len(values)
    if n < 2 or not math.isfinite(mean):
        return Interval(mean, -math.inf, math.inf)
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _DISTINCT:  # resampling draws how often each value comes
        means = rng.multinomial(n, counts / n, _RESAMPLES) @ distinct / n
    else:
        means = np.empty(_RESAMPLES)
        rows = max(1, _CHUNK // n)
        for begin in range(0, _RESAMPLES, rows):
            part = means[begin : begin + rows]
            part[:] = values[rng.integers(0, n, (len(part), n))].mean(axis=1)
    low, high = np.quantile(means, expanded_percentiles(n))
    return Interval(mean, min(float(low), mean), max(float(high), mean))


def bootstrap(statistic: Callable[[Indices], float], count: int, seed: int = 0) -> Interval:
    """Return a statistic that is no mean, with the expanded percentile interval of a bootstrap.

    It is computed 1000 times, on more than 2000 samples less often, at least 100 times: the count hangs
    on the samples alone, so that a seed gives the same interval on every machine.

    Args:
        statistic: its value on the samples with these indices, which may repeat.
        count: number of samples.
        seed: of the resampling.
    """
    value = statistic(np.arange(count))
    if count < 2 or not math.isfinite(value):
        return Interval(value, -math.inf, math.inf)
    rng = np.random.default_rng(seed)
    resamples = min(max(_DRAWN // count, _FEWEST), _MOST)
    found = [statistic(rng.integers(0, count, count)) for _ in range(resamples)]
    finite = [f for f in found if math.isfinite(f)]
    if len(finite) < len(found) / 2:
        return Interval(value, -math.inf, math.inf)
    low, high = np.quantile(finite, expanded_percentiles(count))
    return Interval(value, min(float(low), value), max(float(high), value))


def expanded_percentiles(n: int) -> tuple[float, float]:
    """Return which percentiles of a bootstrap make a 95 % interval of ``n`` samples.

    Hesterberg, What teachers should know about the bootstrap, The American Statistician 69 (2015),
    section 3.3: the normal quantile is replaced by Student's t times sqrt(n / (n - 1)).
    """
    v = n - 1
    # Student's t from the normal quantile: Abramowitz and Stegun, 26.7.5.
    z = _Z
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    tail = NormalDist().cdf(-math.sqrt(n / v) * t)
    return tail, 1 - tail
