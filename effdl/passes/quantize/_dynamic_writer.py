"""Writing 8-bit matrix products whose input is quantized at run time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effdl.graph.walk import float_attr, int_attr, is_op
from effdl.graph.weights import Array, Names, add_initializer, constant, constant_tensor
from effdl.passes.quantize._edit import graph_of, home_of, new_node, put_in_place
from effdl.passes.quantize._weights import with_weight
from effdl.solve.quantize import Float, Int, WeightMethod, quantize, weight_scales


class DynamicWriter:
    """Edits one model; one DynamicQuantizeLinear serves all products with the same input.

    The nodes are in the order that ONNX Runtime fuses into DynamicQuantizeMatMul (one product) or
    MatMulIntegerToFloat (several), with the bias Add behind them.

    Args:
        model: edited in place.
        per_channel: one weight scale per output column.
        weight_method: how weight scales are chosen.
        saturation_guard: keep weights small enough for 16-bit sums of two products.
    """

    def __init__(
        self,
        model: ir.Model,
        per_channel: bool,
        weight_method: WeightMethod,
        saturation_guard: bool,
    ) -> None:
        self._model = model
        self._names = Names(model)
        self._per_channel = per_channel
        self._method = weight_method
        self._guard = saturation_guard
        self._inputs: dict[tuple[int, ir.Value], ir.Node] = {}
        self._weights: dict[tuple[int, bool], tuple[ir.Value, ir.Value]] = {}
        self._tables: dict[int, tuple[ir.Value, ir.Value]] = {}

    def product(self, node: ir.Node) -> None:
        """Replace a MatMul or Gemm that ``dynamic.refusal`` lets through."""
        graph, x = graph_of(node), node.inputs[0]
        assert x is not None
        gemm = is_op(node, "Gemm")
        transposed = gemm and bool(int_attr(node, "transB", 0))
        weight, scale = self._weight(node, transposed)
        base = node.name or node.op_type
        quantizer = self._quantizer(graph, x, node)
        q, x_scale, x_zero = quantizer.outputs
        made = [
            new_node(self._names, "MatMulInteger", [q, weight, x_zero], base),
            new_node(
                self._names,
                "Mul",
                [x_scale, self._times_alpha(graph, node, scale)],
                f"{base}_scales",
            ),
        ]
        made.append(
            new_node(
                self._names, "Cast", [made[0].outputs[0]], base, {"to": int(ir.DataType.FLOAT)}
            )
        )
        made.append(new_node(self._names, "Mul", [made[2].outputs[0], made[1].outputs[0]], base))
        bias = node.inputs[2] if gemm and len(node.inputs) > 2 else None
        if bias is not None:
            term = self._times_beta(graph, node, bias)
            made.append(new_node(self._names, "Add", [made[-1].outputs[0], term], base))
        put_in_place(node, made)

    def recurrent(self, node: ir.Node) -> None:
        """Replace an LSTM with constant weights by DynamicQuantizeLSTM.

        Its weights are [directions, inputs, 4 * hidden], transposed against LSTM's; scales and zero points
        [directions, 4 * hidden].
        """
        given: list[ir.Value | None] = [*node.inputs, *[None] * (8 - len(node.inputs))]
        parts: list[ir.Value] = []
        for index in (1, 2):
            value = node.inputs[index]
            tensor = constant_tensor(value)
            assert value is not None
            assert tensor is not None
            key = (id(tensor), False)
            if key not in self._weights:
                q, scales = with_weight(tensor, self._gates)
                base, home = value.name or "weight", home_of(value, node)
                self._weights[key] = (
                    add_initializer(home, self._names, f"{base}_quantized", q),
                    add_initializer(home, self._names, f"{base}_scale", scales),
                )
            weight, scale = self._weights[key]
            given[index] = weight
            zero = np.zeros(scale.const_value.shape.numpy() if scale.const_value else (), np.int8)
            name = f"{value.name}_zero_point"
            parts += [scale, add_initializer(home_of(value, node), self._names, name, zero)]
        made = ir.Node(
            "com.microsoft",
            "DynamicQuantizeLSTM",
            [*given, *parts],
            [a for n, a in node.attributes.items() if n != "layout"],
            num_outputs=len(node.outputs),
            name=node.name,
        )
        self._model.opset_imports.setdefault(made.domain, 1)
        put_in_place(node, [made])

    def _gates(self, weight: Float) -> tuple[Int, Float]:
        """Quantize [directions, 4 * hidden, inputs], one scale per row; transpose the integers."""
        directions, rows, inputs = weight.shape
        flat = weight.reshape(directions * rows, inputs)
        scales = weight_scales(
            flat,
            0 if self._per_channel else None,
            method=self._method,
            saturation_guard=self._guard,
        )
        q = quantize(flat, scales, np.int8(0), "int8", 0).reshape(weight.shape)
        every = np.broadcast_to(scales, (directions * rows,)).reshape(directions, rows)
        return (
            np.ascontiguousarray(q.transpose(0, 2, 1)),
            np.array(every if self._per_channel else every[:, 0]),
        )

    def embedding(self, node: ir.Node) -> None:
        """Replace a Gather of rows of a constant table: int8 rows and one scale per row."""
        table, indices = node.inputs[0], node.inputs[1]
        assert table is not None
        assert indices is not None
        tensor = constant_tensor(table)
        assert tensor is not None
        key = id(tensor)
        if key not in self._tables:
            q, scales = with_weight(tensor, _rows)
            name, home = table.name or "table", home_of(table, node)
            self._tables[key] = (
                add_initializer(home, self._names, f"{name}_quantized", q),
                add_initializer(home, self._names, f"{name}_scale", scales.reshape(-1, 1)),
            )
        base = node.name or "Gather"
        made = [
            new_node(self._names, "Gather", [part, indices], base, {"axis": 0})
            for part in self._tables[key]
        ]
        made.append(
            new_node(
                self._names, "Cast", [made[0].outputs[0]], base, {"to": int(ir.DataType.FLOAT)}
            )
        )
        made.append(new_node(self._names, "Mul", [made[2].outputs[0], made[1].outputs[0]], base))
        put_in_place(node, made)

    def _quantizer(self, graph: ir.Graph, x: ir.Value, before: ir.Node) -> ir.Node:
        key = (id(graph), x)
        if key not in self._inputs:
            base = x.name or "activation"
            node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
            node.name = self._names.fresh(f"{base}_DynamicQuantizeLinear")
            for output, part in zip(
                node.outputs, ("quantized", "scale", "zero_point"), strict=True
            ):
                output.name = self._names.fresh(f"{base}_{part}")
            graph.insert_before(before, node)
            self._inputs[key] = node
        return self._inputs[key]

    def _weight(self, node: ir.Node, transposed: bool) -> tuple[ir.Value, ir.Value]:
        """Return the integer weight [inputs, outputs] and its scales."""
        value = node.inputs[1]
        tensor = constant_tensor(value)
        assert value is not None
        assert tensor is not None
        key = (id(tensor), transposed)
        if key not in self._weights:
            axis = (0 if transposed else 1) if self._per_channel else None

            def convert(weight: Float) -> tuple[Int, Float]:
                scales = weight_scales(
                    weight, axis, method=self._method, saturation_guard=self._guard
                )
                q = quantize(weight, scales, np.int8(0), "int8", axis or 0)
                return (np.ascontiguousarray(q.T) if transposed else q), scales

            q, scales = with_weight(tensor, convert)
            base, home = value.name or "weight", home_of(value, node)
            self._weights[key] = (
                add_initializer(home, self._names, f"{base}_quantized", q),
                add_initializer(home, self._names, f"{base}_scale", scales),
            )
        return self._weights[key]

    def _times_alpha(self, graph: ir.Graph, node: ir.Node, scale: ir.Value) -> ir.Value:
        alpha = float_attr(node, "alpha", 1.0) if is_op(node, "Gemm") else 1.0
        array = constant(scale)
        if alpha == 1.0 or array is None:
            return scale
        return self._scaled(graph, scale.name or "scale", array, alpha)

    def _times_beta(self, graph: ir.Graph, node: ir.Node, bias: ir.Value) -> ir.Value:
        beta, array = float_attr(node, "beta", 1.0), constant(bias)
        if beta == 1.0 or array is None:
            return bias
        return self._scaled(graph, bias.name or "bias", array, beta)

    def _scaled(self, graph: ir.Graph, base: str, array: Array, factor: float) -> ir.Value:
        product: Float = (array.astype(np.float32) * np.float32(factor)).astype(np.float32)
        return add_initializer(graph, self._names, f"{base}_scaled", product)


def _rows(table: Float) -> tuple[Int, Float]:
    scales = weight_scales(table, 0)
    return quantize(table, scales, np.int8(0), "int8", 0), scales
