"""The pass ``fold_affine``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import onnx_ir as ir

from effdl.graph.edit import raise_ir_version
from effdl.graph.walk import is_op, nodes_in
from effdl.passes.base import Context, NodePass
from effdl.passes.fold._affine import affine_data
from effdl.passes.fold._chains import Chains


class FoldAffine(NodePass):
    """Fold scaling and shifting by constants into the weights before or behind it.

    What it does: a run of Add, Sub, Mul, Div and Neg with constants becomes part of the Conv,
    ConvTranspose, Gemm, MatMul or BatchNormalization before it, or of all those that read its result:
    the normalization of an input picture, the scale of attention behind its projection, the scale and
    bias of a written-out layer norm before the layers that read it. It goes across Reshape, Transpose
    and their like, across pools where that is exact, and across Relu when it is a positive scale. A
    shift is not folded into a Conv that pads. Where no layer takes it, a run is written with fewer
    nodes. The weights are computed in double precision and rounded once.

    When it helps: every node that goes is a pass over the data that goes with it; ONNX Runtime folds
    only what directly follows a layer.

    When it does not: weights with another user stay as they are. Fusions of activations should run
    before, since a formula with a folded constant is no longer found.

    Example:
        passes: [simplify, fold_batchnorm, fold_affine]
    """

    not_after: ClassVar[Mapping[str, str]] = {
        "quantize_*": "constants cannot be folded into quantized weights"
    }

    min_opset: ClassVar[int] = 7

    ahead: bool = True
    """Also fold into the layers behind, not only into those before."""
    merge: bool = True
    """Also write a run of arithmetic with fewer nodes where no layer takes it."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of nodes that went."""
        chains = Chains(
            model, ctx, self._wanted, self.min_opset, ahead=self.ahead, merge=self.merge
        )
        total = chains.run()
        if total:
            raise_ir_version(model)
            ctx.note("folded", total)
        return total

    def _wanted(self, node: ir.Node) -> bool:
        return not is_op(node, "BatchNormalization") and self.selected(node)

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Return the nodes that change a value by a constant."""
        nodes = nodes_in(model.graph)
        return [n.name or n.op_type for n in nodes if affine_data(n) is not None]
