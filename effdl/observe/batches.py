"""Samples of one shape run together, which takes a fraction of the time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import numpy as np
import onnx_ir as ir

from effdl.data.feeds import Feed, Feeds, nbytes
from effdl.graph.dims import model_inputs
from effdl.runtime.session import open_session
from effdl.runtime.target import parse_target

_BATCH = 16
_BYTES = 1 << 20
"""Of a batch's inputs: larger ones keep the cores busy alone, and their activations fill memory."""
_CLOSE = 1e-3


def batched(model: ir.Model, feeds: Feeds, *, size: int = _BATCH, threads: int = 0) -> Feeds:
    """Return the samples in batches, or as they are where the model's first axes are not of a batch.

    The model runs on a few samples alone and together: the results must be the same.

    Args:
        model: runs on the samples as they are.
        feeds: samples.
        size: of a batch, at most.
        threads: intra-op threads, 0 for ONNX Runtime's choice.

    Raises:
        ModelError: the model does not run.
    """
    size = min(size, _BYTES // max(1, nbytes(feeds.batches[0]))) if len(feeds) else 0
    if size < 2 or len(feeds) < 2 * size or not _may(model, feeds):
        return feeds
    session = open_session(model, parse_target("cpu", threads))
    few = [feeds.batches[k] for k in range(3)]
    alone = [session.run(f) for f in few]
    together = session.run(_joined(few))
    for name, array in together.items():
        parts = [np.asarray(a[name]) for a in alone]
        if any(p.ndim == 0 or p.shape[0] != 1 for p in parts):
            return feeds
        apart = np.concatenate(parts)
        if apart.shape != array.shape or not np.allclose(apart, array, rtol=_CLOSE, atol=_CLOSE):
            return feeds
    return Feeds(_Batches(feeds.batches, size), feeds.source, feeds.real)


def _may(model: ir.Model, feeds: Feeds) -> bool:
    """Whether every input has a first axis that is free, and all samples are of one shape."""
    inputs = model_inputs(model)
    if any(v.shape is None or not len(v.shape) or isinstance(v.shape[0], int) for v in inputs):
        return False
    first = {n: a.shape for n, a in feeds.batches[0].items()}
    if any(not s or s[0] != 1 for s in first.values()):
        return False
    return all({n: a.shape for n, a in feed.items()} == first for feed in feeds)


def _joined(feeds: Sequence[Feed]) -> Feed:
    return {name: np.concatenate([f[name] for f in feeds]) for name in feeds[0]}


class _Batches(Sequence[Feed]):
    """Batches that are put together when they are asked for."""

    def __init__(self, feeds: Sequence[Feed], size: int) -> None:
        self._feeds = feeds
        self._size = size

    def __len__(self) -> int:
        return math.ceil(len(self._feeds) / self._size)

    @overload
    def __getitem__(self, index: int) -> Feed: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Feed]: ...

    def __getitem__(self, index: int | slice) -> Feed | Sequence[Feed]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self._size
        return _joined(
            [self._feeds[k] for k in range(start, min(start + self._size, len(self._feeds)))]
        )
