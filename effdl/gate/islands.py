"""Which nodes a pass had better leave alone: places that it makes slower, and layers that cost accuracy.

Time per place comes from the profiles of the model before and after, what a layer does to the outputs
from ``measure/locate``; the choice is the cheapest in time within the error allowed (``solve/two_forms``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from effdl.graph.walk import is_op
from effdl.graph.weights import constant_tensor
from effdl.measure.parts import LAYOUTS, Part, elements, in_names_of, is_border, parts
from effdl.report import NodeTime, Profile, TensorError
from effdl.solve.two_forms import Flow, Loss, Problem, cheapest, within

_MOSTLY = 0.7
"""Above this share of a step's error, rounding its result is what makes it."""
_MARGIN = 0.8
"""Share of the limit that a repair aims at."""
_RUIN = 1e3
"""How many times worse than the worst error one counts that is infinite."""
_KERNEL_MS = 0.002
"""What one more kernel costs at the least."""
_FLOAT_RESULT = ("MatMul", "Gemm")
"""Their 8-bit kernels write float at no cost."""


class Islands:
    """The places of a model in two forms: as it was, and as a pass made it.

    Args:
        model: before the pass.
        touched: names of the nodes that the pass changed.
        before, after: profiles; without them every weight counts alike, as it does for size.
    """

    def __init__(
        self,
        model: ir.Model,
        touched: Collection[str],
        before: Profile | None = None,
        after: Profile | None = None,
    ) -> None:
        self._touched = set(touched)
        self._nodes = [n for n in model.graph if n.name]
        if before is not None and after is not None:
            found = parts(before, after)
            names = {n.name for n in self._nodes}
            self._parts = [p for p in found if any(n in names for n in p.names)]
            border, sizes = _border_ms(before, after), _sizes(before, after)
        else:
            self._parts, border, sizes = _by_weight(self._nodes), 0.0, {}
        self._at = {name: k for k, p in enumerate(self._parts) for name in p.names}
        for node in self._nodes:  # what has no kernel takes any form
            if node.name not in self._at:
                self._at[node.name or ""] = len(self._parts)
                self._parts.append(Part((node.name or "",), 0.0, 0.0, 0.0))
        self._outside = len(self._parts)  # who reads the model's outputs
        self._parts.append(Part((), 0.0, 0.0, 0.0))
        self._flows = self._find_flows(model, border, sizes)

    def place(self, name: str) -> Part:
        """Return the place that a node of the main graph belongs to, with its times."""
        return self._parts[self._at[name]]

    def slower(self) -> list[str]:
        """Return the nodes that the pass had better leave alone for the sake of speed."""
        return self._left(cheapest(self._problem(())))

    def repair(
        self, jumps: Sequence[TensorError], error: float, limit: float | None
    ) -> tuple[str, ...]:
        """Return the nodes to leave alone so that the error stays below a limit, at the least cost in time.

        The errors that single steps cause at the outputs are taken to be independent: they add up as
        squares. Where their sum is more than the error that was measured, it is scaled to it; where it is
        less, the rest comes from steps that are not among them, and stays.

        Args:
            jumps: steps that hurt, with their effect on the outputs.
            error: relative error of the outputs.
            limit: what is allowed; None where that is not known, for a part less.
        """
        losses = self._losses(jumps)
        total = math.fsum(loss.amount for loss in losses)
        if not total:
            return ()
        if limit is None:
            allowed = _MARGIN**2 * total
        elif not math.isfinite(error):
            allowed = 0.0
        else:
            aim = (_MARGIN * min(limit, error)) ** 2
            allowed = aim * total / error**2 if total > error**2 else aim - (error**2 - total)
        return tuple(self._left(within(self._problem(losses), max(0.0, allowed))))

    def _problem(self, losses: Sequence[Loss]) -> Problem:
        first = [p.before_ms for p in self._parts]
        second = [p.after_ms if self._can_change(p) else None for p in self._parts]
        return Problem(first, second, self._flows, losses)

    def _can_change(self, part: Part) -> bool:
        idle = not part.before_ms and not part.after_ms
        return bool(part.names) and (idle or any(n in self._touched for n in part.names))

    def _left(self, choice: Sequence[bool]) -> list[str]:
        """Return the nodes that stay as they were, those of the slowest places first."""
        names = [n.name or "" for n in self._nodes if n.name in self._touched]
        left = [n for n in names if not choice[self._at[n]]]
        return sorted(left, key=lambda n: -self._parts[self._at[n]].before_ms)

    def _losses(self, jumps: Sequence[TensorError]) -> list[Loss]:
        found: list[tuple[tuple[int, ...], float]] = []
        for jump in jumps:
            names = dict.fromkeys(n for n in jump.nodes if n in self._at)
            if jump.unrounded is not None and jump.unrounded < _MOSTLY * (jump.alone or 0.0):
                # as long as one of those that read it wants it rounded, it is
                names |= dict.fromkeys(n for n in jump.readers if n in self._at)
            places = tuple(dict.fromkeys(self._at[n] for n in names))
            if places and jump.effect:
                found.append((places, jump.effect))
        finite = [e for _, e in found if math.isfinite(e)]
        most = _RUIN * max(finite, default=1.0)  # of one that leaves no number
        return [Loss(places, min(e, most) ** 2) for places, e in found]

    def _find_flows(self, model: ir.Model, border: float, sizes: Mapping[str, int]) -> list[Flow]:
        found = []
        values = [*model.graph.inputs, *(o for n in self._nodes for o in n.outputs)]
        for value in values:
            if value.is_initializer():
                continue
            producer = value.producer()
            maker = None if producer is None else self._at.get(producer.name or "")
            readers = {self._at[u.node.name or ""] for u in value.uses() if u.node.name in self._at}
            readers -= {maker}
            if value.is_graph_output() and maker is not None:
                readers.add(self._outside)
            if not readers:
                continue
            cost = border * self._size(value, sizes) + (_KERNEL_MS if border else 0.0)
            back = 0.0 if is_op(producer, *_FLOAT_RESULT) else cost
            found.append(Flow(maker, tuple(sorted(readers)), cost, back))
        return found

    def _size(self, value: ir.Value, sizes: Mapping[str, int]) -> int:
        producer = value.producer()
        if producer is not None and producer.name in sizes:
            return sizes[producer.name or ""]
        dims = [d for d in value.shape or () if isinstance(d, int)]
        return math.prod(dims)


