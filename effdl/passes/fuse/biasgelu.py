"""The pass ``fuse_biasgelu``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from effdl.graph.match import label, need
from effdl.graph.shapes import Shapes
from effdl.graph.walk import MICROSOFT, all_nodes, is_op, producer, str_attr
from effdl.graph.weights import constant
from effdl.passes.base import Context, NodePass
from effdl.passes.fuse._replace import replace_all, self_contained


@dataclass(frozen=True)
class _Biased:
    """``root`` = Gelu(x + bias), by the contrib operator ``op``."""

    x: ir.Value
    root: ir.Value
    nodes: tuple[ir.Node, ...]
    bias: ir.Value
    op: str


class FuseBiasgelu(NodePass):
    """Replace the Add of a bias and the Gelu after it by one node.

    What it does: finds Gelu(x + bias), where bias is a constant vector of the last axis, and puts
    BiasGelu of the com.microsoft domain there, or FastGelu with a bias where the Gelu is the tanh
    form.

    When it helps: fewer nodes, for runtimes and targets that do not fuse them themselves.

    When it does not: ONNX Runtime does the same when it loads a model for the CPU, so that its
    latency stays. Run fuse_gelu before, which finds the Gelu.

    Example:
        passes: [fuse_gelu, fuse_biasgelu]
    """

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of pairs fused."""
        anchors = [n for n in all_nodes(model) if _is_gelu(n) and self.selected(n)]

        def make(found: _Biased, now: Callable[[ir.Value], ir.Value]) -> list[ir.Node]:
            return [ir.node(found.op, [now(found.x), found.bias], domain=MICROSOFT)]

        return replace_all(model, ctx, anchors, _match, make, _tell)


def _is_gelu(node: ir.Node) -> bool:
    if is_op(node, "FastGelu", domain=MICROSOFT):
        return len([v for v in node.inputs if v is not None]) == 1
    return is_op(node, "Gelu") or is_op(node, "Gelu", domain=MICROSOFT)


def _tell(found: _Biased, nodes: Sequence[ir.Node]) -> str:
    return f"Add and Gelu -> {nodes[-1].op_type}"


def _match(gelu: ir.Node, shapes: Shapes) -> _Biased | None:
    """Return the bias and Gelu, None when nothing is added before it."""
    add = producer(gelu.inputs[0], "Add")
    if add is None:
        return None
    pairs = [(a, b) for a, b in (add.inputs, add.inputs[::-1]) if constant(b) is not None]
    if not pairs:
        return None
    x, bias = pairs[0]
    assert x is not None
    assert bias is not None
    dtype = shapes.dtype(x)
    name = dtype.name if dtype is not None else "of unknown type"
    need(dtype == ir.DataType.FLOAT, f"'{x.name}' is {name}: no kernel for it")
    dims, size = shapes.of(x), shapes.of(bias)
    vector = dims is not None and size is not None and len(size) == 1 and size == dims[-1:]
    need(vector, f"'{bias.name}' of {label(add)} is no vector of the last axis")
    tanh = gelu.op_type == "FastGelu" or str_attr(gelu, "approximate", "none") == "tanh"
    found = _Biased(x, gelu.outputs[0], (add, gelu), bias, "FastGelu" if tanh else "BiasGelu")
    self_contained(found, gelu)
    return found
