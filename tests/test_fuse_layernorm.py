import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import version_converter

from effdl.graph import io
from effdl.graph.proto import split_proto
from effdl.passes.fuse.layernorm import FuseLayernorm
from tests.support import SAMPLES, assert_same, feed_for, from_text, op_counts, outputs, run_pass


@dataclass(frozen=True)
class Dialect:
    """How an exporter writes a layer norm."""

    version: int = 17
    dtype: str = "float"
    shape: tuple[str, ...] = ("B", "4", "6")
    axes: tuple[int, ...] = (-1,)
    square: str = "Pow"
    root: str = "SqrtDiv"
    mean_again: bool = False
    difference_again: bool = False
    epsilon: str = "float e = {1e-5}"
    epsilon_first: bool = False
    epsilon_node: bool = False
    scale: str | None = "6"
    scale_first: bool = False
    bias: str | None = "6"
    bias_first: bool = False

    def text(self, extra: str = "", outputs: str = "", **replaced: str) -> str:
        lines: list[str] = []
        constants = [] if self.epsilon_node else [self.epsilon]

        def op(name: str, op: str, *args: str, attributes: str = "") -> str:
            lines.append(replaced.get(name, f"{name} = {op}{attributes}({', '.join(args)})"))
            return name

        def two(name: str, kind: str, a: str, b: str, swap: bool) -> str:
            return op(name, kind, b, a) if swap else op(name, kind, a, b)

        def mean(name: str, value: str) -> str:
            listed = ", ".join(map(str, self.axes))
            if self.version >= 18:
                constants.append(f"int64[{len(self.axes)}] {name}_axes = {{{listed}}}")
                return op(name, "ReduceMean", value, f"{name}_axes", attributes="<keepdims = 1>")
            return op(name, "ReduceMean", value, attributes=f"<axes = [{listed}], keepdims = 1>")

        if self.epsilon_node:
            lines.append(f"e = Constant<value_float = {self.epsilon.split('{')[1].rstrip('}')}>()")
        op("x", "Relu", "a")
        d = op("d", "Sub", "x", mean("m", "x"))
        if self.square == "Pow":
            constants.append(f"{self.dtype} two = {{2}}")
            op("s", "Pow", "d", "two")
        else:
            op("s", "Mul", "d", "d")
        two("ve", "Add", mean("v", "s"), "e", self.epsilon_first)
        if self.difference_again or self.mean_again:
            d = op("d2", "Sub", "x", mean("m2", "x") if self.mean_again else "m")
        last = self.quotient(op, constants, d)
        for name, kind, shape, first in (
            ("g", "Mul", self.scale, self.scale_first),
            ("b", "Add", self.bias, self.bias_first),
        ):
            if shape is not None:
                rng = np.random.default_rng(len(name + kind))
                count = int(np.prod([int(d) for d in shape.split(",")] if shape else [1]))
                numbers = ", ".join(
                    repr(float(n)) for n in rng.normal(size=count).astype(np.float32)
                )
                constants.append(
                    f"{self.dtype}{f'[{shape}]' if shape else ''} {name} = {{{numbers}}}"
                )
                last = two(f"y_{name}", kind, last, name, first)
        dims = ",".join(self.shape)
        more = f", {outputs}" if outputs else ""
        return f"""<ir_version: 9, opset_import: ["": {self.version}]>
            g ({self.dtype}[{dims}] a) => ({self.dtype}[{dims}] y{more}) <{", ".join(constants)}>
            {{ {" ".join(lines)} {extra} y = Neg({last}) }}"""

    def quotient(self, op: Any, constants: list[str], d: str) -> str:
        match self.root:
            case "SqrtDiv":
                op("r", "Sqrt", "ve")
                return op("q", "Div", d, "r")
            case "SqrtReciprocal":
                op("r0", "Sqrt", "ve")
                op("r", "Reciprocal", "r0")
            case "ReciprocalSqrt":
                op("r0", "Reciprocal", "ve")
                op("r", "Sqrt", "r0")
            case "OneOverSqrt":
                constants.append(f"{self.dtype} one = {{1}}")
                op("r0", "Sqrt", "ve")
                op("r", "Div", "one", "r0")
            case "PowDiv":
                constants.append(f"{self.dtype} half = {{0.5}}")
                op("r", "Pow", "ve", "half")
                return op("q", "Div", d, "r")
            case "PowMul":
                constants.append(f"{self.dtype} half = {{-0.5}}")
                op("r", "Pow", "ve", "half")
        return op("q", "Mul", "r", d) if self.scale_first else op("q", "Mul", d, "r")


