"""What the tests share: small models, a context for a pass, comparison in ONNX Runtime."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from effdl.data.feeds import Feeds
from effdl.graph import io
from effdl.passes.base import Context, Pass, PassLog
from effdl.runtime.session import open_session
from effdl.runtime.target import parse_target

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "sample_models"
SHARED = Path(os.environ["EFFDL_SHARED"]) if os.environ.get("EFFDL_SHARED") else None

needs_shared = pytest.mark.skipif(SHARED is None, reason="EFFDL_SHARED is not set")


def context(feeds: Feeds | None = None, *, target: str = "cpu", seed: int = 0) -> Context:
    """A context with a fresh log."""
    return Context(target=parse_target(target), feeds=feeds, seed=seed, log=PassLog())


def from_text(text: str) -> ir.Model:
    """A checked model from ONNX's textual syntax."""
    proto = onnx.parser.parse_model(text)
    return io.from_proto(proto, "text", None)


def feed_for(model: ir.Model, seed: int = 0, **dims: int) -> dict[str, np.ndarray]:
    """Normal floats, small integers; dynamic dimensions from ``dims`` or 2."""
    rng = np.random.default_rng(seed)
    feed = {}
    for port in open_session(model).inputs:
        shape = [d if isinstance(d, int) else dims.get(str(d), 2) for d in port.shape]
        assert port.dtype is not None
        if port.dtype.kind == "f":
            feed[port.name] = rng.standard_normal(shape).astype(port.dtype)
        elif port.dtype.kind == "b":
            feed[port.name] = rng.integers(0, 2, shape).astype(bool)
        else:
            feed[port.name] = rng.integers(0, 4, shape).astype(port.dtype)
    return feed


def outputs(
    model: ir.Model, feed: dict[str, np.ndarray], *, optimize: bool = True
) -> list[np.ndarray]:
    """Run the model in ONNX Runtime."""
    return list(open_session(model, optimize=optimize).run(feed).values())


def run_pass(
    step: Pass, model: ir.Model, *, feeds: Feeds | None = None, target: str = "cpu"
) -> tuple[int, PassLog]:
    """Run one pass, check the result with ONNX's checker, return the number of changes and the log."""
    ctx = context(feeds, target=target)
    changes = step.run(model, ctx)
    io.check(model)
    return changes, ctx.log


def assert_same(
    before: ir.Model, after: ir.Model, *, rtol: float = 1e-4, atol: float = 1e-5, **dims: int
) -> None:
    """Both models give the same outputs on the same random feed."""
    feed = feed_for(before, **dims)
    for want, got in zip(outputs(before, feed), outputs(after, feed), strict=True):
        assert want.dtype == got.dtype
        assert want.shape == got.shape
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


def rel_l2(want: np.ndarray, got: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference."""
    w, g = want.astype(np.float64).ravel(), got.astype(np.float64).ravel()
    return float(np.linalg.norm(w - g) / max(np.linalg.norm(w), 1e-30))


def op_counts(model: ir.Model) -> dict[str, int]:
    """Count nodes by op type, subgraphs included."""
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


@dataclass
class Result:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """What was printed as JSON."""
        found: dict[str, Any] = json.loads(self.out)
        return found


Effdl = Callable[..., Result]
"""The command line as a function, see conftest.py."""
