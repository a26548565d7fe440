"""From block times to a ratio, its confidence interval, and a word that can be believed.

A block is a few inferences of one model; a round is one block of each model, next to each other in
time; a generation is a set of fresh processes, one per model, and the rounds they take turns in.

Two processes of the same model differ by up to a few per cent for as long as they live: where their
memory lies is drawn when they start. Rounds inside them cannot see that, so an interval from rounds
alone is too narrow, however many there are. Only the spread over generations shows it, and there are
few generations: a percentile bootstrap over so few is too narrow as well. The interval is therefore
Student's, over generations, with a moderated variance (Smyth 2004, "Linear models and empirical Bayes
methods", eq. 5-6): the spread that was seen, combined with the one that is usual, each by its degrees
of freedom. A control, which is a second process of the first model in every generation, differs from
it by nothing but noise, and so adds to what is known about the spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from effdl.report import Latency

Floats = npt.NDArray[np.floating[Any]]
Blocks = Sequence[Sequence[float]]
"""Block times of one model: per generation, per round."""
MIN_EFFECT = 0.02
"""No difference below this is called one, unless the caller wants to know it more exactly."""
TOO_WIDE = 2.5
"""An undecided interval that reaches this many times the smallest effect from 1 says nothing."""
USUAL_SPREAD = 0.005
"""Standard deviation of the log time of processes of one model, on a machine with little else to do."""
USUAL_WEIGHT = 4
"""Degrees of freedom of ``USUAL_SPREAD``: generations that it counts as."""
_RESAMPLES = 200
_TRIM = 5


@dataclass(frozen=True)
class Ratio:
    """Time of the first model over the time of this one, with a 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval, in logarithms: about a fraction of the ratio."""
        return float(np.log(self.high / self.low) / 2)


@dataclass(frozen=True)
class Comparison:
    """A model against the first.

    Args:
        ratio: with its interval.
        noise: how far from 1 a ratio of the first model to itself strays in such a run, as a fraction.
    """

    ratio: Ratio
    noise: float


@dataclass(frozen=True)
class _Differences:
    """Differences of log times, one per generation.

    Args:
        values: the trimmed mean over rounds, [generations].
        sampling: mean variance of these values that comes from the rounds.
        processes: variance of a value in units of one process's variance: 2 for one process against
            another, 1.5 for one against the mean of two.
    """

    values: Floats
    sampling: float
    processes: float

    @property
    def squares(self) -> float:
        return float(((self.values - self.values.mean()) ** 2).sum() / self.processes)

    @property
    def prior(self) -> float:
        """The sum of squares that is usual, with the noise of the rounds that was seen."""
        return USUAL_WEIGHT * (USUAL_SPREAD**2 + self.sampling / self.processes)


def latency(times_ns: Sequence[int]) -> Latency:
    """Summarize single inference times."""
    ms = np.asarray(times_ns, np.float64) / 1e6
    q25, median, q75, p90, p99 = (float(q) for q in np.percentile(ms, [25, 50, 75, 90, 99]))
    spread = (q75 - q25) / 2 / median if median > 0 else 0.0
    return Latency(median, p90, p99, float(ms.min()), float(ms.mean()), spread, len(ms))


def block_time(times_ns: Sequence[int]) -> float:
    """Return the 20 % trimmed mean: of median, minimum and mean the one that varies least."""
    ordered = np.sort(np.asarray(times_ns, np.float64))
    cut = len(ordered) // _TRIM
    return float(ordered[cut : len(ordered) - cut].mean())


def compare(
    first: Blocks, other: Blocks, control: Blocks | None = None, seed: int = 0
) -> Comparison:
    """Return how many times as fast the other model is as the first, and how sure that is.

    Args:
        first: block times of the first model.
        other: those of the other in the same rounds.
        control: those of a second process of the first model, None without one.
        seed: of the resampling of rounds.
    """
    base, theirs = _logs(first), _logs(other)
    if control is None:
        pair = _differences(base, theirs, 2.0, seed)
        squares, freedom = pair.prior + pair.squares, USUAL_WEIGHT + len(base) - 1
        stray = max(own_noise(first, seed), own_noise(other, seed))
    else:
        twin = _logs(control)
        pair = _differences(
            [(a + b) / 2 for a, b in zip(base, twin, strict=True)], theirs, 1.5, seed
        )
        self_ = _differences(base, twin, 2.0, seed)
        # That the twin differs by nothing is known, so its squares are about 0, not about their mean.
        seen = pair.squares + float((self_.values**2).sum() / 2)
        squares = (pair.prior + self_.prior) / 2 + seen
        freedom = USUAL_WEIGHT + 2 * len(base) - 1
        stray = abs(float(self_.values.mean()))
    pooled = np.sqrt(squares / freedom / len(base)) * _student(freedom)
    # The other model may vary more from process to process than the first does.
    own = USUAL_WEIGHT + len(base) - 1
    alone = np.sqrt((pair.prior + pair.squares) / own / len(base)) * _student(own)
    half = np.sqrt(pair.processes) * max(pooled, alone)
    middle = float(pair.values.mean())
    noise = float(np.expm1(max(stray, np.sqrt(2) * pooled)))
    return Comparison(_ratio(middle, float(half)), noise)


def control_ratio(first: Blocks, control: Blocks, seed: int = 0) -> Ratio:
    """Return the ratio of the first model to a second process of itself (A/A), with its interval."""
    pair = _differences(_logs(first), _logs(control), 2.0, seed)
    freedom = USUAL_WEIGHT + len(pair.values) - 1
    spread = np.sqrt((pair.prior + pair.squares) / freedom)
    half = _student(freedom) * spread * np.sqrt(pair.processes / len(pair.values))
    return _ratio(float(pair.values.mean()), float(half))


def own_noise(blocks: Blocks, seed: int = 0) -> float:
    """Return how far from 1 the ratio of a model to itself may seem, as a fraction, without a control.

    The model's own rounds are paired with their neighbours as if these were another model; the sign
    alternates as the order of a round does, so that being first or second cancels here as it does in
    ``compare``. What differs between processes this cannot see.
    """
    values, variances = [], []
    for generation in blocks:
        logs = np.log(np.asarray(generation, np.float64))
        pairs = len(logs) // 2
        if pairs < 2:
            continue
        difference = logs[1 : 2 * pairs : 2] - logs[0 : 2 * pairs : 2]
        difference[1::2] *= -1
        values.append(_trimmed_mean(difference))
        variances.append(_sampling_variance(difference, seed))
    if not values:
        return 0.0
    # There are half as many pairs as rounds.
    bound = abs(np.mean(values)) + 1.96 * np.sqrt(np.mean(variances) / len(values))
    return float(np.expm1(bound / np.sqrt(2)))


def quotient(now: Ratio, then: Ratio) -> Ratio:
    """Return now over then, the interval of both in it; the two are independent."""
    middle = float(np.log(now.value / then.value))
    return _ratio(middle, float(np.hypot(now.half_width, then.half_width)))


def judge(ratio: Ratio, floor: float, min_effect: float = MIN_EFFECT) -> str:
    """Return ``faster``, ``slower``, ``same`` or ``noisy``.

    A difference counts when the interval excludes 1 and the ratio lies outside the noise floor. None
    is ruled out when the ratio lies inside and the interval does not reach far out of it.

    Args:
        ratio: of the first model's time to this one's.
        floor: the noise floor as a fraction, such as 0.02; never below ``min_effect``.
        min_effect: the smallest difference of interest, as a fraction.
    """
    if abs(np.log(ratio.value)) > np.log1p(max(floor, min_effect)):
        if ratio.low > 1:
            return "faster"
        return "slower" if ratio.high < 1 else "noisy"
    reach = max(-np.log(ratio.low), np.log(ratio.high), np.log1p(floor))
    return "noisy" if reach > np.log1p(TOO_WIDE * min_effect) else "same"


def sentence(word: str, ratio: Ratio, floor: float) -> str:
    """Return the verdict for people, such as ``faster 1.42x [1.38, 1.46]``."""
    interval = f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
    match word:
        case "same":
            return f"no difference above the noise floor ({100 * floor:.2g} %) {interval}"
        case "noisy":
            return "too noisy to say"
    return f"{word} {interval}"


def _logs(blocks: Blocks) -> list[Floats]:
    return [np.log(np.asarray(generation, np.float64)) for generation in blocks]


def _differences(
    left: Sequence[Floats], right: Sequence[Floats], processes: float, seed: int
) -> _Differences:
    rounds = [a - b for a, b in zip(left, right, strict=True)]
    sampling = float(np.mean([_sampling_variance(r, seed) for r in rounds]))
    return _Differences(np.array([_trimmed_mean(r) for r in rounds]), sampling, processes)


def _trimmed_mean(values: Floats) -> Any:
    """Mean along the last axis without a fifth on each side, at least one where there are four."""
    count = values.shape[-1]
    cut = max(count // _TRIM, 1) if count >= 4 else 0
    return np.sort(values, axis=-1)[..., cut : count - cut].mean(axis=-1)


def _sampling_variance(values: Floats, seed: int) -> float:
    """Variance of the trimmed mean, by a bootstrap over pairs of rounds (Efron 1979).

    Two rounds in succession, one the reverse of the other in order, are drawn together.
    """
    size = 2 if len(values) >= 4 else 1
    units = len(values) // size
    if units < 2:
        return USUAL_SPREAD**2  # nothing is known
    drawn = np.random.default_rng(seed).integers(0, units, (_RESAMPLES, units))
    samples = values[: units * size].reshape(units, size)[drawn].reshape(_RESAMPLES, -1)
    return float(_trimmed_mean(samples).var(ddof=1)) * units / (units - 1)


def _ratio(middle: float, half: float) -> Ratio:
    return Ratio(*(float(np.exp(x)) for x in (middle, middle - half, middle + half)))


def _student(freedom: int) -> float:
    """97.5th percentile of Student's distribution (Abramowitz and Stegun 26.7.5); off by 0.3 % at 4."""
    z, v = 1.959964, freedom
    return float(
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )
