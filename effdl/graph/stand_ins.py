"""Contrib operators as standard ones with the same output shape, for ONNX's shape inference.

ONNX Runtime's own operators have no inference in the onnx package, so that every value behind one
would be unknown. The stand-ins compute nothing: only types and shapes of their outputs are right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
from onnx import TensorProto, helper

from effdl.graph.shape_values import graphs, set_nodes
from effdl.graph.walk import MICROSOFT

_UNARY = """
BiasGelu BiasSoftmax FastGelu Gelu GroupNorm QLinearLeakyRelu QLinearSigmoid QLinearSoftmax QuickGelu
RotaryEmbedding SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization
SimplifiedLayerNormalization LayerNormalization ParametricSoftplus Affine ImageScaler ScaledTanh
"""
_AS_FIRST_INPUT = frozenset(_UNARY.split())
_WITH_SUM = frozenset({"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})
"""Their fourth output is the sum that is normalized."""
# contrib name -> (standard name, indices of the inputs it keeps)
_RENAMED: dict[str, tuple[str, tuple[int, ...]]] = {
    "FusedConv": ("Conv", (0, 1, 2)),
    "FusedGemm": ("Gemm", (0, 1, 2)),
    "DynamicQuantizeMatMul": ("MatMul", (0, 1)),
    "QLinearAdd": ("Add", (0, 3)),
    "QLinearMul": ("Mul", (0, 3)),
    "QLinearAveragePool": ("AveragePool", (0,)),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,)),
    "QuantizeLinear": ("QuantizeLinear", (0, 1, 2)),
    "DequantizeLinear": ("DequantizeLinear", (0, 1, 2)),
}
_SHAPING = """
auto_pad axis ceil_mode count_include_pad dilations group kernel_shape pads strides transA transB
"""
_KEPT_ATTRIBUTES = frozenset(_SHAPING.split())


def stand_in(proto: onnx.ModelProto) -> None:
    """Replace the contrib nodes of ``proto`` whose output shape a standard operator has too."""
    extra: dict[str, tuple[int, ...]] = {}
    dims = {
        i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in proto.graph.input
    }
    for graph in graphs(proto.graph):
        dims |= {t.name: tuple(t.dims) for t in graph.initializer}
    for graph in graphs(proto.graph):
        changed = False
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            made = _replace(node, dims, extra) if node.domain == MICROSOFT else None
            nodes += [node] if made is None else made
            changed = changed or made is not None
        if changed:
            set_nodes(graph, nodes)
    for name, shape in extra.items():
        proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))


def _replace(
    node: onnx.NodeProto, dims: dict[str, tuple[int, ...]], extra: dict[str, tuple[int, ...]]
) -> list[onnx.NodeProto] | None:
    out = node.output[0]
    attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    kept = {k: v for k, v in attrs.items() if k in _KEPT_ATTRIBUTES}
    op = node.op_type
    if op in _AS_FIRST_INPUT:
        outs = [out, *node.output[3:4]] if op in _WITH_SUM else [out]
        return [helper.make_node("Identity", node.input[:1], [o]) for o in outs if o]
    if op in _RENAMED and not attrs.get("channels_last"):
        standard, indices = _RENAMED[op]
        inputs = [node.input[i] for i in indices if i < len(node.input)]
        return [helper.make_node(standard, inputs, [out], **kept)]
    if op == "QLinearConcat":
        return [helper.make_node("Concat", list(node.input[2::3]), [out], **kept)]
    special = _SPECIAL.get(op)
    return None if special is None else special(node, attrs, dims, extra)


_Maker = Callable[
    [onnx.NodeProto, dict[str, object], dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]],
    list[onnx.NodeProto] | None,
]


def _fused_matmul(
    node: onnx.NodeProto,
    attrs: dict[str, object],
    dims: dict[str, tuple[int, ...]],
    extra: dict[str, tuple[int, ...]],
) -> list[onnx.NodeProto] | None:
    if attrs.get("transBatchA") or attrs.get("transBatchB"):
        return None
    first = "ki" if attrs.get("transA") else "ik"
    second = "jk" if attrs.get("transB") else "kj"
    if (first, second) == ("ik", "kj"):
        return [helper.make_node("MatMul", node.input[:2], node.output[:1])]
    equation = f"...{first},...{second}->...ij"
    return [helper.make_node("Einsum", node.input[:2], node.output[:1], equation=equation)]


def _matmul_nbits(
    node: onnx.NodeProto,
    attrs: dict[str, object],
    dims: dict[str, tuple[int, ...]],
    extra: dict[str, tuple[int, ...]],
) -> list[onnx.NodeProto] | None:
    rows, columns = attrs.get("K"), attrs.get("N")
    if not isinstance(rows, int) or not isinstance(columns, int):
        return None
    return [_matmul_with(node, (rows, columns), extra)]


def _attention(
    node: onnx.NodeProto,
    attrs: dict[str, object],
    dims: dict[str, tuple[int, ...]],
    extra: dict[str, tuple[int, ...]],
) -> list[onnx.NodeProto] | None:
    weight = dims.get(node.input[1], ())
    sizes = attrs.get("qkv_hidden_sizes")
    if len(weight) != 2:
        return None
    hidden = sizes[2] if isinstance(sizes, list) else weight[1] // 3
    return [_matmul_with(node, (weight[0], hidden), extra)]


def _multi_head_attention(
    node: onnx.NodeProto,
    attrs: dict[str, object],
    dims: dict[str, tuple[int, ...]],
    extra: dict[str, tuple[int, ...]],
) -> list[onnx.NodeProto] | None:
    if len(node.input) < 3 or not node.input[2]:
        return None  # packed projections
    inputs = [node.input[0], node.input[2]]
    return [helper.make_node("Einsum", inputs, node.output[:1], equation="abc,axd->abd")]


def _group_query_attention(
    node: onnx.NodeProto,
    attrs: dict[str, object],
    dims: dict[str, tuple[int, ...]],
    extra: dict[str, tuple[int, ...]],
) -> list[onnx.NodeProto] | None:
    if len(node.input) < 2 or not node.input[1]:
        return None  # packed projections
    return [helper.make_node("Identity", node.input[:1], node.output[:1])]


def _lstm(
    node: onnx.NodeProto,
    attrs: dict[str, object],
    dims: dict[str, tuple[int, ...]],
    extra: dict[str, tuple[int, ...]],
) -> list[onnx.NodeProto]:
    kept: dict[str, Any] = {k: v for k, v in attrs.items() if k in ("hidden_size", "direction")}
    return [helper.make_node("LSTM", node.input[:3], list(node.output), **kept)]


def _gather_blocks(
    node: onnx.NodeProto,
    attrs: dict[str, object],
    dims: dict[str, tuple[int, ...]],
    extra: dict[str, tuple[int, ...]],
) -> list[onnx.NodeProto] | None:
    table, bits = dims.get(node.input[0], ()), attrs.get("bits", 4)
    if len(table) != 2 or attrs.get("gather_axis", 0) or not isinstance(bits, int):
        return None
    name = f"effdl-shape-{node.output[0]}"
    extra[name] = (table[0], table[1] * 8 // bits)
    return [helper.make_node("Gather", [name, node.input[1]], node.output[:1])]


def _matmul_integer_to_float(
    node: onnx.NodeProto,
    attrs: dict[str, object],
    dims: dict[str, tuple[int, ...]],
    extra: dict[str, tuple[int, ...]],
) -> list[onnx.NodeProto] | None:
    return _to_float(node, helper.make_node("MatMul", node.input[:2], node.output[:1]))


def _qgemm(
    node: onnx.NodeProto,
    attrs: dict[str, object],
    dims: dict[str, tuple[int, ...]],
    extra: dict[str, tuple[int, ...]],
) -> list[onnx.NodeProto] | None:
    kept: dict[str, Any] = {k: v for k, v in attrs.items() if k in ("transA", "transB")}
    gemm = helper.make_node("Gemm", [node.input[0], node.input[3]], node.output[:1], **kept)
    quantized_output = len(node.input) > 7 and bool(node.input[7])
    return [gemm] if quantized_output else _to_float(node, gemm)


def _to_float(node: onnx.NodeProto, product: onnx.NodeProto) -> list[onnx.NodeProto]:
    inner = f"effdl-shape-{node.output[0]}"
    product.output[0] = inner
    return [product, helper.make_node("Cast", [inner], node.output[:1], to=TensorProto.FLOAT)]


def _matmul_with(
    node: onnx.NodeProto, shape: tuple[int, int], extra: dict[str, tuple[int, ...]]
) -> onnx.NodeProto:
    name = f"effdl-shape-{node.output[0]}"
    extra[name] = shape
    return helper.make_node("MatMul", [node.input[0], name], node.output[:1])


_SPECIAL: dict[str, _Maker] = {
    "Attention": _attention,
    "DynamicQuantizeLSTM": _lstm,
    "FusedMatMul": _fused_matmul,
    "GatherBlockQuantized": _gather_blocks,
    "GroupQueryAttention": _group_query_attention,
    "MatMulBnb4": _matmul_nbits,
    "MatMulIntegerToFloat": _matmul_integer_to_float,
    "MatMulNBits": _matmul_nbits,
    "MultiHeadAttention": _multi_head_attention,
    "QAttention": _attention,
    "QGemm": _qgemm,
}
