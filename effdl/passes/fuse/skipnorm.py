"""The pass ``fuse_skipnorm``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from effdl.graph.elements import Facts
from effdl.graph.match import label, need, some
from effdl.graph.shapes import Shapes
from effdl.graph.walk import MICROSOFT, all_nodes, float_attr, int_attr, is_op, opset, producer
from effdl.passes.base import Context, NodePass
from effdl.passes.fuse._replace import replace_all

_NORMS = {
    "LayerNormalization": "SkipLayerNormalization",
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
}
_CONTRIB = {v: k for k, v in _NORMS.items()}
_SINCE = {"LayerNormalization": 17, "RMSNormalization": 23}
_EPSILON = 1e-12
"""What SkipLayerNormalization takes when it has no epsilon."""


@dataclass(frozen=True)
class _Pair:
    """A sum and its norm.

    Args:
        root: the norm of the sum.
        nodes: what is replaced.
        add: the node of the sum (for the contrib operator: that node).
        norm: the node of the norm (the same).
    """

    root: ir.Value
    nodes: tuple[ir.Node, ...]
    add: ir.Node
    norm: ir.Node


class FuseSkipnorm(NodePass):
    """Bring the sum and the norm after it into the form that is fastest on the target.

    What it does: with form plain, SkipLayerNormalization and SkipSimplifiedLayerNormalization of the
    com.microsoft domain become a sum and a LayerNormalization or RMSNormalization again, and the Add
    before a LayerNormalization becomes Sum, which ONNX Runtime does not turn into
    SkipLayerNormalization when it loads the model. With form skip, an Add and the norm after it
    become one of these operators, with the sum as its fourth output where it is used elsewhere.

    When it helps: on the CPU, plain: ONNX Runtime's kernel of SkipLayerNormalization takes about five
    times as long as its sum and its norm do apart. On CUDA, skip: one kernel reads memory once.

    When it does not: ONNX Runtime itself fuses only sums that have no other user, so a network with
    its norms before each block is in the plain form already. Sum runs in one thread.

    Example:
        passes: [fuse_skipnorm]
    """

    claims: ClassVar[frozenset[str]] = frozenset({"latency"})
    form: Literal["auto", "plain", "skip"] = "auto"
    """auto is plain on the CPU, skip on a GPU."""

    def claimed(self) -> frozenset[str]:
        """Return what is promised: speed, unless a form is asked for."""
        return self.claims if self.form == "auto" else frozenset()

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of norms whose sum changed."""
        skip = self.form == "skip" or (self.form == "auto" and ctx.target.on_gpu)
        anchors = [n for n in all_nodes(model) if _is_norm(n, skip) and self.selected(n)]
        version = opset(model)

        facts: list[Facts] = []

        def match(anchor: ir.Node, shapes: Shapes) -> _Pair | None:
            if anchor.domain == MICROSOFT:
                return _written(anchor, version)
            if not skip:
                return _apart(anchor, shapes)
            if not facts:
                facts.append(_facts(model, shapes))
            return _together(anchor, shapes, facts[0])

        def make(found: _Pair, now: Callable[[ir.Value], ir.Value]) -> list[ir.Node]:
            if found.norm.domain == MICROSOFT:
                return _expanded(found.norm)
            return _fused(found) if skip else _with_sum(found)

        return replace_all(model, ctx, anchors, match, make, _tell)


def _is_norm(node: ir.Node, skip: bool) -> bool:
    if skip:
        return is_op(node, *_NORMS)
    return is_op(node, "LayerNormalization") or is_op(node, *_CONTRIB, domain=MICROSOFT)


def _tell(found: _Pair, nodes: Sequence[ir.Node]) -> str:
    before = " and ".join(n.op_type for n in found.nodes)
    return f"{before} -> {' and '.join(n.op_type for n in nodes)}"


def _apart(norm: ir.Node, shapes: Shapes) -> _Pair | None:
    """Return the sum and norm that ONNX Runtime would fuse, None when it leaves them."""
    add = producer(norm.inputs[0], "Add")
    if add is None:
        return None
    total = add.outputs[0]
    if total.is_graph_output() or len(total.uses()) != 1 or add.graph is not norm.graph:
        return None
    a, b = (shapes.of(v) for v in add.inputs)
    known = a is not None and b is not None and None not in (*a, *b)
    need(known, f"the shapes that {label(add)} adds are not known: ONNX Runtime leaves it")
    if a is None or a != b or len(a) != 3:
        return None  # only sums of equal shapes of three dimensions are fused
    dtype = shapes.dtype(total)
    name = dtype.name if dtype is not None else "of unknown type"
    need(dtype == ir.DataType.FLOAT, f"'{total.name}' is {name}: no kernel for its Sum")
    return _Pair(total, (add,), add, norm)


def _with_sum(found: _Pair) -> list[ir.Node]:
    return [ir.node("Sum", list(found.add.inputs))]


