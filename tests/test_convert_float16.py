import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.data.feeds import Feeds
from effdl.errors import EffdlError
from effdl.graph import io
from effdl.passes.base import PassLog
from effdl.passes.convert._float16_range import LARGEST, largest, lost, over, to_half
from effdl.passes.convert.float16 import ConvertFloat16
from tests.support import (
    SAMPLES,
    SHARED,
    feed_for,
    from_text,
    needs_shared,
    op_counts,
    outputs,
    rel_l2,
    run_pass,
)

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


def model(body: str, constants: str = "", *, io_: str = "", version: int = 17) -> ir.Model:
    head = f"<{constants}>" if constants else ""
    return from_text(
        f"""<ir_version: 8, opset_import: ["": {version}, "com.microsoft": 1]>
        g ({io_ or "float[2,4] x) => (float[2,4] y"}) {head} {{ {body} }}"""
    )


def convert(
    before: ir.Model, step: ConvertFloat16 | None = None, *, feeds: Feeds | None = None
) -> tuple[ir.Model, int, PassLog]:
    """Convert a copy, check that the interface holds and that a second run finds nothing."""
    step = step or ConvertFloat16()
    after = before.clone()
    changes, log = run_pass(step, after, feeds=feeds)
    if not changes:
        assert io.to_bytes(after) == io.to_bytes(before)
    if step.keep_io_types:
        for a, b in zip(
            (*before.graph.inputs, *before.graph.outputs),
            (*after.graph.inputs, *after.graph.outputs),
            strict=True,
        ):
            assert (a.name, a.type, a.shape) == (b.name, b.type, b.shape)
    snapshot = io.to_bytes(after)
    assert run_pass(step, after, feeds=feeds)[0] == 0
    assert io.to_bytes(after) == snapshot
    return after, changes, log


def close(before: ir.Model, after: ir.Model, tolerance: float = 5e-3, **dims: int) -> None:
    feed = feed_for(before, **dims)
    for want, got in zip(outputs(before, feed), outputs(after, feed), strict=True):
        assert want.dtype == got.dtype
        assert want.shape == got.shape
        assert rel_l2(want, got) < tolerance


def reasons(log: PassLog) -> dict[str, str]:
    return dict(log.skipped)


def test_weights_and_activations_become_float16_with_casts_at_the_border_only() -> None:
    before = model("a = Add(x, w) b = Relu(a) y = Mul(b, w)", "float[4] w = {0.5, 1.5, -2.0, 3.0}")
    after, changes, log = convert(before)
    assert changes == 3
    assert [n for n, _ in log.touched] == ["Add", "Relu", "Mul"]
    assert op_counts(after) == {"Cast": 2, "Add": 1, "Relu": 1, "Mul": 1}
    assert after.graph.initializers["w"].dtype == HALF
    assert log.notes["casts_added"] == 2
    assert "slowly" in str(log.notes["warning"])
    close(before, after)
    assert before.graph.initializers["w"].dtype == FLOAT  # the snapshot shares tensors, not changes


def test_one_cast_per_value_and_direction() -> None:
    before = model(
        "a = Relu(x) b = Exp(x) k = CumSum(a, z) l = CumSum(a, z) m = Add(k, l) n = Add(k, b) "
        "o = Add(m, n) y = Identity(o)",
        "int64 z = {0}",
    )
    after, _, log = convert(before)
    # x -> half, a -> float once for two users, k and l -> half, y -> float
    assert op_counts(after)["Cast"] == 5
    assert set(reasons(log).values()) == {"it is on the block list"}
    close(before, after)


def test_no_cast_between_two_blocked_nodes() -> None:
    before = model(
        "a = Relu(x) b = Exp(a) c = Reshape(b, s) d = Tanh(c) y = Relu(d)", "int64[2] s = {2, 4}"
    )
    after, _, log = convert(before, ConvertFloat16(block=("Exp", "Tanh")))
    kinds = [n.op_type for n in after.graph]
    assert kinds == ["Cast", "Relu", "Cast", "Exp", "Reshape", "Tanh", "Cast", "Relu", "Cast"]
    assert reasons(log)["Reshape"] == "it only moves data between float32 nodes"
    close(before, after)


