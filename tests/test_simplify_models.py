"""Simplification: folding, shape arithmetic, inlining and duplicates, and whole models."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from effdl.graph import io
from effdl.graph.kernels import Kernels
from effdl.graph.walk import all_nodes, interface
from effdl.passes.simplify import Simplify
from tests.support import (
    SHARED,
    assert_same,
    feed_for,
    from_text,
    needs_shared,
    op_counts,
    outputs,
    run_pass,
)
from tests.test_simplify import HEAD, one, simplified


def test_constants_are_folded_by_runtime_kernels() -> None:
    model, log = simplified(
        """g (float[2,2] x) => (float[2,2] y) <float[2,2] a = {1,2,3,4}, float[2,2] b = {5,6,7,8}>
        { m = MatMul(a, b)  t = Transpose(m)  e = Exp(t)  k = Sqrt(e)  y = Add(x, k) }""",
        {"Add": 1},
    )
    assert log.notes["folded"] == 4
    m = np.array([[1, 2], [3, 4]], np.float32) @ np.array([[5, 6], [7, 8]], np.float32)
    stored = model.graph.initializers["k"].const_value
    assert stored is not None
    np.testing.assert_allclose(stored.numpy(), np.sqrt(np.exp(m.T)), rtol=1e-5)


def test_a_constant_output_becomes_one_constant_node() -> None:
    model, _ = simplified(
        """g (float[2] x) => (float[2] y, float[2] z) <float[2] a = {1,2}>
        { b = Exp(a)  y = Exp(b)  z = Add(x, y) }""",
        {"Constant": 1, "Add": 1},
    )
    assert [v.name for v in model.graph.outputs] == ["y", "z"]


def test_nothing_that_grows_the_file_is_folded() -> None:
    text = """g (float[100,100] x) => (float[100,100] y) <int64[2] s = {100,100}>
        { z = ConstantOfShape(s)  y = Add(x, z) }"""
    _, log = simplified(
        text.replace("ConstantOfShape(s)", "ConstantOfShape<value = float[1] {2}>(s)"),
        {"ConstantOfShape": 1, "Add": 1},
    )
    assert any("would add" in reason for _, reason in log.skipped)
    simplified(
        text.replace("ConstantOfShape(s)", "ConstantOfShape<value = float[1] {2}>(s)"),
        {"Add": 1},
        Simplify(max_growth=1 << 20),
    )


def test_growth_counts_over_the_whole_model() -> None:
    lines = [f"z{i} = Expand(c{i}, s)  y{i} = Concat<axis = 0>(x, z{i})" for i in range(4)]
    weights = [f"float c{i} = {{{i + 2}}}" for i in range(4)]
    outs = ", ".join(f"float[256] y{i}" for i in range(4))
    head = f"g (float[128] x) => ({outs}) <int64[1] s = {{128}}, {', '.join(weights)}>"
    text = f"{head} {{ {' '.join(lines)} }}"
    simplified(text, {"Expand": 4, "Concat": 4})
    simplified(text, {"Concat": 4}, Simplify(max_growth=4096))


def test_a_huge_result_is_not_even_computed() -> None:
    model = from_text(
        HEAD
        + """g (int64 x) => (int64 y) <int64[3] s = {100000,100000,1000}>
        { c = ConstantOfShape(s)  k = Shape(c)  q = ReduceProd<keepdims = 0>(k)  y = Add(x, q) }"""
    )
    run_pass(Simplify(), model)
    assert op_counts(model) == {"Add": 1}
    assert outputs(model, {"x": np.array(1)})[0] == 10**13 + 1


def test_what_cannot_be_sized_stays() -> None:
    model = from_text(
        HEAD
        + """g (float[1] x) => (float[1] y) <int64[2] s = {100000,100000}>
        { c = ConstantOfShape(s)  m = ReduceMax<keepdims = 0>(c)  y = Add(x, m) }"""
    )
    assert run_pass(Simplify(), model)[0] == 0


def test_random_numbers_stay_random() -> None:
    model = from_text(
        HEAD
        + """g (float[8] x) => (float[8] y, float[8] z) <float[8] p = {0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5}>
        { a = Bernoulli(p)  b = Bernoulli(p)  c = RandomNormal<shape = [8]>()  d = RandomNormal<shape = [8]>()
          e = Add(a, c)  f = Add(b, d)  y = Add(x, e)  z = Add(x, f) }"""
    )
    changes, log = run_pass(Simplify(), model)
    assert changes == 0
    assert any("other numbers each time" in reason for _, reason in log.skipped)


def test_quantized_weights_stay_quantized() -> None:
    simplified(
        """g (float[2,2] x) => (float[2,2] y) <int8[2,2] w = {1,2,3,4}, float s = {0.5}, int8 z = {0}>
        { d = DequantizeLinear(w, s, z)  y = MatMul(x, d) }""",
        {"DequantizeLinear": 1, "MatMul": 1},
    )


def test_shape_arithmetic_of_static_axes() -> None:
    text = """g (float[n,3,4] x) => (float[a,b] y)
        <int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64[1] ax = {0}>
        { s = Shape(x)  n = Gather(s, zero)  c = Gather(s, one)  h = Gather(s, two)  k = Mul(c, h)
          n1 = Unsqueeze(n, ax)  k1 = Unsqueeze(k, ax)  t = Concat<axis = 0>(n1, k1)  y = Reshape(x, t) }"""
    model, _ = simplified(text, {"Reshape": 1})
    shape = next(iter(model.graph.initializers.values())).const_value
    assert shape is not None
    assert shape.numpy().tolist() == [0, 12]


def test_an_unknown_size_of_another_tensor_becomes_minus_one() -> None:
    model, _ = simplified(
        """g (float[n,12] x, float[m] z) => (float[a,b,c] y)
        <int64[1] k = {3}, int64[1] q = {4}>
        { s = Shape(z)  t = Concat<axis = 0>(s, k, q)  y = Reshape(x, t) }""",
        {"Reshape": 1},
        n=2,
        m=2,
    )
    shape = next(iter(model.graph.initializers.values())).const_value
    assert shape is not None
    assert shape.numpy().tolist() == [-1, 3, 4]


@pytest.mark.parametrize(("n", "rest"), [(0, "{4,3}"), (2, "{4,3}"), (3, "{-1}")])
def test_reshapes_of_empty_batches_stay_right(n: int, rest: str) -> None:
    """With -1 an empty batch is refused by ONNX Runtime itself, so that is tried on a full one."""
    count = rest.count(",") + 1
    model = from_text(
        HEAD
        + f"""g (float[n,3,4] x) => (float{"[a,b,c]" if count == 2 else "[a,b]"} y)
        <int64 zero = {{0}}, int64[1] ax = {{0}}, int64[{count}] rest = {rest}>
        {{ s = Shape(x)  n = Gather(s, zero)  n1 = Unsqueeze(n, ax)
           t = Concat<axis = 0>(n1, rest)  y = Reshape(x, t) }}"""
    )
    before = model.clone()
    run_pass(Simplify(), model)
    assert op_counts(model) == {"Reshape": 1}
    feed = {"x": np.random.default_rng(0).standard_normal((n, 3, 4)).astype(np.float32)}
    np.testing.assert_array_equal(outputs(before, feed)[0], outputs(model, feed)[0])


def test_torch_expand_pattern() -> None:
    simplified(
        """g (float[n,1,4] x) => (float[a,b,c] y)
        <int64[3] want = {-1,3,-1}, int64[3] neg = {-1,-1,-1}, int64[1] len = {3}>
        { ones = ConstantOfShape<value = int64[1] {1}>(len)  e = Equal(want, neg)
          w = Where(e, ones, want)  y = Expand(x, w) }""",
        {"Expand": 1},
        n=2,
    )


def test_ifs_with_a_known_condition_are_inlined() -> None:
    text = """g (float[n,3] x, bool c) => (float[a,b] y, float[d,e] z)
        <float[3] w = {1,2,3}, int64 one = {1}, int64 three = {3}>
        { s = Shape(x)  k = Gather(s, one)  q = Equal(k, three)
          y = If(q) <then_branch = t () => (float[a,b] r) <float[3] v = {4,5,6}>
                       { m = Mul(x, v)  i = If(c) <then_branch = p () => (float[a,b] o) { o = Add(m, w) },
                                                   else_branch = u () => (float[a,b] o2) { o2 = Sub(m, v) }>
                         r = Relu(i) },
                     else_branch = e () => (float[a,b] r2) { r2 = Neg(x) }>
          z = If(q) <then_branch = t2 () => (float[a,b] r) { r = Identity(x) },
                     else_branch = e2 () => (float[a,b] r2) <float[3] v = {4,5,6}> { r2 = Mul(x, v) }> }"""
    simplified(text, {"Mul": 1, "If": 1, "Add": 1, "Sub": 1, "Relu": 1, "Identity": 1}, n=2)


def test_inlining_does_not_clash_with_names_outside() -> None:
    simplified(
        """g (float[3] x, bool c) => (float[3] y, float[3] q) <bool yes = {1}>
        { a = If(yes) <then_branch = t () => (float[3] r) <float[3] v = {4,5,6}> { m = Mul(x, v) r = Exp(m) },
                       else_branch = e () => (float[3] r) { r = Neg(x) }>
          q = If(c) <then_branch = t2 () => (float[3] r) <float[3] v = {1,1,2}> { m = Add(a, v)  r = Exp(m) },
                     else_branch = e2 () => (float[3] r) { m = Neg(a)  r = Exp(m) }>
          y = Sqrt(a) }""",
        {"Mul": 1, "Exp": 3, "If": 1, "Add": 1, "Neg": 1, "Sqrt": 1},
    )


def test_duplicates() -> None:
    model, log = simplified(
        """g (float[2,3] x, bool c) => (float[2,3] y, float[2,3] z)
        <float[3] v = {1,2,3}, float[3] w = {1,2,3}>
        { a = Add(x, v)  b = Add(x, w)  d = Softmax<axis = 1>(a)  e = Softmax<axis = 1>(b)
          f = Softmax<axis = 0>(b)  g = Mul(d, e)  y = Add(g, f)
          z = If(c) <then_branch = t () => (float[2,3] r) <float[3] u = {1,2,3}> { k = Add(x, u) r = Exp(k) },
                     else_branch = l () => (float[2,3] s) <float[3] u2 = {3,2,1}> { s = Mul(x, u2) }> }""",
        {"Add": 2, "Softmax": 2, "Mul": 2, "If": 1, "Exp": 1},
    )
    assert log.notes["duplicate_weights"] == 2
    assert log.notes["duplicate_nodes"] == 3
    assert sorted(model.graph.initializers) == ["v"]


def test_equal_weights_of_two_branches_move_out() -> None:
    model, _ = simplified(
        """g (float[3] x, bool c) => (float[3] z)
        { z = If(c) <then_branch = t () => (float[3] r) <float[3] u = {1,2,3}> { r = Add(x, u) },
                     else_branch = l () => (float[3] s) <float[3] u = {1,2,3}> { s = Mul(x, u) }> }""",
        {"If": 1, "Add": 1, "Mul": 1},
    )
    assert len(model.graph.initializers) == 1
    assert all(not g.initializers for g in model.graph.subgraphs())


def test_equal_numbers_of_other_types_or_bits_are_no_duplicates() -> None:
    model, _ = simplified(
        """g (float[2] x) => (float[2] y, double[2] z)
        <float[2] a = {0,1}, float[2] b = {-0.0,1}, double[2] d = {0,1}>
        { e = Div(x, a)  f = Div(x, b)  y = Add(e, f)  g = Cast<to = 11>(x)  z = Mul(g, d) }""",
        {"Div": 2, "Add": 1, "Cast": 1, "Mul": 1},
    )
    assert len(model.graph.initializers) == 3


def test_two_equal_outputs_stay_two() -> None:
    simplified("g (float[2] x) => (float[2] y, float[2] z) { y = Exp(x)  z = Exp(x) }", {"Exp": 2})
    simplified(
        "g (float[2] x) => (float[2] y, float[2] z) { y = Exp(x)  a = Exp(x)  z = Neg(a) }",
        {"Exp": 1, "Neg": 1},
    )


def test_passing_an_input_to_an_output_stays() -> None:
    _, log = simplified("g (float[n] x) => (float[n] y) { y = Identity(x) }", {"Identity": 1})
    assert any("from an input" in reason for _, reason in log.skipped)


def test_functions_are_simplified_too_and_keep_no_initializers() -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["": 17, "local": 1]>
        g (float[2,3] x) => (float[2,3] y) { y = local.f<k = 1>(x) }
        <domain: "local", opset_import: ["": 17]> f <k> (v) => (r)
        { one = Constant<value = float {1}>()  two = Add(one, one)  i = Identity(v)  m = Mul(i, one)
          a = Mul(m, two)  b = Mul(m, two)  s = Softmax<axis: int = @k>(a)  r = Add(s, b) }"""
    )
    before = model.clone()
    run_pass(Simplify(), model)
    function = next(iter(model.functions.values()))
    assert [n.op_type for n in function] == ["Constant", "Mul", "Softmax", "Add"]
    assert_same(before, model, rtol=0, atol=0)
    assert run_pass(Simplify(), model)[0] == 0


