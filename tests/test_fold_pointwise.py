"""Folding two linear layers into one, against ONNX Runtime before and after."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.passes.fold.pointwise import FoldPointwise
from tests.folding import check, declined, folded, model_of, node, weight
from tests.support import op_counts

STEP = FoldPointwise()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_two_convolutions(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 2))
    groups = data.draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (1, 4), (4, 4)]))
    sizes = st.sampled_from([(1, 1), (1, 3), (3, 1), (2, 3)])
    ks = data.draw(sizes)
    weights: dict[str, np.ndarray] = {}
    nodes = []
    middle = data.draw(st.sampled_from([4, 16]))
    for k, (i, o) in enumerate(((4, middle), (middle, 4))):
        weights[f"w{k}"] = weight(o, i // groups[k], *(ks[k],) * axes, seed=k)
        names = [["x", "h", "y"][k], f"w{k}"]
        if data.draw(st.booleans()):
            weights[f"b{k}"] = weight(o, seed=k + 5)
            names.append(f"b{k}")
        attributes: dict[str, Any] = {
            "group": groups[k],
            "strides": [data.draw(st.integers(1, 2)) for _ in range(axes)],
            "dilations": [data.draw(st.integers(1, 2)) for _ in range(axes)],
        }
        if data.draw(st.booleans()):
            attributes["pads"] = [data.draw(st.integers(0, 1)) for _ in range(2 * axes)]
        nodes.append(node("Conv", names, [["h", "y"][k]], **attributes))
    model = model_of(nodes, weights, ["n", 4, *(12, 11)[:axes]])
    before = sum(a.size for n, a in weights.items() if n.startswith("w"))
    if check(STEP, model):
        assert op_counts(model) == {"Conv": 1}
        assert sum(v.const_value.size for v in model.graph.initializers.values()) <= before + 4  # type: ignore[union-attr]


def test_one_by_one_around_a_kernel_and_a_run_of_three() -> None:
    weights = {
        "a": weight(3, 3, 1, 1),
        "b": weight(8, 3, 3, 3, seed=1),
        "c": weight(4, 8, 1, 1, seed=2),
        "s": weight(4, seed=3),
        "t": weight(8, seed=4),
    }
    nodes = [
        node("Conv", ["x", "a"], ["h"]),
        node("Conv", ["h", "b", "t"], ["i"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Conv", ["i", "c", "s"], ["y"]),
    ]
    folded(STEP, model_of(nodes, weights, ["n", 3, 9, 9]), {"Conv": 1})


def two(pads: int = 0, bias: bool = True, middle: int = 8, **second: Any) -> Any:
    weights = {"a": weight(middle, 4, 1, 1), "b": weight(4, middle, 3, 3), "s": weight(middle)}
    first = ["x", "a", "s"] if bias else ["x", "a"]
    nodes = [
        node("Conv", first, ["h"], name="first"),
        node("Conv", ["h", "b"], ["y"], name="second", pads=[pads] * 4, **second),
    ]
    return nodes, weights


def test_declined() -> None:
    nodes, weights = two(pads=1)
    shape: list[int | str] = ["n", 4, 6, 6]
    declined(STEP, model_of(nodes, weights, shape), "pads with zeros what")
    nodes, weights = two(pads=1)
    weights["s"] = np.zeros(8, np.float32)
    folded(STEP, model_of(nodes, weights, shape), {"Conv": 1})
    nodes, weights = two(pads=2, bias=False)
    declined(STEP, model_of(nodes, weights, shape), "more positions")
    nodes, weights = two(middle=1)
    declined(STEP, model_of(nodes, weights, shape), "more weights")
    nodes, weights = two()
    nodes.append(node("Conv", ["x", "a"], ["z"]))
    declined(STEP, model_of(nodes, weights, shape, outs=["y", "z"]), "has other users")
    nodes, weights = two()
    assert check(STEP, model_of(nodes, weights, shape, outs=["y", "h"])) == 0
    assert check(FoldPointwise(ignore=("first",)), model_of(nodes, weights, shape)) == 0


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("biases", [(None, None), ((6,), None), (None, (3,)), ((1,), (2, 3))])
def test_gemms(trans: int, biases: tuple[tuple[int, ...] | None, ...]) -> None:
    weights = {"a": weight(5, 6), "b": weight(3, 6) if trans else weight(6, 3)}
    nodes = []
    for k, bias in enumerate(biases):
        names = [["x", "h"][k], ["a", "b"][k]]
        if bias is not None:
            weights[f"c{k}"] = weight(*bias, seed=k)
            names.append(f"c{k}")
        attributes = {"alpha": 0.5, "beta": 0.3, "transB": trans if k else 0}
        nodes.append(node("Gemm", names, [["h", "y"][k]], **attributes))
    folded(STEP, model_of(nodes, weights, [2, 5]), {"Gemm": 1})


@pytest.mark.parametrize("first", [None, (6,), (1, 1, 6), ()])
@pytest.mark.parametrize("second", [None, (3,), (1, 1, 3), (2, 3)])
def test_matmuls(first: tuple[int, ...] | None, second: tuple[int, ...] | None) -> None:
    weights = {"a": weight(5, 6), "b": weight(6, 3, seed=1)}
    nodes = [node("MatMul", ["x", "a"], ["h"])]
    if first is not None:
        weights["c"] = weight(*first, seed=2)
        nodes.append(node("Add", ["h", "c"], ["h2"]))
    nodes.append(node("MatMul", ["h" if first is None else "h2", "b"], ["i"]))
    if second is not None:
        weights["d"] = weight(*second, seed=3)
        nodes.append(node("Add", ["d", "i"], ["j"]))
    nodes[-1].output[0] = "y"
    rank = max(2, *(len(s) for s in (first, second) if s is not None), 0)
    adds = 2 if first is not None and second == (2, 3) else int(bool(first is not None or second))
    ops = {"MatMul": 1, "Add": adds} if adds else {"MatMul": 1}
    folded(STEP, model_of(nodes, weights, [2, 5], rank=rank), ops)


def test_a_factorization_stays_two_layers() -> None:
    weights = {"a": weight(8, 2), "b": weight(2, 8)}
    nodes = [node("MatMul", ["x", "a"], ["h"]), node("MatMul", ["h", "b"], ["y"])]
    declined(STEP, model_of(nodes, weights, ["n", 8]), "more weights")
    nodes = [node("Gemm", ["x", "a"], ["h"]), node("Gemm", ["h", "b"], ["y"])]
    declined(STEP, model_of(nodes, weights, ["n", 8]), "more weights")


def test_a_map_that_is_no_bias_stays() -> None:
    weights = {"a": weight(5, 6), "b": weight(6, 3), "c": weight(2, 6)}
    nodes = [
        node("MatMul", ["x", "a"], ["h"]),
        node("Add", ["h", "c"], ["i"]),
        node("MatMul", ["i", "b"], ["y"]),
    ]
    declined(STEP, model_of(nodes, weights, [2, 5]), "not one number per channel")
