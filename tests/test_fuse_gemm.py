"""MatMul, Add, Transpose and Mul into Gemm, against ONNX Runtime before and after."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.walk import float_attr, int_attr
from effdl.passes.fuse.gemm import FuseGemm
from effdl.passes.low_rank import LowRank
from effdl.passes.quantize.dynamic import QuantizeDynamic
from effdl.passes.quantize.static import QuantizeStatic
from tests.support import (
    SHARED,
    assert_same,
    feed_for,
    from_text,
    needs_shared,
    op_counts,
    outputs,
    rel_l2,
    run_pass,
)

HEAD = '<ir_version: 8, opset_import: ["": 17]>'


def values(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[int | str | None] | None],
    weights: dict[str, np.ndarray],
    *,
    rank: int = 2,
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
) -> ir.Model:
    """A model with the output y; an input without a shape becomes a value of unknown rank."""
    blurred = [n for n, s in inputs.items() if s is None]
    nodes = [*(helper.make_node("Squeeze", [f"{n}_"], [n]) for n in blurred), *nodes]
    given = {f"{n}_" if n in blurred else n: s or [None] * 4 for n, s in inputs.items()}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, dtype, s) for n, s in given.items()],
        [helper.make_tensor_value_info("y", dtype, [None] * rank)],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return io.from_proto(proto, "test", None)


def fused(
    model: ir.Model, ops: dict[str, int], step: FuseGemm | None = None, tol: float = 1e-4
) -> ir.Node:
    """Fuse, compare, and return the one Gemm."""
    step = step or FuseGemm()
    before = model.clone()
    changes, log = run_pass(step, model)
    assert changes >= len(log.touched) > 0
    clean(model)
    io.check(model)
    assert op_counts(model) == ops
    for size in (1, 3):
        assert_same(before, model, rtol=tol, atol=tol, a=size, b=4)
    assert run_pass(step, model)[0] == 0
    return next(n for n in model.graph.all_nodes() if n.op_type == "Gemm")


def declined(model: ir.Model, reason: str, step: FuseGemm | None = None) -> None:
    before = io.to_bytes(model)
    changes, log = run_pass(step or FuseGemm(), model)
    assert changes == 0
    assert io.to_bytes(model) == before
    assert any(reason in r for _, r in log.skipped), log.skipped


def bias_model(
    bias: tuple[int, ...],
    *,
    rows: int | str = "a",
    flip: bool = False,
    opset: int = 17,
    computed: bool = False,
) -> ir.Model:
    """MatMul and Add with a constant or computed weight."""
    weights = {"c": values(*bias, seed=2)}
    inputs: dict[str, list[int | str | None] | None] = {"x": [rows, 5]}
    if computed:
        inputs["w"] = [5, 6]
    else:
        weights["w"] = values(5, 6, seed=1)
    add = helper.make_node("Add", ["c", "h"] if flip else ["h", "c"], ["y"], name="bias")
    product = helper.make_node("MatMul", ["x", "w"], ["h"], name="fc")
    return model_of([product, add], inputs, weights, rank=max(2, len(bias)), opset=opset)


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 13, 21])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("bias", [(6,), (1, 6)])
def test_a_layer_with_a_bias(opset: int, flip: bool, bias: tuple[int, ...]) -> None:
    gemm = fused(bias_model(bias, flip=flip, opset=opset), {"Gemm": 1})
    assert gemm.name == "fc"
    assert not gemm.attributes


@pytest.mark.parametrize("bias", [(), (1,), (1, 1), (6,), (1, 6), (3, 1), (3, 6)])
def test_every_bias_of_a_computed_product(bias: tuple[int, ...]) -> None:
    model = bias_model(bias, rows=3, computed=True)
    before = model.clone()
    assert run_pass(FuseGemm(), model)[0] == 1
    assert op_counts(model) == {"Gemm": 1}
    assert_same(before, model)


@pytest.mark.parametrize("bias", [(), (1,), (3, 1), (3, 6)])
def test_a_bias_that_quantization_cannot_take_needs_the_option(bias: tuple[int, ...]) -> None:
    declined(bias_model(bias, rows=3), "not one constant per output")
    model = bias_model(bias, rows=3)
    before = model.clone()
    assert run_pass(FuseGemm(any_bias=True), model)[0] == 1
    assert_same(before, model)


@pytest.mark.parametrize(
    ("bias", "rows", "reason"),
    [
        ((3, 6), "a", "may be larger"),
        ((3, 1), "a", "may be larger"),
        ((4, 6), 1, "may be larger"),
        ((1, 1, 6), "a", "has 3 axes"),
        ((2, 1, 6), "a", "has 3 axes"),
    ],
)
def test_a_bias_that_may_stretch_the_product_stays(
    bias: tuple[int, ...], rows: int | str, reason: str
) -> None:
    for computed in (False, True):
        model = bias_model(bias, rows=rows, computed=computed)
        declined(model, reason, FuseGemm(any_bias=True))


@pytest.mark.parametrize("bias", [(4,), (4, 1)])
def test_a_product_of_one_column_is_stretched_by_its_bias(bias: tuple[int, ...]) -> None:
    product = helper.make_node("MatMul", ["x", "w"], ["h"])
    add = helper.make_node("Add", ["h", "c"], ["y"])
    weights = {"w": values(5, 1), "c": values(*bias)}
    declined(model_of([product, add], {"x": [1, 5]}, weights), "may be larger")


def test_dynamic_biases_are_taken_where_their_sizes_are_the_same_name() -> None:
    product = helper.make_node("MatMul", ["x", "w"], ["h"])
    add = helper.make_node("Add", ["h", "c"], ["y"])
    shapes: dict[str, list[int | str | None] | None] = {"x": ["a", 5], "w": [5, "b"]}
    fused(model_of([product, add], shapes | {"c": ["b"]}, {}), {"Gemm": 1})
    fused(model_of([product, add], shapes | {"c": ["a", "b"]}, {}), {"Gemm": 1})
    for dims in (["a"], ["b", "b"], [None], ["a", None], ["b", 1]):
        declined(model_of([product, add], shapes | {"c": dims}, {}), "may be larger")
    declined(
        model_of([product, add], shapes | {"c": None}, {}), "the shape of the bias 'c' is unknown"
    )
    constant = {"w": values(5, 6)}
    given = {"x": shapes["x"], "c": ["a", 6]}
    declined(model_of([product, add], given, constant), "not one constant per output")
    fused(model_of([product, add], given, constant), {"Gemm": 1}, FuseGemm(any_bias=True))


@pytest.mark.parametrize(
    ("x", "w", "reason"),
    [
        ([2, "a", 5], [5, 6], "has 3 axes"),
        ([5], [5, 6], "has 1 axes"),
        ([3, 5], [2, 5, 6], "has 3 axes"),
        (None, [5, 6], "the rank of 'x' is unknown"),
    ],
)
def test_other_ranks_stay(x: list[int | str | None] | None, w: list[int], reason: str) -> None:
    product = helper.make_node("MatMul", ["x", "w"], ["h"])
    add = helper.make_node("Add", ["h", "c"], ["y"])
    weights = {"w": values(*w), "c": values(6)}
    rank = max(len(x or w), len(w)) - (x == [5])
    declined(model_of([product, add], {"x": x}, weights, rank=rank), reason)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("h = MatMul(x, w)  y = Add(h, c)  z = Relu(h)", None),
        ("z = MatMul(x, w)  y = Add(z, c)", None),
        ("z = Relu(x) h = MatMul(v, x)  y = Add(h, c)", "its weight is on the left"),
    ],
)
def test_structures_that_stay(body: str, reason: str | None) -> None:
    text = f"""{HEAD} g (float[6,6] x) => (float[a,6] y, float[b,6] z)
        <float[6,6] w, float[6,6] v, float[6] c> {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    del proto.graph.initializer[:]
    weights = {"w": values(6, 6), "v": values(6, 6, seed=3), "c": values(6)}
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights.items())
    model = io.from_proto(proto, "t", None)
    if reason is not None:
        declined(model, reason)
        return
    before = io.to_bytes(model)
    assert run_pass(FuseGemm(), model)[0] == 0
    assert io.to_bytes(model) == before


