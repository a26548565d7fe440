"""The pass ``fuse_parallel``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from effdl.graph.dims import Dims
from effdl.graph.edit import forward, raise_ir_version, remove, roots
from effdl.graph.match import attempt
from effdl.graph.shapes import Shapes, infer
from effdl.graph.walk import int_attr, is_op, only_user, subgraphs_in
from effdl.graph.weights import Names, add_initializer, constant
from effdl.passes.base import Context, NodePass
from effdl.passes.fuse._branches import (
    LINEAR,
    Activation,
    Branch,
    activation_of,
    branch_of,
    describe,
    join,
    output_axis,
)

_SIZES_AS_INPUT = 13
"""The opset from which Split takes the sizes of its parts as an input."""
_NEGATIVE_AXIS = 11


class FuseParallel(NodePass):
    """Make one layer of several that read the same value, and split its output.

    What it does: MatMul (with the Add of its bias) and Gemm nodes with constant weights, and Convs
    with the same kernel, strides, dilations and padding, that have one input in common become one
    node with their weights side by side and a Split behind it. The same activation behind each goes
    before the Split. Where a Concat puts the parts together again in a row there is no Split. A
    layer without a bias beside one with a bias gets zeros.

    When it helps: small layers, whose start costs as much as their work, such as the queries, keys
    and values of a few positions at two and more threads, or the heads of a detector, which have
    fewer channels than a vector register holds.

    When it does not: at a hundred rows and more one large product takes as long as its parts, and
    the Split comes on top; Convs of usual widths lose, since a Split of channels takes the values out
    of the blocked layout in which ONNX Runtime computes them. The options leave these alone; layers
    with shared weights, groups or a computed bias stay as well.

    Example:
        passes: [simplify, fold_batchnorm, fuse_parallel]
    """

    claims: ClassVar[frozenset[str]] = frozenset({"latency"})
    min_opset: ClassVar[int] = 7

    max_rows: Annotated[int, Field(ge=0)] = 64
    """MatMul and Gemm only where the input is known to have at most this many rows; 0: any number."""
    min_size: Annotated[int, Field(ge=0)] = 16384
    """MatMul and Gemm only where their weights together have at least this many elements."""
    max_width: Annotated[int, Field(ge=0)] = 16
    """Convs with at most this many output channels each, half of it for 1x1 kernels; 0: any number."""
    max_layers: Annotated[int, Field(ge=2)] = 4
    """At most this many layers into one: all their outputs are in memory at the same time."""
    activations: bool = True
    """Apply the activation that follows each layer once, before the Split."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of layers that became part of another."""
        if not any(_readers(g, self) for root, _, _ in roots(model) for g in _graphs(root)):
            return 0
        packer = _Packer(self, ctx, infer(model), Names(model), {}, {})
        total = 0
        for root, imports, is_function in roots(model):
            opset = imports.get("", imports.get("ai.onnx", 0))
            if opset < self.min_opset:
                continue
            for graph in _graphs(root):
                while changes := packer.sweep(graph, opset, is_function):
                    total += changes
        for node, reason in packer.declined.items():
            if node.graph is not None:
                ctx.skip(node, reason)
        if total:
            raise_ir_version(model)
        return total


def _graphs(root: ir.Graph) -> Iterator[ir.Graph]:
    yield root
    yield from subgraphs_in(root)


def _readers(graph: ir.Graph, step: FuseParallel) -> list[list[ir.Node]]:
    """Return the lists of two and more layers of one family that read the same value, in order."""
    found: dict[tuple[ir.Value, bool], list[ir.Node]] = {}
    for node in graph:
        if is_op(node, *LINEAR, "Conv") and step.selected(node) and node.inputs[0] is not None:
            found.setdefault((node.inputs[0], is_op(node, "Conv")), []).append(node)
    return [nodes for nodes in found.values() if len(nodes) > 1]


