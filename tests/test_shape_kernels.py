"""Shape arithmetic in numpy computes what ONNX Runtime computes, or leaves it."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from effdl.graph.shape_kernels import MOST, compute

INTEGERS = (np.int64, np.int32)


def by_runtime(op_type: str, inputs: list[Any], attributes: dict[str, Any]) -> Any:
    """The node on ONNX Runtime at opset 18; None where it refuses."""
    names = ["" if a is None else f"i{k}" for k, a in enumerate(inputs)]
    graph = helper.make_graph(
        [helper.make_node(op_type, names, ["y"], **attributes)],
        "one",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in zip(names, inputs, strict=True)
            if a is not None
        ],
        [onnx.ValueInfoProto(name="y")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(model.SerializeToString(), options)
        feeds = {n: a for n, a in zip(names, inputs, strict=True) if a is not None}
        return session.run(None, feeds)[0]
    except Exception:  # ONNX Runtime raises half a dozen unrelated classes
        return None


def check(op_type: str, inputs: list[Any], **attributes: Any) -> bool:
    """Whether a result came, which then is ONNX Runtime's to the bit."""
    mine = compute(op_type, inputs, attributes)
    if mine is None:
        return False
    theirs = by_runtime(op_type, inputs, attributes)
    assert theirs is not None, (op_type, inputs, attributes)
    assert mine.dtype == theirs.dtype
    assert mine.shape == theirs.shape
    np.testing.assert_array_equal(mine, theirs)
    return True


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


numbers = st.integers(-9, 9)
vectors = st.lists(numbers, min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(a=vectors, b=numbers, dtype=st.sampled_from(INTEGERS), op=st.data())
def test_arithmetic(a: list[int], b: int, dtype: Any, op: Any) -> None:
    names = [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Equal",
        "Less",
        "Greater",
        "LessOrEqual",
        "GreaterOrEqual",
    ]
    name = op.draw(st.sampled_from(names))
    came = check(name, [np.array(a, dtype), np.array([b], dtype)])
    assert came or (name == "Div" and b == 0)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 6),
    start=st.integers(-9, 9),
    end=st.one_of(st.integers(-9, 9), st.sampled_from((2**63 - 1, -(2**63) + 1))),
    step=st.sampled_from((1, 2, -1, -2)),
    floats=st.booleans(),
)
def test_slices(size: int, start: int, end: int, step: int, floats: bool) -> None:
    data = np.arange(size * 2, dtype=np.float32 if floats else np.int64).reshape(size, 2)
    came = check("Slice", [data, ints(start), ints(end), ints(0), ints(step)])
    assert came or (step < 0 and end > size)


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 3), min_size=1, max_size=3), op=st.data())
def test_moves(shape: list[int], op: Any) -> None:
    dtype = op.draw(st.sampled_from((np.int64, np.float32, np.uint8, np.bool_)))
    data = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    rank = len(shape)
    assert check("Identity", [data])
    assert check("Transpose", [data], perm=op.draw(st.permutations(range(rank))))
    assert check("Transpose", [data])
    axis = op.draw(st.integers(-rank, rank - 1))
    assert check("Unsqueeze", [data, ints(axis)])
    assert check("Concat", [data, data], axis=axis)
    assert check("Reshape", [data, ints(-1)])
    assert check("Gather", [data, ints(0, -1)], axis=axis)
    assert check("Expand", [data, ints(2, *shape)])
    assert check("Squeeze", [data[None], ints(0)])


@pytest.mark.parametrize("value", [None, np.array([3], np.int64), np.array([True])])
def test_filled(value: Any) -> None:
    attributes = {} if value is None else {"value": numpy_helper.from_array(value)}
    assert check("ConstantOfShape", [ints(2, 3)], **attributes)
    assert check("ConstantOfShape", [np.zeros(0, np.int64)], **attributes)
    assert not check("ConstantOfShape", [ints(MOST, 2)], **attributes)


def test_booleans() -> None:
    a, b = np.array([True, False, True]), np.array([True])
    assert check("And", [a, b])
    assert check("Or", [a, b])
    assert check("Not", [a])
    assert check("Where", [a, ints(1, 2, 3), ints(4)])


def test_what_is_left_to_others() -> None:
    floats = np.ones(2, np.float32)
    assert not check("Add", [floats, floats])
    assert not check("Cast", [floats], to=onnx.TensorProto.INT64)
    assert not check("Gather", [ints(1, 2), ints(5)])
    assert not check("Reshape", [ints(1, 2, 3), ints(2)])
    assert not check("Expand", [ints(1), ints(MOST + 1)])
    assert not check("Identity", [np.zeros(MOST + 1, np.int64)])
    assert not check("Softmax", [floats])
