"""Where the rows of a layer come from, told to the observers."""

from __future__ import annotations

import math

import onnx_ir as ir

from effdl.graph.walk import int_attr, ints_attr, is_op, str_attr
from effdl.graph.weights import constant_tensor
from effdl.observe.rows import Rows, Window


def rows_of(node: ir.Node) -> Rows | None:
    """Return the rows that a Conv, ConvTranspose, MatMul or Gemm with a constant weight multiplies it with.

    Those of a ConvTranspose are the numbers of one input position, which it spreads over its kernel.
    None where they cannot be told: a computed weight, a transposed input, attributes of another rank.
    """
    x, tensor = node.inputs[0], constant_tensor(node.inputs[1])
    if x is None or not x.name or tensor is None:
        return None
    shape = tuple(int(n) for n in tensor.shape.numpy())
    if is_op(node, "ConvTranspose"):
        return _of_transposed(x.name, shape, int_attr(node, "group", 1))
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
    return Rows(x.name, shape[1] * math.prod(sizes), int_attr(node, "group", 1), window)


def _of_transposed(name: str, shape: tuple[int, ...], groups: int) -> Rows | None:
    axes = len(shape) - 2
    if axes < 1 or groups < 1 or shape[0] % groups:
        return None
    ones = (1,) * axes
    return Rows(name, shape[0] // groups, groups, Window(ones, ones, ones, (0,) * (2 * axes)))
