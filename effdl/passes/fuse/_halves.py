"""Halves of the last axis: two pieces of one value, tables that repeat themselves."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effdl.graph.dims import Dims
from effdl.graph.shapes import Shapes
from effdl.graph.walk import int_attr, is_op, producer
from effdl.graph.weights import constant, scalar

_STEPS = 12


def halves_of(
    second: ir.Value | None, first: ir.Value | None, shapes: Shapes
) -> tuple[ir.Value, int, tuple[ir.Node, ...]] | None:
    """Return (value, size, nodes) when both are the halves of one value's last axis, in that order."""
    a, b = producer(first), producer(second)
    if a is None or b is None or first is None or second is None:
        return None
    x = a.inputs[0] if a.inputs else None
    dims = shapes.of(x)
    if x is None or dims is None or not b.inputs or b.inputs[0] is not x:
        return None
    size = dims[-1]
    if not isinstance(size, int) or size % 2:
        return None
    if a is b:
        last = int_attr(a, "axis", 0) in (-1, len(dims) - 1)
        ordered = list(a.outputs) == [first, second]
        halved = shapes.of(first) is not None and (shapes.of(first) or ())[-1] == size // 2
        fits = is_op(a, "Split") and last and ordered and halved
        return (x, size, (a,)) if fits else None
    pieces = _piece(a, len(dims), size), _piece(b, len(dims), size)
    return (x, size, (a, b)) if pieces == ((0, size // 2), (size // 2, size)) else None


def _piece(node: ir.Node, rank: int, size: int) -> tuple[int, int] | None:
    """Return the range of the last axis that a Slice of this axis alone takes."""
    if not is_op(node, "Slice") or len(node.inputs) < 4:
        return None
    given = [constant(v) for v in node.inputs[1:]]
    if any(a is None or a.size != 1 for a in given):
        return None
    numbers = [int(a.reshape(-1)[0]) for a in given if a is not None]
    start, end, axis = numbers[:3]
    if axis not in (-1, rank - 1) or (len(numbers) > 3 and numbers[3] != 1):
        return None
    start, end = (n + size if n < 0 else n for n in (start, end))
    return max(start, 0), min(end, size)


def equal_halves(table: ir.Value, shapes: Shapes) -> bool:
    """Whether the second half of the last axis of ``table`` repeats the first, for every input."""
    for _ in range(_STEPS):
        array = constant(table)
        if array is not None:
            half = array.shape[-1] // 2
            return bool(np.array_equal(array[..., :half], array[..., half:]))
        node = table.producer()
        if node is None or node.inputs[0] is None:
            return False
        if is_op(node, "Concat"):
            return _doubles(node, shapes)
        numbers = [v for v in node.inputs[1:] if scalar(v) is None]
        if is_op(node, "Mul", "Div") and numbers:
            return False
        kept = is_op(node, "Unsqueeze") and _before_last(node, shapes)
        if not kept and not is_op(node, "Cos", "Sin", "Cast", "Identity", "Mul", "Div"):
            return False
        table = node.inputs[0]
    return False


def _doubles(node: ir.Node, shapes: Shapes) -> bool:
    """Whether ``node`` joins a value with itself along the last axis."""
    dims = shapes.of(node.outputs[0])
    last = (-1,) if dims is None else (-1, len(dims) - 1)
    twice = len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
    return twice and int_attr(node, "axis", 0) in last


def _before_last(node: ir.Node, shapes: Shapes) -> bool:
    """Whether an Unsqueeze leaves the last axis where it is."""
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    dims = shapes.of(node.outputs[0])
    if axes is None or dims is None:
        return False
    return all(int(a) % len(dims) != len(dims) - 1 for a in axes.ravel())


def length_of(table: ir.Value, shapes: Shapes) -> int | str | None:
    """Return the dimension that the positions of ``table`` count, None when it is not known.

    A table that is made of a Range from zero alone, by operations on single elements and constants,
    has as many rows as the Range has numbers.
    """
    value: ir.Value | None = table
    for _ in range(_STEPS):
        node = producer(value)
        if node is None:
            return None
        if is_op(node, "Range"):
            ones = scalar(node.inputs[0]) == 0 and scalar(node.inputs[2]) == 1
            return _dimension(node.inputs[1], shapes) if ones else None
        computed = [v for v in dict.fromkeys(node.inputs) if v is not None and constant(v) is None]
        known = is_op(node, "Cos", "Sin", "Cast", "Mul", "Div", "Unsqueeze", "Identity")
        known = known or (is_op(node, "Concat") and _doubles(node, shapes))
        if not known or len(computed) != 1:
            return None
        value = computed[0]
    return None


def _dimension(value: ir.Value | None, shapes: Shapes) -> int | str | None:
    """Return the dimension that ``value`` is computed from: an element of a Shape."""
    index: int | None = None
    for _ in range(_STEPS):
        node = producer(value)
        if node is None:
            return None
        if is_op(node, "Gather") and index is None:
            number = scalar(node.inputs[1])
            if number is None:
                return None
            index = int(number)
        elif is_op(node, "Shape"):
            return _element(shapes.of(node.inputs[0]), node, index)
        elif not is_op(node, "Squeeze", "Cast", "Identity", "Unsqueeze", "Reshape"):
            return None
        value = node.inputs[0]
    return None


def _element(dims: Dims | None, node: ir.Node, index: int | None) -> int | str | None:
    if dims is None:
        return None
    start = int_attr(node, "start", 0)
    end = int_attr(node, "end", len(dims))
    taken = dims[start:end]
    if index is None:
        return taken[0] if len(taken) == 1 else None
    return taken[index] if -len(taken) <= index < len(taken) else None