@dataclass
class _Packer:
    """One run.

    Args:
        origin: the values that were replaced, by the new ones: shapes are known of the former.
        declined: the last reason, by node.
        sizes: the constants that Split nodes read.
    """

    step: FuseParallel
    ctx: Context
    shapes: Shapes
    names: Names
    origin: dict[ir.Value, ir.Value]
    declined: dict[ir.Node, str]
    sizes: dict[tuple[ir.Graph, tuple[int, ...]], ir.Value] = field(default_factory=dict)

    def sweep(self, graph: ir.Graph, opset: int, is_function: bool) -> int:
        """Go through the layers of one graph; return how many became part of another."""
        changes = 0
        for nodes in _readers(graph, self.step):
            if is_function:
                self.declined.update(dict.fromkeys(nodes, "weights inside a function stay"))
                continue
            for alike in self._alike(nodes):
                for run in _concat_runs(alike, self.step.activations, self.rank(alike)):
                    changes += self._pack(graph, run, opset)
                left = [b for b in alike if b.node.graph is not None]
                changes += self._pack_if_it_pays(graph, left, opset)
        return changes

    def dims(self, value: ir.Value | None) -> Dims | None:
        """Return the shape of a value, also of one that this run made."""
        while value is not None and value in self.origin:
            value = self.origin[value]
        return self.shapes.of(value)

    def rank(self, branches: Sequence[Branch]) -> int | None:
        """Return how many axes the output of layers has."""
        return 2 if any(is_op(b.node, "Gemm") for b in branches) else self._rank(branches[0].node)

    def _rank(self, node: ir.Node) -> int | None:
        dims = self.dims(node.outputs[0]) or self.dims(node.inputs[0])
        return None if dims is None else len(dims)

    def _alike(self, nodes: Sequence[ir.Node]) -> list[list[Branch]]:
        """Read layers and return those that may become one, list by list."""
        kinds: dict[object, list[Branch]] = {}
        for node in nodes:
            branch = attempt(branch_of, node, self._rank(node))
            if isinstance(branch, str):
                self.declined[node] = branch
            else:
                kinds.setdefault(branch.kind, []).append(branch)
        for alike in kinds.values():
            if len(alike) == 1:
                self.declined[alike[0].node] = "the other layers with its input are of other forms"
        return [alike for alike in kinds.values() if len(alike) > 1]

    def _pack_if_it_pays(self, graph: ir.Graph, alike: Sequence[Branch], opset: int) -> int:
        """Pack layers with a Split behind, where the options say that it pays."""
        chosen, reason = list(alike), None
        if len(alike) < 2:
            reason = "the other layers with its input are packed already"
        elif is_op(alike[0].node, "Conv"):
            chosen = [b for b in alike if self._narrow(b)]
            if len(chosen) < 2:
                reason = (
                    f"a wide Conv, and a Split would cost more (max_width is {self.step.max_width})"
                )
        else:
            reason = self._too_large(alike, opset)
        if reason is None and len(chosen) > self.step.max_layers:
            reason = f"{len(chosen)} layers have its input, more than max_layers"
        if reason is not None:
            self.declined.update({b.node: reason for b in alike})
            return 0
        return self._pack(graph, chosen, opset)

    def _narrow(self, branch: Branch) -> bool:
        most = self.step.max_width
        pointwise = math.prod(branch.weight.shape[2:]) == 1
        return most == 0 or branch.width <= (most // 2 if pointwise else most)

    def _too_large(self, alike: Sequence[Branch], opset: int) -> str | None:
        node, most = alike[0].node, self.step.max_rows
        if opset < _NEGATIVE_AXIS and self.rank(alike) is None:
            return "the rank of its output is unknown, and the opset has no Split of the last axis"
        size = sum(b.weight.size for b in alike)
        if size < self.step.min_size:
            return f"the layers have {size} weights together, less than min_size"
        dims = self.dims(node.inputs[0])
        rows = [d for d in dims[:-1] if isinstance(d, int)] if dims is not None else []
        if most and (dims is None or len(rows) < len(dims) - 1):
            return "the number of rows is dynamic (max_rows: 0 takes any)"
        if most and math.prod(rows) > most:
            return f"{math.prod(rows)} rows, more than max_rows"
        return None

    def _pack(self, graph: ir.Graph, branches: Sequence[Branch], opset: int) -> int:
        """Put one layer in place of ``branches``."""
        inside = {b.node for b in branches}
        first = next(n for n in graph if n in inside)
        what = describe(branches)
        made = self._layer(graph, branches)
        ends, old = [b.end for b in branches], self._nodes(branches)
        if self.step.activations:
            while (found := _same_activation(ends)) is not None:
                made += self._again(graph, found[0], made[-1].outputs[0])
                ends = [a.nodes[-1].outputs[0] for a in found]
                old += [n for a in found for n in a.nodes]
        whole = made[-1].outputs[0]
        axis, rank = output_axis(branches), self.rank(branches)
        concat = _concat_of(ends, rank, axis)
        if concat is None:
            if axis < 0 and opset < _NEGATIVE_AXIS:
                assert rank is not None
                axis += rank
            made.append(self._split(graph, whole, [b.width for b in branches], axis, opset))
        graph.insert_before(first, made)
        parts = list(made[-1].outputs) if concat is None else []
        for end, part in zip(ends, parts, strict=concat is None):
            self._forward(end, part)
        if concat is not None:
            self._shorten(graph, concat, ends, whole)
        for node in reversed(list(dict.fromkeys(old))):
            remove(node)
        for end, part in zip(ends, parts, strict=concat is None):
            part.name = part.name if part.is_graph_output() else end.name
        if branches[0].node.name:
            made[0].name = branches[0].node.name  # the patterns of a recipe may name it
        self.ctx.touch(made[0], f"{what} -> one {made[0].op_type}")
        return len(branches) - 1

    def _nodes(self, branches: Sequence[Branch]) -> list[ir.Node]:
        adds = [b.bias_add for b in branches if b.bias_add is not None]
        return [*(b.node for b in branches), *adds]

    def _forward(self, old: ir.Value, new: ir.Value) -> None:
        self.origin[new] = old
        if not forward(old, new):
            raise AssertionError(f"{old.name}: a part of the new output cannot stand for it")

    def _layer(self, graph: ir.Graph, branches: Sequence[Branch]) -> list[ir.Node]:
        """Return the layer for all ``branches``, with its Add for a MatMul."""
        first = branches[0].node
        base = self._base(first)
        joined = join(branches)
        inputs = [first.inputs[0], add_initializer(graph, self.names, f"{base}_w", joined.weight)]
        bias = None
        if joined.bias is not None:
            bias = add_initializer(graph, self.names, f"{base}_b", joined.bias)
        if bias is not None and joined.op_type != "MatMul":
            inputs.append(bias)
        made = [self._node(joined.op_type, inputs, joined.attributes, base)]
        if bias is not None and joined.op_type == "MatMul":
            made.append(self._node("Add", [made[0].outputs[0], bias], (), f"{base}_bias"))
        return made

    def _again(self, graph: ir.Graph, activation: Activation, x: ir.Value) -> list[ir.Node]:
        """Return the nodes of ``activation``, applied to ``x``."""
        if activation.kind == "silu":
            gate = self._node("Sigmoid", [x], (), self._base(activation.nodes[0]))
            product = self._node("Mul", [x, gate.outputs[0]], (), self._base(activation.nodes[1]))
            return [gate, product]
        node = activation.nodes[0]
        inputs: list[ir.Value | None] = [x]
        for value in node.inputs[1:]:
            array = constant(value)
            if value is None or value.is_initializer() or array is None:
                inputs.append(value)
            else:  # a Constant node may stand behind the place of the new nodes
                inputs.append(add_initializer(graph, self.names, f"{value.name}_packed", array))
        attributes = tuple(node.attributes.values())
        return [self._node(node.op_type, inputs, attributes, self._base(node), node.domain)]

    def _split(
        self, graph: ir.Graph, whole: ir.Value, sizes: list[int], axis: int, opset: int
    ) -> ir.Node:
        inputs, attributes = [whole], [ir.AttrInt64("axis", axis)]
        if opset >= _SIZES_AS_INPUT:
            key = (graph, tuple(sizes))
            if key not in self.sizes:
                array = np.array(sizes, np.int64)
                self.sizes[key] = add_initializer(graph, self.names, "split_sizes", array)
            inputs.append(self.sizes[key])
        else:
            attributes.append(ir.AttrInt64s("split", sizes))
        maker = whole.producer()
        assert maker is not None
        return self._node("Split", inputs, attributes, f"{maker.name}_split", count=len(sizes))

    def _shorten(
        self, graph: ir.Graph, concat: ir.Node, parts: Sequence[ir.Value], whole: ir.Value
    ) -> None:
        """Let ``concat`` read ``whole`` in place of its ``parts``; it goes when nothing else is left."""
        out, at = concat.outputs[0], list(concat.inputs).index(parts[0])
        inputs = [*concat.inputs[:at], whole, *concat.inputs[at + len(parts) :]]
        if len(inputs) == 1:
            self._forward(out, whole)
        else:
            base = concat.name or "Concat"
            shorter = self._node("Concat", inputs, tuple(concat.attributes.values()), base)
            graph.insert_before(concat, shorter)
            self._forward(out, shorter.outputs[0])
        remove(concat)

    def _base(self, node: ir.Node) -> str:
        return f"{node.name or node.op_type}_packed"

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr],
        base: str,
        domain: str = "",
        count: int = 1,
    ) -> ir.Node:
        outputs = [ir.Value(name=self.names.fresh(f"{base}_{k}")) for k in range(count)]
        name = self.names.fresh(base)
        return ir.Node(domain, op_type, inputs, attributes, outputs=outputs, name=name)


