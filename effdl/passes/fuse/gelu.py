"""The pass ``fuse_gelu``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from effdl.graph.match import (
    Expansion,
    Mismatch,
    Poly,
    arithmetic_values,
    attempt,
    expand,
    label,
    need,
)
from effdl.graph.shapes import Shapes
from effdl.graph.walk import MICROSOFT, all_nodes, is_op, opset
from effdl.passes.base import Context, NodePass
from effdl.passes.fuse._activation import Activation, rank, whole
from effdl.passes.fuse._replace import replace_all

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_ERF: Poly = {(1,): 1 / math.sqrt(2)}
_TANH: Poly = {(1,): math.sqrt(2 / math.pi), (3,): math.sqrt(2 / math.pi) * 0.044715}
_QUICK: Poly = {(1,): 1.702}
_HALF_TIMES_ONE_PLUS: Poly = {(1, 0): 0.5, (1, 1): 0.5}
_TIMES: Poly = {(1, 1): 1.0}


@dataclass(frozen=True)
class _Form:
    """One way to write a Gelu: ``root`` is a polynomial in x and the anchor node's output.

    Args:
        name: for messages.
        argument: what the anchor takes, as a polynomial in x.
        root: the whole formula, as a polynomial in x and the anchor's output.
    """

    name: str
    argument: Poly
    root: Poly


_FORMS = {
    "Erf": _Form("erf", _ERF, _HALF_TIMES_ONE_PLUS),
    "Tanh": _Form("tanh", _TANH, _HALF_TIMES_ONE_PLUS),
    "Sigmoid": _Form("sigmoid", _QUICK, _TIMES),
}


class FuseGelu(NodePass):
    """Replace the Gelu activation that an exporter wrote out by one node.

    What it does: finds 0.5·x·(1 + erf(x/√2)) and 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))) in any
    order of operands and any association, with constants equal to these up to the rounding of their
    dtype, and puts one Gelu node there (FastGelu for the tanh form in the com.microsoft domain).
    With ``quick`` also x·sigmoid(1.702·x), as QuickGelu. A formula whose inner values are used
    elsewhere stays as it is.

    When it helps: fewer nodes and a smaller graph for float16 conversion, for quantization and for
    other passes and runtimes that know Gelu but not its formula.

    When it does not: ONNX Runtime fuses the erf form itself when it loads a model, so its latency on
    the CPU is about equal. Runtimes other than ONNX Runtime may lack the com.microsoft operators:
    set domain to onnx, and convert the model to opset 20, for those.

    Example:
        passes: [{fuse_gelu: {domain: onnx}}]
    """

    domain: Literal["auto", "onnx", "com.microsoft"] = "auto"
    """Where the operator comes from: onnx needs opset 20; auto takes it there, com.microsoft below."""
    quick: bool = False
    """Also fuse x·sigmoid(1.702·x) into com.microsoft QuickGelu."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of activations fused."""
        anchors = [n for n in all_nodes(model) if is_op(n, *_FORMS) and self.selected(n)]
        if not self.quick:
            anchors = [n for n in anchors if n.op_type != "Sigmoid"]

        def make(found: Activation, now: Callable[[ir.Value], ir.Value]) -> list[ir.Node]:
            return [self._node(found, now(found.x), opset(model))]

        return replace_all(model, ctx, anchors, _match, make, _tell)

    def _node(self, found: Activation, x: ir.Value, version: int) -> ir.Node:
        """Return the new node; raises Mismatch where the model's opset has none."""
        if found.form == "sigmoid":
            need(self.domain != "onnx", "ONNX has no QuickGelu, and the option domain is onnx")
            return ir.node("QuickGelu", [x], {"alpha": 1.702}, domain=MICROSOFT)
        if self.domain == "onnx" or (self.domain == "auto" and version >= 20):
            need(version >= 20, f"Gelu came with opset 20, the model has {version}")
            tanh = {"approximate": "tanh"} if found.form == "tanh" else {}
            return ir.node("Gelu", [x], tanh)
        op = "FastGelu" if found.form == "tanh" else "Gelu"
        return ir.node(op, [x], domain=MICROSOFT)


def _tell(found: Activation, nodes: Sequence[ir.Node]) -> str:
    return f"{len(found.nodes)} nodes of the {found.form} form -> {nodes[-1].op_type}"


def _match(anchor: ir.Node, shapes: Shapes) -> Activation | None:
    """Return the Gelu around ``anchor``, None when it is no candidate."""
    form = _FORMS[anchor.op_type]
    found = _argument(anchor, form, shapes)
    if found is None:
        return None
    x, argument = found
    gelu = whole(anchor, x, argument, form.root, shapes, "Gelu", FLOATS)
    return replace(gelu, form=form.name)


def _argument(anchor: ir.Node, form: _Form, shapes: Shapes) -> tuple[ir.Value, Expansion] | None:
    """Find x such that the anchor takes the form's argument of x; None when nothing comes near."""
    argument = anchor.inputs[0]
    if argument is None:
        return None
    near: str | None = None
    for x in arithmetic_values(argument)[1:]:
        read = attempt(expand, argument, [x], rank(shapes, x))
        if isinstance(read, str) or read.terms.keys() != form.argument.keys():
            continue
        if read.equals(form.argument):
            return x, read
        near = near or f"{label(anchor)} takes {_text(read.terms)}, a Gelu {_text(form.argument)}"
    if form.name == "erf":
        raise Mismatch(near or f"{label(anchor)} takes no constant multiple of a value")
    if form.name == "tanh" and near:
        raise Mismatch(near)
    return None


def _text(terms: Poly) -> str:
    powers = {1: "x", 2: "x²", 3: "x³"}
    return " + ".join(f"{v:.8g}·{powers.get(k[0], '1')}" for k, v in sorted(terms.items()))
