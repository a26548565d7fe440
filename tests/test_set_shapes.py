"""Pinning dynamic dimensions."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from effdl.errors import UsageError
from effdl.graph import io
from effdl.graph.shapes import dynamic_dims
from effdl.passes.set_shapes import SetShapes
from effdl.passes.simplify import Simplify
from tests.support import assert_same, from_text, op_counts, run_pass

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[batch,length,4] x, float[batch,?,4] z) => (float[batch,m,2] y, float[rows,4] u)
<int64[3] s = {0,-1,2}, int64[2] t = {-1,4}, float[batch,length,4] r>
{ r = Relu(x)  y = Reshape(r, s)  v = Sigmoid(z)  u = Reshape(v, t) }"""


def shapes(model: object) -> list[str]:
    graph = model.graph  # type: ignore[attr-defined]
    return [str(v.shape) for v in (*graph.inputs, *graph.outputs)]


def test_names_and_axes_are_pinned_everywhere() -> None:
    model = from_text(TEXT)
    before = model.clone()
    step = SetShapes(dims={"batch": 2, "z:1": 5})
    changes, log = run_pass(step, model)
    assert changes == 5
    assert ("batch", "pinned to 2") in log.touched
    assert shapes(model) == ["[2,length,4]", "[2,5,4]", "[2,m,2]", "[10,4]"]
    assert str(model.graph[0].outputs[0].shape) == "[2,length,4]"
    data = io.to_bytes(model)
    assert run_pass(step, model)[0] == 0
    assert io.to_bytes(model) == data
    assert sorted(dynamic_dims(model)) == ["length"]
    assert before.graph.inputs[0].shape is not None
    assert str(before.graph.inputs[0].shape) == "[batch,length,4]"


def test_outputs_follow_and_results_stay() -> None:
    model = from_text(TEXT)
    before = model.clone()
    run_pass(SetShapes(dims={"batch": 2, "length": 3, "z:1": 2}), model)
    assert shapes(model) == ["[2,3,4]", "[2,2,4]", "[2,6,2]", "[4,4]"]
    assert_same(before, model, length=3)


def test_an_axis_names_its_dimension_too() -> None:
    model = from_text(TEXT)
    run_pass(SetShapes(dims={"x:0": 3}), model)
    assert shapes(model)[1].startswith("[3,")
    assert run_pass(SetShapes(dims={"x:0": 3}), model)[0] == 0


def test_simplify_finds_more_afterwards() -> None:
    model = from_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[n,c,4] x) => (float[n,k] y)
        <int64 zero = {0}, int64[1] ax = {0}, int64[1] m = {-1}>
        { s = Shape(x)  d = Gather(s, zero)  e = Unsqueeze(d, ax)  q = Concat<axis = 0>(e, m)
          y = Reshape(x, q) }"""
    )
    before = model.clone()
    run_pass(SetShapes(dims={"n": 2, "c": 3}), model)
    assert shapes(model)[1] == "[2,12]"
    run_pass(Simplify(), model)
    assert op_counts(model) == {"Reshape": 1}
    assert_same(before, model, c=3)


@pytest.mark.parametrize(
    ("dims", "text", "hint"),
    [
        ({"bach": 1}, "no dimension 'bach'", "did you mean 'batch'?"),
        ({"x:2": 8}, "fixed at 4", ""),
        ({"batch": 2, "x:0": 3}, "two values", ""),
    ],
)
def test_what_does_not_fit_is_refused(dims: dict[str, int], text: str, hint: str) -> None:
    model = from_text(TEXT)
    before = io.to_bytes(model)
    with pytest.raises(UsageError, match=text) as e:
        run_pass(SetShapes(dims=dims), model)
    assert e.value.hint == hint
    assert io.to_bytes(model) == before


def test_a_second_size_contradicts_the_first() -> None:
    model = from_text(TEXT)
    run_pass(SetShapes(dims={"batch": 2}), model)
    with pytest.raises(UsageError, match="already pinned to 2, not 3"):
        run_pass(SetShapes(dims={"batch": 3}), model)


def test_a_fixed_axis_of_the_same_size_is_nothing_to_do() -> None:
    assert run_pass(SetShapes(dims={"x:2": 4}), from_text(TEXT))[0] == 0


@pytest.mark.parametrize("dims", [{}, {"batch": 0}, {"batch": "two"}, {"batch": 1.5}, None])
def test_option_values_are_checked(dims: object) -> None:
    with pytest.raises(ValidationError):
        SetShapes.model_validate({"dims": dims})
