"""Positions of elements sent through operators that only move them, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.graph.movement import Origin, factor, origins, positions
from effdl.graph.probes import Probes, probe
from effdl.runtime.session import open_session
from tests.attention_graphs import Graph
from tests.support import from_text

HEAD = '<ir_version: 8, opset_import: ["": 17]>'


def moves(g: Graph, value: str, rank: int, draw: Any) -> tuple[str, int]:
    """Add one operator that works at any size of a tensor whose last axis is 12."""
    kind = draw(st.sampled_from(["turn", "split", "slice", "gather", "fold", "one", "wide", "mul"]))
    match kind:
        case "turn":
            perm = draw(st.permutations(range(rank - 1)))
            return g.op("Transpose", value, perm=[*perm, rank - 1]), rank
        case "split":
            sizes = draw(st.sampled_from([[4, 8], [6, 6], [1, 4, 7]]))
            return g.split(value, sizes, -1)[draw(st.integers(0, len(sizes) - 1))], -rank
        case "slice":
            start, end = draw(st.sampled_from([(0, 5), (-4, 2**63 - 1), (3, -1), (0, 100)]))
            step = draw(st.sampled_from([1, 2]))
            cut = g.op("Slice", value, g.ints(start), g.ints(end), g.ints(-1), g.ints(step))
            return cut, -rank
        case "gather":
            where = draw(st.sampled_from([[0], [-1, 3], [[1, 2], [0, 0]]]))
            return g.op("Gather", value, g.const(where, np.int64), axis=-1), -(
                rank + np.ndim(where) - 1
            )
        case "fold":
            return g.reshape(value, *[0] * (rank - 1), 3, 4), -(rank + 1)
        case "one":
            return g.axes("Unsqueeze", value, 0), rank + 1
        case "wide":
            return g.op("Expand", value, g.ints(2, *[1] * rank)), rank + 1
    return g.op("Mul", g.const([2.0]), value), rank


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.data(), st.sampled_from([11, 13, 17]))
def test_every_chain(data: st.DataObject, opset: int) -> None:
    g = Graph(opset)
    value, rank = g.input("x", ["B", "S", 12]), 3
    for _ in range(data.draw(st.integers(1, 4))):
        value, rank = moves(g, value, rank, data.draw)
        if rank < 0:  # the last axis is no longer 12
            break
    g.output(value, abs(rank))
    model = g.model()
    shapes = probe(model)
    *_, last = origins(model.graph.outputs[0], shapes)
    assert last.value is model.graph.inputs[0]
    found = positions(last, shapes)
    assert found is not None
    session = open_session(model)
    for array, known in zip(found, shapes.shapes, strict=True):
        x = np.arange(known.dims["B"] * known.dims["S"] * 12, dtype=np.float32)
        (got,) = session.run({"x": x.reshape(known.dims["B"], -1, 12)}).values()
        np.testing.assert_array_equal(array * last.scale, got)


def traced(text: str) -> tuple[Origin, Probes]:
    model = from_text(text)
    shapes = probe(model)
    *_, last = origins(model.graph.outputs[0], shapes)
    return last, shapes


@pytest.mark.parametrize(
    "body",
    [
        "y = Slice(x, zero, forty, one)",  # all of it at small sizes only
        "y = Slice(x, minus, last, one)",
        "y = Gather<axis = 1>(x, forty)",  # not there at small sizes
        "y = Gather<axis = 1>(x, i)",
        "y = Slice(x, last, zero, one, back)",
        "y = Slice(x, i, forty, one)",
    ],
)
def test_what_cannot_be_followed(body: str) -> None:
    origin, shapes = traced(
        f"""{HEAD} g (float[B,S,4] x, int64[1] i) => (float[B,T,4] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] forty = {{40}},
         int64[1] minus = {{-16}}, int64[1] last = {{9223372036854775807}}, int64[1] back = {{-1}}>
        {{ {body} }}"""
    )
    assert origin.value.name == "x"
    assert positions(origin, shapes) is None


def test_slices_that_mean_the_same_at_every_length() -> None:
    for body, count in (
        ("Slice(x, zero, last, one)", 37),
        ("Slice(x, one, last, one)", 36),
        ("Slice(x, zero, minus, one)", 36),
        ("Slice(x, zero, one, one)", 1),
    ):
        origin, shapes = traced(
            f"""{HEAD} g (float[B,S,4] x) => (float[B,T,4] y)
            <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] minus = {{-1}},
             int64[1] last = {{9223372036854775807}}> {{ y = {body} }}"""
        )
        found = positions(origin, shapes)
        assert found is not None
        assert found[1].shape == (3, count, 4)


def test_the_scale_on_the_way() -> None:
    origin, shapes = traced(
        f"""{HEAD} g (float[B,4] x, float f) => (float[B,4] y)
        <float two = {{2.0}}, float[1,1,1] high = {{3.0}}> {{
            a = Tanh(x) b = Mul(two, a) c = Div(b, two) d = Div(c, two) y = Identity(d) }}"""
    )
    assert origin.scale == 0.5
    assert [n.op_type for n in origin.nodes] == ["Mul", "Div", "Div", "Identity"]
    for body in ("Div(two, x)", "Mul(high, x)", "Mul(f, x)", "Div(x, none)", "Add(x, two)"):
        model = from_text(
            f"""{HEAD} g (float[B,4] x, float f) => (float[B,B,4] y)
            <float two = {{2.0}}, float none = {{0.0}}, float[1,1,1] high = {{3.0}}>
            {{ y = {body} }}"""
        )
        node = model.graph.node(0)
        assert isinstance(node, ir.Node)
        assert factor(node, shapes) is None, body


def test_what_is_too_large_or_empty() -> None:
    for shape in ("100000,100000", "0,4"):
        origin, shapes = traced(
            f"{HEAD} g (float[{shape}] x) => (float[a,b] y) {{ y = Identity(x) }}"
        )
        assert positions(origin, shapes) is None
