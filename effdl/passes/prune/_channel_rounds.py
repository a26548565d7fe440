"""Channels go in rounds: observe, plan, remove, let the layers left make up for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.graph.channels import Channels, Group, Role, channels, remove
from effdl.graph.cost import model_cost
from effdl.graph.io import METADATA_PREFIX
from effdl.measure.work import feed_dims
from effdl.observe.batches import batched
from effdl.observe.moments import Moments, moments
from effdl.passes._fit import Kept, fit
from effdl.passes.base import Context
from effdl.passes.prune._channel_cost import macs, params
from effdl.passes.prune._channel_guess import guessed
from effdl.passes.prune._channel_latency import latency_plan
from effdl.passes.prune._channel_order import Order, Saliency, needed, order
from effdl.passes.prune._channel_trial import LEVELS, Trials, do_without
from effdl.solve.channel_plan import Choice, Cost, plan, thresholded, uniform

MARK = METADATA_PREFIX + "prune_channels"
Distribution = Literal["plan", "global", "uniform"]
Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_TRIAL_FEEDS = 12
_TRIAL_MACS = 1e13
"""Multiply-accumulates that all trials together may take: a minute or two of two cores."""


@dataclass(frozen=True)
class Goal:
    """What is to be left, and how it is reached; see the options of ``prune_channels``.

    Args:
        kind: ``macs``, ``params``, ``latency`` or ``keep``.
        share: of it that is to be left.
    """

    kind: str
    share: float
    saliency: Saliency
    distribution: Distribution
    rounds: int
    repair: bool
    multiple_of: int | None
    min_keep: float


class Rounds:
    """The pruning of one model.

    Args:
        model: is changed.
        ctx: of the pass.
        goal: what is to be reached.
        refusal: why a group is to stay, empty where it is not.
    """

    def __init__(
        self, model: ir.Model, ctx: Context, goal: Goal, refusal: Callable[[Group], str]
    ) -> None:
        self._model = model
        self._ctx = ctx
        self._goal = goal
        self._refusal = refusal
        self._feeds: Feeds | None = None
        self._sizes: dict[str, int] = {}
        self._final: dict[str, int] = {}

    def candidates(self) -> list[Group]:
        """Return the groups that may lose channels, and log the others."""
        return self._groups(channels(self._model), tell=True)

    def run(self) -> dict[str, tuple[int, int]]:
        """Prune; return the channels before and after of each group that lost some, by its first layer."""
        ctx, goal = self._ctx, self._goal
        found = channels(self._model)
        groups = self._groups(found)
        self._sizes = {g.name: len(g) for g in groups}
        start = self._cost(found, groups).of(_counts(groups)) if groups else 0.0
        reached = not groups or self._in_reach(found, groups, start * goal.share)
        self._groups(found, tell=True)
        if not groups or not reached:
            return {}
        if ctx.feeds is not None and len(ctx.feeds) > 1:
            self._feeds = batched(self._model, ctx.feeds, threads=ctx.target.threads)
        else:
            ctx.note("repair", "guessed from the weights, without calibration data (--data)")
        old, kept = self._model.clone(), Kept()
        left = dict(self._sizes)
        rounds = goal.rounds if self._feeds is not None else 1
        for number in range(1, rounds + 1):
            if number > 1:
                found = channels(self._model)
                groups = self._groups(found)
            budget = start * (1 - (1 - goal.share) * number / rounds)
            gone = self._chosen(found, groups, budget, number / rounds)
            if gone is None:
                break
            units = np.concatenate(gone) if gone else np.zeros(0, np.int64)
            if not len(units):
                continue
            _remember(kept, found, units)
            left |= {g.name: len(g) - len(u) for g, u in zip(groups, gone, strict=True)}
            remove(self._model, found, units.tolist())
            self._repair(old, kept)
        return {n: (k, left[n]) for n, k in self._sizes.items() if left[n] < k}

    def _in_reach(self, found: Channels, groups: Sequence[Group], budget: float) -> bool:
        """Whether the fewest channels that the options allow meet a budget; log it where not."""
        if self._goal.kind not in ("macs", "params"):
            return True
        fewest = np.array([self._options(g)[-1] for g in groups], np.float64)
        least = self._cost(found, groups).of(fewest)
        if least > budget:
            what = f"{least:,.0f} {self._goal.kind} are left with the fewest channels allowed"
            asked = f"{budget:,.0f} are asked for: lower min_keep or multiple_of"
            self._ctx.skip("model", f"{what}, {asked}")
        return least <= budget

    def _options(self, group: Group) -> list[int]:
        """Return the numbers of channels that a group may keep, all of them first."""
        count = len(group)
        step = max(1, (self._goal.multiple_of or self._ctx.target.channel_block) // group.width)
        least = max(1, int(np.ceil(self._goal.min_keep * self._sizes[group.name])))
        return [count, *(k for k in range(count - 1, 0, -1) if k % step == 0 and k >= least)]

    def _groups(self, found: Channels, *, tell: bool = False) -> list[Group]:
        chosen = []
        for group in found.groups:
            reason = group.reason or self._refusal(group)
            if not reason:
                chosen.append(group)
            elif tell:
                self._ctx.skip(group.name, reason)
        return chosen

    def _cost(self, found: Channels, groups: Sequence[Group]) -> Cost:
        if self._goal.kind == "params":
            return params(found, groups)
        return macs(self._model, found, groups)

    def _chosen(
        self, found: Channels, groups: Sequence[Group], budget: float, way: float
    ) -> list[Ints] | None:
        """Return the units of each group that go in this round; None where the goal is out of reach."""
        orders, curves = self._observe(found, groups)
        choices = [self._choice(o, c) for o, c in zip(orders, curves, strict=True)]
        if self._goal.kind in ("latency", "keep"):
            counts = self._by_counts(found, groups, orders, choices, way)
        else:
            counts = self._by_cost(found, groups, orders, choices, budget)
        if counts is None:
            return None
        gone = [o.units[: len(o.units) - k] for o, k in zip(orders, counts, strict=True)]
        if self._goal.repair and self._feeds is None:
            for made, units in zip(orders, gone, strict=True):
                if len(units):
                    seen = guessed(found, made.group)
                    do_without(self._model, self._model, made, len(units), found, seen)
        return gone

    def _by_cost(
        self,
        found: Channels,
        groups: Sequence[Group],
        orders: Sequence[Order],
        choices: Sequence[Choice],
        budget: float,
    ) -> list[int] | None:
        cost = self._cost(found, groups)
        match self._goal.distribution:
            case "uniform":
                at = uniform(choices, cost, budget)
            case "global":
                at = thresholded(choices, [o.errors for o in orders], cost, budget)
            case _:
                at = plan(choices, cost, budget)
        if at is None:
            return None
        return [int(c.kept[a]) for c, a in zip(choices, at, strict=True)]

    def _by_counts(
        self,
        found: Channels,
        groups: Sequence[Group],
        orders: Sequence[Order],
        choices: Sequence[Choice],
        way: float,
    ) -> list[int] | None:
        """Follow the plan that was made on the whole model, a part of the way."""
        share = self._goal.share
        if not self._final:
            if self._goal.kind == "keep":
                counts: list[int] | None = [
                    int(c.kept[np.argmin(np.abs(c.kept - share * c.kept[0]))]) for c in choices
                ]
            else:
                counts = latency_plan(self._model, found, orders, choices, share, self._ctx)
            if counts is None:
                return None
            self._final = {g.name: k for g, k in zip(groups, counts, strict=True)}
        counts = []
        for group, choice in zip(groups, choices, strict=True):
            size, last = self._sizes[group.name], self._final[group.name]
            aim = size - (size - last) * way
            allowed = choice.kept[choice.kept >= aim - 1e-9]
            counts.append(last if way == 1 else int(allowed.min(initial=len(group))))
        return counts

    def _repair(self, old: ir.Model, kept: Kept) -> None:
        if not self._goal.repair or self._feeds is None:
            return
        ctx = self._ctx
        fitted = fit(
            old,
            self._model,
            kept,
            self._feeds,
            threads=ctx.target.threads,
            max_bytes=ctx.max_bytes,
        )
        if fitted:
            ctx.note("layers_fitted", len(fitted))
            ctx.note("largest_layer_error", round(max(f.after for f in fitted), 4))

    def _observe(
        self, found: Channels, groups: Sequence[Group]
    ) -> tuple[list[Order], list[tuple[list[float], list[float]]]]:
        """Return the order of each group, and how the errors of its readers show at the outputs."""
        goal = self._goal
        rng = np.random.default_rng(self._ctx.seed)
        trials = None
        if goal.distribution == "plan" and self._feeds is not None:
            few = self._feeds.some(self._trial_feeds(len(LEVELS) * len(groups)))
            trials = Trials(self._model, few, self._ctx.target)
        orders, curves = [], []
        for group, seen in self._seen(found, groups):
            made = order(found, group, seen, goal.saliency, rng)
            orders.append(made)
            curves.append(([0.0], [0.0]) if trials is None else trials.curve(made, found, seen))
        return orders, curves

    def _trial_feeds(self, runs: int) -> int:
        """Return how many feeds there is time to run the model on so many times."""
        assert self._feeds is not None
        dims = feed_dims(self._model, self._feeds.batches[0])
        each = (model_cost(self._model, dims).macs or 1) * max(1, runs)
        return int(np.clip(_TRIAL_MACS / each, 1, _TRIAL_FEEDS))

    def _seen(
        self, analysed: Channels, groups: Sequence[Group]
    ) -> Iterator[tuple[Group, dict[Role, Moments]]]:
        """Yield each group with the moments of what its readers read, few of them in memory at a time."""
        rows = needed(groups) if self._feeds is not None else {}
        uses = {role: sum(role in g.roles for g in groups) for role in rows}
        stream: Iterator[tuple[Role, Moments]] = iter(())
        if self._feeds is not None:
            ctx = self._ctx
            stream = moments(
                self._model,
                rows,
                self._feeds,
                threads=ctx.target.threads,
                max_bytes=ctx.max_bytes,
            )
        held: dict[Role, Moments] = {}
        for group in groups:
            wanted = [r for r in group.of_kind("in") if r in rows]
            while any(r not in held for r in wanted):
                found = next(stream, None)
                if found is None:
                    break
                held[found[0]] = found[1]
            if self._feeds is None:
                yield group, guessed(analysed, group)
                continue
            yield group, {r: held[r] for r in wanted if r in held}
            for role in wanted:
                uses[role] -= 1
                if not uses[role]:
                    held.pop(role, None)

    def _choice(self, made: Order, curve: tuple[list[float], list[float]]) -> Choice:
        count, kept = len(made.units), self._options(made.group)
        errors = np.array([made.errors[count - k] for k in kept])
        inner, outer = curve
        if len(inner) > 1:
            errors = _through(errors, inner, outer)
        return Choice(np.array(kept, np.int64), np.maximum.accumulate(errors))


def _counts(groups: Sequence[Group]) -> Float:
    return np.array([len(g) for g in groups], np.float64)


def _through(errors: Float, inner: Sequence[float], outer: Sequence[float]) -> Float:
    """Return the errors at the outputs for errors of the readers, by straight lines between trials."""
    slope = (outer[-1] - outer[-2]) / (inner[-1] - inner[-2])
    beyond = outer[-1] + slope * (errors - inner[-1])
    return np.where(errors > inner[-1], beyond, np.interp(errors, inner, outer))


def _remember(kept: Kept, found: Channels, gone: Ints) -> None:
    """Keep in mind what is left of every axis of the values of the first model."""
    lost = np.zeros(len(found.units.frozen), bool)
    lost[gone] = True
    for value, axes in found.axes.items():
        for axis in range(len(axes)):
            units = found.of(value, axis)
            if units is None or not lost[units].any():
                continue
            name = value.name or ""
            left = kept.get((name, axis), np.ones(len(units), bool)).copy()
            left[np.flatnonzero(left)] = ~lost[units]
            kept[name, axis] = kept[name, axis - len(axes)] = left
