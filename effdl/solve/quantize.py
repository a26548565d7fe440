"""Affine 8-bit quantization exactly as ONNX's QuantizeLinear defines it, and its parameters."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Int = npt.NDArray[np.integer[Any]]
WeightMethod = Literal["absmax", "mse"]

_CLIPS = np.linspace(1.0, 0.5, 51)
_TINY = float(np.finfo(np.float32).tiny)
_BIAS_LIMIT = 2.0**30
"""Half of int32, so that the bias and the sum of products together do not overflow."""
_BLOCK = 1 << 22
"""Elements converted at a time: a weight of gigabytes needs no float copy of itself."""
PAIR_LIMIT = 32767 // 255
"""What two neighbouring 8-bit weights may sum to where u8 x s8 products meet in 16 bits."""


def affine_parameters(
    low: float, high: float, dtype: npt.DTypeLike, *, symmetric: bool = False
) -> tuple[np.float32, int]:
    """Return scale and zero point of the grid of ``dtype`` that spans [low, high] and contains 0.

    Args:
        low: at most 0 (else 0 is taken); ``high``: at least 0.
        dtype: uint8 or int8 (or a wider integer).
        symmetric: the zero point is the middle: 0 for signed types.
    """
    info = np.iinfo(dtype)
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if symmetric:
        middle = 0 if info.min < 0 else (int(info.max) + 1) // 2
        return _positive(max(-low, high) / (info.max - middle)), middle
    scale = _positive((high - low) / (int(info.max) - int(info.min)))
    zero = int(np.clip(np.rint(info.min - low / float(scale)), info.min, info.max))
    return scale, zero


def _positive(scale: float) -> np.float32:
    return np.float32(scale) if scale > _TINY else np.float32(1.0)


def quantize(x: Any, scale: Any, zero_point: Any, dtype: npt.DTypeLike, axis: int = 0) -> Int:
    """Return round-half-to-even(x / scale) + zero_point, saturated to ``dtype``.

    Args:
        x: numbers, any shape.
        scale: one number, or one per index of ``axis``; ``zero_point`` likewise.
        dtype: the integer type.
        axis: the axis of per-axis parameters.
    """
    x = np.asarray(x, np.float32)
    scale = _along(np.asarray(scale, np.float32), x.ndim, axis)
    zero_point = _along(np.asarray(zero_point, np.float32), x.ndim, axis)
    if x.size <= _BLOCK or x.ndim == 0:
        return _quantize(x, scale, zero_point, dtype)
    result: Int = np.empty(x.shape, dtype)
    rows = max(1, _BLOCK * x.shape[0] // x.size)
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        s = scale[part] if scale.ndim and scale.shape[0] > 1 else scale
        z = zero_point[part] if zero_point.ndim and zero_point.shape[0] > 1 else zero_point
        result[part] = _quantize(x[part], s, z, dtype)
    return result


def _quantize(x: Float, scale: Float, zero_point: Float, dtype: npt.DTypeLike) -> Int:
    info = np.iinfo(dtype)
    steps = np.rint(x / scale) + zero_point
    # float32 holds 2**31 but not 2**31 - 1, hence float64 for 32-bit types.
    wide = steps.astype(np.float64) if info.bits > 16 else steps
    result: Int = np.clip(wide, info.min, info.max).astype(dtype)
    return result


def dequantize(q: Int, scale: Any, zero_point: Any, axis: int = 0) -> Float:
    """Return (q - zero_point) * scale in float32; the arguments are those of ``quantize``."""
    difference = q.astype(np.int32) - _along(np.asarray(zero_point, np.int32), q.ndim, axis)
    result: Float = difference.astype(np.float32) * _along(
        np.asarray(scale, np.float32), q.ndim, axis
    )
    return result


def _along(parameter: npt.NDArray[Any], ndim: int, axis: int) -> npt.NDArray[Any]:
    if parameter.ndim == 0:
        return parameter
    shape = [1] * ndim
    shape[axis] = parameter.size
    return parameter.reshape(shape)


def weight_scales(
    weight: Float,
    axis: int | None,
    *,
    method: WeightMethod = "absmax",
    saturation_guard: bool = False,
    full_scale: int = 127,
) -> Float:
    """Return the scales of symmetric int8 weights, one per index of ``axis`` (one, for None).

    Args:
        weight: the weights, any shape.
        axis: the output-channel axis.
        method: ``absmax`` spans the largest weight; ``mse`` clips where that lowers the squared
            error (grid over clip factors 0.5 to 1).
        saturation_guard: enlarge the scale until no two weights of a channel can overflow the
            16-bit sum of two u8 x s8 products (x86 before VNNI).
        full_scale: the integer that the largest weight gets; 64 for a 7-bit range.

    Returns:
        float32 array, 0-d for axis None.
    """
    scale = _largest(weight, axis) / np.float32(full_scale)
    if method == "mse":
        scale = scale * _best_clip(_rows(weight, axis), scale, full_scale)
    if saturation_guard:
        scale = np.maximum(scale, _largest_pair(_rows(weight, axis)) / np.float32(PAIR_LIMIT - 1))
    scale = np.where(scale > _TINY, scale, np.float32(1.0)).astype(np.float32)
    return scale.reshape(()) if axis is None else scale


def _largest(weight: Float, axis: int | None) -> Float:
    """The largest magnitude per channel, without a copy of the weight."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    high, low = weight.max(axis=others, initial=0.0), weight.min(axis=others, initial=0.0)
    largest: Float = np.atleast_1d(np.maximum(high, -low)).astype(np.float32)
    return largest


