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
from effdl.passes.quantize._grids import Grid, needs_output, quantized_values, weight_axis
from effdl.passes.quantize._select import BINARY, WEIGHTED, Selection
from effdl.passes.quantize._weights import with_weight
from effdl.solve.quantize import (
    Float,
    Int,
    WeightMethod,
    affine_parameters,
    bias_scale_floor,
    dequantize,
    mean_shift,
    quantize,
    quantize_bias,
    weight_scales,
)


@dataclass(frozen=True)
class Known:
    """What calibration told of the layers, by ``key_of``.

    Args:
        means: the mean of what a layer reads, [groups, K], for the correction of its bias.
        integers: weights that are rounded already, in the layout of the float ones.
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
        per_channel: one weight scale per output channel.
        weight_method: how weight scales are chosen.
        known: what calibration told of the layers.
    """

    def __init__(
        self,
        model: ir.Model,
        form: Format,
        per_channel: bool,
        weight_method: WeightMethod,
        known: Known | None = None,
    ) -> None:
        self._graph = model.graph
        self._names = Names(model)
        self._form = form
        self._per_channel = per_channel
        self._weight_method = weight_method
        self._known = known or Known()
        self._grids: dict[int, tuple[ir.Value, ir.Value]] = {}
        self._weights: dict[tuple[int, int | None, bytes, bytes], tuple[ir.Value, ...]] = {}

    def write(self, chosen: Selection, grids: Mapping[str, Grid]) -> None:
        """Insert everything for the chosen nodes; ``grids`` is by the name of the activation."""
        values = quantized_values(chosen)
        at = {v: grids[v.name or ""] for v in values}
        for node in chosen.nodes:  # before any input is redirected, so that names are the model's
            if is_op(node, *WEIGHTED):
                self._layer(node, at[_input(node)])
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
        bias = bias_of(node)
        q, scale, zero = self._weight(node, value, grid)
        axis = weight_axis(node) if self._per_channel else None
        if bias is not None and key_of(node) in self._known.means:
            bias = (bias - self._shift(node, q, scale, zero)).astype(np.float32)
        dq = self._node("DequantizeLinear", [q, scale, zero], value.name or "weight", axis)
        dq.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        dq.outputs[0].shape = q.shape
        self._graph.insert_before(node, dq)
        node.replace_input_with(1, dq.outputs[0])
        if bias is not None and bias_value is not None and self._form.explicit:
            node.replace_input_with(2, self._constant(bias_value.name or "bias", bias))
        elif bias is not None and bias_value is not None:
            scales = scale.const_value
            assert scales is not None
            self._bias(node, bias_value.name or "bias", bias, grid, scales.numpy())

    def _shift(self, node: ir.Node, *quantized: ir.Value) -> npt.NDArray[np.float64]:
        """Return by how much the rounding of the weights moves the mean of each output."""
        tensor = constant_tensor(node.inputs[1])
        assert tensor is not None
        q, scale, zero = (constant(v) for v in quantized)
        flip = is_op(node, "Gemm") and weight_axis(node) == 1

        def work(weight: Float) -> npt.NDArray[np.float64]:
            axis = weight_axis(node) if self._per_channel else 0
            change = dequantize(q, scale, zero, axis) - weight  # type: ignore[arg-type]
            rows = change.T if flip else change.reshape(change.shape[0], -1)
            return mean_shift(rows, self._known.means[key_of(node)])

        return with_weight(tensor, work)

    def _weight(self, node: ir.Node, value: ir.Value, grid: Grid) -> tuple[ir.Value, ...]:
        """Return integer weight, scale and zero point; users with the same needs share them."""
        tensor = constant_tensor(value)
        assert tensor is not None
        kind = self._form.weight_type
        axis = weight_axis(node) if self._per_channel else None
        scales = scales_of(node, grid, self._form, self._per_channel, self._weight_method)
        zero = np.full(scales.shape, 0 if kind == "int8" else 128, kind)
        rounded = self._known.integers.get(key_of(node))
        q = (
            with_weight(tensor, lambda w: quantize(w, scales, zero, kind, axis or 0))
            if rounded is None
            else (rounded.astype(np.int16) + (0 if kind == "int8" else 128)).astype(kind)
        )
        own = b"" if rounded is None else rounded.tobytes()
        key = (id(tensor), axis, scales.tobytes(), own)
        if key not in self._weights:
            base = value.name or "weight"
            self._weights[key] = (
                self._constant(f"{base}_quantized", q),
                self._constant(f"{base}_scale", scales),
                self._constant(f"{base}_zero_point", zero),
            )
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
            scale, zero = affine_parameters(float(array.min()), float(array.max()), kind)
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


def bias_of(node: ir.Node) -> Float | None:
    """Return the bias of a layer, one number per output, None where it has none."""
    array = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    return None if array is None else array.reshape(-1).astype(np.float32)


def scales_of(
    node: ir.Node, grid: Grid, form: Format, per_channel: bool, method: WeightMethod
) -> Float:
    """Return the scales of a layer's weights: one per output channel, or one, 0-d.

    Args:
        node: a Conv, MatMul or Gemm.
        grid: of its input.
        form: the number format.
        per_channel: one scale per output channel.
        method: how a scale is chosen.
    """
    tensor, bias = constant_tensor(node.inputs[1]), bias_of(node)
    assert tensor is not None
    axis = weight_axis(node) if per_channel else None
    guard = form.saturation_guard
    scales = with_weight(
        tensor, lambda w: weight_scales(w, axis, method=method, saturation_guard=guard)
    )
    floor = np.zeros(1, np.float32) if bias is None else bias_scale_floor(bias, float(grid.scale))
    return np.maximum(scales, floor if per_channel else floor.max()).astype(np.float32)


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    if value is None:
        raise ValueError(f"{node.name}: no input")
    return value
