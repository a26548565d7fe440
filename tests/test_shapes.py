from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from effdl.data.random import random_feeds, resolve_dims
from effdl.errors import UsageError
from effdl.graph import io
from effdl.graph.dims import check_dims, guess_dims, known_dims, selector_values
from effdl.graph.shapes import dynamic_dims, infer, infer_into
from effdl.graph.walk import all_nodes
from effdl.runtime.session import open_session
from tests.support import SAMPLES, SHARED, from_text, needs_shared

TWO = """<ir_version: 8, opset_import: ["": 17]>
g (float[N,3,H,W] x, int64[N] n) => (float[N,5,?,?] y)
<float[5,3,3,3] w>
{ c = Conv <strides = [2, 2]> (x, w)
  y = Relu(c) }"""


def with_weights(model: ir.Model, **arrays: np.ndarray) -> ir.Model:
    for name, array in arrays.items():
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    return model


def two() -> ir.Model:
    text = TWO.replace("<float[5,3,3,3] w>\n", "").replace(
        "int64[N] n)", "int64[N] n, float[5,3,3,3] w)"
    )
    return with_weights(from_text(text), w=np.ones((5, 3, 3, 3), np.float32))


def value(model: ir.Model, name: str) -> ir.Value:
    return next(o for n in all_nodes(model) for o in n.outputs if o.name == name)


def test_names_of_dynamic_dimensions() -> None:
    assert dynamic_dims(two()) == {"N": ["x[0]", "n[0]"], "H": ["x[2]"], "W": ["x[3]"]}
    unnamed = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[?,2] x) => (float[?,2] y) { y = Relu(x) }""")
    assert dynamic_dims(unnamed) == {"x:0": ["x[0]"]}
    unnamed.graph.inputs[0].shape = ir.Shape([-1, 2])
    assert dynamic_dims(unnamed) == {"x:0": ["x[0]"]}


def test_pins_dimensions_without_touching_the_model() -> None:
    model = two()
    before = io.to_bytes(model)
    shapes = infer(model, {"N": 2, "x:2": 9, "W": 11})
    assert shapes.of(value(model, "c")) == (2, 5, 4, 5)
    assert shapes.static(value(model, "y")) == (2, 5, 4, 5)
    assert shapes.of(model.graph.inputs[0]) == (2, 3, 9, 11)
    assert shapes.dtype(value(model, "c")) == ir.DataType.FLOAT
    assert io.to_bytes(model) == before
    open_ = infer(model)
    assert open_.of(value(model, "c")) == ("N", 5, None, None)
    assert open_.static(value(model, "c")) is None


@pytest.mark.parametrize(
    ("dims", "text"),
    [
        ({"M": 1}, "no dimension 'M'"),
        ({"N": 0}, "at least 1"),
        ({"N": True}, "at least 1"),
        ({"x:1": 4}, "fixed at 3"),
        ({"N": 1, "x:0": 2}, "two values"),
    ],
)
def test_refuses_dims_that_do_not_fit(dims: dict[str, int], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        infer(two(), dims)


def test_nearest_name_and_known_dims() -> None:
    model = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[batch,2] x) => (float[batch,2] y) { y = Relu(x) }""")
    with pytest.raises(UsageError) as e:
        check_dims(model, {"bacth": 2})
    assert "batch" in e.value.hint
    assert known_dims(model, {"gone": 3, "x:0": 4}) == {"batch": 4}
    assert known_dims(model, None) == {}


def test_branches_may_share_names_and_decided_ifs_are_known() -> None:
    model = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[B,4] x, bool c) => (float[?,?] y, float[?,?] z)
        {
          s = Shape(x)
          i = Constant <value_int = 1> ()
          d = Gather(s, i)
          f = Constant <value_int = 4> ()
          is4 = Equal(d, f)
          y = If (is4) <
            then_branch = a () => (float[?,?] o) { t = Relu(x)
              o = Identity(t) },
            else_branch = b () => (float[?,?] o2) { t = Transpose(x)
              o2 = Identity(t) }>
          z = If (c) <
            then_branch = a () => (float[?,?] o) { t = Neg(x)
              o = Identity(t) },
            else_branch = b () => (float[?,?] o2) { t = Transpose(x)
              o2 = Identity(t) }>
        }""")
    shapes = infer(model, {"B": 3})
    first, second = (n for n in model.graph if n.op_type == "If")
    assert shapes.branch(first) is True
    assert shapes.branch(second) is None
    assert shapes.of(first.outputs[0]) == (3, 4)
    inner = {
        key: next(iter(second.attributes[key].as_graph())).outputs[0]
        for key in ("then_branch", "else_branch")
    }
    assert inner["then_branch"].name == inner["else_branch"].name == "t"
    assert shapes.of(inner["then_branch"]) == (3, 4)
    assert shapes.of(inner["else_branch"]) == (4, 3)


def test_assumed_values_choose_a_branch() -> None:
    model = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[2,4] x, int64 rate) => (float[?,?] y)
        { k = Constant <value_int = 16000> ()
          c = Equal(rate, k)
          y = If (c) <
            then_branch = a () => (float[?,?] o) { o = Transpose(x) },
            else_branch = b () => (float[?,?] p) { p = Relu(x) }> }""")
    assert selector_values(model) == {"rate": 16000}
    node = model.graph[-1]
    assert infer(model).branch(node) is None
    assert infer(model, values={"rate": np.array(16000)}).of(node.outputs[0]) == (4, 2)
    assert infer(model, values={"rate": np.array(8000)}).of(node.outputs[0]) == (2, 4)


