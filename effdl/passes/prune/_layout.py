"""Where the weights of a node are, and which of their axes a dot product runs along."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.walk import int_attr, is_op

Array = npt.NDArray[Any]
_RECURRENT = ("LSTM", "GRU", "RNN")
_OF_QUANTIZED = {
    "QLinearConv": 3,
    "QLinearMatMul": 3,
    "ConvInteger": 1,
    "MatMulInteger": 1,
    "MatMulNBits": 1,
    "QGemm": 3,
    "DynamicQuantizeMatMul": 1,
    "DynamicQuantizeLSTM": 1,
    "MatMulIntegerToFloat": 1,
}


@dataclass(frozen=True)
class Layout:
    """A weight seen as [outputs, kernel positions, summed inputs].

    Args:
        split: the weight's shape, with grouped axes taken apart.
        order: the axes of ``split``, outputs first, then kernel positions, the summed axis last.
        outputs: product of the output axes.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    outputs: int

    @property
    def summed(self) -> int:
        """Length of the axis that a dot product runs along."""
        return self.split[self.order[-1]]

    def view(self, weight: Array) -> Array:
        """Return ``weight`` as [outputs, kernel positions, summed inputs]."""
        ordered = weight.reshape(self.split).transpose(self.order)
        return ordered.reshape(self.outputs, -1, self.summed)

    def restore(self, viewed: Array) -> Array:
        """Undo ``view``, but for the split of grouped axes (same order of elements)."""
        ordered = viewed.reshape([self.split[a] for a in self.order])
        return ordered.transpose(np.argsort(self.order))


def weight_inputs(node: ir.Node) -> Iterator[int]:
    """Yield the indices of the inputs of ``node`` that hold weights, not biases."""
    if is_op(node, "MatMul"):
        yield from (1, 0)
    elif is_op(node, "Conv", "ConvTranspose", "Gemm") or is_op(
        node, "FusedConv", "FusedGemm", "Attention", domain="com.microsoft"
    ):
        yield 1
    elif is_op(node, *_RECURRENT):
        yield from (1, 2)
    elif is_op(node, "Gather"):
        yield 0


def quantized_weight(node: ir.Node) -> ir.Value | None:
    """Return the integer weight of a node that computes with quantized weights, None for others."""
    index = _OF_QUANTIZED.get(node.op_type)
    return None if index is None or index >= len(node.inputs) else node.inputs[index]


def layout_of(node: ir.Node, index: int, shape: tuple[int, ...]) -> Layout | None:
    """Return how ``node`` uses its weight at input ``index``; None when the shape does not fit."""
    rank = len(shape)
    match node.op_type:
        case "Conv" | "FusedConv" if rank >= 3:
            return Layout(shape, (0, *range(2, rank), 1), shape[0])
        case "ConvTranspose" if rank >= 3:
            return _transposed(shape, int_attr(node, "group", 1))
        case "Gemm" | "FusedGemm" if rank == 2:
            order = (0, 1) if int_attr(node, "transB", 0) else (1, 0)
            return Layout(shape, order, shape[order[0]])
        case "Attention" if rank == 2:
            return Layout(shape, (1, 0), shape[1])
        case "MatMul" if rank == 1 or (index == 0 and rank):
            return Layout(shape, tuple(range(rank)), math.prod(shape[:-1]))
        case "MatMul" if rank:
            order = (*range(rank - 2), rank - 1, rank - 2)
            return Layout(shape, order, math.prod(shape[:-2]) * shape[-1])
        case "LSTM" | "GRU" | "RNN" if rank == 3:
            return Layout(shape, (0, 1, 2), shape[0] * shape[1])
        case "Gather" if rank == 2:
            return Layout(shape, (0, 1), shape[0])
    return None


def _transposed(shape: tuple[int, ...], groups: int) -> Layout | None:
    """ConvTranspose stores [inputs, outputs per group, kernel]: outputs sum over their group."""
    if groups < 1 or shape[0] % groups:
        return None
    split = (groups, shape[0] // groups, *shape[1:])
    order = (0, 2, *range(3, len(split)), 1)
    return Layout(split, order, groups * shape[1])
