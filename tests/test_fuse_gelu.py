import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.graph import io
from effdl.graph.walk import opset
from effdl.passes.fuse.gelu import FuseGelu
from tests.support import SAMPLES, assert_same, from_text, op_counts, run_pass

ERF = 1 / math.sqrt(2)
TANH = math.sqrt(2 / math.pi)


class Writer:
    """Writes a graph in ONNX's textual syntax, line by line."""

    def __init__(self, dtype: str = "float", rank_one: bool = False) -> None:
        self.lines: list[str] = []
        self.constants: list[str] = []
        self.dtype, self.shape = dtype, "[1]" if rank_one else ""

    def constant(self, number: float) -> str:
        name = f"c{len(self.constants)}"
        text = repr(float(np.float32(number)))
        if self.dtype == "float16":
            text = str(int(np.float16(number).view(np.uint16)))  # the syntax wants the bits
        self.constants.append(f"{self.dtype}{self.shape} {name} = {{{text}}}")
        return name

    def op(self, op: str, *args: str) -> str:
        name = f"t{len(self.lines)}"
        self.lines.append(f"{name} = {op}({', '.join(args)})")
        return name

    def model(self, result: str, version: int = 17, extra: str = "") -> str:
        more = f", {self.dtype}[2,3] z" if extra else ""
        constants = f"<{', '.join(self.constants)}>" if self.constants else ""
        return f"""<ir_version: 9, opset_import: ["": {version}]>
        g ({self.dtype}[2,3] a) => ({self.dtype}[2,3] y{more}) {constants}
        {{ x = Relu(a) {" ".join(self.lines)} {extra} y = Neg({result}) }}"""


@st.composite
def gelus(draw: st.DrawFn, form: str) -> str:
    """One of the ways to write a Gelu of x."""
    w = Writer(rank_one=draw(st.booleans()))
    flip = st.booleans()

    def two(op: str, a: str, b: str) -> str:
        return w.op(op, b, a) if draw(flip) else w.op(op, a, b)

    def product(factors: list[str]) -> str:
        factors = list(draw(st.permutations(factors)))
        while len(factors) > 1:
            i = draw(st.integers(0, len(factors) - 2))
            factors[i : i + 2] = [w.op("Mul", factors[i], factors[i + 1])]
        return factors[0]

    def times(value: str, number: float) -> str:
        return (
            w.op("Div", value, w.constant(1 / number))
            if draw(flip)
            else two("Mul", value, w.constant(number))
        )

    if form == "erf":
        e = w.op("Erf", times("x", ERF))
    else:
        cube = draw(st.sampled_from(["pow", "xxx", "xx"]))
        if cube == "xx":  # x·c·(1 + 0.044715·x·x)
            inner = two("Add", product(["x", "x", w.constant(0.044715)]), w.constant(1.0))
            e = w.op("Tanh", product(["x", inner, w.constant(TANH)]))
        else:
            power = w.op("Pow", "x", w.constant(3.0)) if cube == "pow" else product(["x", "x", "x"])
            e = w.op("Tanh", times(two("Add", "x", times(power, 0.044715)), TANH))
    if draw(st.integers(0, 3)) == 0:  # 0.5·x + 0.5·x·e
        root = two("Add", times("x", 0.5), product([e, "x", w.constant(0.5)]))
    elif draw(flip):
        root = product(["x", two("Add", e, w.constant(1.0)), w.constant(0.5)])
    else:
        root = times(product(["x", two("Add", w.constant(1.0), e)]), 0.5)
    return w.model(root, version=draw(st.sampled_from([13, 17, 20])))


@settings(deadline=None, max_examples=40)
@given(gelus("erf"))
def test_every_way_to_write_the_erf_form_is_fused(text: str) -> None:
    check(text, "Gelu", "Gelu")


@settings(deadline=None, max_examples=40)
@given(gelus("tanh"))
def test_every_way_to_write_the_tanh_form_is_fused(text: str) -> None:
    check(text, "Gelu", "FastGelu")


