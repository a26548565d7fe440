"""What is remembered of a model is forgotten with any edit."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from effdl.graph.shapes import infer
from effdl.graph.unchanged import recall, remember, remembered
from effdl.passes.base import Context
from effdl.passes.simplify import Simplify
from effdl.runtime.target import parse_target


def model() -> ir.Model:
    return ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 18]>
        g (float[n, 4] x, bool c) => (float[n, k] y)
        <float[2] w = {1, 2}> {
            s = Shape (x)
            z = Relu (x)
            t = If (c) <
                then_branch = a () => (float[m, k] p) { p = Abs (z) },
                else_branch = b () => (float[m, k] q) { q = Neg (z) }
            >
            y = Reshape (t, s)
        }"""
    )


def inner_operator(m: ir.Model) -> None:
    branch = m.graph.node(2).attributes["then_branch"].as_graph()
    branch.node(0).op_type = "Neg"


def constant(m: ir.Model) -> None:
    weight = m.graph.initializers["w"]
    weight.const_value = ir.tensor(np.array([3, 4], np.float32), name="w")


EDITS: dict[str, Callable[[ir.Model], object]] = {
    "operator": lambda m: setattr(m.graph.node(1), "op_type", "Abs"),
    "operator in a branch": inner_operator,
    "input": lambda m: m.graph.node(3).replace_input_with(0, m.graph.inputs[0]),
    "attribute": lambda m: m.graph.node(0).attributes.add(ir.AttrInt64("end", 1)),
    "declared shape": lambda m: setattr(m.graph.inputs[0], "shape", ir.Shape([3, 4])),
    "declared type": lambda m: setattr(
        m.graph.inputs[0], "type", ir.TensorType(ir.DataType.DOUBLE)
    ),
    "numbers of a constant": constant,
    "a new constant": lambda m: m.graph.register_initializer(
        ir.Value(name="v", const_value=ir.tensor([1.0], name="v"))
    ),
    "output": lambda m: m.graph.outputs.append(m.graph.node(0).outputs[0]),
    "opset": lambda m: m.opset_imports.update({"": 19}),
    "name": lambda m: setattr(m.graph.node(1).outputs[0], "name", "other"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_seen(edit: str) -> None:
    m = model()
    count: list[int] = []
    remembered(m, "k", lambda: count.append(1))
    remembered(m, "k", lambda: count.append(1))
    assert len(count) == 1
    EDITS[edit](m)
    assert recall(m, "k") is None
    remembered(m, "k", lambda: count.append(1))
    assert len(count) == 2


def test_models_and_questions_are_kept_apart() -> None:
    m, other = model(), model()
    remember(m, "k", 1)
    assert recall(m, "k") == 1
    assert recall(m, "l") is None
    assert recall(other, "k") is None


def test_inference_is_done_once_for_each_size() -> None:
    m = model()
    first = infer(m)
    assert infer(m) is first
    sized = infer(m, {"n": 3})
    assert sized is not first
    assert sized.static(m.graph.outputs[0]) == (3, 4)
    assert infer(m, {"n": 3}) is sized
    m.graph.inputs[0].shape = ir.Shape([5, 4])
    assert infer(m).static(m.graph.outputs[0]) == (5, 4)


def test_a_second_simplify_tells_the_same_reasons() -> None:
    m = model()
    first, second = (Context(parse_target("cpu")) for _ in range(2))
    while Simplify().run(m, first):
        first = Context(parse_target("cpu"))
    assert Simplify().run(m, second) == 0
    assert second.log.skipped == first.log.skipped
