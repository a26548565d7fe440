import numpy as np
import pytest

from effdl.graph import io
from effdl.passes.fuse.groupnorm import FuseGroupnorm
from tests.support import assert_same, from_text, op_counts, run_pass

PLAIN = """s = Reshape(x, target) n = InstanceNormalization<epsilon = 0.01>(s, ones, zeros)
    h = Shape(x) b = Reshape(n, h) m = Mul(b, gc) r = Add(m, bc)"""
NODE = "r = GroupNormalization<num_groups = 2, epsilon = 0.01>(x, g, c)"


def text(
    body: str, *, version: int = 21, shape: str = "B,4,H,W", dtype: str = "float", extra: str = ""
) -> str:
    more = f", {dtype}[{shape}] z" if extra else ""
    scale, bias = "0.5, 1.0, 1.5, 2.0", "-1.0, 0.0, 1.0, 2.0"
    column = "4" + ",1" * (shape.count(",") - 1)
    return f"""<ir_version: 9, opset_import: ["": {version}]>
    g ({dtype}[{shape}] i) => ({dtype}[{shape}] y{more})
    <{dtype}[4] g = {{{scale}}}, {dtype}[4] c = {{{bias}}}, {dtype}[2] ones = {{1, 1}},
     {dtype}[2] zeros = {{0, 0}}, int64[3] target = {{0, 2, -1}},
     {dtype}[{column}] gc = {{{scale}}}, {dtype}[{column}] bc = {{{bias}}}>
    {{ x = Neg(i) {body} {extra} y = Neg(r) }}"""


@pytest.mark.parametrize("shape", ["B,4,H,W", "2,4,5", "B,4,H,W,D"])
def test_there_and_back(shape: str) -> None:
    model = from_text(text(NODE, shape=shape))
    before = model.clone()
    changes, log = run_pass(FuseGroupnorm(), model)
    assert (changes, log.skipped) == (1, [])
    counts = op_counts(model)
    assert counts["InstanceNormalization"] == 1
    assert "GroupNormalization" not in counts
    for dims in ({}, {"B": 1, "H": 1, "W": 3, "D": 2}):
        assert_same(before, model, **dims)
    after = io.to_bytes(model)
    assert run_pass(FuseGroupnorm(), model)[0] == 0
    assert io.to_bytes(model) == after


@pytest.mark.parametrize("shape", ["B,4,H,W", "2,4,5"])
def test_the_operator(shape: str) -> None:
    model = from_text(text(PLAIN, shape=shape))
    before = model.clone()
    assert run_pass(FuseGroupnorm(), model)[0] == 0
    changes, log = run_pass(FuseGroupnorm(form="onnx"), model)
    assert (changes, log.skipped) == (1, [])
    assert op_counts(model).get("GroupNormalization") == 1
    assert_same(before, model)
    assert run_pass(FuseGroupnorm(form="onnx"), model)[0] == 0


@pytest.mark.parametrize(
    ("model", "form", "reason"),
    [
        (text(NODE, dtype="double"), "plain", "is DOUBLE"),
        (text("k = Exp(g) " + NODE.replace("(x, g", "(x, k")), "plain", "'k' is computed"),
        (text(PLAIN, version=20), "onnx", "came with opset 21, the model has 20"),
        (text(PLAIN, extra="z = Exp(m)"), "onnx", "'m' has 2 users"),
        (text(PLAIN.replace("ones, zeros", "zeros, ones")), "onnx", "of its own"),
        (text(PLAIN.replace("Mul(b, gc)", "Mul(b, x)")), "onnx", "applies a computed value"),
        (
            text(PLAIN.replace("{0, 2, -1}", "{0, 4, -1}")).replace("= {0, 2, -1}", "= {0, -1, 2}"),
            "onnx",
            "into groups",
        ),
    ],
)
def test_near_misses_are_left_with_the_reason(model: str, form: str, reason: str) -> None:
    loaded = from_text(model)
    before = io.to_bytes(loaded)
    changes, log = run_pass(FuseGroupnorm(form=form), loaded)
    assert changes == 0
    assert io.to_bytes(loaded) == before
    assert reason in log.skipped[0][1]


def test_the_weights_stay_as_they_are() -> None:
    model = from_text(text(NODE, extra="z = Mul(x, gc)"))
    g = model.graph.initializers["g"].const_value
    assert g is not None
    values = np.array(g.numpy())
    run_pass(FuseGroupnorm(), model)
    np.testing.assert_array_equal(g.numpy(), values)
