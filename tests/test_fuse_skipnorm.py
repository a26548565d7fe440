import numpy as np
import pytest

from effdl.graph import io
from effdl.passes.fuse.skipnorm import FuseSkipnorm
from tests.support import assert_same, feed_for, from_text, op_counts, outputs, run_pass

NUMBERS = ", ".join(f"{0.5 + 0.1 * k:.2f}" for k in range(6))
CONSTANTS = f"float[6] g = {{{NUMBERS}}}, float[6] b = {{{NUMBERS}}}, float[6] c = {{{NUMBERS}}}"


def text(
    body: str,
    *,
    version: int = 17,
    one: str = "B,L,6",
    two: str = "B,L,6",
    dtype: str = "float",
    extra: str = "",
) -> str:
    more = f", {dtype}[{one}] z" if extra else ""
    constants = CONSTANTS.replace("float", dtype)
    return f"""<ir_version: 10, opset_import: ["": {version}, "com.microsoft": 1]>
    g ({dtype}[{one}] i, {dtype}[{two}] r) => ({dtype}[{one}] y{more}) <{constants}>
    {{ x = Neg(i) {body} {extra} y = Neg(n) }}"""


LAYER = "a = Add(x, r) n = LayerNormalization<axis = -1, epsilon = 0.001>(a, g, b)"
RMS = "a = Add(x, r) n = RMSNormalization<axis = -1, epsilon = 0.001>(a, g)"


def test_the_sum_stays_apart() -> None:
    model = from_text(text(LAYER))
    before = model.clone()
    changes, log = run_pass(FuseSkipnorm(), model)
    assert (changes, log.skipped) == (1, [])
    assert op_counts(model) == {"Neg": 2, "Sum": 1, "LayerNormalization": 1}
    assert_same(before, model)
    after = io.to_bytes(model)
    assert run_pass(FuseSkipnorm(), model)[0] == 0
    assert io.to_bytes(model) == after


@pytest.mark.parametrize(
    "model",
    [
        text(LAYER, extra="z = Exp(a)"),  # two users: not fused at load
        text(LAYER, one="B,6", two="B,6"),
        text(LAYER, two="1,L,6"),
        text(RMS, version=23),
        text("n = LayerNormalization(x, g, b)"),
    ],
)
def test_what_onnx_runtime_leaves_is_left(model: str) -> None:
    loaded = from_text(model)
    before = io.to_bytes(loaded)
    changes, log = run_pass(FuseSkipnorm(), loaded)
    assert (changes, log.skipped) == (0, [])
    assert io.to_bytes(loaded) == before


def test_plain_declines_with_the_reason() -> None:
    changes, log = run_pass(FuseSkipnorm(), from_text(text(LAYER, dtype="double")))
    assert changes == 0
    assert "is DOUBLE" in log.skipped[0][1]
    unknown = (
        text(LAYER)
        .replace("Neg(i)", "Reshape(i, s)")
        .replace("(float[B,L,6] i", "(int64[3] s, float[B,L,6] i")
    )
    changes, log = run_pass(FuseSkipnorm(), from_text(unknown))
    assert changes == 0
    assert "are not known" in log.skipped[0][1]


@pytest.mark.parametrize(
    ("inputs", "version", "wanted"),
    [
        ("x, r, g, b", 17, {"Sum": 1, "LayerNormalization": 1}),
        ("x, r, g", 17, {"Sum": 1, "LayerNormalization": 1}),
        ("x, r, g, b, c", 17, {"Add": 1, "Sum": 1, "LayerNormalization": 1}),
        ("x, r, g, , c", 17, {"Add": 1, "Sum": 1, "LayerNormalization": 1}),
    ],
)
@pytest.mark.parametrize("total", [False, True])
def test_the_contrib_operator_is_written_out(
    inputs: str, version: int, wanted: dict[str, int], total: bool
) -> None:
    out = "n, m1, m2, t" if total else "n"
    body = f"{out} = com.microsoft.SkipLayerNormalization<epsilon = 0.01>({inputs})"
    model = from_text(text(body, version=version, extra="z = Exp(t)" if total else ""))
    before = model.clone()
    changes, log = run_pass(FuseSkipnorm(), model)
    assert (changes, log.skipped) == (1, [])
    counts = op_counts(model)
    if total:
        adds = wanted.get("Add", 0) + 1
        assert counts == {"Neg": 2, "Exp": 1, "Add": adds, "LayerNormalization": 1}
    else:
        assert counts == {"Neg": 2} | wanted
    assert_same(before, model)
    assert run_pass(FuseSkipnorm(), model)[0] == 0


