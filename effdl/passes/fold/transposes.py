"""The pass ``fold_transposes``."""

from __future__ import annotations

import onnx_ir as ir
from pydantic import Field

from effdl.graph.edit import raise_ir_version, roots
from effdl.graph.shapes import infer
from effdl.graph.transposes import perm_of
from effdl.graph.transposes_edit import LayoutGraph
from effdl.graph.walk import is_op, nodes_in, subgraphs_of
from effdl.graph.weights import Names
from effdl.passes.base import Context, NodePass, matches
from effdl.passes.fold._transposes import Search


class FoldTransposes(NodePass):
    """Move Transposes through the graph to where they cancel.

    What it does: lets whole regions of the graph work in another order of axes when that leaves
    fewer Transposes: element-wise operators, reductions, Concat, Split, Slice, Pad, Resize, Softmax,
    Gather, Reshape, quantization and others, whose axes and constants are renumbered. A Transpose of
    a constant becomes a constant, one in front of a Gemm or an Einsum goes into that. Neither the
    number of Transposes and other nodes nor what they cost (bytes moved, 16 KiB for a node) grows.

    When it helps: on models that were made for channels last (TensorFlow, Keras), where a Transpose
    stands before and behind every Conv. Fusions, quantization and pruning see Conv, batch norm and
    activation side by side afterwards.

    When it does not: ONNX Runtime has an optimizer of its own for Transposes and runs it when it
    loads a model, so latency often stays the same: MobileNetV2 and ResNet50V2 from tf2onnx (without
    its optimizer) keep 1 of 121 and 114 Transposes here, and run as fast as before within the noise.
    Conv, pooling and operators of other domains keep their order of axes, as do graph inputs and
    outputs. A Transpose between matrices of an attention stays, and so does one beside a Reshape
    whose goal is computed. One large Transpose is not put in the place of two small ones.

    Example:
        passes: [simplify, fold_transposes]
    """

    max_growth: int = Field(default=8192, ge=0)
    """Bytes up to which a constant may be kept in two orders when it is needed in both."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of nodes changed or removed."""
        if not self.candidates(model, ctx):
            return 0
        return _Run(self, model, ctx).run()

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Return the Transposes."""
        nodes = [n for root, _, _ in roots(model) for n in nodes_in(root)]
        return [n.name or n.op_type for n in nodes if is_op(n, "Transpose") and self.selected(n)]


class _Run:
    def __init__(self, step: FoldTransposes, model: ir.Model, ctx: Context) -> None:
        self.step = step
        self.model = model
        self.ctx = ctx
        self.shapes = infer(model)
        self.names = Names(model)

    def run(self) -> int:
        before = self._count()
        changes = 0
        for root, imports, is_function in roots(self.model):
            opset = imports.get("", imports.get("ai.onnx", 0))
            if is_function:
                self._skip_function(root)
            else:
                changes += self._graph(root, opset)
        if changes:
            raise_ir_version(self.model)
            self.ctx.note("transposes_before", before)
            self.ctx.note("transposes_after", self._count())
        return changes

    def _graph(self, graph: ir.Graph, opset: int) -> int:
        start = {n: (n.inputs[0], perm_of(n, None)) for n in graph if self._wanted(n)}
        layouts = LayoutGraph(
            graph, self.shapes, self.names, self.step.selected, self.step.max_growth
        )
        search = Search(layouts, opset, self._allowed)
        changes = search.run() if start else 0
        for node, (source, perm) in start.items():
            if node.graph is None or not is_op(node, "Transpose"):
                self.ctx.touch(node, "cancelled or merged")
            elif source is not node.inputs[0] or perm != perm_of(node, None):
                self.ctx.touch(node, "moved")
        for node in graph:
            if self._wanted(node):
                reason = search.reasons.get(node, "moving it would take as many elsewhere")
                self.ctx.skip(node, reason)
        for node in list(graph):
            for inner in subgraphs_of(node):
                changes += self._graph(inner, opset)
        return changes

    def _wanted(self, node: ir.Node) -> bool:
        return is_op(node, "Transpose") and self.step.selected(node)

    def _allowed(self, node: ir.Node) -> bool:
        return not any(matches(p, node) for p in self.step.ignore)

    def _skip_function(self, root: ir.Graph) -> None:
        for node in nodes_in(root):
            if self._wanted(node):
                self.ctx.skip(node, "it is inside a function of the model")

    def _count(self) -> int:
        return sum(is_op(n, "Transpose") for n in nodes_in(self.model.graph))
