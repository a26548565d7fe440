"""Putting new nodes in the place of a computation that was found in the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import onnx_ir as ir

from effdl.graph.match import attempt, closed, need
from effdl.graph.shapes import Shapes, infer
from effdl.graph.walk import function_nodes
from effdl.passes.base import Context


class Found(Protocol):
    """A computation in the graph: ``nodes`` make ``root``."""

    @property
    def root(self) -> ir.Value:
        """The result of the computation."""

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """Everything that the new nodes stand for."""


F = TypeVar("F", bound=Found)


def self_contained(found: Found, anchor: ir.Node) -> None:
    """Check that nothing but its result leaves a computation, and that it lies in one graph.

    Raises:
        Mismatch: names the value that is used elsewhere.
    """
    closed(found.nodes, found.root)
    same = all(n.graph is anchor.graph for n in found.nodes)
    need(same, "the formula reaches over the border of a subgraph")


class Replacer:
    """Replaces computations of one model, one after the other.

    What one replacement made may be an input of the next, which was found before: ``now`` tells
    what stands for a value today.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._renewed: dict[ir.Value, ir.Value] = {}

    def now(self, value: ir.Value) -> ir.Value:
        """Return the value that took the place of ``value``, itself when none did."""
        while value in self._renewed:
            value = self._renewed[value]
        return value

    def stands(self, found: Found) -> bool:
        """Whether all nodes of ``found`` are still in the graph."""
        return all(n.graph is not None for n in found.nodes)

    def put(self, found: Found, nodes: Sequence[ir.Node]) -> None:
        """Put ``nodes``, the last of which makes the result, where ``found`` was."""
        last, graph = found.root.producer(), found.root.graph
        assert last is not None
        assert graph is not None
        for node in nodes:
            if node.domain:
                self._model.opset_imports.setdefault(node.domain, 1)
        new = nodes[-1].outputs[0]
        nodes[-1].name = last.name
        for node in nodes[:-1]:
            node.name = f"{last.name}_{node.op_type}" if last.name else None
        ir.convenience.replace_nodes_and_values(
            graph, last, list(found.nodes), list(nodes), [found.root], [new]
        )
        self._renewed[found.root] = new


def replace_all(
    model: ir.Model,
    ctx: Context,
    anchors: Iterable[ir.Node],
    match: Callable[[ir.Node, Shapes], F | None],
    make: Callable[[F, Callable[[ir.Value], ir.Value]], Sequence[ir.Node]],
    tell: Callable[[F, Sequence[ir.Node]], str],
) -> int:
    """Find a computation around each anchor, then replace those found; return how many.

    Args:
        model: edited in place.
        ctx: is told what was replaced, and for each other candidate why it was not.
        anchors: the nodes to look at; the computation of each must lie outside functions.
        match: returns the computation around an anchor, None when it is no candidate at all, and
            raises Mismatch with the reason when it comes near.
        make: returns the new nodes; it gets what was found and the function that tells which value
            stands for an input today. It may raise Mismatch as well.
        tell: describes a replacement in a few words.
    """
    anchors = list(anchors)
    if not anchors:
        return 0
    shapes = infer(model)
    in_functions = set(function_nodes(model))

    looked: list[tuple[ir.Node, F | str | None]] = [(a, attempt(match, a, shapes)) for a in anchors]
    replacer = Replacer(model)
    changes = 0
    for anchor, found in looked:
        if found is None:
            continue
        if anchor in in_functions:
            found = "it is inside a function of the model"  # noqa: PLW2901
        if isinstance(found, str):
            ctx.skip(anchor, found)
            continue
        if not replacer.stands(found):
            continue  # another anchor of the same computation came first
        nodes = attempt(make, found, replacer.now)
        if isinstance(nodes, str):
            ctx.skip(anchor, nodes)
            continue
        replacer.put(found, nodes)
        ctx.touch(nodes[-1], tell(found, nodes))
        changes += 1
    return changes