def check(text: str, *, scale: bool = True, rtol: float = 1e-3, atol: float = 1e-4) -> ir.Model:
    model = from_text(text)
    before = model.clone()
    changes, log = run_pass(FuseLayernorm(), model)
    assert changes == 1, log.skipped
    assert not log.skipped
    assert op_counts(model)["LayerNormalization"] == 1
    assert "ReduceMean" not in op_counts(model)
    assert_same(before, model, rtol=rtol, atol=atol)
    after = io.to_bytes(model)
    assert run_pass(FuseLayernorm(), model)[0] == 0
    assert io.to_bytes(model) == after
    return model


DIALECTS = st.builds(
    Dialect,
    version=st.sampled_from([17, 18, 20]),
    axes=st.sampled_from([(-1,), (2,), (-2, -1), (1, 2), (-1, -2), (2, 1)]),
    square=st.sampled_from(["Pow", "Mul"]),
    root=st.sampled_from(
        ["SqrtDiv", "SqrtReciprocal", "ReciprocalSqrt", "OneOverSqrt", "PowDiv", "PowMul"]
    ),
    mean_again=st.booleans(),
    difference_again=st.booleans(),
    epsilon=st.sampled_from(["float e = {1e-5}", "float[1] e = {1e-5}", "float e = {1e-12}"]),
    epsilon_first=st.booleans(),
    epsilon_node=st.booleans(),
    scale=st.sampled_from([None, "6", "4,6", "1,6", "1,1,6", "1", "", "4,1"]),
    scale_first=st.booleans(),
    bias=st.sampled_from([None, "6", "4,6", "1", ""]),
    bias_first=st.booleans(),
)


@settings(deadline=None, max_examples=80)
@given(DIALECTS)
def test_every_dialect_is_fused(dialect: Dialect) -> None:
    fits = len(dialect.axes) == 2
    for name in ("scale", "bias"):  # a row per channel is no parameter of a norm over one axis
        if not fits and getattr(dialect, name) in ("4,6", "4,1"):
            dialect = dataclasses.replace(dialect, **{name: "6"})
    model = check(dialect.text())
    assert set(op_counts(model)) <= {"Relu", "LayerNormalization", "Neg", "Constant"}
    norm = next(n for n in model.graph if n.op_type == "LayerNormalization")
    size = [4, 6] if fits else [6]
    assert norm.attributes["axis"].as_int() == -len(size)
    assert [list(v.shape) for v in norm.inputs[1:] if v is not None] == [size] * (
        len(norm.inputs) - 1
    )
    assert (len(norm.inputs) == 3) == (dialect.bias is not None)


def test_parameters_that_fit_are_reused_and_others_stay() -> None:
    model = check(Dialect().text())
    norm = next(n for n in model.graph if n.op_type == "LayerNormalization")
    assert [v.name for v in norm.inputs[1:] if v is not None] == ["g", "b"]
    model = check(Dialect(scale="4,1", bias=None).text())  # per channel: not of the normalized axis
    assert op_counts(model) == {"Relu": 1, "LayerNormalization": 1, "Mul": 1, "Neg": 1}


def test_epsilon_is_the_float32_number() -> None:
    for text in ("1e-5", "1e-12", "0.001"):
        model = check(Dialect(epsilon=f"float e = {{{text}}}").text())
        norm = next(n for n in model.graph if n.op_type == "LayerNormalization")
        assert norm.attributes["epsilon"].as_float() == float(np.float32(float(text)))


