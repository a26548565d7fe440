from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

from effdl.graph import io
from effdl.graph.cost import model_cost, node_cost, params, weight_bytes
from effdl.graph.shapes import infer
from tests.support import SHARED, from_text, needs_shared
from tests.test_cost_ops import f, one_node, w


def test_4_bit_weights_count_one_by_one() -> None:
    inputs = {
        "x": f(2, 3, 32),
        "w": w(6, 2, 8, dtype=np.uint8),
        "s": w(12),
        "z": w(6, dtype=np.uint8),
    }
    model = one_node(
        "MatMulNBits", inputs, domain="com.microsoft", K=32, N=6, bits=4, block_size=16
    )
    cost = model_cost(model)
    assert cost.macs == 2 * 3 * 32 * 6
    assert cost.params == 32 * 6 + 12 + 12
    assert cost.weight_bytes == {"UINT8": 102, "FLOAT": 48}
    node = model.graph[0]
    assert node_cost(node, infer(model)).params == cost.params
    packed = from_text("""<ir_version: 10, opset_import: ["": 21]>
        g (float[3,4] x) => (float[3,4] y) { y = Relu(x) }""")
    tensor = ir.tensor(np.zeros((5, 3), np.int8).astype("int8"), name="w4")
    four = ir.PackedTensor(
        np.zeros(8, np.uint8), ir.DataType.INT4, shape=ir.Shape([5, 3]), name="w4"
    )
    value = ir.Value(
        name="w4", shape=ir.Shape([5, 3]), type=ir.TensorType(ir.DataType.INT4), const_value=four
    )
    packed.graph.register_initializer(value)
    assert params(packed) == tensor.size == 15
    assert weight_bytes(packed) == {"INT4": 8}


def test_a_shared_weight_counts_once() -> None:
    model = one_node("MatMul", {"x": f(2, 4), "w": w(4, 4)})
    first = model.graph[0]
    second = ir.Node("", "MatMul", [first.outputs[0], first.inputs[1]], name="again")
    model.graph.append(second)
    model.graph.outputs[0] = second.outputs[0]
    cost = model_cost(model)
    assert cost.params == 16
    assert [c.params for c in cost.per_node] == [16, 16]
    assert cost.macs == 2 * 2 * 16


def test_what_cannot_be_counted_is_named_and_the_rest_counted() -> None:
    model = from_text("""<ir_version: 8, opset_import: ["": 17, "my": 1]>
        g (float[2,4] x, float[4,4] w) => (float[2,4] y)
        { a = MatMul(x, w)
          b = my.Thing(a)
          c = MatMul(b, w)
          d = Relu(c)
          e = my.Thing(d)
          y = DFT(e) }""")
    cost = model_cost(model)
    assert cost.macs == 32
    assert cost.unknown_ops == ("my::Thing", "MatMul", "DFT")
    assert [c.macs for c in cost.per_node] == [32, None, None, 0, None, None]
    only = from_text("""<ir_version: 8, opset_import: ["my": 1]>
        g (float[2,4] x) => (float[2,4] y) { y = my.Thing(x) }""")
    assert model_cost(only).macs is None