SHAPE_ARITHMETIC = """<ir_version: 8, opset_import: ["": 17]>
    g (float[B,C,8] x) => (float[?,?,?,?] y, float[?,?] p)
    {
      s = Shape(x)
      zero = Constant <value_ints = [0]> ()
      one = Constant <value_ints = [1]> ()
      two = Constant <value_ints = [2]> ()
      three = Constant <value_ints = [3]> ()
      b = Slice(s, zero, one, zero)
      c = Slice(s, one, two, zero)
      l = Slice(s, two, three, zero)
      h = Div(l, two)
      f = Cast <to = 1> (c)
      half = Constant <value_float = 0.5> ()
      g1 = Mul(f, half)
      g2 = Floor(g1)
      ch = Cast <to = 7> (g2)
      target = Concat <axis = 0> (b, ch, h, four)
      y = Reshape(x, target)
      n = Size(x)
      n1 = Reshape(n, one)
      flat = Concat <axis = 0> (one, n1)
      p = Reshape(x, flat)
    }""".replace("target = Concat", "four = Constant <value_ints = [4]> ()\n      target = Concat")


def test_shape_arithmetic_is_computed_as_onnxruntime_does() -> None:
    model = from_text(SHAPE_ARITHMETIC)
    feed = {"x": np.zeros((3, 6, 8), np.float32)}
    want = [v.shape for v in open_session(model).run(feed).values()]
    shapes = infer(model, {"B": 3, "C": 6})
    assert [shapes.of(v) for v in model.graph.outputs] == want == [(3, 3, 4, 4), (1, 144)]


def test_huge_tables_from_little_numbers_are_not_made() -> None:
    model = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x) => (float[?,?] y, int64[?] r)
        { s = Constant <value_ints = [100000000, 100000000]> ()
          y = Expand(x, s)
          a = Constant <value_int = 0> ()
          b = Constant <value_int = 1000000000000> ()
          d = Constant <value_int = 1> ()
          r = Range(a, b, d) }""")
    assert infer(model).of(value(model, "y")) in ((100000000, 100000000), (None, None), None)


def test_what_an_unknown_operator_declares_is_carried_on() -> None:
    model = from_text("""<ir_version: 8, opset_import: ["": 17, "my": 1]>
        g (float[N,4] x) => (float[?,?] y)
        { h = my.Thing(x)
          r = Relu(h)
          y = Neg(r) }""")
    assert infer(model).of(value(model, "r")) is None
    value(model, "h").shape = ir.Shape(["N", 7])
    value(model, "h").type = ir.TensorType(ir.DataType.FLOAT)
    assert infer(model).of(value(model, "r")) == (None, 7)
    assert infer(model, {"N": 5}).of(value(model, "r")) == (5, 7)


def test_stale_declarations_do_not_win_over_pinned_dimensions() -> None:
    model = two()
    value(model, "c").shape = ir.Shape([1, 5, 3, 3])
    shapes = infer(model, {"N": 4, "H": 7, "W": 7})
    assert shapes.of(value(model, "c")) == (4, 5, 3, 3)


def test_into_adds_and_never_weakens() -> None:
    model = two()
    model.graph.inputs[0].shape = ir.Shape(["N", 3, 7, 7])
    value(model, "c").shape = ir.Shape([2, None, None, "W2"])  # says more and less
    outputs = [io.to_bytes(model)]
    declared = model.graph.outputs[0].shape
    assert infer_into(model) == 1
    assert value(model, "c").shape == ir.Shape([2, 5, 3, 3])
    assert model.graph.outputs[0].shape == declared
    assert model.graph.inputs[0].shape == ir.Shape(["N", 3, 7, 7])
    io.check(model)
    outputs = [io.to_bytes(model)]
    assert infer_into(model) == 0
    assert io.to_bytes(model) == outputs[0]


def test_large_weights_are_not_read() -> None:
    def refuse() -> ir.TensorProtocol:
        raise AssertionError("weights were read")

    model = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N,40000] x, float[40000,20000] w) => (float[N,20000] y)
        { h = MatMul(x, w)
          y = Relu(h) }""")
    weight = model.graph.inputs.pop()
    weight.const_value = ir.LazyTensor(
        refuse, dtype=ir.DataType.FLOAT, shape=ir.Shape([40000, 20000]), name="w"
    )
    model.graph.register_initializer(weight)
    assert weight.const_value.nbytes > 3e9
    assert infer(model, {"N": 2}).of(value(model, "h")) == (2, 20000)
    assert infer_into(model) == 1


