"""The window of a Conv or a pool: its padding in numbers, whatever way the node writes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effdl.graph.walk import int_attr, ints_attr, str_attr
from effdl.graph.weights import constant
from effdl.passes.fold._affine import FLOATS, Declined
from effdl.solve.convolve import Kernel


@dataclass(frozen=True)
class Window:
    """Numbers per spatial axis of a Conv, ConvInteger, QLinearConv or pool."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def padded(self) -> bool:
        """Whether there is any padding."""
        return any((*self.begins, *self.ends))


def window_of(node: ir.Node, weight_index: int | None = None) -> Window:
    """Return the window of ``node``.

    Args:
        node: a Conv-like node or a pool.
        weight_index: the input with the weight, None for a pool.

    Raises:
        Declined: its size is not known, or its padding depends on the size of its input.
    """
    sizes = ints_attr(node, "kernel_shape")
    if weight_index is not None:
        weight = node.inputs[weight_index] if len(node.inputs) > weight_index else None
        array = constant(weight)
        if array is not None:
            sizes = tuple(array.shape[2:])
        elif weight is not None and weight.is_graph_input():  # callers must feed it as declared
            shape = weight.shape
            sizes = tuple(shape.numpy()[2:]) if shape is not None and shape.is_static() else sizes
    if not sizes:
        raise Declined(f"the window of {node.op_type} '{node.name}' is not known")
    axes = len(sizes)
    strides = ints_attr(node, "strides") or (1,) * axes
    dilations = ints_attr(node, "dilations") or (1,) * axes
    pads = _pads(node, sizes, strides, dilations)
    if not len(strides) == len(dilations) == axes or len(pads) != 2 * axes:
        raise Declined(f"{node.op_type} '{node.name}' has attributes of another rank")
    return Window(sizes, strides, dilations, pads[:axes], pads[axes:])


def _pads(
    node: ir.Node, sizes: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> tuple[int, ...]:
    mode = str_attr(node, "auto_pad", "NOTSET")
    if mode == "NOTSET":
        return ints_attr(node, "pads") or (0,) * (2 * len(sizes))
    if mode == "VALID":
        return (0,) * (2 * len(sizes))
    if set(strides) != {1}:
        raise Declined(f"the padding of {node.op_type} '{node.name}' depends on its input's size")
    # at stride 1 the same size means a padding of all that the window takes
    totals = [d * (k - 1) for d, k in zip(dilations, sizes, strict=True)]
    less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return (*less, *more) if mode == "SAME_UPPER" else (*more, *less)


def set_pads(node: ir.Node, begins: tuple[int, ...], ends: tuple[int, ...]) -> None:
    """Give ``node`` explicit padding."""
    node.attributes.pop("auto_pad", None)
    node.attributes["pads"] = ir.AttrInt64s("pads", [*begins, *ends])


def conv_kernel(node: ir.Node) -> tuple[Kernel, np.ndarray | None]:
    """Return the kernel and the bias of a Conv in float64.

    Raises:
        Declined: weight or bias is not constant or of no floating-point type.
    """
    weight = constant(node.inputs[1])
    if weight is None or ir.DataType.from_numpy(weight.dtype) not in FLOATS:
        raise Declined(f"the weight of Conv '{node.name}' is not constant")
    bias = None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        array = constant(node.inputs[2])
        if array is None:
            raise Declined(f"the bias of Conv '{node.name}' is not constant")
        bias = array.astype(np.float64)
    at = window_of(node, 1)
    wide, group = weight.astype(np.float64), int_attr(node, "group", 1)
    kernel = Kernel(wide, at.strides, at.dilations, at.begins, at.ends, group)
    return kernel, bias
