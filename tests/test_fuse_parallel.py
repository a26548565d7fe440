"""Layers with one input into one layer, against ONNX Runtime before and after."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.walk import interface
from effdl.passes.fuse.parallel import FuseParallel
from effdl.passes.quantize.dynamic import QuantizeDynamic
from effdl.passes.simplify import Simplify
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

ANY = FuseParallel(max_rows=0, min_size=0, max_width=0)
node = helper.make_node


def values(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype(dtype)


def model_of(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    x: list[int | str],
    outs: dict[str, int],
    *,
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
) -> ir.Model:
    """A model of x with these outputs and their ranks."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, x)],
        [helper.make_tensor_value_info(n, dtype, [None] * r) for n, r in outs.items()],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return io.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=8), "t", None)


def packed(
    model: ir.Model, ops: dict[str, int], step: FuseParallel = ANY, tol: float = 1e-4, **dims: int
) -> ir.Model:
    before = model.clone()
    changes, log = run_pass(step, model)
    assert changes >= len(log.touched) > 0
    clean(model)
    io.check(model)
    assert op_counts(model) == ops
    assert interface(model) == interface(before)
    assert_same(before, model, rtol=tol, atol=tol, **dims)
    assert run_pass(step, model)[0] == 0
    return model


def declined(model: ir.Model, reason: str, step: FuseParallel = ANY) -> None:
    before = io.to_bytes(model)
    changes, log = run_pass(step, model)
    assert changes == 0
    assert io.to_bytes(model) == before
    assert any(reason in r for _, r in log.skipped), log.skipped


def linear(
    widths: tuple[int, ...],
    biases: tuple[bool, ...] | None = None,
    *,
    x: list[int | str] | None = None,
    k: int = 5,
    opset: int = 17,
    after: str = "",
    dtype: Any = np.float32,
) -> ir.Model:
    """MatMuls of one input, with an Add where ``biases`` says so."""
    x = x or ["a", 3, k]
    nodes, weights = [], {}
    for i, n in enumerate(widths):
        weights[f"w{i}"] = values(k, n, seed=i, dtype=dtype)
        last = f"y{i}" if not after and not (biases and biases[i]) else f"h{i}"
        nodes.append(node("MatMul", ["x", f"w{i}"], [last], name=f"fc{i}"))
        if biases and biases[i]:
            weights[f"c{i}"] = values(n, seed=i, dtype=dtype)
            pair = [f"c{i}", last] if i % 2 else [last, f"c{i}"]
            last = f"i{i}" if after else f"y{i}"
            nodes.append(node("Add", pair, [last], name=f"add{i}"))
        if after:
            nodes.append(node(after, [last], [f"y{i}"], name=f"act{i}"))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    outs = {f"y{i}": len(x) for i in range(len(widths))}
    return model_of(nodes, weights, x, outs, opset=opset, dtype=kind)


def convs(
    widths: tuple[int, ...],
    biases: tuple[bool, ...] | None = None,
    *,
    kernel: int = 1,
    opset: int = 17,
    attributes: tuple[dict[str, Any], ...] | None = None,
    channels: int = 4,
    group: int = 1,
) -> ir.Model:
    nodes, weights = [], {}
    for i, n in enumerate(widths):
        weights[f"w{i}"] = values(n, channels // group, kernel, kernel, seed=i)
        names = ["x", f"w{i}"]
        if biases and biases[i]:
            weights[f"c{i}"] = values(n, seed=i)
            names.append(f"c{i}")
        own = attributes[i] if attributes else {}
        nodes.append(node("Conv", names, [f"y{i}"], name=f"conv{i}", group=group, **own))
    outs = {f"y{i}": 4 for i in range(len(widths))}
    return model_of(nodes, weights, ["n", channels, 6, "w"], outs, opset=opset)


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 18, 21])
def test_queries_keys_and_values(opset: int) -> None:
    model = linear((6, 6, 8), (True, True, True), opset=opset)
    packed(model, {"MatMul": 1, "Add": 1, "Split": 1}, a=2)
    packed(linear((6, 2), opset=opset), {"MatMul": 1, "Split": 1}, a=2)