def test_a_model_without_default_domain_and_a_graph_that_onnx_cannot_type() -> None:
    trees = from_text("""<ir_version: 8, opset_import: ["my": 1]>
        g (float[N,4] x) => (float[N] y) { y = my.Trees(x) }""")
    assert infer(trees, {"N": 3}).of(trees.graph.outputs[0]) == (3,)
    wrong = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[2,3] x, float[4,5] w) => (float[2,5] y) { h = MatMul(x, w)
          y = Relu(h) }""")
    assert infer(wrong).of(wrong.graph.outputs[0]) == (2, 5)


# (name, node fields, inputs as (dtype, shape), constants among them by index)
F, U8, I8, I32 = np.float32, np.uint8, np.int8, np.int32
CONTRIB = [
    ("FusedConv", {"activation": "Relu", "strides": [2, 2]}, [(F, (1, 3, 9, 9)), (F, (4, 3, 3, 3))]),
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
    ("MatMulIntegerToFloat", {}, [(U8, (2, 3)), (U8, (3, 5)), (F, ()), (F, ()), (U8, ()), (U8, ())]),
    ("QLinearAdd", {}, [(U8, (2, 3)), (F, ()), (U8, ()), (U8, (3,)), (F, ()), (U8, ()), (F, ()), (U8, ())]),
    ("QLinearMul", {}, [(U8, (2, 3)), (F, ()), (U8, ()), (U8, (3,)), (F, ()), (U8, ()), (F, ()), (U8, ())]),
    ("QLinearSigmoid", {}, [(U8, (2, 3)), (F, ()), (U8, ()), (F, ()), (U8, ())]),
    ("QLinearLeakyRelu", {"alpha": 0.1}, [(U8, (2, 3)), (F, ()), (U8, ()), (F, ()), (U8, ())]),
    ("QLinearGlobalAveragePool", {}, [(U8, (1, 2, 4, 4)), (F, ()), (U8, ()), (F, ()), (U8, ())]),
    ("QLinearAveragePool", {"kernel_shape": [2, 2]}, [(U8, (1, 2, 4, 4)), (F, ()), (U8, ()), (F, ()), (U8, ())]),
    ("QLinearConcat", {"axis": 1}, [(F, ()), (U8, ()), (U8, (2, 3)), (F, ()), (U8, ()), (U8, (2, 4)), (F, ()), (U8, ())]),
    ("QGemm", {"transB": 1}, [(U8, (2, 3)), (F, ()), (U8, ()), (U8, (5, 3)), (F, ()), (U8, ())]),
    ("QGemm", {}, [(U8, (2, 3)), (F, ()), (U8, ()), (U8, (3, 5)), (F, ()), (U8, ()), (I32, (5,)), (F, ()), (U8, ())]),
    ("MatMulNBits", {"K": 32, "N": 6, "bits": 4, "block_size": 16}, [(F, (2, 3, 32)), (U8, (6, 2, 8)), (F, (12,))]),
    ("QuantizeLinear", {}, [(F, (2, 3)), (F, ()), (U8, ())]),
    ("DequantizeLinear", {}, [(U8, (2, 3)), (F, ()), (U8, ())]),
    ("Attention", {"num_heads": 2}, [(F, (2, 5, 8)), (F, (8, 24)), (F, (24,))]),
    ("MultiHeadAttention", {"num_heads": 2}, [(F, (2, 5, 8)), (F, (2, 7, 8)), (F, (2, 7, 6))]),
]  # fmt: skip


def contrib_model(op: str, attributes: dict[str, object], inputs: list[tuple[type, tuple[int, ...]]]) -> ir.Model:
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
    integer = op.startswith("QLinear") or op == "QuantizeLinear" or (op == "QGemm" and len(inputs) > 7)
    return TensorProto.UINT8 if integer else TensorProto.FLOAT


@pytest.mark.parametrize(("op", "attributes", "inputs"), CONTRIB, ids=[f"{c[0]}-{k}" for k, c in enumerate(CONTRIB)])
def test_contrib_shapes_are_those_of_onnxruntime(
    op: str, attributes: dict[str, object], inputs: list[tuple[type, tuple[int, ...]]]
) -> None:
    model = contrib_model(op, attributes, inputs)
    feed = {"x": np.ones(inputs[0][1], np.float32)} if model.graph.inputs else {}
    got = open_session(model, optimize=False).run(feed)["y"]
    shapes = infer(model)
    assert shapes.of(value(model, "h")) == got.shape
    assert shapes.dtype(value(model, "h")) == ir.DataType.from_numpy(got.dtype)


def assert_shapes_as_run(model: ir.Model) -> int:
    """Every inferred shape of the main graph is what ONNX Runtime computes; returns how many."""
    feed = random_feeds(model, count=1).batches[0]
    dims = resolve_dims(model)
    names = {v.name: np.asarray(feed[v.name]) for v in model.graph.inputs if v.name in selector_values(model)}
    shapes = infer(model, dims, names)
    exposed = model.clone()
    infer_into(exposed)
    known = {v.name for v in exposed.graph.outputs}
    for node in exposed.graph:
        exposed.graph.outputs.extend(
            o for o in node.outputs if o.name and o.name not in known and o.dtype is not None
        )
    results = open_session(exposed, optimize=False).run(feed)
    compared = 0
    for node in model.graph:
        for output in node.outputs:
            shape = shapes.static(output)
            if output.name in results and shape is not None:
                assert shape == results[output.name].shape, (node.op_type, output.name)
                assert shapes.dtype(output) == ir.DataType.from_numpy(results[output.name].dtype)
                compared += 1
    return compared


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.onnx")), ids=lambda p: p.stem)
def test_shapes_of_the_sample_models_as_run(path) -> None:
    model = io.load(path)
    assert assert_shapes_as_run(model) >= len(list(model.graph))


@needs_shared
@pytest.mark.parametrize(
    "name", ["nnsplit_en", "ultraface_rfb320", "seg_pan_mbv3s", "silero_vad", "tract_qlstm", "voice_commands",
             "dtln_1", "mnist_selfattn", "yolox_nano", "cifar_resnet20", "mobilenetv2_qdq_int8", "squeezenet_fp16_winml"],
)  # fmt: skip
def test_shapes_of_real_models_as_run(name: str) -> None:
    assert SHARED is not None
    model = io.load(SHARED / "models" / f"{name}.onnx")
    compared = assert_shapes_as_run(model)
    unused = sum(1 for n in model.graph for o in n.outputs if not o.name or n.op_type == "Dropout")
    assert compared >= sum(len(n.outputs) for n in model.graph) - unused


def test_guesses() -> None:
    def guess(inputs: str, attempt: int = 0, body: str = "y = Identity(a)") -> dict[str, int]:
        text = f"""<ir_version: 8, opset_import: ["": 17]>
            g ({inputs}) => (float[?] y) {{ {body} }}"""
        return guess_dims(from_text(text), None, attempt)

    assert guess("float[N,3,height,width] a") == {"N": 1, "height": 224, "width": 224}
    assert guess("float[?,?,?,3] a") == {"a:0": 1, "a:1": 224, "a:2": 224}
    assert guess("float[?,3,?,?] a", attempt=1)["a:2"] == 256
    assert guess("int64[batch,s7] a") == {"batch": 1, "s7": 64}
    assert guess("float[?,?] a") == {"a:0": 1, "a:1": 576}
    assert guess("float[?,audio_length] a")["audio_length"] == 16000
    assert guess("float[2,?,64] a") == {"a:1": 1}
    assert guess("float[seq_len,batch,8] a") == {"seq_len": 64, "batch": 1}
    assert guess("float[3,?,?] a") == {"a:1": 224, "a:2": 224}
    assert guess("float[?,12,?,64] a") == {"a:0": 1, "a:2": 64}
    decoder = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (int64[b,total] m, float[b,4,past_seq,8] a, int64[b,seq] i) => (float[?] y)
        { y = Identity(a) }""")
    decoder.graph.inputs[0].shape = ir.Shape(["b", "past_seq + seq"])
    past = guess_dims(decoder)
    assert past == {"b": 1, "past_seq + seq": 80, "past_seq": 16, "seq": 64}


def test_weights_force_dimensions() -> None:
    model = two()
    model.graph.inputs[0].shape = ir.Shape([None, None, None, None])
    assert guess_dims(model)["x:1"] == 3
    linear = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[?,?] x, float[9,4] w) => (float[?,4] y) { c = Cast <to = 1> (x)
          y = MatMul(c, w) }""")
    with_weights(linear, w=np.ones((9, 4), np.float32))
    assert guess_dims(linear) == {"x:0": 1, "x:1": 9}
    gemm = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[?,?] x, float[4,9] w) => (float[?,4] y) { y = Gemm <transB = 1> (x, w) }""")
    with_weights(gemm, w=np.ones((4, 9), np.float32))
    assert guess_dims(gemm) == {"x:0": 1, "x:1": 9}
