"""Where the order of axes should change, so that the fewest Transposes are left.

One move lets some nodes work in another order of axes. Which nodes could, and in which order each, is
found by following one order through the graph from a Transpose. Which of them should is a minimum
cut: each node does or does not, and a tensor costs a Transpose for each order that its readers want
and its maker does not give.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from effdl.graph.transposes import (
    Ask,
    Declined,
    Perm,
    Plan,
    compose,
    identity,
    inverse,
    is_identity,
)
from effdl.graph.transposes_edit import ONE, Key, Layout, LayoutGraph
from effdl.graph.transposes_rules import rule_of
from effdl.solve.mincut import SINK, SOURCE, Network

Plans = dict[Key, Plan]
_ENDLESS = 1 << 100
_MANY = 1 << 60
"""More than any number of bytes."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor that a move may touch.

    Args:
        layout: its readers.
        maker: what makes it, None when its order is fixed.
        label: the order in which the maker would give it.
        weight: the price of one Transpose on it.
        rank: its number of axes.
    """

    layout: Layout
    maker: Key | None
    label: Perm
    weight: int
    rank: int

    def wants(self, plans: Mapping[Key, Plan]) -> Iterator[tuple[Key | None, Perm, Perm]]:
        """Yield each reader with the order it wants now, and the one it would want."""
        for _, perm in self.layout.outputs:
            yield None, perm, perm
        for read in self.layout.reads:
            plan = plans.get(read.node)
            turn = plan.inputs[read.index] if plan is not None else None
            then = read.perm if turn is None else compose(read.perm, turn)
            yield (None if turn is None else read.node), read.perm, then

    def missing(self, plans: Mapping[Key, Plan], moving: set[Key]) -> int:
        """Return how many Transposes it takes when the nodes ``moving`` follow their plans."""
        made = self.label if self.maker in moving else identity(self.rank)
        wanted = {then if k in moving else now for k, now, then in self.wants(plans)}
        return len(wanted - {made})


@dataclass
class Search:
    """Makes moves in one graph as long as they pay.

    Args:
        graph: the graph.
        opset: of the default domain.
        allowed: whether an operator may be changed.
        reasons: why a Transpose was not moved, filled in.
    """

    graph: LayoutGraph
    opset: int
    allowed: Callable[[ir.Node], bool]
    reasons: dict[ir.Node, str] = field(default_factory=dict)

    def run(self) -> int:
        """Make every move that pays; return the number of nodes changed."""
        total = self.graph.tidy()
        while changes := self._round():
            total += changes + self.graph.tidy()
        return total

    def _round(self) -> int:
        seen: set[tuple[Key, Plan]] = set()
        changes = 0
        self.reasons.clear()
        for node in self.graph.transposes():
            for toward_readers in (True, False):
                if node.graph is None:
                    break
                for seed in list(self._seeds(node, toward_readers)):
                    changes += self._move(seed, seen)
        return changes

    def _seeds(self, node: ir.Node, toward_readers: bool) -> Iterator[tuple[Key, Plan]]:
        perm, root = self.graph.perm(node), node.inputs[0]
        if perm is None or root is None:
            return
        if not toward_readers:
            key = self.graph.key_of(root)
            plan = self.plan(key, perm, root, node) if key is not None else None
            if key is not None and plan is not None:
                yield key, plan
            return
        for use in node.outputs[0].uses():
            plan = self.plan(use.node, inverse(perm), use.idx, node)
            if plan is not None:
                yield use.node, plan

    def plan(
        self, key: Key, perm: Perm, end: ir.Value | int, blamed: ir.Node | None = None
    ) -> Plan | None:
        """Return what it takes to have ``perm`` at an output of a node or an input, by its number."""
        if isinstance(key, ir.Value):
            return Plan((), (perm,))
        try:
            return self._ask(key, perm, end)
        except Declined as e:
            if blamed is not None:
                side = "before" if isinstance(end, ir.Value) else "behind"
                self.reasons.setdefault(blamed, f"{key.op_type} '{key.name}' {side} it: {e}")
            return None

    def _ask(self, node: ir.Node, perm: Perm, end: ir.Value | int) -> Plan:
        rule = rule_of(node)
        if rule is None:
            raise Declined("it works in one order of axes only")
        if node.graph is not self.graph.graph:
            raise Declined("it is in another graph")
        if not self.allowed(node):
            raise Declined("the options leave it alone")
        if any(self.graph.pinned(o) for o in node.outputs):
            raise Declined("another graph has its output")
        output = isinstance(end, ir.Value)
        index = node.outputs.index(end) if isinstance(end, ir.Value) else end
        ask = Ask(
            node,
            perm,
            output,
            index,
            self.opset,
            self.graph.dims,
            self.graph.dtype,
            self.graph.max_growth,
            self.graph.copies,
        )
        dims = self.graph.dims(ask.value)
        if dims is None or len(dims) != len(perm):
            raise Declined("the number of axes of its tensor is not known")
        return rule(ask)

    def _move(self, seed: tuple[Key, Plan], seen: set[tuple[Key, Plan]]) -> int:
        if _name(seed) in seen:
            return 0
        plans = self._flood(seed)
        seen.update(_name(item) for item in plans.items())
        tensors = self.tensors(plans)
        before = _cost(plans, tensors, set())
        # The cheapest may take more nodes; the one with the fewest may move more bytes.
        for extra in (0, _MANY):
            moving = _cheapest(plans, tensors, extra)
            after = _cost(plans, tensors, moving)
            if moving and after[0] <= before[0] and after[1] < before[1]:
                self.apply(plans, tensors, moving)
                return len(moving)
        return 0

    def apply(self, plans: Plans, tensors: list[_Tensor], moving: set[Key]) -> None:
        """Let the nodes ``moving`` follow their plans; ``tensors`` are those of all plans."""
        made = [
            (t.layout.root, t.label if t.maker in moving else identity(t.rank))
            for t in tensors
            if t.maker in moving or any(k in moving for k, _, _ in t.wants(plans))
        ]
        self.graph.commit({k: p for k, p in plans.items() if k in moving}, made)

    def _flood(self, seed: tuple[Key, Plan]) -> Plans:
        """Follow an order of axes through all nodes that can take it on."""
        plans: Plans = dict([seed])
        queue = deque([seed[0]])
        while queue:
            key = queue.popleft()
            for other, plan in self._neighbours(key, plans[key]):
                if other not in plans:
                    plans[other] = plan
                    queue.append(other)
        return plans

    def _neighbours(self, key: Key, plan: Plan) -> Iterator[tuple[Key, Plan]]:
        for value, label in _outputs(key, plan):
            for read in self.graph.layout(value, len(label)).reads:
                perm = compose(inverse(read.perm), label)
                if not is_identity(perm) and (p := self.plan(read.node, perm, read.index)):
                    yield read.node, p
        if isinstance(key, ir.Value):
            return
        for source, turn in zip(key.inputs, plan.inputs, strict=True):
            if source is None or turn is None or is_identity(turn):
                continue
            root, perm = self.graph.root(source, len(turn))
            label = compose(perm, turn)
            maker = self.graph.key_of(root)
            if maker is not None and not is_identity(label):
                p = self.plan(maker, label, root)
                if p is not None:
                    yield maker, p

    def tensors(self, plans: Plans) -> list[_Tensor]:
        """Return every tensor whose readers or maker change with ``plans``."""
        found: dict[ir.Value, _Tensor] = {}

        def add(root: ir.Value, rank: int) -> None:
            if root in found:
                return
            maker, label = self.graph.key_of(root), identity(rank)
            plan = plans.get(maker) if maker is not None else None
            if maker is not None and plan is not None:
                label = next((p for v, p in _outputs(maker, plan) if v is root), label)
            else:
                maker = None
            layout = self.graph.layout(root, rank)
            found[root] = _Tensor(layout, maker, label, self.graph.weight(layout), rank)

        for key, plan in plans.items():
            for value, label in _outputs(key, plan):
                add(value, len(label))
            if isinstance(key, ir.Node):
                for source, turn in zip(key.inputs, plan.inputs, strict=True):
                    if source is not None and turn is not None:
                        add(self.graph.root(source, len(turn))[0], len(turn))
        return list(found.values())


def _name(item: tuple[Key, Plan]) -> tuple[Key, Plan]:
    key, plan = item
    return key, Plan(plan.inputs, plan.outputs)


def _outputs(key: Key, plan: Plan) -> list[tuple[ir.Value, Perm]]:
    """The tensors a node gives in another order."""
    values = [key] if isinstance(key, ir.Value) else list(key.outputs)
    return [(v, p) for v, p in zip(values, plan.outputs, strict=False) if p and not is_identity(p)]


def _cost(plans: Plans, tensors: list[_Tensor], moving: set[Key]) -> tuple[int, int]:
    """The number of Transposes and of other nodes added, and what they cost."""
    added = sum(plans[k].nodes for k in moving)
    cost = added * ONE + sum(price for k, price in _hidden(plans, tensors) if k in moving)
    for tensor in tensors:
        if tensor.weight:
            missing = tensor.missing(plans, moving)
            added += missing
            cost += missing * tensor.weight
    return added, cost


def _hidden(plans: Plans, tensors: list[_Tensor]) -> Iterator[tuple[Key, int]]:
    """Yield what the runtime's own Transposes inside an operator cost more, or less."""
    for tensor in tensors:
        plan = plans.get(tensor.maker) if tensor.maker is not None else None
        if tensor.maker is not None and plan is not None and plan.hidden:
            yield tensor.maker, plan.hidden * max(tensor.weight - ONE, 0)