@pytest.mark.parametrize("x", [[5], ["a", 5], ["a", 2, 5], ["a", "b", 2, 5]])
def test_any_rank(x: list[int | str]) -> None:
    packed(linear((3, 4), (True, True), x=x), {"MatMul": 1, "Add": 1, "Split": 1}, a=2, b=3)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types(dtype: Any) -> None:
    tol = 2e-2 if dtype is np.float16 else 1e-9
    model = linear((3, 4), (True, False), dtype=dtype)
    packed(model, {"MatMul": 1, "Add": 1, "Split": 1}, tol=tol, a=2)


def test_a_layer_without_bias_gets_zeros() -> None:
    model = packed(linear((3, 4), (True, False)), {"MatMul": 1, "Add": 1, "Split": 1}, a=2)
    add = next(n for n in model.graph if n.op_type == "Add")
    bias = add.inputs[1]
    assert bias is not None
    assert bias.const_value is not None
    np.testing.assert_array_equal(bias.const_value.numpy()[3:], np.zeros(4, np.float32))


def test_an_add_that_is_no_bias_stays_behind() -> None:
    weights = {"w0": values(5, 3), "w1": values(5, 3, seed=1), "c": values(3, 1)}
    nodes = [
        node("MatMul", ["x", "w0"], ["h"]),
        node("MatMul", ["x", "w1"], ["y1"]),
        node("Add", ["h", "c"], ["y0"]),
    ]
    model = model_of(nodes, weights, [3, 5], {"y0": 2, "y1": 2})
    packed(model, {"MatMul": 1, "Split": 1, "Add": 1})
    nodes[2] = node("Add", ["h", "d"], ["y0"])
    model = model_of(nodes, weights | {"d": values(1, 1, 3)}, [3, 5], {"y0": 3, "y1": 2})
    packed(model, {"MatMul": 1, "Split": 1, "Add": 1})


def test_outputs_of_the_graph_that_others_read_too() -> None:
    weights = {"w0": values(5, 3), "w1": values(5, 3, seed=1), "c": values(3)}
    nodes = [
        node("MatMul", ["x", "w0"], ["y0"]),
        node("Add", ["y0", "c"], ["y2"]),
        node("MatMul", ["x", "w1"], ["y1"]),
    ]
    model = model_of(nodes, weights, ["a", 5], {"y0": 2, "y1": 2, "y2": 2})
    packed(model, {"MatMul": 1, "Split": 1, "Add": 1}, a=3)


def test_chains_of_pairs() -> None:
    nodes = [
        node("MatMul", ["x", "w0"], ["p"]),
        node("MatMul", ["x", "w1"], ["q"]),
        node("MatMul", ["p", "w2"], ["r"]),
        node("MatMul", ["p", "w3"], ["s"]),
        node("Mul", ["q", "r"], ["t"]),
        node("Add", ["t", "s"], ["y"]),
    ]
    weights = {f"w{i}": values(5, 5, seed=i) for i in range(4)}
    model = model_of(nodes, weights, [2, 5], {"y": 2})
    packed(model, {"MatMul": 2, "Split": 2, "Mul": 1, "Add": 1}, FuseParallel(min_size=0))


@pytest.mark.parametrize("opset", [9, 11, 17])
@pytest.mark.parametrize("trans", [(0, 0), (1, 1), (1, 0)])
@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("bias", [(), (1,), (4,), (1, 4), (1, 1)])
def test_gemms(opset: int, trans: tuple[int, int], beta: float, bias: tuple[int, ...]) -> None:
    weights = {"c0": values(*bias), "c1": values(3)}
    nodes = []
    for i, n in enumerate((4, 3)):
        weights[f"w{i}"] = values(n, 5, seed=i) if trans[i] else values(5, n, seed=i)
        own = {"transB": trans[i], "alpha": 0.7, "beta": beta if i == 0 else 1.0}
        nodes.append(node("Gemm", ["x", f"w{i}", f"c{i}"], [f"y{i}"], **own))
    model = model_of(nodes, weights, ["a", 5], {"y0": 2, "y1": 2}, opset=opset)
    packed(model, {"Gemm": 1, "Split": 1}, a=3)


