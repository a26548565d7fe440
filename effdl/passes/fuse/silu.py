"""The pass ``fuse_silu``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import onnx_ir as ir

from effdl.graph.match import (
    Expansion,
    Mismatch,
    arithmetic_values,
    attempt,
    expand,
    label,
    need,
)
from effdl.graph.shapes import Shapes
from effdl.graph.walk import MICROSOFT, all_nodes, float_attr, is_op, opset
from effdl.passes.base import Context, NodePass
from effdl.passes.fuse._activation import Activation, rank, whole
from effdl.passes.fuse._replace import replace_all

_FLOAT = (ir.DataType.FLOAT,)


class FuseSilu(NodePass):
    """Replace x·sigmoid(a·x), known as SiLU or Swish, by one node.

    What it does: finds x·sigmoid(a·x) in any order of operands, and Swish nodes, and puts QuickGelu
    of the com.microsoft domain there, which computes just that; with a = 1.702 it is the Gelu of CLIP.
    With domain onnx the node is Swish, which came with opset 24.

    When it helps: fewer nodes. A Swish node gains time: ONNX Runtime has no kernel for it and runs
    three nodes instead.

    When it does not: ONNX Runtime finds the written-out form itself, so that its latency stays. Run
    quantize_static before: it knows Sigmoid and Mul, but not QuickGelu. Swish is slower in ONNX
    Runtime than what it replaces; take domain onnx for other runtimes only.

    Example:
        passes: [fuse_silu]
    """

    domain: Literal["auto", "onnx", "com.microsoft"] = "auto"
    """Where the operator comes from: auto is com.microsoft; onnx needs opset 24."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of activations replaced."""
        wanted = ("Sigmoid",) if self.domain == "onnx" else ("Sigmoid", "Swish")
        anchors = [n for n in all_nodes(model) if is_op(n, *wanted) and self.selected(n)]

        def make(found: Activation, now: Callable[[ir.Value], ir.Value]) -> list[ir.Node]:
            x, (alpha,) = now(found.x), found.numbers
            if self.domain != "onnx":
                return [ir.node("QuickGelu", [x], {"alpha": alpha}, domain=MICROSOFT)]
            need(opset(model) >= 24, f"Swish came with opset 24, the model has {opset(model)}")
            return [ir.node("Swish", [x], {"alpha": alpha})]

        return replace_all(model, ctx, anchors, _match, make, _tell)


def _tell(found: Activation, nodes: Sequence[ir.Node]) -> str:
    return f"{len(found.nodes)} nodes -> {nodes[-1].op_type}"


def _match(anchor: ir.Node, shapes: Shapes) -> Activation | None:
    """Return the SiLU around ``anchor``, None when it is no candidate."""
    argument = anchor.inputs[0]
    if argument is None:
        return None
    if is_op(anchor, "Swish"):
        dtype = shapes.dtype(argument)
        need(dtype in _FLOAT, f"'{argument.name}' is {dtype.name if dtype else 'of unknown type'}")
        alpha = float_attr(anchor, "alpha", 1.0)
        return Activation(argument, anchor.outputs[0], (anchor,), numbers=(alpha,))
    factors = {v for u in anchor.outputs[0].uses() for v in _factors(u.node)}
    near: str | None = None
    for x in arithmetic_values(argument):
        if x not in factors:
            continue
        read = attempt(expand, argument, [x], rank(shapes, x))
        if isinstance(read, str):
            continue
        if read.terms.keys() != {(1,)}:
            near = near or f"{label(anchor)} takes no multiple of '{x.name}'"
            continue
        found = attempt(_whole, anchor, x, read, shapes)
        if isinstance(found, Activation):
            return found
        near = near or found
    if near is not None:
        raise Mismatch(near)
    return None


def _whole(anchor: ir.Node, x: ir.Value, read: Expansion, shapes: Shapes) -> Activation:
    found = whole(anchor, x, read, {(1, 1): 1.0}, shapes, "SiLU", _FLOAT)
    return replace(found, numbers=(read.terms[(1,)],))


def _factors(node: ir.Node) -> list[ir.Value]:
    """Values that ``node`` multiplies, also those it gets multiplied by a constant."""
    if not is_op(node, "Mul", "Div"):
        return []
    given = [v for v in node.inputs if v is not None]
    return [w for v in given for w in arithmetic_values(v, depth=2)]
