"""Runs the attention fusion on a model and compares what it computes."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir

from effdl.graph import io
from effdl.passes.fuse.attention import FuseAttention
from effdl.runtime.session import open_session
from tests.attention_graphs import CHANNELS, HEADS, SIZE, WIDE, Graph, feed
from tests.support import run_pass

Name = Literal["attention", "mha", "onnx"]


def same(before: ir.Model, after: ir.Model, *, dead: bool = True) -> None:
    """Both compute the same at several sizes, also where all keys of a query are masked."""
    old, new = open_session(before), open_session(after)
    for seed, (b, s, t) in enumerate([(2, 5, 3), (1, 1, 4), (3, 2, 2), (2, 40, 1)]):
        sizes = {"B": b, "S": s, "T": t}
        given_ = feed(before, sizes, dead=dead and seed != 2, seed=seed)
        for want, got in zip(old.run(given_).values(), new.run(given_).values(), strict=True):
            assert want.shape == got.shape
            np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


def fused(model: ir.Model, form: Name = "mha", count: int = 1, *, dead: bool = True) -> ir.Model:
    """The model after the pass, which must find ``count`` attentions and compute the same."""
    after = model.clone()
    changes, log = run_pass(FuseAttention(form=form), after)
    assert (changes, len(log.touched)) == (count, count), log.skipped
    declared = [(v.name, v.type, v.shape) for v in (*model.graph.inputs, *model.graph.outputs)]
    kept = [(v.name, v.type, v.shape) for v in (*after.graph.inputs, *after.graph.outputs)]
    assert kept == declared
    same(model, after, dead=dead)
    once = io.to_bytes(after)
    assert run_pass(FuseAttention(form=form), after)[0] == 0
    assert io.to_bytes(after) == once
    return after


def declined(model: ir.Model, reason: str, form: Name = "mha") -> None:
    """The pass leaves every byte and says why, with the name of the node."""
    before = io.to_bytes(model)
    changes, log = run_pass(FuseAttention(form=form), model)
    assert changes == 0
    assert io.to_bytes(model) == before
    assert any(reason in why and name for name, why in log.skipped), log.skipped


def plain(
    g: Graph,
    q: str,
    k: str,
    v: str,
    *,
    scale: float = 0.5,
    axis: int | None = -1,
    times: float = 1.0,
) -> None:
    """Finish a block from [B, H, S, D]."""
    scores = g.op("Mul", g.op("MatMul", q, g.op("Transpose", k, perm=(0, 1, 3, 2))), g.const(scale))
    scores = g.op("Mul", scores, g.const(times)) if times != 1 else scores
    weights = g.op("Softmax", scores, **({} if axis is None else {"axis": axis}))
    context = g.op("Transpose", g.op("MatMul", weights, v), perm=(0, 2, 1, 3))
    g.output(g.layer(g.reshape(context, 0, 0, WIDE), CHANNELS, channels=WIDE), 3)


def heads(g: Graph, a: str) -> str:
    return str(g.op("Transpose", g.reshape(a, 0, 0, HEADS, SIZE), perm=(0, 2, 1, 3)))


def three(g: Graph) -> list[str]:
    x = g.input("x", ["B", "S", CHANNELS])
    return [heads(g, g.layer(x, WIDE)) for _ in range(3)]
