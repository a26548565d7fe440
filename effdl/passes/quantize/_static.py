"""Quantization with ranges from calibration data, as a class that passes share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field

from effdl.data.feeds import Feeds
from effdl.errors import DataError, ModelError
from effdl.graph.versions import convert_opset
from effdl.graph.walk import is_op, opset
from effdl.observe.moments import moments
from effdl.observe.ranges import collect
from effdl.observe.rows import Rows
from effdl.passes.base import Context, NodePass
from effdl.passes.quantize._format import Format, IntType, choose, decline
from effdl.passes.quantize._grids import feeds_silu, grids, quantized_values
from effdl.passes.quantize._qdq import QDQWriter
from effdl.passes.quantize._rows import rows_of
from effdl.passes.quantize._search import copy_with, search_ranges
from effdl.passes.quantize._select import (
    FOLLOWERS,
    WEIGHTED,
    Selection,
    is_half,
    is_quantized,
    select,
    without,
)
from effdl.solve.quantize import WeightMethod
from effdl.solve.ranges import Histogram, Method, select_range, silu, squared_error

_OPSET = 13
"""What QuantizeLinear with one scale per channel came with."""
_HELD = 5
"""Every fifth feed is held out, where ranges are searched."""
METHODS: tuple[Method, ...] = ("mse", "percentile", "minmax", "entropy")


class StaticQuantizer(NodePass):
    """The options and the work of ``quantize_static``; ``quantize_auto`` uses it as well."""

    lossy: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"latency", "size"})
    needs_data: ClassVar[bool] = True

    calibration_method: Method = "mse"
    """How a range is chosen: all values, a share of them, least divergence or least squared error."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """Percent of the values that the range keeps, for calibration_method percentile."""
    activation_type: IntType | None = None
    """Integer type of activations; the target's own by default."""
    weight_type: IntType = "int8"
    """Integer type of weights; they are symmetric in both."""
    symmetric_activations: bool = False
    """Whether activations have the middle of the type as zero point."""
    per_channel: bool = True
    """Whether weights have one scale per output channel, or one for the tensor."""
    reduce_range: bool | None = None
    """Whether to keep weights small enough for 16-bit sums; by default where the target needs it."""
    weight_method: WeightMethod = "absmax"
    """How a weight scale is chosen: largest weight, or least squared error."""
    bias_correction: bool = True
    """Whether biases take back what the rounding of the weights does to the mean of each output."""
    range_search: int = Field(default=8, ge=0)
    """Tensors whose range is tried by every method, judged by the whole 8-bit model on held-out data."""
    op_types: tuple[str, ...] = (*WEIGHTED, *FOLLOWERS)
    """Op types to quantize."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of nodes that became 8-bit."""
        form = self._format(ctx)
        chosen = self._select(model, ctx, form)
        if chosen is None:
            return 0
        if not chosen.nodes:
            _tell_skipped(chosen, ctx)
            return 0
        if ctx.feeds is None or not len(ctx.feeds):
            raise DataError(
                "quantize_static needs calibration data", hint="give data.calibration in the recipe"
            )
        old, functions = model.graph, dict(model.functions)
        if 0 < opset(model) < _OPSET:
            chosen = self._on_newer(model, ctx, form, chosen)
        changes = self._quantize(model, ctx, form, chosen)
        if not changes:  # a conversion for nothing is taken back
            model.graph = old
            model.functions.clear()
            model.functions.update(functions)
        return changes

    def _quantize(self, model: ir.Model, ctx: Context, form: Format, chosen: Selection) -> int:
        assert ctx.feeds is not None
        names = [v.name or "" for v in quantized_values(chosen)]
        feeds, held = ctx.feeds.split(_HELD) if self.range_search else (ctx.feeds, None)
        seen = self._histograms(model, names, feeds, ctx)
        if len(seen) < len(names):
            chosen = without(chosen, set(names) - set(seen), "a value is not finite on the data")
        _tell_skipped(chosen, ctx)
        if not chosen.nodes:
            return 0
        means = self._means(model, chosen, ctx) if self.bias_correction else {}
        ranges = self._ranges(chosen, seen, self.calibration_method)
        if held is not None and len(held):
            ranges = self._search(model, ctx, form, chosen, seen, means, ranges, held)
        self._write(model, ctx, form, chosen, ranges, means)
        return len(chosen.nodes)

    def _histograms(
        self, model: ir.Model, names: list[str], feeds: Feeds, ctx: Context
    ) -> dict[str, Histogram]:
        """Return what values tensors take; what an earlier try saw is not looked at again."""
        known = ctx.memo.setdefault(("histograms", len(feeds)), {})
        new = [n for n in names if n not in known]
        found = collect(model, new, feeds, threads=ctx.target.threads, max_bytes=ctx.max_bytes)
        known |= {n: found.get(n) for n in new}
        return {n: known[n] for n in names if known[n] is not None}

    def _ranges(
        self, chosen: Selection, seen: Mapping[str, Histogram], method: Method
    ) -> dict[str, tuple[float, float]]:
        """Return the range of every tensor by one method."""
        return {
            v.name or "": select_range(
                seen[v.name or ""],
                method,
                percentile=self.percentile,
                symmetric=self.symmetric_activations,
                through=silu if feeds_silu(v) else None,
            )
            for v in quantized_values(chosen)
        }

    def _search(
        self,
        model: ir.Model,
        ctx: Context,
        form: Format,
        chosen: Selection,
        seen: Mapping[str, Histogram],
        means: Mapping[ir.Node, npt.NDArray[np.float64]],
        ranges: dict[str, tuple[float, float]],
        held: Feeds,
    ) -> dict[str, tuple[float, float]]:
        """Try the other methods on the tensors that lose most, by the error of the whole model.

        A milder try of the same step takes over what the first one found.
        """
        key = ("ranges", type(self).__name__, self.model_dump_json(exclude={"ignore"}))
        if key in ctx.memo:
            changed = {n: r for n, r in ctx.memo[key].items() if n in ranges}
            ctx.note("ranges_changed", len(changed))
            return ranges | changed

        def quantize(trial: Mapping[str, tuple[float, float]]) -> ir.Model:
            copy, picked, known = copy_with(model, chosen, means)
            writer = QDQWriter(copy, form, self.per_channel, self.weight_method, known)
            writer.write(picked, grids(picked, trial, form))
            return copy

        others = [self._ranges(chosen, seen, m) for m in METHODS if m != self.calibration_method]
        lost = {name: _loss(seen[name], ends) for name, ends in ranges.items()}
        worst = sorted(lost, key=lambda name: -lost[name])[: self.range_search]
        tried = [
            (name, [r for r in dict.fromkeys(o[name] for o in others) if r != ranges[name]])
            for name in worst
        ]
        found = search_ranges(model, ranges, tried, quantize, held, ctx.target.threads)
        if found is None:
            return ranges
        ctx.memo[key] = {name: found.ranges[name] for name in found.changed}
        if found.changed:
            ctx.note("ranges_changed", len(found.changed))
            ctx.note("held_out_error", f"{found.before:.3g} -> {found.after:.3g}")
        return found.ranges

    def _means(
        self, model: ir.Model, chosen: Selection, ctx: Context
    ) -> dict[ir.Node, npt.NDArray[np.float64]]:
        """Return the mean of what each layer with a bias reads."""
        assert ctx.feeds is not None
        layers: dict[ir.Node, Rows] = {}
        known = ctx.memo.setdefault("means", {})
        for node in chosen.nodes:
            rows = rows_of(node) if is_op(node, *WEIGHTED) and len(node.inputs) > 2 else None
            if rows is not None:
                layers[node] = rows
        new = {node: rows for node, rows in layers.items() if _key(node) not in known}
        found = moments(
            model,
            new,
            ctx.feeds,
            second=False,
            threads=ctx.target.threads,
            max_bytes=ctx.max_bytes,
        )
        known |= {_key(node): seen.mean for node, seen in found}
        return {node: known[_key(node)] for node in layers if _key(node) in known}

    def _on_newer(
        self, model: ir.Model, ctx: Context, form: Format, chosen: Selection
    ) -> Selection:
        """Convert an older model to the opset that one scale per channel came with; choose again."""
        try:
            convert_opset(model, _OPSET)
        except ModelError as e:
            chosen.nodes.clear()
            chosen.skipped.append(("model", f"cannot be converted to opset {_OPSET}: {e.message}"))
            return chosen
        ctx.note("converted_to_opset", _OPSET)
        return self._select(model, ctx, form) or Selection()

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Names of the nodes that would become 8-bit."""
        chosen = self._select(model, ctx, self._format(ctx))
        return [] if chosen is None else [n.name or n.op_type for n in chosen.nodes]

    def _format(self, ctx: Context) -> Format:
        return choose(
            ctx.target,
            activation_type=self.activation_type,
            weight_type=self.weight_type,
            symmetric_activations=self.symmetric_activations,
            reduce_range=self.reduce_range,
        )

    def _select(self, model: ir.Model, ctx: Context, form: Format) -> Selection | None:
        reason = decline(ctx.target)
        if not reason and is_quantized(model):
            reason = "the model is quantized already"
        if not reason and is_half(model):
            reason = "the model is float16: quantize the float32 model instead"
        if reason:
            ctx.skip("model", reason)
            return None
        return select(
            model,
            self.selected,
            self.op_types,
            activations_from_zero=not form.symmetric_activations,
        )

    def _write(
        self,
        model: ir.Model,
        ctx: Context,
        form: Format,
        chosen: Selection,
        ranges: Mapping[str, tuple[float, float]],
        means: Mapping[ir.Node, npt.NDArray[np.float64]],
    ) -> None:
        writer = QDQWriter(model, form, self.per_channel, self.weight_method, means)
        writer.write(chosen, grids(chosen, ranges, form))
        for node in chosen.nodes:
            ctx.touch(node, f"{node.op_type} in {form.activation_type}")
        counts = Counter(n.op_type for n in chosen.nodes)
        ctx.note("quantized", ", ".join(f"{k} {n}" for k, n in sorted(counts.items())))
        ctx.note("weighted_layers", sum(is_op(n, *WEIGHTED) for n in chosen.nodes))
        ctx.note("activation_type", form.activation_type)
        ctx.note("weight_type", form.weight_type)
        ctx.note("format_reason", form.reason)
        ctx.note("calibration_method", self.calibration_method)


def _key(node: ir.Node) -> str:
    """Return what tells a node of the main graph from others, also in a copy."""
    return node.outputs[0].name or ""


def _loss(histogram: Histogram, ends: tuple[float, float]) -> float:
    """Return the squared error of a range, relative to the tensor's own square."""
    square = float(np.square(histogram.centers).dot(histogram.counts) / histogram.counts.sum())
    return float(squared_error(histogram, *ends)[0]) / square if square > 0 else 0.0


def _tell_skipped(chosen: Selection, ctx: Context) -> None:
    for node, reason in chosen.skipped:
        ctx.skip(node, reason)