@pytest.mark.parametrize(
    ("dialect", "replaced", "reason"),
    [
        (Dialect(axes=(1,)), {}, "which are not the last ones"),
        (Dialect(axes=(0, 2)), {}, "which are not the last ones"),
        (Dialect(), {"v": "v = ReduceMean<axes=[1], keepdims=1>(s)"}, "not the last ones"),
        (Dialect(), {"v": "v = ReduceMean<axes=[-2,-1], keepdims=1>(s)"}, "over different axes"),
        (Dialect(), {"v": "v = ReduceSum(s)"}, "goes to ReduceSum, not to ReduceMean"),
        (Dialect(), {"ve": "ve = Identity(v)"}, "goes to Identity, not to Add"),
        (Dialect(), {"ve": "ve = Add(v, v)"}, "epsilon is missing"),
        (Dialect(), {"r": "r0 = Sqrt(ve) r = Add(r0, e)"}, "goes to Add"),
        (Dialect(), {"r": "r = Exp(ve)"}, "goes to Exp"),
        (Dialect(), {"q": "q = Div(r, d)"}, "divides the root by something"),
        (Dialect(), {"q": "q = Div(x, r)"}, "divides 'x', not the difference"),
        (Dialect(), {"q": "q = Mul(d, r)"}, "does not divide by the square root"),
        (Dialect(root="PowMul"), {"r": "r = Pow(ve, two)"}, "not a root"),
        (Dialect(), {"s": "s = Mul(d, x)"}, "the difference from the mean is not squared"),
        (Dialect(), {"s": "f = Cast<to = 1>(d) s = Pow(f, two)"}, "a Cast stands between"),
        (Dialect(epsilon="float e = {-0.1}"), {}, "epsilon is negative"),
        (Dialect(shape=("B", "4", "C")), {}, "is dynamic"),
        (Dialect(dtype="double", epsilon="double e = {1e-5}"), {}, "is DOUBLE"),
        (Dialect(version=16), {}, "came with opset 17, the model has 16"),
    ],
)
def test_near_misses_are_left_with_the_reason(
    dialect: Dialect, replaced: dict[str, str], reason: str
) -> None:
    model = from_text(dialect.text(**replaced))
    before = io.to_bytes(model)
    changes, log = run_pass(FuseLayernorm(), model)
    assert changes == 0
    assert io.to_bytes(model) == before
    assert len(log.skipped) == 1
    assert reason in log.skipped[0][1]


@pytest.mark.parametrize("value", ["m", "d", "s", "v", "ve", "r"])
def test_inner_values_with_other_users_stay(value: str) -> None:
    dims = {"m": "[B,4,1]", "v": "[B,4,1]", "ve": "[B,4,1]", "r": "[B,4,1]"}.get(value, "[B,4,6]")
    used = from_text(Dialect().text(extra=f"z = Exp({value})", outputs=f"float{dims} z"))
    output = from_text(Dialect().text(outputs=f"float{dims} {value}"))
    for model in (used, output):
        before = io.to_bytes(model)
        changes, log = run_pass(FuseLayernorm(), model)
        assert changes == 0
        assert len(log.skipped) == 1
        assert f"'{value}'" in log.skipped[0][1]
        assert io.to_bytes(model) == before


def test_scale_used_elsewhere_and_quotient_used_twice() -> None:
    model = check(Dialect().text(extra="z = Exp(q)", outputs="float[B,4,6] z"))
    counts = op_counts(model)  # the norm is fused, what follows it is not
    assert counts == {"Relu": 1, "LayerNormalization": 1, "Mul": 1, "Add": 1, "Exp": 1, "Neg": 1}
    assert "g" in check(Dialect().text(extra="z = Exp(g)", outputs="float[6] z")).graph.initializers