def test_a_gemm_and_a_matmul_and_one_without_bias() -> None:
    weights = {f"w{i}": values(5, 3, seed=i) for i in range(3)} | {"c": values(3)}
    nodes = [
        node("MatMul", ["x", "w0"], ["y0"]),
        node("Gemm", ["x", "w1"], ["y1"]),
        node("Gemm", ["x", "w2", "c"], ["y2"]),
    ]
    model = model_of(nodes, weights, ["a", 5], {"y0": 2, "y1": 2, "y2": 2})
    packed(model, {"Gemm": 1, "Split": 1}, a=3)


@pytest.mark.parametrize(
    ("second", "extra", "reason"),
    [
        (node("Gemm", ["x", "w1"], ["y1"], alpha=0.5), {}, "other forms"),
        (node("Gemm", ["x", "w1"], ["y1"], transA=1), {}, "its input is transposed"),
        (node("Gemm", ["x", "w1", "d"], ["y1"]), {"d": values(5, 1)}, "differs by row"),
        (node("Gemm", ["x", "w1", "d"], ["y1"]), {"d": values(5, 5)}, "differs by row"),
        (node("Gemm", ["x", "w1", "x"], ["y1"]), {}, "its bias is computed"),
        (node("Gemm", ["x", "x"], ["y1"]), {}, "its weight is computed"),
        (node("MatMul", ["x", "w0"], ["y1"]), {}, "its weight has other users"),
        (node("MatMul", ["x", "v"], ["y1"]), {"v": values(1, 5, 5)}, "has 3 axes"),
    ],
)
def test_products_that_stay(
    second: onnx.NodeProto, extra: dict[str, np.ndarray], reason: str
) -> None:
    weights = {"w0": values(5, 5), "w1": values(5, 5, seed=1)} | extra
    nodes = [node("MatMul", ["x", "w0"], ["y0"]), second]
    rank = 3 if "v" in extra else 2
    declined(model_of(nodes, weights, [5, 5], {"y0": 2, "y1": rank}), reason)


@pytest.mark.parametrize("opset", [7, 11, 13, 18])
@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
def test_convs(opset: int, biases: tuple[bool, ...]) -> None:
    packed(convs((3, 5, 1), biases, opset=opset), {"Conv": 1, "Split": 1}, n=2, w=5)


@pytest.mark.parametrize(
    "own",
    [
        {"pads": [1, 1, 1, 1]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 1]},
        {"pads": [0, 1, 2, 0], "dilations": [2, 1], "kernel_shape": [3, 3]},
    ],
)
def test_convs_with_attributes(own: dict[str, Any]) -> None:
    packed(convs((3, 5), kernel=3, attributes=(own, own)), {"Conv": 1, "Split": 1}, n=2, w=5)


def test_written_out_defaults_are_the_defaults() -> None:
    own = ({"pads": [0] * 4, "strides": [1, 1], "kernel_shape": [1, 1]}, {})
    packed(convs((3, 5), attributes=own), {"Conv": 1, "Split": 1}, n=2, w=5)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"strides": [2, 2]}, {}),
        ({"pads": [1, 1, 1, 1]}, {}),
        ({"dilations": [2, 2]}, {}),
        ({"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}),
    ],
)
def test_convs_that_differ_stay(one: dict[str, Any], two: dict[str, Any]) -> None:
    declined(convs((3, 5), kernel=2, attributes=(one, two)), "of other forms")