def test_integers_and_weights_that_callers_may_feed() -> None:
    declined(
        from_text(f"""{HEAD} g (int32[a,2] x) => (int32[a,2] y)
            <int32[2,2] w = {{1,2,3,4}}, int32[2] c = {{1,2}}> {{ h = MatMul(x, w)  y = Add(h, c) }}"""),
        "no Gemm kernel",
    )
    text = f"""{HEAD} g (float[a,2] x, float[2,2] w, float[2] c) => (float[a,2] y)
        <float[2,2] w = {{1,2,3,4}}, float[2] c = {{1,2}}> {{ h = MatMul(x, w)  y = Add(h, c) }}"""
    model = from_text(text)
    before = model.clone()
    # all are inputs with a declared shape: as with computed operands
    assert run_pass(FuseGemm(), model)[0] == 1
    assert_same(before, model, a=3)


def test_inside_a_branch_and_not_across_its_border() -> None:
    text = f"""{HEAD} g (float[a,2] x, bool p) => (float[a,2] y)
        <float[2,2] w = {{1,2,3,4}}, float[2] c = {{1,2}}>
        {{ o = MatMul(x, w)
           y = If(p) <then_branch = t () => (float[a,2] r) {{ m = MatMul(x, w)  r = Add(m, c) }},
                      else_branch = e () => (float[a,2] s) {{ s = Add(o, c) }}> }}"""
    model = from_text(text)
    before = model.clone()
    assert run_pass(FuseGemm(), model)[0] == 1
    assert op_counts(model) == {"MatMul": 1, "If": 1, "Gemm": 1, "Add": 1}
    for flag in (True, False):
        feed = {"x": values(3, 2), "p": np.array(flag)}
        np.testing.assert_allclose(outputs(model, feed)[0], outputs(before, feed)[0], rtol=1e-5)


