"""x -> scale * x + shift with constants, as one node or a chain of them writes it.

All arithmetic is in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.walk import float_attr, int_attr, is_op
from effdl.graph.weights import constant

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[Any]
FLOATS = {
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.FLOAT,
    ir.DataType.DOUBLE,
}
_COARSE = 0.25
"""A number whose spacing is this or more rounds what it is added to: that is its purpose."""


class Declined(Exception):
    """Why something cannot be folded, in words for the user."""


class NoLayer(Declined):
    """There is nothing beside it that could take it."""


@dataclass(frozen=True)
class Affine:
    """``scale * x + shift``; both broadcast against x as in ONNX, from the last axis on."""

    scale: Floats
    shift: Floats

    def then(self, after: Affine) -> Affine:
        """Return this map followed by ``after``."""
        return Affine(self.scale * after.scale, self.shift * after.scale + after.shift)

    @property
    def shifts(self) -> bool:
        """Whether the shift is not zero."""
        return bool(self.shift.any())

    @property
    def scales(self) -> bool:
        """Whether the scale is not one."""
        return bool((self.scale != 1).any())

    def full(self, rank: int | None) -> Affine:
        """Return the same map with constants of ``rank`` axes, or of none for one number.

        Raises:
            Declined: a constant has more axes, or ``rank`` is None and matters.
        """
        return Affine(_full(self.scale, rank), _full(self.shift, rank))


def _full(array: Floats, rank: int | None) -> Floats:
    if array.ndim == 0:
        return array
    if rank is None:
        raise Declined("the rank of what it changes is not known")
    if array.ndim > rank:
        raise Declined("its constant adds axes to the result")
    if array.size == 1:
        return array.reshape(())
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def of_batchnorm(node: ir.Node, rank: int | None) -> Affine:
    """Return what an inference-form BatchNormalization does to its channels.

    ``gamma * (x - mean) / sqrt(var + epsilon) + beta``.

    Args:
        node: a BatchNormalization.
        rank: of its input.

    Raises:
        Declined: training form, parameters per activation, not constant or not usable.
    """
    gamma, beta, mean, deviation = batchnorm_parameters(node)
    if rank is None or rank < 2:
        raise Declined("the rank of its input is not known")
    scale = gamma / deviation
    shape = (scale.size, *(1,) * (rank - 2))
    return Affine(scale.reshape(shape), (beta - mean * scale).reshape(shape))


def batchnorm_parameters(node: ir.Node) -> tuple[Floats, Floats, Floats, Floats]:
    """Return gamma, beta, mean and sqrt(var + epsilon) of a BatchNormalization in inference form.

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
    return gamma, beta, mean, np.sqrt(spread)


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


def affine_data(node: ir.Node) -> ir.Value | None:
    """Return what an Add, Sub, Mul, Div or Neg with a floating-point constant changes, else None."""
    if is_op(node, "Neg"):
        return node.inputs[0] if len(node.inputs) == 1 else None
    if not is_op(node, "Add", "Sub", "Mul", "Div"):
        return None
    found = operands(node)
    if found is None or ir.DataType.from_numpy(found[1].dtype) not in FLOATS:
        return None
    if is_op(node, "Div") and found[2]:
        return None  # a constant divided by x
    return found[0]


def of_arithmetic(node: ir.Node) -> Affine:
    """Return what a node with ``affine_data`` does.

    Raises:
        Declined: its constant is not finite, zero under a Div, or so large that it rounds.
    """
    one, zero = np.ones(()), np.zeros(())
    if is_op(node, "Neg"):
        return Affine(-one, zero)
    found = operands(node)
    assert found is not None
    _, array, on_left = found
    number = array.astype(np.float64)
    if not np.isfinite(number).all() or (is_op(node, "Div") and not number.all()):
        raise Declined("its constant is not finite, or divides by zero")
    spacing = np.abs(number).max(initial=0) * epsilon(array.dtype)
    if is_op(node, "Add", "Sub") and spacing >= _COARSE:
        raise Declined("its constant is so large that adding it rounds")
    match node.op_type, on_left:
        case "Add", _:
            return Affine(one, number)
        case "Mul", _:
            return Affine(number, zero)
        case "Sub", False:
            return Affine(one, -number)
        case "Sub", True:
            return Affine(-one, number)
    return Affine(1.0 / number, zero)


def spread_over_channels(
    array: npt.NDArray[np.generic], axis: int, rank: int, channels: int
) -> Floats:
    """Return a constant as one number per channel (or one for all).

    Raises:
        Declined: it differs within a channel, or makes the result larger.
    """
    if array.ndim > rank:
        raise Declined("its constant adds axes to the result")
    full = (1,) * (rank - array.ndim) + array.shape
    if any(d != 1 for i, d in enumerate(full) if i != axis) or full[axis] not in (1, channels):
        raise Declined("its constant is not one number per channel")
    return np.asarray(array, np.float64).ravel()


def epsilon(dtype: np.dtype[np.generic]) -> float:
    """Return the distance from 1 to the next number of ``dtype``, bfloat16 included."""
    finfo: Any = ml_dtypes.finfo
    return float(finfo(dtype).eps)


def narrow(exact: Floats, like: npt.NDArray[np.generic], axis: int) -> npt.NDArray[np.generic]:
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


def narrow_bias(bias: Floats, like: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Return ``bias`` in the dtype of ``like``.

    Raises:
        Declined: a number overflows.
    """
    with np.errstate(over="ignore", under="ignore"):
        cast = bias.astype(like.dtype)
    if not np.isfinite(cast.astype(np.float64)).all():
        raise Declined(f"the folded bias overflows {like.dtype}")
    return cast
