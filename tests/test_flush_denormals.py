"""Weights too small to matter become zero."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from effdl.passes.flush_denormals import FlushDenormals
from tests.folding import check, declined, model_of, node, weight
from tests.support import run_pass


def layer(array: np.ndarray, op: str = "MatMul") -> ir.Model:
    return model_of([node(op, ["x", "w"], ["y"])], {"w": array}, ["n", array.shape[0]])


def stored(model: ir.Model) -> np.ndarray:
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    return tensor.numpy()


def test_denormals_and_what_is_lost_in_rounding() -> None:
    array = weight(4, 4)
    array[0] = [1e-40, -1e-42, 1e-33, -1e-12]
    model = layer(array)
    assert check(FlushDenormals(), model) == 3
    np.testing.assert_array_equal(stored(model)[0], np.array([0, 0, 0, -1e-12], np.float32))
    np.testing.assert_array_equal(stored(model)[1:], array[1:])
    model = layer(array)
    assert check(FlushDenormals(threshold=0), model) == 2


def test_small_numbers_among_small_numbers_are_kept() -> None:
    model = layer(np.full((4, 4), 1e-33, np.float32))
    assert check(FlushDenormals(), model) == 0


def test_other_readers_keep_them() -> None:
    array = np.full((4, 4), 1e-40, np.float32)
    declined(FlushDenormals(), layer(array, "Add"), "other than a linear layer")


def test_shared_weights_are_flushed_for_all() -> None:
    array = weight(4, 4)
    array[0, 0] = 1e-40
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Gemm", ["h", "w"], ["y"])]
    assert check(FlushDenormals(), model_of(nodes, {"w": array}, ["n", 4])) == 1


@pytest.mark.parametrize("dtype", [np.float16, np.int32])
def test_other_types_stay(dtype: type) -> None:
    array = np.full((4, 4), 1e-7 if dtype is np.float16 else 1).astype(dtype)
    model = model_of([node("Cast", ["w"], ["y"], to=1)], {"w": array}, [4, 4])
    assert run_pass(FlushDenormals(), model)[0] == 0


def test_doubles_have_their_own_limit() -> None:
    array = np.array([[1e-40, 1e-310], [1.0, 0.0]])
    model = model_of(
        [
            node("Cast", ["x"], ["d"], to=11),
            node("MatMul", ["d", "w"], ["e"]),
            node("Cast", ["e"], ["y"], to=1),
        ],
        {"w": array},
        ["n", 2],
    )
    assert check(FlushDenormals(threshold=0), model) == 1
    assert stored(model)[0, 0] == 1e-40
