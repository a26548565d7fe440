"""The pass ``equalize``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import onnx_ir as ir
from pydantic import Field

from effdl.graph.weights import Names
from effdl.observe.channels import Channels, channels
from effdl.passes._equalize_sites import Site, apply, reader, sites
from effdl.passes.base import Context, NodePass
from effdl.solve.equalize import Equalized, equalize

_SWEEPS = 8


class Equalize(NodePass):
    """Even out the channels between layers, so that 8 bits with one scale lose less.

    What it does: where one layer feeds the next through nothing but Relu, pooling and their like, factors
    per channel can be taken from the first and given to the second without changing what they compute
    together: cross-layer equalization, and SmoothQuant where the first is a norm. Where a bias stands on
    both sides, the middle of each channel can be moved to zero as well. Factors and shifts are those with
    the smallest rounding error of tensor and weights together, told from calibration data; a place where
    that gains little is left alone.

    When it helps: before quantize_static or quantize_dynamic, on networks where few channels are much
    larger than the others: transformers with outliers, networks trained without batch norm.

    When it does not: where the channels are alike, which is so in most networks; across a Clip (Relu6),
    SiLU or a residual branch, which no factor passes.

    Example:
        passes: [simplify, fold_batchnorm, equalize, quantize_static]
    """

    not_after: ClassVar[Mapping[str, str]] = {
        "quantize_*": "factors cannot be taken from quantized weights"
    }

    least_gain: float = Field(default=0.5, ge=0, lt=1)
    """Share of a place's rounding error that must go away, by the estimate; small gains are often none."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of places that were changed."""
        found = [s for s in sites(model.graph) if all(self.selected(r) for r in s.readers)]
        if not found:
            ctx.skip("model", "no layer feeds the next through what a factor passes")
            return 0
        if ctx.feeds is None or not len(ctx.feeds):
            ctx.skip("model", "the sizes of channels are not known: --data FILE.npz")
            return 0
        seen = channels(
            model,
            {s.value.name or "": s.axis for s in found},
            ctx.feeds,
            threads=ctx.target.threads,
            max_bytes=ctx.max_bytes,
        )
        names = Names(model)
        gains: dict[Site, float] = {}
        shifted: set[Site] = set()
        for _ in range(_SWEEPS):  # what a layer gives away changes what its errors count
            changed = False
            for site in found:
                known = seen.get(site.value.name or "")
                best = self._best(site, known) if known is not None else None
                if known is None or best is None:
                    continue
                apply(site, best.factors, best.shift, names)
                seen[site.value.name or ""] = known.moved(best.factors, best.shift)
                gains[site] = gains.get(site, 1.0) * best.gain
                if best.shift.any():
                    shifted.add(site)
                changed = True
            if not changed:
                break
        for site in found:
            for node in site.readers:
                if site in gains:
                    what = f"rounding error {gains[site]:.2g} of before"
                    ctx.touch(node, what + (", shifted" if site in shifted else ""))
                else:
                    known = seen.get(site.value.name or "")
                    finite = "its channels are alike enough"
                    ctx.skip(node, finite if known else "its input is not finite on the data")
        return len(gains)

    def _best(self, site: Site, known: Channels) -> Equalized | None:
        """Return factors and shift of a site, None where they gain little."""
        found = equalize(
            known.low,
            known.high,
            known.mean,
            known.square,
            [reader(r) for r in site.readers],
            shift=site.shiftable,
        )
        return found if found.gain <= 1 - self.least_gain else None

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Return the layers whose inputs may be evened out."""
        return [r.name or r.op_type for s in sites(model.graph) for r in s.readers]
