"""Where the constant stands that a layer adds to its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.walk import float_attr, is_op, only_user
from effdl.graph.weights import Names, constant, constant_tensor, replace_weight


@dataclass(frozen=True)
class Bias:
    """A constant with one number for each output of a layer.

    Args:
        node, index: whose input it is: the layer's, or that of the Add behind it.
        factor: what it is multiplied with, relative to the product of the layer.
    """

    node: ir.Node
    index: int
    factor: float = 1.0

    def shift(self, change: npt.NDArray[np.floating[Any]], names: Names) -> None:
        """Add numbers [outputs] to the product, by way of the constant."""
        old = constant(self.node.inputs[self.index])
        assert old is not None
        made = old.astype(np.float64) + change.reshape(old.shape) / self.factor
        self.write(made, names)

    def write(self, numbers: npt.NDArray[np.floating[Any]], names: Names) -> None:
        """Put other numbers [outputs] in the place of the constant."""
        old = constant(self.node.inputs[self.index])
        assert old is not None
        replace_weight(self.node, self.index, numbers.astype(old.dtype).reshape(old.shape), names)


def bias_of(node: ir.Node, outputs: int) -> Bias | None:
    """Return the constant that a Conv, Gemm or MatMul adds to its outputs, None where there is none.

    That of a MatMul is in the Add that alone reads it.

    Args:
        node: the layer.
        outputs: how many it has.
    """
    if is_op(node, "Conv", "Gemm"):
        alpha, beta = (float_attr(node, name, 1.0) for name in ("alpha", "beta"))
        if len(node.inputs) < 3 or not alpha or not beta:
            return None
        return _fitting(node, 2, outputs, beta / alpha)
    after = only_user(node.outputs[0]) if is_op(node, "MatMul") else None
    if after is None or not is_op(after, "Add") or after.graph is not node.graph:
        return None
    return _fitting(after, 1 if after.inputs[0] is node.outputs[0] else 0, outputs)


def _fitting(node: ir.Node, index: int, outputs: int, factor: float = 1.0) -> Bias | None:
    tensor = constant_tensor(node.inputs[index])
    if tensor is None or tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return None
    shape = tuple(tensor.shape.numpy())
    fits = bool(shape) and shape[-1] == outputs == tensor.size
    return Bias(node, index, factor) if fits else None
