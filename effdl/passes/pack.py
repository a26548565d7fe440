"""The pass ``pack``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from effdl.graph.insert import Builder
from effdl.graph.io import METADATA_PREFIX
from effdl.graph.walk import all_graphs, is_op, opset
from effdl.graph.weights import Array, Names
from effdl.measure.size import zstd_bytes
from effdl.passes._pack_forms import Form, forms
from effdl.passes.base import Context, Pass
from effdl.solve.entropy import entropy_bits

MARK = METADATA_PREFIX + "pack"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_PER_NODE = 90
"""Bytes of a node in the file, with its names; a third of it compressed."""
_LEAST_SAVING = 0.02
_SHARED = 8
"""Numbers of a kind, on average, from which the entropy of their counts says something."""
_LARGE = 256
"""Bytes from which a constant has a place of its own in the file."""


class Pack(Pass):
    """Store each large constant in the shortest form that is exactly the same number for number.

    What it does: tries, for every float weight, indices into the few values that it has (several in a
    byte, one codebook or one for a run of outputs), 8-bit integers times a scale, float16, a bitmap of
    its zeros with the others behind it, and floats taken apart into bytes that compress well. The
    smallest is written with the nodes that put the weight together again. ONNX Runtime computes them once
    when it loads the model, so that it runs as fast as before. Nothing is rounded.

    When it helps: after ``cluster_weights`` and ``prune_weights``; for weights that were trained for 8 bits
    or stored wider than they are. Any float model compresses a tenth better.

    When it does not: loading takes longer, and memory is that of the float model. A runtime that does not
    fold constants would put the weights together at each run. It comes last: other passes do not see
    packed weights.

    Example:
        passes: [{prune_weights: {sparsity: 0.6}}, cluster_weights, pack]
    """

    claims: ClassVar[frozenset[str]] = frozenset({"size"})
    min_opset: ClassVar[int] = 7

    smallest: Literal["compressed", "raw"] = "compressed"
    """What counts: bytes after zstd, as in a download, or bytes of the file itself."""
    min_size: int = Field(1024, ge=1)
    """Leave constants with fewer numbers than this alone."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of constants stored in another form."""
        names, version = Names(model), opset(model)
        changes = before = after = 0
        bound = 0.0
        for graph in all_graphs(model):
            to = Builder(graph, names, version, next(iter(graph), None))
            tables: set[bytes] = set()
            for value, tensor in list(self._constants(graph, ctx)):
                array = tensor.numpy()
                name = value.name or "weight"
                form, was, now = self._best(array, version, tables)
                if form is None:
                    ctx.skip(name, "no shorter form is exactly the same")
                    continue
                before, after, bound = before + was, after + now, bound + _bound(array)
                tables |= {t.tobytes() for t in form.tables}
                _write(value, tensor, form, to)
                ctx.touch(name, f"{form.name}: {was:,} -> {now:,} bytes")
                changes += 1
            if changes:
                _sort(graph)
        if changes:
            model.ir_version = max(model.ir_version, 4)  # below, weights must be graph inputs too
            ctx.note("packed", changes)
            ctx.note(f"{self.smallest}_bytes", f"{before:,} -> {after:,}")
            ctx.note("entropy_bytes", round(bound / 8))  # of their values, one by one
        return changes

    def _constants(
        self, graph: ir.Graph, ctx: Context
    ) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
        """Yield the float constants of a graph that may be stored otherwise; tell why others may not."""
        values = [*graph.initializers.values()]
        values += [n.outputs[0] for n in graph if is_op(n, "Constant") and "value" in n.attributes]
        for value in values:
            maker = value.producer()
            tensor = value.const_value if maker is None else maker.attributes["value"].as_tensor()
            if tensor is None or tensor.dtype not in _FLOATS or tensor.size < self.min_size:
                continue
            users = [u.node for u in value.uses()]
            if not users or any(MARK in u.metadata_props for u in users):
                continue
            if value.is_graph_input() or value.is_graph_output():
                ctx.skip(value.name or "weight", "it is an input or output of the graph")
            else:
                yield value, tensor

    def _best(self, array: Array, version: int, tables: set[bytes]) -> tuple[Form | None, int, int]:
        """Return the shortest form, if any is shorter, with bytes before and after."""
        was = self._size(array)
        best, least = None, was * (1 - _LEAST_SAVING)
        for form in forms(array, version):
            new = [t for t in form.tables if t.tobytes() not in tables]
            now = sum(self._size(a) for a in (*form.arrays, *new))
            now += form.nodes * (_PER_NODE if self.smallest == "raw" else _PER_NODE // 3)
            if now < least:
                best, least = form, now
        return best, was, int(least)

    def _size(self, array: Array) -> int:
        return array.nbytes if self.smallest == "raw" else zstd_bytes(array)


def _bound(array: Array) -> float:
    """Return the bits of an array by the entropy of its values; all it has where nearly all differ."""
    bits = np.ascontiguousarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))
    counts = np.unique(bits, return_counts=True)[1]
    return entropy_bits(counts) if len(counts) * _SHARED <= array.size else 8.0 * array.nbytes


def _write(value: ir.Value, tensor: ir.TensorProtocol, form: Form, to: Builder) -> None:
    """Let everything that reads ``value`` read the same numbers, put together again."""
    known = set(to.graph)
    maker = value.producer()
    if maker is not None and to.before is maker:
        to.before = None
    to.before = to.before or next(iter(to.graph))
    made = form.write(to, value.name or "weight")
    made.type, made.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
    for node in to.graph:
        if node not in known and any(v is not None and v.is_initializer() for v in node.inputs):
            node.metadata_props[MARK] = "1"  # what it reads is packed
    value.replace_all_uses_with(made)


def _sort(graph: ir.Graph) -> None:
    """Put constants of like bytes next to each other: compressors look at a stretch of the file at a time."""
    values = list(graph.initializers.values())
    graph.initializers.clear()

    def place(value: ir.Value) -> tuple[int, str, float]:
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _LARGE:
            return 0, "", 0.0
        mean = float(tensor.numpy().mean()) if tensor.dtype == ir.DataType.UINT8 else 0.0
        return 1, tensor.dtype.name, mean

    for value in sorted(values, key=place):
        graph.register_initializer(value)
