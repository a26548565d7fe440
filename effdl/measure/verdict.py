"""From block times to a ratio, its confidence interval, and a word that can be believed.

A block is a few inferences of one model; a round is one block of each model, next to each other in
time, in an order that alternates from round to round. Whatever disturbs the machine for longer than
a round disturbs both sides of the ratio of that round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from effdl.report import Latency

Floats = npt.NDArray[np.floating[Any]]
MIN_EFFECT = 0.01
"""No difference below this is called one: two processes of the same model differ by about as much."""
TOO_WIDE = 0.10
"""An undecided interval, or a noise floor, that reaches further than this from 1 says nothing."""
_RESAMPLES = 2000
_FEW = 9
"""Of fewer values than this the range itself bounds the median with about 95 %; resampling is too sure."""


@dataclass(frozen=True)
class Ratio:
    """Time of the first model over the time of this one, with a 95 % confidence interval."""

    value: float
    low: float
    high: float


def latency(times_ns: Sequence[int]) -> Latency:
    """Summarize single inference times."""
    ms = np.asarray(times_ns, np.float64) / 1e6
    q25, median, q75, p90, p99 = (float(q) for q in np.percentile(ms, [25, 50, 75, 90, 99]))
    spread = (q75 - q25) / 2 / median if median > 0 else 0.0
    return Latency(median, p90, p99, float(ms.min()), float(ms.mean()), spread, len(ms))


def block_time(times_ns: Sequence[int]) -> float:
    """Return the 20 % trimmed mean: of median, minimum and mean the one that varies least."""
    ordered = np.sort(np.asarray(times_ns, np.float64))
    cut = len(ordered) // 5
    return float(ordered[cut : len(ordered) - cut].mean())


def paired_ratio(first: Sequence[float], other: Sequence[float], seed: int) -> Ratio:
    """Return the median over rounds of first / other, bounded by a percentile bootstrap over rounds.

    Args:
        first: block time of the first model in each round.
        other: the same of the other model.
        seed: of the resampling.
    """
    logs = np.log(np.asarray(first)) - np.log(np.asarray(other))
    low, high = _bootstrap_median(logs, seed)
    return Ratio(float(np.exp(np.median(logs))), float(np.exp(low)), float(np.exp(high)))


def own_noise(blocks: Sequence[float], seed: int) -> float:
    """Return how far from 1 the ratio of a model to itself may seem, as a fraction: an A/A control.

    The model's own rounds are paired with their neighbours as if these were another model; the sign
    alternates as the order of a round does, so that being first or second cancels here as it does in
    ``paired_ratio``. The bound of the 95 % interval is divided by sqrt(2), as there are half as many
    pairs as rounds.
    """
    logs = np.log(np.asarray(blocks, np.float64))
    pairs = len(logs) // 2
    if pairs < 2:
        return 0.0
    difference = logs[1 : 2 * pairs : 2] - logs[0 : 2 * pairs : 2]
    difference[1::2] *= -1
    low, high = _bootstrap_median(difference, seed)
    return float(np.expm1(max(abs(low), abs(high)) / np.sqrt(2)))


def judge(ratio: Ratio, floor: float) -> str:
    """Return ``faster``, ``slower``, ``same`` or ``noisy``.

    A difference counts when the interval excludes 1 and the ratio lies outside the noise floor.

    Args:
        ratio: of the first model's time to this one's.
        floor: the noise floor as a fraction, such as 0.01.
    """
    beyond = abs(np.log(ratio.value)) > np.log1p(max(floor, MIN_EFFECT))
    if beyond and ratio.low > 1:
        return "faster"
    if beyond and ratio.high < 1:
        return "slower"
    reach = max(-np.log(ratio.low), np.log(ratio.high), np.log1p(floor))
    return "noisy" if reach > np.log1p(TOO_WIDE) else "same"


def sentence(word: str, ratio: Ratio) -> str:
    """Return the verdict for people, such as ``faster 1.42x [1.38, 1.46]``."""
    says = {"same": "same speed (within noise)", "noisy": "too noisy to say"}.get(word, word)
    return f"{says} {ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def _bootstrap_median(values: Floats, seed: int) -> tuple[float, float]:
    """2.5th and 97.5th percentile of the median of resampled values (Efron 1979)."""
    if len(values) < _FEW:
        return float(values.min()), float(values.max())
    rng = np.random.default_rng(seed)
    medians = np.empty(_RESAMPLES)
    rows = max(1, 2_000_000 // max(len(values), 1))
    for begin in range(0, _RESAMPLES, rows):
        part = medians[begin : begin + rows]
        picks = rng.integers(0, len(values), (len(part), len(values)))
        part[:] = np.median(values[picks], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)
