"""Where the elements of a value come from, through operators that only move them.

A chain of Reshape, Transpose, Split and the like is followed with numbers: an array that holds the
position of every element is sent through it at the shapes of each probe. Whatever way an exporter
writes the split into attention heads, the positions that arrive are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.edit import has_reference
from effdl.graph.match import keeps_rank, split_scalar
from effdl.graph.probes import Probes
from effdl.graph.walk import int_attr, ints_attr, is_op
from effdl.graph.weights import constant, scalar

Positions = npt.NDArray[np.int32]
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_MOVES = (*_VIEWS, "Transpose", "Split", "Slice", "Gather", "Expand", "Identity")
_MOST = 64
_LARGEST = 1 << 27
_TO_THE_END = 2**31 - 1


@dataclass(frozen=True)
class Origin:
    """A value that another one is made from by moving elements and multiplying with a number.

    Args:
        value: the origin.
        path: the outputs of the nodes on the way, the last one is the value that was traced.
        scale: the product of the numbers on the way.
    """

    value: ir.Value
    path: tuple[ir.Value, ...]
    scale: float

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The nodes on the way, in order."""
        return tuple(n for v in self.path if (n := v.producer()) is not None)


def origins(value: ir.Value, probes: Probes) -> Iterator[Origin]:
    """Yield ``value`` itself, then what it is made from by moving elements, nearest first."""
    path: tuple[ir.Value, ...] = ()
    scale = 1.0
    yield Origin(value, path, scale)
    for _ in range(_MOST):
        node = value.producer()
        if node is None or has_reference(node):
            return
        number = factor(node, probes)
        if number is not None:
            source, times = number
            scale *= times
        elif is_op(node, *_MOVES) and node.inputs and node.inputs[0] is not None:
            source = node.inputs[0]
        else:
            return
        path = (value, *path)
        value = source
        yield Origin(value, path, scale)


def factor(node: ir.Node, probes: Probes) -> tuple[ir.Value, float] | None:
    """Return (operand, number) where ``node`` multiplies its operand with a number, else None."""
    if not is_op(node, "Mul", "Div"):
        return None
    found = split_scalar(node)
    if found is None:
        return None
    data, other = found
    number = scalar(other)
    sizes = probes.of(data)
    rank = None if sizes is None else len(sizes[0])
    if number is None or not keeps_rank(other, rank):
        return None
    if is_op(node, "Div"):
        return (data, 1.0 / number) if node.inputs[0] is data and number else None
    return data, number


def positions(origin: Origin, probes: Probes) -> list[Positions] | None:
    """Return for each probe the position in ``origin.value`` of every element of the traced value.

    None when a shape is not known or too large to be worth it, or when an operator on the way cannot
    be followed.
    """
    sizes = probes.of(origin.value)
    if sizes is None or not all(0 < prod(s) <= _LARGEST for s in sizes):
        return None
    found = [np.arange(np.prod(s), dtype=np.int32).reshape(s) for s in sizes]
    for value in origin.path:
        moved = move(value, found, probes)
        if moved is None:
            return None
        found = moved
    return found


def move(value: ir.Value, arrays: Sequence[Positions], probes: Probes) -> list[Positions] | None:
    """Return what the node that makes ``value`` does to the positions of its first input."""
    node, goals = value.producer(), probes.of(value)
    if node is None or goals is None:
        return None
    result = []
    for k, (array, goal) in enumerate(zip(arrays, goals, strict=True)):
        moved = _move(node, value, array, goal, k, probes)
        if moved is None or moved.shape != goal:
            return None
        result.append(moved)
    return result


def _move(
    node: ir.Node, value: ir.Value, array: Positions, goal: tuple[int, ...], k: int, probes: Probes
) -> Positions | None:
    if is_op(node, *_VIEWS):
        return array.reshape(goal) if array.size == prod(goal) else None
    if is_op(node, "Transpose"):
        perm = ints_attr(node, "perm") or tuple(range(array.ndim))[::-1]
        return array.transpose(perm)
    if is_op(node, "Split"):
        return _part(node, value, array, k, probes)
    if is_op(node, "Slice"):
        return _slice(node, array, probes)
    if is_op(node, "Gather"):
        where = constant(node.inputs[1])
        axis = int_attr(node, "axis", 0)
        length = array.shape[axis]
        if where is None or where.size == 0 or where.min() < -length or where.max() >= length:
            return None
        return array.take(where.astype(np.int64), axis=axis)
    if is_op(node, "Expand"):
        return np.broadcast_to(array, goal) if array.ndim <= len(goal) else None
    return array  # Identity, or a multiplication with a number


def _part(
    node: ir.Node, value: ir.Value, array: Positions, k: int, probes: Probes
) -> Positions | None:
    """Return the part of a Split that ``value`` is; the parts before it say where it starts."""
    axis, start = int_attr(node, "axis", 0), 0
    for output in node.outputs:
        sizes = probes.axis(output, axis)
        if sizes is None:
            return None
        if output is value:
            return array.take(np.arange(start, start + sizes[k]), axis=axis)
        start += sizes[k]
    return None


def _slice(node: ir.Node, array: Positions, probes: Probes) -> Positions | None:
    starts, ends = _numbers(node, 1, "starts"), _numbers(node, 2, "ends")
    if starts is None or ends is None or len(starts) != len(ends):
        return None
    axes = _numbers(node, 3, "axes", tuple(range(len(starts))))
    steps = _numbers(node, 4, "steps", (1,) * len(starts))
    if axes is None or steps is None or any(s < 1 for s in steps):
        return None
    index = [slice(None)] * array.ndim
    for axis, start, end, stride in zip(axes, starts, ends, steps, strict=True):
        length = array.shape[axis]
        # The first 16 of a length that is 7 at this probe are all of it, but not at every length.
        clamped = not -length <= start <= length or not -length <= end <= length
        to_the_end = -length <= start <= length and end >= _TO_THE_END
        if clamped and not to_the_end and len(set(probes.axis(node.inputs[0], axis) or ())) != 1:
            return None
        index[axis] = slice(start, end, stride)
    return array[tuple(index)]


def _numbers(
    node: ir.Node, index: int, name: str, default: tuple[int, ...] | None = None
) -> tuple[int, ...] | None:
    if name in node.attributes:
        return ints_attr(node, name)
    given = node.inputs[index] if index < len(node.inputs) else None
    if given is None:
        return default
    array = constant(given)
    return None if array is None else tuple(int(i) for i in array.ravel())
