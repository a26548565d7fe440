"""Folding parallel convolutions, against ONNX Runtime before and after."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.graph import io
from effdl.passes.fold.branches import FoldBranches
from effdl.passes.simplify import Simplify
from tests.folding import batchnorm, check, declined, folded, model_of, node, weight
from tests.support import op_counts, run_pass

STEP = FoldBranches()
SHAPE: list[int | str] = ["n", 4, 8, 7]


def conv(out: str, w: str, bias: str | None = None, **attributes: Any) -> onnx.NodeProto:
    names = ["x", w] if bias is None else ["x", w, bias]
    return node("Conv", names, [out], name=f"conv_{out}", **attributes)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_repvgg_and_acnet_blocks(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 3))
    group = data.draw(st.sampled_from([1, 2, 4]))
    stride = data.draw(st.integers(1, 2))
    dilation = data.draw(st.integers(1, 2))
    bypass = data.draw(st.sampled_from(["", "x", "norm"])) if stride == 1 else ""
    weights = batchnorm(4)
    nodes, sums = [], []
    kernels = [(3,) * axes]
    for k in range(data.draw(st.integers(1 if not bypass else 0, 3))):
        kernels.append(tuple(data.draw(st.sampled_from([1, 3])) for _ in range(axes)))
        weights[f"b{k}"] = weight(4, seed=k)
    for k, kernel in enumerate(kernels):
        weights[f"w{k}"] = weight(4, 4 // group, *kernel, seed=k)
        pads = [dilation * (n // 2) for n in kernel] * 2
        steps = {"strides": [stride] * axes, "dilations": [dilation] * axes}
        bias = f"b{k}" if f"b{k}" in weights and data.draw(st.booleans()) else None
        nodes.append(conv(f"c{k}", f"w{k}", bias, group=group, pads=pads, **steps))
        sums.append(f"c{k}")
    if bypass == "norm":
        nodes.append(node("BatchNormalization", ["x", "g", "b", "m", "v"], ["norm"]))
    if bypass:
        sums.append(bypass)
    sums = data.draw(st.permutations(sums))
    if data.draw(st.booleans()):
        nodes.append(node("Sum", sums, ["y"]))
    else:
        for k, name in enumerate(sums[1:]):
            left = sums[0] if k == 0 else f"s{k - 1}"
            nodes.append(node("Add", [left, name], [f"s{k}"]))
        nodes[-1].output[0] = "y"
    model = model_of(nodes, weights, ["n", 4, *(8, 7, 5)[:axes]])
    folded(STEP, model, {"Conv": 1})


def test_other_summands_stay_wherever_they_are() -> None:
    weights = {f"w{k}": weight(4, 4, 3, 3, seed=k) for k in range(4)}
    weights["z"] = weight(1, 4, 1, 1)
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        *(conv(f"c{k}", f"w{k}", **pads) for k in range(4)),
        node("Relu", ["x"], ["r"]),
        node("Add", ["c0", "r"], ["a"]),
        node("Add", ["c1", "c2"], ["b"]),
        node("Sum", ["b", "z", "a"], ["s"]),
        node("Add", ["s", "c3"], ["y"]),
    ]
    folded(STEP, model_of(nodes, weights, SHAPE), {"Conv": 1, "Relu": 1, "Sum": 1})


def test_two_inputs_are_two_groups() -> None:
    weights = {f"w{k}": weight(4, 4, 1, 1, seed=k) for k in range(4)}
    nodes = [
        node("Relu", ["x"], ["r"]),
        *(conv(f"c{k}", f"w{k}") for k in range(4)),
        node("Sum", ["c0", "c1", "c2", "c3"], ["y"]),
    ]
    nodes[2].input[0] = nodes[4].input[0] = "r"
    folded(STEP, model_of(nodes, weights, SHAPE), {"Conv": 2, "Relu": 1, "Sum": 1})


def test_the_input_made_by_a_batch_norm_is_added_as_it_is() -> None:
    weights = {"w": weight(4, 4, 3, 3), **batchnorm(4)}
    nodes = [
        node("BatchNormalization", ["x", "g", "b", "m", "v"], ["h"]),
        node("Conv", ["h", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("Add", ["h", "c"], ["s"]),
        node("Add", ["s", "h"], ["y"]),
    ]
    folded(STEP, model_of(nodes, weights, SHAPE), {"Conv": 1, "BatchNormalization": 1})


PADS = {"pads": [1, 1, 1, 1]}


@pytest.mark.parametrize(
    ("shape", "attributes", "reason"),
    [
        ((4, 4, 3, 3), {"pads": [1, 1, 1, 1], "dilations": [1, 1], "group": 1}, None),
        ((4, 4, 5, 5), {"pads": [2, 2, 2, 2]}, None),
        ((4, 4, 3, 3), {"pads": [2, 2, 2, 2], "dilations": [2, 2]}, "differ in stride"),
        ((4, 2, 3, 3), {"pads": [1, 1, 1, 1], "group": 2}, "differ in stride"),
        ((1, 4, 3, 3), {"pads": [1, 1, 1, 1]}, "differ in stride"),
        ((4, 4, 3, 3), {"auto_pad": "SAME_UPPER"}, None),
    ],
)
def test_what_fits_beside_a_kernel_of_three(
    shape: tuple[int, ...], attributes: dict[str, Any], reason: str | None
) -> None:
    weights = {"w": weight(4, 4, 3, 3), "u": weight(*shape, seed=2)}
    nodes = [conv("a", "w", **PADS), conv("b", "u", **attributes), node("Add", ["a", "b"], ["y"])]
    model = model_of(nodes, weights, SHAPE)
    if reason is None:
        folded(STEP, model, {"Conv": 1})
    else:
        declined(STEP, model, reason)


def test_a_cross_alone_would_cost_more_as_a_square() -> None:
    weights = {"w": weight(4, 4, 1, 3), "u": weight(4, 4, 3, 1)}
    nodes = [
        conv("a", "w", pads=[0, 1, 0, 1]),
        conv("b", "u", pads=[1, 0, 1, 0]),
        node("Add", ["a", "b"], ["y"]),
    ]
    declined(STEP, model_of(nodes, weights, SHAPE), "costs more")


def test_branches_that_others_read_stay() -> None:
    weights = {"w": weight(4, 4, 3, 3), "u": weight(4, 4, 3, 3, seed=2), **batchnorm(4, prefix="n")}
    nodes = [conv("a", "w", **PADS), conv("b", "u", **PADS), node("Add", ["a", "b"], ["y"])]
    declined(STEP, model_of(nodes, weights, SHAPE, outs=["y", "b"]), "also read by others")
    twice = [conv("a", "w", **PADS), conv("b", "w", **PADS), node("Add", ["a", "b"], ["y"])]
    declined(STEP, model_of(twice, weights, SHAPE), "has other users")
    computed = [node("Abs", ["u"], ["u2"]), *nodes]
    computed[2] = conv("b", "u2", **PADS)
    declined(STEP, model_of(computed, weights, SHAPE), "is not constant")
    strided = [conv("a", "w", strides=[2, 2], **PADS), node("Add", ["a", "x"], ["y"])]
    declined(STEP, model_of(strided, weights, ["n", 4, 1, 1]), "other channels or strides")
    norm = node("BatchNormalization", ["x", "ng", "nb", "nm", "nv"], ["h"])
    nodes = [conv("a", "w", **PADS), norm, node("Add", ["a", "h"], ["y"])]
    declined(STEP, model_of(nodes, weights, SHAPE, outs=["y", "h"]), "also read by others")


def test_sums_of_other_things_are_no_candidates() -> None:
    nodes = [node("Relu", ["x"], ["a"]), node("Add", ["a", "x"], ["y"])]
    model = model_of(nodes, {}, SHAPE)
    assert run_pass(STEP, model)[0] == 0
    assert check(FoldBranches(ignore=("Add",)), model) == 0


def test_inner_sums_that_others_read_are_kept() -> None:
    weights = {f"w{k}": weight(4, 4, 3, 3, seed=k) for k in range(3)}
    nodes = [
        *(conv(f"c{k}", f"w{k}", **PADS) for k in range(3)),
        node("Add", ["c0", "c1"], ["s"]),
        node("Add", ["s", "c2"], ["y"]),
    ]
    model = model_of(nodes, weights, SHAPE, outs=["y", "s"])
    folded(STEP, model, {"Conv": 2, "Add": 1})


def test_after_simplify_a_shared_zero_bias_stays_shared() -> None:
    weights = {
        "w": weight(4, 4, 3, 3),
        "u": weight(4, 4, 3, 3, seed=2),
        "b": np.ones(4, np.float32),
    }
    nodes = [
        conv("a", "w", "b", **PADS),
        conv("c", "u", "b", **PADS),
        node("Add", ["a", "c"], ["s"]),
        node("Mul", ["s", "b2"], ["y"]),
    ]
    weights["b2"] = np.ones((4, 1, 1), np.float32) * 2
    model = model_of(nodes, weights, SHAPE)
    run_pass(Simplify(), model)
    folded(STEP, model, {"Conv": 1, "Mul": 1})
    io.check(model)
    assert op_counts(model)["Conv"] == 1
