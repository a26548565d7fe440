"""Adds nodes in front of a given one, in the dialect of the model's opset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from effdl.graph.weights import Array, Names, add_initializer

Attribute = int | float | str | Sequence[int]
_FEW = 1 << 16


@dataclass
class Builder:
    """Adds nodes to one graph.

    Args:
        graph: where nodes and constants go; not the body of a function, which holds no constants.
        names: of the model.
        opset: of the default domain.
        before: new nodes go in front of this one.
    """

    graph: ir.Graph
    names: Names
    opset: int
    before: ir.Node | None = None
    _constants: dict[tuple[str, bytes], ir.Value] = field(default_factory=dict)

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        base: str | None,
        attributes: Mapping[str, Attribute] | None = None,
        domain: str = "",
        outputs: int = 1,
    ) -> ir.Value:
        """Add a node and return its first output; names are made from ``base``."""
        stem = base or op_type
        node = ir.node(
            op_type,
            inputs,
            dict(attributes or {}),
            domain=domain,
            name=self.names.fresh(f"{stem}_{op_type}"),
            num_outputs=outputs,
        )
        for output in node.outputs:
            output.name = self.names.fresh(f"{stem}_{op_type}_out")
        assert self.before is not None
        self.graph.insert_before(self.before, node)
        return node.outputs[0]

    def constant(self, array: Array, base: str) -> ir.Value:
        """Return an initializer with this content, one for all that ask for the same few numbers."""
        if array.nbytes > _FEW:
            return add_initializer(self.graph, self.names, base, array)
        key = (f"{array.dtype}{array.shape}", array.tobytes())
        if key not in self._constants:
            self._constants[key] = add_initializer(self.graph, self.names, base, array)
        return self._constants[key]

    def ints(self, *numbers: int) -> ir.Value:
        """Return a constant vector of integers."""
        return self.constant(np.array(numbers, np.int64), "shape")

    def number(self, value: float) -> ir.Value:
        """Return a constant float32 without axes."""
        return self.constant(np.array(value, np.float32), "number")

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """Return the length of one axis of ``value`` as a vector of one."""
        if self.opset >= 15:
            return self.op("Shape", [value], value.name, {"start": axis, "end": axis + 1})
        shape = self.op("Shape", [value], value.name)
        return self.op("Gather", [shape, self.ints(axis)], value.name, {"axis": 0})

    def concat(self, parts: Sequence[ir.Value]) -> ir.Value:
        """Return vectors one after the other, a constant where all of them are."""
        arrays = [p.const_value for p in parts]
        if all(a is not None for a in arrays):
            return self.ints(*(int(i) for a in arrays if a is not None for i in a.numpy()))
        return self.op("Concat", list(parts), "sizes", {"axis": 0})

    def unsqueeze(self, value: ir.Value, axes: Iterable[int]) -> ir.Value:
        """Return ``value`` with axes of length 1 added."""
        return self._with_axes("Unsqueeze", value, axes, 13)

    def squeeze(self, value: ir.Value, *axes: int) -> ir.Value:
        """Return ``value`` without these axes of length 1."""
        return self._with_axes("Squeeze", value, axes, 13)

    def reduce(self, op_type: str, value: ir.Value, *axes: int) -> ir.Value:
        """Return ``value`` reduced over ``axes``, which stay with length 1."""
        since = 13 if op_type == "ReduceSum" else 18
        return self._with_axes(op_type, value, axes, since, {"keepdims": 1})

    def _with_axes(
        self,
        op_type: str,
        value: ir.Value,
        axes: Iterable[int],
        since: int,
        attributes: Mapping[str, Attribute] | None = None,
    ) -> ir.Value:
        """Add a node whose axes became an input with opset ``since``."""
        numbers = tuple(axes)
        own = dict(attributes or {})
        if self.opset >= since:
            return self.op(op_type, [value, self.ints(*numbers)], value.name, own)
        return self.op(op_type, [value], value.name, {**own, "axes": numbers})