def test_expand_of_squeezenet_stays() -> None:
    weights = {"w0": values(3, 4, 1, 1), "w1": values(3, 4, 3, 3)}
    nodes = [
        node("Conv", ["x", "w0"], ["y0"]),
        node("Conv", ["x", "w1"], ["y1"], pads=[1] * 4),
    ]
    declined(model_of(nodes, weights, [1, 4, 6, 6], {"y0": 4, "y1": 4}), "of other forms")


def test_groups_and_depthwise_stay() -> None:
    declined(convs((4, 4), group=2), "2 groups")
    declined(convs((4, 8), group=4), "4 groups")


def silu(i: int) -> list[onnx.NodeProto]:
    return [
        node("Sigmoid", [f"h{i}"], [f"s{i}"]),
        node("Mul", [f"s{i}", f"h{i}"] if i else [f"h{i}", f"s{i}"], [f"y{i}"]),
    ]


ACTIVATIONS = {
    "relu": lambda i: [node("Relu", [f"h{i}"], [f"y{i}"])],
    "leaky": lambda i: [node("LeakyRelu", [f"h{i}"], [f"y{i}"], alpha=0.3)],
    "clip": lambda i: [node("Clip", [f"h{i}", "low", "high"], [f"y{i}"])],
    "clip_constants": lambda i: [
        node("Constant", [], [f"k{i}"], value_float=0.5),
        node("Clip", [f"h{i}", "", f"k{i}"], [f"y{i}"]),
    ],
    "silu": silu,
    "contrib": lambda i: [
        node("QuickGelu", [f"h{i}"], [f"y{i}"], alpha=1.0, domain="com.microsoft")
    ],
}


def activated(first: str, second: str, *, conv: bool = True) -> ir.Model:
    nodes, weights = [], {"low": np.float32(-0.5), "high": np.float32(0.4)}
    weights = {k: np.array(v) for k, v in weights.items()}
    for i, name in enumerate((first, second)):
        weights[f"w{i}"] = values(3 + i, 4, 1, 1, seed=i) if conv else values(6, 3 + i, seed=i)
        nodes.append(node("Conv" if conv else "MatMul", ["x", f"w{i}"], [f"h{i}"]))
        nodes += ACTIVATIONS[name](i)
    return model_of(nodes, weights, ["n", 4, 6, 6], {"y0": 4, "y1": 4})


