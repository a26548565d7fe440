"""The pass ``quantize_auto``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import onnx_ir as ir

from effdl.passes.base import Context, NodePass, Pass, PassLog
from effdl.passes.quantize._dynamic import DynamicQuantizer
from effdl.passes.quantize._select import FOLLOWERS, WEIGHTED
from effdl.passes.quantize._static import StaticQuantizer

Form = Literal["auto", "static", "dynamic", "mixed"]


class QuantizeAuto(NodePass):
    """Compute in 8-bit integers in the way that is fastest here and accurate enough.

    What it does: tries three ways and keeps the fastest on the target that holds the budget: static
    (quantize_static: ranges from calibration data), dynamic (quantize_dynamic: ranges found at every
    run) and mixed (convolutions static, matrix products and LSTM dynamic). Without calibration data only
    dynamic is left. The report says what each was worth.

    When it helps: when you do not want to know which of them suits a network.

    When it does not: where the target cannot be measured, nothing is compared: mixed is taken with data,
    dynamic without.

    Example:
        passes: [simplify, fold_batchnorm, quantize_auto]
    """

    lossy: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"latency", "size"})

    form: Form = "auto"
    """The way: auto tries all."""

    def variants(self) -> Sequence[Pass]:
        """Return the ways to try."""
        if self.form != "auto":
            return (self,)
        return tuple(self.model_copy(update={"form": f}) for f in ("static", "dynamic", "mixed"))

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of nodes that became 8-bit."""
        has_data = ctx.feeds is not None and len(ctx.feeds) > 0
        form = ("mixed" if has_data else "dynamic") if self.form == "auto" else self.form
        if form != "dynamic" and not has_data:
            ctx.skip("model", f"the {form} way needs calibration data: --data FILE.npz")
            return 0
        given = {"targets": self.targets, "ignore": self.ignore}
        if form == "static":
            return StaticQuantizer(**given).run(model, ctx)
        if form == "dynamic":
            return DynamicQuantizer(**given).run(model, ctx)
        kept = tuple(op for op in (*WEIGHTED, *FOLLOWERS) if op not in ("MatMul", "Gemm"))
        first, second = (replace(ctx, log=PassLog()) for _ in range(2))
        changes = StaticQuantizer(op_types=kept, **given).run(model, first)
        changes += DynamicQuantizer(**given).work(model, second, beside=changes > 0)
        _merge(ctx, first.log, second.log)
        return changes

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Names of the nodes that would become 8-bit in any of the ways."""
        quiet = replace(ctx, log=PassLog())
        found: dict[str, None] = {}
        for way in (StaticQuantizer, DynamicQuantizer):
            step = way(targets=self.targets, ignore=self.ignore)
            found |= dict.fromkeys(step.candidates(model, quiet) or [])
        done = set(found)
        for name, reason in quiet.log.skipped:
            if name not in done:
                ctx.skip(name, reason)
        return list(found)


def _merge(ctx: Context, *logs: PassLog) -> None:
    """Tell what both did: a node that one of them took is not left alone."""
    touched = {name for log in logs for name, _ in log.touched}
    for log in logs:
        ctx.log.touched.extend(log.touched)
        ctx.log.skipped.extend(s for s in log.skipped if s[0] not in touched)
        for stat, value in log.notes.items():
            old = ctx.log.notes.get(stat)
            both = stat == "quantized" and old is not None
            ctx.note(stat, f"{old}, {value}" if both else value)
