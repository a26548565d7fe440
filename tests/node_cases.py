"""The cases that the onnx wheel has for its operators: model, inputs, and the outputs it expects."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest

from tests.corpus_lab import session as open_session

in_one_worker = pytest.mark.xdist_group("node cases")
"""For tests that ask for the cases, which are made once a process."""


@cache
def cases() -> list[Any]:
    """All cases, by name; making them takes more than ten seconds."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, about infinities that the cases want
        return sorted(collect_testcases(None), key=lambda c: str(c.name))


def session(proto: onnx.ModelProto) -> Any:
    """A session of one thread."""
    return open_session(proto.SerializeToString())


def plain(value: Any) -> Any:
    """An array of a message."""
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def equal(a: Any, b: Any, rtol: float, atol: float) -> bool:
    """Whether an output is what onnx expects, in its own tolerance."""
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
    a, b = a.astype(np.float64), b.astype(np.float64)
    return bool(np.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True))


def as_expected(case: Any, got: list[Any]) -> bool:
    """Whether outputs are those of the case."""
    pairs = zip(got, case.data_sets[0][1], strict=False)
    return all(equal(a, plain(b), case.rtol, case.atol) for a, b in pairs)


def usable(case: Any) -> tuple[onnx.ModelProto, dict[str, Any], list[Any]] | None:
    """The case's model, a feed and ONNX Runtime's own outputs; None when it cannot run it right."""
    proto = onnx.ModelProto()
    proto.CopyFrom(case.model)
    proto.ir_version = min(proto.ir_version, 10)
    try:
        raw = session(proto)
        feed = {
            port.name: np.asarray(plain(v)) if isinstance(plain(v), np.generic) else plain(v)
            for port, v in zip(raw.get_inputs(), case.data_sets[0][0], strict=False)
            if v is not None
        }
        got = raw.run(None, feed)
    except Exception:  # what ONNX Runtime cannot run untouched says nothing about a pass
        return None
    return (proto, feed, got) if as_expected(case, got) else None


def constant_inputs(proto: onnx.ModelProto, feed: dict[str, Any]) -> onnx.ModelProto | None:
    """The model with every input made an initializer; None when one is no plain tensor."""
    if not all(isinstance(v, np.ndarray) for v in feed.values()):
        return None
    twin = onnx.ModelProto()
    twin.CopyFrom(proto)
    del twin.graph.input[:]
    twin.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in feed.items())
    return twin
