"""The walk over a graph that tells which positions of which tensors belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from effdl.graph.channels.labels import Ints, Labels
from effdl.graph.probes import Probes
from effdl.graph.weights import constant_tensor

OUT, IN, ALONG = "out", "in", "along"
"""What an axis of a weight is to its layer: it makes channels, sums over them, or goes along with them."""


@dataclass(frozen=True)
class Role:
    """An axis of a constant.

    Args:
        node: the layer that reads it as input ``index``.
        axis: of the constant, not negative.
        kind: OUT, IN or ALONG.
        value: the constant.
    """

    node: ir.Node
    index: int
    axis: int
    kind: str
    value: ir.Value


@dataclass
class Trace:
    """What rules write down.

    Args:
        probes: shapes of all values.
        labels: of all positions.
        axes: labels per axis of every value that was seen; None for a dynamic axis, or one of length 1.
        roles: axes of weights.
        choices: which part of an axis that a Reshape splits takes the channels, by node; 0 for the first.
        splits: the Reshape nodes where there was a choice, with the number of parts.
    """

    probes: Probes
    labels: Labels = field(default_factory=Labels)
    axes: dict[ir.Value, tuple[Ints | None, ...]] = field(default_factory=dict)
    roles: list[Role] = field(default_factory=list)
    choices: dict[ir.Node, int] = field(default_factory=dict)
    splits: dict[ir.Node, int] = field(default_factory=dict)

    def of(self, value: ir.Value | None) -> tuple[Ints | None, ...]:
        """Return the labels of each axis of a value; none where its shape is not known."""
        if value is None:
            return ()
        if value not in self.axes:
            self.axes[value] = tuple(
                self.labels.fresh(n[0]) if len(set(n)) == 1 and n[0] > 1 else None
                for n in zip(*self.sizes(value), strict=True)
            )
        return self.axes[value]

    def axis(self, value: ir.Value | None, axis: int) -> Ints | None:
        """Return the labels of one axis, None where they are not known."""
        found = self.of(value)
        return found[axis] if -len(found) <= axis < len(found) else None

    def sizes(self, value: ir.Value) -> tuple[tuple[int, ...], ...]:
        """Return the shape of a value at each probe; nothing where it is not known."""
        tensor = constant_tensor(value)
        if tensor is not None:
            return (tuple(int(n) for n in tensor.shape.numpy()),)
        return self.probes.of(value) or ()

    def tie(self, left: Ints | None, right: Ints | None) -> None:
        """Let two axes go together; one that meets an unknown one, or another length, is frozen."""
        if left is None or right is None or left.shape != right.shape:
            self.stop(left, "an axis that it meets is dynamic or of another length")
            self.stop(right, "an axis that it meets is dynamic or of another length")
            return
        self.labels.tie(left, right)

    def stop(self, axis: Ints | None, reason: str) -> None:
        """Freeze an axis."""
        if axis is not None and axis.size:
            self.labels.freeze(axis, reason)

    def stop_value(self, value: ir.Value | None, reason: str, but: Iterable[int] = ()) -> None:
        """Freeze all axes of a value, except some."""
        kept = set(but)
        for k, axis in enumerate(self.of(value)):
            if k not in kept:
                self.stop(axis, reason)

    def role(self, node: ir.Node, index: int, axis: int, kind: str) -> None:
        """Remember what an axis of a constant input is."""
        value = node.inputs[index]
        if value is not None and constant_tensor(value) is not None:
            rank = len(self.of(value))
            self.roles.append(Role(node, index, axis % rank, kind, value))

    def same(self, left: ir.Value | None, right: ir.Value | None, but: Iterable[int] = ()) -> None:
        """Tie two values of one rank axis by axis; the axes ``but`` are frozen in both."""
        a, b = self.of(left), self.of(right)
        if len(a) != len(b):
            self.stop_value(left, "its rank is not known further on")
            self.stop_value(right, "its rank is not known before")
            return
        kept = {k % len(a) for k in but}
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            if k not in kept:
                self.tie(x, y)


Rule = Callable[[Trace, ir.Node], None]


def barrier(trace: Trace, node: ir.Node, reason: str = "") -> None:
    """Freeze everything that a node reads and writes."""
    why = reason or f"{node.op_type} is not understood"
    for value in (*node.inputs, *node.outputs):
        trace.stop_value(value, why)


def told(node: ir.Node, what: str) -> str:
    """Return a reason with the node in it."""
    return f"{what} ({node.op_type} {node.name})" if node.name else f"{what} ({node.op_type})"
