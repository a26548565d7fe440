"""x -> scale * x + shift per channel, and the layers that can take it into their weights.

All arithmetic is in float64. The layers' formulas are those of the ONNX operator reference: Conv and
ConvTranspose (grouped), Gemm ``alpha * A' B' + beta * C``, MatMul.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.walk import float_attr, int_attr, ints_attr, is_op, str_attr
from effdl.graph.weights import constant, shared

Vector = npt.NDArray[np.float64]
FLOATS = {
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.FLOAT,
    ir.DataType.DOUBLE,
}


class Declined(Exception):
    """Why something cannot be folded, in words for the user."""


@dataclass(frozen=True)
class Affine:
    """``scale * x + shift``; both have one number per channel, or one number for all."""

    scale: Vector
    shift: Vector


def of_batchnorm(node: ir.Node) -> Affine:
    """Return what an inference-form BatchNormalization does to its channels.

    ``gamma * (x - mean) / sqrt(var + epsilon) + beta``.

    Raises:
        Declined: training form, parameters per activation, not constant or not usable.
    """
    if any(o.name for o in node.outputs[1:]) or int_attr(node, "training_mode", 0):
        raise Declined("it is in training form")
    if not int_attr(node, "spatial", 1):
        raise Declined("it has parameters per activation (spatial=0), not per channel")
    parameters = [constant(v) for v in node.inputs[1:5]]
    if len(parameters) < 4 or any(p is None for p in parameters):
        raise Declined("its parameters are not constant")
    gamma, beta, mean, var = (np.asarray(p, np.float64).ravel() for p in parameters)
    spread = var + float_attr(node, "epsilon", 1e-5)
    if not (spread > 0).all():
        raise Declined("its variance is not positive")
    scale = gamma / np.sqrt(spread)
    return Affine(scale, beta - mean * scale)


def operands(node: ir.Node) -> tuple[ir.Value, npt.NDArray[np.generic], bool] | None:
    """Return (data, constant, is the constant on the left) of an arithmetic node, None without one."""
    if len(node.inputs) != 2:
        return None
    left, right = node.inputs
    for data, other, on_left in ((left, right, False), (right, left, True)):
        array = constant(other)
        if data is not None and array is not None and constant(data) is None:
            return data, array, on_left
    return None


def of_arithmetic(node: ir.Node, per_channel: Vector, on_left: bool) -> Affine | None:
    """Return what Add, Sub, Mul or Div with a constant does; None for a constant divided by x."""
    one, zero = np.ones(1), np.zeros(1)
    match node.op_type, on_left:
        case "Add", _:
            return Affine(one, per_channel)
        case "Mul", _:
            return Affine(per_channel, zero)
        case "Sub", False:
            return Affine(one, -per_channel)
        case "Sub", True:
            return Affine(-one, per_channel)
        case "Div", False:
            with np.errstate(divide="ignore"):
                return Affine(1.0 / per_channel, zero)
    return None


def spread_over_channels(
    array: npt.NDArray[np.generic], axis: int, rank: int, channels: int
) -> Vector:
    """Return the constant of an arithmetic node as one number per channel (or one for all).

    Raises:
        Declined: it differs within a channel, or makes the result larger.
    """
    if array.ndim > rank:
        raise Declined("its constant adds axes to the result")
    full = (1,) * (rank - array.ndim) + array.shape
    if any(d != 1 for i, d in enumerate(full) if i != axis) or full[axis] not in (1, channels):
        raise Declined("its constant is not one number per channel")
    return np.asarray(array, np.float64).ravel()


@dataclass(frozen=True)
class Layer:
    """A layer with constant weights that is followed, or led, by an affine map.

    Args:
        node: Conv, ConvTranspose, Gemm or MatMul.
        bias_node: the node and input that hold the bias: ``node`` itself, or the Add after a MatMul.
        weight: its weights, float64.
        bias: its bias, float64, None when it has none.
        channels: number of output channels; ``axis`` and ``rank`` say where they are in the output.
    """

    node: ir.Node
    bias_node: ir.Node | None
    bias_index: int
    weight: npt.NDArray[np.float64]
    bias: npt.NDArray[np.float64] | None
    channels: int
    axis: int
    rank: int

    def after(self, affine: Affine) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return weights and bias of this layer with ``affine`` applied to its output."""
        scale = np.broadcast_to(affine.scale, (self.channels,))
        shift = np.broadcast_to(affine.shift, (self.channels,))
        bias = np.zeros(self.channels) if self.bias is None else self.bias
        if is_op(self.node, "Gemm"):
            bias = bias * float_attr(self.node, "beta", 1.0)
        return self._scaled(scale), bias * scale + shift

    def _scaled(self, scale: Vector) -> npt.NDArray[np.float64]:
        weight = self.weight
        rest = (1,) * (weight.ndim - 2)
        if is_op(self.node, "Conv"):
            return weight * scale.reshape(-1, 1, *rest)
        if is_op(self.node, "ConvTranspose"):
            group = int_attr(self.node, "group", 1)
            inner = weight.shape[0] // group
            parts = weight.reshape(group, inner, *weight.shape[1:])
            return (parts * scale.reshape(group, 1, -1, *rest)).reshape(weight.shape)
        if is_op(self.node, "Gemm") and int_attr(self.node, "transB", 0):
            return weight * scale[:, None]
        return weight * scale[None, :]

    def before(self, affine: Affine) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return weights and bias of this Conv with ``affine`` applied to its input (no padding)."""
        group = int_attr(self.node, "group", 1)
        weight = self.weight
        inner = weight.shape[1]
        each = [np.broadcast_to(v, (group * inner,)) for v in (affine.scale, affine.shift)]
        # Output channel o reads the input channels of its group, in order.
        rows = np.repeat(np.arange(group), weight.shape[0] // group)
        scale, shift = (v.reshape(group, inner)[rows] for v in each)
        rest = (1,) * (weight.ndim - 2)
        bias = np.zeros(self.channels) if self.bias is None else self.bias
        offset = (weight * shift.reshape(*shift.shape, *rest)).reshape(self.channels, -1).sum(1)
        return weight * scale.reshape(*scale.shape, *rest), bias + offset


def padded(node: ir.Node) -> bool:
    """Whether a Conv adds a border of zeros."""
    return any(ints_attr(node, "pads")) or str_attr(node, "auto_pad", "NOTSET") in (
        "SAME_UPPER",
        "SAME_LOWER",
    )


def layer_of(node: ir.Node, bias_add: ir.Node | None, rank: int | None) -> Layer:
    """Return ``node`` as a Layer.

    Args:
        node: Conv, ConvTranspose, Gemm or MatMul.
        bias_add: for a MatMul, the Add with its bias, if there is one.
        rank: of the output of a MatMul, None when not known.

    Raises:
        Declined: weights that are not constant, shared, or of no floating-point type.
    """
    index = 1
    value = node.inputs[index]
    weight = constant(value)
    if weight is None or value is None:
        raise Declined(f"the weight of {node.op_type} '{node.name}' is not constant")
    if ir.DataType.from_numpy(weight.dtype) not in FLOATS:
        raise Declined(f"the weight of {node.op_type} '{node.name}' is of type {weight.dtype}")
    if shared(value):
        raise Declined(f"the weight of {node.op_type} '{node.name}' has other users")
    if is_op(node, "MatMul"):
        return _matmul(node, bias_add, weight, rank)
    bias: npt.NDArray[np.float64] | None = None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        own = constant(node.inputs[2])
        if own is None:
            raise Declined(f"the bias of {node.op_type} '{node.name}' is not constant")
        bias = own.astype(np.float64)
    channels = _channels(node, weight)
    if bias is not None and is_op(node, "Gemm"):
        if bias.ndim > 2 or (bias.size > 1 and bias.shape[-1] != channels):
            raise Declined(f"the bias of Gemm '{node.name}' is not one number per output")
        bias = bias.reshape(-1) if bias.size in (1, channels) else bias
    rank = weight.ndim
    return Layer(node, node, 2, weight.astype(np.float64), bias, channels, 1, rank)


def _channels(node: ir.Node, weight: npt.NDArray[np.generic]) -> int:
    if is_op(node, "ConvTranspose"):
        return int(weight.shape[1]) * int_attr(node, "group", 1)
    if is_op(node, "Conv") or int_attr(node, "transB", 0):
        return int(weight.shape[0])
    return int(weight.shape[1])


def _matmul(
    node: ir.Node, bias_add: ir.Node | None, weight: npt.NDArray[np.generic], rank: int | None
) -> Layer:
    if weight.ndim != 2 or rank is None or rank < 2:
        raise Declined(f"the shapes of MatMul '{node.name}' are not known to be those of a layer")
    channels = weight.shape[1]
    bias, index = None, 1
    if bias_add is not None:
        found = operands(bias_add)
        assert found is not None
        _, array, on_left = found
        bias, index = array.astype(np.float64).ravel(), 0 if on_left else 1
        last = array.shape[-1:] in ((), (1,), (channels,))
        if array.ndim > rank or bias.size not in (1, channels) or not last:
            raise Declined(f"the bias of MatMul '{node.name}' is not one number per output")
    wide = weight.astype(np.float64)
    return Layer(node, bias_add, index, wide, bias, channels, rank - 1, rank)


def epsilon(dtype: np.dtype[np.generic]) -> float:
    """Return the distance from 1 to the next number of ``dtype``, bfloat16 included."""
    finfo: Any = ml_dtypes.finfo
    return float(finfo(dtype).eps)


def narrow(
    exact: npt.NDArray[np.float64], like: npt.NDArray[np.generic], axis: int
) -> npt.NDArray[np.generic]:
    """Return ``exact`` in the dtype of ``like``.

    Raises:
        Declined: a number overflows, or slices along ``axis`` lose more than rounding.
    """
    with np.errstate(over="ignore", under="ignore"):
        cast = exact.astype(like.dtype)
    back = cast.astype(np.float64)
    if not np.isfinite(back).all():
        raise Declined(f"the folded weights overflow {like.dtype}")
    axes = tuple(i for i in range(exact.ndim) if i != axis)
    error = np.sqrt(((back - exact) ** 2).sum(axis=axes))
    size = np.sqrt((exact**2).sum(axis=axes))
    if (error > 8 * epsilon(like.dtype) * size).any():
        raise Declined(f"the folded weights are too small for {like.dtype}")
    return cast
