"""Every operator case of the onnx wheel between Transposes: the results stay, and none is added."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from effdl.graph import io
from effdl.graph.clean import clean
from effdl.graph.transposes_rules import _RULES
from effdl.passes.fold.transposes import FoldTransposes
from tests.node_cases import cases, equal, in_one_worker, plain, session
from tests.support import context, op_counts

CHUNKS = 8
ILL_TYPED = "test_affine_grid_"


def wrapped(case: Any, turn: int) -> tuple[onnx.ModelProto, dict[str, Any], list[Any]] | None:
    """The case with a Transpose behind each large input and each output; small inputs are constant."""
    proto = onnx.ModelProto()
    proto.CopyFrom(case.model)
    proto.ir_version = min(max(proto.ir_version, 4), 10)
    if proto.functions or not all(n.op_type in _RULES for n in proto.graph.node):
        return None
    inputs, expected = ([plain(v) for v in part] for part in case.data_sets[0])
    if not all(isinstance(v, np.ndarray) for v in (*inputs, *expected)):
        return None
    graph = proto.graph
    feed: dict[str, Any] = {}
    before, behind = [], []
    values = {v.name: a for v, a in zip(graph.input, inputs, strict=False)}
    del graph.input[:]
    for name, array in values.items():
        if array.ndim < 2 or (feed and array.ndim < 3):
            graph.initializer.append(numpy_helper.from_array(array, name))
            continue
        perm = order(array.ndim, turn)
        feed[f"{name}_in"] = array.transpose(np.argsort(perm))
        graph.input.append(info(f"{name}_in", feed[f"{name}_in"]))
        before.append(helper.make_node("Transpose", [f"{name}_in"], [name], perm=perm))
    goals = []
    outs = list(graph.output)
    del graph.output[:]
    for value, array in zip(outs, expected, strict=False):
        perm = [int(p) for p in np.argsort(order(array.ndim, turn))]
        goals.append(array.transpose(perm))
        graph.output.append(info(f"{value.name}_out", goals[-1]))
        behind.append(helper.make_node("Transpose", [value.name], [f"{value.name}_out"], perm=perm))
    if not feed or any(g.ndim == 0 for g in goals):
        return None
    nodes = [*before, *graph.node, *behind]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return proto, feed, goals


def info(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
    )


def order(rank: int, turn: int) -> list[int]:
    axes = list(range(rank))
    return axes[turn:] + axes[:turn] if turn else axes[::-1]


@in_one_worker
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_cases_between_transposes(chunk: int) -> None:
    done = moved = 0
    for at, case in enumerate(cases()[chunk::CHUNKS]):
        if case.name.startswith(ILL_TYPED):
            continue
        for turn in (at % 2,):
            found = wrapped(case, turn)
            if found is None:
                continue
            proto, feed, goals = found
            try:
                got = session(proto).run(None, feed)
            except Exception:  # what ONNX Runtime cannot run untouched says nothing about a pass
                continue
            if not all(equal(a, b, case.rtol, case.atol) for a, b in zip(got, goals, strict=False)):
                continue
            model = io.from_proto(proto, case.name, None)
            before = op_counts(model)
            changes = FoldTransposes().run(model, context())
            clean(model)
            after = op_counts(model)
            assert after.get("Transpose", 0) <= before["Transpose"], case.name
            assert sum(after.values()) <= sum(before.values()), case.name
            again = session(ir.to_proto(model)).run(None, feed)
            for a, b in zip(again, goals, strict=False):
                assert equal(a, b, max(case.rtol, 1e-4), max(case.atol, 1e-5)), (case.name, turn)
            assert FoldTransposes().run(model, context()) == 0, case.name
            done += 1
            moved += bool(changes)
    assert done > 20
    assert moved > 10
