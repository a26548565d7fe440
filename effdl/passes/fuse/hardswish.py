"""The pass ``fuse_hardswish``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_ir as ir

from effdl.graph.match import (
    Expansion,
    Mismatch,
    Poly,
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
    reads = [r for x in arithmetic_values(clip.value) if (r := _read(clip, x, shapes)) is not None]
    near: str | None = None
    for read in reads:
        if read.six and (version >= 14 or not is_op(anchor, "HardSigmoid")):
            found = attempt(_whole, anchor, clip, read, shapes, swish=True)
            if isinstance(found, Activation):
                return found
            near = near or found
    if is_op(anchor, "HardSigmoid"):
        reads = []  # one of its own is what this pass makes
    for read in reversed(reads):
        found = attempt(_whole, anchor, clip, read, shapes, swish=False)
        if isinstance(found, Activation):
            return found
        near = near or found
    if near is not None:
        raise Mismatch(near)
    return None


@dataclass(frozen=True)
class _Read:
    """What is clipped, over the upper bound, is alpha · x + beta."""

    x: ir.Value
    argument: Expansion
    alpha: float
    beta: float

    @property
    def six(self) -> bool:
        """Whether it is (x + 3) / 6, as in HardSwish."""
        rtol = self.argument.rtol
        return math.isclose(self.alpha, 1 / 6, rel_tol=rtol) and math.isclose(
            self.beta, 0.5, rel_tol=rtol
        )


def _read(clip: Saturation, x: ir.Value, shapes: Shapes) -> _Read | None:
    read = attempt(_argument, clip, x, shapes)
    if isinstance(read, str) or not {(1,)} <= read.terms.keys() <= {(0,), (1,)}:
        return None
    alpha, beta = (read.terms.get(k, 0.0) / clip.high for k in ((1,), (0,)))
    return _Read(x, read, alpha, beta) if beta != 0 and alpha > 0 else None


def _whole(
    anchor: ir.Node, clip: Saturation, read: _Read, shapes: Shapes, *, swish: bool
) -> Activation:
    wanted: Poly = {(1, 1) if swish else (0, 1): 1 / clip.high}
    name = "HardSwish" if swish else "HardSigmoid"
    found = whole(anchor, read.x, read.argument, wanted, shapes, name, _FLOAT)
    numbers = (1 / 6, 0.5) if swish else (read.alpha, read.beta)
    return replace(found, form="swish" if swish else "sigmoid", numbers=numbers)


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