def test_keep_io_types_false_changes_the_interface_and_adds_no_cast() -> None:
    before = model("a = Relu(x) y = Exp(a)")
    after, changes, _ = convert(before, ConvertFloat16(keep_io_types=False))
    assert changes == 2
    assert op_counts(after) == {"Relu": 1, "Exp": 1}
    assert [v.dtype for v in (*after.graph.inputs, *after.graph.outputs)] == [HALF, HALF]
    feed = feed_for(before)
    got = outputs(after, {"x": feed["x"].astype(np.float16)})[0]
    assert rel_l2(outputs(before, feed)[0], got) < 5e-3


def test_a_weight_that_float32_nodes_also_use_gets_a_second_version() -> None:
    before = model("a = Add(x, w) b = Mul(a, w) y = Exp(b)", "float[4] w = {0.5, 1.5, -2.0, 3.0}")
    after, _, _ = convert(before, ConvertFloat16(block=("Mul",)))
    dtypes = {name: v.dtype for name, v in after.graph.initializers.items()}
    assert dtypes == {"w": FLOAT, "w_float16": HALF}
    close(before, after)
    mul_only, _, _ = convert(before, ConvertFloat16(block=("Add", "Mul")))
    assert {v.dtype for v in mul_only.graph.initializers.values()} == {FLOAT}


def test_weights_outside_the_range_keep_their_node_in_float32() -> None:
    before = model(
        "a = Mul(x, w) b = Mul(a, v) y = Relu(b)",
        "float[4] w = {70000.0, 1.0, 2.0, 3.0}, float[4] v = {1e-4, 1.0, 1.0, 1.0}",
    )
    after, _, log = convert(before)
    assert "holds 70000, float16 ends at 65504" in reasons(log)["Mul"]
    assert after.graph.initializers["w"].dtype == FLOAT
    assert after.graph.initializers["v"].dtype == HALF


def test_a_number_that_would_vanish_keeps_its_node_and_lost_weights_are_counted() -> None:
    before = model(
        "a = Add(x, e) b = Mul(a, w) y = Relu(b)",
        "float e = {1e-12}, float[4] w = {1e-9, 1.0, 2.0, 0.0}",
    )
    _, _, log = convert(before)
    assert reasons(log) == {"Add": "the constant 'e' would become 0 in float16"}
    assert log.notes["weights_rounded_to_zero"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("number", ["-3.4028235e38", "-1e9"])
def test_attention_masks_move_to_the_end_of_the_range(number: str) -> None:
    before = model(
        "m = Sub(one, k) n = Mul(m, big) s = Add(x, n) y = Softmax(s)",
        f"float one = {{1.0}}, float big = {{{number}}}",
        io_="float[2,4] x, float[2,4] k) => (float[2,4] y",
    )
    feed = {
        "x": np.ones((2, 4), np.float32),
        "k": np.array([[1, 1, 0, 0], [0, 0, 0, 0]], np.float32),
    }
    feeds = Feeds((feed,), "test", True)
    for given_feeds in (None, feeds):  # the huge numbers in a mask are no overflow
        after, changes, log = convert(before, feeds=given_feeds)
        assert changes == 4
        assert log.notes["constants_moved_into_range"] == 1
        assert float(after.graph.initializers["big"].const_value.numpy()) == -LARGEST
        got, want = outputs(after, feed)[0], outputs(before, feed)[0]
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, want, atol=1e-3)


def test_minus_infinity_stays_and_bounds_of_clip_are_moved() -> None:
    before = model(
        "c = Clip(x, low, high) s = Where(k, c, inf) y = Softmax(s)",
        "float low = {0.0}, float high = {3.4e38}, float inf = {-3.4e38}",
        io_="float[2,4] x, bool[2,4] k) => (float[2,4] y",
    )
    before.graph.initializers["inf"].const_value = ir.tensor(
        np.array(-np.inf, np.float32), name="inf"
    )
    after, changes, _ = convert(before)
    assert changes == 3
    assert after.graph.initializers["inf"].const_value.numpy() == -np.inf
    assert after.graph.initializers["high"].const_value.numpy() == np.float16(LARGEST)
    close(before, after)


