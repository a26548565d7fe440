import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.graph import io
from effdl.passes.fuse.rotary import FuseRotary
from tests.support import assert_same, from_text, op_counts, run_pass

NUMBERS = "int64[1] n0 = {0}, int64[1] n4 = {4}, int64[1] n8 = {8}, int64[1] n1 = {1}, int64[1] last = {-1}"
SLICES = "x1 = Slice(x, n0, n4, last) x2 = Slice(x, n4, n8, last)"
TABLES = """s = Shape<start = 2, end = 3>(i) l = Squeeze(s) p = Range(zero, l, one) f = Cast<to = 1>(p)
    u = Unsqueeze(f, n1) m = Mul(u, freq) e = Concat<axis = -1>(m, m) cc = Cos(e) ss = Sin(e)
    c = Unsqueeze(cc, n0) k = Unsqueeze(ss, n0)"""
TURN = "q = Neg(x2) r = Concat<axis = -1>(q, x1) a = Mul(x, c) b = Mul(r, k) t = Add(a, b)"


def text(
    tables: str = TABLES,
    cut: str = SLICES,
    turn: str = TURN,
    *,
    version: int = 17,
    shape: str = "B,H,L,8",
    dtype: str = "float",
    extra: str = "",
    more: str = "",
) -> str:
    out = f", {dtype}[{shape}] z" if extra else ""
    return f"""<ir_version: 8, opset_import: ["": {version}]>
    g ({dtype}[{shape}] i{more}) => ({dtype}[{shape}] y{out})
    <{NUMBERS}, int64[2] halves = {{4, 4}}, int64 zero = {{0}}, int64 one = {{1}},
     float[4] freq = {{1.0, 0.3, 0.1, 0.03}}>
    {{ x = Tanh(i) {tables} {cut} {turn} {extra} y = Neg(t) }}"""


def fused(model_text: str, count: int = 1) -> dict[str, int]:
    model = from_text(model_text)
    before = model.clone()
    changes, log = run_pass(FuseRotary(), model)
    assert (changes, log.skipped) == (count, [])
    for dims in ({"B": 2, "H": 3, "L": 5}, {"B": 1, "H": 1, "L": 1}):
        assert_same(before, model, **dims)
    after = io.to_bytes(model)
    assert run_pass(FuseRotary(), model)[0] == 0
    assert io.to_bytes(model) == after
    return op_counts(model)


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([SLICES, "x1, x2 = Split<axis = -1>(x, halves)"]),
    st.sampled_from(["Mul(x, c)", "Mul(c, x)"]),
    st.sampled_from(["Mul(r, k)", "Mul(k, r)"]),
    st.sampled_from(["Add(a, b)", "Add(b, a)"]),
    st.sampled_from([13, 17]),
)
def test_every_order_is_fused(cut: str, one: str, two: str, total: str, version: int) -> None:
    turn = f"q = Neg(x2) r = Concat<axis = -1>(q, x1) a = {one} b = {two} t = {total}"
    tables = TABLES
    if version < 15:
        tables = tables.replace(
            "s = Shape<start = 2, end = 3>(i)",
            "d = Shape(i) two = Constant<value_ints = [2]>() s = Gather(d, two)",
        )
    counts = fused(text(tables, cut, turn, version=version))
    assert counts["RotaryEmbedding"] == 1
    assert counts.get("Neg") == 1
    assert "Split" not in counts


def test_constant_tables() -> None:
    angles = np.outer(np.arange(3), [1.0, 0.3, 0.1, 0.03])
    table = np.concatenate([angles, angles], axis=1)

    def written(name: str, array: np.ndarray) -> str:
        numbers = ", ".join(f"{v:.6f}" for v in array.ravel())
        return f"float[1,1,3,8] {name} = {{{numbers}}}"

    constants = f"{written('c', np.cos(table))}, {written('k', np.sin(table))}, int64 zero"
    model = text("", shape="B,H,3,8").replace("int64 zero", constants)
    assert fused(model)["RotaryEmbedding"] == 1
    broken = model.replace("float[1,1,3,8] k = {0.000000", "float[1,1,3,8] k = {0.500000")
    changes, log = run_pass(FuseRotary(), from_text(broken))
    assert changes == 0
    assert "'k' may differ between its halves" in log.skipped[0][1]


def test_layers_share_the_half_tables() -> None:
    again = TURN.replace("x2", "w2").replace("x1", "w1").replace("(x, c)", "(w, c)")
    for name in "qrabt":
        again = again.replace(f"{name} = ", f"{name}2 = ")
    again = again.replace("(q,", "(q2,").replace("(r,", "(r2,").replace("(a, b)", "(a2, b2)")
    second = (
        f"w = Exp(i) {SLICES.replace('x1', 'w1').replace('x2', 'w2').replace('(x,', '(w,')} {again}"
    )
    counts = fused(text(extra=f"{second} z = Neg(t2)"), 2)
    assert counts["RotaryEmbedding"] == 2
    assert counts["Slice"] == 2  # one for the cosines, one for the sines


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (text(extra="z = Exp(r)"), "'r' has 2 users"),
        (text(extra="z = Exp(b)"), "'b' has 2 users"),
        (text(extra="z = Exp(a)"), "'a' is also used by Exp"),
        (text(turn=TURN.replace("Mul(x, c)", "Mul(i, c)")), "does not multiply 'x'"),
        (text(turn=TURN.replace("Add(a, b)", "Sub(a, b)")), "goes to Sub"),
        (
            text(
                TABLES.replace("Concat<axis = -1>(m, m)", "Concat<axis = -1>(m, u2)").replace(
                    "e = ", "u2 = Exp(m) e = "
                )
            ),
            "may differ between its halves",
        ),
        (text(TABLES.replace("Range(zero", "Range(one")), "is not known to be that of 'x'"),
        (text(TABLES.replace("start = 2, end = 3", "start = 1, end = 2")), "is not known"),
        (text("", more=", float[B,1,L,8] c, float[B,1,L,8] k"), "the same for the whole batch"),
        (text("", more=", float[1,1,L,8] c, float[1,1,L,8] k"), "may differ between its halves"),
        (text("", shape="H,L,8", more=", float[L,8] c, float[L,8] k"), "has 3 dimensions"),
        (text("", dtype="double", more=", double[L,8] c, double[L,8] k"), "is DOUBLE"),
    ],
)
def test_near_misses_are_left_with_the_reason(model: str, reason: str) -> None:
    loaded = from_text(model)
    before = io.to_bytes(loaded)
    changes, log = run_pass(FuseRotary(), loaded)
    assert changes == 0
    assert io.to_bytes(loaded) == before
    assert len(log.skipped) == 1
    assert reason in log.skipped[0][1]


@pytest.mark.parametrize(
    "cut",
    [
        "x1 = Slice(x, n4, n8, last) x2 = Slice(x, n0, n4, last)",
        "x1 = Slice(x, n0, n4, last) x2 = Slice(i, n4, n8, last)",
        "x2, x1 = Split<axis = -1>(x, halves)",
    ],
)
def test_other_pieces_are_no_candidates(cut: str) -> None:
    changes, log = run_pass(FuseRotary(), from_text(text(cut=cut)))
    assert (changes, log.skipped) == (0, [])
