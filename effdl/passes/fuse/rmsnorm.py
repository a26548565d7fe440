"""The pass ``fuse_rmsnorm``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effdl.graph.match import label, need, some
from effdl.graph.shapes import Shapes
from effdl.graph.walk import all_nodes, int_attr, is_op, only_user, opset, producer
from effdl.graph.weights import Names, add_initializer
from effdl.passes.base import Context, NodePass
from effdl.passes.fuse._norm import (
    Norm,
    divides,
    inverse_root,
    is_square,
    mean_square,
    parameter,
    sizes,
    with_parameters,
)
from effdl.passes.fuse._replace import replace_all, self_contained

_OPSET = 23
_KNOWN_TO_ORT = (
    ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"],
    ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Mul"],
)


class FuseRmsnorm(NodePass):
    """Replace a root-mean-square norm that an exporter wrote out by one RMSNormalization node.

    What it does: finds x / sqrt(mean(x²) + epsilon) · scale over the last axes, as T5 and Llama have
    it, with Pow or Mul for the square; Div, Reciprocal or Pow for the root; Casts to float32 and back
    around it. From opset 23 on it becomes RMSNormalization. Below, it is written in the one form
    that ONNX Runtime makes a single kernel of when it loads the model: Pow, ReduceMean, Add, Sqrt,
    Div, Mul. Where the formula has no scale, the norm gets ones.

    When it helps: exports of today use Reciprocal or Mul for the square, which ONNX Runtime does not
    recognize; the kernel takes a third of the time. In float16 models the square no longer overflows.

    When it does not: the older form is left, since ONNX Runtime recognizes it. Below opset 23 values
    that are not float32 stay.

    Example:
        passes: [{convert_opset: {at_least: 23}}, fuse_rmsnorm]
    """

    claims: ClassVar[frozenset[str]] = frozenset({"latency"})
    min_opset: ClassVar[int] = 13

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of norms replaced."""
        anchors = [n for n in all_nodes(model) if is_op(n, "ReduceMean") and self.selected(n)]
        version, names = opset(model), Names(model)

        def match(anchor: ir.Node, shapes: Shapes) -> Norm | None:
            return _match(anchor, shapes, version)

        def make(found: Norm, now: Callable[[ir.Value], ir.Value]) -> list[ir.Node]:
            build = _standard if version >= _OPSET else _written
            return build(found, now(found.x), names, version)

        return replace_all(model, ctx, anchors, match, make, _tell)


def _tell(found: Norm, nodes: Sequence[ir.Node]) -> str:
    goal = nodes[0].op_type if len(nodes) == 1 else "the form that ONNX Runtime fuses"
    return f"{len(found.nodes)} nodes -> {goal}{found.given}"


def _scale(found: Norm, names: Names) -> ir.Value:
    graph, last = found.root.graph, found.root.producer()
    assert graph is not None
    assert last is not None
    dtype = found.x.dtype or (found.root.dtype or ir.DataType.FLOAT)
    return parameter(found.scale, found.size, dtype, graph, names, f"{last.name}_scale")


def _standard(found: Norm, x: ir.Value, names: Names, version: int) -> list[ir.Node]:
    attributes = {"axis": -len(found.size), "epsilon": found.epsilon}
    return [ir.node("RMSNormalization", [x, _scale(found, names)], attributes)]


def _written(found: Norm, x: ir.Value, names: Names, version: int) -> list[ir.Node]:
    graph, last = found.root.graph, found.root.producer()
    assert graph is not None
    assert last is not None
    base = last.name or "rms"
    two = add_initializer(graph, names, f"{base}_two", np.array(2, np.float32))
    epsilon = add_initializer(graph, names, f"{base}_epsilon", np.array(found.epsilon, np.float32))
    square = ir.node("Pow", [x, two])
    axes = list(range(-len(found.size), 0))
    if version < 18:
        mean = ir.node("ReduceMean", [square.outputs[0]], {"axes": axes, "keepdims": 1})
    else:
        axis = add_initializer(graph, names, f"{base}_axes", np.array(axes, np.int64))
        mean = ir.node("ReduceMean", [square.outputs[0], axis], {"keepdims": 1})
    total = ir.node("Add", [mean.outputs[0], epsilon])
    root = ir.node("Sqrt", [total.outputs[0]])
    quotient = ir.node("Div", [x, root.outputs[0]])
    scaled = ir.node("Mul", [quotient.outputs[0], _scale(found, names)])
    return [square, mean, total, root, quotient, scaled]


def _match(mean: ir.Node, shapes: Shapes, version: int) -> Norm | None:
    """Return the norm around ``mean``, None when it is no mean of squares or that of a layer norm."""
    square = producer(mean.inputs[0])
    if square is None or not is_square(square):
        return None
    x = some(square.inputs[0], "it squares nothing")
    centered = producer(x, "Sub")
    if centered is not None and producer(centered.inputs[1], "ReduceMean") is not None:
        return None
    dims = shapes.of(x)
    rank = None if dims is None else len(dims)
    again, add, count, epsilon = mean_square(square, rank)
    need(again is mean, f"{label(square)} goes elsewhere")
    found = inverse_root(add.outputs[0], rank)
    user, rest = divides(found, "mean square")
    need(rest is x, f"{label(user)} divides '{rest.name}', not '{x.name}'")
    size = sizes(x, count, shapes, "RMSNormalization")
    nodes = tuple(dict.fromkeys((square, mean, add, *found.nodes)))
    norm = Norm(x, user.outputs[0], epsilon, size, nodes)
    if version >= _OPSET:
        norm = _in_half(norm, shapes)
    norm = with_parameters(norm, rank or len(size), bias=False)
    self_contained(norm, mean)
    dtype = shapes.dtype(norm.x)
    known = dtype.name if dtype is not None else "of unknown type"
    if version >= _OPSET:
        need(dtype != ir.DataType.BFLOAT16, f"'{norm.x.name}' is {known}: no kernel for it")
        return norm
    need(dtype == ir.DataType.FLOAT, f"'{norm.x.name}' is {known}; below opset 23 only float32")
    need(len(size) == 1, "over several axes a node needs opset 23")
    need(not _known_form(norm), "ONNX Runtime fuses this form itself; a node needs opset 23")
    return norm


def _known_form(norm: Norm) -> bool:
    """Whether ONNX Runtime recognizes the norm as it is written."""
    return norm.scale is not None and [n.op_type for n in norm.nodes] in _KNOWN_TO_ORT


def _in_half(norm: Norm, shapes: Shapes) -> Norm:
    """Let the norm reach from the float16 before a Cast to float32 to the float16 after it."""
    into = producer(norm.x, "Cast")
    out = only_user(norm.root)
    if into is None or into.inputs[0] is None or out is None or not is_op(out, "Cast"):
        return norm
    half = ir.DataType.FLOAT16
    same = shapes.dtype(into.inputs[0]) == half and int_attr(out, "to", 0) == int(half)
    inner = all(u.node in norm.nodes for u in norm.x.uses()) and not norm.x.is_graph_output()
    if not same or not inner or shapes.dtype(norm.x) != ir.DataType.FLOAT:
        return norm
    nodes = (into, *norm.nodes, out)
    return replace(norm, x=into.inputs[0], root=out.outputs[0], nodes=nodes)
