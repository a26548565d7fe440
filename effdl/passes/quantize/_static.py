"""Quantization with ranges from calibration data, as a class that passes share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from pydantic import Field

from effdl.data.feeds import Feeds
from effdl.errors import DataError, ModelError
from effdl.graph.versions import convert_opset
from effdl.graph.walk import is_op, opset
from effdl.graph.weights import shared
from effdl.observe.layers import rows_of
from effdl.observe.moments import moments
from effdl.observe.ranges import collect
from effdl.observe.rows import Rows
from effdl.passes.base import Context, NodePass
from effdl.passes.quantize._format import Format, IntType, choose, decline
from effdl.passes.quantize._grids import Grid, feeds_silu, grids, quantized_values
from effdl.passes.quantize._layers import LayerWeights
from effdl.passes.quantize._qdq import Known, QDQWriter, input_of, key_of
from effdl.passes.quantize._search import Judge, better, copy_with, search_ranges
from effdl.passes.quantize._select import (
    FOLLOWERS,
    WEIGHTED,
    Selection,
    is_half,
    is_quantized,
    select,
    without,
)
from effdl.solve.quantize import Int, WeightMethod
from effdl.solve.ranges import Histogram, Method, select_range, silu, squared_error

_OPSET = 13
"""What QuantizeLinear with one scale per channel came with."""
_HELD = 5
"""Every fifth feed is held out, where ranges are searched."""
_ROWS_PER_INPUT = 2
"""Rows of calibration data, per input of a layer, with fewer of which its weights are rounded to nearest."""
Ranges = Mapping[str, tuple[float, float]]
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
    adaptive_rounding: bool = True
    """Whether weights are rounded by what that does to the outputs of their layer, where it helps."""
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
        known = Known(self._means(model, chosen, feeds, ctx) if self.bias_correction else {})
        ranges = self._ranges(chosen, form, seen, self.calibration_method)
        made = LayerWeights(form, self.per_channel, self.weight_method)

        def draft(ranges: Ranges, known: Known) -> ir.Model:
            copy, picked = copy_with(model, chosen)
            QDQWriter(copy, form, made, known).write(picked, grids(picked, ranges, form))
            return copy

        judge = Judge(model, held, ctx.target.threads) if held is not None and len(held) else None
        if judge is not None:
            ranges = self._search(ctx, form, chosen, seen, ranges, judge, lambda r: draft(r, known))
        at = grids(chosen, ranges, form)
        if self.adaptive_rounding:
            tried = Known(known.means, self._rounded(model, ctx, chosen, feeds, at, made))
            if tried.integers and self._pays(
                ctx, judge, draft(ranges, known), draft(ranges, tried)
            ):
                known = tried
        QDQWriter(model, form, made, known).write(chosen, at)
        self._tell(ctx, form, chosen)
        return len(chosen.nodes)

    def _pays(self, ctx: Context, judge: Judge | None, old: ir.Model, new: ir.Model) -> bool:
        """Whether weights rounded by their effect make the whole model better on the data held out."""
        if judge is None:
            return True
        before, after = judge.error(old), judge.error(new)
        if not better(after, before):
            return False
        ctx.note("rounding_error", f"{before:.3g} -> {after:.3g}")
        return True

    def _rounded(
        self,
        model: ir.Model,
        ctx: Context,
        chosen: Selection,
        feeds: Feeds,
        at: Mapping[str, Grid],
        made: LayerWeights,
    ) -> dict[str, Int]:
        """Return the weights of the layers, rounded by what that does to their outputs."""
        known = ctx.memo.setdefault(("rounded", len(feeds), self.bias_correction), {})
        layers: dict[ir.Node, Rows] = {}
        keys: dict[ir.Node, tuple[Any, ...]] = {}
        for node in chosen.nodes:
            weight = node.inputs[1] if is_op(node, *WEIGHTED) else None
            if weight is None or shared(weight):
                continue
            scales = made.scales(node, at[input_of(node).name or ""])
            rows = rows_of(node)
            keys[node] = (key_of(node), made.form, made.axis(node), scales.tobytes())
            if keys[node] not in known and rows is not None:
                layers[node] = rows
                known[keys[node]] = None  # what cannot be told is not asked for again
        for node, seen in moments(
            model, layers, feeds, threads=ctx.target.threads, max_bytes=ctx.max_bytes
        ):
            if seen.rows >= _ROWS_PER_INPUT * layers[node].width:
                scales = made.scales(node, at[input_of(node).name or ""])
                known[keys[node]] = made.adaptive(node, scales, seen, self.bias_correction)
        found = {key_of(n): known.get(key) for n, key in keys.items()}
        return {name: q for name, q in found.items() if q is not None}

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
        self, chosen: Selection, form: Format, seen: Mapping[str, Histogram], method: Method
    ) -> Ranges:
        """Return the range of every tensor by one method."""
        return {
            v.name or "": select_range(
                seen[v.name or ""],
                method,
                percentile=self.percentile,
                symmetric=form.symmetric_activations,
                through=silu if feeds_silu(v) else None,
            )
            for v in quantized_values(chosen)
        }

    def _search(
        self,
        ctx: Context,
        form: Format,
        chosen: Selection,
        seen: Mapping[str, Histogram],
        ranges: Ranges,
        judge: Judge,
        draft: Callable[[Ranges], ir.Model],
    ) -> Ranges:
        """Try the other methods on the tensors that lose most, by the error of the whole model.

        A milder try of the same step takes over what the first one found.
        """
        key = ("ranges", type(self).__name__, self.model_dump_json(exclude={"ignore"}))
        if key in ctx.memo:
            changed = {n: r for n, r in ctx.memo[key].items() if n in ranges}
            ctx.note("ranges_changed", len(changed))
            return {**ranges, **changed}

        others = [
            self._ranges(chosen, form, seen, m) for m in METHODS if m != self.calibration_method
        ]
        lost = {name: _loss(seen[name], ends) for name, ends in ranges.items()}
        worst = sorted(lost, key=lambda name: -lost[name])[: self.range_search]
        tried = [
            (name, [r for r in dict.fromkeys(o[name] for o in others) if r != ranges[name]])
            for name in worst
        ]
        found = search_ranges(judge, ranges, tried, draft)
        if found is None:
            return ranges
        ctx.memo[key] = {name: found.ranges[name] for name in found.changed}
        if found.changed:
            ctx.note("ranges_changed", len(found.changed))
            ctx.note("held_out_error", f"{found.before:.3g} -> {found.after:.3g}")
        return found.ranges

    def _means(
        self, model: ir.Model, chosen: Selection, feeds: Feeds, ctx: Context
    ) -> dict[str, npt.NDArray[np.float64]]:
        """Return the mean of what each layer with a bias reads."""
        layers: dict[ir.Node, Rows] = {}
        known = ctx.memo.setdefault(("means", len(feeds)), {})
        for node in chosen.nodes:
            rows = rows_of(node) if is_op(node, *WEIGHTED) and len(node.inputs) > 2 else None
            if rows is not None:
                layers[node] = rows
        new = {node: rows for node, rows in layers.items() if key_of(node) not in known}
        found = moments(
            model,
            new,
            feeds,
            second=False,
            threads=ctx.target.threads,
            max_bytes=ctx.max_bytes,
        )
        known |= {key_of(node): seen.mean for node, seen in found}
        return {key_of(n): known[key_of(n)] for n in layers if key_of(n) in known}

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
            explicit=form.explicit,
        )

    def _tell(self, ctx: Context, form: Format, chosen: Selection) -> None:
        for node in chosen.nodes:
            ctx.touch(node, f"{node.op_type} in {form.activation_type}")
        counts = Counter(n.op_type for n in chosen.nodes)
        ctx.note("quantized", ", ".join(f"{k} {n}" for k, n in sorted(counts.items())))
        ctx.note("weighted_layers", sum(is_op(n, *WEIGHTED) for n in chosen.nodes))
        ctx.note("activation_type", form.activation_type)
        ctx.note("weight_type", form.weight_type)
        ctx.note("format_reason", form.reason)
        ctx.note("calibration_method", self.calibration_method)


def _loss(histogram: Histogram, ends: tuple[float, float]) -> float:
    """Return the squared error of a range, relative to the tensor's own square."""
    square = float(np.square(histogram.centers).dot(histogram.counts) / histogram.counts.sum())
    return float(squared_error(histogram, *ends)[0]) / square if square > 0 else 0.0


def _tell_skipped(chosen: Selection, ctx: Context) -> None:
    for node, reason in chosen.skipped:
        ctx.skip(node, reason)