def test_scaling_by_a_huge_number_is_no_mask() -> None:
    _, changes, log = convert(model("a = Mul(x, w) y = Relu(a)", "float w = {1e9}"))
    assert "holds 1e+09" in reasons(log)["Mul"]
    assert changes == 1  # the Relu
    _, changes, log = convert(
        model("b = Expand(w, s) a = Mul(x, b) y = Relu(a)", "float w = {1e6}, int64[2] s = {2, 4}")
    )
    assert reasons(log)["Mul"] == "'b' is outside the range of float16"


def test_activations_beyond_the_range_on_the_data_stay_float32() -> None:
    before = model(
        "a = Mul(x, w) b = Mul(a, w) c = Mul(b, v) y = Relu(c)",
        "float w = {300.0}, float v = {1e-4}",
    )
    feed = {"x": np.full((2, 4), 2.0, np.float32)}
    _, changes, log = convert(before)
    assert changes == 4
    assert "not checked" in str(log.notes["activations"])
    after, _, log = convert(before, feeds=Feeds((feed, feed), "test", True))
    assert log.notes["activations"] == "checked"
    assert [r for _, r in log.skipped] == ["'b' reaches 1.8e+05 on the calibration data"] * 2
    np.testing.assert_allclose(outputs(after, feed)[0], outputs(before, feed)[0], rtol=2e-3)
    _, changes, _ = convert(
        before, ConvertFloat16(headroom=1000.0), feeds=Feeds((feed,), "t", True)
    )
    assert changes == 1  # only Relu stays below 65


def test_largest_is_the_maximum_over_feeds_and_empty_values_are_fine() -> None:
    m = model("a = Neg(x) y = Exp(a)", io_="float[N,4] x) => (float[N,4] y")
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.normal(size=(n, 4)).astype(np.float32)} for n in (0, 3, 1)]
    a, y = (n.outputs[0] for n in m.graph)
    got = largest(m, [a, y], set(), Feeds(tuple(feeds), "test", True))
    assert got[a] == pytest.approx(max(np.abs(f["x"]).max(initial=0) for f in feeds))
    assert got[y] == pytest.approx(max(np.exp(-f["x"]).max(initial=0) for f in feeds), rel=1e-5)
    assert op_counts(m) == {"Neg": 1, "Exp": 1}


def test_nodes_stay_float32_where_the_schema_has_no_float16() -> None:
    before = model(
        "a = Relu(x) r = Resize(a, roi, sc) y = Tanh(r)",
        "float[1] roi = {0.0}, float[4] sc = {1.0, 1.0, 2.0, 2.0}",
        io_="float[1,2,3,3] x) => (float[1,2,6,6] y",
    )
    after, changes, _ = convert(before)
    assert changes == 3
    assert {n: v.dtype for n, v in after.graph.initializers.items()} == {"roi": FLOAT, "sc": FLOAT}
    close(before, after)
    before = model(
        "a = Relu(b) k = NonMaxSuppression(a, s) y = Relu(s)",
        io_="float[1,6,4] b, float[1,1,6] s) => (float[1,1,6] y, int64[n,3] k",
    )
    _, _, log = convert(before)
    assert "has no float16 here" in reasons(log)["NonMaxSuppression"]


def test_size_arithmetic_stays_float32() -> None:
    before = model(
        "s = Shape(x) f = Cast<to = 1>(s) h = Mul(f, k) i = Floor(h) j = Cast<to = 7>(i) "
        "e = Expand(x, j) y = Exp(e)",
        "float[2] k = {1.0, 1.0}",
        io_="float[1,N] x) => (float[1,N] y",
    )
    after, _, log = convert(before)
    assert set(reasons(log).values()) == {"it computes sizes or indices, which float16 would round"}
    feed = {"x": np.random.default_rng(0).normal(size=(1, 2049)).astype(np.float32)}
    assert outputs(after, feed)[0].shape == (1, 2049)


