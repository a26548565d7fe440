"""The weights of a model that ``prune_weights`` may work on, and why others are left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.walk import all_nodes, is_op, producer
from effdl.graph.weights import Names, add_initializer, constant_tensor
from effdl.passes.base import Context
from effdl.passes.prune._layout import Layout, layout_of, quantized_weight, weight_inputs

Array = npt.NDArray[Any]
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


@dataclass
class Weight:
    """A constant and the selected nodes that compute with it.

    Args:
        value, tensor: the constant.
        layout: its outputs and inputs.
        users: the nodes that read it.
        index: of the input where the first of them reads it.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    layout: Layout
    users: list[ir.Node] = field(default_factory=list)
    index: int = 1

    def array(self) -> Array:
        """Return the numbers of the constant."""
        array: Array = self.tensor.numpy()
        return array

    def view(self) -> Array:
        """Return the numbers as [outputs, kernel positions, summed inputs]."""
        return self.layout.view(self.array())

    def shaped(self, viewed: Array) -> Array:
        """Return what is in the order of ``view`` in the shape of the constant."""
        return self.layout.restore(viewed).reshape(tuple(self.tensor.shape.numpy()))


@dataclass(frozen=True)
class Finder:
    """Looks for weights.

    Args:
        selected: whether the options let the pass touch a node.
        embeddings: whether tables of Gather count.
        min_size: of a weight.
        group: summed inputs that a weight needs at least, as n:m; empty for any.
        same_layout: whether all users must read a weight along the same axes.
    """

    selected: Callable[[ir.Node], bool]
    embeddings: bool
    min_size: int
    group: str
    same_layout: bool

    def find(self, model: ir.Model, ctx: Context) -> list[Weight]:
        """Return the weights to prune, in graph order, and log the candidates that are none."""
        outside = {n for f in model.functions.values() for n in f}
        found: dict[ir.Value, Weight] = {}
        refused: set[ir.Value] = set()
        for node in all_nodes(model):
            if not self.selected(node):
                continue
            if (packed := quantized_weight(node)) is not None:
                ctx.skip(node, f"its weight '{packed.name}' is quantized")
            for index in weight_inputs(node):
                value = node.inputs[index] if index < len(node.inputs) else None
                if value is None or value in refused:
                    continue
                if value in found:
                    self._join(found, refused, node, value, index, ctx)
                    continue
                weight, reason = self._weight(node, index, value)
                if weight is not None and value.producer() in outside:
                    reason = "its weight is inside a function: inline the function first"
                if reason:
                    refused.add(value)
                    ctx.skip(node, reason)
                elif weight is not None:
                    found[value] = weight
        return [w for w in found.values() if _all_users(w, ctx)]

    def _weight(self, node: ir.Node, index: int, value: ir.Value) -> tuple[Weight | None, str]:
        """Return the weight at input ``index``, or why it cannot be pruned ('' for no candidate)."""
        embedding = is_op(node, "Gather")
        if embedding and not self.embeddings:
            return None, ""
        tensor = constant_tensor(value)
        if tensor is None:
            return None, _not_constant(node, value)
        if tensor.dtype not in _FLOATS:
            quantized = f"its weight '{value.name}' is of type {tensor.dtype.name}, not a float"
            return None, "" if embedding else quantized
        layout = layout_of(node, index, tuple(tensor.shape.numpy()))
        if layout is None or not tensor.size:
            return None, f"its weight '{value.name}' has the unexpected shape {tensor.shape}"
        if tensor.size < self.min_size:
            return None, f"{tensor.size} weights, below min_size {self.min_size}"
        if self.group and layout.summed < int(self.group.split(":")[1]):
            few = f"{layout.summed} input channels per output, fewer than a group of {self.group}"
            return None, few
        return Weight(value, tensor, layout, [node], index), ""

    def _join(
        self,
        found: dict[ir.Value, Weight],
        refused: set[ir.Value],
        node: ir.Node,
        value: ir.Value,
        index: int,
        ctx: Context,
    ) -> None:
        """Add ``node`` to the users of a weight that was found before, if it reads it alike."""
        weight = found[value]
        layout = layout_of(node, index, tuple(weight.tensor.shape.numpy()))
        if not self.same_layout or layout == weight.layout:
            weight.users.append(node)
            return
        ctx.skip(node, f"reads the shared weight '{value.name}' along another axis")
        refused.add(value)
        del found[value]


def _all_users(weight: Weight, ctx: Context) -> bool:
    others = [u.node for u in weight.value.uses() if u.node not in weight.users]
    if not others and not weight.value.is_graph_output():
        return True
    who = f"by '{others[0].name or others[0].op_type}'" if others else "as a graph output"
    for node in weight.users:
        ctx.skip(node, f"its weight '{weight.value.name}' is also used {who}, not pruned here")
    return False


def _not_constant(node: ir.Node, value: ir.Value) -> str:
    """Return why a computed weight is left alone, '' where a computed operand is normal."""
    dequantize = producer(value, "DequantizeLinear")
    if dequantize and constant_tensor(dequantize.inputs[0]) is not None:
        return f"its weight '{value.name}' is quantized"
    if is_op(node, "MatMul", "Gather"):
        return ""
    return f"its weight '{value.name}' is computed or fed, not constant"


def replace(weight: Weight, array: npt.NDArray[np.generic], names: Names) -> None:
    """Give all users of a weight the new array."""
    value = weight.value
    if value.is_initializer():
        value.const_value = ir.tensor(array, name=value.name)
        return
    constant = value.producer()
    if constant is None or not isinstance(constant.graph, ir.Graph):
        raise ValueError(f"'{value.name}' is neither an initializer nor a Constant node")
    fresh = add_initializer(constant.graph, names, value.name or "weight", array)
    value.replace_all_uses_with(fresh)
