"""The pass ``prune_blocks``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import onnx_ir as ir
from pydantic import Field, model_validator

from effdl.passes.base import Context, NodePass, matches
from effdl.passes.prune._block_find import Block
from effdl.passes.prune._block_run import MARK, Goal, Run

_DEFAULT_ERROR = 0.05


class PruneBlocks(NodePass):
    """Drop whole residual blocks or transformer layers that change the outputs least, without training.

    What it does: finds every branch that is computed from a value and added to it (blocks of residual
    networks, attention and feed-forward blocks of transformers), drops one after the other where the
    outputs on calibration data change least for the work it saves, and measures anew after each. The mean of
    a dropped branch is put in its place where that helps. Then the layers before and behind are fitted to
    what they put out before (ridge regression, kept where the outputs get closer on calibration data).

    When it helps: on deep networks with many blocks of one width, where latency counts and retraining is
    not possible: the layers that are left keep their shapes, so every kernel that goes is saved in full.

    When it does not: networks with a few blocks lose much with each; blocks that change the number
    of channels or the resolution stay, and so do branches of which something inside is read elsewhere.

    Example:
        passes: [simplify, fold_batchnorm, {prune_blocks: {count: 2}}]
    """

    lossy: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"latency", "size"})
    needs_data: ClassVar[bool] = True
    not_after: ClassVar[Mapping[str, str]] = {
        "quantize_*": "it fits floating-point weights, which are integers after quantization"
    }

    latency: float | None = Field(None, gt=0, lt=1)
    """Share of the latency that is to be left, measured on the target; harm is weighed by milliseconds."""
    macs: float | None = Field(None, gt=0, lt=1)
    """Share of the multiply-accumulates that is to be left."""
    count: int | None = Field(None, ge=1)
    """How many blocks are to go, or layers where unit is layer."""
    error: float | None = Field(None, gt=0)
    """Drop only as many as leave the squared error of the outputs below this share of their variance;
    0.05 where no other goal is given."""
    unit: Literal["block", "layer"] = "block"
    """What goes at once: one block, or the attention and feed-forward blocks of a transformer layer."""
    repair: bool = True
    """Fit the layers that are left to what they put out before."""

    @model_validator(mode="after")
    def _one_goal(self) -> PruneBlocks:
        if sum(g is not None for g in (self.latency, self.macs, self.count)) > 1:
            raise ValueError("latency, macs and count exclude each other")
        return self

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of blocks that were dropped."""
        gone = Run(model, ctx, self._goal(), self._refusal).run()
        for unit in gone:
            for cut in unit.cuts:
                told = ", its mean stays" if unit.means else ""
                ctx.touch(cut.name, f"dropped{told}: harm {unit.harm:.2g}, {cut.macs:,} MACs")
        if gone:
            for node in model.graph:
                node.metadata_props[MARK] = "done"
        return sum(len(u.cuts) for u in gone)

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Names of the nodes that add a branch which can be dropped."""
        units = Run(model, ctx, self._goal(), self._refusal).units()
        return [b.name for u in units for b in u]

    def _goal(self) -> Goal:
        aims = {"latency": self.latency, "macs": self.macs, "count": self.count}
        given = [(kind, amount) for kind, amount in aims.items() if amount is not None]
        kind, amount = given[0] if given else ("error", 0.0)
        limit = self.error if given or self.error is not None else _DEFAULT_ERROR
        return Goal(kind, amount, limit, self.unit == "layer", self.repair)

    def _refusal(self, block: Block) -> str:
        """Return why a block stays as it is, an empty string when it need not."""
        if any(MARK in n.metadata_props for n in block.nodes):
            return "the model lost blocks before"
        if any(matches(p, n) for p in self.ignore for n in block.nodes):
            return "left out by the options"
        if not any(self.selected(n) for n in block.nodes):
            return "left out by the options"
        return ""
