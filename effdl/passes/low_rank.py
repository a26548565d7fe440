"""The pass ``low_rank``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field, model_validator

from effdl.graph.io import METADATA_PREFIX
from effdl.graph.shapes import Shapes, infer
from effdl.graph.walk import all_nodes, is_op, producer
from effdl.graph.weights import Names, add_initializer, constant_tensor, shared
from effdl.passes._low_rank_layer import (
    HIDDEN,
    WEIGHT,
    Part,
    Split,
    refusal,
    splits,
    weight_index,
)
from effdl.passes.base import Context, NodePass
from effdl.runtime.target import Target
from effdl.solve.factorize import Svd, leading_svd, rank_for_ratio, round_rank

MARK = METADATA_PREFIX + "low_rank"
_DEFAULT_ENERGY = 0.9


@dataclass(frozen=True)
class _Plan:
    """A split at a rank."""

    split: Split
    svd: Svd
    rank: int

    @property
    def macs(self) -> int:
        return self.split.per_rank * self.rank

    @property
    def error(self) -> float:
        return self.svd.error(self.rank)


class LowRank(NodePass):
    """Replace a layer by two thinner ones, from the truncated SVD of its weight.

    What it does: a MatMul or Gemm with a constant matrix becomes two; a Conv becomes a thin Conv
    with its kernel and a 1x1 Conv behind or before it, whichever costs less. The rank is the
    smallest that keeps the share ``energy`` of the squared singular values (0.9 unless said
    otherwise), or what fits into ``ratio`` of the layer's MACs. Only layers that save at least
    ``min_saving`` of their MACs are replaced. A replaced layer is marked and never split again.

    When it helps: large matrices with redundant columns, such as the fully connected layers and wide
    3x3 convolutions of over-parameterised networks.

    When it does not: most layers of compact networks have no slack: depthwise and narrow layers are
    declined. Two kernels instead of one cost time that the MACs do not show, so savings of 10 % may
    not be faster. It looks at the weights alone: the error of the outputs can be larger or smaller
    than that of the weights.

    Example:
        passes: [{low_rank: {energy: 0.95, ignore: ["*head*"]}}]
    """

    lossy: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"latency", "size"})
    not_after: ClassVar[Mapping[str, str]] = {
        "quantize_*": "it works on floating-point weights, which are integers after quantization"
    }

    energy: float | None = Field(None, gt=0, le=1)
    """Share of the squared singular values that stays; 0.9 when neither this nor ratio is given."""
    ratio: float | None = Field(None, gt=0, lt=1)
    """MACs of every layer relative to before, but for the rounding of ranks; instead of energy."""
    min_rank: int = Field(1, ge=1)
    """Never a rank below this."""
    multiple_of: int | None = Field(None, ge=1)
    """Ranks are multiples of this; none: what the target's vectors hold, 16 or 8."""
    min_saving: float = Field(0.1, ge=0, lt=1)
    """Leave a layer alone that would save less than this share of its MACs."""

    @model_validator(mode="after")
    def _one_goal(self) -> LowRank:
        if self.energy is not None and self.ratio is not None:
            raise ValueError("energy and ratio exclude each other")
        if self.ratio is not None and self.ratio > 1 - self.min_saving:
            raise ValueError(f"ratio {self.ratio} saves less than min_saving {self.min_saving}")
        return self

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of layers replaced."""
        layers = list(self._layers(model, ctx))
        if not layers:
            return 0
        names, shapes = Names(model), infer(model)
        done: list[tuple[_Plan, int]] = []
        for node, tensor in layers:
            plan = self._plan(node, tensor, shapes, ctx)
            if plan is not None:
                ctx.touch(node, _what(plan))
                done.append((plan, tensor.size))
                _replace(node, plan, tensor, names)
        if done:
            model.ir_version = max(model.ir_version, 4)  # below, weights must be graph inputs too
            ctx.note("layers", len(done))
            before, after = sum(p.split.macs for p, _ in done), sum(p.macs for p, _ in done)
            ctx.note("macs_saved", before - after)  # dynamic dimensions count as 1
            ctx.note("macs_of_layers", f"{before:,} -> {after:,}")
            ctx.note("params_saved", sum(n - p.rank * sum(p.split.matrix.shape) for p, n in done))
            ctx.note("largest_weight_error", round(max(p.error for p, _ in done), 4))
        return len(done)

    def _layers(self, model: ir.Model, ctx: Context) -> Iterator[tuple[ir.Node, ir.TensorProtocol]]:
        """Yield the nodes that can be split, with their weights; log the candidates that cannot."""
        in_functions = {n for f in model.functions.values() for n in f}
        for node in all_nodes(model):
            if is_op(node, "Attention", domain="com.microsoft"):
                ctx.skip(
                    node, "packed attention stays whole: fuse_attention {form: mha} can be split"
                )
            if not is_op(node, "MatMul", "Gemm", "Conv") or not self.selected(node):
                continue
            tensor, reason = _weight(node, node in in_functions)
            if tensor is not None:
                yield node, tensor
            elif reason:
                ctx.skip(node, reason)

    def _plan(
        self, node: ir.Node, tensor: ir.TensorProtocol, shapes: Shapes, ctx: Context
    ) -> _Plan | None:
        """Return the cheapest plan (by energy) or the most exact one (by ratio) that saves enough."""
        weight = tensor.numpy().astype(np.float64)
        if not np.isfinite(weight).all():
            ctx.skip(node, "its weight has infinities or NaN")
            return None
        multiple = self.multiple_of or _vector_width(ctx.target)
        plans: list[_Plan] = []
        reasons: list[str] = []
        for split in splits(node, weight, shapes):
            cap = min(split.side, rank_for_ratio(split.macs, split.per_rank, 1 - self.min_saving))
            found = self._at(split, cap, multiple, ctx.seed)
            if isinstance(found, str):
                reasons.append(found)
            else:
                plans.append(found)
        if not plans:
            ctx.skip(node, reasons[0])
            return None
        return min(plans, key=lambda p: p.macs if self.ratio is None else p.error)

    def _at(self, split: Split, cap: int, multiple: int, seed: int) -> _Plan | str:
        """Return the plan for one split, or why there is none; ranks above ``cap`` save too little."""
        least = f"saving {self.min_saving:.0%} of {split.macs:,} MACs allows rank {cap}"
        if self.ratio is not None:
            fits = rank_for_ratio(split.macs, split.per_rank, self.ratio)
            rank = round_rank(fits, multiple, up=False)
            if rank > cap:
                rank -= multiple
            if rank:
                rank = max(rank, self.min_rank)
            if not 0 < rank <= cap:
                return (
                    f"{self.ratio:.0%} of {split.macs:,} MACs allow rank {fits} of {split.side}, "
                    f"the least is {max(multiple, self.min_rank)}"
                )
            return _Plan(split, leading_svd(split.matrix, rank, seed=seed), rank)
        energy = _DEFAULT_ENERGY if self.energy is None else self.energy
        floor = round_rank(self.min_rank, multiple, up=True)
        if cap < floor:
            return f"{least} of {split.side}, below {floor}"
        svd = leading_svd(split.matrix, cap, energy=energy, seed=seed)
        needed = svd.rank_for_energy(energy)
        if needed is None:
            return f"{energy:.1%} of the energy needs more; {least} of {split.side}"
        rank = max(round_rank(needed, multiple, up=True), floor)
        if rank > cap:
            return f"{energy:.1%} of the energy needs rank {rank}; {least} of {split.side}"
        if rank > svd.rank:
            svd = leading_svd(split.matrix, rank, seed=seed)
        return _Plan(split, svd, rank)


def _weight(node: ir.Node, in_function: bool) -> tuple[ir.TensorProtocol | None, str]:
    """Return the constant weight of a node that can be split, or why not ('' for no candidate)."""
    if MARK in node.metadata_props:
        return None, "is a low-rank factor already"
    value = node.inputs[weight_index(node)]
    tensor = constant_tensor(value)
    if value is None or tensor is None:
        source = producer(value, "DequantizeLinear")
        if source is not None and constant_tensor(source.inputs[0]) is not None:
            return None, "its weight is quantized"
        return None, "" if is_op(node, "MatMul") else "its weight is computed or fed, not constant"
    reason = refusal(node, tensor)
    if not reason and shared(value):
        reason = f"its weight '{value.name}' has other users"
    if not reason and in_function:
        reason = "inside a function, which holds no weights of its own: inline it first"
    return (None, reason) if reason else (tensor, "")


def _vector_width(target: Target) -> int:
    """Return the channel block of the target's convolution kernels, a multiple of its vectors."""
    return 16 if "avx512f" in target.isa and not target.on_gpu else 8


