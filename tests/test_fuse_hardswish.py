import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.graph import io
from effdl.passes.fuse.hardswish import FuseHardswish
from tests.support import assert_same, from_text, op_counts, run_pass

HALF = "a = Add(x, three)"


def text(body: str, version: int = 13, dtype: str = "float", extra: str = "") -> str:
    more = f", {dtype}[2,4,3] z" if extra else ""
    names = {"three": 3, "zero": 0, "six": 6, "one": 1, "sixth": 1 / 6, "half": 0.5, "two": 2}
    constants = ", ".join(f"{dtype} {k} = {{{float(v)!r}}}" for k, v in names.items())
    return f"""<ir_version: 8, opset_import: ["": {version}]>
    g ({dtype}[2,4,3] i) => ({dtype}[2,4,3] y{more}) <{constants}>
    {{ x = Mul(i, six) {body} {extra} y = Neg(r) }}"""


@st.composite
def written(draw: st.DrawFn) -> tuple[str, bool]:
    """A body that makes r, and whether it is a HardSwish (else a HardSigmoid)."""

    def flip(op: str, a: str, b: str) -> str:
        return f"{op}({b}, {a})" if draw(st.booleans()) else f"{op}({a}, {b})"

    unit = draw(st.booleans())
    top = "one" if unit else "six"
    if unit:
        lines = [f"m = {flip('Mul', 'x', 'sixth')}", f"a = {flip('Add', 'm', 'half')}"]
    else:
        lines = [f"a = {flip('Add', 'x', 'three')}"]
    lines.append(
        {
            "clip": f"c = Clip(a, zero, {top})",
            "minmax": f"b = {flip('Max', 'a', 'zero')} c = {flip('Min', 'b', top)}",
            "maxmin": f"b = {flip('Min', 'a', top)} c = {flip('Max', 'b', 'zero')}",
            "relu": f"b = Relu(a) c = {flip('Min', 'b', top)}",
        }[draw(st.sampled_from(["clip", "minmax", "maxmin", "relu"]))]
    )
    swish = draw(st.booleans())
    by_six = "Div({}, six)" if draw(st.booleans()) else "Mul(sixth, {})"
    if unit:
        lines.append(f"r = {flip('Mul', 'x', 'c')}" if swish else "r = Identity(c)")
    elif not swish:
        lines.append(f"r = {by_six.format('c')}")
    elif draw(st.booleans()):
        lines += [f"q = {by_six.format('c')}", f"r = {flip('Mul', 'x', 'q')}"]
    else:
        lines += [f"q = {flip('Mul', 'x', 'c')}", f"r = {by_six.format('q')}"]
    return " ".join(lines), swish


@settings(deadline=None, max_examples=60)
@given(written(), st.sampled_from([13, 14, 18]))
def test_every_way_to_write_it_is_fused(case: tuple[str, bool], version: int) -> None:
    body, swish = case
    model = from_text(text(body, version))
    before = model.clone()
    changes, log = run_pass(FuseHardswish(), model)
    assert changes == 1, log.skipped
    assert not log.skipped
    counts = op_counts(model)
    assert counts.get("HardSwish", 0) == (swish and version >= 14)
    assert counts.get("HardSigmoid", 0) == (not swish or version < 14)
    assert not {"Clip", "Min", "Max", "Div", "Add", "Relu"} & counts.keys()
    assert_same(before, model)
    after = io.to_bytes(model)
    assert run_pass(FuseHardswish(), model)[0] == 0
    assert io.to_bytes(model) == after


def test_clip_with_attributes() -> None:
    model = from_text(text(f"{HALF} c = Clip<min=0.0, max=6.0>(a) r = Div(c, six)", 10))
    before = model.clone()
    assert run_pass(FuseHardswish(), model)[0] == 1
    assert op_counts(model) == {"HardSigmoid": 1, "Neg": 1}  # Mul(i, six) is its slope
    assert_same(before, model)


def test_other_slopes_are_hardsigmoids() -> None:
    model = from_text(text("a = Add(x, two) c = Clip(a, zero, six) r = Div(c, six)"))
    before = model.clone()
    assert run_pass(FuseHardswish(), model)[0] == 1
    node = next(n for n in model.graph if n.op_type == "HardSigmoid")
    assert node.attributes["beta"].as_float() == pytest.approx(1 / 3)
    assert_same(before, model)


def test_hardsigmoid_times_x() -> None:
    body = "c = HardSigmoid<alpha=0.16666667, beta=0.5>(x) r = Mul(c, x)"
    model = from_text(text(body, 14))
    before = model.clone()
    assert run_pass(FuseHardswish(), model)[0] == 1
    assert op_counts(model) == {"Mul": 1, "HardSwish": 1, "Neg": 1}
    assert_same(before, model)
    for other, version in ((body, 13), (body.replace("0.5", "0.4"), 14)):
        assert run_pass(FuseHardswish(), from_text(text(other, version)))[0] == 0


SWISH = f"{HALF} c = Clip(a, zero, six) q = Mul(x, c) r = Div(q, six)"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (text(SWISH.replace("six)", "three)", 1)), "it is no HardSigmoid, and"),
        (text(SWISH.replace("Div(q, six)", "Div(q, three)")), "it is no HardSwish, and"),
        (text(SWISH.replace("Mul(x, c)", "Mul(i, c)")), "no part of the formula"),
        (text(SWISH, extra="z = Exp(a)"), "'a' is also used by Exp"),
        (text(SWISH, extra="z = Exp(c)"), "'c' is used more than once"),
        (text(SWISH, extra="z = Exp(q)"), "'q' is used more than once"),
        (text(SWISH, dtype="double"), "is DOUBLE: no HardSwish kernel"),
    ],
)
def test_near_misses_are_left_with_the_reason(model: str, reason: str) -> None:
    loaded = from_text(model)
    before = io.to_bytes(loaded)
    changes, log = run_pass(FuseHardswish(), loaded)
    assert changes == 0, op_counts(loaded)
    assert io.to_bytes(loaded) == before
    assert [r for _, r in log.skipped if reason in r], log.skipped


@pytest.mark.parametrize(
    "body",
    [
        "r = Clip(x, zero, six)",
        "c = Clip(x, zero, six) r = Div(c, six)",
        "a = Add(x, three) c = Clip(a, one, six) r = Div(c, six)",
        "a = Add(x, three) c = Clip(a, zero, x) r = Div(c, six)".replace(", x)", ")"),
        "a = Add(x, three) r = Relu(a)",
    ],
)
def test_what_is_no_candidate_is_left_alone(body: str) -> None:
    model = from_text(text(body))
    before = io.to_bytes(model)
    assert run_pass(FuseHardswish(), model)[0] == 0
    assert io.to_bytes(model) == before


def test_two_in_a_row_and_in_a_branch() -> None:
    act = "a{0} = Add({1}, three) c{0} = Clip(a{0}, zero, six) q{0} = Mul({1}, c{0}) r{0} = Div(q{0}, six)"
    model = from_text(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[2,3] x, bool k) => (float[2,3] y)
        <float three = {{3}}, float zero = {{0}}, float six = {{6}}>
        {{ y = If(k) <
            then_branch = t () => (float[2,3] p) {{ {act.format(1, "x")} {act.format(2, "r1")} p = Neg(r2) }},
            else_branch = e () => (float[2,3] q) {{ q = Neg(x) }}> }}"""
    )
    before = model.clone()
    assert run_pass(FuseHardswish(), model)[0] == 2
    assert op_counts(model) == {"If": 1, "HardSwish": 2, "Neg": 2}
    assert_same(before, model)
