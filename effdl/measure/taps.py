"""Intermediate tensors of a model, fetched as outputs, a bounded number of bytes at a time."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from effdl.data.feeds import Feed
from effdl.graph.clean import cut
from effdl.graph.walk import opset
from effdl.graph.weights import Names
from effdl.measure.fidelity import fit
from effdl.runtime.session import Session, open_session
from effdl.runtime.target import Target

K = TypeVar("K", bound=Hashable)
_ANY_OPSET = 13


def tapped(
    model: ir.Model, names: Sequence[str], target: Target | None, *, optimize: bool
) -> Session:
    """Open a copy of the model whose outputs are the values ``names`` of its main graph.

    Nothing is computed that they do not need. Without names the outputs stay as they are. Weights are not
    copied. With ``optimize`` off the graph runs as it is written, so that what is fetched has no influence
    on what is computed.

    Raises:
        ModelError: it does not load.
    """
    copy = model.clone()
    values = _values(copy)
    if names:
        cut(copy, [values[n] for n in dict.fromkeys(names)])
    return open_session(copy, target, optimize=optimize)


def fetchable(model: ir.Model, names: Sequence[str], target: Target | None) -> set[str]:
    """Return those of ``names`` that are tensors of a type that numpy has too."""
    if not names:
        return set()
    session = tapped(model, names, target, optimize=False)
    return {p.name for p in session.outputs if p.dtype is not None}


def sizes(
    model: ir.Model, names: Sequence[str], feed: Feed, target: Target | None
) -> dict[str, int]:
    """Return the bytes of each tensor on ``feed``; those that numpy has no type for are left out.

    Raises:
        ModelError: the model does not run.
    """
    if not names:
        return {}
    session = tapped(model, names, target, optimize=False)
    ports = {p.name: p for p in session.outputs if p.dtype is not None}
    del session
    known: dict[str, int] = {}
    unknown = []
    for name, port in ports.items():
        if all(isinstance(d, int) for d in port.shape) and port.shape:
            known[name] = int(np.prod([int(d or 0) for d in port.shape], dtype=np.int64))
        else:
            unknown.append(name)
    known |= _counted(model, unknown, feed, target)
    return {n: known[n] * np.dtype(ports[n].dtype).itemsize for n in names if n in known}


def chunks(
    names: Iterable[K], size: Mapping[K, int], max_bytes: int, most: int | None = None
) -> Iterator[list[K]]:
    """Split ``names`` so that each part fits into ``max_bytes`` (but holds at least one).

    Args:
        names: of tensors or layers.
        size: bytes of each.
        max_bytes: of a part.
        most: names in a part, None for any number.
    """
    chunk: list[K] = []
    used = 0
    for name in names:
        if chunk and (used + size[name] > max_bytes or len(chunk) == most):
            yield chunk
            chunk, used = [], 0
        chunk.append(name)
        used += size[name]
    if chunk:
        yield chunk


def _counted(
    model: ir.Model, names: Sequence[str], feed: Feed, target: Target | None
) -> dict[str, int]:
    """Count the elements of tensors on ``feed``; the model returns shapes instead of the tensors."""
    if not names:
        return {}
    copy = model.clone()
    values = _values(copy)
    fresh = Names(copy)
    if not opset(copy):
        copy.opset_imports[""] = _ANY_OPSET
    shapes = []
    for name in names:
        node = ir.node("Shape", [values[name]])
        node.outputs[0].name = fresh.fresh(f"{name}_shape")
        copy.graph.append(node)
        shapes.append(node.outputs[0])
    cut(copy, shapes)
    session = open_session(copy, target, optimize=False)
    found = session.run(fit(feed, session))
    return {
        n: int(np.prod(found[s.name or ""], dtype=np.int64))
        for n, s in zip(names, shapes, strict=True)
    }


def _values(model: ir.Model) -> dict[str, ir.Value]:
    return {o.name or "": o for node in model.graph for o in node.outputs}
