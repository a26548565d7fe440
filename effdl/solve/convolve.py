"""Algebra of convolution kernels: two in a row, several side by side, the identity.

A kernel is ``[outputs, inputs / group, *window]`` as in ONNX Conv, which correlates: output o at
position p is the sum over i and t of ``kernel[o, i, t] * x[i, stride * p - begin + dilation * t]``.
The forms side by side are those of RepVGG (Ding et al., 2021, section 3.3) and ACNet (Ding et al., 2019,
section 3.3), those in a row of Ding et al., Diverse Branch Block, 2021, transforms I to IV.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Kernel:
    """A convolution along some axes.

    Args:
        weight: [outputs, inputs / group, *window].
        strides: one per axis; ``dilations``, ``begins`` and ``ends`` (the zeros around) likewise.
        group: number of groups.
    """

    weight: Floats
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    group: int = 1

    @property
    def window(self) -> tuple[int, ...]:
        """Its size along each axis."""
        return self.weight.shape[2:]

    @property
    def gains(self) -> tuple[int, ...]:
        """By how much padding exceeds what the window takes, for each axis; 0 keeps the length."""
        spans = (d * (k - 1) for d, k in zip(self.dilations, self.window, strict=True))
        return tuple(b + e - s for b, e, s in zip(self.begins, self.ends, spans, strict=True))


def regrouped(weight: Floats, group: int, fewer: int) -> Floats:
    """Return the kernel of ``group`` groups as one of ``fewer`` groups (a divisor), zeros between."""
    if group == fewer:
        return weight
    outputs, inner = weight.shape[:2]
    merged = group // fewer
    result = np.zeros((outputs, inner * merged, *weight.shape[2:]))
    per_group = outputs // group
    for g in range(group):
        place = (g % merged) * inner
        rows = slice(g * per_group, (g + 1) * per_group)
        result[rows, place : place + inner] = weight[rows]
    return result


def identity(channels: int, group: int, axes: int) -> Floats:
    """Return the kernel of one tap that gives every channel as it is."""
    inner = channels // group
    weight = np.zeros((channels, inner, *(1,) * axes))
    weight[np.arange(channels), np.arange(channels) % inner] = 1.0
    return weight


def beside(kernels: Sequence[Kernel]) -> Kernel | None:
    """Return the one kernel that gives the sum of what ``kernels`` give for the same input.

    Returns:
        The kernel over the smallest window that holds all; None when strides, dilations, groups,
        outputs or the lengths of the results differ, or the taps lie between each other's.
    """
    first = kernels[0]
    axes = len(first.strides)
    for k in kernels[1:]:
        same = (k.strides, k.group, k.gains) == (first.strides, first.group, first.gains)
        if not same or k.weight.shape[:2] != first.weight.shape[:2]:
            return None
    begins, window, dilations = [], [], []
    for axis in range(axes):
        wide = {k.dilations[axis] for k in kernels if k.window[axis] > 1}
        if len(wide) > 1:
            return None
        step = wide.pop() if wide else 1
        starts = [-k.begins[axis] for k in kernels]
        if any((s - starts[0]) % step for s in starts):
            return None
        stop = max(s + step * k.window[axis] for s, k in zip(starts, kernels, strict=True))
        begins.append(-min(starts))
        window.append((stop - min(starts)) // step)
        dilations.append(step)
    total = np.zeros((*first.weight.shape[:2], *window))
    for k in kernels:
        places = [(b - o) // d for b, o, d in zip(begins, k.begins, dilations, strict=True)]
        taps = tuple(slice(p, p + n) for p, n in zip(places, k.window, strict=True))
        total[(slice(None), slice(None), *taps)] += k.weight
    ends = tuple(
        g - b + d * (n - 1)
        for g, b, d, n in zip(first.gains, begins, dilations, window, strict=True)
    )
    if any(n < 0 for n in (*begins, *ends)):
        return None
    return Kernel(total, first.strides, tuple(dilations), tuple(begins), ends, first.group)


def in_a_row(first: Kernel, second: Kernel) -> Kernel:
    """Return the one kernel that does what ``second`` does to the result of ``first``.

    ``second`` must not pad, or ``first`` must be of one tap, stride 1 and without padding. Biases are
    not looked at: with padding in ``second`` the first one must have none.

    Raises:
        ValueError: neither holds.
    """
    pads = any((*second.begins, *second.ends))
    plain = {*first.window, *first.strides} == {1} and not any((*first.begins, *first.ends))
    if pads and not plain:
        raise ValueError("the second convolution pads the result of the first")
    group = math.gcd(first.group, second.group)
    a = regrouped(first.weight, first.group, group)
    b = regrouped(second.weight, second.group, group)
    steps, window = [], []
    for axis in range(len(first.strides)):
        k1, k2 = first.window[axis], second.window[axis]
        d1, d2 = first.dilations[axis], first.strides[axis] * second.dilations[axis]
        step = math.gcd(d1 if k1 > 1 else 0, d2 if k2 > 1 else 0) or 1
        ones, twos = d1 * (k1 > 1) // step, d2 * (k2 > 1) // step
        steps.append((step, ones, twos))
        window.append(ones * (k1 - 1) + twos * (k2 - 1) + 1)
    inputs, outputs, middle = a.shape[1], b.shape[0] // group, b.shape[1]
    weight = np.zeros((group, outputs, inputs, *window))
    left = b.reshape(group, outputs, middle, *second.window)
    right = a.reshape(group, middle, inputs, *first.window)
    for t2 in itertools.product(*map(range, second.window)):
        # the taps of the first, as often as its dilation says, moved by the tap of the second
        taps = tuple(
            slice(twos * t, twos * t + ones * (n - 1) + 1, max(ones, 1))
            for (_, ones, twos), t, n in zip(steps, t2, first.window, strict=True)
        )
        at: Any = (slice(None), slice(None), slice(None), *t2)
        product = _product(left[at], right)
        weight[(slice(None), slice(None), slice(None), *taps)] += product
    pairs = (first.strides, second.strides)
    begins = second.begins if pads else first.begins
    ends = second.ends if pads else first.ends
    return Kernel(
        weight.reshape(group * outputs, inputs, *window),
        tuple(s1 * s2 for s1, s2 in zip(*pairs, strict=True)),
        tuple(step for step, _, _ in steps),
        begins,
        ends,
        group,
    )


def _product(left: Floats, right: Floats) -> Floats:
    """[g, o, m] by [g, m, i, *taps] -> [g, o, i, *taps]."""
    flat = right.reshape(*right.shape[:2], -1)
    result: Floats = left @ flat
    return result.reshape(*left.shape[:2], *right.shape[2:])


def bias_behind(bias: Floats, second: Kernel) -> Floats:
    """Return what a number per channel of its input adds to the results of ``second``, which does not pad."""
    outputs = second.weight.shape[0]
    dense = second.weight.reshape(*second.weight.shape[:2], -1).sum(2)
    per_group = bias.reshape(second.group, -1)
    rows = np.repeat(np.arange(second.group), outputs // second.group)
    result: Floats = (dense * per_group[rows]).sum(1)
    return result
