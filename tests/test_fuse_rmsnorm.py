import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.graph import io
from effdl.passes.fuse.rmsnorm import FuseRmsnorm
from tests.support import assert_same, from_text, op_counts, run_pass

SQUARES = {"Pow": "s = Pow(x, two)", "Mul": "s = Mul(x, x)"}
ROOTS = {
    "SqrtDiv": "r = Sqrt(w) q = Div(x, r)",
    "SqrtReciprocal": "h = Sqrt(w) r = Reciprocal(h) q = Mul(x, r)",
    "ReciprocalSqrt": "h = Reciprocal(w) r = Sqrt(h) q = Mul(r, x)",
    "OneOver": "h = Sqrt(w) r = Div(one, h) q = Mul(x, r)",
    "Pow": "r = Pow(w, power) q = Mul(r, x)",
}


def text(
    square: str = "Pow",
    root: str = "SqrtReciprocal",
    *,
    version: int = 18,
    scale: str | None = "6",
    axes: str = "-1",
    shape: str = "B,4,6",
    dtype: str = "float",
    extra: str = "",
    **replaced: str,
) -> str:
    count = axes.count(",") + 1
    attribute = f"<axes = [{axes}], keepdims = 1>(s)" if version < 18 else "(s, ax)"
    parts = {
        "square": SQUARES[square],
        "mean": f"v = ReduceMean{attribute}",
        "add": "w = Add(v, e)",
        "root": ROOTS[root],
        "scale": "y = Neg(q)" if scale is None else "t = Mul(g, q) y = Neg(t)",
    } | replaced
    numbers = {"two": 2, "e": 1e-5, "one": 1, "power": -0.5}
    constants = [f"{dtype} {k} = {{{float(v)!r}}}" for k, v in numbers.items()]
    constants.append(f"int64[{count}] ax = {{{axes}}}")
    if scale is not None:
        size = int(np.prod([int(d) for d in scale.split(",")]))
        values = ", ".join(f"{0.5 + 0.1 * k:.2f}" for k in range(size))
        constants.append(f"{dtype}[{scale}] g = {{{values}}}")
    more = f", {dtype}[{shape}] z" if extra else ""
    return f"""<ir_version: 10, opset_import: ["": {version}]>
    g ({dtype}[{shape}] i) => ({dtype}[{shape}] y{more}) <{", ".join(constants)}>
    {{ x = Relu(i) {" ".join(parts.values())} {extra} }}"""


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(list(SQUARES)),
    st.sampled_from(list(ROOTS)),
    st.sampled_from([13, 17, 18, 23]),
    st.sampled_from([None, "6", "1,1,6", "1"]),
    st.sampled_from(["-1", "2"]),
)
def test_every_form_is_found(
    square: str, root: str, version: int, scale: str | None, axes: str
) -> None:
    model = from_text(text(square, root, version=version, scale=scale, axes=axes))
    before = model.clone()
    changes, log = run_pass(FuseRmsnorm(), model)
    known = square == "Pow" and root in ("SqrtDiv", "OneOver") and scale is not None
    if version < 23 and known:
        assert changes == 0
        assert "fuses this form itself" in log.skipped[0][1]
        return
    assert (changes, log.skipped) == (1, [])
    counts = op_counts(model)
    if version >= 23:
        assert counts == {"Relu": 1, "RMSNormalization": 1, "Neg": 1}
        assert list(
            next(n for n in model.graph if n.op_type == "RMSNormalization").inputs[1].shape
        ) == [6]
    else:
        wanted = ["Relu", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Neg"]
        assert counts == dict.fromkeys(wanted, 1)
    assert_same(before, model)
    after = io.to_bytes(model)
    assert run_pass(FuseRmsnorm(), model)[0] == 0
    assert io.to_bytes(model) == after


def test_several_axes() -> None:
    model = from_text(text(version=23, axes="-2,-1", scale="4,6"))
    before = model.clone()
    assert run_pass(FuseRmsnorm(), model)[0] == 1
    node = next(n for n in model.graph if n.op_type == "RMSNormalization")
    assert node.attributes["axis"].as_int() == -2
    assert_same(before, model)
    changes, log = run_pass(FuseRmsnorm(), from_text(text(axes="-2,-1", scale="4,6")))
    assert (changes, log.skipped[0][1]) == (0, "over several axes a node needs opset 23")


def test_a_scale_of_another_shape_stays() -> None:
    model = from_text(text(version=23, scale="4,1"))
    before = model.clone()
    assert run_pass(FuseRmsnorm(), model)[0] == 1
    assert op_counts(model) == {"Relu": 1, "RMSNormalization": 1, "Mul": 1, "Neg": 1}
    assert_same(before, model)


def test_float16_around_a_float32_norm() -> None:
    bits = ", ".join(str(int(np.float16(v).view(np.uint16))) for v in (0.5, 1, 2, 1.5, 0.25, 3))
    model = from_text(
        f"""<ir_version: 10, opset_import: ["": 23]>
        g (float16[2,3,6] i) => (float16[2,3,6] y)
        <float e = {{1e-6}}, float two = {{2.0}}, int64[1] ax = {{-1}}, float16[6] g = {{{bits}}}> {{
            h = Relu(i) x = Cast<to = 1>(h) s = Pow(x, two) v = ReduceMean(s, ax) w = Add(v, e)
            k = Sqrt(w) r = Reciprocal(k) q = Mul(x, r) c = Cast<to = 10>(q) y = Mul(g, c)
        }}"""
    )
    before = model.clone()
    changes, log = run_pass(FuseRmsnorm(), model)
    assert changes == 1, log.skipped
    assert op_counts(model) == {"Relu": 1, "RMSNormalization": 1}
    node = next(n for n in model.graph if n.op_type == "RMSNormalization")
    assert node.inputs[1] is not None
    assert node.inputs[1].dtype == ir.DataType.FLOAT16
    assert_same(before, model, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (text(axes="1"), "which are not the last ones"),
        (text(shape="B,4,C", scale=None), "is dynamic"),
        (text(root="SqrtDiv", square="Mul", dtype="double"), "is DOUBLE"),
        (text(add="w = Add(v, v)"), "epsilon is missing"),
        (text(add="w = Sub(v, e)"), "goes to Sub"),
        (text(root="Pow", square="Mul").replace("power)", "two)", 1), "not a root"),
        (text(root="SqrtDiv", square="Mul").replace("Div(x, r)", "Div(r, x)"), "divides the root"),
        (text().replace("Mul(x, r)", "Mul(i, r)"), "divides 'i', not 'x'"),
        (text(extra="z = Exp(q)").replace("Mul(g, q)", "Mul(g, x)"), ""),
        (text(extra="z = Mul(x, r)"), "has 2 users"),
    ],
)
def test_near_misses_are_left_with_the_reason(model: str, reason: str) -> None:
    loaded = from_text(model)
    before = io.to_bytes(loaded)
    changes, log = run_pass(FuseRmsnorm(), loaded)
    if not reason:  # the scale does not belong to the norm, but the norm is one
        assert changes == 1
        return
    assert changes == 0
    assert io.to_bytes(loaded) == before
    assert [r for _, r in log.skipped if reason in r], log.skipped


def test_a_layer_norm_is_no_candidate() -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2,6] x) => (float[2,6] y) <float e = {1e-5}> {
            m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) s = Mul(d, d) v = ReduceMean<axes=[-1]>(s)
            w = Add(v, e) r = Sqrt(w) y = Div(d, r)
        }"""
    )
    changes, log = run_pass(FuseRmsnorm(), model)
    assert (changes, log.skipped) == (0, [])


def test_inside_a_branch() -> None:
    norm = "s = Mul(x, x) v = ReduceMean<axes=[-1]>(s) w = Add(v, e) r = Sqrt(w) q = Div(x, r)"
    model = from_text(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[2,6] x, bool c) => (float[2,6] y) <float e = {{0.01}}> {{
            y = If(c) <then_branch = t () => (float[2,6] p) {{ {norm} p = Neg(q) }},
                       else_branch = f () => (float[2,6] k) {{ k = Relu(x) }}>
        }}"""
    )
    before = model.clone()
    assert run_pass(FuseRmsnorm(), model)[0] == 1
    assert_same(before, model)
