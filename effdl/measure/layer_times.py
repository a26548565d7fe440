"""How long single layers take on a target: a node and what could stand in its place, timed in turns.

A piece is a small model of its own. One worker process measures all of a call: it loads a piece, runs it
for a block, goes on to the next, and comes round again, so that what disturbs the machine meets all of them.
Conversions of layout at the ends of a piece are part of its time; they are the same for all that stand for
one layer, so differences are fair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effdl.data.feeds import Feed
from effdl.errors import EffdlError
from effdl.graph import io
from effdl.graph.scratch import scratch
from effdl.graph.shapes import Shapes
from effdl.graph.weights import constant_tensor
from effdl.measure import verdict
from effdl.measure.sending import write_feeds
from effdl.runtime.client import WorkerProcess
from effdl.runtime.host import open_host
from effdl.runtime.target import Target, where_to_check

_ROUNDS = 5
_WARM_MS = 2.0
_LEAST_MS = 2.0
_SMALL = 8
"""Integers of a made input are below this: they may be indices."""


@dataclass(frozen=True)
class Piece:
    """A model to be timed, and what it is run on."""

    model: ir.Model
    feed: Feed


def cut(
    model: ir.Model, nodes: Sequence[ir.Node], shapes: Shapes, *, seed: int = 0
) -> Piece | None:
    """Return some nodes as a model of their own, with their weights and random inputs.

    Args:
        model: which the nodes belong to; it stays as it is. Tensors are shared, not copied.
        nodes: in order of computation; none with a body.
        shapes: of all values, with every dimension known: ``graph.shapes.infer(model, dims)``.
        seed: of the inputs.

    Returns:
        None where the shape or type of an input is not known.
    """
    rng = np.random.default_rng(seed)
    made = {o for n in nodes for o in n.outputs}
    inside = set(nodes)
    table: dict[ir.Value, ir.Value] = {}
    inputs, weights, feed = list[ir.Value](), list[ir.Value](), dict[str, np.ndarray]()
    for value in dict.fromkeys(v for n in nodes for v in n.inputs if v is not None):
        if value in made:
            continue
        name = value.name or f"in{len(table)}"
        tensor = constant_tensor(value)
        if tensor is not None:
            twin = ir.Value(
                name=name,
                shape=ir.Shape(tensor.shape.numpy()),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            weights.append(twin)
        else:
            shape, dtype = shapes.static(value), shapes.dtype(value)
            if shape is None or dtype is None or dtype == ir.DataType.STRING:
                return None
            twin = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
            inputs.append(twin)
            feed[name] = _made(shape, dtype, rng)
        table[value] = twin
    copies = []
    for node in nodes:
        outs = [ir.Value(name=o.name, type=_type_of(o, shapes)) for o in node.outputs]
        table |= dict(zip(node.outputs, outs, strict=True))
        copies.append(
            ir.Node(
                node.domain,
                node.op_type,
                [None if v is None else table[v] for v in node.inputs],
                dict(node.attributes),
                outputs=outs,
                name=node.name,
            )
        )
    outputs = [
        table[o]
        for n in nodes
        for o in n.outputs
        if o.name and (o.is_graph_output() or any(u.node not in inside for u in o.uses()))
    ]
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=copies,
        initializers=weights,
        opset_imports=dict(model.graph.opset_imports),
        name="piece",
    )
    return Piece(ir.Model(graph, ir_version=max(model.ir_version, 4)), feed)


def cannot_time(target: Target) -> str:
    """Return why layers cannot be timed on a target, an empty string when they can be tried."""
    return where_to_check(target)[1]


def times(
    pieces: Sequence[Piece | bytes],
    target: Target,
    *,
    feeds: Sequence[Feed] = (),
    seconds: float = 0.3,
    rounds: int = _ROUNDS,
) -> list[float]:
    """Return the median time of each piece in ms.

    Args:
        pieces: models with their feeds, or serialized models whose feeds are ``feeds`` in order.
        target: where; ``target.threads`` are used.
        seconds: of running per piece, in all rounds together; loading comes on top.
        rounds: how often each has its turn.

    Raises:
        TargetError: the machine cannot be reached.
        ModelError: a piece does not load or run there.
    """
    if not pieces:
        return []
    block_ms = max(_LEAST_MS, 1e3 * seconds / rounds)
    levels: list[list[float]] = [[] for _ in pieces]
    with scratch() as folder, open_host(target) as host, host.worker("a layer") as worker:
        loads = []
        for k, piece in enumerate(pieces):
            place = folder / str(k)
            place.mkdir()
            path = place / "piece.onnx"
            path.write_bytes(piece if isinstance(piece, bytes) else io.to_bytes(piece.model))
            feed = feeds[k] if isinstance(piece, bytes) else piece.feed
            loads.append((host.send(path), write_feeds([feed], place, host)))
        options = {"providers": list(host.target.providers), "threads": host.target.threads}
        for number in range(rounds):
            order = range(len(pieces)) if number % 2 == 0 else reversed(range(len(pieces)))
            for k in order:
                model, files = loads[k]
                worker.ask("load", model=model, feeds=files, **options)
                levels[k].append(_block(worker, block_ms))
    return [float(np.median(found)) for found in levels]


def _block(worker: WorkerProcess, block_ms: float) -> float:
    worker.block(min_ms=_WARM_MS)
    return verdict.block_time(worker.block(min_ms=block_ms)[0]) / 1e6


def try_times(
    pieces: Sequence[Piece], target: Target, *, seconds: float = 0.3
) -> tuple[list[float] | None, str]:
    """Return what ``times`` returns and an empty text, or None and why nothing could be measured."""
    reason = cannot_time(target)
    if reason:
        return None, reason
    try:
        return times(pieces, target, seconds=seconds), ""
    except EffdlError as e:
        return None, e.message


def _made(
    shape: tuple[int, ...], dtype: ir.DataType, rng: np.random.Generator
) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    kind = dtype.numpy()
    if dtype.is_floating_point():
        return rng.standard_normal(shape, np.float32).astype(kind)
    return rng.integers(0, 2 if dtype == ir.DataType.BOOL else _SMALL, shape).astype(kind)


def _type_of(value: ir.Value, shapes: Shapes) -> ir.TypeProtocol | None:
    dtype = shapes.dtype(value)
    return value.type if dtype is None else ir.TensorType(dtype)