def test_integers_that_pass_through_float_stay_exact() -> None:
    before = model(
        "f = Cast<to = 1>(i) h = Add(f, k) j = Cast<to = 7>(h) e = Exp(x) y = Add(e, k)",
        "float k = {1.0}",
        io_="int64[3] i, float[2,4] x) => (float[2,4] y, int64[3] j",
    )
    after, _, _ = convert(before)
    feed = {"i": np.array([2049, 70001, 5]), "x": np.zeros((2, 4), np.float32)}
    np.testing.assert_array_equal(outputs(after, feed)[1], [2050, 70002, 6])


def test_a_norm_that_is_written_out_keeps_its_squares_in_float32() -> None:
    before = model(
        "m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) s = Pow(d, two) v = ReduceMean<axes=[-1]>(s) "
        "w = Add(v, e) r = Sqrt(w) y = Div(d, r)",
        "float two = {2.0}, float e = {1e-5}",
    )
    after, changes, log = convert(before)
    assert changes == 3  # the first mean, Sub, Div
    assert {n for n, _ in log.skipped} == {"Pow", "ReduceMean", "Add", "Sqrt"}
    feed = {"x": np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32) * 3000}
    np.testing.assert_allclose(outputs(after, feed)[0], outputs(before, feed)[0], atol=5e-3)


def test_control_flow_stays_float32_and_is_cast_at_its_border() -> None:
    before = model(
        "a = Mul(x, w) b = If(c) <then_branch = t () => (float[2,4] p) { p = Add(a, w) }, "
        "else_branch = f () => (float[2,4] q) { q = Relu(a) }> y = Exp(b)",
        "float[4] w = {1.0, 2.0, 3.0, 4.0}",
        io_="float[2,4] x, bool c) => (float[2,4] y",
    )
    after, changes, log = convert(before)
    assert changes == 2
    assert reasons(log)["If"] == "control flow and everything inside stays float32"
    for c in (True, False):
        feed = {"x": np.ones((2, 4), np.float32) / 3, "c": np.array(c)}
        assert rel_l2(outputs(before, feed)[0], outputs(after, feed)[0]) < 5e-3


def test_functions_and_unknown_operators_stay_float32() -> None:
    before = from_text(
        """<ir_version: 8, opset_import: ["": 17, "l": 1]>
        g (float[2,4] x) => (float[2,4] y) { a = Relu(x) b = l.f(a) y = Exp(b) }
        <domain: "l", opset_import: ["": 17]> f (v) => (u) { u = Tanh(v) }"""
    )
    after, changes, log = convert(before)
    assert changes == 2
    assert "function" in reasons(log)["f"]
    close(before, after)


def test_quantized_neighbours_stay_float32() -> None:
    before = model(
        "a = Relu(x) q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z) b = Exp(d) y = Tanh(b)",
        "float s = {0.1}, uint8 z = {0}",
    )
    after, changes, log = convert(before)
    assert changes == 1
    assert reasons(log)["Relu"] == reasons(log)["Exp"]
    assert "quantized" in reasons(log)["Exp"]
    close(before, after)


def test_constant_nodes_and_constant_of_shape() -> None:
    before = model(
        "c = Constant<value_float = 0.3>() s = Shape(x) k = ConstantOfShape<value = float[1] {0.7}>(s) "
        "a = Add(x, k) y = Mul(a, c)"
    )
    after, changes, _ = convert(before)
    assert changes == 3
    made = {n.op_type: n for n in after.graph}
    assert made["Constant"].attributes["value"].as_tensor().dtype == HALF
    assert made["ConstantOfShape"].attributes["value"].as_tensor().dtype == HALF
    close(before, after)


def test_the_models_own_casts_are_used_and_dropped() -> None:
    before = model("a = Relu(x) h = Cast<to = 10>(a) b = Exp(h) f = Cast<to = 1>(b) y = Tanh(f)")
    after, changes, _ = convert(before)
    assert [n.op_type for n in after.graph] == ["Cast", "Relu", "Exp", "Tanh", "Cast"]
    assert changes == 3
    close(before, after)


