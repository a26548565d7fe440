"""Residual blocks: what is added to a value and was computed from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from effdl.graph.cost import node_cost
from effdl.graph.dims import guess_dims
from effdl.graph.shapes import infer
from effdl.graph.walk import MICROSOFT, is_op, opset
from effdl.graph.weights import constant_tensor

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_LAYER_NORM_OPSET = 17
_ATTENTION = ("Softmax", "Attention", "MultiHeadAttention", "GroupQueryAttention")


@dataclass(frozen=True)
class Block:
    """A branch and the node that adds it to its shortcut.

    Args:
        name: of the join, for logs.
        join: an Add, or a SkipLayerNormalization.
        side: the input of the join that the branch is; the shortcut is the other one, 0 or 1.
        nodes: of the branch that depend on the shortcut, in order, and the join.
        axis: of the branch's channels, 1 or -1.
        rank: of the sum; ``dtype`` its elements.
        macs: of the branch.
        reason: why it stays, empty when it need not.
    """

    name: str
    join: ir.Node = field(repr=False)
    side: int
    nodes: tuple[ir.Node, ...] = field(repr=False)
    axis: int
    rank: int
    dtype: ir.DataType
    macs: int
    reason: str = ""

    @property
    def out(self) -> ir.Value:
        """The sum."""
        return summed(self.join)

    @property
    def short(self) -> ir.Value:
        """What the branch is computed from and added to."""
        value = self.join.inputs[1 - self.side]
        assert value is not None
        return value

    @property
    def branch(self) -> ir.Value:
        """What is added."""
        value = self.join.inputs[self.side]
        assert value is not None
        return value

    @property
    def attends(self) -> bool:
        """Whether it is an attention block."""
        return any(n.op_type in _ATTENTION for n in self.nodes)


def is_skip_norm(node: ir.Node) -> bool:
    """Whether a node adds two values and normalises the sum."""
    return is_op(node, "SkipLayerNormalization", domain=MICROSOFT)


def summed(join: ir.Node) -> ir.Value:
    """Return the sum that a join makes; its norm where the sum is not given out."""
    if is_skip_norm(join) and len(join.outputs) > 3 and join.outputs[3].name:
        return join.outputs[3]
    return join.outputs[0]


def blocks(model: ir.Model) -> list[Block]:
    """Return the residual blocks of the main graph in order, those that have to stay with a reason.

    A block holds at least one layer with multiply-accumulates; an outer block may hold inner ones.
    """
    finder = _Finder(model)
    return [b for node in model.graph if (b := finder.at(node)) is not None]


def layers(found: list[Block]) -> list[tuple[Block, ...]]:
    """Put each attention block and the one behind it together, as layers of transformers have them."""
    units: list[tuple[Block, ...]] = []
    waiting: Block | None = None
    for block in found:
        if waiting is not None and not block.attends and _follows(block, waiting):
            units[-1] = (waiting, block)
            waiting = None
            continue
        units.append((block,))
        waiting = block if block.attends else None
    return units


def _follows(block: Block, before: Block) -> bool:
    """Whether the shortcut of a block is the sum of the one before it, or that normalised."""
    if block.short is before.out or block.short in before.join.outputs:
        return True
    places = {n: k for k, n in enumerate(_graph(block.join))}
    between = _between(before.out, block.short, places)
    return bool(between) and not any(
        is_op(n, "Conv", "Gemm", "MatMul") or n in before.nodes for n in between
    )


def _name(node: ir.Node) -> str:
    return node.name or summed(node).name or node.op_type


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


class _Finder:
    def __init__(self, model: ir.Model) -> None:
        self._places = {n: k for k, n in enumerate(model.graph)}
        dims = guess_dims(model)
        self._free, self._pinned = infer(model), infer(model, dims)
        self._opset = opset(model)

    def at(self, node: ir.Node) -> Block | None:
        """Return the block that a node joins to its shortcut; None where it is no join."""
        if not is_op(node, "Add") and not is_skip_norm(node):
            return None
        a, b = node.inputs[0], node.inputs[1]
        if a is None or b is None or any(constant_tensor(v) is not None for v in (a, b)):
            return None
        for side, short, branch in ((1, a, b), (0, b, a)):
            inside = _between(short, branch, self._places)
            macs = self._macs(inside)
            if macs:
                return self._block(node, side, inside, macs)
        for short, branch in ((a, b), (b, a)):
            start = self._projected(short)
            if start is None:
                continue
            inside = _between(start, branch, self._places)
            macs = self._macs(inside)
            if macs and not any(short is o for n in inside for o in n.outputs):
                reason = "its shortcut is a projection, not the block's input"
                return self._block(node, 0, inside, macs, reason)
        return None

    def _block(
        self, node: ir.Node, side: int, inside: list[ir.Node], macs: int, reason: str = ""
    ) -> Block:
        branch = node.inputs[side]
        return Block(
            _name(node),
            node,
            side,
            (*inside, node),
            1 if _last_layer_is_conv(branch) else -1,
            len(self._pinned.of(branch) or ()),
            self._pinned.dtype(branch) or ir.DataType.FLOAT,
            macs,
            reason or self._why(node, node.inputs[1 - side], inside),
        )

    def _why(self, node: ir.Node, short: ir.Value | None, inside: list[ir.Node]) -> str:
        assert short is not None
        out = summed(node)
        if not self._alike(short, out):
            return "its shortcut and its output may differ in shape"
        if self._pinned.dtype(short) not in _FLOATS:
            return "its values are not float16, float32 or float64"
        if _read_elsewhere(node, inside):
            return "what is inside is read elsewhere too"
        if is_skip_norm(node):
            return self._why_norm(node)
        return ""

    def _why_norm(self, node: ir.Node) -> str:
        if self._opset < _LAYER_NORM_OPSET:
            return f"LayerNormalization needs opset {_LAYER_NORM_OPSET}: convert_opset before it"
        if any(o.uses() or o.is_graph_output() for o in node.outputs[1:3]):
            return "its mean or its deviation is read"
        return ""

    def _alike(self, short: ir.Value, out: ir.Value) -> bool:
        fixed = self._pinned.static(short), self._pinned.static(out)
        if fixed[0] is None or fixed[0] != fixed[1]:
            return False
        before, after = self._free.of(short), self._free.of(out)
        if before is None or after is None:
            return True
        return all(a == b or a is None or b is None for a, b in zip(before, after, strict=True))

    def _macs(self, nodes: list[ir.Node]) -> int:
        return sum(node_cost(n, self._pinned).macs or 0 for n in nodes)

    def _projected(self, value: ir.Value) -> ir.Value | None:
        """Return what a chain of nodes with one computed input each starts from, None without a chain."""
        start: ir.Value | None = None
        node = value.producer()
        while node is not None and is_op(
            node, "Conv", "Gemm", "MatMul", "BatchNormalization", "AveragePool", "MaxPool", "Pad",
            "Identity", "Slice",
        ):  # fmt: skip
            start = node.inputs[0]
            node = start.producer() if start is not None else None
        return start


def _between(start: ir.Value, end: ir.Value, places: Mapping[ir.Node, int]) -> list[ir.Node]:
    """Return the nodes that ``end`` is computed with and that depend on ``start``, in order."""
    maker = start.producer()
    first = places.get(maker, -1) if maker is not None else -1
    starts = {start}
    if maker is not None and is_skip_norm(maker):
        starts |= set(maker.outputs)  # the sum is the shortcut, its norm what the branch reads
    seen: set[ir.Node] = set()
    todo = [end.producer()]
    while todo:
        node = todo.pop()
        if node is None or node in seen or places.get(node, -1) <= first:
            continue
        seen.add(node)
        todo += [v.producer() for v in node.inputs if v is not None and v not in starts]
    after = set(starts)
    found = []
    for node in sorted(seen, key=places.__getitem__):
        if any(v in after for v in node.inputs if v is not None):
            found.append(node)
            after |= set(node.outputs)
    return found if end in after and end not in starts else []


def _read_elsewhere(join: ir.Node, inside: list[ir.Node]) -> bool:
    own = {*inside, join}
    return any(
        o.is_graph_output() or any(u.node not in own for u in o.uses())
        for n in inside
        for o in n.outputs
    )


def _last_layer_is_conv(value: ir.Value | None) -> bool:
    """Whether the channels of a value are those of a convolution, at axis 1."""
    todo, seen = [value], set[ir.Node]()
    while todo:
        found = todo.pop(0)
        node = found.producer() if found is not None else None
        if node is None or node in seen:
            continue
        seen.add(node)
        if is_op(node, "Gemm", "MatMul", "LayerNormalization"):
            return False
        if is_op(node, "Conv", "ConvTranspose", "BatchNormalization"):
            return True
        todo += node.inputs
    return False
