"""The pass ``convert_float16``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import onnx_ir as ir
from pydantic import Field

from effdl.graph.shapes import infer
from effdl.graph.walk import opset
from effdl.passes.base import Context, NodePass, matches
from effdl.passes.convert._float16_plan import Plan, is_default, make_plan
from effdl.passes.convert._float16_range import LARGEST
from effdl.passes.convert._float16_rewrite import Counts, Rewriter
from effdl.passes.convert._float16_slots import FLOAT

BLOCK = (
    # running sums and products leave the range, or lose the small terms
    *("Range", "CumSum", "CumProd", "ReduceProd", "ReduceSumSquare", "ReduceL2", "ReduceLogSum"),
    *("ReduceLogSumExp", "LpNormalization", "LpPool", "GlobalLpPool", "LRN", "Det"),
    "MeanVarianceNormalization",
    # coordinates: float16 has 11 bits, less than a pixel above 2048
    *("GridSample", "AffineGrid", "RoiAlign", "MaxRoiPool"),
    # other numbers would be drawn
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    *("Bernoulli", "Multinomial", "EyeLike"),
    # spectra have a large dynamic range, and there are no kernels
    *("DFT", "STFT", "MelWeightMatrix"),
    # their scales belong to float32 kernels
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
)


class ConvertFloat16(NodePass):
    """Compute and store in float16 instead of float32.

    What it does: turns float32 weights and activations of the main graph into float16, node by node
    where the operator's schema takes float16, with one Cast per value at the border to what stays
    float32. Nodes stay float32, each with its reason, when they are on the block list, when a
    constant of theirs does not fit into float16 or would become 0, when they compute sizes or stand
    beside quantized nodes, when they average squares (a norm that is written out: run
    fuse_layernorm before), when their activations on the calibration data exceed the range, and when
    they are control flow, with everything inside. Attention masks such as -3.4e38 become
    -max_finite. Graph inputs and outputs stay float32 unless keep_io_types is false, which changes
    the model's interface.

    When it helps: half the file and half the memory; on CUDA, where tensor cores compute in float16.

    When it does not: on x86 CPUs, where ONNX Runtime has hardly any float16 kernels: it puts Casts
    around each node and the model gets slower. Without calibration data it cannot see activations
    that overflow: compare the outputs.

    Example:
        passes: [fuse_layernorm, {convert_float16: {ignore: ["head*"]}}]
    """

    lossy: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"latency", "size"})
    min_opset: ClassVar[int] = 7
    not_after: ClassVar[Mapping[str, str]] = {
        "quantize_*": "nodes beside quantized ones stay float32, so there is hardly anything left to convert"
    }

    keep_io_types: bool = True
    """Graph inputs and outputs stay float32; false makes them float16, which changes the interface."""
    block: tuple[str, ...] = BLOCK
    """Nodes that stay float32: globs of node names, op types, or re:REGEX. Replaces the default list."""
    max_finite: float = Field(default=LARGEST, gt=0, le=LARGEST)
    """What a mask or bound beyond the range of float16 becomes, with its sign."""
    headroom: float = Field(default=2.0, ge=1)
    """On calibration data, nodes stay float32 whose activations exceed 65504 / headroom."""

    def changes_interface(self) -> bool:
        """Inputs and outputs become float16 unless ``keep_io_types``."""
        return not self.keep_io_types

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of nodes that became float16."""
        if opset(model) < self.min_opset:
            return 0
        replaceable, weights = _replaceable(model)
        if replaceable * 2 > weights:
            reason = f"{replaceable} of {weights} weights are also graph inputs, which stay float32"
            ctx.skip(model.graph.name or "graph", f"{reason}: run simplify before")
            return 0
        shapes = infer(model)
        plan = make_plan(
            model,
            shapes,
            self._excluded,
            keep_io_types=self.keep_io_types,
            limit=LARGEST / self.headroom,
            feeds=ctx.feeds,
        )
        for node, reason in plan.kept.items():
            if reason:
                ctx.skip(node, reason)
        if not plan.half:
            return 0
        counts = Rewriter(model, shapes, plan, self.keep_io_types, self.max_finite).run()
        for node in plan.half:
            ctx.touch(node, "float32 -> float16")
        self._note(plan, counts, ctx)
        return len(plan.half)

    def _excluded(self, node: ir.Node) -> str | None:
        if not self.selected(node):
            return ""
        if any(matches(p, node) for p in self.block):
            return "it is on the block list"
        return None

    def _note(self, plan: Plan, counts: Counts, ctx: Context) -> None:
        ctx.note("float16_nodes", len(plan.half))
        ctx.note("float32_nodes", sum(bool(r) for r in plan.kept.values()))
        ctx.note("casts_added", counts.casts)
        if counts.weights:
            ctx.note("weights_rounded_to_zero", counts.vanished / counts.weights)
        if counts.clamped:
            ctx.note("constants_moved_into_range", counts.clamped)
        checked = ctx.feeds is not None and len(ctx.feeds) > 0
        ctx.note("activations", "checked" if checked else "not checked: no calibration data")
        if ctx.target.arch == "x86_64" and not ctx.target.on_gpu:
            ctx.note(
                "warning", "ONNX Runtime computes float16 more slowly than float32 on x86 CPUs"
            )


def _replaceable(model: ir.Model) -> tuple[int, int]:
    """Count the float32 weights that are also graph inputs, and all float32 weights."""
    weights = [v for v in model.graph.initializers.values() if v.dtype == FLOAT]
    return sum(is_default(v) for v in weights), len(weights)
