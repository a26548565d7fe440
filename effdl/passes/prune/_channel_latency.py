"""How many channels each group keeps for a latency, measured on the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.graph import io
from effdl.graph.channels import Channels, Group, remove
from effdl.measure.profile import profile
from effdl.measure.verify import verification_feeds
from effdl.passes.base import Context
from effdl.passes.prune._channel_cost import Terms, axes_of
from effdl.passes.prune._channel_order import Order
from effdl.report import Profile
from effdl.solve.channel_plan import Choice, Cost, plan

_SECONDS = 1.0
_TRIES = 4
_CLOSE = 0.02


def latency_plan(
    model: ir.Model,
    found: Channels,
    orders: Sequence[Order],
    choices: Sequence[Choice],
    share: float,
    ctx: Context,
) -> list[int] | None:
    """Return what each group keeps so that the latency falls to a share of what it is.

    Every kernel's time is taken to grow in a straight line with its work; the line goes through what it takes
    in the whole model and in one with half of the channels. Plans are measured as whole models, and the
    budget is corrected by what comes out.

    Raises:
        EffdlError: the target cannot be measured.
    """
    clock = Clock(model, ctx)
    half = [int(c.kept[np.argmin(np.abs(c.kept - c.kept[0] / 2))]) for c in choices]
    cost = _times(
        model, found, [o.group for o in orders], half, clock.both(_cut(model, found, orders, half))
    )
    full = cost.of(np.array([c.kept[0] for c in choices], np.float64))
    aim, best = share, None
    for _ in range(_TRIES):
        at = plan(choices, cost, full * aim)
        if at is None:
            break
        counts = [int(c.kept[a]) for c, a in zip(choices, at, strict=True)]
        reached = clock.ratio(_cut(model, found, orders, counts))
        if best is None or _rank(reached, share) < _rank(best[1], share):
            best = (counts, reached)
        if share * (1 - 2 * _CLOSE) <= reached <= share * (1 + _CLOSE):
            break
        aim = min(0.99, max(0.01, aim * share / reached))
    if best is None or best[1] >= 1:
        ctx.skip(
            "model",
            "no plan is as fast as asked for: the channels that can go take too little time",
        )
        return None
    ctx.note("latency_planned", round(best[1], 3))
    return best[0]


def _rank(reached: float, share: float) -> float:
    """Return how far from the goal a plan is; too slow counts three times."""
    return (reached - share) * 3 if reached > share else share - reached


class Clock:
    """Measures models beside the one that is to be pruned."""

    def __init__(self, model: ir.Model, ctx: Context) -> None:
        self._ctx = ctx
        self._folder = ctx.workdir / "latency"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._base = self._save(model, "whole")
        self._feeds: Feeds = verification_feeds(
            model, ctx.feeds, dims={}, seed=ctx.seed, target=ctx.target
        ).first(1)

    def _save(self, model: ir.Model, name: str) -> Path:
        path = self._folder / f"{name}.onnx"
        io.save(model, path)
        return path

    def both(self, other: ir.Model) -> tuple[Profile, Profile]:
        """Return the profiles of the model and of another."""
        ctx = self._ctx
        report = profile(
            [self._base, self._save(other, "other")],
            self._feeds,
            ctx.target,
            threads=ctx.target.threads or 1,
            seconds=_SECONDS,
            seed=ctx.seed,
        )
        return report.profiles[0], report.profiles[1]

    def ratio(self, other: ir.Model) -> float:
        """Return the latency of another model, relative to the model's."""
        first, second = self.both(other)
        return second.wall_ms / first.wall_ms


def _cut(
    model: ir.Model, found: Channels, orders: Sequence[Order], counts: Sequence[int]
) -> ir.Model:
    """Return a copy of the model that has so many channels left."""
    gone = [u for o, k in zip(orders, counts, strict=True) for u in o.units[: len(o.units) - k]]
    copy = model.clone()
    values = _counterparts(model, copy)
    axes = {values[v]: labels for v, labels in found.axes.items() if v in values}
    remove(copy, Channels(axes, found.units, found.groups), gone)
    return copy


def _counterparts(model: ir.Model, copy: ir.Model) -> dict[ir.Value, ir.Value]:
    """Return the value of a clone for each value of the model's main graph."""
    pairs = dict(zip(model.graph.inputs, copy.graph.inputs, strict=True))
    pairs |= {v: copy.graph.initializers[n] for n, v in model.graph.initializers.items()}
    for old, new in zip(model.graph, copy.graph, strict=True):
        pairs |= dict(zip(old.outputs, new.outputs, strict=True))
    return pairs


def _times(
    model: ir.Model,
    found: Channels,
    groups: Sequence[Group],
    half: Sequence[int],
    profiles: tuple[Profile, Profile],
) -> Cost:
    """Return milliseconds by channels kept, a straight line for each node."""
    nodes = {n.name or "": n for n in model.graph}
    before, after = (by_node(p, nodes) for p in profiles)
    terms = Terms(found, groups)
    counts = np.array(half, np.float64)
    rest = profiles[0].wall_ms - sum(before.values())
    for name, ms in before.items():
        for share, axes in axes_of(nodes[name], found):
            alone = Terms(found, groups)
            alone.add(1.0, axes)
            left = alone.cost().of(counts)
            slope = _slope(ms, after.get(name, ms), left) * share
            terms.add(slope, axes)
            rest += ms * share - slope
    terms.add(max(rest, 0.0), ())
    return terms.cost()


def _slope(ms: float, half_ms: float, left: float) -> float:
    """Return the part of a time that grows with the work, from the time with ``left`` of the work."""
    return float(np.clip((ms - half_ms) / (1 - left), 0.0, ms)) if left < 1 else 0.0


def by_node(found: Profile, nodes: Mapping[str, ir.Node]) -> dict[str, float]:
    """Return the time of kernels by the node that does most of their work."""
    times: dict[str, float] = {}
    for kernel in found.nodes:
        names = [n for n in (*kernel.origin, *kernel.near) if n in nodes and nodes[n].inputs]
        if names:
            heavy = [
                n for n in names if nodes[n].op_type in ("Conv", "Gemm", "MatMul", "ConvTranspose")
            ]
            name = (heavy or names)[0]
            times[name] = times.get(name, 0.0) + kernel.ms
    return times
