"""Groups of channels that can be removed from a model, and what stops the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effdl.graph.channels.labels import Ints, Units
from effdl.graph.channels.registry import follow
from effdl.graph.channels.trace import ALONG, IN, OUT, Role, Trace
from effdl.graph.probes import Probes, probe
from effdl.graph.walk import nodes_in, subgraphs_of
from effdl.graph.weights import constant_tensor

_TRIES = 3


@dataclass(frozen=True)
class Group:
    """Channels that are alike: each could be removed without the others.

    Args:
        units: [n] numbers of the units; one unit is all that goes with one channel (or head).
        roles: axes of weights that have channels of the group, in the graph's order.
        reason: why they cannot be removed, empty where they can.
    """

    units: Ints
    roles: tuple[Role, ...]
    reason: str

    def __len__(self) -> int:
        return len(self.units)

    def of_kind(self, kind: str) -> tuple[Role, ...]:
        """Return the roles of one kind: OUT of layers that make the channels, IN of those that read them."""
        return tuple(r for r in self.roles if r.kind == kind)

    @property
    def makers(self) -> tuple[ir.Node, ...]:
        """The layers that make the channels."""
        return tuple(dict.fromkeys(r.node for r in self.of_kind(OUT)))

    @property
    def readers(self) -> tuple[ir.Node, ...]:
        """The layers that sum over the channels."""
        return tuple(dict.fromkeys(r.node for r in self.of_kind(IN)))

    @property
    def width(self) -> int:
        """How many outputs of its maker one unit is: 1 for a channel, its size for a head."""
        widths = [
            max(1, int(role.value.shape.numpy()[role.axis]) // max(1, len(self)))
            for role in self.of_kind(OUT)
            if role.value.shape is not None
        ]
        return min(widths, default=1)

    @property
    def name(self) -> str:
        """What the group is called: its first layer."""
        nodes = self.makers or tuple(r.node for r in self.roles)
        return (nodes[0].name or nodes[0].op_type) if nodes else ""


@dataclass(frozen=True)
class Channels:
    """Every position of every tensor of a model's main graph, and which go together.

    Args:
        axes: labels per axis of each value, None for an axis that is dynamic or of length 1.
        units: the sets of labels.
        groups: all of them, in the graph's order; those with a reason stay.
    """

    axes: dict[ir.Value, tuple[Ints | None, ...]]
    units: Units
    groups: tuple[Group, ...]

    def of(self, value: ir.Value, axis: int) -> Ints | None:
        """Return the unit of each position along an axis."""
        found = self.axes.get(value, ())
        labels = found[axis] if -len(found) <= axis < len(found) else None
        return None if labels is None else self.units.of[labels]

    @property
    def free(self) -> tuple[Group, ...]:
        """The groups whose channels can be removed."""
        return tuple(g for g in self.groups if not g.reason)


def channels(model: ir.Model) -> Channels:
    """Find the groups of channels of a model's main graph.

    Where a Reshape splits an axis there is a choice which part of it takes the channels (heads or their
    sizes); the first part does, unless another one frees more.

    Source: dependency graphs (DepGraph, Fang et al. 2023), here with an index for every position.
    """
    probes = probe(model, alike=True)
    best = _analysed(model, probes, {})
    for pattern in best.patterns:
        for choice in range(1, min(pattern.choices, _TRIES + 1)):
            tried = {**best.chosen, **dict.fromkeys(pattern.nodes, choice)}
            other = _analysed(model, probes, tried)
            if other.free > best.free:
                best = other
    return Channels(best.trace.axes, best.units, _groups(best.trace, best.units))


@dataclass(frozen=True)
class _Pattern:
    """Reshape nodes that split axes of the same lengths, and in how many ways that can be read."""

    nodes: tuple[ir.Node, ...]
    choices: int


@dataclass(frozen=True)
class _Analysis:
    trace: Trace
    units: Units
    chosen: dict[ir.Node, int]
    free: int

    @property
    def patterns(self) -> Iterator[_Pattern]:
        alike: dict[tuple[tuple[int, ...], tuple[int, ...]], list[ir.Node]] = defaultdict(list)
        for node in self.trace.splits:
            alike[self._lengths(node.inputs[0]), self._lengths(node.outputs[0])].append(node)
        for nodes in alike.values():
            yield _Pattern(tuple(nodes), max(self.trace.splits[n] for n in nodes))

    def _lengths(self, value: ir.Value | None) -> tuple[int, ...]:
        return tuple(0 if a is None else len(a) for a in self.trace.of(value))


def _analysed(model: ir.Model, probes: Probes, chosen: dict[ir.Node, int]) -> _Analysis:
    trace = Trace(probes, choices=chosen)
    for value in model.graph.inputs:
        trace.stop_value(value, f"the model's input {value.name}")
    for node in model.graph:
        if constant_tensor(node.outputs[0] if node.outputs else None) is None:
            follow(trace, node)
        for inner in subgraphs_of(node):
            _stop_captured(trace, inner, model.graph)
    for value in model.graph.outputs:
        trace.stop_value(value, f"the model's output {value.name}")
    units = trace.labels.units()
    removable = set[int]()
    for role in trace.roles:
        axis = trace.axis(role.value, role.axis)
        if role.kind == OUT and axis is not None:
            removable.update(np.unique(units.of[axis]).tolist())
    free = sum(units.frozen[u] < 0 for u in removable)
    return _Analysis(trace, units, chosen, int(free))


def _stop_captured(trace: Trace, inner: ir.Graph, outer: ir.Graph) -> None:
    values = [v for node in nodes_in(inner) for v in node.inputs]
    for value in (*values, *inner.outputs):
        if value is not None and value.graph is outer:
            trace.stop_value(value, "read inside a branch or loop")


def _groups(trace: Trace, units: Units) -> tuple[Group, ...]:
    """Put the units together that touch the same axes of weights."""
    touched: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, role in enumerate(trace.roles):
        axis = trace.axis(role.value, role.axis)
        if axis is not None:
            for unit, count in zip(*np.unique(units.of[axis], return_counts=True), strict=True):
                touched[int(unit)].append((number, int(count)))
    alike: dict[tuple[tuple[tuple[int, int], ...], int], list[int]] = defaultdict(list)
    for unit, places in touched.items():
        if any(trace.roles[n].kind in (OUT, ALONG) for n, _ in places):
            alike[tuple(places), int(units.frozen[unit])].append(unit)
    found = []
    for (at, frozen), members in alike.items():
        roles = tuple(trace.roles[n] for n, _ in at)
        if any(r.kind in (IN, OUT) for r in roles):
            reason = "" if frozen < 0 else units.reasons[frozen]
            found.append(Group(np.array(sorted(members), np.int64), roles, reason))
    return tuple(found)
