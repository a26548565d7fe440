"""Quantization with ranges found at run time, as a class that passes share."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import onnx_ir as ir
from pydantic import Field

from effdl.graph.walk import float_attr, int_attr, is_op
from effdl.graph.weights import constant_tensor
from effdl.passes.base import Context, NodePass
from effdl.passes.quantize._dynamic_writer import DynamicWriter
from effdl.passes.quantize._format import decline
from effdl.passes.quantize._select import PACKED_ATTENTION, choose_nodes, is_quantized
from effdl.solve.quantize import WeightMethod

_RECURRENT = ("GRU", "RNN")
_CONVOLUTIONS = ("Conv", "ConvTranspose")


class DynamicQuantizer(NodePass):
    """The options and the work of ``quantize_dynamic``; ``quantize_auto`` uses it as well."""

    lossy: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"latency", "size"})
    min_opset: ClassVar[int] = 11

    per_channel: bool = True
    """Whether weights have one scale per output column, or one for the tensor."""
    weight_method: WeightMethod = "absmax"
    """How a weight scale is chosen: largest weight, or least squared error."""
    reduce_range: bool | None = None
    """Whether to keep weights small enough for 16-bit sums; by default where the target needs it."""
    min_size: int = Field(default=4096, ge=1)
    """Weights with fewer elements stay float."""
    embeddings: bool = True
    """Whether to store embedding tables as int8 rows."""
    recurrent: bool = True
    """Whether LSTM layers get int8 weights too."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of nodes that became 8-bit."""
        return self.work(model, ctx)

    def work(self, model: ir.Model, ctx: Context, *, beside: bool = False) -> int:
        """Do what ``run`` does; with ``beside``, also in a model of which other nodes are 8-bit already."""
        chosen = self._choose(model, ctx, beside)
        if not chosen:
            return 0
        guard = not ctx.target.int8_dot if self.reduce_range is None else self.reduce_range
        writer = DynamicWriter(model, self.per_channel, self.weight_method, guard)
        for node in chosen:
            ctx.touch(node, f"{node.op_type} with int8 weights")
            if is_op(node, "Gather"):
                writer.embedding(node)
            elif is_op(node, "LSTM"):
                writer.recurrent(node)
            else:
                writer.product(node)
        counts = Counter(n.op_type for n in chosen)
        ctx.note("quantized", ", ".join(f"{k} {n}" for k, n in sorted(counts.items())))
        ctx.note("activation_type", "uint8")
        ctx.note("weight_type", "int8")
        return len(chosen)

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Names of the nodes that would become 8-bit."""
        return [n.name or n.op_type for n in self._choose(model, ctx)]

    def _choose(self, model: ir.Model, ctx: Context, beside: bool = False) -> list[ir.Node]:
        reason = decline(ctx.target, dynamic=True)
        if not reason and not beside and is_quantized(model):
            reason = "the model is quantized already"
        if reason:
            ctx.skip("model", reason)
            return []
        return choose_nodes(model, self._refusal, ctx)

    def _refusal(self, node: ir.Node) -> str | None:
        """Return why ``node`` stays float, an empty string when it does not, None for other ops."""
        if is_op(node, *_CONVOLUTIONS):
            return "run-time quantization makes convolutions slower: use quantize_static"
        if is_op(node, "Attention", domain="com.microsoft"):
            return PACKED_ATTENTION
        if is_op(node, *_RECURRENT):
            return "ONNX Runtime has an 8-bit kernel for LSTM only"
        if is_op(node, "LSTM"):
            return self._recurrent(node)
        if is_op(node, "Gather"):
            weight = constant_tensor(node.inputs[0])
            if weight is None or weight.dtype != ir.DataType.FLOAT or len(weight.shape) != 2:
                return None
        elif is_op(node, "MatMul", "Gemm"):
            weight = constant_tensor(node.inputs[1])
            if weight is None:
                return "its weight is computed (try simplify) or an activation"
        else:
            return None
        if not self.selected(node):
            return "left out by the options"
        if weight.dtype != ir.DataType.FLOAT or len(weight.shape) != 2:
            return f"its weight is {weight.dtype.name.lower()} of {len(weight.shape)} dimensions"
        if weight.size < self.min_size:
            return f"its weight has {weight.size} elements, less than min_size"
        return self._embedding(node) if is_op(node, "Gather") else _product(node)

    def _recurrent(self, node: ir.Node) -> str:
        if not self.recurrent or not self.selected(node):
            return "left out by the options"
        weights = [constant_tensor(v) for v in node.inputs[1:3]]
        if any(w is None for w in weights):
            return "its weights are computed or fed"
        kinds = [w for w in weights if w is not None]
        if any(w.dtype != ir.DataType.FLOAT or len(w.shape) != 3 for w in kinds):
            return "its weights are not float32 of 3 dimensions"
        if int_attr(node, "layout", 0):
            return "its layout is 1, which the 8-bit kernel does not know"
        if sum(w.size for w in kinds) < self.min_size:
            return f"its weights have less than {self.min_size} elements (min_size)"
        return ""

    def _embedding(self, node: ir.Node) -> str:
        if not self.embeddings:
            return "embeddings are left out by the options"
        if int_attr(node, "axis", 0) != 0:
            return "it gathers columns"
        table = node.inputs[0]
        assert table is not None
        others = [u.node for u in table.uses() if not is_op(u.node, "Gather")]
        return f"its table is also used by {others[0].op_type}" if others else ""


def _product(node: ir.Node) -> str:
    if not is_op(node, "Gemm"):
        return ""
    if int_attr(node, "transA", 0):
        return "its input is transposed"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and float_attr(node, "beta", 1.0) != 1.0 and constant_tensor(bias) is None:
        return "its bias is computed and scaled by beta"
    return ""
