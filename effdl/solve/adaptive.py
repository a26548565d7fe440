"""Adaptive rounding of 8-bit weights: integers chosen for the error at a layer's outputs.

Nearest rounding has the smallest error of each weight, not of their sum: with second moments H of the
inputs, a change D of the weights costs tr(D H D^T) (Nagel et al., Up or Down, 2020, equation 13).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from effdl.solve.blocks import Bounds, Float, Grid, descend, gptq
from effdl.solve.quantize import PAIR_LIMIT

Int8 = npt.NDArray[np.int8]
_ZERO = 128
_SWEEPS = 4


def adaptive_rounding(
    weight: Float, scales: Float, moments: Float, *, saturation_guard: bool = False
) -> Int8:
    """Return symmetric int8 weights whose error at the outputs is at most that of nearest rounding.

    Layers of one group are rounded by GPTQ and coordinate descent after it, those of several (depthwise
    convolutions) by coordinate descent, all groups at a time.

    Args:
        weight: [N, K]; the outputs of a group lie together.
        scales: [N], positive.
        moments: [groups, K, K], of the inputs of each group; centred where a bias takes the mean back.
        saturation_guard: let no two weights of one sign in a row grow beyond what nearest rounding, with
            scales made for it, keeps to: their products with uint8 must fit 16 bits.

    Returns:
        int8, [N, K].
    """
    nearest = np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8)
    low, high = _bounds(nearest, saturation_guard)
    q: npt.NDArray[np.number[Any]]
    if moments.shape[0] == 1:
        grid = Grid(
            scales[:, None].astype(np.float32),
            np.full((len(scales), 1), _ZERO, np.uint8),
            weight.shape[1],
            8,
        )
        bounds: Bounds = (_shifted(low), _shifted(high))
        start = gptq(weight, moments[0], grid, bounds)
        q = descend(weight, start, moments[0], grid, bounds=bounds).astype(np.int16) - _ZERO
    else:
        q = _descend_groups(weight, nearest, scales, moments, low, high)
    error = _errors(weight, q, scales, moments)
    better = (error >= 0) & (error < _errors(weight, nearest, scales, moments))
    return np.where(better[:, None], q, nearest).astype(np.int8)


def shrunk(moments: npt.NDArray[np.float64], rows: int) -> npt.NDArray[np.float64]:
    """Return second moments of few rows with less trust in what lies beside their diagonal.

    Of K inputs, n rows tell the moments with a relative error of about K / n; what is rounded for chance
    agreements of few rows is wrong for all others (shrinkage to the diagonal, Ledoit and Wolf, 2004).

    Args:
        moments: [groups, K, K].
        rows: that they are the mean of.
    """
    width = moments.shape[-1]
    trust = rows / (rows + width)
    diagonal = np.einsum("gkk->gk", moments)
    result: npt.NDArray[np.float64] = moments * trust
    result[:, np.arange(width), np.arange(width)] = diagonal
    return result


def _shifted(q: Int8) -> npt.NDArray[np.uint8]:
    return (q.astype(np.int16) + _ZERO).astype(np.uint8)


def _bounds(nearest: Int8, guard: bool) -> tuple[Int8, Int8]:
    """Return the least and the largest integer of every weight.

    With the guard, only the largest weight of a row may be as large as it is; the others stay below what
    is left beside it.
    """
    low, high = np.full_like(nearest, -127), np.full_like(nearest, 127)
    if guard and nearest.size:
        rows = np.arange(len(nearest))
        for sign, limit in ((1, high), (-1, low)):
            signed = sign * nearest.astype(np.int16)
            place = signed.argmax(1)
            top = np.maximum(signed[rows, place], PAIR_LIMIT // 2)
            limit[:] = sign * np.minimum(PAIR_LIMIT - top, 127)[:, None]
            limit[rows, place] = sign * top
    return np.minimum(low, nearest), np.maximum(high, nearest)


def _descend_groups(
    weight: Float, start: Int8, scales: Float, moments: Float, low: Int8, high: Int8
) -> npt.NDArray[np.float64]:
    """Coordinate descent on all groups at a time; the loop is over the inputs, which are few."""
    groups, width, _ = moments.shape
    shape = (groups, -1, width)
    w = np.asarray(weight, np.float64).reshape(shape)
    q = start.astype(np.float64).reshape(shape)
    least, most = (b.astype(np.float64).reshape(shape) for b in (low, high))
    step = np.asarray(scales, np.float64).reshape(groups, -1)
    gradient = (q * step[..., None] - w) @ moments
    for _ in range(_SWEEPS):
        moved = False
        for k in range(width):
            slope = moments[:, k, k][:, None] * step
            jump = np.divide(gradient[..., k], slope, out=np.zeros_like(slope), where=slope > 0)
            new = np.clip(np.rint(q[..., k] - jump), least[..., k], most[..., k])
            change = (new - q[..., k]) * step
            if change.any():
                moved = True
                q[..., k] = new
                gradient += change[..., None] * moments[:, k, None, :]
        if not moved:
            break
    return q.reshape(weight.shape)


def _errors(
    weight: Float, q: npt.NDArray[np.number[Any]], scales: Float, moments: Float
) -> npt.NDArray[np.float64]:
    """Return the squared error at every output, [N]."""
    groups, width, _ = moments.shape
    change = (q * np.asarray(scales, np.float64)[:, None] - weight).reshape(groups, -1, width)
    error: npt.NDArray[np.float64] = ((change @ moments) * change).sum(2).reshape(-1)
    return error