def check(text: str, standard: str, microsoft: str) -> None:
    model = from_text(text)
    before = model.clone()
    changes, log = run_pass(FuseGelu(), model)
    assert changes == 1, log.skipped
    assert len(log.touched) == 1
    assert not log.skipped
    name, domain = (standard, "") if opset(model) >= 20 else (microsoft, "com.microsoft")
    counts = op_counts(model)
    assert set(counts) <= {"Relu", name, "Neg"}
    assert next(n for n in model.graph if n.op_type == name).domain == domain
    assert_same(before, model)
    after = io.to_bytes(model)
    assert run_pass(FuseGelu(), model)[0] == 0
    assert io.to_bytes(model) == after


def erf_gelu(
    *, inner: float = ERF, half: float = 0.5, one: float = 1.0, dtype: str = "float"
) -> Writer:
    w = Writer(dtype)
    e = w.op("Erf", w.op("Mul", "x", w.constant(inner)))  # t0, t1
    w.op("Mul", w.op("Mul", "x", w.op("Add", e, w.constant(one))), w.constant(half))  # t2..t4
    return w


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (erf_gelu(inner=0.7).model("t4"), "takes 0.69999999·x, a Gelu 0.70710678·x"),
        (erf_gelu(half=0.25).model("t4"), "up to 'y' it is no Gelu, and 'y' is a graph output"),
        (erf_gelu(one=2.0).model("t4"), "up to 'y' it is no Gelu"),
        (erf_gelu(inner=ERF * 1.0001).model("t4"), "a Gelu 0.70710678·x"),
        (
            erf_gelu().model("t4", extra="z = Exp(t2)"),
            "up to 't2' it is no Gelu, and 't2' is used more than once",
        ),
        (erf_gelu().model("t4", extra="z = Exp(t0)"), "'t0' is also used by Exp"),
        (erf_gelu().model("t1"), "up to 't1' it is no Gelu"),
        (erf_gelu(dtype="double").model("t4"), "is DOUBLE"),
    ],
)
def test_near_misses_are_left_with_the_reason(text: str, reason: str) -> None:
    model = from_text(text)
    before = io.to_bytes(model)
    changes, log = run_pass(FuseGelu(), model)
    assert changes == 0
    assert io.to_bytes(model) == before
    assert [r for _, r in log.skipped if reason in r], log.skipped
    assert len(log.skipped) == 1


def test_an_inner_value_that_is_a_graph_output_stays() -> None:
    text = (
        erf_gelu()
        .model("t4")
        .replace("y = Neg(t4)", "y = Neg(t4)")
        .replace("float[2,3] y)", "float[2,3] y, float[2,3] t3)")
    )
    changes, log = run_pass(FuseGelu(), from_text(text))
    assert changes == 0
    assert "up to 't3' it is no Gelu, and 't3' is a graph output" in log.skipped[0][1]


def test_another_gelu_is_no_gelu_of_this_value() -> None:
    w = Writer()
    e = w.op("Erf", w.op("Mul", "x", w.constant(ERF)))
    w.op("Mul", w.op("Mul", "a", w.op("Add", e, w.constant(1.0))), w.constant(0.5))
    changes, log = run_pass(FuseGelu(), from_text(w.model("t4")))
    assert changes == 0
    assert "no part of the formula" in log.skipped[0][1]