@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_the_same_activation_goes_before_the_split(name: str, conv: bool) -> None:
    model = activated(name, name, conv=conv)
    ops = op_counts(model)
    want = {op: (n + 1) // 2 for op, n in ops.items() if op != "Constant"} | {"Split": 1}
    packed(model, want, n=2)
    model = activated(name, name, conv=conv)
    step = ANY.model_copy(update={"activations": False})
    product = "Conv" if conv else "MatMul"
    packed(model, ops | {product: 1, "Split": 1}, step, n=2)


def test_other_activations_stay_behind_the_split() -> None:
    packed(activated("relu", "leaky"), {"Conv": 1, "Split": 1, "Relu": 1, "LeakyRelu": 1}, n=2)
    packed(
        activated("clip", "clip_constants"), {"Conv": 1, "Split": 1, "Clip": 2, "Constant": 1}, n=2
    )
    packed(activated("silu", "relu"), {"Conv": 1, "Split": 1, "Sigmoid": 1, "Mul": 1, "Relu": 1})


def joined(
    order: list[str], axis: int, *, conv: bool = True, relu: bool = False, opset: int = 17
) -> ir.Model:
    """Three layers (the last one elsewhere) whose parts a Concat puts together."""
    nodes, weights = [], {}
    for i in range(3):
        weights[f"w{i}"] = values(2 + i, 4, 1, 1, seed=i) if conv else values(6, 2 + i, seed=i)
        out = f"h{i}" if relu else f"y{i}"
        nodes.append(node("Conv" if conv else "MatMul", ["x", f"w{i}"], [out], name=f"l{i}"))
        if relu:
            nodes.append(node("Relu", [out], [f"y{i}"]))
    nodes.append(node("Concat", order, ["y"], axis=axis))
    return model_of(nodes, weights, ["n", 4, 6, 6], {"y": 4}, opset=opset)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("order", [["y0", "y1", "y2"], ["y2", "y0", "y1"]])
def test_no_split_where_the_parts_come_together(order: list[str], relu: bool) -> None:
    """Whatever the limits, since there is no Split to pay for."""
    ops = {"Relu": 1} if relu else {}
    for axis in (1, -3):
        packed(joined(order, axis, relu=relu), {"Conv": 1} | ops, FuseParallel(max_width=1), n=2)
    for axis in (3, -1):
        model = joined(order, axis, conv=False, relu=relu)
        packed(model, {"MatMul": 1} | ops, FuseParallel(), n=2)
    packed(joined(order, 3, conv=False, opset=9), {"MatMul": 1}, FuseParallel(), n=2)


def test_a_concat_of_more_than_the_parts_gets_shorter() -> None:
    model = packed(joined(["x", "y1", "y0", "y2"], 1), {"Conv": 1, "Concat": 1}, n=2)
    concat = next(n for n in model.graph if n.op_type == "Concat")
    assert len(concat.inputs) == 2
    model = joined(["y0", "x", "y1", "y2"], 1)
    packed(model, {"Conv": 2, "Concat": 1}, FuseParallel(max_width=1), n=2)


def test_a_concat_that_needs_the_split() -> None:
    packed(joined(["y0", "x", "y1", "x", "y2"], 1), {"Conv": 1, "Split": 1, "Concat": 1}, n=2)
    nodes, weights = [], {}
    for i in range(2):
        weights[f"w{i}"] = values(4, 4, 1, 1, seed=i)
        nodes.append(node("Conv", ["x", f"w{i}"], [f"y{i}"]))
    nodes.append(node("Concat", ["y0", "y1"], ["y"], axis=2))
    model = model_of(nodes, weights, ["n", 4, 6, 6], {"y": 4})
    packed(model, {"Conv": 1, "Split": 1, "Concat": 1}, n=2)


def test_limits() -> None:
    declined(linear((6, 6), x=["a", 3, 5]), "rows is dynamic", FuseParallel(min_size=0))
    declined(linear((6, 6), x=[5, 13, 5]), "65 rows", FuseParallel(min_size=0))
    declined(linear((6, 6), x=[1, 3, 5]), "less than min_size", FuseParallel())
    packed(linear((6, 6), x=[4, 16, 5]), {"MatMul": 1, "Split": 1}, FuseParallel(min_size=60))
    packed(linear((64, 128), x=[1, 128], k=128), {"MatMul": 1, "Split": 1}, FuseParallel())
    declined(convs((9, 8)), "a wide Conv", FuseParallel())
    declined(convs((17, 8), kernel=3), "a wide Conv", FuseParallel())
    packed(convs((8, 4, 30)), {"Conv": 2, "Split": 1}, FuseParallel(), n=1)
    packed(convs((16, 12), kernel=3), {"Conv": 1, "Split": 1}, FuseParallel(), n=1, w=6)
    declined(convs((4,) * 5), "5 layers", FuseParallel())
    packed(convs((4,) * 5), {"Conv": 1, "Split": 1}, FuseParallel(max_layers=5), n=1)


def test_options_choose_the_layers() -> None:
    model = linear((6, 6, 6))
    step = ANY.model_copy(update={"ignore": ("fc0",)})
    packed(model, {"MatMul": 2, "Split": 1}, step, a=2)


def test_before_opset_11_the_rank_must_be_known() -> None:
    model = linear((3, 4), x=[5], opset=9)
    weights = {f"w{i}": values(5, 3, seed=i) for i in range(2)}
    nodes = [
        node("Squeeze", ["x"], ["s"]),
        node("MatMul", ["s", "w0"], ["y0"]),
        node("MatMul", ["s", "w1"], ["y1"]),
    ]
    model = model_of(nodes, weights, ["a", "b", 5], {"y0": 2, "y1": 2}, opset=9)
    model.graph.outputs[0].shape = model.graph.outputs[1].shape = None
    changes, log = run_pass_unchecked(model)
    assert changes == 0
    assert any("rank of its output" in r for _, r in log.skipped)


def run_pass_unchecked(model: ir.Model):
    from tests.support import context

    ctx = context()
    return ANY.run(model, ctx), ctx.log


def test_inside_branches_and_functions() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[a,2] x, bool p) => (float[a,2] y)
        <float[2,2] w = {1,2,3,4}, float[2,2] v = {5,6,7,8}, float[2,2] u = {9,1,2,3}>
        { o = MatMul(x, w)
          y = If(p) <then_branch = t () => (float[a,2] r)
                         { m = MatMul(x, v)  n = MatMul(x, u)  r = Mul(m, n) },
                     else_branch = e () => (float[a,2] s) { s = Identity(o) }> }"""
    model = from_text(text)
    before = model.clone()
    assert run_pass(ANY, model)[0] == 1
    assert op_counts(model) == {"MatMul": 2, "Split": 1, "Mul": 1, "If": 1, "Identity": 1}
    for flag in (True, False):
        feed = {"x": values(3, 2), "p": np.array(flag)}
        np.testing.assert_allclose(outputs(model, feed)[0], outputs(before, feed)[0], rtol=1e-5)
    text = """<ir_version: 8, opset_import: ["": 17, "local": 1]>
        g (float[a,2] x) => (float[a,2] y) <float[2,2] w = {1,2,3,4}, float[2,2] v = {5,6,7,8}>
        { y = local.pair(x, w, v) }
        <domain: "local", opset_import: ["": 17]>
        pair (x, w, v) => (r) { m = MatMul(x, w)  n = MatMul(x, v)  r = Mul(m, n) }"""
    declined(from_text(text), "inside a function")


def test_weights_that_callers_may_feed_stay() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[a,2] x, float[2,2] w) => (float[a,2] y, float[a,2] z)
        <float[2,2] w = {1,2,3,4}, float[2,2] v = {5,6,7,8}> { y = MatMul(x, w)  z = MatMul(x, v) }"""
    declined(from_text(text), "its weight is computed")