def test_dynamic_dimensions() -> None:
    model = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[batch,seq,4] x, float[4,3] w) => (float[batch,seq,3] y) { y = MatMul(x, w) }""")
    assert model_cost(model).dims == {"batch": 1, "seq": 64}
    assert model_cost(model).macs == 64 * 12
    assert model_cost(model, {"batch": 2, "seq": 5}).macs == 120


IF = """<ir_version: 8, opset_import: ["": 17]>
    g (float[2,4] x, float[4,4] w, bool c) => (float[2,4] y)
    { COND
      y = If (k) <
        then_branch = a () => (float[2,4] o) { t = MatMul(x, w)
          o = MatMul(t, w) },
        else_branch = b () => (float[2,4] p) { p = MatMul(x, w) }> }"""


@pytest.mark.parametrize(
    ("condition", "macs"),
    [
        ("k = Identity(c)", 64),
        ("q = Constant <value_int = 0> ()\n k = Cast <to = 9> (q)", 32),
        ("q = Constant <value_int = 1> ()\n k = Cast <to = 9> (q)", 64),
    ],
)
def test_if_counts_the_branch_taken_or_the_larger(condition: str, macs: int) -> None:
    cost = model_cost(from_text(IF.replace("COND", condition)))
    assert cost.macs == macs
    assert sorted(c.times for c in cost.per_node if c.op_type == "MatMul") == (
        [0, 1, 1] if macs == 64 else [0, 0, 1]
    )


LOOP = """<ir_version: 8, opset_import: ["": 17]>
    g (float[2,4] x, float[4,4] w, int64 n) => (float[2,4] y)
    { m = BOUND
      go = Constant <value = bool {1}> ()
      y = Loop (m, go, x) <body = b (int64 i, bool c, float[2,4] s) => (bool d, float[2,4] t)
        { d = Identity(c)
          t = MatMul(s, w) }> }"""


def test_loop_counts_its_bound() -> None:
    known = model_cost(from_text(LOOP.replace("BOUND", "Constant <value_int = 5> ()")))
    assert known.macs == 5 * 32
    assert known.unknown_ops == ()
    unknown = model_cost(from_text(LOOP.replace("BOUND", "Identity(n)")))
    assert unknown.macs is None
    assert unknown.unknown_ops == ("MatMul",)
    elementwise = LOOP.replace("BOUND", "Identity(n)").replace("MatMul(s, w)", "Relu(s)")
    assert model_cost(from_text(elementwise)).unknown_ops == ()


def test_scan_counts_its_steps() -> None:
    model = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[3,4] s, float[3,N,4] x, float[4,4] w) => (float[3,4] f, float[N,3,4] y)
        { f, y = Scan <num_scan_inputs = 1, scan_input_axes = [1],
            body = b (float[3,4] a, float[3,4] e) => (float[3,4] a2, float[3,4] o)
            { a2 = MatMul(a, w)
              o = Add(a2, e) }> (s, x) }""")
    assert model_cost(model, {"N": 6}).macs == 6 * 48


def test_functions_count_where_they_are_called() -> None:
    model = from_text("""<ir_version: 8, opset_import: ["": 17, "my": 1]>
        g (float[2,4] x, float[4,4] w) => (float[2,4] y)
        { a = my.Twice(x, w)
          y = my.Twice(a, w) }
        <domain: "my", opset_import: ["": 17]>
        Twice (x, w) => (y)
        { t = MatMul(x, w)
          y = MatMul(t, w) }""")
    before = io.to_bytes(model)
    assert model_cost(model).macs == 4 * 32
    assert model.functions
    assert io.to_bytes(model) == before


@needs_shared
@pytest.mark.parametrize(
    ("name", "low", "high", "unknown"),
    [
        ("cifar_resnet20", 40e6, 42e6, ()),
        ("mobilenetv2_fp32_from_qdq", 350e6, 390e6, ()),
        ("mobilenetv2_qdq_int8", 350e6, 390e6, ()),
        ("squeezenet_fp32_from_fp16", 340e6, 360e6, ()),
        ("squeezenet_fp16_winml", 340e6, 360e6, ()),
        ("yolox_nano", 500e6, 560e6, ()),
        ("ultraface_rfb320", 80e6, 120e6, ()),
        ("seg_pan_mbv3s", 600e6, 800e6, ()),
        ("silero_vad", 0.6e6, 0.8e6, ()),
        ("nnsplit_en", 25e6, 40e6, ()),
        ("dtln_1", 0.3e6, 0.4e6, ()),
        ("tract_qlstm", 60, 80, ()),
        ("voice_commands", 672, 672, ()),
        (
            "superres_prepost_op18",
            1,
            1e10,
            (
                "com.microsoft.extensions::DecodeImage",
                "MatMul",
                "com.microsoft.extensions::EncodeImage",
            ),
        ),
    ],
)
def test_macs_of_real_models(name: str, low: float, high: float, unknown: tuple[str, ...]) -> None:
    assert SHARED is not None
    cost = model_cost(io.load(SHARED / "models" / f"{name}.onnx"))
    assert cost.unknown_ops == unknown
    assert cost.macs is not None
    assert low <= cost.macs <= high


@needs_shared
def test_params_and_a_model_of_trees() -> None:
    assert SHARED is not None
    models = SHARED / "models"
    mobilenet = io.load(models / "mobilenetv2_fp32_from_qdq.onnx")
    assert params(mobilenet) == pytest.approx(3.49e6, rel=0.01)
    assert math.isclose(sum(weight_bytes(mobilenet).values()), 4 * params(mobilenet))
    trees = model_cost(io.load(models / "tract_xgb_classifier.onnx"))
    assert (trees.macs, trees.unknown_ops) == (None, ("ai.onnx.ml::TreeEnsembleClassifier",))
