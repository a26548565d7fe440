import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.graph import io
from effdl.passes.fuse.silu import FuseSilu
from tests.support import assert_same, from_text, op_counts, run_pass


def text(body: str, version: int = 13, dtype: str = "float", extra: str = "") -> str:
    more = f", {dtype}[2,3] z" if extra else ""
    return f"""<ir_version: 10, opset_import: ["": {version}]>
    g ({dtype}[2,3] i) => ({dtype}[2,3] y{more}) <{dtype} k = {{1.702}}, {dtype}[1] two = {{2.0}}>
    {{ x = Neg(i) {body} {extra} y = Neg(r) }}"""


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(
        [
            ("s = Sigmoid(x)", 1.0),
            ("u = Mul(k, x) s = Sigmoid(u)", 1.702),
            ("u = Div(x, two) s = Sigmoid(u)", 0.5),
        ]
    ),
    st.sampled_from(["r = Mul(x, s)", "r = Mul(s, x)"]),
    st.sampled_from([7, 13, 17, 24]),
)
def test_every_way_to_write_it_is_fused(
    gate: tuple[str, float], product: str, version: int
) -> None:
    model = from_text(text(f"{gate[0]} {product}", version))
    before = model.clone()
    changes, log = run_pass(FuseSilu(), model)
    assert (changes, log.skipped) == (1, [])
    assert op_counts(model) == {"Neg": 2, "QuickGelu": 1}
    node = next(n for n in model.graph if n.op_type == "QuickGelu")
    assert node.domain == "com.microsoft"
    assert node.attributes["alpha"].as_float() == pytest.approx(gate[1])
    assert_same(before, model)
    after = io.to_bytes(model)
    assert run_pass(FuseSilu(), model)[0] == 0
    assert io.to_bytes(model) == after


def test_swish_comes_and_goes() -> None:
    model = from_text(text("s = Sigmoid(x) r = Mul(x, s)", 24))
    before = model.clone()
    assert run_pass(FuseSilu(domain="onnx"), model)[0] == 1
    assert op_counts(model) == {"Neg": 2, "Swish": 1}
    assert_same(before, model)
    assert run_pass(FuseSilu(domain="onnx"), model)[0] == 0
    assert run_pass(FuseSilu(), model)[0] == 1
    assert op_counts(model) == {"Neg": 2, "QuickGelu": 1}
    assert_same(before, model)


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (text("s = Sigmoid(x) r = Mul(x, s)"), {"domain": "onnx"}, "came with opset 24"),
        (text("s = Sigmoid(x) r = Mul(x, s)", dtype="double"), {}, "is DOUBLE"),
        (text("s = Sigmoid(x) r = Mul(x, s)", extra="z = Exp(s)"), {}, "used more than once"),
        (text("a = Add(x, k) s = Sigmoid(a) r = Mul(x, s)"), {}, "takes no multiple of 'x'"),
    ],
)
def test_near_misses_are_left_with_the_reason(
    model: str, options: dict[str, str], reason: str
) -> None:
    loaded = from_text(model)
    before = io.to_bytes(loaded)
    changes, log = run_pass(FuseSilu(**options), loaded)
    assert changes == 0
    assert io.to_bytes(loaded) == before
    assert [r for _, r in log.skipped if reason in r], log.skipped


def test_a_gate_of_another_value_is_no_candidate() -> None:
    model = from_text(text("e = Exp(x) s = Sigmoid(e) r = Mul(x, s)"))
    changes, log = run_pass(FuseSilu(), model)
    assert (changes, log.skipped) == (0, [])
