"""The ways to write a layer as two thinner ones: what they cost and how to build them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.dims import Dims
from effdl.graph.shapes import Shapes
from effdl.graph.walk import int_attr, ints_attr, is_op
from effdl.graph.weights import constant_tensor

Array = npt.NDArray[Any]
Build = Callable[[Array, Array], tuple[Array, Array]]
FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


@dataclass(frozen=True)
class Part:
    """One of the two new nodes.

    Args:
        op_type: its operator; ``attributes`` those of it.
        inputs: its inputs, None where the weight goes.
    """

    op_type: str
    inputs: tuple[ir.Value | str | None, ...]
    attributes: dict[str, ir.Attr]


HIDDEN = "hidden"
"""Stands for the value between the two parts; None stands for the part's own weight."""
WEIGHT = "weight"


@dataclass(frozen=True)
class Split:
    """A way to replace one layer by two.

    Args:
        how: in a few words.
        matrix: the weight as the matrix that is factorized.
        macs: multiply-accumulates of the layer; ``per_rank`` those of the two parts for each rank.
        first, second: the two parts.
        weights: turns left [rows, r] and right [r, columns] into the weights of both parts.
        hidden: the shape between the parts, None when unknown; its axis ``axis`` holds the rank.
    """

    how: str
    matrix: Array
    macs: int
    per_rank: int
    first: Part
    second: Part
    weights: Build
    hidden: Dims | None
    axis: int

    @property
    def side(self) -> int:
        """The full rank."""
        return int(min(self.matrix.shape))


def weight_index(node: ir.Node) -> int:
    """Return which input of a MatMul, Gemm or Conv is its weight: a constant one, if any."""
    left = is_op(node, "MatMul") and constant_tensor(node.inputs[1]) is None
    return 0 if left and constant_tensor(node.inputs[0]) is not None else 1


def refusal(node: ir.Node, tensor: ir.TensorProtocol) -> str:
    """Return why a node with the constant weight ``tensor`` cannot be split, '' if it can."""
    rank = len(tensor.shape)
    if tensor.dtype not in FLOATS:
        return f"its weight is of type {tensor.dtype.name}, not a float"
    if is_op(node, "Conv"):
        if int_attr(node, "group", 1) != 1:
            return f"grouped convolution ({int_attr(node, 'group', 1)} groups)"
        return "" if rank >= 3 else f"its weight has the unexpected shape {tensor.shape}"
    if rank != 2:
        return f"its weight has {rank} axes, not 2"
    if is_op(node, "Gemm") and int_attr(node, "transA", 0):
        return "its input is transposed (transA)"
    return ""


def splits(node: ir.Node, weight: Array, shapes: Shapes) -> list[Split]:
    """Return the ways to split ``node``, the better one first where they cost the same."""
    if is_op(node, "Conv"):
        return _conv_splits(node, weight, shapes)
    if is_op(node, "Gemm"):
        return [_gemm_split(node, weight, shapes)]
    return [_matmul_split(node, weight, shapes)]


def _matmul_split(node: ir.Node, weight: Array, shapes: Shapes) -> Split:
    index = weight_index(node)
    x = node.inputs[1 - index]
    dims = shapes.of(x)
    rows, columns = weight.shape
    axis = -1 if index == 1 or (dims is not None and len(dims) == 1) else -2
    positions = _product(_without(dims, axis))
    behind = index == 1  # x @ weight, not weight @ x
    return Split(
        "two MatMuls",
        weight,
        rows * columns * positions,
        (rows + columns) * positions,
        Part("MatMul", (x, WEIGHT) if behind else (WEIGHT, x), {}),
        Part("MatMul", (HIDDEN, WEIGHT) if behind else (WEIGHT, HIDDEN), {}),
        (lambda left, right: (left, right)) if behind else (lambda left, right: (right, left)),
        dims,
        axis,
    )


def _gemm_split(node: ir.Node, weight: Array, shapes: Shapes) -> Split:
    transposed = int_attr(node, "transB", 0)
    matrix = weight.T if transposed else weight
    dims = shapes.of(node.inputs[0])
    inputs, outputs = matrix.shape
    positions = _product(_without(dims, -1))
    return Split(
        "MatMul and Gemm",
        matrix,
        inputs * outputs * positions,
        (inputs + outputs) * positions,
        Part("MatMul", (node.inputs[0], WEIGHT), {}),
        Part("Gemm", (HIDDEN, WEIGHT, *node.inputs[2:]), dict(node.attributes)),
        lambda left, right: (left, right.T if transposed else right),
        dims,
        -1,
    )


def _conv_splits(node: ir.Node, weight: Array, shapes: Shapes) -> list[Split]:
    """Return the kernel first and 1x1 after it, then 1x1 first and the kernel after it.

    Padding adds zeros, which a 1x1 convolution without bias leaves zero: both are exact at full rank.
    """
    outputs, inputs, *kernel = weight.shape
    size = math.prod(kernel)
    ones = (1,) * len(kernel)
    x, y = shapes.of(node.inputs[0]), shapes.of(node.outputs[0])
    p_in, p_out = _conv_positions(node, x, y, len(kernel))
    point = {"kernel_shape": ir.AttrInt64s("kernel_shape", ones)}
    whole = dict(node.attributes)
    bias = node.inputs[2:]
    macs = outputs * inputs * size * p_out
    kernel_first = Split(
        "1x1 after the kernel" if size > 1 else "two 1x1",
        weight.reshape(outputs, -1),
        macs,
        (inputs * size + outputs) * p_out,
        Part("Conv", (node.inputs[0], WEIGHT), whole),
        Part("Conv", (HIDDEN, WEIGHT, *bias), point),
        lambda left, right: (
            right.reshape(-1, inputs, *kernel),
            left.reshape(outputs, -1, *ones),
        ),
        y,
        1,
    )
    point_first = Split(
        "1x1 before the kernel",
        np.moveaxis(weight, 1, 0).reshape(inputs, -1),
        macs,
        inputs * p_in + outputs * size * p_out,
        Part("Conv", (node.inputs[0], WEIGHT), point),
        Part("Conv", (HIDDEN, WEIGHT, *bias), whole),
        lambda left, right: (
            left.T.reshape(-1, inputs, *ones),
            np.moveaxis(right.reshape(-1, outputs, *kernel), 0, 1),
        ),
        x,
        1,
    )
    return [kernel_first, point_first] if size > 1 else [kernel_first]


def _conv_positions(node: ir.Node, x: Dims | None, y: Dims | None, spatial: int) -> tuple[int, int]:
    """Return positions of input and output; where unknown, one output and its share of the input."""
    batch = _product(x[:1] if x else ())
    if x and y and all(isinstance(d, int) for d in (*x[2:], *y[2:])):
        return batch * _product(x[2:]), batch * _product(y[2:])
    return batch * math.prod(ints_attr(node, "strides", (1,) * spatial)), batch


def _without(dims: Dims | None, axis: int) -> Dims:
    if not dims:
        return ()
    axis %= len(dims)
    return dims[:axis] + dims[axis + 1 :]


def _product(dims: Dims) -> int:
    """Multiply the known dimensions; unknown and empty ones count as 1."""
    return math.prod(d for d in dims if isinstance(d, int) and d > 0)
