"""The pass ``cluster_weights``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from effdl.graph.bias import Bias, bias_of
from effdl.graph.walk import all_nodes, function_nodes, int_attr, is_op
from effdl.graph.weights import Names, add_initializer, constant_tensor
from effdl.observe.batches import batched
from effdl.observe.drift import drift
from effdl.observe.layers import rows_of
from effdl.observe.moments import Moments, moments
from effdl.observe.rows import Rows
from effdl.passes.base import Context, NodePass
from effdl.passes.cluster._matrix import Array, Matrix, matrix_of, weight_inputs
from effdl.passes.cluster._solutions import Shared, compensated, ladder, problem_of
from effdl.solve.knapsack import knapsack

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(eq=False)
class _Weight:
    """A constant, how it is read, and by which nodes at which input."""

    value: ir.Value
    tensor: ir.TensorProtocol
    matrix: Matrix
    users: list[tuple[ir.Node, int]] = field(default_factory=list)

    def view(self) -> Array:
        return self.matrix.view(self.tensor.numpy().astype(np.float64))

    def biases(self) -> list[Bias]:
        """The constants that take the mean error of each user, none where one of them has none."""
        outputs = self.matrix.shape[0] * self.matrix.shape[1]
        found = [bias_of(node, outputs) for node, _ in self.users]
        return [b for b in found if b is not None] if None not in found else []


class ClusterWeights(NodePass):
    """Let the weights of a layer share a few values.

    What it does: replaces every weight of Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU, RNN and the tables
    of Gather by an entry of a codebook of 2^bits values: the best clusters of its numbers. With calibration
    data the error at the outputs decides: weights still to come make up for the error of those before
    (GPTQ), codebook and choices are improved by turns, and each layer makes up for those before it. With
    ``error``, frequent values are also chosen more often than they are nearest, as long as the errors of
    all layers together stay within it: the compressed size falls most where it costs least. Zeros of a
    pruned weight stay zeros; where a bias follows, it takes the mean of the error.

    When it helps: for the size of the file: ``pack`` after it stores the choices in a few bits, and they
    compress to their entropy.

    When it does not: weights stay floating-point numbers, so latency and the uncompressed file are the
    same until ``pack`` comes; the latency after it, too.

    Example:
        passes: [simplify, {cluster_weights: {bits: 4, error: 0.05}}, pack]
    """

    lossy: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"size"})
    not_after: ClassVar[Mapping[str, str]] = {
        "quantize_*": "it works on floating-point weights, which are integers after quantization",
        "pack": "packed weights are not seen any more",
    }

    bits: int = Field(4, ge=1, le=8)
    """A codebook has 2^bits values: 8 are hardly a loss, 4 or 3 are what most networks bear."""
    error: float | None = Field(None, gt=0)
    """What the errors of all layers, shares of their outputs' squares, may sum up to; none: as bits give."""
    groups: int = Field(1, ge=1)
    """Codebooks of a weight, each for a run of its outputs; fewer where they do not divide evenly."""
    compensate: bool = True
    """Whether each layer also makes up for what became of its inputs; runs the data once more for each."""
    min_size: int = Field(1024, ge=0)
    """Leave weights with fewer elements than this alone."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of weights whose values are shared."""
        weights = self._weights(model, ctx)
        if not weights:
            return 0
        if ctx.feeds is not None:
            ctx = replace(ctx, feeds=batched(model, ctx.feeds, threads=ctx.target.threads))
        found = dict(self._solved(model, weights, ctx))
        planned = self._chosen([found[w.value] for w in weights], ctx)
        ctx.note("planned_errors", float(f"{sum(s.relative for s in planned):.3g}"))
        chosen = self._written(model, dict(zip(weights, planned, strict=True)), ctx)
        for weight, shared in zip(weights, chosen, strict=True):
            for node, _ in weight.users:
                ctx.touch(node, _told(weight, shared))
        model.ir_version = max(model.ir_version, 4)  # below, weights must be graph inputs too
        size = sum(w.tensor.size for w in weights)
        bits = sum(s.solution.bits for s in chosen)
        ctx.note("bits_per_weight", round(bits / size, 3))  # of entropy
        ctx.note(
            "predicted_bytes", round(bits / 8 + sum(4 * s.solution.books.size for s in chosen))
        )
        ctx.note("sum_of_errors", float(f"{sum(s.relative for s in chosen):.3g}"))
        return len(weights)

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Names of the nodes whose weights would share values."""
        return [n.name or n.op_type for w in self._weights(model, ctx) for n, _ in w.users]

    def _solved(
        self, model: ir.Model, weights: Sequence[_Weight], ctx: Context
    ) -> Iterator[tuple[ir.Value, Sequence[Shared]]]:
        """Yield the solutions of every weight, first of those whose inputs were seen."""
        by_rows: dict[Rows, list[_Weight]] = {}
        for weight in weights:
            rows = _rows(model, weight)
            if rows is not None:
                by_rows.setdefault(rows, []).append(weight)
        done: set[ir.Value] = set()
        if ctx.feeds is not None:
            places = {rows: rows for rows in by_rows}
            for rows, seen in moments(
                model, places, ctx.feeds, threads=ctx.target.threads, max_bytes=ctx.max_bytes
            ):
                for weight in by_rows[rows]:
                    done.add(weight.value)
                    yield weight.value, self._solve(weight, seen)
        for weight in weights:
            if weight.value not in done:
                yield weight.value, self._solve(weight, None)

    def _solve(self, weight: _Weight, seen: Moments | None) -> Sequence[Shared]:
        matrix = weight.view()
        problem = problem_of(matrix, seen, centred=bool(weight.biases()))
        groups = _divisor(matrix.shape[0] * matrix.shape[1], self.groups)
        return ladder(problem, 1 << self.bits, groups, seen, self.error)

    def _written(
        self, model: ir.Model, chosen: dict[_Weight, Shared], ctx: Context
    ) -> list[Shared]:
        """Write the weights, each made up for those before it, and return what they became."""
        names, before, result = Names(model), model.clone(), dict(chosen)
        by_rows: dict[Rows, list[_Weight]] = {}
        for weight, shared in chosen.items():
            rows = _rows(model, weight)
            if rows is None or shared.shift is None or not self.compensate:
                _write(weight, shared, names)
            else:
                by_rows.setdefault(rows, []).append(weight)
        for rows, weights in by_rows.items():
            assert ctx.feeds is not None  # else no shift were known
            seen = drift(before, model, rows, ctx.feeds, threads=ctx.target.threads)
            for weight in weights:
                if seen is not None:
                    centred = bool(weight.biases())
                    problem = problem_of(weight.view(), None, centred)
                    result[weight] = compensated(chosen[weight], problem, seen, centred)
                _write(weight, result[weight], names)
        return list(result.values())

    def _chosen(self, ladders: Sequence[Sequence[Shared]], ctx: Context) -> list[Shared]:
        """Return one solution for each weight: the smallest in all within the sum of errors."""
        if self.error is None:
            return [steps[0] for steps in ladders]
        picked = knapsack(
            [[s.solution.bits for s in steps] for steps in ladders],
            [[s.relative for s in steps] for steps in ladders],
            self.error,
        )
        if picked is None:
            ctx.note(
                "error_missed", f"{1 << self.bits} values do not reach {self.error:g}: more bits"
            )
            return [min(steps, key=lambda s: s.relative) for steps in ladders]
        return [steps[k] for steps, k in zip(ladders, picked, strict=True)]

    def _weights(self, model: ir.Model, ctx: Context) -> list[_Weight]:
        """Return the weights to work on in graph order, and log the candidates that are none."""
        outside = set(function_nodes(model))
        found: dict[ir.Value, _Weight] = {}
        refused: dict[ir.Value, str] = {}
        for node in all_nodes(model):
            for index in weight_inputs(node):
                value = node.inputs[index] if index < len(node.inputs) else None
                tensor = constant_tensor(value)
                if value is None or tensor is None or tensor.dtype not in _FLOATS:
                    if reason := _not_a_weight(node, tensor):
                        ctx.skip(node, reason)
                    continue
                reason = "inside a function" if node in outside else self._refusal(node, tensor)
                matrix = matrix_of(node, index, tuple(tensor.shape.numpy()))
                if not reason and matrix is None:
                    reason = f"its weight has the unexpected shape {tensor.shape}"
                if not reason and value in found and found[value].matrix != matrix:
                    reason = "another node reads its weight along another axis"
                reason = reason or refused.get(value, "")
                if reason or matrix is None:
                    refused[value] = reason
                    ctx.skip(node, reason)
                    continue
                found.setdefault(value, _Weight(value, tensor, matrix)).users.append((node, index))
        return [w for v, w in found.items() if self._taken(w, refused.get(v, ""), ctx)]

    def _refusal(self, node: ir.Node, tensor: ir.TensorProtocol) -> str:
        if not self.selected(node):
            return "left out by the options"
        if tensor.size < self.min_size:
            return f"{tensor.size} weights, below min_size {self.min_size}"
        if is_op(node, "Gather") and int_attr(node, "axis", 0) != 0:
            return "it gathers columns"
        return ""

    def _taken(self, weight: _Weight, refused: str, ctx: Context) -> bool:
        """Whether nothing is against a weight as a whole; what is, is told."""
        readers = {(u.node, u.idx) for u in weight.value.uses()}
        reason = refused
        if weight.value.is_graph_output() or readers - set(weight.users):
            reason = "something else reads its weight too"
        elif not reason:
            reason = self._not_worth(weight)
        for node, _ in weight.users if reason else ():
            ctx.skip(node, reason)
        return not reason

    def _not_worth(self, weight: _Weight) -> str:
        matrix = weight.view()
        if not np.isfinite(matrix).all():
            return "its weight has infinities or NaN"
        flat = matrix.reshape(-1, matrix.shape[2])
        groups = _divisor(len(flat), self.groups)
        # With an error to keep, a weight that was worked on before may have as many values as a byte.
        most = 256 if self.error is not None else 1 << self.bits
        if all(_few(part, most) for part in flat.reshape(groups, -1)):
            return f"its weight already has at most {most} values"
        return ""


_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def _few(values: Array, most: int) -> bool:
    """Whether there are at most ``most`` different values; a look at the first ones says mostly no."""
    return len(np.unique(values[: 8 * most])) <= most and len(np.unique(values)) <= most


def _not_a_weight(node: ir.Node, tensor: ir.TensorProtocol | None) -> str:
    """Return why a layer has no weight to work on, an empty string where that is normal."""
    if is_op(node, "MatMul", "Gather"):
        return ""
    if tensor is None:
        return "its weight is computed (try simplify), packed, or fed"
    return f"its weight is {tensor.dtype.name.lower()}"


def _divisor(rows: int, wanted: int) -> int:
    """Return the largest divisor of ``rows`` that is at most ``wanted``."""
    return next(g for g in range(min(rows, wanted), 0, -1) if rows % g == 0)


def _rows(model: ir.Model, weight: _Weight) -> Rows | None:
    """Return what a weight is multiplied with; None where that cannot be seen, or differs by user."""
    found: set[Rows | None] = set()
    for node, index in weight.users:
        seen = is_op(node, *_LAYERS) and index == 1 and node.graph is model.graph
        found.add(rows_of(node) if seen else None)
    rows = found.pop() if len(found) == 1 else None
    sets, _, inputs = weight.matrix.shape
    return rows if rows is not None and (rows.groups, rows.width) == (sets, inputs) else None


def _write(weight: _Weight, shared: Shared, names: Names) -> None:
    """Give all users of a weight the shared values, and their biases the mean of the error."""
    shape = tuple(weight.tensor.shape.numpy())
    array = weight.matrix.restore(shared.matrix, shape).astype(weight.tensor.numpy().dtype)
    value = weight.value
    if shared.shift is not None:
        for bias in weight.biases():
            bias.shift(-shared.shift, names)
    if value.is_initializer():
        value.const_value = ir.tensor(array, name=value.name)
        return
    home = value.producer()
    assert home is not None
    assert isinstance(home.graph, ir.Graph)
    fresh = add_initializer(home.graph, names, value.name or "weight", array)
    value.replace_all_uses_with(fresh)


def _told(weight: _Weight, shared: Shared) -> str:
    values = max(len(np.unique(b)) for b in shared.solution.books)
    bits = shared.solution.bits / weight.tensor.size
    return f"{values} values, {bits:.2f} bits of entropy a weight, error {shared.relative:.2g}"