def _by_weight(nodes: Sequence[ir.Node]) -> list[Part]:
    """Return a part per node that costs its weights, a quarter of that in the second form."""
    found = []
    for node in nodes:
        tensors = [constant_tensor(v) for v in node.inputs]
        weight = sum(t.size for t in tensors if t is not None)
        if weight:
            found.append(Part((node.name or "",), float(weight), weight / 4, 0.0))
    return found


def _border_ms(before: Profile, after: Profile) -> float:
    """Return what a border costs per number: a conversion, and the change of layout that comes with it.

    0 where the model after has no conversions.
    """
    known = {name for node in before.nodes for name in node.origin}
    nodes = in_names_of(before, after).nodes
    conversion = _rate([n for n in nodes if is_border(n, known)])
    inserted = [n for n in (*before.nodes, *nodes) if n.op_type in LAYOUTS and not n.origin]
    return conversion + _rate(inserted) if conversion else 0.0


def _rate(nodes: Sequence[NodeTime]) -> float:
    """Return the time of kernels per number, 0 where there are none."""
    count = sum(elements(n) for n in nodes)
    return sum(n.ms for n in nodes if elements(n)) / count if count else 0.0


def _sizes(before: Profile, after: Profile) -> dict[str, int]:
    """Return how many numbers nodes put out, by name."""
    found: dict[str, int] = {}
    for profile in (after, before):
        for node in profile.nodes:
            if elements(node):
                found |= dict.fromkeys(node.origin, elements(node))
    return found
