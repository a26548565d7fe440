"""A graph without its Transposes: who reads which tensor in which order; and rewriting that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effdl.graph.dims import Dims
from effdl.graph.edit import forward, remove, unused
from effdl.graph.shapes import Shapes
from effdl.graph.transposes import (
    Perm,
    Plan,
    compose,
    identity,
    inverse,
    is_identity,
    is_transpose,
    perm_of,
    permuted,
)
from effdl.graph.walk import is_op
from effdl.graph.weights import Names, add_initializer, constant, constant_tensor

_GUESS = 16
"""The size that an unknown dimension is taken to have when tensors are compared."""
ONE = 1 << 14
"""What one Transpose costs besides the bytes it moves: a node takes as long as 16 KiB."""
_APART = 1 << 24
"""What it costs to part an operator from its Q or DQ: what runs as one integer kernel becomes three."""

Key = ir.Node | ir.Value
"""What can change its order of axes: a node, or a constant by its value."""


@dataclass(frozen=True)
class Read:
    """One reader of a tensor: input ``index`` of ``node`` wants it in the order ``perm``."""

    node: ir.Node
    index: int
    perm: Perm


@dataclass
class Layout:
    """All readers of one tensor ``root`` that no Transpose makes.

    Args:
        root: the tensor.
        reads: its readers, through Transposes or directly.
        outputs: graph outputs that hold it, with their order; ``root`` itself may be one.
        transposes: the Transposes on it, by order.
    """

    root: ir.Value
    reads: list[Read]
    outputs: list[tuple[ir.Value, Perm]]
    transposes: dict[Perm, list[ir.Node]]


class LayoutGraph:
    """One graph (or subgraph) as nodes that read tensors in some order of axes.

    Args:
        graph: the graph; values of graphs around it are read, never changed.
        shapes: what shape inference found.
        names: the names taken in the model.
        selected: whether a Transpose may be touched.
        max_growth: bytes up to which a constant may be kept in two orders.
    """

    def __init__(
        self,
        graph: ir.Graph,
        shapes: Shapes,
        names: Names,
        selected: Callable[[ir.Node], bool],
        max_growth: int,
    ) -> None:
        self.graph = graph
        self.names = names
        self.max_growth = max_growth
        self.copies: dict[tuple[ir.Value, Perm, int], ir.Value] = {}
        self._shapes = shapes
        self._selected = selected
        self._dims: dict[ir.Value, Dims | None] = {}

    def dims(self, value: ir.Value | None) -> Dims | None:
        """Return the shape of ``value`` as it is now."""
        tensor = constant_tensor(value)
        if tensor is not None:
            return tuple(tensor.shape.numpy())  # what the model is given by a move is newer
        if value is not None and value in self._dims:
            return self._dims[value]
        return self._shapes.of(value)

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Return the element type of ``value``."""
        return self._shapes.dtype(value)

    def perm(self, node: ir.Node | None) -> Perm | None:
        """Return the order a Transpose of this graph makes, None for all other nodes."""
        if node is None or not is_transpose(node) or node.graph is not self.graph:
            return None
        if not self._selected(node) or self.pinned(node.outputs[0]):
            return None
        dims = self.dims(node.inputs[0])
        perm = perm_of(node, None if dims is None else len(dims))
        return perm if perm is None or dims is None or len(dims) == len(perm) else None

    def pinned(self, value: ir.Value) -> bool:
        """Whether another graph has ``value`` as its output."""
        return value.is_graph_output() and not self._is_output(value)

    def _is_output(self, value: ir.Value) -> bool:
        return value.is_graph_output() and any(o is value for o in self.graph.outputs)

    def transposes(self) -> list[ir.Node]:
        """Return the Transposes of this graph that may be touched."""
        return [n for n in self.graph if self.perm(n) is not None]

    def root(self, value: ir.Value, rank: int) -> tuple[ir.Value, Perm]:
        """Return the tensor that ``value`` is a Transpose of, and its order (one level)."""
        node = value.producer()
        perm = self.perm(node)
        if perm is None or node is None or node.inputs[0] is None:
            return value, identity(rank)
        return node.inputs[0], perm

    def layout(self, root: ir.Value, rank: int) -> Layout:
        """Return all readers of ``root``."""
        found = Layout(root, [], [], {})
        if self._is_output(root):
            found.outputs.append((root, identity(rank)))
        for use in root.uses():
            perm = self.perm(use.node)
            if perm is None:
                found.reads.append(Read(use.node, use.idx, identity(rank)))
                continue
            found.transposes.setdefault(perm, []).append(use.node)
            out = use.node.outputs[0]
            if out.is_graph_output():
                found.outputs.append((out, perm))
            found.reads += [Read(u.node, u.idx, perm) for u in out.uses()]
        return found

    def key_of(self, root: ir.Value) -> Key | None:
        """Return what makes ``root`` and may make it in another order, None when nothing may."""
        node = root.producer()
        if root.is_graph_output() and self.pinned(root):
            return None
        if constant(root) is not None:
            return None if root.is_graph_output() else root
        return node if node is not None and node.graph is self.graph else None

    def weight(self, layout: Layout) -> int:
        """Return what a Transpose on a tensor costs, in bytes moved."""
        root = layout.root
        tensor = constant_tensor(root)
        if tensor is not None and tensor.nbytes <= self.max_growth:
            return 0
        dims = self.dims(root) or ()
        dtype = self.dtype(root)
        width = dtype.itemsize if dtype is not None and dtype != ir.DataType.STRING else 4
        moved = math.prod(d if isinstance(d, int) else _GUESS for d in dims) * width
        parts = is_op(root.producer(), "DequantizeLinear") or any(
            is_op(r.node, "QuantizeLinear") and r.index == 0 for r in layout.reads
        )
        return ONE + int(moved) + (_APART if parts else 0)

    def tidy(self) -> int:
        """Merge chains and duplicates, drop those that do nothing, fold constants."""
        changes = 0
        for node in self.transposes():
            if node.graph is None:
                continue
            changes += self._tidy(node)
        return changes

    def _tidy(self, node: ir.Node) -> int:
        changes = 0
        perm, source = self.perm(node), node.inputs[0]
        assert perm is not None
        assert source is not None
        before = self.perm(source.producer())
        if before is not None and len(before) == len(perm):
            first = source.producer()
            assert first is not None
            self._set(node, first.inputs[0], compose(before, perm))
            self._drop(first)
            return 1 + self._tidy(node)
        out = node.outputs[0]
        if is_identity(perm):
            if not forward(out, source):
                return changes
            self._drop(node)
            return changes + 1
        for other in self._twins(node, source, perm):
            if forward(other.outputs[0], out):
                self._drop(other)
                self._place(node, source)
                changes += 1
        tensor, array = constant_tensor(source), constant(source)
        if tensor is None or array is None or out.is_graph_output() or node.graph is None:
            return changes
        alone = len(list(source.uses())) == 1 and not source.is_graph_output()
        if not alone and tensor.nbytes > self.max_growth:
            return changes
        forward(out, self._transposed(source, perm))
        self._drop(node)
        return changes + 1

    def _twins(self, node: ir.Node, source: ir.Value, perm: Perm) -> list[ir.Node]:
        same = (u.node for u in source.uses() if u.node is not node)
        return [n for n in same if self.perm(n) == perm]

    def _transposed(self, value: ir.Value, perm: Perm) -> ir.Value:
        tensor, array = constant_tensor(value), constant(value)
        assert tensor is not None
        assert array is not None
        turned = ir.Tensor(np.ascontiguousarray(array.transpose(perm)), dtype=tensor.dtype)
        maker = value.producer()
        home = value.graph if maker is None else maker.graph
        assert isinstance(home, ir.Graph)
        return add_initializer(home, self.names, f"{value.name}_transposed", turned)

    def commit(self, chosen: Mapping[Key, Plan], roots: list[tuple[ir.Value, Perm]]) -> None:
        """Let the ``chosen`` nodes work in their new order.

        Args:
            chosen: the plan of each.
            roots: tensors made or read by them, each with the order it is made in from now on.
        """
        jobs = [(label, self.layout(root, len(label))) for root, label in roots]
        for label, layout in jobs:
            self._serve(label, layout, chosen)
        for key, plan in chosen.items():
            if isinstance(key, ir.Node) and plan.edit is not None:
                plan.edit(key, self.names)

    def _serve(self, label: Perm, layout: Layout, chosen: Mapping[Key, Plan]) -> None:
        """Give each reader of a tensor what it wants, now that it is made in the order ``label``."""
        root, back = layout.root, inverse(label)
        name, dims, declared = root.name, self.dims(root), root.shape
        base = root if is_identity(label) else self._turn(root, label)
        made: dict[Perm, ir.Value] = {label: base}

        def add(perm: Perm) -> ir.Value:
            plain = is_identity(perm) and base is root
            fresh = name if plain else self.names.fresh(f"{name}_t")
            return self._add(base, compose(back, perm), fresh, permuted(dims, perm))

        def want(perm: Perm) -> ir.Value:
            if perm not in made:
                reuse = layout.transposes.get(perm)
                if reuse:
                    self._set(reuse[0], base, compose(back, perm))
                    self._place(reuse[0], base)
                made[perm] = reuse[0].outputs[0] if reuse else add(perm)
            return made[perm]

        for value, perm in layout.outputs:
            if value is root and not is_identity(label):
                made[perm] = add(perm)
                self._hand_over(root, made[perm], declared)
            elif value is not root:
                self._serve_output(value, base, perm, label)
                if perm != label:
                    made[perm] = value
        for read in layout.reads:
            plan = chosen.get(read.node)
            turn = plan.inputs[read.index] if plan is not None else None
            goal = read.perm if turn is None else compose(read.perm, turn)
            read.node.replace_input_with(read.index, want(goal))
        for nodes in layout.transposes.values():
            for node in nodes:
                self._drop(node)

    def _serve_output(self, value: ir.Value, base: ir.Value, perm: Perm, label: Perm) -> None:
        """Keep a graph output that a Transpose makes, in whatever way it still takes."""
        node = value.producer()
        assert node is not None
        if perm != label:
            self._set(node, base, compose(inverse(label), perm))
            self._place(node, base)
        elif not forward(value, base):
            node.op_type = "Identity"
            node.attributes.pop("perm", None)
            node.replace_input_with(0, base)

    def _turn(self, root: ir.Value, label: Perm) -> ir.Value:
        """Make ``root`` stand for its transposed self; a constant is replaced by a new one."""
        if constant(root) is not None:
            return self._transposed(root, label)
        self._dims[root] = permuted(self.dims(root), label)
        root.name = self.names.fresh(f"{root.name}_t")
        if root.shape is not None and len(root.shape) == len(label):
            root.shape = ir.Shape([root.shape[p] for p in label])
        return root

    def _hand_over(self, old: ir.Value, new: ir.Value, declared: ir.Shape | None) -> None:
        """Make ``new``, a Transpose of ``old``, the graph output that ``old`` was."""
        shape, node = old.shape, new.producer()
        assert node is not None
        if not forward(old, new):
            raise AssertionError(f"{new.name}: a new node cannot be an output")
        node.replace_input_with(0, old)
        old.name, new.name = new.name, old.name  # forward swaps them, but ``new`` has the right one
        old.shape, new.shape = shape, declared

    def _add(self, source: ir.Value, perm: Perm, name: str | None, dims: Dims | None) -> ir.Value:
        node = ir.Node(
            "",
            "Transpose",
            [source],
            [ir.AttrInt64s("perm", list(perm))],
            name=self.names.fresh(f"{name}_transpose"),
            outputs=[ir.Value(name=name, type=source.type)],
        )
        out = node.outputs[0]
        if source.type is None and (dtype := self.dtype(source)) is not None:
            out.type = ir.TensorType(dtype)
        if dims is not None and out.type is not None:
            out.shape = ir.Shape(dims)
        self._dims[out] = dims
        self._insert(node, source)
        return out

    def _insert(self, node: ir.Node, source: ir.Value) -> None:
        maker = source.producer()
        if maker is not None and maker.graph is self.graph:
            self.graph.insert_after(maker, node)
        else:
            self.graph.insert_before(self.graph[0], node)

    def _place(self, node: ir.Node, source: ir.Value) -> None:
        """Move a Transpose right behind what it reads, before all that may read it."""
        self.graph.remove(node)
        self._insert(node, source)

    def _set(self, node: ir.Node, source: ir.Value | None, perm: Perm) -> None:
        node.replace_input_with(0, source)
        node.attributes["perm"] = ir.AttrInt64s("perm", list(perm))

    def _drop(self, node: ir.Node) -> None:
        if node.graph is not None and is_op(node, "Transpose") and unused(node):
            remove(node)