def test_scale_folded_into_the_root() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[B,4,6] x) => (float[B,4,6] y)
    <float e = {0.001}, float[6] g = {1.,2.,3.,4.,5.,6.}, float[6] b = {6.,5.,4.,3.,2.,1.}> {
        m = ReduceMean<axes=[2]>(x) d = Sub(x, m) s = Mul(d, d) v = ReduceMean<axes=[2]>(s)
        ve = Add(v, e) r = Sqrt(ve) i = Reciprocal(r) f = Mul(i, g)
        p = Mul(x, f) o = Mul(m, f) h = Sub(b, o) y = Add(p, h)
    }"""
    model = check(text)
    assert op_counts(model) == {"LayerNormalization": 1}
    model = check(text.replace("f = Mul(i, g)", "").replace("f)", "i)"))
    assert op_counts(model) == {"LayerNormalization": 1}
    changes, log = run_pass(FuseLayernorm(), from_text(text.replace("Sub(b, o)", "Sub(o, b)")))
    assert (changes, len(log.skipped)) == (0, 1)


def test_float16_with_a_float32_island_keeps_its_casts() -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float16[2,6] a) => (float16[2,6] y) <float e = {1e-5}, float two = {2.0}> {
            x = Cast<to = 1>(a) m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) s = Pow(d, two)
            v = ReduceMean<axes=[-1]>(s) ve = Add(v, e) r = Sqrt(ve) q = Div(d, r) y = Cast<to = 10>(q)
        }"""
    )
    before = model.clone()
    assert run_pass(FuseLayernorm(), model)[0] == 1
    assert op_counts(model) == {"Cast": 2, "LayerNormalization": 1}
    assert_same(before, model, rtol=2e-3, atol=1e-3)


def test_float16_norm() -> None:
    bits = {n: int(np.float16(n).view(np.uint16)) for n in (2.0, 1e-3)}
    model = from_text(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float16[2,6] x) => (float16[2,6] y)
        <float16 e = {{{bits[1e-3]}}}, float16 two = {{{bits[2.0]}}}> {{
            m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) s = Pow(d, two)
            v = ReduceMean<axes=[-1]>(s) ve = Add(v, e) r = Sqrt(ve) y = Div(d, r)
        }}"""
    )
    before = model.clone()
    assert run_pass(FuseLayernorm(), model)[0] == 1
    scale = next(iter(v for k, v in model.graph.initializers.items() if "scale" in k))
    assert scale.dtype == ir.DataType.FLOAT16
    assert_same(before, model, rtol=1e-2, atol=5e-3)


def test_two_norms_in_a_row_inside_a_branch_and_in_a_function() -> None:
    norm = """m{0} = ReduceMean<axes=[-1]>({1}) d{0} = Sub({1}, m{0}) s{0} = Mul(d{0}, d{0})
        v{0} = ReduceMean<axes=[-1]>(s{0}) w{0} = Add(v{0}, e) r{0} = Sqrt(w{0}) n{0} = Div(d{0}, r{0})"""
    model = from_text(
        f"""<ir_version: 8, opset_import: ["": 17, "l": 1]>
        g (float[2,6] x, bool c) => (float[2,6] y) <float e = {{0.01}}> {{
            h = l.norm(x)
            y = If(c) <
              then_branch = t () => (float[2,6] p) {{
                {norm.format(1, "x")} {norm.format(2, "n1")} p = Add(n2, h) }},
              else_branch = f () => (float[2,6] q) {{ q = Relu(h) }}>
        }}
        <domain: "l", opset_import: ["": 17]> norm (k) => (o) {{
            e = Constant<value_float = 0.01>() {norm.format(3, "k")} o = Identity(n3)
        }}"""
    )
    before = model.clone()
    changes, log = run_pass(FuseLayernorm(), model)
    assert changes == 2
    assert len(log.skipped) == 1
    for c in (True, False):
        feed = {**feed_for(before), "c": np.array(c)}
        for want, got in zip(outputs(before, feed), outputs(model, feed), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_targets_and_ignore() -> None:
    assert run_pass(FuseLayernorm(ignore=("Sub",)), from_text(Dialect().text()))[0] == 0
    assert run_pass(FuseLayernorm(targets=("nothing",)), from_text(Dialect().text()))[0] == 0


def test_sample_transformer() -> None:
    old = io.load(SAMPLES / "digits_transformer.onnx")
    assert FuseLayernorm.min_opset == 17
    changes, log = run_pass(FuseLayernorm(), old)
    assert (changes, len(log.skipped)) == (0, 7)
    proto, _ = split_proto(old, threshold=1 << 40)
    model = io.from_proto(version_converter.convert_version(proto, 18), "opset 18", None)
    before = model.clone()
    changes, log = run_pass(FuseLayernorm(), model)
    assert (changes, log.skipped) == (7, [])
    assert_same(before, model)
