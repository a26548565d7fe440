"""The pass ``quantize_weights``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field

from effdl.graph.shapes import infer
from effdl.graph.walk import float_attr, int_attr, is_op
from effdl.graph.weights import Names, constant_tensor, shared
from effdl.observe.layers import rows_of
from effdl.observe.moments import Moments, moments
from effdl.passes.base import Context, NodePass
from effdl.passes.quantize._nbits import BlockWriter
from effdl.passes.quantize._scaling import divide, norm_before
from effdl.passes.quantize._select import choose_nodes
from effdl.passes.quantize._weights import with_weight
from effdl.solve.blocks import (
    Float,
    Grid,
    Integers,
    awq_factors,
    block_grid,
    descend,
    gptq,
    hqq,
    output_error,
)

_PRODUCTS = ("MatMul", "Gemm")
Method = Literal["auto", "rtn", "hqq", "awq", "gptq"]


class QuantizeWeights(NodePass):
    """Store weights in 4 or 8 bits, in blocks with a scale each; activations stay float.

    What it does: writes MatMul and Gemm with constant weights as MatMulNBits, embedding tables as
    GatherBlockQuantized, and the weights of Conv as int8 that ONNX Runtime unfolds when it loads the
    model. How weights are rounded decides the accuracy: with calibration data by GPTQ, which lets the
    weights still to come make up for the error of those before, and coordinate descent after it; without
    data by HQQ, which lets a few outliers go. AWQ makes the weights of large inputs finer instead, where a
    norm before the layers takes the inverse factors.

    When it helps: for the file and the memory, an eighth to a quarter of them; for the speed of large
    language models, whose products wait for their weights.

    When it does not: for the speed of small models and convolutions, which compute in float as before;
    on runtimes other than ONNX Runtime, whose operators these are.

    Example:
        passes: [simplify, {quantize_weights: {bits: 4, block_size: 32}}]
    """

    lossy: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"size"})

    bits: Literal[4, 8] = 4
    """Bits of a weight of MatMul, Gemm and Gather; Conv has 8."""
    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Weights along the inputs that share a scale: fewer are more accurate, more are smaller."""
    method: Method = "auto"
    """How weights are rounded; awq and gptq need data, auto is gptq with data and hqq without."""
    symmetric: bool = False
    """Whether the middle integer means zero everywhere, which saves the zero points."""
    accuracy_level: Literal[0, 1, 4] = 4
    """How MatMulNBits computes: 4 rounds activations to 8 bits (fast on CPUs), 0 and 1 stay in float32."""
    op_types: tuple[str, ...] = ("MatMul", "Gemm", "Gather", "Conv")
    """Op types whose weights become integers."""
    min_size: int = Field(default=4096, ge=1)
    """Weights with fewer elements stay float."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of nodes whose weights became integers."""
        chosen = self._choose(model, ctx)
        if not chosen:
            return 0
        writer = BlockWriter(model, self.accuracy_level)
        errors: dict[ir.Node, float] = {}
        for node, q, grid, error in self._rounded(model, chosen, ctx):
            write = writer.embedding if is_op(node, "Gather") else writer.product
            write(node, q, grid)
            ctx.touch(node, f"{node.op_type} in {grid.bits} bits" + _told(error))
            if error is not None:
                errors[node] = error
        for node in (n for n in chosen if is_op(n, "Conv")):
            writer.convolution(node)
            ctx.touch(node, "Conv stored as int8")
        counts = Counter(n.op_type for n in chosen)
        ctx.note("quantized", ", ".join(f"{k} {n}" for k, n in sorted(counts.items())))
        ctx.note("method", self._method(ctx))
        if errors:
            ctx.note("mean_layer_error", float(np.mean(list(errors.values()))))
        return len(chosen)

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Names of the nodes whose weights would become integers."""
        return [n.name or n.op_type for n in self._choose(model, ctx)]

    def _method(self, ctx: Context) -> Method:
        """Return how weights with known inputs are rounded."""
        if self.method == "auto":
            return "gptq" if ctx.feeds is not None and len(ctx.feeds) else "hqq"
        return self.method

    def _rounded(
        self, model: ir.Model, chosen: list[ir.Node], ctx: Context
    ) -> Iterator[tuple[ir.Node, Integers, Grid, float | None]]:
        """Yield integers [outputs, inputs] and grid of every product and table.

        With data, first those whose inputs were seen: the model must stay as it is until then.
        """
        done: dict[ir.Node, tuple[Integers, Grid, float | None]] = {}
        scaled: dict[ir.Node, npt.NDArray[np.float32]] = {}
        if self._method(ctx) in ("awq", "gptq"):
            by_input: dict[str, list[ir.Node]] = {}
            for node in chosen:
                x = node.inputs[0]
                if is_op(node, *_PRODUCTS) and node.graph is model.graph and x is not None:
                    by_input.setdefault(x.name or "", []).append(node)
            layers = {name: r for name, nodes in by_input.items() if (r := rows_of(nodes[0]))}
            assert ctx.feeds is not None
            for name, seen in moments(
                model, layers, ctx.feeds, threads=ctx.target.threads, max_bytes=ctx.max_bytes
            ):
                nodes = by_input[name]
                factors = None
                alone = all(not shared(n.inputs[1]) for n in nodes if n.inputs[1] is not None)
                awq = self.method == "awq" and alone  # another reader's input has other factors
                norm = norm_before(_read(nodes[0]), nodes) if awq else None
                if norm is not None:
                    factors = scaled[norm] = self._factors(nodes, seen)
                done |= {node: self._round(node, seen, factors) for node in nodes}
        names = Names(model)
        for norm, factors in scaled.items():
            divide(norm, factors, names)
        for node in chosen:
            if not is_op(node, "Conv"):
                yield node, *(done[node] if node in done else self._round(node, None, None))

    def _factors(self, nodes: list[ir.Node], seen: Moments) -> npt.NDArray[np.float32]:
        weights = [with_weight(_weight(n), partial(_oriented, n)) for n in nodes]
        return awq_factors(
            np.concatenate(weights),
            seen.second[0],
            seen.magnitude[0],
            self.block_size,
            self.bits,
            symmetric=self.symmetric,
        )

    def _round(
        self, node: ir.Node, seen: Moments | None, factors: npt.NDArray[np.float32] | None
    ) -> tuple[Integers, Grid, float | None]:
        """Return integers, grid and error of one weight, times the factors of its inputs."""

        def work(array: Float) -> tuple[Integers, Grid, float | None]:
            weight = _oriented(node, array)
            if factors is not None:
                weight = weight * factors
            grid = self._grid(weight, seen)
            q = grid.nearest(weight)
            if seen is None:
                return q, grid, None
            second = seen.second[0]
            if factors is not None:
                second = second / np.outer(factors, factors)
            if self.method in ("auto", "gptq"):
                q = descend(weight, gptq(weight, second, grid), second, grid)
            return q, grid, output_error(weight, grid.weights(q), second)

        return with_weight(_weight(node), work)

    def _grid(self, weight: Float, seen: Moments | None) -> Grid:
        if seen is None and self.method != "rtn" and not self.symmetric:
            return hqq(weight, self.block_size, self.bits)
        data = seen is not None and self.method != "awq"  # whose factors say what counts
        importance = (
            np.diag(seen.second[0]).astype(np.float32) if seen is not None and data else None
        )
        return block_grid(
            weight, self.block_size, self.bits, symmetric=self.symmetric, importance=importance
        )

    def _choose(self, model: ir.Model, ctx: Context) -> list[ir.Node]:
        shapes = infer(model)

        def refusal(node: ir.Node) -> str | None:
            reason = self._refusal(node)
            if reason == "" and is_op(node, *_PRODUCTS):
                vector = len(shapes.of(node.inputs[0]) or ()) == 1
                return "its input is a vector" if vector else ""
            return reason

        return choose_nodes(model, refusal, ctx)

    def _refusal(self, node: ir.Node) -> str | None:
        """Return why a weight stays float, an empty string when it does not, None for other ops."""
        if not is_op(node, *_PRODUCTS, "Gather", "Conv"):
            return None
        table = is_op(node, "Gather")
        weight = constant_tensor(node.inputs[0 if table else 1])
        if weight is None:
            return None if table else "its weight is computed (try simplify) or an activation"
        if weight.dtype != ir.DataType.FLOAT:
            return None if table else f"its weight is {weight.dtype.name.lower()}"
        if node.op_type not in self.op_types or not self.selected(node):
            return "left out by the options"
        if weight.size < self.min_size:
            return f"its weight has {weight.size} elements, less than min_size"
        if is_op(node, "Conv"):
            return ""
        if len(weight.shape) != 2:
            return f"its weight has {len(weight.shape)} dimensions"
        if table:
            return self._table(node, int(weight.shape.numpy()[1]))
        return _product(node)

    def _table(self, node: ir.Node, columns: int) -> str:
        if int_attr(node, "axis", 0) != 0:
            return "it gathers columns"
        if columns % self.block_size:
            return f"its {columns} columns are not blocks of {self.block_size}"
        return ""


def _read(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _weight(node: ir.Node) -> ir.TensorProtocol:
    tensor = constant_tensor(node.inputs[0 if is_op(node, "Gather") else 1])
    assert tensor is not None
    return tensor


def _oriented(node: ir.Node, array: Float) -> Float:
    """Return a weight as [outputs, inputs] with the factor of a Gemm in it."""
    if is_op(node, "Gather"):
        return array
    weight = array if int_attr(node, "transB", 0) else array.T
    alpha = float_attr(node, "alpha", 1.0)
    return weight if alpha == 1.0 else weight * np.float32(alpha)


def _product(node: ir.Node) -> str:
    if is_op(node, "MatMul"):
        return ""
    if int_attr(node, "transA", 0):
        return "its input is transposed"
    bias = constant_tensor(node.inputs[2]) if len(node.inputs) > 2 else None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        weight = constant_tensor(node.inputs[1])
        assert weight is not None
        outputs = weight.shape.numpy()[0 if int_attr(node, "transB", 0) else 1]
        if bias is None or bias.size != outputs:
            return "its bias is computed or does not fit one number per output"
    return ""


def _told(error: float | None) -> str:
    return "" if error is None else f", error {error:.2g} of its output's square"
