"""Writing QuantizeLinear and DequantizeLinear pairs into a graph, in the places that fuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.walk import is_op
from effdl.graph.weights import Array, Names, add_initializer, constant, constant_tensor
from effdl.passes.quantize._format import DTYPES, Format
from effdl.passes.quantize._grids import Grid, needs_output, quantized_values
from effdl.passes.quantize._layers import LayerWeights, bias_of
from effdl.passes.quantize._select import BINARY, WEIGHTED, Selection
from effdl.solve.quantize import (
    Float,
    Int,
    affine_parameters,
    quantize,
    quantize_bias,
)


@dataclass(frozen=True)
class Known:
    """What calibration told of the layers, by ``key_of``.

    Args:
        means: the mean of what a layer reads, [groups, K], for the correction of its bias.
        integers: weights that are rounded already, in the layout of the float ones and the type of the form.
    """

    means: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    integers: Mapping[str, Int] = field(default_factory=dict)


def key_of(node: ir.Node) -> str:
    """Return what tells a node of the main graph from others, also in a copy."""
    return node.outputs[0].name or ""


class QDQWriter:
    """Edits one model: one pair per activation, integer weights with a DequantizeLinear per user.

    Args:
        model: edited in place.
        form: the number format.
        made: the layers' weights.
        known: what calibration told of the layers.
    """

    def __init__(
        self,
        model: ir.Model,
        form: Format,
        made: LayerWeights,
        known: Known | None = None,
    ) -> None:
        self._graph = model.graph
        self._names = Names(model)
        self._form = form
        self._made = made
        self._known = known or Known()
        self._grids: dict[int, tuple[ir.Value, ir.Value]] = {}
        self._weights: dict[tuple[int, int | None, bytes, int], list[ir.Value]] = {}

    def write(self, chosen: Selection, grids: Mapping[str, Grid]) -> None:
        """Insert everything for the chosen nodes; ``grids`` is by the name of the activation."""
        values = quantized_values(chosen)
        at = {v: grids[v.name or ""] for v in values}
        for node in chosen.nodes:  # before any input is redirected, so that names are the model's
            if is_op(node, *WEIGHTED):
                self._layer(node, at[input_of(node)])
            elif is_op(node, *BINARY):
                self._constant_operands(node)
        readers = {v: chosen.consumers(v) for v in values}
        quantized = {chosen.output(n) for n in chosen.nodes if needs_output(n, chosen)}
        for value in values:
            self._activation(value, at[value], readers[value], value in quantized)

    def _activation(
        self,
        value: ir.Value,
        grid: Grid,
        readers: list[tuple[ir.Node, int]],
        from_kernel: bool,
    ) -> None:
        """Put a pair behind ``value``: for all its users when an 8-bit kernel makes it, so that the
        kernel's result has no float user; else only for the 8-bit readers."""
        uses = [(u.node, u.idx) for u in value.uses()] if from_kernel else readers
        base = value.name or "activation"
        scale, zero = self._grid_values(grid, base)
        q = self._node("QuantizeLinear", [value, scale, zero], base)
        dq = self._node("DequantizeLinear", [q.outputs[0], scale, zero], base)
        q.outputs[0].type = ir.TensorType(DTYPES[self._form.activation_type])
        restored = dq.outputs[0]
        for v in (q.outputs[0], restored):
            v.shape = value.shape
        restored.type = ir.TensorType(ir.DataType.FLOAT)
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], [q, dq])
        else:
            self._graph.insert_after(producer, [q, dq])
        for node, index in uses:
            node.replace_input_with(index, restored)
        if from_kernel and value.is_graph_output():
            self._move_output(value, restored)

    def _move_output(self, value: ir.Value, restored: ir.Value) -> None:
        name = value.name
        value.name = self._names.fresh(f"{name}_unquantized")
        restored.name = name
        restored.type, restored.shape = value.type, value.shape
        for i, output in enumerate(self._graph.outputs):
            if output is value:
                self._graph.outputs[i] = restored

    def _grid_values(self, grid: Grid, base: str) -> tuple[ir.Value, ir.Value]:
        if id(grid) not in self._grids:
            zero = np.array(grid.zero_point, self._form.activation_type)
            self._grids[id(grid)] = (
                self._constant(f"{base}_scale", np.array(grid.scale, np.float32)),
                self._constant(f"{base}_zero_point", zero),
            )
        return self._grids[id(grid)]

    def _constant(self, base: str, array: Array) -> ir.Value:
        return add_initializer(self._graph, self._names, base, array)

    def _node(
        self, op_type: str, inputs: list[ir.Value], base: str, axis: int | None = None
    ) -> ir.Node:
        node = ir.node(
            op_type,
            inputs,
            {} if axis is None else {"axis": axis},
            name=self._names.fresh(f"{base}_{op_type}"),
        )
        node.outputs[0].name = self._names.fresh(f"{base}_{op_type}_Output")
        return node

    def _layer(self, node: ir.Node, grid: Grid) -> None:
        """Give a Conv, MatMul or Gemm integer weights and bias."""
        value = node.inputs[1]
        assert value is not None
        bias_value = node.inputs[2] if len(node.inputs) > 2 else None
        bias, key = bias_of(node), key_of(node)
        scales = self._made.scales(node, grid)
        q = self._known.integers.get(key)
        if q is None:
            q = self._made.nearest(node, scales)
        if bias is not None and key in self._known.means:
            shift = self._made.shift(node, q, scales, self._known.means[key])
            bias = (bias - shift).astype(np.float32)
        axis = self._made.axis(node)
        stored = self._weight(node, value, q, scales)
        dq = self._node("DequantizeLinear", stored, value.name or "weight", axis)
        dq.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        dq.outputs[0].shape = stored[0].shape
        self._graph.insert_before(node, dq)
        node.replace_input_with(1, dq.outputs[0])
        if bias is not None and bias_value is not None and self._form.explicit:
            node.replace_input_with(2, self._constant(bias_value.name or "bias", bias))
        elif bias is not None and bias_value is not None:
            self._bias(node, bias_value.name or "bias", bias, grid, scales)

    def _weight(self, node: ir.Node, value: ir.Value, q: Int, scales: Float) -> list[ir.Value]:
        """Return integer weight, scale and zero point; users with the same needs share them."""
        key = (id(constant_tensor(value)), self._made.axis(node), scales.tobytes(), id(q))
        if key not in self._weights:
            base = value.name or "weight"
            self._weights[key] = [
                self._constant(f"{base}_quantized", q),
                self._constant(f"{base}_scale", scales),
                self._constant(f"{base}_zero_point", self._made.zero(scales)),
            ]
        return self._weights[key]

    def _bias(self, node: ir.Node, base: str, bias: Float, grid: Grid, scales: Float) -> None:
        q, scale = quantize_bias(bias, float(grid.scale), scales)
        values = [
            self._constant(f"{base}_quantized", q),
            self._constant(f"{base}_quantized_scale", scale),
        ]
        dq = self._node("DequantizeLinear", values, base, 0)
        dq.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        dq.outputs[0].shape = values[0].shape
        self._graph.insert_before(node, dq)
        node.replace_input_with(2, dq.outputs[0])

    def _constant_operands(self, node: ir.Node) -> None:
        """Quantize the constant side of an Add or Mul."""
        for index, value in enumerate(node.inputs):
            array = constant(value)
            if array is None or value is None:
                continue
            kind = self._form.activation_type
            even = self._form.symmetric_activations
            scale, zero = affine_parameters(
                float(array.min()), float(array.max()), kind, symmetric=even
            )
            base = value.name or "constant"
            inputs = [
                self._constant(f"{base}_quantized", quantize(array, scale, zero, kind)),
                self._constant(f"{base}_scale", np.array(scale, np.float32)),
                self._constant(f"{base}_zero_point", np.array(zero, kind)),
            ]
            dq = self._node("DequantizeLinear", inputs, base)
            dq.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            dq.outputs[0].shape = inputs[0].shape
            self._graph.insert_before(node, dq)
            node.replace_input_with(index, dq.outputs[0])


def input_of(node: ir.Node) -> ir.Value:
    """Return the activation that a layer reads."""
    value = node.inputs[0]
    if value is None:
        raise ValueError(f"{node.name}: no input")
    return value
