"""Layers as matrices: where the rows they read come from, and their weights rounded by these."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.walk import int_attr, ints_attr, is_op, str_attr
from effdl.graph.weights import constant_tensor
from effdl.observe.moments import Moments
from effdl.observe.rows import Rows, Window
from effdl.passes.quantize._weights import with_weight
from effdl.solve.adaptive import adaptive_rounding, shrunk
from effdl.solve.quantize import Float


def rows_of(node: ir.Node) -> Rows | None:
    """Return the rows that a Conv, MatMul or Gemm with a constant weight multiplies it with.

    None where they cannot be told: a computed weight, a transposed input, attributes of another rank.
    """
    x, tensor = node.inputs[0], constant_tensor(node.inputs[1])
    if x is None or not x.name or tensor is None:
        return None
    shape = tuple(int(n) for n in tensor.shape.numpy())
    if not is_op(node, "Conv"):
        if len(shape) != 2 or int_attr(node, "transA", 0):
            return None
        return Rows(x.name, shape[1 if int_attr(node, "transB", 0) else 0])
    sizes, axes = shape[2:], len(shape) - 2
    strides = ints_attr(node, "strides") or (1,) * axes
    dilations = ints_attr(node, "dilations") or (1,) * axes
    mode = str_attr(node, "auto_pad", "NOTSET")
    pads = ints_attr(node, "pads") or (0,) * (2 * axes)
    if mode == "VALID":
        pads = (0,) * (2 * axes)
    if axes < 1 or len(strides) != axes or len(dilations) != axes or len(pads) != 2 * axes:
        return None
    same = mode in ("SAME_UPPER", "SAME_LOWER")
    window = Window(sizes, strides, dilations, None if same else pads, mode)
    width = shape[1]
    for size in sizes:
        width *= size
    return Rows(x.name, width, int_attr(node, "group", 1), window)


def round_layer(
    node: ir.Node,
    scales: npt.NDArray[np.float32],
    seen: Moments,
    saturation_guard: bool,
    centred: bool,
) -> npt.NDArray[np.int8]:
    """Return the int8 weights of a layer, in the layout of the float ones, rounded adaptively.

    Args:
        node: a Conv, MatMul or Gemm with a constant weight.
        scales: one per output, or one.
        seen: second moments of what it reads.
        saturation_guard: keep the sums of two products within 16 bits.
        centred: whether a bias, where there is one, takes the mean error back.
    """
    tensor = constant_tensor(node.inputs[1])
    assert tensor is not None
    second = seen.second
    if centred and len(node.inputs) > 2 and node.inputs[2] is not None:
        second = second - seen.mean[:, :, None] * seen.mean[:, None, :]
    second = shrunk(second, seen.rows)
    flip = not (is_op(node, "Conv") or int_attr(node, "transB", 0))

    def work(array: Float) -> npt.NDArray[np.int8]:
        weight = array.T if flip else array.reshape(array.shape[0], -1)
        each = np.broadcast_to(scales, len(weight))
        q = adaptive_rounding(weight, each, second, saturation_guard=saturation_guard)
        return np.ascontiguousarray(q.T if flip else q.reshape(array.shape))

    return with_weight(tensor, work)
