"""Small models for the folding passes, and the check that every fold has to pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from effdl.graph import io
from effdl.graph.clean import clean
from effdl.passes.base import Pass
from tests.support import assert_same, op_counts, run_pass

node = helper.make_node


def model_of(
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, np.ndarray],
    shape: Sequence[int | str | None],
    *,
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
    outs: Sequence[str] = ("y",),
    rank: int | None = None,
) -> ir.Model:
    """A model from x, of ``shape``, to ``outs`` of ``rank`` (None: that of x)."""
    free = [None] * (len(shape) if rank is None else rank)
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", dtype, list(shape))],
        [helper.make_tensor_value_info(n, dtype, free) for n in outs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return io.from_proto(proto, "test", None)


def weight(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    """Normal numbers."""
    array = np.random.default_rng(seed).standard_normal(shape) * 0.5
    return np.asarray(array).astype(dtype)


def batchnorm(channels: int, seed: int = 1, prefix: str = "") -> dict[str, np.ndarray]:
    """Parameters g, b, m and v."""
    rng = np.random.default_rng(seed)
    arrays = {
        "g": rng.uniform(0.5, 2, channels),
        "b": rng.standard_normal(channels),
        "m": rng.standard_normal(channels),
        "v": rng.uniform(0.2, 2, channels),
    }
    return {prefix + n: a.astype(np.float32) for n, a in arrays.items()}


def check(step: Pass, model: ir.Model, rtol: float = 1e-4, **dims: int) -> int:
    """Run ``step``; outputs stay, a second run does nothing, 0 changes are no changes."""
    before, digest = model.clone(), io.to_bytes(model)
    changes, _ = run_pass(step, model)
    if not changes:
        assert io.to_bytes(model) == digest
        return 0
    clean(model)
    io.check(model)
    assert_same(before, model, rtol=rtol, atol=rtol, **dims)
    assert run_pass(step, model)[0] == 0
    return changes


def folded(
    step: Pass, model: ir.Model, ops: Mapping[str, int], rtol: float = 1e-4, **dims: int
) -> ir.Model:
    """``check``, and the model has these operators afterwards."""
    assert check(step, model, rtol, **dims)
    assert op_counts(model) == ops
    return model


def declined(step: Pass, model: ir.Model, reason: str) -> None:
    """Nothing happens, for this reason."""
    before = io.to_bytes(model)
    changes, log = run_pass(step, model)
    assert changes == 0
    assert io.to_bytes(model) == before
    assert any(reason in r for _, r in log.skipped), log.skipped
