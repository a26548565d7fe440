"""Tensors that hold one number everywhere, whatever their shape: masks that mask nothing, added zeros."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effdl.graph.edit import has_reference
from effdl.graph.walk import int_attr, is_op
from effdl.graph.weights import constant_tensor

_LIMIT = 1 << 16
_SAME_NUMBERS = """
Expand Flatten Identity Reshape Slice Squeeze Tile Transpose Unsqueeze
"""
_MOVERS = tuple(_SAME_NUMBERS.split())
_DEPTH = 24
_CASTS = (
    ir.DataType.BOOL,
    ir.DataType.FLOAT,
    ir.DataType.DOUBLE,
    ir.DataType.INT64,
    ir.DataType.INT32,
)


class Uniform:
    """Finds the one number that a tensor holds; remembers what it found."""

    def __init__(self) -> None:
        self._found: dict[ir.Value, float | None] = {}

    def number(self, value: ir.Value | None, depth: int = 0) -> float | None:
        """Return the number that is at every place of ``value``, None when there may be others.

        Booleans are 0 and 1. A tensor without elements has the number as well as any other.
        """
        if value is None or depth > _DEPTH:
            return None
        if value not in self._found:
            self._found[value] = self._work_out(value, depth + 1)
        return self._found[value]

    def _work_out(self, value: ir.Value, depth: int) -> float | None:
        tensor = constant_tensor(value)
        if tensor is not None:
            return _of_tensor(tensor)
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx") or has_reference(node):
            return None
        if is_op(node, *_MOVERS):
            return self.number(node.inputs[0], depth)
        if is_op(node, "ConstantOfShape"):
            fill = node.attributes.get("value")
            return 0.0 if fill is None else _of_tensor(fill.as_tensor())
        return self._computed(node, depth)

    def _computed(self, node: ir.Node, depth: int) -> float | None:
        numbers = [self.number(v, depth) for v in node.inputs]
        if is_op(node, "Where") and numbers[0] is not None:
            return numbers[1] if numbers[0] else numbers[2]
        if is_op(node, "Cast") and numbers[0] is not None:
            goal = ir.DataType(int_attr(node, "to", 0))
            # 0 and 1 are themselves in every type.
            return numbers[0] if goal in _CASTS and numbers[0] in (0, 1) else None
        if is_op(node, "Not"):
            return None if numbers[0] is None else float(not numbers[0])
        if is_op(node, "And"):
            return _logical(numbers, deciding=0.0)
        if is_op(node, "Or"):
            return _logical(numbers, deciding=1.0)
        return None


def _logical(numbers: list[float | None], *, deciding: float) -> float | None:
    """And, Or: one number can decide alone; all together when each is known."""
    if deciding in numbers:
        return deciding
    return None if None in numbers else 1.0 - deciding


def _of_tensor(tensor: ir.TensorProtocol) -> float | None:
    if tensor.dtype == ir.DataType.STRING or not 0 < tensor.size <= _LIMIT:
        return None
    array = tensor.numpy()
    if array.dtype.kind not in "fiub":
        return None
    first = array.reshape(-1)[0]
    number = float(first)
    # NaN is not equal to itself; an integer that a double cannot hold is told as unknown.
    exact = array.dtype.kind in "fb" or int(number) == int(first)
    return number if exact and bool(np.all(array == first)) else None