def test_a_cast_that_did_nothing_hides_no_float16_value() -> None:
    before = model(
        "f = Cast<to = 1>(x) b = If(c) <then_branch = t () => (float[2,4] p) { p = Relu(f) }, "
        "else_branch = e () => (float[2,4] q) { q = Neg(f) }> y = Add(b, f)",
        io_="float[2,4] x, bool c) => (float[2,4] y",
    )
    for keep_io_types in (True, False):
        after, changes, _ = convert(before, ConvertFloat16(keep_io_types=keep_io_types))
        assert changes
        for c in (True, False):
            feed = {"x": np.ones((2, 4), np.float32), "c": np.array(c)}
            small = {"x": feed["x"].astype(after.graph.inputs[0].dtype.numpy()), "c": feed["c"]}
            np.testing.assert_allclose(outputs(after, small)[0], outputs(before, feed)[0])


def test_scattering_with_a_reduction_stays_float32() -> None:
    before = model(
        'a = Relu(x) b = ScatterND<reduction = "add">(a, i, u) y = Exp(b)',
        "int64[1,1] i = {0}, float[1,4] u = {1.0, 2.0, 3.0, 4.0}",
    )
    after, changes, log = convert(before)
    assert changes == 2
    assert "scatters" in reasons(log)["ScatterND"]
    close(before, after)


def test_a_float16_model_is_left_byte_equal() -> None:
    half = model("a = Relu(x) y = Exp(a)", io_="float16[2,4] x) => (float16[2,4] y")
    _, changes, log = convert(half)
    assert (changes, log.skipped, log.notes) == (0, [], {})


def test_weights_that_are_graph_inputs_decline_the_model() -> None:
    before = model(
        "a = Add(x, w) y = Relu(a)",
        "float[4] w = {1.0, 2.0, 3.0, 4.0}",
        io_="float[2,4] x, float[4] w) => (float[2,4] y",
    )
    _, changes, log = convert(before)
    assert changes == 0
    assert "run simplify before" in log.skipped[0][1]


def test_targets_ignore_and_options() -> None:
    before = model("a = Relu(x) b = Exp(a) y = Tanh(b)")
    after, changes, _ = convert(before, ConvertFloat16(targets=("Exp",)))
    assert changes == 1
    assert [n.op_type for n in after.graph] == ["Relu", "Cast", "Exp", "Cast", "Tanh"]
    _, changes, _ = convert(before, ConvertFloat16(ignore=("Relu", "Tanh", "Exp")))
    assert changes == 0
    for bad in ({"max_finite": 70000.0}, {"max_finite": 0.0}, {"headroom": 0.5}, {"blocks": ()}):
        with pytest.raises(ValueError, match=r"max_finite|headroom|blocks"):
            ConvertFloat16(**bad)


def test_a_transpose_that_crashes_onnxruntime_stays_float32() -> None:
    before = model(
        "t = Transpose<perm = [1, 0, 2]>(x) y = MatMul(t, w)",
        "float[2,2] w = {1.0, 2.0, 3.0, 4.0}",
        io_="float[3,4,2] x) => (float[4,3,2] y",
    )
    after, changes, log = convert(before)
    assert changes == 1
    assert "crashes" in reasons(log)["Transpose"]
    close(before, after)


def test_gelu_of_the_contrib_domain_is_converted() -> None:
    before = model("a = com.microsoft.Gelu(x) y = com.microsoft.FastGelu(a)")
    after, changes, _ = convert(before)
    assert changes == 2
    close(before, after)


def test_a_norm_with_its_sum_as_an_output_is_converted_with_all_that_reads_it() -> None:
    before = model(
        "s = Constant <value_floats = [1.0, 1.1, 1.2, 1.3]>() d = Unsqueeze(x, zero) "
        "n, m, v, t = com.microsoft.SkipLayerNormalization(d, d, s) "
        "p = Mul(n, t) q = Squeeze(p, zero) y = Add(q, x)",
        "int64[1] zero = {0}",
    )
    after, changes, log = convert(before)
    assert changes > 0
    assert "SkipLayerNormalization" not in reasons(log)
    close(before, after)


UNARY = ("Relu", "Tanh", "Sigmoid", "Identity", "Softmax", "Abs")
BINARY = ("Add", "Mul", "Sub", "Max")


