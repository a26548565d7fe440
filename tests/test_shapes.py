from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from effdl.data.random import random_feeds, resolve_dims
from effdl.graph import io
from effdl.graph.dims import selector_values
from effdl.graph.shapes import infer, infer_into
from effdl.graph.walk import all_nodes
from effdl.runtime.session import open_session
from tests.support import SAMPLES, SHARED, from_text, needs_shared
from tests.weighted import weighted

TWO = """<ir_version: 8, opset_import: ["": 17]>
g (float[N,3,H,W] x, int64[N] n, float[5,3,3,3] w) => (float[N,5,?,?] y)
{ c = Conv <strides = [2, 2]> (x, w)
  y = Relu(c) }"""


def two() -> ir.Model:
    return weighted(TWO, w=np.ones((5, 3, 3, 3), np.float32))


def value(model: ir.Model, name: str) -> ir.Value:
    return next(o for n in all_nodes(model) for o in n.outputs if o.name == name)


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
      four = Constant <value_ints = [4]> ()
      target = Concat <axis = 0> (b, ch, h, four)
      y = Reshape(x, target)
      n = Size(x)
      n1 = Reshape(n, one)
      flat = Concat <axis = 0> (one, n1)
      p = Reshape(x, flat)
    }"""


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
    declared = model.graph.outputs[0].shape
    assert infer_into(model) == 1
    assert value(model, "c").shape == ir.Shape([2, 5, 3, 3])
    assert model.graph.outputs[0].shape == declared
    assert model.graph.inputs[0].shape == ir.Shape(["N", 3, 7, 7])
    io.check(model)
    written = io.to_bytes(model)
    assert infer_into(model) == 0
    assert io.to_bytes(model) == written


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


def assert_shapes_as_run(model: ir.Model) -> int:
    """Every inferred shape of the main graph is what ONNX Runtime computes; returns how many."""
    feed = random_feeds(model, count=1).batches[0]
    dims = resolve_dims(model)
    names = {
        v.name: np.asarray(feed[v.name])
        for v in model.graph.inputs
        if v.name in selector_values(model)
    }
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
    "name",
    [
        "nnsplit_en",
        "ultraface_rfb320",
        "seg_pan_mbv3s",
        "silero_vad",
        "tract_qlstm",
        "voice_commands",
        "dtln_1",
        "mnist_selfattn",
        "yolox_nano",
        "cifar_resnet20",
        "mobilenetv2_qdq_int8",
        "squeezenet_fp16_winml",
    ],
)
def test_shapes_of_real_models_as_run(name: str) -> None:
    assert SHARED is not None
    model = io.load(SHARED / "models" / f"{name}.onnx")
    compared = assert_shapes_as_run(model)
    unused = sum(1 for n in model.graph for o in n.outputs if not o.name or n.op_type == "Dropout")
    assert compared >= sum(len(n.outputs) for n in model.graph) - unused
