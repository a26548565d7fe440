"""Writing weights of 4 or 8 bits in blocks: MatMulNBits, GatherBlockQuantized, and int8 for Conv."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.walk import float_attr, int_attr, is_op
from effdl.graph.weights import Array, Names, add_initializer, constant, constant_tensor
from effdl.passes.quantize._edit import graph_of, home_of, new_node, put_in_place
from effdl.passes.quantize._weights import with_weight
from effdl.solve.blocks import Grid, Integers
from effdl.solve.quantize import Float, Int, quantize, weight_scales

_CONTRIB = "com.microsoft"


class BlockWriter:
    """Edits one model.

    Args:
        model: edited in place.
        accuracy_level: of MatMulNBits: 0 or 1 float32, 4 activations in int8.
    """

    def __init__(self, model: ir.Model, accuracy_level: int) -> None:
        self._model = model
        self._level = accuracy_level
        self._names = Names(model)
        self._written: dict[tuple[int, str], list[ir.Value]] = {}

    def product(self, node: ir.Node, q: Integers, grid: Grid) -> None:
        """Replace a MatMul or Gemm; ``q`` is [outputs, inputs]."""
        x = node.inputs[0]
        assert x is not None
        outputs, inputs = q.shape
        short = -inputs % grid.size
        whole = np.pad(q, ((0, 0), (0, short))) if short else q
        packed = pack(whole.reshape(outputs, -1, grid.size), grid.bits)
        weight = self._constants(node, 1, _form(node), packed, grid)
        operands: list[ir.Value | None] = [x, *weight]
        bias = _bias(node)
        if bias is not None:
            operands += [None] * (5 - len(operands)) + [self._added(node, bias)]
        made = ir.node(
            "MatMulNBits",
            operands,
            {
                "K": inputs,
                "N": outputs,
                "bits": grid.bits,
                "block_size": grid.size,
                "accuracy_level": self._level,
            },
            domain=_CONTRIB,
        )
        self._replace(node, made)

    def embedding(self, node: ir.Node, q: Integers, grid: Grid) -> None:
        """Replace a Gather of rows of a constant table; ``q`` is [rows, columns]."""
        data, *parameters = self._constants(node, 0, "table", pack(q, grid.bits), grid)
        made = ir.node(
            "GatherBlockQuantized",
            [data, node.inputs[1], *parameters],
            {"gather_axis": 0, "quantize_axis": 1, "block_size": grid.size, "bits": grid.bits},
            domain=_CONTRIB,
        )
        self._replace(node, made)

    def convolution(self, node: ir.Node) -> None:
        """Store the weight of a Conv as int8, one scale per output channel.

        ONNX Runtime folds Cast and Mul when it loads the model; a DequantizeLinear it would run each time.
        """
        value = node.inputs[1]
        assert value is not None
        tensor = constant_tensor(value)
        assert tensor is not None
        key = (id(value), "conv")
        graph = graph_of(node)
        if key not in self._written:
            q, scales = with_weight(tensor, _channels)
            base = value.name or "weight"
            scales = scales.reshape(-1, *[1] * (q.ndim - 1))
            home = home_of(value, node)
            self._written[key] = [
                add_initializer(home, self._names, f"{base}_quantized", q),
                add_initializer(home, self._names, f"{base}_scale", scales),
            ]
        whole, scale = self._written[key]
        near = node.name or node.op_type
        cast = new_node(self._names, "Cast", [whole], near, {"to": int(ir.DataType.FLOAT)})
        mul = new_node(self._names, "Mul", [cast.outputs[0], scale], near)
        graph.insert_before(node, [cast, mul])
        for made in (cast, mul):
            made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            made.outputs[0].shape = ir.Shape(tensor.shape.numpy())
        node.replace_input_with(1, mul.outputs[0])

    def _constants(
        self, node: ir.Node, index: int, kind: str, packed: npt.NDArray[np.uint8], grid: Grid
    ) -> list[ir.Value]:
        """Return data, scales and zero points; nodes that share a weight share them."""
        value = node.inputs[index]
        assert value is not None
        key = (id(value), kind)
        if key not in self._written:
            home = home_of(value, node)
            base = value.name or "weight"
            parts: dict[str, Array] = {f"{base}_q{grid.bits}": packed, f"{base}_scales": grid.scale}
            if (grid.zero != 1 << (grid.bits - 1)).any():
                parts[f"{base}_zero_points"] = pack(grid.zero, grid.bits)
            made = [add_initializer(home, self._names, n, a) for n, a in parts.items()]
            self._written[key] = made
        return self._written[key]

    def _added(self, node: ir.Node, bias: ir.Value) -> ir.Value:
        """Return the bias of a Gemm times its beta."""
        beta, array = float_attr(node, "beta", 1.0), constant(bias)
        assert array is not None
        flat = (array.reshape(-1).astype(np.float32) * np.float32(beta)).astype(np.float32)
        if beta == 1.0 and array.ndim == 1:
            return bias
        return add_initializer(graph_of(node), self._names, f"{bias.name}_row", flat)

    def _replace(self, node: ir.Node, made: ir.Node) -> None:
        self._model.opset_imports.setdefault(_CONTRIB, 1)
        made.name = node.name
        put_in_place(node, [made])


def pack(q: Integers, bits: int) -> npt.NDArray[np.uint8]:
    """Return integers with two of 4 bits in a byte along the last axis, the first in the low half."""
    if bits == 8:
        return q
    even = np.pad(q, [(0, 0)] * (q.ndim - 1) + [(0, q.shape[-1] % 2)])
    return np.bitwise_or(even[..., 0::2], np.left_shift(even[..., 1::2], 4), dtype=np.uint8)


def _channels(weight: Float) -> tuple[Int, Float]:
    scales = weight_scales(weight, 0, method="mse")
    return quantize(weight, scales, np.int8(0), "int8", 0), scales


def _form(node: ir.Node) -> str:
    """Tell apart readers of one weight that want other integers of it."""
    return f"product {int_attr(node, 'transB', 0)} {float_attr(node, 'alpha', 1.0)}"


def _bias(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if is_op(node, "Gemm") and len(node.inputs) > 2 else None
