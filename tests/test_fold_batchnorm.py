"""Folding batch norms and per-channel arithmetic, against ONNX Runtime before and after."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from effdl.graph import io
from effdl.graph.clean import clean
from effdl.passes.fold._affine import Declined, narrow
from effdl.passes.fold.batchnorm import FoldBatchnorm
from effdl.passes.simplify import Simplify
from tests.support import SHARED, assert_same, feed_for, needs_shared, op_counts, outputs, run_pass

C = 6


def model_of(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    shape: list[int | str],
    out_rank: int,
    *,
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
    extra: list[str] | None = None,
) -> ir.Model:
    names = ["y", *(extra or [])]
    outs = [helper.make_tensor_value_info(n, dtype, [None] * out_rank) for n in names]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, shape)],
        outs,
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return io.from_proto(proto, "test", None)


def norm(channels: int = C, seed: int = 1, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "g": rng.uniform(0.5, 2, channels).astype(dtype),
        "b": rng.standard_normal(channels).astype(dtype),
        "m": rng.standard_normal(channels).astype(dtype),
        "v": rng.uniform(0.2, 2, channels).astype(dtype),
    }


def weight(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype) * dtype(0.5)


def bn(data: str, out: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(
        "BatchNormalization", [data, "g", "b", "m", "v"], [out], name="bn", **attributes
    )


def folded(model: ir.Model, gone: str = "BatchNormalization", rtol: float = 1e-4) -> ir.Model:
    before = model.clone()
    changes, log = run_pass(FoldBatchnorm(), model)
    assert changes == len(log.touched) > 0
    assert gone not in op_counts(model)
    clean(model)
    io.check(model)
    assert_same(before, model, rtol=rtol, atol=rtol)
    assert run_pass(FoldBatchnorm(), model)[0] == 0
    return model


def declined(model: ir.Model, reason: str) -> None:
    before = io.to_bytes(model)
    changes, log = run_pass(FoldBatchnorm(), model)
    assert changes == 0
    assert io.to_bytes(model) == before
    assert any(reason in r for _, r in log.skipped), log.skipped


@settings(max_examples=60, deadline=None)
@given(
    op=st.sampled_from(["Conv", "ConvTranspose"]),
    group=st.sampled_from([1, 2, 3, 6]),
    per_in=st.integers(1, 2),
    per_out=st.integers(1, 2),
    axes=st.integers(1, 3),
    bias=st.booleans(),
    opset=st.sampled_from([7, 8, 9, 13, 14, 17]),
)
def test_behind_convolutions(
    op: str, group: int, per_in: int, per_out: int, axes: int, bias: bool, opset: int
) -> None:
    inputs, outs = group * per_in, group * per_out
    shape = (outs, per_in) if op == "Conv" else (inputs, per_out)
    weights = {"w": weight(*shape, *(2,) * axes), **norm(outs)}
    names = ["x", "w"]
    if bias:
        weights["c"] = weight(outs, seed=3)
        names.append("c")
    conv = helper.make_node(op, names, ["h"], group=group, pads=[1] * axes + [0] * axes)
    model = model_of(
        [conv, bn("h", "y")], weights, ["n", inputs, *(4,) * axes], 2 + axes, opset=opset
    )
    assert len(folded(model).graph) == 1


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("bias", [None, (C,), (1, C), (1,), (2, C)])
def test_behind_gemm(trans: int, beta: float, bias: tuple[int, ...] | None) -> None:
    weights = {"w": weight(C, 5) if trans else weight(5, C), **norm()}
    names = ["x", "w"]
    if bias is not None:
        weights["c"] = weight(*bias, seed=3)
        names.append("c")
    gemm = helper.make_node("Gemm", names, ["h"], transB=trans, beta=beta, alpha=0.7)
    assert len(folded(model_of([gemm, bn("h", "y")], weights, [2, 5], 2)).graph) == 1


def test_behind_matmul_with_and_without_bias() -> None:
    matmul = helper.make_node("MatMul", ["x", "w"], ["h"], name="mm")
    weights = {"w": weight(5, C), **norm()}
    model = folded(model_of([matmul, bn("h", "y")], weights, ["n", 5], 2))
    assert op_counts(model) == {"MatMul": 1, "Add": 1}
    weights["c"] = weight(C, seed=4)
    add = helper.make_node("Add", ["c", "h"], ["i"])
    model = folded(model_of([matmul, add, bn("i", "y")], weights, ["n", 5], 2))
    assert op_counts(model) == {"MatMul": 1, "Add": 1}


def test_matmul_of_sequences_scales_its_last_axis_but_not_by_a_batch_norm() -> None:
    matmul = helper.make_node("MatMul", ["x", "w"], ["h"])
    weights = {"w": weight(5, C), "s": weight(C, seed=2), "c": weight(C, seed=4)}
    nodes = [
        matmul,
        helper.make_node("Add", ["h", "c"], ["i"]),
        helper.make_node("Mul", ["i", "s"], ["y"]),
    ]
    assert op_counts(folded(model_of(nodes, weights, ["n", 3, 5], 3), gone="Mul")) == {
        "MatMul": 1,
        "Add": 1,
    }
    model = model_of([matmul, bn("h", "y")], {"w": weight(5, C), **norm()}, ["n", C, 5], 3)
    declined(model, "its channels are not those of the MatMul")


def test_a_chain_folds_to_the_end() -> None:
    weights = {"w": weight(C, 3, 3, 3), **norm(), "s": weight(C, 1, 1), "t": weight(1, C, 1, 1)}
    weights |= {"one": np.array(0.5, np.float32), "d": np.full((C, 1, 1), 3, np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        bn("a", "b1"),
        helper.make_node("Mul", ["s", "b1"], ["c1"]),
        helper.make_node("Add", ["c1", "t"], ["d1"]),
        helper.make_node("Sub", ["one", "d1"], ["e1"]),
        helper.make_node("Div", ["e1", "d"], ["f1"]),
        helper.make_node("Sub", ["f1", "t"], ["y"]),
    ]
    model = folded(model_of(nodes, weights, ["n", 3, 6, 6], 4))
    assert op_counts(model) == {"Conv": 1}
    assert sorted(model.graph.initializers) == ["conv_bias", "w"]
    assert model.graph.outputs[0].name == "y"


@pytest.mark.parametrize("group", [1, 3])
def test_in_front_of_a_conv_without_padding(group: int) -> None:
    weights = {"w": weight(6, 6 // group, 3, 3), "c": weight(6, seed=5), **norm()}
    conv = helper.make_node("Conv", ["h", "w", "c"], ["y"], group=group)
    assert len(folded(model_of([bn("x", "h"), conv], weights, ["n", C, 5, 5], 4)).graph) == 1
    conv = helper.make_node("Conv", ["h", "w", "c"], ["y"], group=group, pads=[1, 1, 1, 1])
    declined(model_of([bn("x", "h"), conv], weights, ["n", C, 5, 5], 4), "pads with zeros")
    conv = helper.make_node("Conv", ["h", "w", "c"], ["y"], group=group, auto_pad="SAME_UPPER")
    declined(model_of([bn("x", "h"), conv], weights, ["n", C, 5, 5], 4), "pads with zeros")
    # A batch norm that only scales leaves the zeros of the border where they are.
    weights |= {"b": np.zeros(C, np.float32), "m": np.zeros(C, np.float32)}
    assert len(folded(model_of([bn("x", "h"), conv], weights, ["n", C, 5, 5], 4)).graph) == 1


def test_float16_is_computed_in_double_and_rounded_once() -> None:
    weights = {"w": weight(C, 3, 1, 1, dtype=np.float16), **norm(dtype=np.float16)}
    conv = helper.make_node("Conv", ["x", "w"], ["h"])
    model = model_of([conv, bn("h", "y")], weights, [1, 3, 4, 4], 4, dtype=TensorProto.FLOAT16)
    folded(model, rtol=2e-2)
    scale = weights["g"].astype(float) / np.sqrt(weights["v"].astype(float) + 1e-5)
    exact = weights["w"].astype(float) * scale.reshape(-1, 1, 1, 1)
    stored = model.graph.initializers["w"].const_value
    assert stored is not None
    np.testing.assert_array_equal(stored.numpy(), exact.astype(np.float16))


@pytest.mark.parametrize(("gamma", "reason"), [(6e4, "overflow"), (1e-7, "too small for float16")])
def test_numbers_that_the_type_cannot_hold_stay_outside(gamma: float, reason: str) -> None:
    weights = {"w": weight(C, 3, 1, 1, dtype=np.float16), **norm(dtype=np.float16)}
    weights["g"] = np.full(C, gamma, np.float16)
    weights["v"] = np.full(C, 0.01, np.float16)
    conv = helper.make_node("Conv", ["x", "w"], ["h"])
    declined(
        model_of([conv, bn("h", "y")], weights, [1, 3, 4, 4], 4, dtype=TensorProto.FLOAT16), reason
    )


def test_narrow_refuses_overflow_only() -> None:
    like = np.zeros(1, np.float32)
    np.testing.assert_array_equal(narrow(np.array([[0.0, 1e30]]), like, 0), [[0, np.float32(1e30)]])
    with pytest.raises(Declined, match="overflow"):
        narrow(np.array([[1e39]]), like, 0)


def conv_bn(**changes: object) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    conv = helper.make_node("Conv", ["x", "w"], ["h"], name="conv")
    return [conv, bn("h", "y", **changes)], {"w": weight(C, 3, 1, 1), **norm()}


def test_what_must_not_be_folded() -> None:
    shape: list[int | str] = ["n", 3, 4, 4]
    nodes, weights = conv_bn()
    declined(model_of(nodes, weights, shape, 4, extra=["h"]), "also read by others")
    relu = helper.make_node("Relu", ["h"], ["z"])
    declined(model_of([*nodes, relu], weights, shape, 4, extra=["z"]), "also read by others")
    twin = helper.make_node("Conv", ["x", "w"], ["z"])
    declined(model_of([*nodes, twin], weights, shape, 4, extra=["z"]), "has other users")
    lonely = helper.make_node("Relu", ["x"], ["h"])
    only = {k: v[:3] for k, v in weights.items() if k != "w"}
    declined(model_of([lonely, nodes[1]], only, shape, 4), "no layer to fold into: it reads Relu")
    broken = weights | {"v": np.full(C, -1, np.float32)}
    declined(model_of(nodes, broken, shape, 4), "variance is not positive")


def test_training_form_and_computed_parameters_stay() -> None:
    shape: list[int | str] = ["n", 3, 4, 4]
    nodes, weights = conv_bn()
    trained = helper.make_node(
        "BatchNormalization",
        ["h", "g", "b", "m", "v"],
        ["y", "rm", "rv"],
        training_mode=1,
    )
    declined(model_of([nodes[0], trained], weights, shape, 4), "training form")
    double = helper.make_node("Relu", ["g"], ["g2"])
    moved = helper.make_node("BatchNormalization", ["h", "g2", "b", "m", "v"], ["y"])
    declined(model_of([double, nodes[0], moved], weights, shape, 4), "parameters are not constant")
    computed = helper.make_node("Relu", ["w"], ["w2"])
    conv = helper.make_node("Conv", ["x", "w2"], ["h"])
    declined(model_of([computed, conv, nodes[1]], weights, shape, 4), "is not constant")


def test_per_activation_parameters_of_opset_7_stay() -> None:
    nodes, weights = conv_bn(spatial=0)
    declined(model_of(nodes, weights, [1, 3, 4, 4], 4, opset=7), "spatial=0")
    nodes, weights = conv_bn(spatial=1)
    assert len(folded(model_of(nodes, weights, [1, 3, 4, 4], 4, opset=7)).graph) == 1


@pytest.mark.parametrize(
    ("op", "constant", "folds"),
    [
        ("Mul", (C, 1, 1), True),
        ("Add", (1, C, 1, 1), True),
        ("Add", (1,), True),
        ("Mul", (), True),
        ("Mul", (4,), False),
        ("Add", (C, 4, 4), False),
        ("Add", (2, 1, 1, 1), False),
        ("Mul", (1, 1, C, 1, 1), False),
    ],
)
def test_only_constants_per_channel(op: str, constant: tuple[int, ...], folds: bool) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node(op, ["h", "k"], ["y"], name="arith"),
    ]
    weights = {"w": weight(C, 3, 1, 1), "k": np.asarray(weight(*constant, seed=9))}
    model = model_of(nodes, weights, [1, 3, 4, 4], max(4, len(constant)))
    if folds:
        folded(model, gone=op)
    else:
        declined(model, "constant")


def test_division_by_the_result_is_no_scaling() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node("Div", ["k", "h"], ["y"]),
    ]
    model = model_of(nodes, {"w": weight(C, 3, 1, 1), "k": np.ones(1, np.float32)}, [1, 3, 4, 4], 4)
    assert run_pass(FoldBatchnorm(), model)[0] == 0


def test_ignore_and_arithmetic_options() -> None:
    nodes, weights = conv_bn()
    model = model_of(nodes, weights, [1, 3, 4, 4], 4)
    assert run_pass(FoldBatchnorm(ignore=("bn",)), model)[0] == 0
    nodes = [nodes[0], helper.make_node("Mul", ["h", "k"], ["y"])]
    model = model_of(nodes, {"w": weights["w"], "k": np.full(1, 2, np.float32)}, [1, 3, 4, 4], 4)
    assert run_pass(FoldBatchnorm(arithmetic=False), model)[0] == 0


def test_old_formats_get_a_version_that_allows_the_new_bias() -> None:
    nodes, weights = conv_bn()
    model = model_of(nodes, weights, [1, 3, 4, 4], 4)
    model.ir_version = 3
    assert run_pass(FoldBatchnorm(), model)[0] == 1
    assert model.ir_version == 4


@needs_shared
@pytest.mark.shared
def test_ultraface_loses_all_its_batch_norms() -> None:
    assert SHARED is not None
    model = io.load(SHARED / "models" / "ultraface_rfb320.onnx")
    before = model.clone()
    run_pass(Simplify(), model)
    changes, log = run_pass(FoldBatchnorm(), model)
    clean(model)
    assert changes == 35
    assert not [s for s in log.skipped if s[0].startswith("Batch")]
    assert "BatchNormalization" not in op_counts(model)
    feed = feed_for(before)
    for want, got in zip(outputs(before, feed), outputs(model, feed), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
