"""Folding Pad into what reads it, against ONNX Runtime before and after."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from effdl.passes.fold.pad import FoldPad
from tests.folding import check, declined, folded, model_of, node, weight

STEP = FoldPad()
LOW = float(np.finfo(np.float32).min)


def pad_node(
    widths: list[int], weights: dict[str, np.ndarray], opset: int, value: float | None = None
) -> onnx.NodeProto:
    if opset < 11:
        extra: dict[str, Any] = {} if value is None else {"value": value}
        return node("Pad", ["x"], ["p"], name="pad", pads=widths, **extra)
    weights["w_pads"] = np.array(widths, np.int64)
    names = ["x", "w_pads"]
    if value is not None:
        weights["w_value"] = np.array(value, np.float32)
        names.append("w_value")
    return node("Pad", names, ["p"], name="pad")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_convolution(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 3))
    opset = data.draw(st.sampled_from([7, 10, 11, 13, 17]))
    group = data.draw(st.sampled_from([1, 2]))
    weights = {"w": weight(4, 4 // group, *data.draw(st.tuples(*[st.integers(1, 3)] * axes)))}
    sides = st.lists(st.integers(0, 2), min_size=axes, max_size=axes)
    widths = [0, 0, *data.draw(sides), 0, 0, *data.draw(sides)]
    attributes: dict[str, Any] = data.draw(
        st.sampled_from([{}, {"auto_pad": "VALID"}, {"auto_pad": "SAME_UPPER"}, {"pads": 1}])
    )
    if "pads" in attributes:
        attributes = {"pads": data.draw(sides) + data.draw(sides)}
    if attributes.get("auto_pad") != "SAME_UPPER":
        attributes["strides"] = [data.draw(st.integers(1, 2)) for _ in range(axes)]
        attributes["dilations"] = [data.draw(st.integers(1, 2)) for _ in range(axes)]
    nodes = [
        pad_node(widths, weights, opset, data.draw(st.sampled_from([None, 0.0]))),
        node("Conv", ["p", "w"], ["y"], group=group, **attributes),
    ]
    model = model_of(nodes, weights, ["n", 4, *(9,) * axes], opset=opset)
    if any(widths):
        folded(STEP, model, {"Conv": 1})
    else:
        assert check(STEP, model) == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_pool(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 3))
    op = data.draw(st.sampled_from(["AveragePool", "MaxPool"]))
    opset = data.draw(st.sampled_from([8, 10, 11, 17]))
    sides = st.lists(st.integers(0, 2), min_size=axes, max_size=axes)
    kernel = [data.draw(st.integers(1, 4)) for _ in range(axes)]
    own = [min(k - 1, data.draw(st.integers(0, 1))) for k in kernel * 2]
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": [data.draw(st.integers(1, 3)) for _ in range(axes)],
        "pads": own,
        "ceil_mode": data.draw(st.integers(0, 1)) if opset >= 10 else 0,
    }
    if opset < 10:
        del attributes["ceil_mode"]
    if op == "AveragePool":
        attributes["count_include_pad"] = data.draw(st.integers(0, 1))
    weights: dict[str, np.ndarray] = {}
    widths = [0, 0, *data.draw(sides), 0, 0, *data.draw(sides)]
    value = data.draw(st.sampled_from([None, LOW])) if op == "MaxPool" else None
    nodes = [
        node("Relu", ["x"], ["r"]),
        pad_node(widths, weights, opset, value),
        node(op, ["p"], ["y"], **attributes),
    ]
    nodes[1].input[0] = "r" if op == "MaxPool" and value is None else "x"
    model = model_of(nodes, weights, ["n", 2, *(7,) * axes], opset=opset)
    changes = check(STEP, model)
    sums = [a + b for a, b in zip(own, [*widths[2 : 2 + axes], *widths[4 + axes :]], strict=True)]
    fits = any(widths) and all(s < k for s, k in zip(sums, kernel * 2, strict=True))
    counted = op == "MaxPool" or not any(own) or attributes["count_include_pad"]
    assert changes == int(bool(fits and counted and not attributes.get("ceil_mode")))


def padded(
    *behind: onnx.NodeProto, widths: list[int] | None = None, **given: Any
) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    weights = {
        "w": weight(2, 2, 3, 3),
        "k": np.array(widths or [0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        "v": np.array(given.pop("value", 0.0), np.float32),
        "a": np.array(given.pop("axes", [0, 1, 2, 3]), np.int64),
    }
    inputs = given.pop("inputs", ["x", "k", "v"])
    return [node("Pad", inputs, ["p"], name="pad", **given), *behind], weights


CONV = node("Conv", ["p", "w"], ["y"], name="conv")
MAXPOOL = node("MaxPool", ["p"], ["y"], name="pool", kernel_shape=[3, 3])
AVERAGE = node("AveragePool", ["p"], ["y"], name="pool", kernel_shape=[3, 3])
SHAPE: list[int | str] = ["n", 2, 6, 6]


@pytest.mark.parametrize(
    ("behind", "changes", "reason"),
    [
        (CONV, {"value": 1.0}, "it pads with 1"),
        (CONV, {"mode": "reflect", "inputs": ["x", "k"]}, "by mode reflect"),
        (CONV, {"mode": "edge", "inputs": ["x", "k"]}, "by mode edge"),
        (CONV, {"widths": [0, 0, -1, 1, 0, 0, 1, 1]}, "crops"),
        (CONV, {"widths": [1, 0, 1, 1, 0, 0, 1, 1]}, "pads the batch"),
        (CONV, {"widths": [0] * 8}, "pads nothing"),
        (MAXPOOL, {}, "may be lower"),
        (AVERAGE, {"value": 1.0}, "it pads with 1"),
        (AVERAGE, {"widths": [0, 0, 3, 1, 0, 0, 1, 1]}, "whole window"),
        (node("Relu", ["p"], ["y"], name="relu"), {}, "Relu 'relu' reads it"),
        (node("ConvTranspose", ["p", "w"], ["y"]), {}, "no padding of its own"),
        (
            node("Conv", ["p", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2]),
            {},
            "depends on its input's size",
        ),
        (
            node("MaxPool", ["p"], ["y"], kernel_shape=[3, 3], ceil_mode=1),
            {"value": LOW},
            "rounds its size up",
        ),
        (
            node("MaxPool", ["p"], ["y"], kernel_shape=[3, 3], dilations=[2, 2]),
            {"value": LOW},
            "dilated",
        ),
    ],
)
def test_declined(behind: onnx.NodeProto, changes: dict[str, Any], reason: str) -> None:
    nodes, weights = padded(behind, **changes)
    declined(STEP, model_of(nodes, weights, SHAPE), reason)


def test_computed_widths_stay() -> None:
    nodes, weights = padded(CONV, inputs=["x", "k2", "v"])
    nodes.insert(0, node("Abs", ["k"], ["k2"]))
    declined(STEP, model_of(nodes, weights, SHAPE), "computed")


def test_axes_are_an_input_from_opset_18_on() -> None:
    nodes, weights = padded(CONV, widths=[1, 2, 2, 0], inputs=["x", "k", "", "a"], axes=[-1, 2])
    model = folded(STEP, model_of(nodes, weights, SHAPE, opset=18), {"Conv": 1})
    pads = model.graph.node(0).attributes["pads"].as_ints()
    assert tuple(pads) == (2, 1, 0, 2)


def test_all_readers_take_it_or_none() -> None:
    other = node("Conv", ["p", "w2"], ["z"], pads=[1, 0, 0, 1])
    nodes, weights = padded(CONV, other)
    weights["w2"] = weight(3, 2, 2, 2)
    folded(STEP, model_of(nodes, weights, SHAPE, outs=["y", "z"]), {"Conv": 2})
    nodes, weights = padded(CONV, node("Relu", ["p"], ["z"]))
    declined(STEP, model_of(nodes, weights, SHAPE, outs=["y", "z"]), "no padding of its own")
    nodes, weights = padded(CONV)
    declined(STEP, model_of(nodes, weights, SHAPE, outs=["y", "p"]), "output of the graph")


def test_two_pads_in_a_row() -> None:
    nodes, weights = padded(node("Pad", ["p", "k"], ["q"]), node("Conv", ["q", "w"], ["y"]))
    folded(STEP, model_of(nodes, weights, SHAPE), {"Conv": 1})


def test_indices_of_a_pool_would_move() -> None:
    pool = node("MaxPool", ["p"], ["y", "z"], kernel_shape=[3, 3])
    nodes, weights = padded(pool, value=LOW)
    model = model_of(nodes, weights, SHAPE, outs=["y"])
    z = model.graph.node(1).outputs[1]
    z.type, z.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([None] * 4)
    model.graph.outputs.append(z)
    declined(STEP, model, "gives indices")


@pytest.mark.parametrize(("point", "value"), [(3, 3), (3, 0), (0, 0)])
def test_integer_convolutions_pad_with_their_zero_point(point: int, value: int) -> None:
    weights = {
        "w": np.random.default_rng(0).integers(-9, 9, (2, 2, 3, 3)).astype(np.int8),
        "k": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        "v": np.array(value, np.uint8),
        "z": np.array(point, np.uint8),
    }
    nodes = [
        node("Pad", ["x", "k", "v"], ["p"], name="pad"),
        node("ConvInteger", ["p", "w", "z"], ["i"]),
        node("Cast", ["i"], ["y"], to=TensorProto.UINT8),
    ]
    model = model_of(nodes, weights, SHAPE, dtype=TensorProto.UINT8)
    if point == value:
        folded(STEP, model, {"ConvInteger": 1, "Cast": 1})
    else:
        declined(STEP, model, "with 3")


def test_inside_a_subgraph() -> None:
    nodes, weights = padded(CONV)
    branch = helper.make_graph(nodes, "b", [], [helper.make_tensor_value_info("y", 1, [None] * 4)])
    other = helper.make_graph(
        [node("Relu", ["x"], ["r"])], "o", [], [helper.make_tensor_value_info("r", 1, [None] * 4)]
    )
    weights["c"] = np.array(True)
    choice = node("If", ["c"], ["out"], then_branch=branch, else_branch=other)
    model = model_of([choice], weights, SHAPE, outs=["out"])
    folded(STEP, model, {"If": 1, "Conv": 1, "Relu": 1})


def test_a_weight_that_callers_feed_has_the_size_it_is_declared_with() -> None:
    def model(*kernel: int | str) -> ir.Model:
        made = model_of(*padded(CONV), SHAPE)
        weight = made.graph.initializers.pop("w")
        weight.const_value = None
        weight.shape = ir.Shape([3, 2, *kernel])
        made.graph.inputs.append(weight)
        return made

    folded(STEP, model(2, 2), {"Conv": 1})
    declined(STEP, model("h", 2), "window")