@pytest.mark.parametrize("bias", ["", ", c"])
def test_the_simplified_operator_is_written_out(bias: str) -> None:
    body = f"n = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.01>(x, r, g{bias})"
    model = from_text(text(body, version=23))
    before = model.clone()
    assert run_pass(FuseSkipnorm(), model)[0] == 1
    assert op_counts(model) == {"Neg": 2, "Add": 2 if bias else 1, "RMSNormalization": 1}
    assert_same(before, model)
    changes, log = run_pass(FuseSkipnorm(), from_text(text(body)))
    assert changes == 0
    assert "came with opset 23, the model has 17" in log.skipped[0][1]


@pytest.mark.parametrize("extra", ["", "z = Exp(a)"])
@pytest.mark.parametrize(
    ("body", "version"), [(LAYER, 17), (RMS, 23), (LAYER.replace(", b)", ")"), 17)]
)
def test_skip_form(body: str, version: int, extra: str) -> None:
    model = from_text(text(body, version=version, extra=extra))
    before = model.clone()
    changes, log = run_pass(FuseSkipnorm(form="skip"), model)
    assert (changes, log.skipped) == (1, [])
    op = "SkipLayerNormalization" if version == 17 else "SkipSimplifiedLayerNormalization"
    assert op_counts(model) == {"Neg": 2, op: 1} | ({"Exp": 1} if extra else {})
    feed = feed_for(before, B=2, L=3)
    for want, got in zip(outputs(before, feed), outputs(model, feed), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert run_pass(FuseSkipnorm(form="skip"), model)[0] == 0


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (text(LAYER, two="B,1,6"), "may have different shapes"),
        (text(LAYER, one="B,6", two="B,6"), "has 2 dimensions"),
        (text(LAYER.replace("axis = -1", "axis = 1")), "is over axis 1"),
        (text("z = Add(x, r) n = LayerNormalization(z, g, b)", extra=" "), "is a graph output"),
        (
            text("a = Add(x, r) k = Exp(a) n = LayerNormalization(a, g, b)", extra="z = Neg(k)"),
            "is used before its norm",
        ),
    ],
)
def test_skip_form_declines_with_the_reason(model: str, reason: str) -> None:
    loaded = from_text(model)
    before = io.to_bytes(loaded)
    changes, log = run_pass(FuseSkipnorm(form="skip"), loaded)
    assert changes == 0
    assert io.to_bytes(loaded) == before
    assert reason in log.skipped[0][1]


def test_shapes_that_follow_from_the_sizes_of_the_inputs_are_equal() -> None:
    """A table cut to the length of the sequence, a Reshape that keeps two axes: inference names neither."""
    rng = np.random.default_rng(0)
    table, weight = (", ".join(f"{v:.3f}" for v in rng.normal(size=n)) for n in (54, 36))
    model = from_text(
        f"""<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>
        graph (float[B, L, 6] i) => (float[B, L, 6] y) <
            float[9, 6] table = {{{table}}}, float[6, 6] w = {{{weight}}}, {CONSTANTS},
            int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}},
            int64[3] same = {{0, 0, 6}}
        > {{
            sizes = Shape(i)
            length = Slice(sizes, one, two)
            rows = Slice(table, zero, length, zero)
            p = Add(i, rows)
            m = MatMul(p, w)
            r = Reshape(m, same)
            a = Add(r, p)
            y = LayerNormalization(a, g, b)
        }}"""
    )
    before = model.clone()
    changes, log = run_pass(FuseSkipnorm(form="skip"), model)
    assert (changes, log.skipped) == (1, [])
    assert op_counts(model)["SkipLayerNormalization"] == 1
    for length in (1, 4, 9):
        feed = feed_for(before, B=2, L=length)
        (want,), (got,) = outputs(before, feed), outputs(model, feed)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_rank_that_only_follows_from_sizes_is_enough() -> None:
    """Shape inference knows nothing of what comes out of the operator my.Strange."""
    model = from_text(
        f"""<ir_version: 10, opset_import: ["": 17, "my": 1, "com.microsoft": 1]>
        g (float[B, L, 6] i) => (float[B, L, 6] y) <{CONSTANTS}> {{
            v = my.Strange(i)
            goal = Shape(i)
            x = Reshape(v, goal)
            r = Relu(x)
            a = Add(x, r)
            y = LayerNormalization(a, g, b)
        }}"""
    )
    changes, log = run_pass(FuseSkipnorm(form="skip"), model)
    assert (changes, log.skipped) == (1, [])
