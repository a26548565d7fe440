"""Shape arithmetic that has to stay: each vector of sizes is made once, with as few nodes as can be."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from effdl.graph.dedup import Report
from effdl.graph.edit import can_forward, forward, has_reference, remove_if_unused, roots
from effdl.graph.elements import Facts
from effdl.graph.shapes import Shapes
from effdl.graph.symbols import Element, Elements
from effdl.graph.walk import is_op, subgraphs_of
from effdl.graph.weights import Array, Names

_PARTS_SINCE = 15
"""The opset from which Shape has start and end."""
_SOURCES = 64


def merge_vectors(
    model: ir.Model, shapes: Shapes, known: dict[ir.Value, Array], touch: Report
) -> int:
    """Let equal shape vectors be one, and take sizes straight from a Shape; returns the rewrites.

    Two vectors are equal when each element is the same number or the size of the same dynamic
    dimension, however they were worked out.
    """
    changes = 0
    names = Names(model)
    for root, imports, _ in roots(model):
        opset = imports.get("", imports.get("ai.onnx", 0))
        merger = _Merger(Facts(shapes, known), names, opset, touch)
        changes += merger.run(root, _Seen())
    return changes


@dataclass
class _Seen:
    """What the nodes so far made available: vectors by content, tensors by the sizes of their axes."""

    vectors: dict[Elements, ir.Value] = field(default_factory=dict)
    sources: list[tuple[ir.Value, tuple[Element, ...]]] = field(default_factory=list)

    def inner(self) -> _Seen:
        return _Seen(dict(self.vectors), list(self.sources))


@dataclass
class _Merger:
    facts: Facts
    names: Names
    opset: int
    touch: Report

    def run(self, graph: ir.Graph, seen: _Seen) -> int:
        changes = 0
        for value in graph.inputs:
            self._offer(value, seen)
        for node in list(graph):
            self.facts.visit(node)
            for inner in subgraphs_of(node):
                changes += self.run(inner, seen.inner())
            if len(node.outputs) == 1 and not has_reference(node):
                changes += self._settle(node, seen)
        return changes

    def _offer(self, value: ir.Value | None, seen: _Seen) -> None:
        """Remember that sizes can be read off ``value``."""
        dims = self.facts.dims(value)
        if value is None or not dims or all(isinstance(d, int) for d in dims):
            return
        if len(seen.sources) < _SOURCES and all(d != dims for _, d in seen.sources):
            seen.sources.append((value, dims))

    def _settle(self, node: ir.Node, seen: _Seen) -> int:
        output = node.outputs[0]
        elements = self.facts.found(output)
        if elements is None or all(isinstance(i, int) for i in elements.items):
            return 0
        earlier = seen.vectors.get(elements)
        if earlier is not None and can_forward(output, earlier):
            forward(output, earlier)
            remove_if_unused(node)
            self.touch(node, f"the same sizes as '{earlier.name}'")
            return 1
        changed = self._from_source(node, elements, seen)
        if not changed and is_op(node, "Shape"):
            self._offer(node.inputs[0], seen)
        seen.vectors.setdefault(elements, node.outputs[0])
        return changed

    def _from_source(self, node: ir.Node, elements: Elements, seen: _Seen) -> int:
        """Read ``elements`` off the earliest tensor that has them as sizes of neighbouring axes."""
        if elements.scalar or elements.dtype != ir.DataType.INT64:
            return 0
        for value, dims in seen.sources:
            start = self._place(elements.items, dims)
            if start is None:
                continue
            if is_op(node, "Shape") and node.inputs[0] is value:
                return 0  # it reads the earliest already
            self._become_shape(node, value, start, len(elements.items), len(dims))
            self.touch(node, f"became Shape of '{value.name}'")
            return 1
        return 0

    def _place(self, items: tuple[Element, ...], dims: tuple[Element, ...]) -> int | None:
        if self.opset < _PARTS_SINCE:
            return 0 if items == dims else None
        count = len(items)
        places = range(len(dims) - count + 1)
        return next((at for at in places if dims[at : at + count] == items), None)

    def _become_shape(
        self, node: ir.Node, value: ir.Value, start: int, count: int, rank: int
    ) -> None:
        node.resize_inputs(1)
        node.replace_input_with(0, value)
        node.op_type = "Shape"
        node.attributes.clear()
        if start:
            node.attributes["start"] = ir.AttrInt64("start", start)
        if start + count < rank:
            node.attributes["end"] = ir.AttrInt64("end", start + count)
