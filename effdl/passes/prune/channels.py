"""The pass ``prune_channels``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import onnx_ir as ir
from pydantic import Field, model_validator

from effdl.graph.channels import Group, channels
from effdl.passes.base import Context, NodePass
from effdl.passes.prune._channel_order import Saliency
from effdl.passes.prune._channel_rounds import MARK, Distribution, Goal, Rounds

_DEFAULT_MACS = 0.7


class PruneChannels(NodePass):
    """Remove whole channels, hidden units and attention heads, and let the layers left make up for them.

    What it does: finds every set of channels that can be removed together, through residual branches,
    joins, splits, reshapes and attention; removes as many as the target asks for (``macs``, ``params``,
    ``latency`` or ``keep``), where the outputs change least; then fits the weights of the layers behind,
    in order, to what they put out before (ridge regression on calibration data, kept where it also helps
    on samples held out). The model gets smaller matrices, which run faster on any runtime.

    When it helps: on networks with more channels than they need, such as wide convolutional networks and
    the hidden layers of transformers, where latency counts and retraining is not possible.

    When it does not: compact networks lose accuracy soon, and without calibration data, where only the
    weights tell which channels are alike, all networks do.
    Narrow layers may not get faster, since kernels work on 8 or 16 channels at a time.

    Example:
        passes: [simplify, fold_batchnorm, {prune_channels: {macs: 0.7}}]
    """

    lossy: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"latency", "size"})
    not_after: ClassVar[Mapping[str, str]] = {
        "quantize_*": "it works on floating-point weights, which are integers after quantization"
    }

    macs: float | None = Field(None, gt=0, lt=1)
    """Share of the multiply-accumulates that is to be left; 0.7 where no target is given."""
    params: float | None = Field(None, gt=0, lt=1)
    """Share of the numbers in weights that is to be left."""
    latency: float | None = Field(None, gt=0, lt=1)
    """Share of the latency that is to be left, measured on the target."""
    keep: float | None = Field(None, gt=0, lt=1)
    """Share of every group's channels that is to be left."""
    saliency: Saliency = "obs"
    """What decides which channels go: the exact error with the others making up for it (obs), sizes of
    weights (l1, l2), scales of batch norms, sizes of activations times weights, or chance as a control."""
    distribution: Distribution = "plan"
    """How many go where: as the plan of least error has it, by one threshold for all, or alike everywhere."""
    rounds: int = Field(1, ge=1, le=20)
    """In so many steps channels go, with statistics taken anew before each."""
    repair: bool = True
    """Fit the layers that are left to what they put out before."""
    multiple_of: int | None = Field(None, ge=1)
    """Channels left are multiples of this; none: what the target's kernels work on, 16 or 8."""
    min_keep: float = Field(0.125, gt=0, le=1)
    """Leave at least this share of each group."""

    @model_validator(mode="after")
    def _one_goal(self) -> PruneChannels:
        if sum(g is not None for g in self._goals().values()) > 1:
            raise ValueError("macs, params, latency and keep exclude each other")
        return self

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of groups that lost channels."""
        rounds = Rounds(model, ctx, self._goal(), self._refusal)
        removed = rounds.run()
        for name, (before, after) in removed.items():
            ctx.touch(name, f"{before} -> {after} channels")
        for node in {n for g in channels(model).groups for n in g.makers} if removed else ():
            node.metadata_props[MARK] = "done"
        return len(removed)

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Names of the layers that make channels which can be removed."""
        return [g.name for g in Rounds(model, ctx, self._goal(), self._refusal).candidates()]

    def _goals(self) -> dict[str, float | None]:
        return {
            "macs": self.macs,
            "params": self.params,
            "latency": self.latency,
            "keep": self.keep,
        }

    def _goal(self) -> Goal:
        given = [(kind, share) for kind, share in self._goals().items() if share is not None]
        kind, share = given[0] if given else ("macs", _DEFAULT_MACS)
        return Goal(
            kind,
            share,
            self.saliency,
            "uniform" if kind == "keep" else self.distribution,
            self.rounds,
            self.repair,
            self.multiple_of,
            self.min_keep,
        )

    def _refusal(self, group: Group) -> str:
        """Return why a group stays as it is, an empty string when it need not."""
        if not all(self.selected(n) for n in group.makers):
            return "left out by the options"
        if any(MARK in n.metadata_props for n in group.makers):
            return "was pruned before"
        return "has one channel" if len(group) < 2 else ""
