"""Folding chains of affine nodes: find them, let them go, note why others stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from effdl.graph.edit import can_forward, forward, has_reference, remove, roots
from effdl.graph.walk import is_op, nodes_in, only_user
from effdl.graph.weights import Names, add_initializer
from effdl.passes.base import Context
from effdl.passes.fold._affine import (
    Affine,
    Declined,
    NoLayer,
    affine_data,
    narrow_bias,
    of_arithmetic,
    of_batchnorm,
    operands,
)
from effdl.passes.fold._layer import Update, write
from effdl.passes.fold._plan import Planner


@dataclass
class Chains:
    """Folds the affine nodes of a model.

    Args:
        model: is edited.
        ctx: is told.
        wanted: whether a node may be folded.
        min_opset: a graph below it is left alone.
        ahead: also fold arithmetic into what reads it.
        merge: also write a chain with fewer nodes where nothing takes it.
    """

    model: ir.Model
    ctx: Context
    wanted: Callable[[ir.Node], bool]
    min_opset: int
    ahead: bool = True
    merge: bool = True
    declined: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = Names(self.model)
        self.planner = Planner(self.model)

    def run(self) -> int:
        """Fold until nothing more can be; return the number of nodes that went."""
        total = 0
        while changes := self._sweep():
            total += changes
        for name, reason in self.declined.items():
            self.ctx.skip(name, reason)
        return total

    def _sweep(self) -> int:
        self.declined.clear()
        changes = 0
        for root, imports, is_function in roots(self.model):
            if imports.get("", imports.get("ai.onnx", 0)) < self.min_opset:
                continue
            for node in list(nodes_in(root)):
                if node.graph is None or not self._affine(node):
                    continue
                if is_function or has_reference(node):
                    self._decline(node, "weights inside a function are not changed")
                    continue
                before = self._data(node).producer()
                if before is not None and self._linked(before, node):
                    continue  # the chain is looked at from its first node
                changes += self._fold([node, *self._followers(node)])
        return changes

    def _affine(self, node: ir.Node) -> bool:
        """Whether ``node`` is an affine map that this pass may fold."""
        norm = is_op(node, "BatchNormalization") and node.inputs[0] is not None
        return (norm or affine_data(node) is not None) and self.wanted(node)

    def _linked(self, node: ir.Node, user: ir.Node) -> bool:
        """Whether ``user`` continues the chain of ``node``; a batch norm is a chain by itself."""
        both = affine_data(node) is not None and affine_data(user) is not None
        one = only_user(node.outputs[0]) is user and node.graph is user.graph
        return both and one and self.wanted(node) and self.wanted(user) and not has_reference(user)

    def _followers(self, node: ir.Node) -> Iterator[ir.Node]:
        while (user := only_user(node.outputs[0])) is not None and self._linked(node, user):
            yield user
            node = user

    def _data(self, node: ir.Node) -> ir.Value:
        data = node.inputs[0] if is_op(node, "BatchNormalization") else affine_data(node)
        assert data is not None
        return data

    def _fold(self, chain: list[ir.Node]) -> int:
        maps: list[Affine] = []
        for node in chain:
            try:
                maps.append(self._map(node))
            except Declined as e:
                self._decline(node, str(e))
                break
        count = len(maps)
        later = self._fold(chain[count + 1 :]) if len(chain) > count + 1 else 0
        return later + self._place(chain[:count], maps) if count else later

    def _place(self, chain: list[ir.Node], maps: list[Affine]) -> int:
        """Let the nodes of a chain go where they can; return how many fewer there are."""
        count = len(chain)
        reasons: dict[int, str] = {}
        taken = next((n for n in range(count, 0, -1) if self._back(chain, maps, n, reasons)), 0)
        rest, maps = chain[taken:], maps[taken:]
        norm = is_op(chain[0], "BatchNormalization")
        if self.ahead or norm:
            start = next((k for k in range(len(rest)) if self._ahead(rest, maps, k, reasons)), None)
            if start is not None:
                return taken + len(rest) - start
        gone = self._merge(rest, maps) if self.merge and len(rest) > 1 else 0
        if not taken and not gone and reasons and rest:
            self._decline(chain[0], reasons[min(reasons)])
        return taken + gone

    def _map(self, node: ir.Node) -> Affine:
        if is_op(node, "BatchNormalization"):
            return of_batchnorm(node, self.planner.rank(node.inputs[0]))
        return of_arithmetic(node)

    def _back(
        self, chain: list[ir.Node], maps: list[Affine], count: int, why: dict[int, str]
    ) -> bool:
        """Fold the first ``count`` nodes into the layers before them."""
        part = chain[:count]
        try:
            data = self._data(part[0])
            changes = self.planner.back(data, _compose(maps[:count]), part[0])
            self._worth(part, changes)
            if not can_forward(part[-1].outputs[0], data):
                raise Declined("it gives an output of the graph")
        except Declined as e:
            self._note(part[0], e, why)
            return False
        self._apply(part, changes, "")
        return True

    def _ahead(
        self, chain: list[ir.Node], maps: list[Affine], start: int, why: dict[int, str]
    ) -> bool:
        """Fold the nodes from ``start`` on into the layers behind them."""
        part = chain[start:]
        try:
            data, whole = self._data(part[0]), _compose(maps[start:])
            changes = self.planner.ahead(part[-1].outputs[0], whole, part[-1])
            if not is_op(part[0], "BatchNormalization"):
                self._need_fit(data, whole)
            self._worth(part, changes)
        except Declined as e:
            self._note(part[0], e, why)
            return False
        self._apply(part, changes, " behind it")
        return True

    def _need_fit(self, data: ir.Value, map_: Affine) -> None:
        """A map that goes ahead must not have made its input larger."""
        rank = self.planner.rank(data)
        full, dims = map_.full(rank), self.planner.shapes.of(data) or (None,) * (rank or 0)
        for array in (full.scale, full.shift):
            if any(n not in (1, d) for n, d in zip(array.shape, dims, strict=False)):
                raise Declined("its constant may make its input larger")

    def _note(self, node: ir.Node, reason: Declined, why: dict[int, str]) -> None:
        """Keep the reason that says most: a layer that declined before no layer at all."""
        nothing = isinstance(reason, NoLayer)
        if nothing and not is_op(node, "BatchNormalization"):
            return  # arithmetic beside no layer is no candidate
        if nothing and 1 in why:
            why[1] = f"{why[1]} and {str(reason).removeprefix('it ')}"
        else:
            why.setdefault(int(nothing), str(reason))

    def _worth(self, part: list[ir.Node], changes: list[Update]) -> None:
        """A fold has to make nodes fewer, or a batch norm an Add."""
        nodes = len({c.layer.node for c in changes})
        if nodes != len(changes):
            raise NoLayer("it reaches one layer on two ways")
        added = sum(c.adds_node for c in changes)
        if added > len(part) or (added == len(part) and not is_op(part[0], "BatchNormalization")):
            raise NoLayer("the layer has no bias, and an Add would be needed in its place")

    def _apply(self, part: list[ir.Node], changes: list[Update], where: str) -> None:
        data, last = self._data(part[0]), part[-1].outputs[0]
        if where:
            for user, index in list(last.uses()):
                user.replace_input_with(index, data)
        for change in changes:
            write(change, self.names)
        if not where:
            # an Add that was just made may stand between now
            data = self._data(part[0])
            if not forward(last, data):
                raise AssertionError(f"{part[0].name}: its only input cannot stand for it")
        for node in reversed(part):
            remove(node)
        layers = ", ".join(f"{c.layer.node.op_type} '{c.layer.node.name}'" for c in changes)
        for node in part:
            self.ctx.touch(node, f"folded into {layers}{where}")

    def _merge(self, rest: list[ir.Node], maps: list[Affine]) -> int:
        """Write a run of arithmetic with fewer nodes; return how many fewer."""
        whole = _compose(maps)
        minus = bool((whole.scale == -1).all()) and whole.shifts
        scales = not bool((whole.scale == 1).all()) and not minus
        cost = int(scales) + int(whole.shifts)
        if cost >= len(rest):
            return 0
        data, last = self._data(rest[0]), rest[-1]
        like = next((c for c in map(_constant_of, rest) if c is not None), None)
        if cost and like is None:
            return 0  # Neg alone
        try:
            self._need_shape(maps, whole, scales)
            if cost == 0 and not can_forward(last.outputs[0], data):
                raise Declined("its input and its output are those of the graph")
            arrays = self._arrays(whole, scales, like) if cost and like is not None else []
        except Declined as e:
            self._decline(rest[0], str(e))
            return 0
        assert isinstance(last.graph, ir.Graph)
        value = data
        for op_type, array in arrays:
            constant = add_initializer(
                last.graph, self.names, f"{last.name or op_type}_merged", array
            )
            inputs = [constant, value] if op_type == "Sub" else [value, constant]
            name = self.names.fresh(f"{last.name or 'affine'}_{op_type.lower()}")
            old = last.outputs[0]
            output = ir.Value(name=self.names.fresh(f"{name}_out"), type=old.type)
            node = ir.Node("", op_type, inputs, name=name, outputs=[output])
            last.graph.insert_before(rest[0], node)
            value = output
        shape = last.outputs[0].shape
        value.shape = shape.copy() if arrays and shape is not None else value.shape
        forward(last.outputs[0], value)
        for node in reversed(rest):
            remove(node)
            self.ctx.touch(node, f"{len(rest)} nodes of constants merged into {cost}")
        return len(rest) - cost

    def _arrays(
        self, whole: Affine, scales: bool, like: np.ndarray
    ) -> list[tuple[str, np.ndarray]]:
        parts = []
        if scales:
            parts.append(("Mul", narrow_bias(whole.scale, like)))
        if whole.shifts:
            minus = not scales and bool((whole.scale == -1).all())
            parts.append(("Sub" if minus else "Add", narrow_bias(whole.shift, like)))
        tiny = np.finfo(np.float32).tiny
        lost = (whole.scale != 0) & (np.abs(whole.scale) < tiny)
        if lost.any() or (like.dtype == np.float16 and (np.abs(whole.scale) < 2**-14).any()):
            raise Declined(f"the merged numbers are too small for {like.dtype}")
        return parts

    def _need_shape(self, maps: list[Affine], whole: Affine, scales: bool) -> None:
        """The merged constants must make the result as large as those before, and not be larger."""
        every = [a for m in maps for a in (m.scale, m.shift)]
        kept = ([whole.scale] if scales else []) + ([whole.shift] if whole.shifts else [])
        shapes = [a.shape for a in kept] or [()]
        if np.broadcast_shapes(*(a.shape for a in every)) != np.broadcast_shapes(*shapes):
            raise Declined("its constants also set the shape of the result")
        if sum(a.size for a in kept) > sum(a.size for a in every if a.ndim or a.any()):
            raise Declined("the merged constants would be larger")

    def _decline(self, node: ir.Node, reason: str) -> None:
        self.declined[node.name or node.op_type] = reason


def _compose(maps: list[Affine]) -> Affine:
    whole = maps[0]
    for map_ in maps[1:]:
        whole = whole.then(map_)
    return whole


def _constant_of(node: ir.Node) -> np.ndarray | None:
    found = operands(node)
    return None if found is None else np.asarray(found[1])
