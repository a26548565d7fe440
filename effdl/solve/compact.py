"""Exact short forms of arrays: few distinct values, integers times a scale, the parts of floats.

Everything here is bit for bit: what is put together again has the same bits, signs of zeros included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
BYTE = 256
_LOOK = 4096
"""Numbers that are looked at first: where these differ too much, all do."""
_TOP = 127
"""The largest 8-bit integer of a grid."""


@dataclass(frozen=True)
class Symbols:
    """An array as entries of codebooks.

    Args:
        codes: [groups, n], uint8.
        books: [groups, k], of the array's type, the most frequent entries first, so that the codes of
            different arrays look alike to a compressor; short ones are filled up with their last entry.
    """

    codes: Bytes
    books: Array


def symbols(array: Array, groups: int = 1) -> Symbols | None:
    """Return an array as entries of ``groups`` codebooks, None where one has more than 256.

    Args:
        array: floats; its first axis is cut into ``groups`` runs.
        groups: divides the length of the first axis.
    """
    bits = _bits(array).reshape(groups, -1)
    if any(len(np.unique(part[:_LOOK])) > BYTE for part in bits[:: max(1, groups // 8)]):
        return None
    found: list[tuple[Array, Array]] = []
    for part in bits:
        values, codes, counts = np.unique(part, return_inverse=True, return_counts=True)
        if len(values) > BYTE:
            return None
        order = np.argsort(-counts, kind="stable")
        rank = np.argsort(order).astype(np.uint8)
        found.append((values[order], rank[codes]))
    k = max(len(v) for v, _ in found)
    books = np.stack([np.pad(v, (0, k - len(v)), mode="edge") for v, _ in found])
    return Symbols(np.stack([c for _, c in found]), books.view(array.dtype))


def _bits(array: Array) -> Array:
    """Return the bit patterns of floats as unsigned integers."""
    return np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))


def per_byte(k: int) -> int:
    """Return how many symbols below ``k`` a byte holds."""
    count = 1
    while k > 1 and count < 8 and k ** (count + 1) <= BYTE:
        count += 1
    return count


def radix(k: int) -> int:
    """Return the most symbols of which a byte holds as many as of ``k``: few different tables do for all."""
    return int(BYTE ** (1 / per_byte(k)) + 1e-9) if k > 1 else 2


def join(codes: Bytes, k: int) -> Bytes:
    """Return a vector of symbols below ``k``, as many in a byte as it holds; zeros fill the last."""
    count = per_byte(k)
    rows = np.pad(codes, (0, -len(codes) % count)).reshape(-1, count)
    places = (k ** np.arange(count - 1, -1, -1)).astype(np.uint8)
    joined: Bytes = (rows * places).sum(1, dtype=np.uint8)
    return joined


def digits(k: int) -> Bytes:
    """Return the symbols of every byte that ``join`` makes, [k^count, count]."""
    count = per_byte(k)
    places = k ** np.arange(count - 1, -1, -1)
    table: Bytes = (np.arange(k**count)[:, None] // places % k).astype(np.uint8)
    return table


def bitmap(mask: npt.NDArray[np.bool_]) -> Bytes:
    """Return a vector of truths, eight in a byte, as ``join`` writes two symbols."""
    return np.packbits(mask)


@dataclass(frozen=True)
class Grid:
    """Integers times a scale.

    Args:
        integers: int8, in the shape of the array.
        scale: float32, one number for each index of the axis, or one for all.
    """

    integers: npt.NDArray[np.int8]
    scale: Floats


def grid(array: Floats, axis: int | None) -> Grid | None:
    """Return integers and scales whose float32 products are exactly ``array``, None where there are none.

    Args:
        array: float32.
        axis: of the scales; None for one scale.
    """
    parts = array.reshape(1, -1) if axis is None else np.moveaxis(array, axis, 0)
    scales = np.empty(len(parts), np.float32)
    for k, part in enumerate(parts):
        scale = _scale(part)
        if scale is None:
            return None
        scales[k] = scale
    wide = scales if axis is None else scales.reshape([-1] + [1] * (array.ndim - 1 - axis))
    integers = np.rint(array / wide).astype(np.int8)
    back = integers.astype(np.float32) * wide
    return Grid(integers, scales) if np.array_equal(_bits(back), _bits(array)) else None


def _scale(values: Floats) -> np.float32 | None:
    """Return the largest scale on whose grid of 8-bit integers all values lie exactly."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if len(np.unique(flat[:_LOOK])) > 2 * _TOP + 1:
        return None
    u = np.unique(flat)
    largest = np.float32(np.abs(u).max(initial=0.0))
    if len(u) > 2 * _TOP + 1 or not np.isfinite(largest):
        return None
    if largest < np.finfo(np.float32).tiny * _TOP:
        return np.float32(1.0) if largest == 0 else None
    near = (largest / np.arange(1, _TOP + 1, dtype=np.float64)).astype(np.float32)
    scales = np.stack(
        (near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(1e38)))
    )
    tried = scales.T.reshape(-1, 1)
    steps = np.rint(u / tried)
    fits = ((steps * tried == u) & (np.abs(steps) <= _TOP)).all(1)
    return np.float32(tried[np.argmax(fits), 0]) if fits.any() else None


@dataclass(frozen=True)
class Planes:
    """float32 numbers taken apart: sign * (2^23 + mantissa) * 2^(exponent - 150).

    Args:
        low: uint16, the lower bits of the mantissa.
        high: uint8, the sign and the 7 upper bits of the mantissa.
        exponent: uint8, as stored; 0 for zeros.
    """

    low: npt.NDArray[np.uint16]
    high: Bytes
    exponent: Bytes


_LEAST_EXPONENT = 32
"""From here on the powers of two that parts are multiplied with are normal numbers."""


def planes(array: Floats) -> Planes | None:
    """Return float32 numbers taken apart, None where some are not finite or very small."""
    bits = _bits(array)
    exponent = (bits >> 23 & 0xFF).astype(np.uint8)
    zero = (bits & 0x7FFFFFFF) == 0
    if not ((exponent >= _LEAST_EXPONENT) & (exponent < 255) | zero).all():
        return None
    low = (bits & 0xFFFF).astype(np.uint16)
    high = ((bits >> 16 & 0x7F) | (bits >> 31 << 7)).astype(np.uint8)
    return Planes(low, high, exponent)


def plane_tables() -> tuple[Floats, Floats, Floats]:
    """Return by byte: the upper part of the mantissa, the sign, and the power of two of an exponent.

    ``(upper[high] + low) * sign[high] * power[exponent]`` is the number, each step exact in float32.
    """
    byte = np.arange(BYTE)
    upper = ((128 + (byte & 127)) * 65536).astype(np.float32)
    sign = np.where(byte < 128, 1, -1).astype(np.float32)
    power = np.ldexp(1.0, byte - 150)
    power[:_LEAST_EXPONENT] = power[255] = 0.0
    return upper, sign, power.astype(np.float32)
