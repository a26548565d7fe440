"""Nodes that are added in front of another, in the dialect of the opset."""

from __future__ import annotations

import numpy as np
import pytest

from effdl.graph import io
from effdl.graph.insert import Builder
from effdl.graph.weights import Names
from tests.support import from_text, op_counts, outputs


@pytest.mark.parametrize("opset", [11, 13, 15, 18, 23])
def test_every_dialect(opset: int) -> None:
    model = from_text(
        f"""<ir_version: 8, opset_import: ["": {opset}]> g (float[B,3] x) => (float[B,3] y)
        {{ y = Relu(x) }}"""
    )
    relu = model.graph.node(0)
    build = Builder(model.graph, Names(model), opset, relu)
    x = model.graph.inputs[0]
    most = build.reduce("ReduceMax", x, -1)  # [B, 1]
    total = build.reduce("ReduceSum", x, 1)
    both = build.op("Sub", [most, total], "both")
    row = build.squeeze(both, 1)
    column = build.unsqueeze(row, (1,))
    shape = build.concat([build.size(x, 0), build.ints(3)])
    relu.replace_input_with(0, build.op("Expand", [column, shape], "wide"))
    io.check(model)
    data = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    (got,) = outputs(model, {"x": data})
    want = np.broadcast_to(data.max(1, keepdims=True) - data.sum(1, keepdims=True), (4, 3))
    np.testing.assert_allclose(got, np.maximum(want, 0), rtol=1e-6)
    assert ("Gather" in op_counts(model)) == (opset < 15)


def test_constants_are_made_once() -> None:
    model = from_text(
        '<ir_version: 8, opset_import: ["": 17]> g (float[B] x) => (float[B] y) { y = Relu(x) }'
    )
    build = Builder(model.graph, Names(model), 17, model.graph.node(0))
    assert build.ints(1, 2) is build.ints(1, 2)
    assert build.ints(1) is not build.number(1.0)
    assert build.concat([build.ints(1), build.ints(2)]) is build.ints(1, 2)
    large = np.zeros(1 << 16, np.float32)
    assert build.constant(large, "w") is not build.constant(large, "w")
    assert len({v.name for v in model.graph.initializers.values()}) == 6
