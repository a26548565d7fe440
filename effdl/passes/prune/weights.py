"""The pass ``prune_weights``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field, field_validator, model_validator

from effdl.graph.walk import all_nodes, is_op, producer
from effdl.graph.weights import Names, add_initializer, constant_tensor
from effdl.passes.base import Context, NodePass
from effdl.passes.prune._layout import Layout, layout_of, quantized_weight, weight_inputs
from effdl.solve import sparsity as solve

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
_ADVICE = (
    "ONNX Runtime computes zeros at dense speed: latency stays, only the compressed (zstd) file "
    "gets smaller"
)


@dataclass
class _Weight:
    """A constant and the selected nodes that compute with it."""

    value: ir.Value
    tensor: ir.TensorProtocol
    layout: Layout
    users: list[ir.Node] = field(default_factory=list)


class PruneWeights(NodePass):
    """Set the weights of smallest magnitude to zero.

    What it does: zeroes constant weights of Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU and RNN
    (biases never; embedding tables of Gather only when ``targets`` names them) until the share
    ``sparsity`` of them is zero. ``pattern`` chooses single weights, n of every m consecutive input
    channels, or whole blocks of outputs x inputs. Weights that are zero already count. A weight
    with several users is pruned once for all of them.

    When it helps: the compressed (zstd) file gets smaller, and runtimes with sparse kernels (2:4 on
    NVIDIA tensor cores through TensorRT) can use the pattern.

    When it does not: ONNX Runtime computes zeros at dense speed, so latency and the uncompressed
    file stay as they are. Accuracy falls with the sparsity: half of the weights often costs little,
    0.8 without retraining usually a lot.

    Example:
        passes: [{prune_weights: {sparsity: 0.6, scope: global, ignore: ["*head*"]}}]
    """

    lossy: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"size"})
    not_after: ClassVar[Mapping[str, str]] = {
        "quantize_*": "it works on floating-point weights, which are integers after quantization"
    }

    sparsity: float = Field(0.5, ge=0, lt=1)
    """Share of zeros to reach; unused by the pattern n:m, where n_m says it."""
    scope: Literal["layer", "global"] = "layer"
    """Reach the sparsity in every weight alone, or over all of them with one common threshold."""
    pattern: Literal["unstructured", "n:m", "block"] = "unstructured"
    """What is zeroed together: single weights, m - n of m consecutive input channels, or blocks."""
    n_m: str = "2:4"
    """For the pattern n:m: keep the n largest of every m consecutive input channels."""
    block: tuple[int, int] = (4, 1)
    """For the pattern block: outputs and inputs of one block (kernel positions count as inputs)."""
    norm: Literal["l1", "l2"] = "l1"
    """For the pattern block: mean magnitude or root mean square of a block decides."""
    min_size: int = Field(1024, ge=0)
    """Leave weights with fewer elements than this alone."""

    @field_validator("n_m", mode="before")
    @classmethod
    def _unquoted(cls, value: object) -> object:
        # YAML 1.1 reads an unquoted 2:4 as a number of base 60.
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return f"{value // 60}:{value % 60}"
        return value

    @field_validator("n_m")
    @classmethod
    def _n_of_m(cls, value: str) -> str:
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", value)
        if not match or not 1 <= int(match[1]) < int(match[2]):
            raise ValueError('must be "N:M" with 1 <= N < M, such as "2:4"')
        return value

    @field_validator("block")
    @classmethod
    def _positive(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 1 or value == (1, 1):
            raise ValueError("must be two positive numbers, not both 1, such as [4, 1]")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> PruneWeights:
        if self.pattern != "n:m" and self.n_m != "2:4":
            raise ValueError('n_m needs pattern: "n:m"')
        if self.pattern != "block" and (self.block != (4, 1) or self.norm != "l1"):
            raise ValueError("block and norm need pattern: block")
        if self.pattern == "n:m" and (self.scope != "layer" or self.sparsity != 0.5):
            raise ValueError('with pattern "n:m" the sparsity follows from n_m in every group')
        return self

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of weights that lost values."""
        weights = self._weights(model, ctx)
        names = Names(model)
        changes = zeroed = zeros = total = 0
        for weight, keep in zip(weights, self._masks(weights), strict=True):
            array = weight.tensor.numpy()
            before = array.size - int(np.count_nonzero(array))
            after = array.size - int(np.count_nonzero(array[keep]))
            total, zeros = total + array.size, zeros + after
            if after == before:
                ctx.skip(
                    weight.users[0], f"already has the zeros asked for ({_share(array, before)})"
                )
                continue
            _replace(weight, np.where(keep, array, np.zeros((), array.dtype)), names)
            for node in weight.users:
                ctx.touch(node, f"sparsity {_share(array, before)} -> {_share(array, after)}")
            zeroed += after - before
            changes += 1
        if changes:
            if any(not w.value.is_initializer() for w in weights):
                model.ir_version = max(model.ir_version, 4)  # below, weights must be inputs too
            ctx.note("sparsity", round(zeros / total, 4))
            ctx.note("weights_zeroed", zeroed)
            ctx.note("pattern", self.n_m if self.pattern == "n:m" else self.pattern)
            ctx.note("speed", _ADVICE)
        return changes

    def _masks(self, weights: list[_Weight]) -> Iterator[solve.Mask]:
        """Yield per weight which of its elements stay, in the shape of the weight."""
        if self.pattern == "n:m":
            n, m = map(int, self.n_m.split(":"))
            for w in weights:
                viewed = w.layout.view(w.tensor.numpy())
                yield _shaped(w.layout.restore(solve.n_m_mask(viewed, n, m)), w)
            return
        every = solve.Cut(0, 0)
        if self.scope == "global":
            count = sum(self._scores(w).size for w in weights)
            every = solve.find_cut(lambda: map(self._scores, weights), round(self.sparsity * count))
        for w in weights:
            scores = self._scores(w)
            if self.scope == "global":
                keep, every = solve.keep_above(scores, every)
            else:
                count = round(self.sparsity * scores.size)
                keep, _ = solve.keep_above(scores, solve.find_cut(partial(_once, scores), count))
            yield self._elements(keep, w)

    def _scores(self, weight: _Weight) -> solve.Scores:
        array = weight.tensor.numpy()
        if self.pattern == "unstructured":
            return solve.magnitudes(array)
        viewed = weight.layout.view(array)
        return solve.block_scores(viewed.reshape(len(viewed), -1), self.block, self.norm)

    def _elements(self, keep: solve.Mask, weight: _Weight) -> solve.Mask:
        """Return the mask of elements for the mask of scores ``keep``."""
        if self.pattern == "unstructured":
            return keep
        layout = weight.layout
        shape = (layout.outputs, weight.tensor.size // layout.outputs)
        return _shaped(layout.restore(solve.spread_blocks(keep, self.block, shape)), weight)

    def _weights(self, model: ir.Model, ctx: Context) -> list[_Weight]:
        """Return the weights to prune, in graph order, and log the candidates that are none."""
        outside = {n for f in model.functions.values() for n in f}
        found: dict[ir.Value, _Weight] = {}
        refused: set[ir.Value] = set()
        for node in all_nodes(model):
            if not self.selected(node):
                continue
            if (packed := quantized_weight(node)) is not None:
                ctx.skip(node, f"its weight '{packed.name}' is quantized")
            for index in weight_inputs(node):
                value = node.inputs[index] if index < len(node.inputs) else None
                if value is None or value in refused:
                    continue
                if value in found:
                    self._join(found, refused, node, value, index, ctx)
                    continue
                weight, reason = self._weight(node, index, value)
                if weight is not None and value.producer() in outside:
                    reason = "its weight is inside a function: inline the function first"
                if reason:
                    refused.add(value)
                    ctx.skip(node, reason)
                elif weight is not None:
                    found[value] = weight
        return [w for w in found.values() if self._all_users(w, ctx)]

    def _weight(self, node: ir.Node, index: int, value: ir.Value) -> tuple[_Weight | None, str]:
        """Return the weight at input ``index``, or why it cannot be pruned ('' for no candidate)."""
        embedding = is_op(node, "Gather")
        if embedding and not self.targets:
            return None, ""
        tensor = constant_tensor(value)
        if tensor is None:
            return None, _not_constant(node, value)
        if tensor.dtype not in _FLOATS:
            quantized = f"its weight '{value.name}' is of type {tensor.dtype.name}, not a float"
            return None, "" if embedding else quantized
        layout = layout_of(node, index, tuple(tensor.shape.numpy()))
        if layout is None or not tensor.size:
            return None, f"its weight '{value.name}' has the unexpected shape {tensor.shape}"
        if tensor.size < self.min_size:
            return None, f"{tensor.size} weights, below min_size {self.min_size}"
        if self.pattern == "n:m" and layout.summed < int(self.n_m.split(":")[1]):
            return (
                None,
                f"{layout.summed} input channels per output, fewer than a group of {self.n_m}",
            )
        return _Weight(value, tensor, layout, [node]), ""

    def _join(
        self,
        found: dict[ir.Value, _Weight],
        refused: set[ir.Value],
        node: ir.Node,
        value: ir.Value,
        index: int,
        ctx: Context,
    ) -> None:
        """Add ``node`` to the users of a weight that was found before, if it reads it alike."""
        weight = found[value]
        layout = layout_of(node, index, tuple(weight.tensor.shape.numpy()))
        if self.pattern == "unstructured" or layout == weight.layout:
            weight.users.append(node)
            return
        ctx.skip(node, f"reads the shared weight '{value.name}' along another axis")
        refused.add(value)
        del found[value]

    def _all_users(self, weight: _Weight, ctx: Context) -> bool:
        others = [u.node for u in weight.value.uses() if u.node not in weight.users]
        if not others and not weight.value.is_graph_output():
            return True
        who = f"by '{others[0].name or others[0].op_type}'" if others else "as a graph output"
        for node in weight.users:
            ctx.skip(node, f"its weight '{weight.value.name}' is also used {who}, not pruned here")
        return False


def _once(scores: solve.Scores) -> list[solve.Scores]:
    return [scores]


def _not_constant(node: ir.Node, value: ir.Value) -> str:
    """Return why a computed weight is left alone, '' where a computed operand is normal."""
    dequantize = producer(value, "DequantizeLinear")
    if dequantize and constant_tensor(dequantize.inputs[0]) is not None:
        return f"its weight '{value.name}' is quantized"
    if is_op(node, "MatMul", "Gather"):
        return ""
    return f"its weight '{value.name}' is computed or fed, not constant"


def _replace(weight: _Weight, array: npt.NDArray[np.generic], names: Names) -> None:
    """Give all users of a weight the new array."""
    value = weight.value
    if value.is_initializer():
        value.const_value = ir.tensor(array, name=value.name)
        return
    constant = value.producer()
    if constant is None or not isinstance(constant.graph, ir.Graph):
        raise ValueError(f"'{value.name}' is neither an initializer nor a Constant node")
    fresh = add_initializer(constant.graph, names, value.name or "weight", array)
    value.replace_all_uses_with(fresh)


def _shaped(mask: solve.Mask, weight: _Weight) -> solve.Mask:
    return mask.reshape(tuple(weight.tensor.shape.numpy()))


def _share(array: npt.NDArray[np.generic], zeros: int) -> str:
    return f"{zeros / array.size:.1%}"