def test_plain_tanh_and_silu_are_no_candidates() -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2,3] x) => (float[2,3] y) { t = Tanh(x) s = Sigmoid(t) y = Mul(t, s) }"""
    )
    changes, log = run_pass(FuseGelu(quick=True), model)
    assert (changes, log.skipped) == (0, [])


def test_gelu_of_a_gelu_and_one_inside_a_gated_product() -> None:
    w = erf_gelu()
    e = w.op("Erf", w.op("Div", "t4", w.constant(math.sqrt(2))))
    second = w.op("Mul", w.op("Mul", w.constant(0.5), "t4"), w.op("Add", w.constant(1.0), e))
    text = w.model(w.op("Mul", second, "a"))
    model = from_text(text)
    before = model.clone()
    assert run_pass(FuseGelu(), model)[0] == 2
    assert op_counts(model) == {"Relu": 1, "Gelu": 2, "Mul": 1, "Neg": 1}
    assert_same(before, model)


def test_graph_output_keeps_its_name_and_type() -> None:
    text = erf_gelu().model("t4").replace("y = Neg(t4)", "").replace("[2,3] y)", "[2,3] t4)")
    model = from_text(text)
    before = model.clone()
    assert run_pass(FuseGelu(), model)[0] == 1
    assert [o.name for o in model.graph.outputs] == ["t4"]
    assert_same(before, model)


def test_float16_constants_are_compared_at_their_precision() -> None:
    model = from_text(erf_gelu(dtype="float16").model("t4"))
    before = model.clone()
    assert run_pass(FuseGelu(), model)[0] == 1
    assert_same(before, model, rtol=4e-3, atol=2e-3)


def test_quick_gelu_is_fused_on_request() -> None:
    w = Writer()
    w.op("Mul", w.op("Sigmoid", w.op("Mul", w.constant(1.702), "x")), "x")
    model = from_text(w.model("t2"))
    before = model.clone()
    assert run_pass(FuseGelu(), model)[0] == 0
    changes, log = run_pass(FuseGelu(quick=True, domain="onnx"), model)
    assert changes == 0
    assert "no QuickGelu" in log.skipped[0][1]
    assert run_pass(FuseGelu(quick=True), model)[0] == 1
    assert op_counts(model) == {"Relu": 1, "QuickGelu": 1, "Neg": 1}
    assert_same(before, model)


def test_domain_option() -> None:
    text = erf_gelu().model("t4")
    changes, log = run_pass(FuseGelu(domain="onnx"), from_text(text))
    assert changes == 0
    assert log.skipped[0][1] == "Gelu came with opset 20, the model has 17"
    model = from_text(erf_gelu().model("t4", version=20))
    assert run_pass(FuseGelu(domain="com.microsoft"), model)[0] == 1
    assert model.opset_imports["com.microsoft"] == 1


def test_inside_a_subgraph_and_a_function() -> None:
    body = "u = Mul({0}, c) e = Erf(u) p = Add(e, one) h = Mul({0}, half) r = Mul(h, p)"
    model = from_text(
        f"""<ir_version: 8, opset_import: ["": 17, "l": 1]>
        g (float[2,3] x, bool b) => (float[2,3] y)
        <float c = {{{float(np.float32(ERF))!r}}}, float one = {{1.0}}, float half = {{0.5}}> {{
            a = l.act(x)
            y = If(b) <
              then_branch = t () => (float[2,3] q) {{ {body.format("a")} q = Neg(r) }},
              else_branch = f () => (float[2,3] w) {{ w = Relu(a) }}>
        }}
        <domain: "l", opset_import: ["": 17]> act (v) => (k) {{
            c = Constant<value = float {{{float(np.float32(ERF))!r}}}>()
            one = Constant<value = float {{1.0}}>()
            half = Constant<value = float {{0.5}}>()
            {body.format("v")} k = Neg(r)
        }}"""
    )
    before = model.clone()
    changes, log = run_pass(FuseGelu(), model)
    assert changes == 1
    assert [r for _, r in log.skipped] == ["it is inside a function of the model"]
    assert_same(before, model)


def test_targets_and_ignore() -> None:
    text = erf_gelu().model("t4")
    assert run_pass(FuseGelu(ignore=("Erf",)), from_text(text))[0] == 0
    assert run_pass(FuseGelu(targets=("Erf",)), from_text(text))[0] == 1


def test_sample_transformer() -> None:
    model = io.load(SAMPLES / "digits_transformer.onnx")
    before = model.clone()
    assert run_pass(FuseGelu(), model)[0] == 3
    assert_same(before, model)
