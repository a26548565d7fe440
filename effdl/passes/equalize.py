"""The pass ``equalize``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import onnx_ir as ir
from pydantic import Field

from effdl.graph.weights import Names, constant_tensor
from effdl.observe.channels import Channels, channels
from effdl.passes._equalize_sites import Site, apply, reader, sites
from effdl.passes.base import Context, NodePass, matches
from effdl.solve.equalize import equalize

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
        found = self._sites(model)
        if not found:
            ctx.skip("model", "no layer feeds the next through what a factor passes")
            return 0
        if ctx.feeds is None or not len(ctx.feeds):
            for node in (r for s in found for r in s.readers):
                ctx.skip(
                    node, "how large its channels are only data tells: optimize --data FILE.npz"
                )
            return 0
        seen = channels(
            model,
            {s.value.name or "": s.axis for s in found},
            ctx.feeds,
            threads=ctx.target.threads,
            max_bytes=ctx.max_bytes,
        )
        reasons: dict[Site, str] = {}
        for site in found:
            if site.value.name not in seen:
                reasons[site] = "nothing finite was seen at its input"
            elif sum(_bytes(r) for r in site.readers) > ctx.max_bytes:
                reasons[site] = "its weights are more than is held at a time"
        gains = self._even_out([s for s in found if s not in reasons], seen, Names(model))
        for site in found:
            for node in site.readers:
                if site in gains:
                    ctx.touch(node, f"rounding error {gains[site]:.2g} of before")
                else:
                    ctx.skip(node, reasons.get(site, "its channels are alike enough"))
        return len(gains)

    def _even_out(
        self, found: list[Site], seen: dict[str, Channels], names: Names
    ) -> dict[Site, float]:
        """Change the sites that gain, until none does; return what is left of the error of each.

        What a layer gives away changes what its own errors count: the sites before it are looked at again.
        """
        gains: dict[Site, float] = {}
        waiting = dict.fromkeys(found)
        for _ in range(_SWEEPS * len(found)):
            if not waiting:
                break
            site = next(iter(waiting))
            del waiting[site]
            known = seen[site.value.name or ""]
            best = equalize(
                known.low,
                known.high,
                known.mean,
                known.square,
                [reader(r) for r in site.readers],
                shift=site.shiftable,
            )
            if best.gain > 1 - self.least_gain:
                continue
            apply(site, best.factors, best.shift, names)
            seen[site.value.name or ""] = known.moved(best.factors, best.shift)
            gains[site] = gains.get(site, 1.0) * best.gain
            makers = {slot.node for slot in site.divided}
            waiting |= {s: None for s in found if s is site or makers & set(s.readers)}
        return gains

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Return the layers whose inputs may be evened out."""
        return [r.name or r.op_type for s in self._sites(model) for r in s.readers]

    def _sites(self, model: ir.Model) -> list[Site]:
        """Return the places where the options let every layer be changed."""
        return [
            s
            for s in sites(model.graph)
            if all(self.selected(r) for r in s.readers)
            and not any(
                matches(p, slot.node) for p in self.ignore for slot in (*s.divided, *s.biases)
            )
        ]


def _bytes(node: ir.Node) -> int:
    tensor = constant_tensor(node.inputs[1])
    return 4 * tensor.size if tensor is not None else 0