@settings(max_examples=60, deadline=None)
@given(
    layers=st.lists(
        st.tuples(
            st.sampled_from(["MatMul", "Gemm", "Gemm^T"]),
            st.integers(1, 4),
            st.sampled_from([None, (), (1,), ("n",), (1, "n"), ("m", 1)]),
            st.sampled_from([1.0, 0.5]),
            st.sampled_from(["", "Relu", "Tanh", "silu"]),
        ),
        min_size=2,
        max_size=5,
    ),
    rows=st.integers(1, 3),
    concat=st.sampled_from([None, 0, 1]),
    opset=st.sampled_from([11, 13, 17]),
    limited=st.booleans(),
)
def test_every_mixture_computes_the_same(layers, rows, concat, opset, limited) -> None:
    nodes, weights, ends = [], {}, []
    for i, (op, n, bias, alpha, after) in enumerate(layers):
        weights[f"w{i}"] = values(n, 5, seed=i) if op == "Gemm^T" else values(5, n, seed=i)
        names, last = ["x", f"w{i}"], f"h{i}"
        dims = [{"n": n, "m": rows}.get(d, d) for d in bias or ()]
        if bias is not None:
            weights[f"c{i}"] = values(*dims, seed=i)
        if op == "MatMul":
            nodes.append(node("MatMul", names, [last]))
            if bias is not None:
                nodes.append(node("Add", [last, f"c{i}"], [f"i{i}"]))
                last = f"i{i}"
        else:
            own = {"alpha": alpha, "beta": alpha / 2, "transB": int(op == "Gemm^T")}
            nodes.append(node("Gemm", names + [f"c{i}"] * (bias is not None), [last], **own))
        if after == "silu":
            nodes.append(node("Sigmoid", [last], [f"s{i}"]))
            nodes.append(node("Mul", [last, f"s{i}"], [f"y{i}"]))
        else:
            nodes.append(node(after or "Identity", [last], [f"y{i}"]))
        ends.append(f"y{i}")
    outs = dict.fromkeys(ends, 2)
    if concat == 1 or (concat == 0 and len({n for _, n, *_ in layers}) == 1):
        nodes.append(node("Concat", ends, ["y"], axis=concat))
        outs = {"y": 2}
    model = model_of(nodes, weights, [rows, 5], outs, opset=opset)
    run_pass(Simplify(), model)  # takes the Identity nodes out
    before = model.clone()
    step = FuseParallel(min_size=40) if limited else ANY
    run_pass(step, model)
    clean(model)
    io.check(model)
    assert interface(model) == interface(before)
    assert_same(before, model, rtol=1e-4, atol=1e-5)
    assert run_pass(step, model)[0] == 0


