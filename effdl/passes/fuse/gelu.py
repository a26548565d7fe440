"""The pass ``fuse_gelu``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from effdl.graph.match import (
    Expansion,
    Mismatch,
    Poly,
    arithmetic_values,
    attempt,
    closed,
    expand,
    label,
    need,
)
from effdl.graph.shapes import Shapes, infer
from effdl.graph.walk import all_nodes, is_op, opset
from effdl.passes.base import Context, NodePass

MICROSOFT = "com.microsoft"
_ERF: Poly = {(1,): 1 / math.sqrt(2)}
_TANH: Poly = {(1,): math.sqrt(2 / math.pi), (3,): math.sqrt(2 / math.pi) * 0.044715}
_QUICK: Poly = {(1,): 1.702}
_HALF_TIMES_ONE_PLUS: Poly = {(1, 0): 0.5, (1, 1): 0.5}
_TIMES: Poly = {(1, 1): 1.0}
_CLIMB = 6


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


@dataclass(frozen=True)
class _Match:
    form: _Form
    x: ir.Value
    root: ir.Value
    nodes: tuple[ir.Node, ...]


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
        if not anchors:
            return 0
        shapes = infer(model)
        in_functions = {n for f in model.functions.values() for n in f.all_nodes()}
        found = [(a, _match(a, shapes, a in in_functions)) for a in anchors]
        renewed: dict[ir.Value, ir.Value] = {}
        changes = 0
        for anchor, match in found:
            if isinstance(match, _Match):
                match = self._replace(model, match, renewed, ctx)  # noqa: PLW2901
            if isinstance(match, str):
                ctx.skip(anchor, match)
            changes += isinstance(match, _Match)
        return changes

    def _replace(
        self, model: ir.Model, match: _Match, renewed: dict[ir.Value, ir.Value], ctx: Context
    ) -> _Match | str:
        x = renewed.get(match.x, match.x)  # it may be the end of a Gelu that was just replaced
        standard = self.domain == "onnx" or (self.domain == "auto" and opset(model) >= 20)
        if match.form.name == "sigmoid":
            if self.domain == "onnx":
                return "ONNX has no QuickGelu, and the option domain is onnx"
            node = ir.node("QuickGelu", [x], {"alpha": 1.702}, domain=MICROSOFT)
        elif standard:
            if opset(model) < 20:
                return f"Gelu came with opset 20, the model has {opset(model)}"
            tanh = {"approximate": "tanh"} if match.form.name == "tanh" else {}
            node = ir.node("Gelu", [x], tanh)
        else:
            op = "FastGelu" if match.form.name == "tanh" else "Gelu"
            node = ir.node(op, [x], domain=MICROSOFT)
        if node.domain:
            model.opset_imports.setdefault(node.domain, 1)
        last = match.root.producer()
        graph = match.root.graph
        assert last is not None
        assert graph is not None
        node.name = last.name
        ir.convenience.replace_nodes_and_values(
            graph, last, list(match.nodes), [node], [match.root], list(node.outputs)
        )
        renewed[match.root] = node.outputs[0]
        ctx.touch(node, f"{len(match.nodes)} nodes of the {match.form.name} form -> {node.op_type}")
        return match


def _match(anchor: ir.Node, shapes: Shapes, in_function: bool) -> _Match | str | None:
    """Return the Gelu around ``anchor``, the reason why it is none, None when it is no candidate."""
    form = _FORMS[anchor.op_type]
    found = attempt(_argument, anchor, form, shapes)
    if found is None or isinstance(found, str):
        return found
    if in_function:
        return "it is inside a function of the model"
    x, argument = found
    return attempt(_root, anchor, form, x, argument, shapes)


def _argument(anchor: ir.Node, form: _Form, shapes: Shapes) -> tuple[ir.Value, Expansion] | None:
    """Find x such that the anchor takes the form's argument of x; None when nothing comes near."""
    argument = anchor.inputs[0]
    if argument is None:
        return None
    near: str | None = None
    for x in arithmetic_values(argument)[1:]:
        read = attempt(expand, argument, [x], _rank(shapes, x))
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


def _root(anchor: ir.Node, form: _Form, x: ir.Value, argument: Expansion, shapes: Shapes) -> _Match:
    """Climb from the anchor until the value is the whole formula."""
    dtype = shapes.dtype(x)
    need(
        dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16),
        f"'{x.name}' is {dtype.name if dtype else 'of unknown type'}: no Gelu kernel for it",
    )
    activated = anchor.outputs[0]
    value, near = activated, "nothing follows"
    for _ in range(_CLIMB):
        users = list(dict.fromkeys(u.node for u in value.uses()))
        if len(users) != 1 or value.is_graph_output():
            break
        user = users[0]
        root = user.outputs[0]
        read = attempt(expand, root, [x, activated], _rank(shapes, x))
        if isinstance(read, str):
            near = read
            break
        # constants of the argument may be coarser than those outside it
        if replace(read, rtol=max(read.rtol, argument.rtol)).equals(form.root):
            nodes = (*argument.nodes, anchor, *read.nodes)
            closed(nodes, root)
            same = all(n.graph is anchor.graph for n in nodes)
            need(same, "the formula reaches over the border of a subgraph")
            return _Match(form, x, root, tuple(dict.fromkeys(nodes)))
        near = f"what follows {label(anchor)} is another formula"
        value = root
    if value.is_graph_output() or len(value.uses()) != 1:
        what = "a graph output" if value.is_graph_output() else "used more than once"
        near = f"up to '{value.name}' it is no Gelu, and '{value.name}' is {what}"
    raise Mismatch(near)


def _rank(shapes: Shapes, value: ir.Value) -> int | None:
    dims = shapes.of(value)
    return None if dims is None else len(dims)


def _text(terms: Poly) -> str:
    powers = {1: "x", 2: "x²", 3: "x³"}
    return " + ".join(f"{v:.8g}·{powers.get(k[0], '1')}" for k, v in sorted(terms.items()))