def _same_activation(values: Sequence[ir.Value]) -> list[Activation] | None:
    """Return the activations behind ``values`` where all compute the same."""
    found = [a for v in values if (a := activation_of(v)) is not None]
    if len(found) < len(values) or len({a.kind for a in found}) > 1:
        return None
    return found


def _concat_of(values: Sequence[ir.Value], rank: int | None, axis: int) -> ir.Node | None:
    """Return the Concat along ``axis`` that reads ``values`` one behind the other, and nobody else."""
    concat = only_user(values[0])
    made = values[0].producer()
    if (
        concat is None
        or not is_op(concat, "Concat")
        or made is None
        or concat.graph is not made.graph
    ):
        return None
    if any(only_user(v) is not concat for v in values[1:]):
        return None
    at = list(concat.inputs).index(values[0])
    in_a_row = list(concat.inputs[at : at + len(values)]) == list(values)
    given = int_attr(concat, "axis", 1)
    on_axis = given == axis or (rank is not None and given % rank == axis % rank)
    return concat if in_a_row and on_axis else None


def _concat_runs(
    alike: Sequence[Branch], activations: bool, rank: int | None
) -> list[list[Branch]]:
    """Return the longest rows of branches that one Concat reads side by side."""
    axis = output_axis(alike)
    places: dict[ir.Node, dict[int, Branch]] = {}
    for branch in alike:
        end = branch.end
        found = activation_of(end) if activations else None
        end = found.nodes[-1].outputs[0] if found is not None else end
        concat = _concat_of([end], rank, axis)
        if concat is not None:
            places.setdefault(concat, {})[list(concat.inputs).index(end)] = branch
    runs = []
    for by_place in places.values():
        run: list[Branch] = []
        for place in sorted(by_place):
            branch = by_place[place]
            if run and place - 1 in by_place and _same_end(run[-1], branch, activations):
                run.append(branch)
            else:
                runs.append(run)
                run = [branch]
        runs.append(run)
    return [run for run in runs if len(run) > 1]


def _same_end(first: Branch, second: Branch, activations: bool) -> bool:
    """Whether both branches end in the same activation, or both in none."""
    if not activations:
        return True
    kinds = [a.kind if (a := activation_of(b.end)) is not None else None for b in (first, second)]
    return kinds[0] == kinds[1]
