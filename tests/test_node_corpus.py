"""Passes that must not change an output, over every operator: onnx's own node cases and a peer's corpus."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.backend.test.case.node import collect_testcases

from effdl.graph import io
from effdl.passes.base import Pass
from effdl.passes.fold.batchnorm import FoldBatchnorm
from effdl.passes.simplify import Simplify
from tests.support import SHARED, context, needs_shared

CHUNKS = 20
NO_LIMIT = 1 << 40
# Range gets vectors of one element there, which ONNX Runtime refuses once it can see their shape.
ILL_TYPED = "test_affine_grid_"
KINDS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")


@cache
def cases() -> list[Any]:
    return sorted(collect_testcases(None), key=lambda c: str(c.name))


def session(proto: onnx.ModelProto) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def plain(value: Any) -> Any:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def equal(a: Any, b: Any, rtol: float, atol: float) -> bool:
    if isinstance(b, list | tuple):
        return len(a) == len(b) and all(equal(x, y, rtol, atol) for x, y in zip(a, b, strict=True))
    if isinstance(b, dict):
        return bool(a == b)
    if b is None or a is None:
        return a is b
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return False
    if b.dtype.kind in "OUS":
        return bool((a.astype(str) == b.astype(str)).all())
    return bool(
        np.allclose(
            a.astype(np.float64), b.astype(np.float64), rtol=rtol, atol=atol, equal_nan=True
        )
    )


def usable(case: Any) -> tuple[onnx.ModelProto, dict[str, Any], list[Any]] | None:
    """The case's model, a feed and ONNX Runtime's own outputs; None when it cannot run it right."""
    proto = onnx.ModelProto()
    proto.CopyFrom(case.model)
    proto.ir_version = min(proto.ir_version, 10)
    inputs, expected = case.data_sets[0]
    try:
        raw = session(proto)
        feed = {
            port.name: np.asarray(plain(v)) if isinstance(plain(v), np.generic) else plain(v)
            for port, v in zip(raw.get_inputs(), inputs, strict=False)
            if v is not None
        }
        got = raw.run(None, feed)
    except Exception:  # what ONNX Runtime cannot run untouched says nothing about a pass
        return None
    if not all(
        equal(a, plain(b), case.rtol, case.atol) for a, b in zip(got, expected, strict=False)
    ):
        return None
    return proto, feed, got


def constant_inputs(proto: onnx.ModelProto, feed: dict[str, Any]) -> onnx.ModelProto | None:
    """The model with every input made an initializer; None when one is no plain tensor."""
    twin = onnx.ModelProto()
    twin.CopyFrom(proto)
    del twin.graph.input[:]
    for name, value in feed.items():
        if not isinstance(value, np.ndarray):
            return None
        twin.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return twin


def numbers(value: Any) -> bool:
    return (
        isinstance(value, np.ndarray)
        and value.dtype.kind in "fiu"
        and bool(value.size and np.isfinite(value).all())
    )


def check(step: Pass, proto: onnx.ModelProto, feed: dict[str, Any], want: list[Any]) -> int:
    model = ir.from_proto(proto)
    changes = step.run(model, context())
    if changes:
        io.check(model)
        got = session(ir.to_proto(model)).run(None, feed)
        # ONNX Runtime computes parts of a float16 graph in float32, which parts depends on the graph.
        size = max([1.0, *(float(np.abs(w).max()) for w in want if numbers(w))])
        half = any(getattr(w, "dtype", None) == np.float16 for w in want)
        rtol, atol = (4e-3, 1e-3) if half else (1e-5, 1e-6 * size)
        assert all(equal(a, b, rtol, atol) for a, b in zip(got, want, strict=True)), "differs"
        assert step.run(model, context()) == 0, "a second run changes something"
    return changes


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_node_cases_keep_their_outputs(chunk: int) -> None:
    failures = []
    tried = changed = 0
    for case in cases()[chunk::CHUNKS]:
        found = usable(case)
        if found is None or case.name.startswith(ILL_TYPED):
            continue
        proto, feed, want = found
        random = any(n.op_type in ("Bernoulli", "Dropout") for n in proto.graph.node)
        frozen = None if random else constant_inputs(proto, feed)
        tried += 1
        try:
            changed += check(Simplify(), proto, feed, want) > 0
            if frozen is not None:
                changed += check(Simplify(max_growth=NO_LIMIT), frozen, {}, want) > 0
            if any(n.op_type in KINDS for n in proto.graph.node):
                check(FoldBatchnorm(), proto, feed, want)
        except Exception as e:
            failures.append(f"{case.name}: {type(e).__name__}: {str(e)[:300]}")
    assert not failures, "\n".join(failures)
    assert tried > 30
    assert changed > 20


def corpus_feed(model: onnx.ModelProto, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    feed = {}
    for port in session(model).get_inputs():
        shape = [d if isinstance(d, int) and d > 0 else 2 for d in port.shape]
        kind = port.type
        if kind == "tensor(bool)":
            feed[port.name] = rng.integers(0, 2, shape).astype(bool)
        elif "int" in kind:
            feed[port.name] = rng.integers(1, 3, shape).astype(kind[7:-1])
        else:
            width = {"tensor(float16)": np.float16, "tensor(double)": np.float64}
            feed[port.name] = rng.standard_normal(shape).astype(width.get(kind, np.float32))
    return feed


@needs_shared
@pytest.mark.shared
@pytest.mark.parametrize("step", [Simplify(), FoldBatchnorm()], ids=["simplify", "fold_batchnorm"])
def test_peer_corpus_keeps_its_outputs(step: Pass) -> None:
    assert SHARED is not None
    failures = []
    run = 0
    for file in sorted((SHARED / "corpus" / "onnxoptimizer").glob("*.onnx")):
        proto = onnx.load(file)
        try:
            feed = corpus_feed(proto)
            want = session(proto).run(None, feed)
        except Exception:  # a third of the corpus was never meant to run
            feed = None
        try:
            if feed is None:
                step.run(ir.from_proto(proto), context())
            else:
                check(step, proto, feed, want)
                run += 1
        except Exception as e:
            failures.append(f"{file.name}: {type(e).__name__}: {str(e)[:300]}")
    assert not failures, "\n".join(failures)
    assert run > 60
