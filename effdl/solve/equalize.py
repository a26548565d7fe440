"""Factors and shifts per channel that make a tensor and the weights behind it round better.

A layer y = W x computes the same as (W diag(s)) (x - z) / s, plus W z in its bias. With one scale for x
and one for each row of W in 8 bits, the error of y has, per unit of rounding noise, the variance

    E(s, z) = d^2/12 sum_i s_i^2 |W_i|^2 + sum_n D_n^2/12 sum_i E[(x_i - z_i)^2] / s_i^2

where d is the step of the tensor, D_n that of row n. Cross-layer equalization (Nagel et al., Data-Free
Quantization, 2019, section 4.1), SmoothQuant (Xiao et al., 2022, equation 4) and shifting (Wei et al.,
Outlier Suppression+, 2023) are choices of s and z; the best of a grid of them is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_LEVELS = 255
_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
_ROUNDS = 8
_ENOUGH = 0.98
"""Share of the error after which another round is not worth it."""
_MOST = 1e3
"""The largest factor, and the inverse of the smallest."""


@dataclass(frozen=True)
class Reader:
    """A layer that reads the tensor.

    Args:
        largest: [groups, N / groups, C / groups], the largest magnitude of the weights of an output and a
            channel of its group.
        square: [C], the sum of squares of the weights of a channel.
        taps: weights between an output and a channel.
    """

    largest: npt.NDArray[np.float32]
    square: Array
    taps: int = 1


@dataclass(frozen=True)
class Equalized:
    """What was found: ``factors`` s and ``shift`` z, both [C], and E after over E before."""

    factors: Array
    shift: Array
    gain: float


def equalize(
    low: Array, high: Array, mean: Array, square: Array, readers: Sequence[Reader], *, shift: bool
) -> Equalized:
    """Return the factors and the shift of the smallest error.

    The grid is searched again from what it found until that gains nothing.

    Args:
        low, high, mean, square: of the channels, [C].
        readers: the layers that read them.
        shift: whether a shift is possible.
    """
    found = Equalized(np.ones_like(low), np.zeros_like(low), 1.0)
    for _ in range(_ROUNDS):
        step = _search(low, high, mean, square, readers, shift)
        if step.gain > _ENOUGH:
            break
        s, z = step.factors, step.shift
        total = found.factors * s
        if total.max(initial=1.0) > _MOST or total.min(initial=1.0) < 1 / _MOST:
            break
        found = Equalized(
            found.factors * s, found.shift + found.factors * z, found.gain * step.gain
        )
        square = np.maximum(square - 2 * z * mean + z * z, 0.0) / s**2
        low, high, mean = (low - z) / s, (high - z) / s, (mean - z) / s
        readers = [Reader(r.largest * _spread(s, r), r.square * s**2, r.taps) for r in readers]
    return found


def _search(
    low: Array, high: Array, mean: Array, square: Array, readers: Sequence[Reader], shift: bool
) -> Equalized:
    weight = np.max([r.largest.max(1, initial=0.0).reshape(-1) for r in readers], axis=0)
    nothing = np.zeros_like(low)
    before = _error(low, high, square, readers, np.ones_like(low))
    best = Equalized(np.ones_like(low), nothing, 1.0)
    for z in (nothing, (low + high) / 2) if shift else (nothing,):
        a, b = low - z, high - z
        moved = np.maximum(square - 2 * z * mean + z * z, 0.0)
        reach = np.maximum(np.maximum(-a, b), 0.0)
        for p in _POWERS:
            for q in _POWERS:
                factors = _factors(reach, weight, p, q)
                error = _error(a, b, moved, readers, factors)
                if error < best.gain * before:
                    best = Equalized(factors, z, error / before)
    return best


def _factors(reach: Array, weight: Array, p: float, q: float) -> Array:
    """Return reach^p / weight^q, geometric mean 1; 1 where a channel or its weights are zero."""
    alive = (reach > 0) & (weight > 0)
    logs = np.zeros_like(reach)
    logs[alive] = p * np.log(reach[alive]) - q * np.log(weight[alive])
    if alive.any():
        logs[alive] -= logs[alive].mean()
    return np.exp(np.clip(logs, -np.log(_MOST), np.log(_MOST)))


def _error(
    low: Array, high: Array, square: Array, readers: Sequence[Reader], factors: Array
) -> float:
    """Return E of the text above, times 12."""
    ends = (
        max(float((high / factors).max(initial=0.0)), 0.0),
        min(float((low / factors).min(initial=0.0)), 0.0),
    )
    step = (ends[0] - ends[1]) / _LEVELS
    total = 0.0
    for reader in readers:
        total += step**2 * float((factors**2 * reader.square).sum())
        rows = (reader.largest * _spread(factors, reader)).max(2, initial=0.0) / (_LEVELS // 2)
        noise = _spread(square / factors**2, reader)
        each = np.where(reader.largest > 0, noise, np.float32(0)).sum(2, dtype=np.float64)
        total += reader.taps * float((rows.astype(np.float64) ** 2 * each).sum())
    return total


def _spread(numbers: Array, reader: Reader) -> npt.NDArray[np.float32]:
    """Return numbers per channel in the layout of ``Reader.largest``."""
    groups, _, channels = reader.largest.shape
    return numbers.astype(np.float32).reshape(groups, 1, channels)