@settings(max_examples=40, deadline=None)
@given(
    layers=st.lists(
        st.tuples(
            st.integers(1, 5), st.booleans(), st.sampled_from(["", "Relu", "silu"]), st.booleans()
        ),
        min_size=2,
        max_size=5,
    ),
    kernel=st.integers(1, 3),
    concat=st.booleans(),
    opset=st.sampled_from([9, 13, 18]),
    max_width=st.sampled_from([0, 4, 16]),
)
def test_every_mixture_of_convs(layers, kernel, concat, opset, max_width) -> None:
    nodes, weights, ends = [], {}, []
    for i, (n, biased, after, strided) in enumerate(layers):
        weights[f"w{i}"] = values(n, 3, kernel, kernel, seed=i)
        names = ["x", f"w{i}"]
        if biased:
            weights[f"c{i}"] = values(n, seed=i)
            names.append(f"c{i}")
        out = f"h{i}" if after else f"y{i}"
        strides = [2, 2] if strided and not concat else [1, 1]
        nodes.append(node("Conv", names, [out], strides=strides))
        if after == "Relu":
            nodes.append(node("Relu", [out], [f"y{i}"]))
        elif after:
            nodes += silu(i)
        ends.append(f"y{i}")
    outs = dict.fromkeys(ends, 4)
    if concat:
        nodes.append(node("Concat", ends[::-1], ["y"], axis=1))
        outs = {"y": 4}
    model = model_of(nodes, weights, ["n", 3, 5, 5], outs, opset=opset)
    before = model.clone()
    step = FuseParallel(max_width=max_width)
    run_pass(step, model)
    clean(model)
    io.check(model)
    assert_same(before, model, rtol=1e-4, atol=1e-5, n=2)
    assert run_pass(step, model)[0] == 0


def test_quantization_of_the_packed_layer_is_as_exact() -> None:
    """One scale per column stays one scale per column."""
    plain = linear((64, 64, 64), (True, True, True), k=64)
    model = plain.clone()
    assert run_pass(ANY, model)[0] == 2
    feed = feed_for(plain, a=4)
    want = outputs(plain, feed)
    errors = []
    for candidate in (plain, model):
        assert run_pass(QuantizeDynamic(min_size=1), candidate)[0] > 0
        clean(candidate)
        errors.append([rel_l2(w, g) for w, g in zip(want, outputs(candidate, feed), strict=True)])
    np.testing.assert_allclose(errors[1], errors[0], rtol=0.05)


@needs_shared
@pytest.mark.parametrize("name", ["squeezenet_fp32_from_fp16", "yolox_nano", "seg_pan_mbv3s"])
def test_shared_models(name: str) -> None:
    assert SHARED is not None
    for step in (FuseParallel(), ANY):
        model = io.load(SHARED / "models" / f"{name}.onnx")
        before = model.clone()
        size = len(io.to_bytes(model))
        if run_pass(step, model)[0]:
            clean(model)
            assert_same(before, model, rtol=1e-3, atol=1e-3)
            assert len(io.to_bytes(model)) <= size * 1.001
