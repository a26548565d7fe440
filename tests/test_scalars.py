from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from effdl.graph import io
from effdl.graph.walk import interface
from effdl.passes.infer_shapes import InferShapes
from effdl.passes.simplify import Simplify
from effdl.runtime.session import open_session
from tests.support import context, from_text, op_counts, run_pass


def test_a_range_of_vectors_gets_scalars_and_runs() -> None:
    """ONNX Runtime takes the model while the If hides the shapes, and refuses it without the If."""
    model = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[3,4] x) => (int64[n] y)
        <int64[1] one = {1}, int64 zero = {0}, bool yes = {1}>
        { n = If(yes) <then_branch = t () => (a) {
                s = Shape(x)  i = Constant <value = int64[1] {0}> ()  a = Gather(s, i) },
            else_branch = e () => (b) { b = Identity(one) }>
          k = NonZero(x)  m = Shape(k)  j = Constant <value = int64[1] {1}> ()  limit = Gather(m, j)
          total = Add(limit, n)
          y = Range(zero, total, one) }""")
    changes, _ = run_pass(Simplify(), model)
    assert changes
    assert "If" not in op_counts(model)
    got = open_session(model).run({"x": np.ones((3, 4), np.float32)})["y"]
    np.testing.assert_array_equal(got, np.arange(15))
    assert Simplify().run(model, context()) == 0


def test_an_output_without_a_shape_stays_without() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x) => (float y)
        <bool yes = {1}>
        { y = If(yes) <then_branch = t () => (float[2] a) { a = Relu(x) },
                       else_branch = e () => (float[2] b) { b = Neg(x) }> }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = io.from_proto(proto, "text", None)
    before = interface(model)
    assert run_pass(Simplify(), model)[0]
    assert [n.op_type for n in model.graph] == ["Relu"]
    assert interface(model) == before


def test_a_sequence_is_not_given_the_type_of_a_tensor() -> None:
    model = from_text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x, bool c) => (float[?] y)
        { s = If(c) <then_branch = t () => (seq(float[2]) a) { a = SequenceConstruct(x) },
                     else_branch = e () => (seq(float[2]) b) { b = SequenceConstruct(x, x) }>
          y = ConcatFromSequence <axis = 0> (s) }""")
    InferShapes().run(model, context())
    value = next(o for n in model.graph for o in n.outputs if o.name == "s")
    assert value.type is None or isinstance(value.type, ir.SequenceType)
    feed = {"x": np.ones(2, np.float32), "c": np.array(False)}
    assert open_session(model).run(feed)["y"].shape == (4,)