def _cheapest(plans: Plans, tensors: list[_Tensor], extra: int) -> set[Key]:
    """Choose the nodes that should follow their plans, by a minimum cut.

    A point on the source's side follows. Costs that no cut can express (a reader that wants an order
    only if it does not move, of a maker that gives it only if it moves) are taken as if the maker did
    not matter; what is chosen is weighed exactly afterwards.

    Args:
        plans: how each node would work.
        tensors: what they make and read.
        extra: what each node costs besides.
    """
    network = Network()
    points = {key: network.point() for key in plans}
    for key, plan in plans.items():
        if plan.nodes:
            network.edge(points[key], SINK, plan.nodes * (ONE + extra))
    for key, price in _hidden(plans, tensors):
        ends = (points[key], SINK) if price > 0 else (SOURCE, points[key])
        network.edge(*ends, abs(price))
    for tensor in tensors:
        if tensor.weight:
            _add_tensor(network, points, plans, replace(tensor, weight=tensor.weight + extra))
    side = network.source_side()
    return {key for key in plans if points[key] in side}


def _add_tensor(network: Network, points: Mapping[Key, int], plans: Plans, tensor: _Tensor) -> None:
    plain, maker = identity(tensor.rank), tensor.maker
    fixed: set[Perm] = set()
    staying: dict[Perm, list[int]] = {}
    moving: dict[Perm, list[int]] = {}
    for key, now, then in tensor.wants(plans):
        if key is None or now == then:
            fixed.add(now)
        else:
            staying.setdefault(now, []).append(points[key])
            moving.setdefault(then, []).append(points[key])
    for perm in sorted({*fixed, *staying, *moving}):
        if maker is None and perm == plain:
            continue
        # The side on which the maker gives this order: it is paid for on the other.
        gives = points[maker] if maker is not None else None
        if gives is None or perm not in (plain, tensor.label):
            if perm not in fixed:
                _any(network, staying.get(perm, []), SOURCE, tensor.weight)
                _any(network, moving.get(perm, []), SINK, tensor.weight)
        elif perm == plain:
            if perm in fixed:
                network.edge(gives, SINK, tensor.weight)
                continue
            _any(network, staying.get(perm, []), gives, tensor.weight)
            _any(network, moving.get(perm, []), SINK, tensor.weight)
        else:
            if perm in fixed:
                network.edge(SOURCE, gives, tensor.weight)
                continue
            _any(network, moving.get(perm, []), gives, tensor.weight, moving=True)
            _any(network, staying.get(perm, []), SOURCE, tensor.weight)


def _any(network: Network, readers: list[int], end: int, weight: int, moving: bool = False) -> None:
    """Pay ``weight`` once if any reader is on the other side than ``end``."""
    if not readers:
        return
    to_sink = moving or end == SINK
    point = network.point()
    for reader in readers:
        network.edge(*((reader, point) if to_sink else (point, reader)), _ENDLESS)
    network.edge(*((point, end) if to_sink else (end, point)), weight)
