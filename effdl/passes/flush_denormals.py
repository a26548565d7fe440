"""The pass ``flush_denormals``."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effdl.graph.walk import is_op
from effdl.graph.weights import Array, initializers
from effdl.passes.base import Context, Pass

_TINY = {
    ir.DataType.FLOAT: float(np.finfo(np.float32).tiny),
    ir.DataType.DOUBLE: float(np.finfo(np.float64).tiny),
    ir.DataType.BFLOAT16: float(np.finfo(np.float32).tiny),  # it has the exponents of float32
}
_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN")
_BELOW = 2.0**-60
"""Share of a tensor's largest number that is far below the rounding of any sum with that number."""


class FlushDenormals(Pass):
    """Set the weights that are too small to matter, but slow to compute with, to zero.

    What it does: in the weights of Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU and RNN, every number
    below the smallest normal one of its type becomes 0. So does one below ``threshold`` that is also
    2^60 times smaller than the largest of its tensor: its products are denormal, and lost in the
    rounding of the sums that they are part of. float16 is left alone, since its small numbers are
    normal ones where they are computed.

    When it helps: long training with weight decay leaves such numbers, and a processor takes some
    hundred cycles for each product with one. Zeros also compress better.

    When it does not: most models have none.

    Example:
        passes: [flush_denormals]
    """

    threshold: float = 1e-30
    """Also flush numbers below this that are 2^60 times smaller than the largest; 0 for denormals only."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of weights set to zero."""
        total = 0
        for value in initializers(model):
            tensor = value.const_value
            if tensor is None or tensor.dtype not in _TINY or not tensor.size:
                continue
            if value.is_graph_input() or value.is_graph_output():
                continue
            array = tensor.numpy()
            small = self._small(array, _TINY[tensor.dtype])
            count = int(small.sum())
            if not count:
                continue
            name = value.name or "weight"
            if not value.uses() or any(not is_op(u.node, *_LINEAR) for u in value.uses()):
                ctx.skip(name, "something other than a linear layer reads it")
                continue
            # All users of a shared weight are linear layers, so all may read the new one.
            value.const_value = ir.tensor(
                np.where(small, np.zeros((), array.dtype), array), name=name
            )
            ctx.touch(name, f"{count} of {array.size} numbers set to zero")
            total += count
        if total:
            ctx.note("flushed", total)
        return total

    def _small(self, array: Array, tiny: float) -> np.ndarray:
        wide = array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
        size = np.abs(wide)
        largest = float(size.max(where=np.isfinite(size), initial=0.0))
        limit = max(tiny, min(self.threshold, _BELOW * largest))
        return (size > 0) & (size < limit)
