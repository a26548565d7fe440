"""An If of which one branch makes something that a later operator refuses is no question."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from effdl.graph.refute import settled_ifs
from effdl.graph.shapes import infer
from effdl.passes.base import Context
from effdl.passes.simplify import Simplify
from effdl.runtime.target import parse_target

SQUEEZE = """
        s = Shape <start = -1> (r)
        one = Constant <value_ints = [1]> ()
        last = Constant <value_ints = [-1]> ()
        is_one = Equal (s, one)
        v = If (is_one) <
            then_branch = a () => (float[p, 8] t) { t = Squeeze (r, last) },
            else_branch = b () => (float[p, 8, k] e) { e = Identity (r) }
        >
"""


def model(behind: str, output: str) -> ir.Model:
    return ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 18]>
        g (float[n, 8, t] x) => ({output})
        <float[8, 4] w = {{{", ".join(str(k / 8) for k in range(32))}}}> {{
            r = Relu (x) {SQUEEZE} {behind}
        }}"""
    )


def answers(m: ir.Model, size: tuple[int, ...]) -> np.ndarray | None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(m).SerializeToString(), options)
    feed = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    try:
        return np.asarray(session.run(None, {"x": feed})[0])
    except Exception:  # ONNX Runtime raises half a dozen unrelated classes
        return None


def simplified(m: ir.Model) -> ir.Model:
    copy = m.clone()
    Simplify().run(copy, Context(parse_target("cpu")))
    return copy


def test_a_gemm_takes_matrices_only() -> None:
    m = model("y = Gemm (v, w)", "float[p, 4] y")
    assert list(settled_ifs(m).values()) == [True]
    small = simplified(m)
    assert not any(n.op_type == "If" for n in small.graph.all_nodes())
    np.testing.assert_allclose(answers(small, (3, 8, 1)), answers(m, (3, 8, 1)), rtol=1e-6)
    assert answers(m, (3, 8, 2)) is None
    assert answers(small, (3, 8, 2)) is None


def test_a_relu_takes_both() -> None:
    m = model("y = Relu (v)", "float y")
    assert settled_ifs(m) == {}
    small = simplified(m)
    for size in ((3, 8, 1), (3, 8, 2)):
        np.testing.assert_array_equal(answers(small, size), answers(m, size))


def test_a_question_inside_a_branch() -> None:
    m = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 18]>
        g (float[n, 8, t] x, bool c) => (float[p, 4] y)
        <float[8, 4] w = {{{", ".join(str(k / 8) for k in range(32))}}}> {{
            y = If (c) <
                then_branch = f () => (float[p, 4] q) {{ r = Abs (x) {SQUEEZE} q = Gemm (v, w) }},
                else_branch = h () => (float[p, 4] z) {{
                    axes = Constant <value_ints = [1, 2]> ()
                    m = ReduceMax (x, axes)
                    z = Expand (m, sizes)
                }}
            >
            sizes = Constant <value_ints = [3, 4]> ()
        }}"""
    )
    m.graph.sort()
    assert list(settled_ifs(m).values()) == [True]
    assert sum(n.op_type == "If" for n in simplified(m).graph.all_nodes()) == 1


def test_a_model_that_contradicts_itself_anyway_settles_nothing() -> None:
    m = model("y = Gemm (v, w)\n bad = Gemm (x, w)", "float[p, 4] y, float bad")
    assert settled_ifs(m) == {}


@pytest.mark.parametrize("small", [True, False])
def test_a_constant_outside_counts_inside(small: bool) -> None:
    """The axes of an Unsqueeze in a branch, which lie in the main graph."""
    m = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 18]>
        g (float[2, 3] x, bool c) => (float[p, q, r] y) <int64[1] axes = {1}> {
            y = If (c) <
                then_branch = a () => (float[p, q, r] t) { t = Unsqueeze (x, axes) },
                else_branch = b () => (float[p, q, r] e) { e = Unsqueeze (x, axes) }
            >
        }"""
    )
    if not small:  # then it is an input, and nothing follows
        m.graph.inputs.append(m.graph.initializers.pop("axes"))
    inner = m.graph.node(0).attributes["then_branch"].as_graph()
    assert infer(m).static(inner.outputs[0]) == ((2, 1, 3) if small else None)


def test_only_operators_that_are_strict_everywhere_decide() -> None:
    """ONNX refuses this Concat of ranks 3 and 2; whether every runtime does is not for us to say."""
    m = model("other = Gemm (w, c)\n y = Concat <axis = 0> (v, other)", "float[p, 8] y")
    eye = [float(i == j) for i in range(4) for j in range(8)]
    tensor = ir.tensor(np.array(eye, np.float32).reshape(4, 8), name="c")
    constant = ir.Value(
        name="c", const_value=tensor, shape=ir.Shape([4, 8]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    gemm = next(n for n in m.graph if n.op_type == "Gemm")
    m.graph.register_initializer(constant)
    gemm.replace_input_with(1, constant)
    assert settled_ifs(m) == {}


@pytest.mark.parametrize("rounds", [0, 2])
def test_what_a_loop_would_refuse_proves_nothing(rounds: int) -> None:
    """It may run no times, and then the other branch is as good."""
    weights = ", ".join(str(k / 8) for k in range(64))
    m = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 18]>
        g (float[n, 8, t] x, int64 count) => (float y)
        <float[8, 8] w = {{{weights}}}, bool go = {{1}}> {{
            r = Relu (x) {SQUEEZE}
            start = ReduceSum <keepdims = 0> (x)
            y = Loop (count, go, start) <body = b (int64 i, bool c, float s) => (bool d, float u) {{
                d = Identity (c)
                p = Gemm (v, w)
                q = ReduceSum <keepdims = 0> (p)
                u = Add (s, q)
            }}>
        }}"""
    )
    assert settled_ifs(m) == {}
    small = simplified(m)
    session = [ort.InferenceSession(ir.to_proto(each).SerializeToString()) for each in (m, small)]
    sizes = (3, 8, 1) if rounds else (3, 8, 2)
    x = np.random.default_rng(0).standard_normal(sizes).astype(np.float32)
    want, got = (s.run(None, {"x": x, "count": np.array(rounds, np.int64)})[0] for s in session)
    np.testing.assert_allclose(got, want, rtol=1e-5)
