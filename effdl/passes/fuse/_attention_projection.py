"""The layers that make Q, K and V: a product with a constant matrix, plus a constant."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from effdl.graph.probes import Probes
from effdl.graph.walk import float_attr, int_attr, is_op
from effdl.graph.weights import Array, constant


@dataclass(frozen=True)
class Projection:
    """A layer x W + b with constant weights that makes Q, K or V.

    Args:
        x: its input, [B, S, C].
        weight: [C, N]; ``bias`` N numbers or None.
        product: the node that multiplies.
    """

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    product: ir.Node

    @property
    def columns(self) -> int:
        """N."""
        weight = constant(self.weight)
        assert weight is not None
        return int(weight.shape[1])

    def vector(self) -> Array:
        """Return the bias as a vector [N], zeros where there is none."""
        weight, own = constant(self.weight), constant(self.bias)
        assert weight is not None
        return np.zeros(weight.shape[1], weight.dtype) if own is None else own.ravel()


def whole_projection(value: ir.Value, probes: Probes) -> Projection | None:
    """Return the layer that makes ``value`` [B, S, ...], also where it works on [B·S, C] in between."""
    found = projection(value)
    node = value.producer()
    if found is not None or node is None or not is_op(node, "Reshape"):
        return found
    inner = node.inputs[0]
    flat = projection(inner) or _gemm(inner) if inner is not None and lone(inner) else None
    before = flat.x.producer() if flat is not None else None
    if flat is None or before is None or not is_op(before, "Reshape") or before.inputs[0] is None:
        return None
    x = before.inputs[0]
    own, made, rows = probes.of(x), probes.of(value), probes.of(flat.x)
    if own is None or made is None or rows is None:
        return None
    same = all(
        len(a) == 3 and a[:2] == b[:2] and c == (a[0] * a[1], a[2])
        for a, b, c in zip(own, made, rows, strict=True)
    )
    return replace(flat, x=x) if same else None


def _gemm(value: ir.Value) -> Projection | None:
    """Return the layer that is a plain Gemm with a constant matrix."""
    node = value.producer()
    if node is None or not is_op(node, "Gemm") or len(node.inputs) < 2:
        return None
    plain = [float_attr(node, "alpha", 1.0), float_attr(node, "beta", 1.0)] == [1.0, 1.0]
    if not plain or int_attr(node, "transA", 0) or int_attr(node, "transB", 0):
        return None
    x, weight = node.inputs[:2]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return _constant_layer(x, weight, bias, node)


def projection(value: ir.Value) -> Projection | None:
    """Return the layer that makes ``value``, MatMul with or without Add; None for anything else."""
    node = value.producer()
    bias: ir.Value | None = None
    if is_op(node, "Add"):
        assert node is not None
        product = _product(node)
        if product is None or not lone(product.outputs[0]):
            return None
        bias = next(v for v in node.inputs if v is not product.outputs[0])
        node = product
    if node is None or not is_op(node, "MatMul"):
        return None
    x, weight = node.inputs
    return _constant_layer(x, weight, bias, node)


def _constant_layer(
    x: ir.Value | None, weight: ir.Value | None, bias: ir.Value | None, product: ir.Node
) -> Projection | None:
    array = constant(weight)
    if x is None or weight is None or array is None or array.ndim != 2 or array.dtype != np.float32:
        return None
    if bias is not None:
        own = constant(bias)
        if own is None or own.size != array.shape[1] or own.shape[-1:] != (array.shape[1],):
            return None
    return Projection(x, weight, bias, product)


def _product(node: ir.Node) -> ir.Node | None:
    """Return the MatMul with a constant matrix that an Add adds a constant to."""
    for value, other in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        made = value.producer() if value is not None else None
        if made is not None and is_op(made, "MatMul") and constant(other) is not None:
            return made
    return None


def lone(value: ir.Value) -> bool:
    """Whether one node reads ``value`` and it is no output."""
    return len({u.node for u in value.uses()}) == 1 and not value.is_graph_output()
