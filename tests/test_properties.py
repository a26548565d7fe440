"""Random graphs: every lossless pass, alone and in the preset, keeps what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import HealthCheck, assume, given, settings

from effdl.graph import io
from effdl.graph.clean import clean
from effdl.passes.base import Pass
from tests.corpus_lab import apply, lossless, preset, session
from tests.graph_maker import OPS, feeds, graphs

EXAMPLES = 100


def run(model: ir.Model, proto: onnx.ModelProto, jitter: float = 0.0) -> list[Any]:
    raw = session(io.to_bytes(model), optimize=False)
    return [o for batch in (2, 3) for o in raw.run(None, feeds(proto, batch, jitter))]


def close(got: list[Any], want: list[Any], moved: list[Any]) -> bool:
    """Equal up to rounding, and up to what a tiny change of the inputs does to the outputs."""
    for g, w, m in zip(got, want, moved, strict=True):
        if g.shape != w.shape or g.dtype != w.dtype:
            return False
        finite = np.isfinite(w) & np.isfinite(m)
        if not np.array_equal(np.isfinite(g), np.isfinite(w)):
            return False
        size = float(np.sqrt((w[finite].astype(np.float64) ** 2).mean())) if finite.any() else 0.0
        shake = float(np.abs(m[finite] - w[finite]).max(initial=0.0))
        if not np.allclose(g[finite], w[finite], rtol=2e-5, atol=2e-5 * size + 10 * shake):
            return False
    return True


def hold(
    model: ir.Model, steps: Sequence[tuple[str, Pass]], proto: onnx.ModelProto, again: bool = True
) -> None:
    """Run ``steps`` on a copy and compare."""
    names = "+".join(name for name, _ in steps)
    twin = model.clone()
    if not apply(twin, steps):
        assert io.to_bytes(twin) == io.to_bytes(model), f"{names}: 0 changes, but touched"
        return
    want, moved = run(model, proto), run(model, proto, 1e-6)
    assert close(run(twin, proto), want, moved), f"{names}: other outputs"
    if names == "simplify":
        assert len(list(twin.graph.all_nodes())) <= len(list(model.graph.all_nodes()))
    if again:
        assert apply(twin, steps) == 0, f"{names}: a second run changes something"


def everything() -> list[tuple[str, Pass]]:
    """All lossless passes one after another, those that simplify between."""
    first = preset()[0]
    return [first, *(step for pair in lossless() for step in (pair, first))]


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(proto=graphs())
def test_random_graphs_keep_their_outputs(proto: onnx.ModelProto) -> None:
    check(proto)


def check(proto: onnx.ModelProto) -> None:
    onnx.checker.check_model(proto, full_check=True)
    model = io.from_proto(proto, "random", None)
    clean(model)  # a dead node is another user of a value, until it is cleaned away
    try:
        run(model, proto)
    except Exception:  # no kernel for this opset
        assume(False)
    hold(model, preset(), proto)
    for step in (preset()[0], *lossless()):
        hold(model, [step], proto)
    hold(model, everything(), proto, again=False)


def test_the_maker_knows_several_dozen_operators() -> None:
    assert len(OPS) >= 40
