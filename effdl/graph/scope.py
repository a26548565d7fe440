"""What a rewriting rule may ask about the graph around a node."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from effdl.graph.edit import forward
from effdl.graph.elements import Facts
from effdl.graph.shapes import Shapes
from effdl.graph.symbols import Element
from effdl.graph.uniform import Uniform
from effdl.graph.weights import Names


@dataclass(frozen=True)
class Scope:
    """What a rule may ask about the graph around a node.

    Args:
        shapes: inferred types and shapes.
        facts: small integer tensors, element by element.
        opset: of the default domain.
        uniform: tensors that hold one number everywhere.
    """

    shapes: Shapes
    facts: Facts
    opset: int
    uniform: Uniform = field(default_factory=Uniform)

    def same_static(self, a: ir.Value, b: ir.Value) -> bool:
        """Whether both shapes are known in full and equal."""
        shape = self.shapes.static(a)
        return shape is not None and shape == self.shapes.static(b)

    def covers(self, value: ir.Value, other: ir.Value | None) -> bool:
        """Whether broadcasting ``other`` to ``value`` leaves the shape of ``value`` as it is."""
        dims, goal = self.facts.dims(value), self.facts.dims(other)
        return goal is not None and covers(dims, goal)

    def rank(self, value: ir.Value) -> int | None:
        """Return the number of axes of ``value``."""
        dims = self.shapes.of(value)
        return None if dims is None else len(dims)


def covers(dims: tuple[Element, ...] | None, goal: tuple[Element, ...]) -> bool:
    """Whether broadcasting with ``dims`` alone leads to all that ``goal`` asks for."""
    if dims is None or len(dims) < len(goal):
        return False
    return all(g in (1, d) for g, d in zip(goal[::-1], dims[::-1], strict=False))


def put_in_place(
    node: ir.Node,
    names: Names,
    op_type: str,
    inputs: list[ir.Value | None],
    attributes: list[ir.Attr],
) -> ir.Node:
    """Put a new node of one output before ``node`` and let it stand for it; ``node`` is left unread.

    The output is a new value: what inference found out about the old one may not hold for it. The
    caller has made sure that ``can_forward`` holds for a free node output of the same type.
    """
    graph, old = node.graph, node.outputs[0]
    assert graph is not None
    value = ir.Value(name=names.fresh(old.name or op_type.lower()), type=old.type, shape=old.shape)
    made = ir.Node(
        node.domain,
        op_type,
        inputs,
        attributes,
        name=names.fresh(node.name or op_type),
        outputs=[value],
    )
    graph.insert_before(node, made)
    forward(old, value)
    return made
