"""The pass ``fold_batchnorm``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import onnx_ir as ir

from effdl.graph.edit import raise_ir_version
from effdl.graph.walk import is_op, nodes_in
from effdl.passes.base import Context, NodePass
from effdl.passes.fold._chains import Chains


class FoldBatchnorm(NodePass):
    """Fold batch norms and per-channel scaling into the weights of the layer beside them.

    What it does: a BatchNormalization in inference form, or an Add, Sub, Mul or Div with a constant
    per channel, that follows a Conv, ConvTranspose, Gemm, MatMul or another batch norm becomes part
    of that layer's weights and bias; also across Reshape, Transpose and their like, and into every
    branch of a Concat. A batch norm before layers is folded into them too, where a Conv does not pad.
    The weights are computed in double precision and rounded once.

    When it helps: before quantization, pruning and low-rank factorization, which must see the weights
    that are really used. The file becomes a little smaller.

    When it does not: ONNX Runtime folds most of these when it loads a model, so latency stays the
    same. A batch norm behind a branch, behind a shared weight or at the input of a padded Conv stays.

    Example:
        passes: [simplify, fold_batchnorm]
    """

    not_after: ClassVar[Mapping[str, str]] = {
        "quantize_*": "batch norms cannot be folded into quantized weights"
    }

    min_opset: ClassVar[int] = 7

    arithmetic: bool = True
    """Also fold Add, Sub, Mul and Div with a constant per channel into the layer before them."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of nodes folded."""
        chains = Chains(model, ctx, self._wanted, self.min_opset, ahead=False, merge=False)
        total = chains.run()
        if total:
            raise_ir_version(model)
            ctx.note("folded", total)
        return total

    def _wanted(self, node: ir.Node) -> bool:
        return (self.arithmetic or is_op(node, "BatchNormalization")) and self.selected(node)

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Return the batch norms that may be looked at."""
        nodes = nodes_in(model.graph)
        return [n.name or n.op_type for n in nodes if is_op(n, "BatchNormalization")]