def _rows(weight: Float, axis: int | None) -> Float:
    if axis is None:
        return weight.reshape(1, -1)
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def _best_clip(rows: Float, scale: Float, full_scale: int) -> Float:
    best = np.ones_like(scale)
    lowest = np.full(scale.shape, np.inf, np.float32)
    for clip in _CLIPS:
        step = np.maximum(scale * np.float32(clip), np.float32(_TINY))[:, None]
        error = np.clip(np.rint(rows / step), -full_scale, full_scale)
        error *= step
        error -= rows
        total = np.einsum("ij,ij->i", error, error)
        better = total < lowest
        lowest = np.where(better, total, lowest)
        best = np.where(better, np.float32(clip), best)
    return best


def _largest_pair(rows: Float) -> Float:
    """The largest |a + b| over two weights of one sign in a row: which two meet is not known."""
    if rows.shape[1] < 2:
        alone: Float = np.abs(rows).max(axis=1, initial=0.0)
        return alone
    top = np.maximum(np.partition(rows, -2, axis=1)[:, -2:], 0).sum(axis=1)
    bottom = np.minimum(np.partition(rows, 1, axis=1)[:, :2], 0).sum(axis=1)
    pair: Float = np.maximum(top, -bottom)
    return pair


def bias_scale_floor(bias: Float, input_scale: float) -> Float:
    """Return the smallest weight scale per channel with which the int32 bias cannot overflow."""
    return (np.abs(bias, dtype=np.float64) / (float(input_scale) * _BIAS_LIMIT)).astype(np.float32)


def mean_shift(change: Float, mean: Any) -> npt.NDArray[np.float64]:
    """Return by how much a change of weights moves the mean of each output.

    Args:
        change: [N, K], new weights minus old ones.
        mean: [groups, K], the mean of what they are multiplied with; outputs come group after group.
    """
    groups, width = mean.shape
    parts = change.astype(np.float64).reshape(groups, -1, width)
    shift: npt.NDArray[np.float64] = np.einsum("gnk,gk->gn", parts, mean).reshape(-1)
    return shift


def quantize_bias(bias: Float, input_scale: float, scales: Float) -> tuple[Int, Float]:
    """Return the int32 bias and its scales, input scale times weight scale.

    Args:
        bias: float, one per output channel.
        input_scale: scale of the layer's input.
        scales: scales of its weights, one per output channel or one for all.
    """
    scale = (np.float32(input_scale) * scales).astype(np.float32)
    scale = np.broadcast_to(scale, bias.shape)
    wide = np.rint(bias.astype(np.float64) / np.maximum(scale.astype(np.float64), 1e-300))
    limits = np.iinfo(np.int32)
    return np.clip(wide, limits.min, limits.max).astype(np.int32), np.array(scale)
