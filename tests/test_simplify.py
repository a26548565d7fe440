"""Simplification: every rule against ONNX Runtime, on a model where it applies and one where it must not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from effdl.graph import io
from effdl.graph.identities import holds_exactly
from effdl.graph.walk import interface
from effdl.passes.base import PassLog
from effdl.passes.simplify import Simplify
from tests.support import (
    assert_same,
    feed_for,
    from_text,
    op_counts,
    outputs,
    run_pass,
)

HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'


def simplified(
    text: str | ir.Model, ops: dict[str, int], step: Simplify | None = None, **dims: int
) -> tuple[ir.Model, PassLog]:
    """Simplify, compare in ONNX Runtime, check the operators left and that a second run does nothing."""
    model = from_text(HEAD + text) if isinstance(text, str) else text
    before = model.clone()
    data = io.to_bytes(before)
    step = step or Simplify()
    changes, log = run_pass(step, model)
    assert op_counts(model) == ops
    assert interface(model) == interface(before)
    assert io.to_bytes(before) == data, "the snapshot was touched"
    feed = feed_for(before, **dims)
    for optimize in (True, False):
        got = outputs(model, feed, optimize=optimize)
        for a, b in zip(outputs(before, feed, optimize=optimize), got, strict=True):
            np.testing.assert_array_equal(a, b)
    after = io.to_bytes(model)
    assert (changes == 0) == (after == data)
    assert run_pass(step, model)[0] == 0
    assert io.to_bytes(model) == after
    return model, log


def one(line: str, shape: str = "float[2,3,4]", out: str = "float[a,b,c]", extra: str = "") -> str:
    """A graph of one line from x to y, with a Relu before so that y can be rerouted."""
    return f"g ({shape} x) => ({out} y) {extra} {{ h = Relu(x) {line} }}"


NOTHING = [
    ("y = Identity(h)", ""),
    ("y = Cast<to = 1>(h)", ""),
    ("y = CastLike(h, x)", ""),
    ("y = Transpose<perm = [0,1,2]>(h)", ""),
    ("y = Reshape(h, s)", "<int64[3] s = {2,3,4}>"),
    ("y = Reshape(h, s)", "<int64[3] s = {0,-1,4}>"),
    ("s = Shape(h) y = Reshape(h, s)", ""),
    ("s = Shape(h) y = Expand(h, s)", ""),
    ("y = Expand(h, s)", "<int64[2] s = {1,1}>"),
    ("y = Slice(h, s, e)", "<int64[1] s = {0}, int64[1] e = {9223372036854775807}>"),
    ("y = Slice(h, s, e, a)", "<int64[1] s = {0}, int64[1] e = {3}, int64[1] a = {1}>"),
    ("y = Pad(h, p)", "<int64[6] p = {0,0,0,0,0,0}>"),
    ("y = Tile(h, p)", "<int64[3] p = {1,1,1}>"),
    ("y = Dropout(h)", ""),
    ("y, m = Dropout(h, r, t)", "<float r = {0.5}, bool t = {0}>"),
    ("y = Concat<axis = 1>(h)", ""),
    ("y = Split<axis = 0>(h)", ""),
    ("y = Sum(h)", ""),
    ("y = Max(h)", ""),
    ("y = Mean(h)", ""),
    ("y = Add(h, c)", "<float c = {0}>"),
    ("y = Add(c, h)", "<float[1,1] c = {0}>"),
    ("y = Add(h, c)", "<float[4] c = {0,0,0,0}>"),
    ("y = Sub(h, c)", "<float c = {0}>"),
    ("y = Mul(c, h)", "<float[1] c = {1}>"),
    ("y = Div(h, c)", "<float c = {1}>"),
    ("y = Pow(h, c)", "<float c = {1}>"),
    ("y = Relu(h)", ""),
    ("n = Neg(h) y = Neg(n)", ""),
    ("t = Transpose<perm = [1,0,2]>(h) y = Transpose<perm = [1,0,2]>(t)", ""),
    ("t = Transpose(h) y = Transpose(t)", ""),
    ("t = Cast<to = 11>(h) y = Cast<to = 1>(t)", ""),
    ("u = Unsqueeze(h, a) y = Squeeze(u, a)", "<int64[1] a = {1}>"),
    ("u = Reshape(h, a) y = Reshape(u, b)", "<int64[1] a = {-1}, int64[3] b = {2,3,4}>"),
    ("b = And(t, o) y = Where(b, h, h)", "<bool t = {1}, bool o = {1}>"),
]


@pytest.mark.parametrize(("line", "weights"), NOTHING[:-1])
def test_what_does_nothing_goes(line: str, weights: str) -> None:
    simplified(one(line, extra=weights), {"Relu": 1})


@pytest.mark.parametrize(("line", "weights"), NOTHING[:-1])
def test_the_same_with_dynamic_shapes_stays_right(line: str, weights: str) -> None:
    """Shapes are not known there: some rules do not apply, none may change an output."""
    model = from_text(HEAD + one(line, shape="float[i,j,k]", extra=weights))
    before = model.clone()
    run_pass(Simplify(), model)
    assert_same(before, model, rtol=0, atol=0, i=2, j=3, k=4)
    assert run_pass(Simplify(), model)[0] == 0


SOMETHING = [
    ("y = Cast<to = 11>(h)", "", "Cast", "double[a,b,c]"),
    ("y = Transpose<perm = [2,1,0]>(h)", "", "Transpose", None),
    ("y = Reshape(h, s)", "<int64[3] s = {3,2,4}>", "Reshape", None),
    ("y = Expand(h, s)", "<int64[4] s = {1,1,1,1}>", "Expand", "float[a,b,c,d]"),
    ("y = Expand(h, s)", "<int64[4] s = {2,1,1,1}>", "Expand", "float[a,b,c,d]"),
    ("y = Slice(h, s, e)", "<int64[1] s = {1}, int64[1] e = {100}>", "Slice", None),
    (
        "y = Slice(h, s, e, a, t)",
        "<int64[1] s={2}, int64[1] e={-100}, int64[1] a={1}, int64[1] t={-1}>",
        "Slice",
        None,
    ),
    ("y = Pad(h, p)", "<int64[6] p = {0,0,0,0,0,1}>", "Pad", None),
    ("y = Tile(h, p)", "<int64[3] p = {1,2,1}>", "Tile", None),
    ("y = Add(h, c)", "<float[1,1,1,1] c = {0}>", "Add", "float[a,b,c,d]"),
    ("y = Add(h, c)", "<float[5,1,1,1] c = {0,0,0,0,0}>", "Add", "float[a,b,c,d]"),
    ("y = Sub(c, h)", "<float c = {0}>", "Sub", None),
    ("y = Mul(h, c)", "<float c = {0}>", "Mul", None),
    ("y = Div(c, h)", "<float c = {1}>", "Div", None),
    ("y = Mul(h, c)", "<float[4] c = {1,1,1,2}>", "Mul", None),
]


@pytest.mark.parametrize(("line", "weights", "op", "out"), SOMETHING)
def test_what_does_something_stays(line: str, weights: str, op: str, out: str | None) -> None:
    simplified(one(line, extra=weights, out=out or "float[a,b,c]"), {"Relu": 1, op: 1})


def test_training_dropout_stays_and_says_why() -> None:
    model = from_text(
        HEAD
        + """g (float[64] x) => (float[64] y, float[64] z) <float r = {0.5}, bool t = {1}>
        { h = Relu(x)  y = Dropout(h, r, t)  z = Dropout(h, r, t) }"""
    )
    changes, log = run_pass(Simplify(), model)
    assert changes == 0
    assert ("Dropout", "this Dropout is in training mode") in log.skipped


def test_narrowing_casts_stay() -> None:
    simplified(
        one("t = Cast<to = 10>(h) y = Cast<to = 1>(t)"), {"Relu": 1, "Cast": 2}
    )  # float16 in between
    simplified(
        "g (int64[4] x) => (int64[4] y) { t = Cast<to = 1>(x)  y = Cast<to = 7>(t) }", {"Cast": 2}
    )
    simplified(
        "g (int32[4] x) => (float16[4] y) { t = Cast<to = 11>(x)  y = Cast<to = 10>(t) }",
        {"Cast": 1},
    )
    simplified(
        "g (float[4] x) => (int32[4] y) { t = Cast<to = 11>(x)  y = Cast<to = 6>(t) }", {"Cast": 2}
    )


@pytest.mark.parametrize("wide", ["FLOAT16", "FLOAT", "DOUBLE", "INT8", "UINT8", "INT32", "INT64"])
@pytest.mark.parametrize("narrow", ["BOOL", "FLOAT16", "FLOAT", "INT8", "UINT8", "INT16", "UINT16"])
def test_exact_casts_by_brute_force(wide: str, narrow: str) -> None:
    small = ir.DataType[narrow].numpy()
    if narrow == "BOOL":
        values = np.array([False, True])
    elif narrow == "FLOAT":
        values = np.array([1.5, 3e38, 1e-45, -0.1, 16777217], small)
    else:
        bits = small.itemsize * 8
        values = np.arange(1 << bits, dtype=f"uint{bits}").view(small)
        values = values[np.isfinite(values)]
    with np.errstate(all="ignore"):
        back = values.astype(ir.DataType[wide].numpy()).astype(small)
    exact = bool((back == values).all())
    if ir.DataType[wide] != ir.DataType[narrow]:
        fits = holds_exactly(ir.DataType[wide], ir.DataType[narrow])
        assert not (fits and not exact)
        if np.dtype(ir.DataType[wide].numpy()).kind == "f":
            assert fits == exact


def test_chains_of_views_become_one() -> None:
    simplified(
        """g (float[2,3,4] x) => (float[6,4] y) <int64[1] a = {1}, int64[2] s = {6,4}>
        { h = Relu(x)  b = Unsqueeze(h, a)  c = Unsqueeze(b, a)  d = Squeeze(c, a)  y = Reshape(d, s) }""",
        {"Relu": 1, "Reshape": 1},
    )


def test_transposes_merge() -> None:
    model, _ = simplified(
        one("t = Transpose<perm = [1,2,0]>(h) y = Transpose<perm = [2,1,0]>(t)"),
        {"Relu": 1, "Transpose": 1},
    )
    assert tuple(model.graph[1].attributes["perm"].as_ints()) == (0, 2, 1)


def test_a_constant_that_is_an_output_needs_no_identity() -> None:
    text = "g (float[2] x) => (float[2] y, float[2] z) <float[2] w = {1, 2}> { y = Abs(x) z = Identity(w) }"
    model, _ = simplified(text, {"Abs": 1, "Constant": 1})
    assert not model.graph.initializers


def test_a_constant_condition_of_a_loop_is_said_in_its_body() -> None:
    simplified(
        """g (float[2] x) => (float[2] y) <int64 n = {3}, bool go = {1}> {
            y = Loop (n, go, x) <body = b (int64 i, bool c, float[2] s) => (bool d, float[2] t) {
                t = Exp (s)
                d = Identity (go)
            }>
        }""",
        {"Loop": 1, "Exp": 1, "Constant": 1},
    )
