"""Neighbours that become one: each rule on a graph where it applies and on ones where it must not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.passes.simplify import Simplify
from tests.support import assert_same, from_text, op_counts, run_pass
from tests.test_simplify import HEAD, simplified

OLD = '<ir_version: 6, opset_import: ["": 9]>\n'


def shrinks(text: str, ops: dict[str, int], **dims: int) -> None:
    """As ``simplified``, but equal up to rounding only."""
    model = from_text(HEAD + text)
    before = model.clone()
    run_pass(Simplify(), model)
    assert op_counts(model) == ops
    assert_same(before, model, rtol=1e-6, **dims)
    assert run_pass(Simplify(), model)[0] == 0


MERGED = [
    # concats
    (
        "(float[2,3] a, float[n,3] b) => (float[m,3] y) {c = Concat<axis=0>(a, b) y = Concat<axis=0>(c, a)}",
        {"Concat": 1},
    ),
    (
        "(float[2,3] a) => (float[m,k] y) {c = Concat<axis=1>(a, a) y = Concat<axis=-1>(a, c)}",
        {"Concat": 1},
    ),
    (
        "(float[2,3] a) => (float[m,k] y) <float[0,3] e = {}> {c = Concat<axis=0>(a, e, a) y = Relu(c)}",
        {"Concat": 1, "Relu": 1},
    ),
    (
        "(float[4,3] a) => (float[m,k] y) {r = Relu(a) p, q = Split<axis=0>(r) y = Concat<axis=0>(p, q)}",
        {"Relu": 1},
    ),
    # slices
    (
        """(float[n,8,8] x) => (float[a,b,c] y)
        <int64[1] s={1}, int64[1] e={7}, int64[1] one={1}, int64[1] two={2}>
        {h = Slice(x, s, e, one, two) y = Slice(h, s, e, two)}""",
        {"Slice": 1},
    ),
    (
        """(float[n,8] x) => (float[a,b] y) <int64[1] s={1}, int64[1] e={7}, int64[1] ax={-1}>
        {h = Slice(x, s, e, ax) y = Slice(h, s, e, ax)}""",
        {"Slice": 1},
    ),
    (
        """(float[n,8,8] x) => (float[a,b,c] y, float[d,f,g] z)
        <int64[1] s={1}, int64[1] e={7}, int64[1] one={1}, int64[1] two={2}>
        {h = Slice(x, s, e, one) y = Slice(h, s, e, two) z = Slice(h, one, e, two)}""",
        {"Slice": 2},
    ),
    # axes
    (
        """(float[n,m] x) => (float[a,b,c,d] y) <int64[1] one={1}, int64[1] last={-1}>
        {h = Unsqueeze(x, one) y = Unsqueeze(h, last)}""",
        {"Unsqueeze": 1},
    ),
    (
        """(float[1,m,1,n] x) => (float[a,b] y) <int64[1] zero={0}, int64[1] one={1}>
        {h = Squeeze(x, zero) y = Squeeze(h, one)}""",
        {"Squeeze": 1},
    ),
    (
        """(int64[5] x, int64[2] w) => (int64[a] y) <int64 i={3}, int64[1] zero={0}>
        {h = Gather(x, i) u = Unsqueeze(h, zero) y = Concat<axis=0>(u, w)}""",
        {"Gather": 1, "Concat": 1},
    ),
    # reductions
    (
        """(float[n,3,4] x) => (float[a,b,c] y) <int64[1] ax={1}>
        {h = ReduceMean<axes=[1], keepdims=0>(x) y = Unsqueeze(h, ax)}""",
        {"ReduceMean": 1},
    ),
    (
        """(float[n,3,4] x) => (float[a,b] y) <int64[1] ax={-2}, int64[1] b={1}>
        {h = ReduceSum(x, ax) y = Squeeze(h, b)}""",
        {"ReduceSum": 1},
    ),
    (
        """(float[n,3] x) => (int64[a] y) <int64[1] b={1}>
        {h = ArgMax<axis=1>(x) y = Squeeze(h, b)}""",
        {"ArgMax": 1},
    ),
    # Gemm
    (
        """(float[4,n] x, float[3,4] w) => (float[a,b] y)
        {t = Transpose(x) u = Transpose<perm=[1,0]>(w) y = Gemm(t, u)}""",
        {"Gemm": 1},
    ),
    # conditions, limits
    (
        """(bool[3] c, float[3] a, float[3] b) => (float[3] y) {n = Not(c) y = Where(n, a, b)}""",
        {"Where": 1},
    ),
    (
        """(float[9] x) => (float[9] y) <float l={-0.5}, float h={0.7}, float k={0.2}>
        {c = Clip(x, l, h) y = Clip(c, , k)}""",
        {"Clip": 1},
    ),
    ("(float[3] x) => (float[3] y) {r = Relu(x) y = Max(r, r)}", {"Relu": 1}),
    # Expand
    (
        """(float[1,k] x, float[n,k] z) => (float[a,b] y) {s = Shape(z) e = Expand(x, s) y = Add(e, z)}""",
        {"Add": 1},
    ),
    (
        """(bool[k] c, float[n,k] z) => (float[a,b] y) <float zero = {0}>
        {s = Shape(z) e = Expand(c, s) y = Where(e, z, zero)}""",
        {"Where": 1},
    ),
]


@pytest.mark.parametrize(("graph", "ops"), MERGED)
def test_they_become_one(graph: str, ops: dict[str, int]) -> None:
    simplified("g " + graph, ops)


KEPT = [
    "(float[2,3] a) => (float[m,k] y) {c = Concat<axis=1>(a, a) y = Concat<axis=0>(c, c)}",
    "(float[2,3] a) => (float[m,k] y, float[p,q] c) {c = Concat<axis=1>(a, a) y = Concat<axis=1>(c, a)}",
    "(float[4,3] a) => (float[m,k] y) {r = Relu(a) p, q = Split<axis=0>(r) y = Concat<axis=0>(q, p)}",
    # a step, or an end that counts from the back, along the same axis
    """(float[n,8] x) => (float[a,b] y) <int64[1] s={1}, int64[1] e={7}, int64[1] ax={1}, int64[1] t={2}>
        {h = Slice(x, s, e, ax, t) y = Slice(h, s, e, ax)}""",
    """(float[n,8] x) => (float[a,b] y) <int64[1] s={1}, int64[1] e={-1}, int64[1] ax={1}>
        {h = Slice(x, s, e, ax) y = Slice(h, s, e, ax)}""",
    """(float[n,8] x) => (float[a,b] y, float[c,d] z) <int64[1] s={1}, int64[1] e={7}, int64[1] ax={1}>
        {h = Slice(x, s, e, ax) y = Slice(h, s, e, ax) z = Relu(h)}""",
    """(float[n,3,4] x) => (float[a,b,c] y) <int64[1] ax={2}>
        {h = ReduceMean<axes=[1], keepdims=0>(x) y = Unsqueeze(h, ax)}""",
    """(float[4,n] x, float[3,4] w) => (float[a,b] y, float[n,4] t) {t = Transpose(x) y = Gemm(t, w)}
    """.replace("[3,4]", "[4,3]"),
    """(float[9] x) => (float[9] y) <float l={0.5}, float h={0.1}> {c = Clip(x, l) y = Clip(c, , h)}""",
    """(float[1,k] x, float[1,k] z) => (float[a,b] y) <int64[2] s={2,1}>
        {e = Expand(x, s) y = Add(e, z)}""",
    """(float[1,k] x, float[n,k] z) => (float[a,b] y, float[n,k] e)
        {s = Shape(z) e = Expand(x, s) y = Add(e, z)}""",
]


@pytest.mark.parametrize("graph", KEPT)
def test_they_stay_two(graph: str) -> None:
    model = from_text(HEAD + "g " + graph)
    before = op_counts(model)
    copy = model.clone()
    run_pass(Simplify(), model)
    assert op_counts(model) == before
    assert_same(copy, model, rtol=0, atol=0, n=5)


def test_factors_become_one() -> None:
    head = "g (float[n,4] x) => (float[n,4] y) <float a = {0.3}, float[4] b = {1,2,3,0.5}>"
    shrinks(head + "{h = Mul(x, a) y = Mul(b, h)}", {"Mul": 1})


@pytest.mark.parametrize("a", ["1e30", "0", "-1e-30"])
def test_factors_that_could_overflow_stay(a: str) -> None:
    head = f"g (float[n,4] x) => (float[n,4] y) <float a = {{{a}}}, float b = {{2}}>"
    simplified(head + "{h = Mul(x, a) y = Mul(b, h)}", {"Mul": 2})


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ("ConstantOfShape(s)", {}),
        ("ConstantOfShape<value = float[1] {1}>(s)", {"ConstantOfShape": 1}),
    ],
)
def test_a_state_of_zeros_is_left_out(state: str, kept: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    numbers = {
        n: ",".join(f"{v:.3f}" for v in rng.normal(size=s)) for n, s in (("w", 24), ("r", 16))
    }
    graph = f"""g (float[t,b,3] x) => (float[t,1,b,2] y)
        <float[1,8,3] w = {{{numbers["w"]}}}, float[1,8,2] r = {{{numbers["r"]}}},
         int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] three = {{3}}>
        {{ d = Shape(x) n = Slice(d, one, two) s = Concat<axis=0>(one, n, two) z = {state}
           y = LSTM<hidden_size = 2>(x, w, r, , , z, z) }}"""
    sizes = {"Shape": 1, "Concat": 1} if kept else {}
    simplified(graph, {"LSTM": 1, **kept, **sizes})


def test_old_slices_keep_their_attributes() -> None:
    model = from_text(
        OLD
        + """g (float[n,8,8] x) => (float[a,b,c] y)
        {h = Slice<axes=[1], starts=[1], ends=[7]>(x) y = Slice<axes=[2], starts=[0], ends=[3]>(h)}"""
    )
    before = model.clone()
    run_pass(Simplify(), model)
    assert op_counts(model) == {"Slice": 1}
    assert_same(before, model, rtol=0, atol=0)


axis_lists = st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True)


@settings(max_examples=25, deadline=None)
@given(first=axis_lists, second=axis_lists, squeeze=st.booleans())
def test_any_axes(first: list[int], second: list[int], squeeze: bool) -> None:
    """Two Unsqueeze, or the two Squeeze that undo them, in one."""
    a, b = (
        f"int64[{len(x)}] {n} = {{{','.join(map(str, x))}}}"
        for n, x in (("a", first), ("b", second))
    )
    x = np.expand_dims(np.expand_dims(np.zeros((2, 3)), tuple(first)), tuple(second))
    dims = ",".join("1" if d == 1 else f"d{k}" for k, d in enumerate(x.shape))
    sizes = {f"d{k}": d for k, d in enumerate(x.shape) if d > 1}
    if squeeze:
        graph = f"g (float[{dims}] x) => (float[p,q] y) <{a}, {b}> {{h = Squeeze(x, b) y = Squeeze(h, a)}}"
    else:
        out = ",".join(f"o{k}" for k in range(x.ndim))
        graph = f"g (float[p,q] x) => (float[{out}] y) <{a}, {b}> {{h = Unsqueeze(x, a) y = Unsqueeze(h, b)}}"
        sizes = {"p": 2, "q": 3}
    model = from_text(HEAD + graph)
    before = model.clone()
    run_pass(Simplify(), model)
    assert sum(op_counts(model).values()) == 1
    assert_same(before, model, rtol=0, atol=0, **sizes)


spans = st.tuples(st.integers(0, 6), st.integers(0, 9))


@settings(max_examples=25, deadline=None)
@given(first=spans, second=spans, axes=st.tuples(st.integers(0, 1), st.integers(-2, 1)))
def test_any_slices(first: tuple[int, int], second: tuple[int, int], axes: tuple[int, int]) -> None:
    numbers = {
        "s": first[0],
        "e": first[1],
        "t": second[0],
        "f": second[1],
        "a": axes[0],
        "b": axes[1],
    }
    weights = ", ".join(f"int64[1] {n} = {{{v}}}" for n, v in numbers.items())
    model = from_text(
        HEAD
        + f"g (float[m,n] x) => (float[p,q] y) <{weights}> {{h = Slice(x, s, e, a) y = Slice(h, t, f, b)}}"
    )
    before = model.clone()
    run_pass(Simplify(), model)
    assert op_counts(model).get("Slice", 0) <= 1 or first[0] == 0
    assert_same(before, model, rtol=0, atol=0, m=7, n=5)


def test_declared_sizes_are_not_believed_when_inputs_are_dynamic() -> None:
    """Exporters write the sizes of their example into outputs."""
    model = from_text(
        HEAD
        + """g (float[b,4,6] x) => (float[3,4,6] y) <int64[1] i = {0}, int64[2] t = {4,6}>
        {f = Flatten(x) s = Shape(x) n = Gather(s, i) c = Concat<axis=0>(n, t) y = Reshape(f, c)}"""
    )
    before = model.clone()
    run_pass(Simplify(), model)
    assert_same(before, model, rtol=0, atol=0, b=2)


MASKS = [
    # a mask of ones that is expanded to the scores' size
    "z = Expand(one, s) m = Where(z, zero, low) y = Add(h, m)",
    "z = Expand(one, s) c = Cast<to=1>(z) y = Mul(h, c)",
    "z = ConstantOfShape(s) y = Sub(h, z)",
    "z = Expand(one, s) y = Where(z, h, low)",
]
MASK_HEAD = "<bool[1,1] one = {1}, float zero = {0}, float low = {-9999}>"


@pytest.mark.parametrize("line", MASKS)
def test_a_mask_that_masks_nothing_goes(line: str) -> None:
    simplified(
        f"g (float[n,k] x) => (float[a,b] y) {MASK_HEAD} {{h = Relu(x) s = Shape(x) {line}}}",
        {"Relu": 1},
    )


@pytest.mark.parametrize(
    "line",
    [
        "z = Expand(one, s) m = Where(z, low, zero) y = Add(h, m)",
        "z = Expand(one, s) y = Where(z, low, h)",
        "t = Shape(w) z = ConstantOfShape(t) y = Add(h, z)",
    ],
)
def test_a_mask_that_does_something_stays(line: str) -> None:
    model = from_text(
        HEAD
        + f"""g (float[1,k] x, float[n,k] w) => (float[a,b] y) {MASK_HEAD}
        {{h = Relu(x) s = Shape(x) {line}}}"""
    )
    before = model.clone()
    run_pass(Simplify(), model)
    assert_same(before, model, rtol=0, atol=0, n=3)
    assert sum(op_counts(model).values()) > 1


def test_equal_shape_vectors_are_made_once() -> None:
    """Each layer of an export works the sizes out again, from its own tensors."""
    graph = """g (float[n,k] x, float[m] v) => (float[a,b] y, float[c,d] z)
        <int64 zero = {0}, int64[1] ax = {0}, int64[1] two = {2}>
        { h = Relu(x) s = Shape(x) i = Gather(s, zero) u = Unsqueeze(i, ax) p = Concat<axis=0>(u, two)
          q = Shape(h) j = Gather(q, zero) w = Unsqueeze(j, ax) r = Concat<axis=0>(w, two)
          e = ConstantOfShape<value = float[1] {3}>(p) k = Shape<start=1>(h)
          g = Concat<axis=0>(k, two) c = ConstantOfShape(g) y = MatMul(h, c) z = Expand(e, r) }"""
    ops = {"Relu": 1, "Shape": 2, "Concat": 2, "ConstantOfShape": 2, "MatMul": 1}
    simplified(graph, ops)
