"""Folding scaling and shifting by constants, against ONNX Runtime before and after."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from effdl.passes.fold.affine import FoldAffine
from effdl.passes.fold.batchnorm import FoldBatchnorm
from tests.folding import batchnorm, check, declined, folded, model_of, node, weight
from tests.support import op_counts, run_pass

STEP = FoldAffine()
NORM = FoldBatchnorm()
C = 4
IMAGE: list[int | str] = ["n", C, 6, 6]


def constants(draw: st.DrawFn, count: int, shapes: list[tuple[int, ...]]) -> Any:
    """A run of arithmetic from ``a0`` to ``a<count>`` with its constants."""
    nodes, weights = [], {}
    for k in range(count):
        op = draw(st.sampled_from(["Add", "Sub", "Mul", "Div", "Neg"]))
        if op == "Neg":
            nodes.append(node("Neg", [f"a{k}"], [f"a{k + 1}"]))
            continue
        shape = draw(st.sampled_from(shapes))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        weights[f"k{k}"] = np.asarray(rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape))
        weights[f"k{k}"] = weights[f"k{k}"].astype(np.float32)
        names = [f"a{k}", f"k{k}"]
        if op in ("Add", "Mul", "Sub") and draw(st.booleans()):
            names.reverse()
        nodes.append(node(op, names, [f"a{k + 1}"]))
    return nodes, weights


SHAPES: list[tuple[int, ...]] = [(), (1,), (C, 1, 1), (1, C, 1, 1), (6,), (C, 6, 6), (1, 1, 6, 1)]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_run_between_two_convolutions(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    nodes, weights = data.draw(st.composite(constants)(count, SHAPES))
    pads = data.draw(st.sampled_from([0, 1]))
    before = data.draw(st.sampled_from(["", "Conv", "ConvTranspose", "Relu", "BatchNormalization"]))
    after = data.draw(st.sampled_from(["", "Conv", "ConvTranspose", "Relu", "BatchNormalization"]))
    weights |= {"w": weight(C, C, 3, 3), "u": weight(C, C, 3, 3, seed=1), **batchnorm(C)}
    weights["c"] = weight(C, seed=7)
    layers = {
        "Conv": (["w", "c"], {"pads": [1] * 4}),
        "ConvTranspose": (["w"], {"pads": [1] * 4}),
        "Relu": ([], {}),
        "BatchNormalization": (["g", "b", "m", "v"], {}),
    }
    if before:
        names, attributes = layers[before]
        nodes.insert(0, node(before, ["x", *names], ["a0"], **attributes))
    else:
        nodes[0].input[list(nodes[0].input).index("a0")] = "x"
    if after:
        names, attributes = layers[after]
        names = ["u" if n == "w" else n for n in names]
        attributes = {"pads": [pads] * 4} if attributes else {}
        nodes.append(node(after, [f"a{count}", *names], ["y"], **attributes))
    else:
        nodes[-1].output[0] = "y"
    model = model_of(nodes, weights, IMAGE)
    size = sum(v.size for v in weights.values())
    changes = check(STEP, model, rtol=1e-3)
    assert len(model.graph) == len(nodes) - changes
    stored = sum(v.const_value.size for v in model.graph.initializers.values())  # type: ignore[union-attr]
    assert not changes or stored <= size + C


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_run_between_two_matmuls(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    shapes: list[tuple[int, ...]] = [(), (1,), (8,), (1, 1, 8), (5, 1), (5, 8)]
    nodes, weights = data.draw(st.composite(constants)(count, shapes))
    weights |= {
        "w": weight(8, 8),
        "u": weight(8, 8, seed=1),
        "c": weight(8),
        "d": weight(8, seed=2),
    }
    front = [node("MatMul", ["x", "w"], ["a0"])]
    if data.draw(st.booleans()):
        front = [node("MatMul", ["x", "w"], ["h"]), node("Add", ["c", "h"], ["a0"])]
    back = [node("MatMul", [f"a{count}", "u"], ["y"])]
    if data.draw(st.booleans()):
        back = [node("MatMul", [f"a{count}", "u"], ["i"]), node("Add", ["i", "d"], ["y"])]
    front = front if data.draw(st.booleans()) else [node("Relu", ["x"], ["a0"])]
    back = back if data.draw(st.booleans()) else [node("Tanh", [f"a{count}"], ["y"])]
    nodes = [*front, *nodes, *back]
    batch = data.draw(st.sampled_from(["n", 3]))
    model = model_of(nodes, weights, [batch, 5, 8])
    changes = check(STEP, model, rtol=1e-3)
    assert len(model.graph) <= len(nodes) - bool(changes)


def test_the_scale_of_attention_goes_into_its_projection() -> None:
    for order in (0, 1):
        weights = {
            "w": weight(8, 8),
            "b": weight(8),
            "r": np.array([0, 0, 2, 4], np.int64),
            "s": np.array(0.5, np.float32),
        }
        views = [
            node("Reshape", ["h", "r"], ["i"]),
            node("Transpose", ["i"], ["j"], perm=[0, 2, 1, 3]),
        ]
        scale = node("Mul", ["j", "s"], ["y"])
        if order:
            views[1].output[0] = "y"
            views[1].input[0] = "k"
            scale = node("Div", ["i", "s"], ["k"])
        front = [node("MatMul", ["x", "w"], ["g"]), node("Add", ["b", "g"], ["h"])]
        tail = [views[0], scale, views[1]] if order else [*views, scale]
        model = model_of([*front, *tail], weights, ["n", "t", 8], rank=4)
        folded(STEP, model, {"MatMul": 1, "Add": 1, "Reshape": 1, "Transpose": 1}, n=2, t=3)


def test_a_scale_per_head_follows_the_reshape() -> None:
    weights = {
        "w": weight(8, 8),
        "r": np.array([-1, 5, 2, 4], np.int64),
        "s": weight(2, 1, seed=3),
        "t": weight(4, seed=4),
    }
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("Reshape", ["h", "r"], ["i"]),
        node("Mul", ["i", "s"], ["j"]),
        node("Mul", ["j", "t"], ["y"]),
    ]
    folded(STEP, model_of(nodes, weights, ["n", 5, 8], rank=4), {"MatMul": 1, "Reshape": 1})
    weights["s"] = weight(5, 1, 1, seed=3)  # one number per position is no channel
    model = model_of(nodes, weights, ["n", 5, 8], rank=4)
    assert check(STEP, model) == 0


def test_the_scale_and_bias_of_a_layer_norm_go_into_all_its_readers() -> None:
    weights = {f"w{k}": weight(8, 8, seed=k) for k in range(3)}
    weights |= {f"b{k}": weight(8, seed=k) for k in range(3)}
    weights |= {"g": weight(8, seed=8), "h": weight(8, seed=9)}
    nodes = [
        node("Tanh", ["x"], ["t"]),
        node("Mul", ["t", "g"], ["m"]),
        node("Add", ["m", "h"], ["n"]),
    ]
    for k in range(3):
        nodes += [
            node("MatMul", ["n", f"w{k}"], [f"p{k}"]),
            node("Add", [f"p{k}", f"b{k}"], [f"y{k}"]),
        ]
    outs = ["y0", "y1", "y2"]
    model = model_of(nodes, weights, ["n", 5, 8], outs=outs)
    folded(STEP, model, {"Tanh": 1, "MatMul": 3, "Add": 3})
    del nodes[4]  # a MatMul without bias would need an Add of its own: still one node fewer
    nodes[3].output[0] = "y0"
    model = model_of(nodes, weights, ["n", 5, 8], outs=outs)
    folded(STEP, model, {"Tanh": 1, "MatMul": 3, "Add": 3})
    model = model_of(nodes, weights, ["n", 5, 8], outs=[*outs, "n"])
    assert check(STEP, model) == 0


def test_the_normalization_of_a_picture() -> None:
    weights = {
        "w": weight(C, 3, 3, 3),
        "b": weight(C),
        "m": np.array([123.7, 116.3, 103.5], np.float32).reshape(3, 1, 1),
        "s": np.array([58.4, 57.1, 57.4], np.float32).reshape(3, 1, 1),
    }
    nodes = [
        node("Sub", ["x", "m"], ["a"]),
        node("Div", ["a", "s"], ["c"]),
        node("Conv", ["c", "w", "b"], ["y"]),
    ]
    folded(STEP, model_of(nodes, weights, ["n", 3, 8, 8]), {"Conv": 1})
    nodes[2] = node("Conv", ["c", "w", "b"], ["y"], pads=[1] * 4)
    folded(STEP, model_of(nodes, weights, ["n", 3, 8, 8]), {"Sub": 1, "Conv": 1})
    declined(STEP, padded(), "pads with")
    # the channels of the input are not known: the first constant might make it larger
    nodes[2] = node("Conv", ["c", "w", "b"], ["y"])
    folded(STEP, model_of(nodes, weights, ["n", "c", 8, 8]), {"Sub": 1, "Conv": 1}, c=3)


def padded() -> Any:
    nodes = [node("Add", ["x", "t"], ["a"]), node("Conv", ["a", "w"], ["y"], pads=[1] * 4)]
    weights = {"t": np.ones((C, 1, 1), np.float32), "w": weight(C, C, 3, 3)}
    return model_of(nodes, weights, IMAGE)


@pytest.mark.parametrize(
    ("between", "attributes", "scale", "shift", "folds"),
    [
        ("Relu", {}, 2.0, None, True),
        ("Relu", {}, -2.0, None, False),
        ("Relu", {}, None, 1.0, False),
        ("LeakyRelu", {"alpha": 0.2}, 3.0, None, True),
        ("MaxPool", {"kernel_shape": [2, 2], "pads": [1] * 4}, 2.0, 1.0, True),
        ("MaxPool", {"kernel_shape": [2, 2]}, -2.0, None, False),
        ("AveragePool", {"kernel_shape": [2, 2]}, -2.0, 1.0, True),
        ("AveragePool", {"kernel_shape": [2, 2], "pads": [1] * 4}, -2.0, None, True),
        ("AveragePool", {"kernel_shape": [2, 2], "pads": [1] * 4}, None, 1.0, False),
        ("GlobalAveragePool", {}, -2.0, 1.0, True),
        ("ReduceMean", {"axes": [2, -1]}, -2.0, 1.0, True),
        ("ReduceMean", {"axes": [1]}, 2.0, None, False),
        ("DepthToSpace", {"blocksize": 2}, 2.0, 1.0, True),
        ("DepthToSpace", {"blocksize": 2, "mode": "CRD"}, 2.0, 1.0, True),
        ("Sigmoid", {}, 2.0, None, False),
    ],
)
@pytest.mark.parametrize("behind", [False, True])
def test_across(
    between: str,
    attributes: dict[str, Any],
    scale: float | None,
    shift: float | None,
    folds: bool,
    behind: bool,
) -> None:
    inner = 1 if between == "DepthToSpace" else C
    ramp = np.arange(1, inner + 1, dtype=np.float32).reshape(-1, 1, 1)
    weights = {"w": weight(C, C, 1, 1), "c": weight(C)}
    run, name = [], "p"
    for op, number in (("Mul", scale), ("Add", shift)):
        if number is not None:
            weights[op] = number * ramp
            run.append(node(op, [name, op], [f"{name}{op}"]))
            name = f"{name}{op}"
    nodes = [
        node("Conv", ["x", "w", "c"], ["h"]),
        node(between, ["h"], ["p"], **attributes),
        *run,
    ]
    nodes[-1].output[0] = "y"
    if behind:
        if between == "DepthToSpace":
            return
        run[0].input[0] = "x"
        weights = {k: v for k, v in weights.items() if k != "c"}
        nodes = [*run, node(between, [name], ["q"], **attributes), node("Conv", ["q", "w"], ["y"])]
        run[-1].output[0] = name
    model = model_of(nodes, weights, IMAGE)
    if folds:
        folded(STEP, model, {"Conv": 1, between: 1})
    else:
        assert check(STEP, model) == 0


@pytest.mark.parametrize(("axes", "folds"), [([2, 3], True), ([-1, -2], True), ([0, 2], False)])
def test_across_a_mean_that_drops_its_axes(axes: list[int], folds: bool) -> None:
    weights = {"w": weight(C, C, 1, 1), "c": weight(C), "k": weight(C), "u": weight(C, C, seed=3)}
    nodes = [
        node("Conv", ["x", "w", "c"], ["h"]),
        node("ReduceMean", ["h"], ["p"], axes=axes, keepdims=0),
        node("Mul", ["p", "k"], ["y"]),
    ]
    model = model_of(nodes, weights, [2, C, C, C], rank=2)
    if folds:
        folded(STEP, model, {"Conv": 1, "ReduceMean": 1})
    else:
        assert check(STEP, model) == 0
    nodes = [
        node("Mul", ["x", "k"], ["a"]),
        node("ReduceMean", ["a"], ["p"], axes=axes, keepdims=0),
        node("MatMul", ["p", "u"], ["y"]),
    ]
    weights["k"] = weight(C, 1, 1)
    model = model_of(nodes, weights, [2, C, C, C], rank=2)
    assert check(STEP, model) == int(folds)


def test_every_branch_of_a_concat_or_none() -> None:
    weights = {"w": weight(2, C, 1, 1), "u": weight(3, C, 3, 3), **batchnorm(5)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Conv", ["x", "u"], ["b1"], pads=[1] * 4),
        node("Concat", ["a", "b1"], ["j"], axis=1),
        node("BatchNormalization", ["j", "g", "b", "m", "v"], ["y"], name="bn"),
    ]
    folded(NORM, model_of(nodes, weights, IMAGE), {"Conv": 2, "Concat": 1})
    declined(NORM, model_of(nodes, weights, IMAGE, outs=["y", "a"]), "also read by others")
    nodes[0] = node("Abs", ["x"], ["a"])
    weights |= batchnorm(7)
    declined(NORM, model_of(nodes, weights, IMAGE), "no layer to fold into")


def test_a_batch_norm_behind_a_sum_of_convolutions() -> None:
    weights = {"w": weight(C, C, 1, 1), "u": weight(C, C, 3, 3), "c": weight(C), **batchnorm(C)}
    nodes = [
        node("Conv", ["x", "w", "c"], ["a"]),
        node("Conv", ["x", "u"], ["b1"], pads=[1] * 4),
        node("Add", ["a", "b1"], ["j"]),
        node("BatchNormalization", ["j", "g", "b", "m", "v"], ["y"], name="bn"),
    ]
    folded(NORM, model_of(nodes, weights, [2, C, 6, 6]), {"Conv": 2, "Add": 1})


@pytest.mark.parametrize(
    ("views", "shape", "rank"),
    [
        ([("Transpose", {"perm": [0, 2, 1]}, None)], [2, 5, 8], 3),
        ([("Flatten", {"axis": 1}, None)], [2, 5, 8], 2),
        ([("Reshape", {}, [10, 8])], [2, 5, 8], 2),
        ([("Unsqueeze", {}, [2])], [2, 8], 3),
        ([("Reshape", {}, [2, 20, 2])], [2, 5, 8], 3),
    ],
)
def test_batch_norms_behind_views_of_a_matmul(
    views: Any, shape: list[int | str], rank: int
) -> None:
    weights: dict[str, np.ndarray] = {"w": weight(8, 8), "c": weight(8)}
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Add", ["h", "c"], ["p0"])]
    for k, (op, attributes, array) in enumerate(views):
        names = [f"p{k}"]
        if array is not None:
            weights[f"r{k}"] = np.array(array, np.int64)
            names.append(f"r{k}")
        nodes.append(node(op, names, [f"p{k + 1}"], **attributes))
    channels = {"Transpose": 8, "Flatten": 40, "Reshape": 8, "Unsqueeze": 8}[views[0][0]]
    channels = 20 if views[0][2] == [2, 20, 2] else channels
    weights |= batchnorm(channels)
    nodes.append(
        node("BatchNormalization", [f"p{len(views)}", "g", "b", "m", "v"], ["y"], name="bn")
    )
    model = model_of(nodes, weights, shape, rank=rank)
    if channels == 8:
        folded(NORM, model, {"MatMul": 1, "Add": 1, views[0][0]: 1})
    else:
        declined(NORM, model, "not one number per channel")


def test_batch_norms_before_linear_layers_and_in_a_row() -> None:
    weights = {"w": weight(8, 8), "u": weight(8, 8, seed=1), **batchnorm(8), **batchnorm(8, 4, "q")}
    first = node("BatchNormalization", ["x", "g", "b", "m", "v"], ["h"])
    gemm = node("Gemm", ["h", "w"], ["y"], alpha=0.5)
    folded(NORM, model_of([first, gemm], weights, ["n", 8]), {"Gemm": 1})
    trans = node("Gemm", ["h", "w"], ["y"], transB=1)
    folded(NORM, model_of([first, trans], weights, ["n", 8]), {"Gemm": 1})
    matmuls = [node("MatMul", ["h", "w"], ["y"]), node("MatMul", ["h", "u"], ["z"])]
    model = model_of([first, matmuls[0]], weights, ["n", 8])
    folded(NORM, model, {"MatMul": 1, "Add": 1})
    model = model_of([first, *matmuls], weights, ["n", 8], outs=["y", "z"])
    assert check(NORM, model) == 0
    second = node("BatchNormalization", ["h", "qg", "qb", "qm", "qv"], ["y"])
    folded(NORM, model_of([first, second], weights, ["n", 8, 3]), {"BatchNormalization": 1})


def run_of(*steps: tuple[str, float | np.ndarray], behind: str = "") -> Any:
    nodes: list[onnx.NodeProto] = []
    weights = {}
    for k, (op, number) in enumerate(steps):
        weights[f"k{k}"] = np.asarray(number, np.float32)
        nodes.append(node(op, ["x" if k == 0 else f"a{k}", f"k{k}"], [f"a{k + 1}"]))
    if behind:
        nodes.append(node(behind, [f"a{len(steps)}"], ["y"]))
    nodes[-1].output[0] = "y"
    return nodes, weights


def test_runs_are_merged_where_that_is_exact() -> None:
    nodes, weights = run_of(("Mul", 2), ("Div", 4), ("Add", 1), ("Add", 3))
    folded(STEP, model_of(nodes, weights, ["n"]), {"Mul": 1, "Add": 1})
    nodes, weights = run_of(("Mul", -1), ("Add", 1))
    folded(STEP, model_of(nodes, weights, ["n"]), {"Sub": 1})
    nodes, weights = run_of(("Mul", 2), ("Div", 2), behind="Relu")
    folded(STEP, model_of(nodes, weights, ["n"]), {"Relu": 1})
    nodes, weights = run_of(("Mul", 2), ("Add", 1))
    assert check(STEP, model_of(nodes, weights, ["n"])) == 0
    assert check(FoldAffine(merge=False), model_of(*run_of(("Mul", 2), ("Mul", 3)), ["n"])) == 0


def test_adding_a_number_that_rounds_is_kept() -> None:
    magic = 1.5 * 2.0**23
    nodes, weights = run_of(("Add", magic), ("Sub", magic), behind="Relu")
    declined(STEP, model_of(nodes, weights, ["n"]), "rounds")


def test_runs_that_set_the_shape_or_grow_stay() -> None:
    nodes, weights = run_of(("Mul", np.full((3, 1), 2)), ("Div", np.full((3, 1), 2)), behind="Relu")
    declined(STEP, model_of(nodes, weights, [1, 4]), "shape of the result")
    nodes, weights = run_of(("Mul", weight(9, 1)), ("Mul", weight(9)))
    declined(STEP, model_of(nodes, weights, [9, 9]), "larger")
    nodes, weights = run_of(("Mul", np.inf), ("Mul", 2))
    declined(STEP, model_of(nodes, weights, ["n"]), "not finite")
    nodes, weights = run_of(("Div", 0), ("Mul", 2))
    declined(STEP, model_of(nodes, weights, ["n"]), "divides by zero")


def test_a_constant_that_widens_the_input_of_a_convolution_stays() -> None:
    nodes = [node("Mul", ["x", "k"], ["a"]), node("Conv", ["a", "w"], ["y"])]
    weights = {"k": weight(C, 1, 1), "w": weight(C, C, 1, 1)}
    declined(STEP, model_of(nodes, weights, ["n", 1, 6, 6]), "larger")
    weights["k"] = weight(1, 1, 1, 1, seed=2)
    folded(STEP, model_of(nodes, weights, IMAGE), {"Conv": 1})


def test_integers_and_functions_are_left_alone() -> None:
    nodes, weights = run_of(("Add", 1), ("Add", 2))
    ints = {k: v.astype(np.int64) for k, v in weights.items()}
    model = model_of(nodes, ints, ["n"], dtype=TensorProto.INT64)
    assert run_pass(STEP, model)[0] == 0


def test_shared_weights_and_graph_outputs_stay() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Mul", ["a", "k"], ["y"]),
        node("Conv", ["x", "w"], ["z"]),
    ]
    weights = {"k": weight(C, 1, 1), "w": weight(C, C, 1, 1)}
    declined(STEP, model_of(nodes, weights, IMAGE, outs=["y", "z"]), "has other users")
    declined(STEP, model_of(nodes[:2], weights, IMAGE, outs=["y", "a"]), "also read by others")
    assert op_counts(folded(STEP, model_of(nodes[:2], weights, IMAGE), {"Conv": 1})) == {"Conv": 1}


def test_options() -> None:
    nodes = [node("Mul", ["x", "k"], ["a"]), node("Conv", ["a", "w"], ["y"])]
    weights = {"k": weight(C, 1, 1), "w": weight(C, C, 1, 1)}
    assert check(FoldAffine(ahead=False), model_of(nodes, weights, IMAGE)) == 0
    assert check(FoldAffine(ignore=("Mul",)), model_of(nodes, weights, IMAGE)) == 0


def test_a_factor_of_a_product_goes_into_the_layers_behind() -> None:
    """The sixth of a written-out HardSwish."""
    weights = {
        "w": weight(C, C, 1, 1),
        "u": weight(C, C, 3, 3),
        "six": np.array(6, np.float32),
        "t": np.array(3, np.float32),
        "zero": np.array(0, np.float32),
    }
    nodes = [
        node("Conv", ["x", "w"], ["h"]),
        node("Add", ["h", "t"], ["a"]),
        node("Clip", ["a", "zero", "six"], ["c"]),
        node("Div", ["c", "six"], ["d"], name="sixth"),
        node("Mul", ["h", "d"], ["m"]),
        node("Conv", ["m", "u"], ["y"], pads=[1] * 4),
    ]
    ops = {"Conv": 2, "Add": 1, "Clip": 1, "Mul": 1}
    folded(STEP, model_of(nodes, weights, IMAGE), ops)
    for op, names in (("Mul", ["d", "d"]), ("Div", ["h", "d"])):
        nodes[4] = node(op, names, ["m"])
        model = model_of(nodes, weights, IMAGE)
        check(FoldAffine(targets=("sixth",)), model)
        assert any(n.name == "sixth" for n in model.graph)


def test_a_shift_leaves_the_weights_alone_so_they_may_be_shared_or_computed() -> None:
    weights = {"k": weight(C, 1, 1), "w": weight(C, C, 1, 1), "u": weight(C, C, 1, 1, seed=2)}
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Add", ["a", "k"], ["b"]),
        node("Conv", ["b", "w"], ["y"]),
    ]
    model = folded(STEP, model_of(nodes, weights, IMAGE), {"Conv": 2})
    stored = model.graph.initializers["w"].const_value
    assert stored is not None
    np.testing.assert_array_equal(stored.numpy(), weights["w"])
    nodes = [node("Add", ["x", "k"], ["b"]), node("Conv", ["b", "w"], ["h"]), nodes[2]]
    nodes[2] = node("Conv", ["h", "w"], ["y"])
    folded(STEP, model_of(nodes, weights, IMAGE), {"Conv": 2})
    nodes = [
        node("Abs", ["w"], ["w2"]),
        node("Conv", ["x", "w2"], ["a"]),
        node("Sub", ["k", "a"], ["y"]),
    ]
    declined(STEP, model_of(nodes, weights, IMAGE), "is not constant")
    nodes[2] = node("Sub", ["a", "k"], ["y"])
    model = model_of(nodes, weights, IMAGE)
    declined(STEP, model, "is not constant")  # its shape is not declared
    w2 = model.graph.node(0).outputs[0]
    w2.shape, w2.type = ir.Shape((C, C, 1, 1)), ir.TensorType(ir.DataType.FLOAT)
    folded(STEP, model, {"Conv": 1, "Abs": 1})
