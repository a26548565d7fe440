"""What dropping blocks saves, in multiply-accumulates or in milliseconds on the target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from effdl.graph.cost import model_cost
from effdl.graph.weights import Names
from effdl.passes.base import Context
from effdl.passes.prune._block_edit import Cut, drop
from effdl.passes.prune._channel_latency import Clock, by_node

_CLOSE = 1.02
"""A measured latency counts as reached this far above the goal."""


@dataclass(frozen=True)
class Cost:
    """What a model costs, and its parts.

    Args:
        gains: what goes with each node, by its first output.
        total: of the model.
        clock: measures models beside it, where the cost is a latency.
    """

    gains: Mapping[str, float]
    total: float
    clock: Clock | None = None

    def left(self, cuts: Iterable[Cut]) -> float:
        """Return the share of the cost that is left without some blocks, as far as can be told."""
        names = {n for c in cuts for n in c.nodes}
        return 1 - sum(self.gains.get(n, 0.0) for n in names) / self.total if self.total else 1.0

    def reached(self, share: float, cuts: Iterable[Cut], now: ir.Model, ctx: Context) -> bool:
        """Whether only a share of the cost is left; a latency is measured where that may be."""
        left = self.left(cuts)
        if self.clock is None or left > share * _CLOSE:
            return left <= share
        measured = self.clock.ratio(now)
        ctx.note("latency_planned", round(measured, 3))
        return measured <= share * _CLOSE


def macs(model: ir.Model) -> Cost:
    """Return the multiply-accumulates of the nodes of the main graph."""
    nodes = model_cost(model).per_node
    gains = {
        c.node.outputs[0].name or "": float(c.macs * c.times) for c in nodes if c.macs and c.times
    }
    return Cost(gains, sum(gains.values()))


def latency(model: ir.Model, units: Sequence[tuple[Cut, ...]], ctx: Context) -> Cost:
    """Return milliseconds of nodes, scaled so that all units together save what was measured.

    Raises:
        EffdlError: the target cannot be measured.
    """
    bare = model.clone()
    names = Names(bare)
    cuts = [c for u in units for c in u]
    for cut in cuts:
        drop(bare, cut, names, mean=False)
    clock = Clock(model, ctx)
    whole, rest = clock.both(bare)
    nodes = {n.name or "": n for n in model.graph}
    times = {nodes[n].outputs[0].name or "": ms for n, ms in by_node(whole, nodes).items()}
    inside = sum(times.get(n, 0.0) for n in {n for c in cuts for n in c.nodes})
    scale = max(whole.wall_ms - rest.wall_ms, 0.0) / inside if inside else 0.0
    return Cost({n: ms * scale for n, ms in times.items()}, whole.wall_ms, clock)