def _what(plan: _Plan) -> str:
    return (
        f"rank {plan.rank} of {plan.split.side} ({plan.split.how}): "
        f"{plan.macs / plan.split.macs:.1%} of {plan.split.macs:,} MACs, "
        f"weight error {plan.error:.2%}"
    )


def _replace(node: ir.Node, plan: _Plan, tensor: ir.TensorProtocol, names: Names) -> None:
    """Put the two parts where ``node`` was; its output keeps name, type and shape."""
    graph, old = node.graph, node.inputs[weight_index(node)]
    if graph is None or isinstance(graph, ir.Function) or old is None:
        raise ValueError(f"{node.name}: no node of a graph")
    dtype = tensor.numpy().dtype
    arrays = plan.split.weights(*plan.svd.factors(plan.rank))
    first, second = (
        add_initializer(graph, names, f"{old.name}/lr_{k}", np.ascontiguousarray(a).astype(dtype))
        for k, a in zip("ab", arrays, strict=True)
    )
    base = node.name or node.op_type
    dims = list(plan.split.hidden or ())
    if dims:
        dims[plan.split.axis] = plan.rank
    hidden = ir.Value(
        name=names.fresh(f"{base}/lr_a_output"),
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(dims) if dims else None,
    )
    result = ir.Value()
    a = _node(plan.split.first, names.fresh(f"{base}/lr_a"), node, None, first, hidden)
    b = _node(plan.split.second, names.fresh(f"{base}/lr_b"), node, hidden, second, result)
    a.metadata_props[MARK] = b.metadata_props[MARK] = str(plan.rank)
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [a, b], [node.outputs[0]], [result]
    )


def _node(
    part: Part, name: str, old: ir.Node, hidden: ir.Value | None, weight: ir.Value, out: ir.Value
) -> ir.Node:
    places = {HIDDEN: hidden, WEIGHT: weight}
    return ir.Node(
        old.domain,
        part.op_type,
        [places[i] if isinstance(i, str) else i for i in part.inputs],
        part.attributes,
        outputs=[out],
        name=name,
        metadata_props=dict(old.metadata_props),
    )