def test_not_inside_a_function() -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "local": 1]>
        g (float[a,2] x) => (float[a,2] y) <float[2,2] w = {1,2,3,4}, float[2] c = {1,2}>
        { y = local.fc(x, w, c) }
        <domain: "local", opset_import: ["": 17]> fc (v, u, b) => (r) { h = MatMul(v, u)  r = Add(h, b) }"""
    declined(from_text(text), "inside a function")


def test_transposes_become_attributes() -> None:
    text = f"""{HEAD} g (float[a,5] x, float[b,5] w) => (float[a,b] y) {{
        t = Transpose <perm = [1, 0]> (w)  y = MatMul(x, t) }}"""
    assert int_attr(fused(from_text(text), {"Gemm": 1}), "transB", 0) == 1
    text = f"""{HEAD} g (float[5,a] x, float[b,5] w, float[b] c) => (float[a,b] y) {{
        s = Transpose (x)  t = Transpose <perm = [1, 0]> (w)  h = MatMul(s, t)  y = Add(h, c) }}"""
    gemm = fused(from_text(text), {"Gemm": 1})
    assert int_attr(gemm, "transA", 0) == int_attr(gemm, "transB", 0) == 1
    text = f"""{HEAD} g (float[a,5] x, float[5,b] w) => (float[a,b] y) {{
        t = Transpose (w)  y = Gemm <transB = 1, alpha = 0.5> (x, t) }}"""
    gemm = fused(from_text(text), {"Gemm": 1})
    assert set(gemm.attributes) == {"alpha"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("t = Transpose <perm = [0, 1]> (w)  y = MatMul(x, t)", None),
        ("t = Transpose (w)  y = MatMul(x, t)  z = Relu(t)", None),
        ("t = Transpose (x)  y = MatMul(t, k)", "no transposed input"),
    ],
)
def test_transposes_that_stay(text: str, reason: str | None) -> None:
    model = from_text(f"""{HEAD} g (float[2,2] x, float[2,2] w) => (float[2,2] y)
        <float[2,2] k = {{1,2,3,4}}> {{ {text} }}""")
    if reason:
        declined(model, reason)
    else:
        assert run_pass(FuseGemm(), model)[0] == 0


def test_before_opset_11_a_gemm_needs_a_bias() -> None:
    old = '<ir_version: 8, opset_import: ["": 9]>'
    text = f"""{old} g (float[a,5] x, float[6,5] w) => (float[a,6] y) {{
        t = Transpose (w)  y = MatMul(x, t) }}"""
    declined(from_text(text), "opset 11")
    text = f"""{old} g (float[a,5] x, float[6,5] w, float[6] c) => (float[a,6] y) {{
        t = Transpose (w)  h = MatMul(x, t)  y = Add(h, c) }}"""
    fused(from_text(text), {"Gemm": 1})


@pytest.mark.parametrize("op", ["Mul", "Div"])
@pytest.mark.parametrize("shape", ["", "[1]", "[1,1]"])
def test_a_factor_becomes_alpha(op: str, shape: str) -> None:
    text = f"""{HEAD} g (float[a,5] x, float[b,5] w) => (float[a,b] y)
        <float{shape} s = {{3.3}}> {{ t = Transpose (w)  h = MatMul(x, t)  y = {op}(h, s) }}"""
    gemm = fused(from_text(text), {"Gemm": 1})
    want = 3.3 if op == "Mul" else 1 / 3.3
    assert float_attr(gemm, "alpha", 1.0) == pytest.approx(want, rel=1e-6)
    text = f"""{HEAD} g (float[a,5] x, float[5,b] w, float[a,b] c) => (float[a,b] y)
        <float{shape} s = {{-2.5}}> {{ h = Gemm <beta = 2.0> (x, w, c)  y = {op}(h, s) }}"""
    gemm = fused(from_text(text), {"Gemm": 1})
    want = -5.0 if op == "Mul" else -0.8
    assert float_attr(gemm, "beta", 1.0) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "shape", "body", "reason"),
    [
        ("float", "[1,1,1]", "y = Mul(h, s)", "adds axes"),
        ("double", "", "y = Mul(h, s)", "less exact"),
        ("float16", "", "y = Mul(h, s)", "less exact"),
        ("float", "", "y = Div(s, h)", None),
    ],
)
def test_factors_that_stay(dtype: str, shape: str, body: str, reason: str | None) -> None:
    text = f"""{HEAD} g ({dtype}[a,5] x, {dtype}[5,b] w) => ({dtype}[n] y)
        <{dtype}{shape} s> {{ h = MatMul(x, w)  {body} }}"""
    proto = onnx.parser.parse_model(text)
    kind = {"float": np.float32, "double": np.float64, "float16": np.float16}[dtype]
    size = [1] * shape.count("1")
    dims = [None] * (3 if shape.count("1") == 3 else 2)
    proto.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("y", proto.graph.input[0].type.tensor_type.elem_type, dims)
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.full(size, 0.3, kind), "s"))
    model = io.from_proto(proto, "t", None)
    if reason:
        declined(model, reason)
    else:
        assert run_pass(FuseGemm(), model)[0] == 0


@pytest.mark.parametrize("factor", ["0.0", "1e-38", "1e38"])
def test_factors_at_the_edge_stay(factor: str) -> None:
    text = f"""{HEAD} g (float[a,5] x, float[5,b] w) => (float[a,b] y)
        <float s = {{{factor}}}> {{ h = MatMul(x, w)  y = Mul(h, s) }}"""
    declined(from_text(text), "no fit number")


def test_a_power_of_two_is_exact_in_double() -> None:
    text = f"""{HEAD} g (double[a,5] x, double[5,b] w) => (double[a,b] y)
        <double s = {{0.25}}> {{ h = MatMul(x, w)  y = Mul(h, s) }}"""
    fused(from_text(text), {"Gemm": 1}, tol=1e-12)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 4),
    inner=st.integers(1, 5),
    columns=st.integers(1, 4),
    trans=st.tuples(st.booleans(), st.booleans()),
    start=st.sampled_from(["MatMul", "Gemm"]),
    own=st.tuples(st.sampled_from([1.0, 0.5, -3.0]), st.booleans(), st.booleans()),
    bias=st.sampled_from([None, (), (1,), ("n",), (1, "n"), ("m", 1), ("m", "n"), (1, 1)]),
    factor=st.sampled_from([None, 0.7, -2.0]),
    constant=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_every_combination_computes_the_same(
    rows, inner, columns, trans, start, own, bias, factor, constant, dtype
) -> None:
    """Products with all that may stand around them; whatever is fused, outputs stay equal."""
    alpha, turned_a, turned_b = own if start == "Gemm" else (1.0, False, False)
    flip_a, flip_b = trans[0] ^ turned_a, trans[1] ^ turned_b
    inputs = {"x": [inner, rows] if flip_a else [rows, inner]}
    shape = [columns, inner] if flip_b else [inner, columns]
    weights = {}
    if constant:
        weights["w"] = values(*shape, dtype=dtype)
    else:
        inputs["w"] = shape
    nodes, a, b = [], "x", "w"
    if trans[0]:
        nodes.append(helper.make_node("Transpose", ["x"], ["s"]))
        a = "s"
    if trans[1]:
        nodes.append(helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]))
        b = "t"
    attributes = {"alpha": alpha, "transA": int(turned_a), "transB": int(turned_b)}
    nodes.append(helper.make_node(start, [a, b], ["h"], **(attributes if start == "Gemm" else {})))
    last = "h"
    if bias is not None:
        dims = [{"m": rows, "n": columns}.get(d, d) for d in bias]
        weights["c"] = values(*dims, seed=1, dtype=dtype)
        nodes.append(helper.make_node("Add", [last, "c"], ["i"]))
        last = "i"
    if factor is not None:
        weights["f"] = np.array(factor, dtype)
        nodes.append(helper.make_node("Mul", ["f", last], ["j"]))
        last = "j"
    nodes.append(helper.make_node("Tanh", [last], ["y"]))
    kind = TensorProto.FLOAT if dtype is np.float32 else TensorProto.DOUBLE
    model = model_of(nodes, inputs, weights, dtype=kind)
    before = model.clone()
    step = FuseGemm(any_bias=True)
    changes, _ = run_pass(step, model)
    clean(model)
    assert_same(before, model, rtol=1e-4, atol=1e-5)
    assert run_pass(step, model)[0] == 0
    assert len(before.graph) - len(model.graph) <= changes + 1


def two_layers(k: int = 64) -> ir.Model:
    scale = np.float32(k**-0.5)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="one"),
        helper.make_node("Add", ["h", "c"], ["i"], name="add"),
        helper.make_node("Relu", ["i"], ["j"]),
        helper.make_node("MatMul", ["j", "v"], ["k"], name="two"),
        helper.make_node("Add", ["k", "d"], ["y"]),
    ]
    weights = {"w": values(k, k) * scale, "v": values(k, k, seed=4) * scale}
    return model_of(nodes, {"x": ["a", k]}, weights | {"c": values(k), "d": values(k, seed=5)})


@pytest.mark.parametrize(
    "step",
    [
        QuantizeDynamic(min_size=1),
        QuantizeStatic(),
        LowRank(ratio=0.5),
    ],
)
def test_lossy_passes_do_as_well_on_the_gemm(step) -> None:
    from effdl.data.feeds import Feeds

    plain, model = two_layers(), two_layers()
    feeds = Feeds(tuple(feed_for(plain, s, a=8) for s in range(4)), "random", False)
    want = outputs(plain, feed := feed_for(plain, 9, a=8))
    assert run_pass(FuseGemm(), model)[0] == 2
    errors, counts = [], []
    for candidate in (plain, model):
        assert run_pass(step, candidate, feeds=feeds)[0] > 0
        clean(candidate)
        errors.append(rel_l2(want[0], outputs(candidate, feed)[0]))
        counts.append(len(candidate.graph))
    assert errors[1] <= errors[0] * 1.2 + 1e-6
    assert counts[1] <= counts[0] + 1


@needs_shared
@pytest.mark.parametrize("name", ["squeezenet_fp32_from_fp16", "yolox_nano", "mnist_winml"])
def test_shared_models(name: str) -> None:
    assert SHARED is not None
    model = io.load(SHARED / "models" / f"{name}.onnx")
    before = model.clone()
    if run_pass(FuseGemm(any_bias=True), model)[0]:
        clean(model)
        assert_same(before, model, rtol=1e-3, atol=1e-3)
