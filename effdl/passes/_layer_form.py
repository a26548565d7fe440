"""Layers as matrices: [groups, outputs, inputs x taps], their biases, and where their outputs end up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.bias import Bias, bias_of
from effdl.graph.walk import float_attr, int_attr, is_op, only_user
from effdl.graph.weights import Names, add_initializer, constant, constant_tensor, replace_weight
from effdl.observe.layers import rows_of
from effdl.observe.rows import Rows

Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerForm:
    """A Conv, Gemm or MatMul with a constant weight.

    Args:
        node: the layer.
        rows: what it reads.
        axis: of its outputs' channels, 1 or -1.
        bias: the constant that is added to its outputs; None where there is none yet.
        result: the value with the bias in it.
        total: the value after a residual Add behind that; ``beside`` is what is added there.
    """

    node: ir.Node
    rows: Rows
    axis: int
    bias: Bias | None
    result: ir.Value
    total: ir.Value | None
    beside: ir.Value | None

    def weight(self) -> Float:
        """Return [groups, N, K]; K is inputs times taps of the kernel."""
        array = constant(self.node.inputs[1])
        assert array is not None
        if not is_op(self.node, "Conv"):
            return (array if int_attr(self.node, "transB", 0) else array.T)[None].astype(np.float64)
        return array.astype(np.float64).reshape(self.rows.groups, -1, self.rows.width)

    def write(self, weight: Float, bias: Float, names: Names) -> None:
        """Write a weight [groups, N, K] and a bias [groups, N]."""
        old = constant(self.node.inputs[1])
        assert old is not None
        if is_op(self.node, "Conv"):
            made = weight.reshape(old.shape)
        else:
            made = weight[0] if int_attr(self.node, "transB", 0) else weight[0].T
        replace_weight(self.node, 1, np.ascontiguousarray(made, old.dtype), names)
        self._write_bias(bias.reshape(-1), old.dtype, names)

    def _write_bias(self, bias: Float, dtype: np.dtype[np.generic], names: Names) -> None:
        if self.bias is not None:
            self.bias.write(bias, names)
            return
        if is_op(self.node, "MatMul"):
            return
        graph = self.node.graph
        assert isinstance(graph, ir.Graph)
        made = add_initializer(graph, names, f"{self.node.name}/bias", bias.astype(dtype))
        self.node.resize_inputs(3)
        self.node.replace_input_with(2, made)

    @property
    def takes_bias(self) -> bool:
        """Whether there is a bias, or place for one."""
        return self.bias is not None or not is_op(self.node, "MatMul")


def layer_form(node: ir.Node) -> LayerForm | None:
    """Return a layer as a matrix; None where its weight is computed, or is used in another way too."""
    if not is_op(node, "Conv", "Gemm", "MatMul"):
        return None
    tensor = constant_tensor(node.inputs[1])
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or not _plain(node):
        return None
    rows = rows_of(node)
    if rows is None:
        return None
    weight = node.inputs[1]
    assert weight is not None
    if len(list(weight.uses())) > 1:
        return None
    channels = int(tensor.shape.numpy()[0 if _outputs_first(node) else 1])
    axis = 1 if is_op(node, "Conv") else -1
    bias = bias_of(node, channels)
    if bias is None and len(node.inputs) > 2 and node.inputs[2] is not None:
        return None  # one that is computed
    result = node.outputs[0] if bias is None else bias.node.outputs[0]
    total, beside = _residual(result)
    return LayerForm(node, rows, axis, bias, result, total, beside)


def _outputs_first(node: ir.Node) -> bool:
    return is_op(node, "Conv") or bool(int_attr(node, "transB", 0))


def _plain(node: ir.Node) -> bool:
    plain = float_attr(node, "alpha", 1.0) == float_attr(node, "beta", 1.0) == 1.0
    return plain and not int_attr(node, "transA", 0)


def _residual(value: ir.Value) -> tuple[ir.Value | None, ir.Value | None]:
    """Return the sum that a layer's result goes into and what else is in it; None, None without one."""
    user = only_user(value)
    if user is None or not is_op(user, "Add"):
        return None, None
    other = user.inputs[1 if user.inputs[0] is value else 0]
    if other is None or constant_tensor(other) is not None:
        return None, None
    return user.outputs[0], other