def _facts(model: ir.Model, shapes: Shapes) -> Facts:
    """Follow the sizes of dynamic axes through the main graph."""
    facts = Facts(shapes, {})
    for node in model.graph:
        facts.visit(node)
    return facts


def _together(norm: ir.Node, shapes: Shapes, facts: Facts) -> _Pair | None:
    """Return the sum and norm that one contrib operator can do, None when there is no sum."""
    add = producer(norm.inputs[0], "Add")
    if add is None:
        return None
    total, x = add.outputs[0], some(add.inputs[0], "it adds nothing")
    need(not total.is_graph_output(), f"the sum '{total.name}' is a graph output")
    need(add.graph is norm.graph, "the sum lies in another graph than the norm")
    inferred, followed = shapes.of(x), facts.dims(x)
    if inferred is not None and inferred == shapes.of(add.inputs[1]) and None not in inferred:
        dims: Sequence[object] = inferred
    else:  # as they follow from the inputs' sizes
        equal = followed is not None and followed == facts.dims(add.inputs[1])
        need(equal, f"the operands of {label(add)} may have different shapes")
        dims = followed or ()
    need(len(dims) == 3, f"'{total.name}' has {len(dims)} dimensions, the operator wants 3")
    axis = int_attr(norm, "axis", -1)
    need(axis in (-1, 2), f"{label(norm)} is over axis {axis} and those after it")
    scale = shapes.of(norm.inputs[1])
    need(
        scale is not None and tuple(scale) == tuple(dims[-1:]),
        "the scale is no vector of the last axis",
    )
    bias = norm.inputs[2] if len(norm.inputs) > 2 else None
    need(bias is None or shapes.of(bias) == scale, "the bias is no vector of the last axis")
    for extra in norm.outputs[1:]:
        need(not extra.uses() and not extra.is_graph_output(), "its mean is used")
    need(int_attr(norm, "stash_type", 1) == 1, f"{label(norm)} does not sum in float32")
    need(_first_user(total, norm), f"'{total.name}' is used before its norm")
    return _Pair(norm.outputs[0], (add, norm), add, norm)


def _first_user(total: ir.Value, norm: ir.Node) -> bool:
    """Whether all nodes that read the sum come after the norm in the graph's order."""
    graph = norm.graph
    assert graph is not None
    order = {n: k for k, n in enumerate(graph)}
    return all(order.get(u.node, -1) >= order[norm] for u in total.uses())


def _fused(found: _Pair) -> list[ir.Node]:
    norm, total = found.norm, found.add.outputs[0]
    node = ir.node(
        _NORMS[norm.op_type],
        [*found.add.inputs, *norm.inputs[1:]],
        {"epsilon": float_attr(norm, "epsilon", 1e-5)},
        domain=MICROSOFT,
        num_outputs=4 if len(total.uses()) > 1 else 1,
    )
    if len(node.outputs) > 1:
        for unused in node.outputs[1:3]:
            unused.name = ""
        node.outputs[3].type, node.outputs[3].shape = total.type, total.shape
        for user, index in list(total.uses()):
            if user is not norm:
                user.replace_input_with(index, node.outputs[3])
    return [node]


def _written(node: ir.Node, version: int) -> _Pair:
    """Check that a contrib operator can be written as a sum and a norm of the model's opset."""
    op = _CONTRIB[node.op_type]
    need(version >= _SINCE[op], f"{op} came with opset {_SINCE[op]}, the model has {version}")
    for k, extra in enumerate(node.outputs[1:3]):
        used = bool(extra.uses()) or extra.is_graph_output()
        need(not used, f"its output {k + 1} is used")
    if len(node.outputs) > 3:
        need(
            not node.outputs[3].is_graph_output(),
            f"the sum '{node.outputs[3].name}' is a graph output",
        )
    return _Pair(node.outputs[0], (node,), node, node)


def _expanded(node: ir.Node) -> list[ir.Node]:
    op = _CONTRIB[node.op_type]
    inputs = list(node.inputs)
    bias_at = 4 if op == "LayerNormalization" else 3
    extra = inputs[bias_at] if len(inputs) > bias_at else None
    nodes = []
    first = inputs[0]
    if extra is not None:
        nodes.append(ir.node("Add", [first, extra]))
        first = nodes[-1].outputs[0]
    users = list(node.outputs[3].uses()) if len(node.outputs) > 3 else []
    alone = op == "LayerNormalization" and not users  # what ONNX Runtime would fuse again
    total = ir.node("Sum" if alone else "Add", [first, inputs[1]])
    for user, index in users:
        user.replace_input_with(index, total.outputs[0])
    parameters = inputs[2:bias_at]
    while parameters and parameters[-1] is None:
        parameters.pop()
    epsilon = float_attr(node, "epsilon", _EPSILON)
    norm = ir.node(op, [total.outputs[0], *parameters], {"axis": -1, "epsilon": epsilon})
    return [*nodes, total, norm]
