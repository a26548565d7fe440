"""Weights as matrices: outputs below each other, what each multiplies along a row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.walk import int_attr, is_op

Array = npt.NDArray[Any]
_INPUTS = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "Gemm": (1,),
    "MatMul": (1, 0),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
    "Gather": (0,),
}


@dataclass(frozen=True)
class Matrix:
    """How a weight is seen as [sets, N, K]; every set reads inputs of its own.

    Args:
        split: the shape of the weight with joined axes taken apart.
        order: the axes of ``split``: those of sets, of outputs, of inputs.
        shape: [sets, N, K].
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, int, int]

    def view(self, weight: Array) -> Array:
        """Return the weight as [sets, N, K]."""
        return weight.reshape(self.split).transpose(self.order).reshape(self.shape)

    def restore(self, matrix: Array, shape: tuple[int, ...]) -> Array:
        """Return a weight of ``shape`` whose view is ``matrix``."""
        ordered = matrix.reshape([self.split[a] for a in self.order])
        return np.ascontiguousarray(ordered.transpose(np.argsort(self.order)).reshape(shape))


def weight_inputs(node: ir.Node) -> tuple[int, ...]:
    """Return the indices of the inputs of ``node`` that may hold a weight, none for other ops."""
    return _INPUTS.get(node.op_type, ()) if is_op(node, *_INPUTS) else ()


def matrix_of(node: ir.Node, index: int, shape: tuple[int, ...]) -> Matrix | None:
    """Return how ``node`` reads its weight at input ``index``; None where the shape does not fit."""
    rank = len(shape)
    groups = int_attr(node, "group", 1)
    match node.op_type:
        case "Conv" if rank >= 3 and groups > 0 and shape[0] % groups == 0:
            split = (groups, shape[0] // groups, math.prod(shape[1:]))
            return Matrix(split, (0, 1, 2), split)
        case "ConvTranspose" if rank >= 3 and groups > 0 and shape[0] % groups == 0:
            split = (groups, shape[0] // groups, math.prod(shape[1:]))
            return Matrix(split, (0, 2, 1), (groups, split[2], split[1]))
        case "Gemm" if rank == 2 and not int_attr(node, "transB", 0):
            return Matrix(shape, (1, 0), (1, shape[1], shape[0]))
        case "MatMul" if rank >= 2 and index == 1:
            stack = math.prod(shape[:-2])
            return Matrix((stack, *shape[-2:]), (0, 2, 1), (1, stack * shape[-1], shape[-2]))
        case _ if rank >= 2:
            rows = math.prod(shape[:-1])
            return Matrix((rows, shape[-1]), (0, 1), (1, rows, shape[-1]))
    return None
