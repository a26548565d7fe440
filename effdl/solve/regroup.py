"""Following a broadcast constant through a change of layout: what it is on the other side of a reshape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Dim = int | str | None
_Group = tuple[int, int, int, int]


def compress(array: Floats) -> Floats:
    """Return ``array`` with every axis along which it does not change reduced to length 1."""
    for axis in range(array.ndim):
        first = array.take([0], axis) if array.shape[axis] > 1 else array
        if array.shape[axis] > 1 and (array == first).all():
            array = first
    return array


def regroup(array: Floats, source: Sequence[Dim], target: Sequence[Dim]) -> Floats | None:
    """Return the constant that meets the elements of a reshaped tensor as ``array`` meets the tensor.

    Dimensions are matched in groups of equal product from the last one on (row-major order), then
    from the first one on where they are the same number or name.

    Args:
        array: broadcasts against a tensor of shape ``source``; same rank.
        source: shape before; names and None are dynamic dimensions.
        target: shape after; it holds the same elements in the same order.

    Returns:
        An array of the rank of ``target``, None when it changes along a dimension that is not followed.
    """
    if not len(source) or not len(target):
        return array.reshape((1,) * len(target)) if array.size == 1 else None
    tail = _from_the_right(source, target)
    i, j = (tail[-1][0], tail[-1][2]) if tail else (len(source), len(target))
    head: list[_Group] = []
    k = 0
    while k < min(i, j) and source[k] == target[k] and source[k] is not None:
        head.append((k, k + 1, k, k + 1))
        k += 1
    if any(n != 1 for n in array.shape[k:i]):
        return None
    full: list[int] = []
    shape: list[int] = []
    for a, b, c, d in [*head, (k, i, k, j), *reversed(tail)]:
        moves = any(n != 1 for n in array.shape[a:b])
        if moves and not all(isinstance(n, int) for n in (*source[a:b], *target[c:d])):
            # one dynamic dimension on each side, the same one: whatever length the array has
            full += array.shape[a:b]
            shape += array.shape[a:b]
            continue
        full += [n if isinstance(n, int) and moves else 1 for n in source[a:b]]
        shape += [n if isinstance(n, int) and moves else 1 for n in target[c:d]]
    try:
        return compress(np.broadcast_to(array, full).reshape(shape))
    except ValueError:
        return None  # it does not fit the tensor: it would make the result larger


def _from_the_right(source: Sequence[Dim], target: Sequence[Dim]) -> list[_Group]:
    groups: list[_Group] = []
    i, j = len(source), len(target)
    while i > 0 and j > 0:
        found = _group(source, target, i, j)
        if found is None:
            break
        groups.append((found[0], i, found[1], j))
        i, j = found
    return groups


def _group(source: Sequence[Dim], target: Sequence[Dim], i: int, j: int) -> tuple[int, int] | None:
    """Return where the shortest group begins that ends before ``i`` and ``j``, None without one."""
    a, b = source[i - 1], target[j - 1]
    i, j = i - 1, j - 1
    if not isinstance(a, int) or not isinstance(b, int):
        return (i, j) if a is not None and a == b else None
    while a != b:
        if 0 in (a, b):
            return None
        if a < b:
            more = source[i - 1] if i > 0 else None
            i -= 1
        else:
            more = target[j - 1] if j > 0 else None
            j -= 1
        if not isinstance(more, int):
            return None
        if a < b:
            a *= more
        else:
            b *= more
    return i, j
