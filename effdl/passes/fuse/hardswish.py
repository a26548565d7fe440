"""The pass ``fuse_hardswish``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import onnx_ir as ir

from effdl.graph.match import (
    Expansion,
    Mismatch,
    arithmetic_values,
    attempt,
    expand,
    keeps_rank,
    need,
)
from effdl.graph.shapes import Shapes
from effdl.graph.walk import all_nodes, is_op, opset
from effdl.graph.weights import scalar
from effdl.passes.base import Context, NodePass
from effdl.passes.fuse._activation import Activation, rank, whole
from effdl.passes.fuse._replace import replace_all
from effdl.passes.fuse._saturation import Saturation, saturation

_FLOAT = (ir.DataType.FLOAT,)
_ANCHORS = ("Clip", "Min", "Max", "Relu", "HardSigmoid")


class FuseHardswish(NodePass):
    """Replace HardSwish and HardSigmoid that an exporter wrote out by their operators.

    What it does: finds clip(a·x + b, 0, h) / h and x·clip(x + 3, 0, 6) / 6, with the clip written as
    Clip, as Min and Max or as Relu and Min, in any order of operands, and puts HardSigmoid there, or
    HardSwish from opset 14 on (HardSigmoid and Mul below). x·HardSigmoid(x) becomes HardSwish as well.

    When it helps: ONNX Runtime does not find these formulas itself; HardSigmoid is one sweep over
    memory where the formula takes three, and it joins the Conv before it.

    When it does not: the activation is a small part of most networks. Values that are not float32
    stay, since ONNX Runtime has no other kernel on the CPU.

    Example:
        passes: [fuse_hardswish]
    """

    claims: ClassVar[frozenset[str]] = frozenset({"latency"})
    min_opset: ClassVar[int] = 6

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of activations replaced."""
        anchors = [n for n in all_nodes(model) if is_op(n, *_ANCHORS) and self.selected(n)]
        version = opset(model)

        def match(anchor: ir.Node, shapes: Shapes) -> Activation | None:
            return _match(anchor, shapes, version)

        def make(found: Activation, now: Callable[[ir.Value], ir.Value]) -> list[ir.Node]:
            return _nodes(found, now(found.x), version)

        return replace_all(model, ctx, anchors, match, make, _tell)


def _tell(found: Activation, nodes: Sequence[ir.Node]) -> str:
    return f"{len(found.nodes)} nodes -> {' and '.join(n.op_type for n in nodes)}"


def _nodes(found: Activation, x: ir.Value, version: int) -> list[ir.Node]:
    if found.form == "swish" and version >= 14:
        return [ir.node("HardSwish", [x])]
    alpha, beta = found.numbers
    gate = ir.node("HardSigmoid", [x], {"alpha": alpha, "beta": beta})
    if found.form == "sigmoid":
        return [gate]
    return [gate, ir.node("Mul", [x, gate.outputs[0]])]


def _match(anchor: ir.Node, shapes: Shapes, version: int) -> Activation | None:
    """Return the HardSwish or HardSigmoid around ``anchor``, None when it is no candidate."""
    clip = saturation(anchor)
    if clip is None:
        return None
    near: str | None = None
    for x in arithmetic_values(clip.value):
        read = attempt(_argument, clip, x, shapes)
        if isinstance(read, str) or not {(1,)} <= read.terms.keys() <= {(0,), (1,)}:
            continue
        alpha, beta = (read.terms.get(k, 0.0) / clip.high for k in ((1,), (0,)))
        if beta == 0 or alpha <= 0:
            continue
        found = _forms(anchor, clip, x, read, (alpha, beta), shapes, version)
        if isinstance(found, Activation):
            return found
        near = near or found
    if near is not None:
        raise Mismatch(near)
    return None


def _forms(
    anchor: ir.Node,
    clip: Saturation,
    x: ir.Value,
    read: Expansion,
    numbers: tuple[float, float],
    shapes: Shapes,
    version: int,
) -> Activation | str | None:
    """Return the activation, why it is none, or None when nothing would be gained."""
    alpha, beta = numbers
    six = math.isclose(alpha, 1 / 6, rel_tol=read.rtol) and math.isclose(
        beta, 0.5, rel_tol=read.rtol
    )
    single = is_op(anchor, "HardSigmoid")
    reason: str | None = None
    if six and (not single or version >= 14):
        swish = attempt(
            whole, anchor, x, read, {(1, 1): 1 / clip.high}, shapes, "HardSwish", _FLOAT
        )
        if isinstance(swish, Activation):
            return replace(swish, form="swish", numbers=(1 / 6, 0.5))
        reason = swish
    if single:
        return None  # a HardSigmoid of its own is what this pass makes
    sigmoid = attempt(
        whole, anchor, x, read, {(0, 1): 1 / clip.high}, shapes, "HardSigmoid", _FLOAT
    )
    if isinstance(sigmoid, Activation):
        return replace(sigmoid, form="sigmoid", numbers=(alpha, beta))
    return reason or sigmoid


def _argument(clip: Saturation, x: ir.Value, shapes: Shapes) -> Expansion:
    """Read what is clipped as a polynomial in ``x``."""
    read = expand(clip.value, [x], rank(shapes, x))
    terms = {k: v * clip.slope for k, v in read.terms.items()}
    terms[(0,)] = terms.get((0,), 0.0) + clip.shift
    bounds = [v for n in clip.nodes if is_op(n, "Min", "Max") for v in n.inputs if v is not None]
    for bound in bounds:
        fits = scalar(bound) is None or keeps_rank(bound, rank(shapes, x))
        need(fits, f"the bound '{bound.name}' may add a dimension")
    return replace(read, terms=terms, nodes=[*read.nodes, *clip.nodes])