def test_weights_that_are_inputs() -> None:
    text = (
        '<ir_version: 3, opset_import: ["": 7]> g (float[2] x, float[2] w) => (float[2] y) '
        "{ a = Add(x, w)  b = Exp(w)  y = Add(a, b) }"
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float32), "w"))
    model = io.from_proto(proto, "t", None)
    kept = model.clone()
    changes, log = run_pass(Simplify(), model)
    assert changes
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert model.ir_version == 4
    assert op_counts(model) == {"Add": 2}
    assert log.notes["inputs_made_constant"] == 1
    assert run_pass(Simplify(initializers_from_inputs=False), kept)[0] == 0
    feed = {"x": np.zeros(2, np.float32)}
    np.testing.assert_array_equal(outputs(model, feed)[0], outputs(kept, feed)[0])


def test_unknown_domains_and_sequences_survive() -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["": 17, "com.unknown": 1]>
        g (float[2] x) => (float[2] y) <float[2] w = {1,2}>
        { a = com.unknown.Op(w)  b = com.unknown.Op(w)  i = Identity(x)  c = Add(a, b)  y = Add(i, c) }"""
    )
    changes, log = run_pass(Simplify(), model)
    assert changes == 1
    assert op_counts(model) == {"Op": 2, "Add": 2}
    assert any("com.unknown" in reason for _, reason in log.skipped)
    simplified(
        """g (float[2] x) => (float[4] y) <float[2] w = {1,2}, int64 z = {0}>
        { e = SequenceConstruct(w, w)  a = SequenceAt(e, z)  y = Concat<axis = 0>(x, a) }""",
        {"SequenceConstruct": 1, "SequenceAt": 1, "Concat": 1},
    )


def test_strings_are_folded() -> None:
    w = helper.make_tensor("w", TensorProto.STRING, [2], [b"a", b"b\xc3\xbc"])
    graph = helper.make_graph(
        [
            helper.make_node("Concat", ["w", "w"], ["c"], axis=0),
            helper.make_node("Gather", ["c", "i"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("i", TensorProto.INT64, [2])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, [2])],
        [w],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = io.from_proto(proto, "t", None)
    run_pass(Simplify(), model)
    assert op_counts(model) == {"Gather": 1}
    assert outputs(model, {"i": np.array([0, 3])})[0].tolist() == ["a", "bü"]


def test_typed_data_of_constants_does_not_grow() -> None:
    """Small integers kept as varints in a Constant would take eight bytes each as raw data."""
    numbers = helper.make_tensor("t", TensorProto.INT64, [500], [1] * 500)
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["c"], value=numbers),
            helper.make_node("Add", ["x", "c"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.INT64, [500])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [500])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = io.from_proto(proto, "t", None)
    size = len(io.to_bytes(model))
    run_pass(Simplify(max_growth=0), model)
    assert len(io.to_bytes(model)) <= size


OPS = [
    "Relu",
    "Neg",
    "Abs",
    "Identity",
    "Transpose",
    "Cast",
    "AddZero",
    "MulOne",
    "Add",
    "Mul",
    "Exp",
]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(OPS), st.integers(0, 30), st.integers(0, 30)), max_size=14)
)
def test_random_graphs_keep_their_outputs(steps: list[tuple[str, int, int]]) -> None:
    values, nodes = ["x", "w"], []
    for k, (op, i, j) in enumerate(steps):
        a, b = values[i % len(values)], values[j % len(values)]
        name = f"v{k}"
        if op in ("AddZero", "MulOne"):
            nodes.append(helper.make_node(op[:3], [a, op[3:].lower()], [name]))
        elif op in ("Add", "Mul"):
            nodes.append(helper.make_node(op, [a, b], [name]))
        elif op == "Cast":
            nodes.append(helper.make_node("Cast", [a], [f"d{k}"], to=TensorProto.DOUBLE))
            nodes.append(helper.make_node("Cast", [f"d{k}"], [name], to=TensorProto.FLOAT))
        elif op == "Transpose":
            nodes.append(helper.make_node("Transpose", [a], [name], perm=[1, 0]))
        elif op == "Exp":
            nodes.append(helper.make_node("Tanh", [a], [name]))
        else:
            nodes.append(helper.make_node(op, [a], [name]))
        values.append(name)
    nodes.append(helper.make_node("Add", [values[-1], "x"], ["y"]))
    outs = ["y", *dict.fromkeys(v for v in values[-3:] if v.startswith("v"))]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 3])],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, ["p", "q"]) for o in outs],
        [
            numpy_helper.from_array(np.arange(9, dtype=np.float32).reshape(3, 3) / 9, "w"),
            numpy_helper.from_array(np.zeros((), np.float32), "zero"),
            numpy_helper.from_array(np.ones((1,), np.float32), "one"),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = io.from_proto(proto, "t", None)
    before = model.clone()
    data = io.to_bytes(model)
    changes, _ = run_pass(Simplify(), model)
    assert interface(model) == interface(before)
    assert io.to_bytes(before) == data
    assert_same(before, model, rtol=1e-6, atol=1e-6)
    assert run_pass(Simplify(), model)[0] == 0
    assert changes == 0 or len(io.to_bytes(model)) <= len(data) + 1024


def test_two_runs_give_the_same_bytes() -> None:
    text = HEAD + one("s = Shape(h) y = Reshape(h, s)")
    first, second = from_text(text), from_text(text)
    run_pass(Simplify(), first)
    run_pass(Simplify(), second)
    assert io.to_bytes(first) == io.to_bytes(second)


def test_kernels_say_why_not() -> None:
    node = ir.Node("", "NoSuchOp", [ir.Value(name="a")], num_outputs=1)
    node.outputs[0].name = "b"
    got = Kernels().run(node, [np.ones(2, np.float32)], {"": 17}, 1 << 20)
    assert isinstance(got, str)
    assert "cannot compute" in got


MOST = {
    "cifar_resnet20": 51,
    "dtln_1": 37,
    "mnist_selfattn": 50,
    "mobilenetv2_qdq_int8": 338,
    "nnsplit_en": 40,
    "seg_pan_mbv3s": 231,
    "squeezenet_fp16_winml": 65,
    "superres_prepost_op18": 75,
    "tract_qlstm": 72,
    "tract_xgb_classifier": 1,
    "ultraface_rfb320": 160,
    "voice_commands": 9,
    "yolox_nano": 367,
}


@needs_shared
@pytest.mark.shared
@pytest.mark.parametrize("name", sorted(MOST))
def test_shared_models(name: str) -> None:
    assert SHARED is not None
    model = io.load(SHARED / "models" / f"{name}.onnx")
    before = model.clone()
    data = io.to_bytes(model)
    changes, _ = run_pass(Simplify(), model)
    after = io.to_bytes(model)
    assert len(list(all_nodes(model))) <= MOST[name]
    assert len(after) <= len(data)
    assert (changes == 0) == (after == data)
    assert io.to_bytes(before) == data
    assert run_pass(Simplify(), model)[0] == 0
    if name in ("superres_prepost_op18", "tract_xgb_classifier"):
        return  # the first needs foreign operators, the second gives maps
    feed = feed_for(before, length=8)
    for optimize in (True, False):
        for want, got in zip(
            outputs(before, feed, optimize=optimize),
            outputs(model, feed, optimize=optimize),
            strict=True,
        ):
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


@needs_shared
@pytest.mark.shared
def test_silero_inside_its_branches() -> None:
    assert SHARED is not None
    model = io.load(SHARED / "models" / "silero_vad.onnx")
    before = model.clone()
    run_pass(Simplify(), model)
    assert len(list(all_nodes(model))) <= 152
    rng = np.random.default_rng(0)
    for rate, width in ((16000, 576), (8000, 288)):
        feed = {
            "input": rng.standard_normal((1, width)).astype(np.float32) * np.float32(0.1),
            "state": rng.standard_normal((2, 1, 128)).astype(np.float32) * np.float32(0.1),
            "sr": np.array(rate, np.int64),
        }
        for want, got in zip(outputs(before, feed), outputs(model, feed), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