@st.composite
def networks(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A random graph over x, and the op types to block."""
    values, lines = ["x", "w"], []
    for i in range(draw(st.integers(1, 8))):
        op = draw(st.sampled_from(UNARY + BINARY))
        pick = st.sampled_from(values)
        args = [draw(pick)] if op in UNARY else [draw(pick), draw(pick)]
        lines.append(f"v{i} = {op}({', '.join(args)})")
        values.append(f"v{i}")
    last = [f"y = Add(x, {values[-1]})", f"z = Identity({draw(st.sampled_from(values[2:]))})"]
    return " ".join(lines + last), draw(st.lists(st.sampled_from(UNARY + BINARY), max_size=4))


@settings(deadline=None, max_examples=60)
@given(networks(), st.booleans())
def test_any_graph_with_any_block_list_stays_valid(
    network: tuple[str, list[str]], keep_io_types: bool
) -> None:
    body, block = network
    before = model(
        body,
        "float[4] w = {0.5, -1.5, 0.25, 1.0}",
        io_="float[2,4] x) => (float[2,4] y, float[M,N] z",
    )
    step = ConvertFloat16(keep_io_types=keep_io_types, block=tuple(block))
    after, changes, _ = convert(before, step)
    feed = feed_for(before)
    cast = {
        p.name: feed[p.name or ""].astype(p.dtype.numpy()) for p in after.graph.inputs if p.dtype
    }
    for want, got in zip(outputs(before, feed), outputs(after, cast), strict=True):
        assert np.linalg.norm(want - got) <= 1e-2 * max(np.linalg.norm(want), 1.0)
    # between any two nodes there is at most one Cast, and never one straight after another
    for node in after.graph:
        if node.op_type == "Cast" and changes:
            source = node.inputs[0].producer() if node.inputs[0] else None
            assert source is None or source.op_type != "Cast"


@settings(max_examples=100)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8))
def test_rounding_matches_numpy_and_never_makes_new_infinities(numbers: list[float]) -> None:
    array = np.array(numbers, np.float32)
    half = to_half(array, LARGEST)
    np.testing.assert_array_equal(np.isinf(half), np.isinf(array))
    with np.errstate(over="ignore"):
        plain = array.astype(np.float16)
    inside = np.abs(array) <= LARGEST
    np.testing.assert_array_equal(half[inside], plain[inside])
    assert over(array) == bool(np.any(np.isfinite(array) & ~inside))
    assert lost(array) == (int((array != 0).sum()), int(((array != 0) & (plain == 0)).sum()))


@pytest.mark.parametrize("name", ["digits_cnn", "digits_mlp", "digits_transformer"])
def test_samples_halve_and_hold(name: str) -> None:
    before = io.load(SAMPLES / f"{name}.onnx")
    data = np.load(SAMPLES / f"{name}.calib.npz")
    key = before.graph.inputs[0].name or ""
    feeds = Feeds(({key: data[key][:16]},), "calib", True)
    after, changes, _ = convert(before, feeds=feeds)
    assert changes
    assert len(io.to_bytes(after)) < 0.53 * len(io.to_bytes(before))
    want, got = outputs(before, feeds.batches[0])[0], outputs(after, feeds.batches[0])[0]
    assert rel_l2(want, got) < 5e-3
    assert (want.argmax(-1) == got.argmax(-1)).all()


@needs_shared
@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("cifar_resnet20", 2e-3), ("dtln_1", 2e-3), ("seg_pan_mbv3s", 2e-2), ("nnsplit_en", 2e-3)],
)
def test_real_models_load_and_hold(name: str, tolerance: float) -> None:
    assert SHARED is not None
    before = io.load(SHARED / "models" / f"{name}.onnx")
    after, changes, _ = convert(before)
    assert changes
    close(before, after, tolerance, length=20)


def test_a_model_that_cannot_run_is_named_when_data_is_given() -> None:
    before = from_text(
        """<ir_version: 8, opset_import: ["": 17, "acme": 1]>
        g (float[2,4] x) => (float[2,4] y) { a = Relu(x) y = acme.Wobble(a) }"""
    )
    assert run_pass(ConvertFloat16(), before.clone())[0] == 1
    feeds = Feeds(({"x": np.zeros((2, 4), np.float32)},), "test", True)
    with pytest.raises(EffdlError, match="Wobble"):
        run_pass(ConvertFloat16(), before, feeds=feeds)
