"""Transposes that move and cancel, against ONNX Runtime before and after."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.walk import interface
from effdl.passes.fold.transposes import FoldTransposes
from tests.support import assert_same, from_text, op_counts, run_pass

HEAD = '<ir_version: 8, opset_import: ["": 17]> g '
TO_NCHW, TO_NHWC = "perm = [0, 3, 1, 2]", "perm = [0, 2, 3, 1]"


def fold(
    text: str,
    left: int,
    *,
    gone: int = 0,
    max_growth: int = 8192,
    dims: dict[str, int] | None = None,
) -> ir.Model:
    """Run the pass; ``left`` Transposes remain, all is as before and a second run changes nothing."""
    model = from_text(text)
    before = model.clone()
    step = FoldTransposes(max_growth=max_growth)
    changes, log = run_pass(step, model)
    assert changes > 0
    assert log.touched
    clean(model)
    assert op_counts(model).get("Transpose", 0) == left
    assert len(model.graph) <= len(before.graph) - gone
    assert interface(model) == interface(before)
    assert_same(before, model, **(dims or {}))
    assert run_pass(step, model)[0] == 0
    return model


def stays(text: str, reason: str = "", step: FoldTransposes | None = None) -> None:
    model = from_text(text)
    before = io.to_bytes(model)
    changes, log = run_pass(step or FoldTransposes(), model)
    assert changes == 0
    assert io.to_bytes(model) == before
    assert any(reason in r for _, r in log.skipped), log.skipped


def nhwc(body: str, inputs: str = "float[n,4,6,3] x", outputs: str = "float[n,4,6,3] y") -> str:
    """A graph in channels last with the weights of a Conv."""
    rng = np.random.default_rng(0)
    numbers = ",".join(f"{v:.3f}" for v in rng.standard_normal(9))
    return (
        f"{HEAD} ({inputs}) => ({outputs}) <float[3,3,1,1] w = {{{numbers}}},"
        f" float[3] b = {{1,-2,3}}, float[1,1,1,3] c = {{0.5,1,2}}> {{ {body} }}"
    )


def conv(source: str, goal: str) -> str:
    """A Conv as TensorFlow exports it: channels last outside, first inside."""
    return (
        f"{goal}i = Transpose <{TO_NCHW}> ({source})  {goal}o = Conv({goal}i, w)"
        f"  {goal} = Transpose <{TO_NHWC}> ({goal}o) "
    )


def test_a_channels_last_network() -> None:
    body = (
        conv("x", "a")
        + " m = Mul(a, c)  s = Add(m, b)  r = Relu(s) "
        + conv("r", "d")
        + " e = Add(d, r)  y = Clip(e) "
    )
    model = fold(nhwc(body), left=2)
    kinds = [n.op_type for n in model.graph]
    assert kinds[0] == "Transpose"
    assert kinds[-2:] == ["Transpose", "Clip"]


def test_squeeze_and_excite() -> None:
    body = (
        conv("x", "a")
        + " p = ReduceMean <axes = [1, 2], keepdims = 1> (a) "
        + conv("p", "q")
        + " g = Sigmoid(q)  e = Mul(a, g) "
        + conv("e", "y")
    )
    fold(nhwc(body), left=2)


def test_a_dense_head() -> None:
    body = conv("x", "a") + " r = Relu(a)  y = ReduceMean <axes = [1, 2], keepdims = 0> (r)"
    model = fold(nhwc(body, outputs="float[n,3] y"), left=1)
    assert model.graph[-1].attributes["axes"].as_ints() == (2, 3)


def test_branches_concat_split_pad_resize() -> None:
    init = "<float[4] z = {1,2,2,1}, int64[8] p = {0,1,1,0,0,0,0,0}>"
    text = f"""{HEAD} (float[n,3,4,6] x) => (float[n,3,k,l] y, float[n,3,u,v] t) {init}
        {{ a = Transpose <{TO_NHWC}> (x)  q = Pad(a, p)  r = Resize <mode = "nearest"> (q, , z)
           s = Softmax <axis = -1> (r)  c = Concat <axis = 3> (r, s)
           f, h = Split <axis = -1> (c)  m = Mul(f, h)
           y = Transpose <{TO_NCHW}> (m)  t = Transpose <{TO_NCHW}> (s) }}"""
    model = from_text(text)
    before = model.clone()
    assert run_pass(FoldTransposes(), model)[0]
    clean(model)
    assert "Transpose" not in op_counts(model)
    assert_same(before, model)


def test_one_large_transpose_for_two_small_ones_is_no_gain() -> None:
    body = """p = ReduceMean <axes = [1, 2], keepdims = 1> (x)  i = Transpose <perm = [0, 3, 1, 2]> (p)
        o = Conv(i, w)  g = Transpose <perm = [0, 2, 3, 1]> (o)  y = Mul(x, g)"""
    size = "float[1,200,200,3]"
    stays(nhwc(body, f"{size} x", f"{size} y"), "one order of axes only")


def test_several_orders() -> None:
    fold(
        f"""{HEAD} (float[2,3,4] x) => (float[2,3,4] y)
        {{ a = Transpose <perm = [1, 2, 0]> (x)  b = Relu(a)  c = Transpose <perm = [0, 2, 1]> (b)
           d = Exp(c)  e = Transpose <perm = [1, 0, 2]> (d)  y = Neg(e) }}""",
        left=0,
        gone=3,
    )


def test_without_a_perm_all_axes_turn_round() -> None:
    fold(
        f"""{HEAD} (float[2,3,4] x) => (float[2,3,4] y)
        {{ a = Transpose(x)  b = Relu(a)  y = Transpose(b) }}""",
        left=0,
    )


def test_a_constant_is_transposed() -> None:
    model = fold(
        f"""{HEAD} (float[2,3] x) => (float[2,3] y) <float[3,2] w = {{1,2,3,4,5,6}}>
        {{ a = Transpose(w)  y = Add(x, a) }}""",
        left=0,
    )
    assert len(model.graph) == 1


def test_a_constant_with_two_readers() -> None:
    text = f"""{HEAD} (float[2,3] x, float[3,2] z) => (float[2,3] y, float[3,2] u)
        <float[3,2] w = {{1,2,3,4,5,6}}> {{ a = Transpose(w)  y = Add(x, a)  u = Add(z, w) }}"""
    fold(text, left=0)
    stays(text, "as many elsewhere", FoldTransposes(max_growth=0))


def test_a_large_constant_turns_when_nobody_wants_it_as_it_is() -> None:
    fold(
        f"""{HEAD} (float[2,3] x, float[2,3] z) => (float[2,3] y, float[2,3] u)
        <float[3,2] w = {{1,2,3,4,5,6}}>
        {{ a = Transpose(w)  b = Transpose(w)  c = Relu(w)  d = Transpose(c)
           y = Add(x, a)  e = Add(z, b)  u = Add(e, d) }}""",
        left=0,
        max_growth=0,
    )


def test_through_quantization() -> None:
    fold(
        f"""{HEAD} (float[n,4,6,3] x) => (float[n,4,6,3] y)
        <float[3] s = {{0.1,0.2,0.3}}, int8[3] z = {{0,1,2}}>
        {{ a = Transpose <{TO_NCHW}> (x)  q = QuantizeLinear <axis = 1> (a, s, z)
           d = DequantizeLinear <axis = 1> (q, s, z)  y = Transpose <{TO_NHWC}> (d) }}""",
        left=0,
    )


def test_a_transpose_moves_between_q_and_dq() -> None:
    """Between an operator and its Q or DQ it would keep ONNX Runtime from its integer kernel."""
    text = f"""{HEAD} (float[n,3,4,6] x) => (float[n,4,6,3] y) <float s = {{0.1}}, int8 z = {{0}}>
        {{ a = Sin(x)  t = Transpose <{TO_NHWC}> (a)  q = QuantizeLinear(t, s, z)
           d = DequantizeLinear(q, s, z)  y = Cos(d) }}"""
    model = fold(text, left=1)
    kinds = [n.op_type for n in model.graph]
    assert kinds == ["Sin", "QuantizeLinear", "Transpose", "DequantizeLinear", "Cos"]


def test_shape_of_a_transpose() -> None:
    fold(
        f"""{HEAD} (float[a,b,c] x) => (float[d,e,f] y, int64[2] z) <int64[2] i = {{0, -1}}>
        {{ t = Transpose <perm = [2, 0, 1]> (x)  s = Shape(t)  z = Gather(s, i)
           r = Relu(t)  y = Transpose <perm = [1, 2, 0]> (r) }}""",
        left=0,
        dims={"a": 2, "b": 3, "c": 4},
    )


def test_into_gemm_and_einsum() -> None:
    model = fold(
        f"""{HEAD} (float[3,2] x, float[4,3] w, float[4,2] v) => (float[2,5] y)
        <float[4,5] u = {{1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2}}>
        {{ a = Transpose(x)  b = Transpose(w)  c = Gemm(a, b)  d = Transpose(v)
           e = Einsum <equation = "ij,jk->ik"> (d, u)  f = Gemm(c, u)  y = Add(e, f) }}""",
        left=0,
    )
    assert model.graph[0].attributes["transA"].as_int() == 1


def test_into_reshape_and_flatten() -> None:
    fold(
        f"""{HEAD} (float[n,6] x) => (float[n,6] y) <int64[4] s = {{-1, 1, 1, 6}}>
        {{ a = Reshape(x, s)  b = Transpose <{TO_NCHW}> (a)  c = Relu(b)  y = Flatten(c) }}""",
        left=0,
    )
    fold(
        f"""{HEAD} (float[n,1,1,6] x) => (float[n,6] y)
        {{ a = Relu(x)  b = Transpose <{TO_NCHW}> (a)  y = Flatten(b) }}""",
        left=0,
    )


def test_a_channel_shuffle_needs_its_transpose() -> None:
    stays(
        f"""{HEAD} (float[n,6,4,4] x) => (float[n,6,4,4] y)
        <int64[5] s = {{0, 2, 3, 4, 4}}, int64[4] t = {{0, 6, 4, 4}}>
        {{ a = Reshape(x, s)  b = Transpose <perm = [0, 2, 1, 3, 4]> (a)  y = Reshape(b, t) }}""",
        "torn apart",
    )


def test_graph_outputs_keep_their_order() -> None:
    fold(
        f"""{HEAD} (float[n,4,6,3] x) => (float[n,3,4,6] t, float[n,4,6,3] r, float[n,4,6,3] y)
        {{ t = Transpose <{TO_NCHW}> (x)  a = Relu(t)  r = Transpose <{TO_NHWC}> (a)
           e = Exp(a)  y = Transpose <{TO_NHWC}> (e) }}""",
        left=1,
    )


def test_an_output_gets_its_transpose() -> None:
    """The output ``a`` has to keep its order: what the others read is made without it."""
    model = fold(
        f"""{HEAD} (float[n,4,6,3] x) => (float[n,3,4,6] a, float[n,4,6,3] y)
        {{ t = Transpose <{TO_NCHW}> (x)  a = Relu(t)  e = Exp(a)  b = Neg(e)
           u = Transpose <{TO_NHWC}> (b)  v = Transpose <{TO_NHWC}> (e)  y = Sub(u, v) }}""",
        left=1,
    )
    assert model.graph.outputs[0].producer().op_type == "Transpose"


def test_an_input_that_is_an_output() -> None:
    model = fold(
        f"""{HEAD} (float[2,3] x) => (float[2,3] y, float[2,3] z)
        {{ a = Transpose(x)  y = Transpose(a)  b = Relu(a)  z = Transpose(b) }}""",
        left=0,
    )
    assert op_counts(model) == {"Relu": 1, "Identity": 1}


def test_twins_merge() -> None:
    fold(
        f"""{HEAD} (float[2,3] x) => (float[3,2] y)
        {{ a = Transpose(x)  b = Transpose <perm = [1, 0]> (x)  y = Add(a, b) }}""",
        left=1,
    )


def test_inside_branches() -> None:
    fold(
        f"""{HEAD} (float[2,3] x, bool c) => (float[2,3] y)
        {{ h = Sin(x)
           y = If(c) <then_branch = t () => (float[2,3] r)
                        {{ a = Transpose(h)  b = Relu(a)  r = Transpose(b) }},
                      else_branch = e () => (float[2,3] q) {{ q = Neg(h) }}> }}""",
        left=0,
    )


def test_what_a_branch_reads_keeps_its_order() -> None:
    fold(
        f"""{HEAD} (float[2,3] x, bool c) => (float[2,3] y)
        {{ t = Transpose(x)  h = Sin(t)  k = Transpose(h)
           m = If(c) <then_branch = t1 () => (float[2,3] r) {{ r = Transpose(h) }},
                      else_branch = e1 () => (float[2,3] q) {{ q = Neg(k) }}>
           y = Add(m, k) }}""",
        left=2,
    )


def test_lower_rank_operands() -> None:
    text = f"""{HEAD} (float[2,3,4] x, float[4] v) => (float[2,3,4] y)
        {{ a = Transpose <perm = PERM> (x)  b = Add(a, v)  y = Transpose <perm = PERM> (b) }}"""
    fold(text.replace("PERM", "[1, 0, 2]"), left=0)
    stays(
        f"""{HEAD} (float[2,3,4] x, float[3] v) => (float[2,4,3] y)
        {{ a = Transpose <perm = [0, 2, 1]> (x)  y = Add(a, v) }}""",
        "fewer axes",
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("b = Conv(a, w)", "one order of axes only"),
        ("b = InstanceNormalization(a, s, s)", "one order of axes only"),
        ("b = LayerNormalization(a, l)", "would move"),
        ("b = BatchNormalization(a, s, s, s, s)", "channels on axis 1"),
        ('b = Resize <mode = "linear"> (a, , z)', "last axes"),
        ("b = Reshape(a, g)", "torn apart"),
        ("b = Flatten(a)", "another order"),
        ("b = Squeeze(a)", "which axes"),
        ("b = ReduceSum(a, ax)", "not constant"),
        ("b = Slice(a, ax, ax, ax)", "not constant"),
        ("b = Dropout(a, h, yes)", "training"),
        ("b = DepthToSpace <blocksize = 1> (a)", "one order of axes only"),
    ],
)
def test_what_holds_a_transpose_back(body: str, reason: str) -> None:
    stays(
        f"""{HEAD} (float[2,4,6,3] x, int64[1] ax) => (float y)
        <float[3,3,1,1] w = {{1,2,3,4,5,6,7,8,9}}, float[3] s = {{1,2,3}}, float[6] l = {{1,2,3,4,5,6}},
         float[4] z = {{1,1,2,2}}, int64[2] g = {{6,-1}}, float h = {{0.5}}, bool yes = {{1}}>
        {{ a = Transpose <{TO_NCHW}> (x)  {body}  c = Relu(b)  y = ReduceSum <keepdims = 0> (c) }}""",
        reason,
    )


@pytest.mark.parametrize(("opset", "left"), [(11, 2), (13, 0)])
def test_old_softmax(opset: int, left: int) -> None:
    text = f"""<ir_version: 8, opset_import: ["": {opset}]> g (float[2,3,4] x) => (float[2,3,4] y)
        {{ a = Transpose <perm = [0, 2, 1]> (x)  b = Softmax <axis = 1> (a)
           y = Transpose <perm = [0, 2, 1]> (b) }}"""
    if left:
        stays(text, "before opset 13")
    else:
        fold(text, left=left)


def test_old_broadcasting_is_left_alone() -> None:
    stays(
        """<ir_version: 3, opset_import: ["": 6]> g (float[2,3] x, float[3,2] z) => (float[2,3] y)
        { a = Transpose(x)  b = Add(a, z)  y = Transpose(b) }""",
        "opset 7",
    )


def test_an_initializer_that_is_an_input_is_not_constant() -> None:
    stays(
        """<ir_version: 8, opset_import: ["": 17]> g (float[2,3] x, float[3,2] w) => (float[2,3] y)
        <float[3,2] w = {1,2,3,4,5,6}> { a = Transpose(w)  y = Add(x, a) }""",
        "as many elsewhere",
    )


def test_functions_are_left_alone() -> None:
    stays(
        """<ir_version: 8, opset_import: ["": 17, "local": 1]> g (float[2,3] x) => (float[2,3] y)
        { y = local.f(x) } <domain: "local", opset_import: ["": 17]>
        f (v) => (r) { a = Transpose(v)  b = Relu(a)  r = Transpose(b) }""",
        "function",
    )


def test_unknown_ranks() -> None:
    """Without a rank and a perm nobody knows which axes the Transpose moves."""
    stays(
        f"""{HEAD} (float[2,3] x, int64[k] s) => (float y)
        {{ a = Reshape(x, s)  t = Transpose(a)  r = Relu(t)  u = Transpose(r)  y = ReduceSum(u) }}"""
    )


def test_targets_and_ignore() -> None:
    text = f"""{HEAD} (float[2,3] x) => (float[2,3] y)
        {{ [t1] a = Transpose(x)  [r] b = Relu(a)  [t2] y = Transpose(b) }}"""
    stays(text, "elsewhere", FoldTransposes(targets=("t1",)))
    stays(text, "options", FoldTransposes(ignore=("Relu",)))
