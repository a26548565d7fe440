"""Contrib operators: the shapes inferred for them are those ONNX Runtime computes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from effdl.errors import ModelError
from effdl.graph import io
from effdl.graph.shapes import infer
from effdl.passes.simplify import Simplify
from effdl.runtime.session import open_session
from tests.support import context, feed_for, op_counts, outputs

# (name, node fields, inputs as (dtype, shape), constants among them by index)
F, U8, I8, I32 = np.float32, np.uint8, np.int8, np.int32
CONTRIB = [
    (
        "FusedConv",
        {"activation": "Relu", "strides": [2, 2]},
        [(F, (1, 3, 9, 9)), (F, (4, 3, 3, 3))],
    ),
    ("FusedGemm", {"activation": "Relu", "transB": 1}, [(F, (2, 3)), (F, (5, 3)), (F, (5,))]),
    ("FusedMatMul", {"transB": 1}, [(F, (2, 4, 3)), (F, (2, 5, 3))]),
    ("FusedMatMul", {"transA": 1}, [(F, (2, 3, 4)), (F, (2, 3, 5))]),
    ("FusedMatMul", {}, [(F, (2, 4, 3)), (F, (3, 5))]),
    ("Gelu", {}, [(F, (2, 3))]),
    ("BiasGelu", {}, [(F, (2, 3)), (F, (3,))]),
    ("FastGelu", {}, [(F, (2, 3)), (F, (3,))]),
    ("QuickGelu", {}, [(F, (2, 3))]),
    ("SkipLayerNormalization", {}, [(F, (2, 3, 4)), (F, (2, 3, 4)), (F, (4,)), (F, (4,))]),
    ("DynamicQuantizeMatMul", {}, [(F, (2, 3)), (U8, (3, 5)), (F, ()), (U8, ())]),
    (
        "MatMulIntegerToFloat",
        {},
        [(U8, (2, 3)), (U8, (3, 5)), (F, ()), (F, ()), (U8, ()), (U8, ())],
    ),
    (
        "QLinearAdd",
        {},
        [(U8, (2, 3)), (F, ()), (U8, ()), (U8, (3,)), (F, ()), (U8, ()), (F, ()), (U8, ())],
    ),
    (
        "QLinearMul",
        {},
        [(U8, (2, 3)), (F, ()), (U8, ()), (U8, (3,)), (F, ()), (U8, ()), (F, ()), (U8, ())],
    ),
    ("QLinearSigmoid", {}, [(U8, (2, 3)), (F, ()), (U8, ()), (F, ()), (U8, ())]),
    ("QLinearLeakyRelu", {"alpha": 0.1}, [(U8, (2, 3)), (F, ()), (U8, ()), (F, ()), (U8, ())]),
    ("QLinearGlobalAveragePool", {}, [(U8, (1, 2, 4, 4)), (F, ()), (U8, ()), (F, ()), (U8, ())]),
    (
        "QLinearAveragePool",
        {"kernel_shape": [2, 2]},
        [(U8, (1, 2, 4, 4)), (F, ()), (U8, ()), (F, ()), (U8, ())],
    ),
    (
        "QLinearConcat",
        {"axis": 1},
        [(F, ()), (U8, ()), (U8, (2, 3)), (F, ()), (U8, ()), (U8, (2, 4)), (F, ()), (U8, ())],
    ),
    ("QGemm", {"transB": 1}, [(U8, (2, 3)), (F, ()), (U8, ()), (U8, (5, 3)), (F, ()), (U8, ())]),
    (
        "QGemm",
        {},
        [
            (U8, (2, 3)),
            (F, ()),
            (U8, ()),
            (U8, (3, 5)),
            (F, ()),
            (U8, ()),
            (I32, (5,)),
            (F, ()),
            (U8, ()),
        ],
    ),
    (
        "MatMulNBits",
        {"K": 32, "N": 6, "bits": 4, "block_size": 16},
        [(F, (2, 3, 32)), (U8, (6, 2, 8)), (F, (12,))],
    ),
    ("QuantizeLinear", {}, [(F, (2, 3)), (F, ()), (U8, ())]),
    ("DequantizeLinear", {}, [(U8, (2, 3)), (F, ()), (U8, ())]),
    ("Attention", {"num_heads": 2}, [(F, (2, 5, 8)), (F, (8, 24)), (F, (24,))]),
    ("MultiHeadAttention", {"num_heads": 2}, [(F, (2, 5, 8)), (F, (2, 7, 8)), (F, (2, 7, 6))]),
]


def contrib_model(
    op: str, attributes: dict[str, object], inputs: list[tuple[type, tuple[int, ...]]]
) -> ir.Model:
    """A model of one contrib node between two Identity nodes; all inputs but floats are constant."""
    graph_inputs, initializers, names = [], [], []
    rng = np.random.default_rng(0)
    for k, (dtype, shape) in enumerate(inputs):
        if dtype is F and shape and k == 0:
            graph_inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, shape))
            names.append("x")
            continue
        numbers = rng.integers(1, 9, shape).astype(dtype)
        initializers.append(onnx.numpy_helper.from_array(np.asarray(numbers), f"w{k}"))
        names.append(f"w{k}")
    nodes = [
        helper.make_node(op, names, ["h"], domain="com.microsoft", **attributes),
        helper.make_node("Identity", ["h"], ["y"]),
    ]
    out = onnx.ValueInfoProto(name="y")
    out.type.tensor_type.elem_type = _result_type(op, inputs)
    graph = helper.make_graph(nodes, "g", graph_inputs, [out], initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def _result_type(op: str, inputs: list[tuple[type, tuple[int, ...]]]) -> int:
    integer = (
        op.startswith("QLinear") or op == "QuantizeLinear" or (op == "QGemm" and len(inputs) > 7)
    )
    return TensorProto.UINT8 if integer else TensorProto.FLOAT


@pytest.mark.parametrize(
    ("op", "attributes", "inputs"), CONTRIB, ids=[f"{c[0]}-{k}" for k, c in enumerate(CONTRIB)]
)
def test_contrib_shapes_are_those_of_onnxruntime(
    op: str, attributes: dict[str, object], inputs: list[tuple[type, tuple[int, ...]]]
) -> None:
    model = contrib_model(op, attributes, inputs)
    feed = {"x": np.ones(inputs[0][1], np.float32)} if model.graph.inputs else {}
    got = open_session(model, optimize=False).run(feed)["y"]
    shapes = infer(model)
    assert shapes.of(model.graph[0].outputs[0]) == got.shape
    assert shapes.dtype(model.graph[0].outputs[0]) == ir.DataType.from_numpy(got.dtype)


def test_operators_that_only_onnx_runtime_knows_are_read() -> None:
    """Its transformer optimizer writes SimplifiedLayerNormalization into ONNX's own domain."""
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4] x) => (float[n, 4] z) <float[4] w = {1, 2, 3, 4}> {
            y = SimplifiedLayerNormalization <axis = -1, epsilon = 0.00001> (x, w)
            z = Relu (y)
        }"""
    )
    io.check(model)
    assert infer(model).of(model.graph.node(0).outputs[0]) == ("n", 4)
    feed = feed_for(model, n=3)
    before = outputs(model, feed)
    Simplify().run(model, context())
    assert op_counts(model) == {"SimplifiedLayerNormalization": 1, "Relu": 1}
    np.testing.assert_array_equal(outputs(model, feed)[0], before[0])
    model.graph.node(0).op_type = "NoSuchNormalization"
    with pytest.raises(ModelError):
        io.check(model)
