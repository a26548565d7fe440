"""The places of a graph in two profiles: which kernels do the same work before and after, and their times."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from effdl.report import NodeTime, Profile

CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "Cast")
"""Kernels that only stand between two number formats."""
LAYOUTS = ("Transpose", "ReorderInput", "ReorderOutput")
"""Kernels that ONNX Runtime puts between operators that want their numbers in another order."""
_CONVERSION = re.compile(r"_(Dequ|DynamicQu|Qu)antizeLinear(_\d+)?$")
_HOPS = 3
"""So far from a node of the model before, a new one still works for it."""


@dataclass(frozen=True)
class Part:
    """A place of the graph, with everything that does its work in either model.

    Args:
        names: nodes of the model before; of the one after, where they are not in the model before.
        before_ms, after_ms: time of the kernels.
        border_ms: of the conversions of numbers that work for it in the model after, and not before.
    """

    names: tuple[str, ...]
    before_ms: float
    after_ms: float
    border_ms: float


def parts(before: Profile, after: Profile) -> list[Part]:
    """Return the places of two profiles.

    A place is a set of nodes of the model before (the names it is given with) with everything that
    does their work in either model, and with what works for them there only: the QuantizeLinear after
    a node, the DequantizeLinear, cast or reorder before it.
    """
    known = {name for node in before.nodes for name in node.origin}
    after = in_names_of(before, after)
    places = _Places()
    for node in before.nodes:
        places.join(node.origin)
    by_name: dict[str, NodeTime] = {}
    for node in after.nodes:
        places.join(n for n in node.origin if n in known)
        for name in node.origin:
            by_name.setdefault(name, node)
    times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for side, profile in enumerate((before, after)):
        for node in profile.nodes:
            name = _served(node, known, by_name)
            if name:
                border = side == 1 and is_border(node, known)
                times[places.root(name)][2 if border else side] += node.ms
    names = places.members()
    return [Part(tuple(names[root]), *ms) for root, ms in times.items()]


def is_border(node: NodeTime, known: set[str]) -> bool:
    """Whether a kernel converts numbers for nothing that the model before does; ``known`` are its nodes."""
    return node.op_type in CONVERSIONS and not any(name in known for name in node.origin)


def elements(node: NodeTime) -> int:
    """Return how many numbers the kernel's first output has, 0 when that is unknown."""
    found = re.search(r"\[([\d,]*)\]$", node.shape)
    return math.prod(int(d) for d in found[1].split(",") if d) if found else 0


def culprits(before: Profile, after: Profile) -> list[tuple[tuple[str, ...], float, float]]:
    """Return the places of the graph that got slower, the largest loss first.

    Returns:
        ``(names, before_ms, after_ms)`` of each place whose time grew, conversions included.
    """
    found = [(p.names, p.before_ms, p.after_ms + p.border_ms) for p in parts(before, after)]
    return sorted((f for f in found if f[2] > f[1]), key=lambda f: f[1] - f[2])


def in_names_of(before: Profile, after: Profile) -> Profile:
    """Return ``after`` with names such as ``Conv_1_quant`` as the ``Conv_1`` that ``before`` has."""
    known = {name for node in before.nodes for name in node.origin}

    def old(name: str) -> str:
        if _CONVERSION.search(name) and name not in known:
            return (
                name  # it is named after a value, which may be called like the node that makes it
            )
        stem = name
        while stem and stem not in known:
            stem, _, part = stem.rpartition("_")
            if part.isdigit():  # a number tells one node from another
                return name
        return stem or name

    nodes = tuple(
        replace(n, origin=tuple(map(old, n.origin)), near=tuple(map(old, n.near)))
        for n in after.nodes
    )
    return replace(after, nodes=nodes)


def _served(node: NodeTime, known: set[str], by_name: dict[str, NodeTime]) -> str:
    """Return a name of ``known`` that the node computes or works for; its own, when there is none."""
    at: NodeTime | None = node
    for _ in range(_HOPS):
        if at is None:
            break
        for name in (*at.origin, *at.near):
            if name in known:
                return name
        at = by_name.get(next(iter(at.near), ""))
    return next(iter((*node.origin, *node.near)), "")


class _Places:
    """Sets of names that grow together."""

    def __init__(self) -> None:
        self._up: dict[str, str] = {}

    def root(self, name: str) -> str:
        self._up.setdefault(name, name)
        while self._up[name] != name:
            self._up[name] = self._up[self._up[name]]
            name = self._up[name]
        return name

    def join(self, names: Iterable[str]) -> None:
        roots = [self.root(n) for n in names]
        for root in roots[1:]:
            self._up[self.root(root)] = self.root(roots[0])

    def members(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for name in self._up:
            found[self.root(name)].append(name)
        return found
