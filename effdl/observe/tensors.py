"""Runs a model over calibration data and hands out what its tensors hold, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.data.feeds import Feed, Feeds, nbytes
from effdl.graph.weights import Names
from effdl.runtime.session import Session, open_session
from effdl.runtime.target import parse_target

MAX_BYTES = 256 << 20
"""Bytes of activations that one run may return."""
Array = npt.NDArray[np.generic]


def tensors(
    model: ir.Model,
    names: Sequence[str],
    feeds: Feeds,
    *,
    threads: int = 0,
    max_bytes: int = MAX_BYTES,
) -> Iterator[tuple[str, Array]]:
    """Yield each tensor of ``names`` for each feed.

    The activations of one feed are in memory at a time, and of them at most ``max_bytes`` (but at
    least one tensor): where they are more, the model runs over the data several times.

    Args:
        model: is not changed.
        names: values of its main graph: graph inputs or outputs of nodes.
        feeds: calibration samples.
        threads: intra-op threads, 0 for ONNX Runtime's choice.
        max_bytes: see above.

    Raises:
        ModelError: ONNX Runtime cannot load or run the model.
    """
    inputs = {v.name for v in model.graph.inputs}
    computed = [n for n in names if n not in inputs]
    for name in (n for n in names if n in inputs):
        for feed in feeds:
            yield name, feed[name]
    for chunk in _chunks(model, computed, feeds, threads, max_bytes):
        session = _session(model, chunk, threads)
        for feed in feeds:
            found = session.run(feed)
            for name in chunk:
                yield name, found.pop(name)
        del session


def _chunks(
    model: ir.Model, names: Sequence[str], feeds: Feeds, threads: int, max_bytes: int
) -> Iterator[list[str]]:
    """Split ``names`` so that the arrays of each part fit into ``max_bytes``."""
    if not names:
        return
    sizes = _sizes(model, names, max(feeds, key=nbytes), threads)
    chunk: list[str] = []
    used = 0
    for name in names:
        if chunk and used + sizes[name] > max_bytes:
            yield chunk
            chunk, used = [], 0
        chunk.append(name)
        used += sizes[name]
    yield chunk


def _sizes(model: ir.Model, names: Sequence[str], feed: Feed, threads: int) -> dict[str, int]:
    """Bytes of each tensor on ``feed``; the model returns shapes instead of the tensors."""
    copy = model.clone()
    values = _values(copy)
    fresh = Names(copy)
    shapes = []
    for name in names:
        node = ir.node("Shape", [values[name]])
        output = node.outputs[0]
        output.name = fresh.fresh(f"{name}_shape")
        output.type = ir.TensorType(ir.DataType.INT64)
        copy.graph.append(node)
        shapes.append(output)
    copy.graph.outputs[:] = shapes
    found = open_session(copy, parse_target("cpu", threads)).run(feed)
    return {n: 4 * int(np.prod(found[s.name or ""])) for n, s in zip(names, shapes, strict=True)}


def _session(model: ir.Model, names: Sequence[str], threads: int) -> Session:
    """Open a copy of the model whose outputs are ``names``."""
    copy = model.clone()
    values = _values(copy)
    for name in names:
        if values[name].type is None:
            values[name].type = ir.TensorType(ir.DataType.FLOAT)
    copy.graph.outputs[:] = [values[n] for n in names]
    return open_session(copy, parse_target("cpu", threads))


def _values(model: ir.Model) -> dict[str, ir.Value]:
    return {o.name or "": o for node in model.graph for o in node.outputs}
