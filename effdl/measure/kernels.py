"""Kernel times as ONNX Runtime tells them, made into times of the model's own nodes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from effdl.measure.origin import Origins, map_origins
from effdl.measure.owngraph import Graph, Node
from effdl.report import NodeTime, OpTime, Profile


@dataclass(frozen=True)
class Kernels:
    """What a worker's ``trace`` and ``traced`` told.

    Args:
        rows: mean time per inference of each kernel, in order of execution.
        runs: inferences that the times come from.
        event_us: by how much the profiler overstates every kernel, at least.
        assigned: the nodes of the model per part that a provider took.
    """

    rows: list[dict[str, Any]]
    runs: int
    event_us: float = 0.0
    assigned: list[dict[str, Any]] = field(default_factory=list)


def make_profile(
    path: str, own: Graph, executed: Graph, kernels: Kernels, wall_ms: float
) -> Profile:
    """Put kernel times and graphs together.

    Args:
        path: of the model.
        own: its graph.
        executed: what ONNX Runtime made of it; without nodes where it cannot tell.
        kernels: their times.
        wall_ms: time of an inference without profiling.
    """
    rows = kernels.rows
    compiled: dict[int, tuple[str, ...]] = {}
    if not executed.nodes:  # what is left are names
        executed = Graph([Node(r["name"], r["op_type"], (), (), ()) for r in rows])
        compiled = _compiled(own, kernels)
    origins = map_origins(own, executed)
    cost = _event_cost(rows, wall_ms, kernels.event_us)
    ms = _less(rows, cost)
    scale = min(1.0, wall_ms / sum(ms)) if any(ms) else 1.0
    at = _positions(rows, executed)
    nodes = [
        NodeTime(
            name=row["name"],
            op_type=row["op_type"],
            provider=row["provider"],
            ms=t * scale,
            origin=compiled.get(i) or (origins.of[k] if k is not None else ()),
            shape=row["shape"],
            near=origins.near[k] if k is not None else (),
        )
        for i, (row, k, t) in enumerate(zip(rows, at, ms, strict=True))
    ]
    nodes.sort(key=lambda n: -n.ms)
    return Profile(
        path=path,
        wall_ms=wall_ms,
        kernel_ms=sum(n.ms for n in nodes),
        runs=kernels.runs,
        ops=op_times(nodes),
        nodes=tuple(nodes),
        event_us=cost,
        scale=scale,
        folded=tuple(n for n in origins.folded if not any(n in c for c in compiled.values())),
        idle=_idle(origins, at),
    )


def _event_cost(rows: list[dict[str, Any]], wall_ms: float, least: float) -> float:
    """Return the microseconds to take off every kernel.

    That is ``least``, as found on a chain of small kernels. Writing down a profile also drives data of
    the model out of the caches; so where the kernels would still take longer than the whole
    inference, it is as much as brings them there, but at most twice as much.
    """
    low, high = least, 2 * least
    if sum(_less(rows, low)) <= wall_ms:
        return low
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(_less(rows, middle)) > wall_ms else (low, middle)
    return high


def _less(rows: list[dict[str, Any]], cost: float) -> list[float]:
    return [max(0.0, row["ms"] - row["calls"] * cost / 1000) for row in rows]


def op_times(nodes: Sequence[NodeTime]) -> tuple[OpTime, ...]:
    """Sum nodes up by op type, longest first."""
    count = Counter(n.op_type for n in nodes)
    ms: dict[str, float] = defaultdict(float)
    for node in nodes:
        ms[node.op_type] += node.ms
    return tuple(OpTime(op, count[op], ms[op]) for op in sorted(ms, key=lambda op: -ms[op]))


def _positions(rows: list[dict[str, Any]], executed: Graph) -> list[int | None]:
    """Return for each row the number of its node; those without a name are told by their order."""
    places: dict[tuple[str, str], list[int]] = defaultdict(list)
    for k, node in enumerate(executed.nodes):
        places[node.name, node.op_type].append(k)
    found: list[int | None] = []
    for row in rows:
        name, op_type = row["name"], row["op_type"]
        if name == f"{op_type}_{row['index']}" and not places.get((name, op_type)):
            name = ""
        left = places.get((name, op_type))
        found.append(left.pop(0) if left else None)
    return found


def _idle(origins: Origins, at: list[int | None]) -> tuple[str, ...]:
    ran = {k for k in at if k is not None}
    names = {n for k in ran for n in origins.of[k]}
    rest = (n for k, of in enumerate(origins.of) if k not in ran for n in of if n not in names)
    return tuple(dict.fromkeys(rest))


def _compiled(own: Graph, kernels: Kernels) -> dict[int, tuple[str, ...]]:
    """Return the model's nodes in each kernel that a provider compiled from several, by its number.

    They are taken to run in the order in which ONNX Runtime tells them.
    """
    labels = {n.name: n.label for n in own.nodes}
    told = {name for part in kernels.assigned for name, _, _ in part["nodes"]}
    parts: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for part in kernels.assigned:
        if len(part["nodes"]) > 1:
            names = tuple(labels.get(name, name) for name, _, _ in part["nodes"])
            parts[part["provider"]].append(names)
    return {
        k: parts[row["provider"]].pop(0)
        for k, row in enumerate(kernels.rows)
        if row["name"] not in told and parts[row["provider"]]
    }
