"""Drops blocks of one model until a goal is reached, and lets the layers left make up for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.graph.io import METADATA_PREFIX
from effdl.observe.batches import batched
from effdl.observe.channels import channels
from effdl.passes.base import Context
from effdl.passes.prune._block_cost import Cost, latency, macs
from effdl.passes.prune._block_edit import Cut, cut_of
from effdl.passes.prune._block_find import Block, blocks, layers
from effdl.passes.prune._block_greedy import Gone, Greedy
from effdl.passes.prune._block_repair import Outcome, largest
from effdl.passes.prune._channel_trial import Trials

MARK = METADATA_PREFIX + "prune_blocks"
_TRIAL_FEEDS = 12
_NOTHING_LEFT = 1.0
"""Error at which outputs say nothing of what they were, so that nothing more can be ranked by it."""


@dataclass(frozen=True)
class Goal:
    """What is to be reached; see the options of ``prune_blocks``.

    Args:
        kind: ``latency`` or ``macs``: a share that is to be left; ``count``: how many units are to go;
            ``error``: as many as the limit allows.
        amount: of it; unused for ``error``.
        limit: error of the outputs that is allowed in the end; None for any.
        whole_layers: attention goes together with what is behind it.
        repair: fit the layers that are left.
    """

    kind: str
    amount: float
    limit: float | None
    whole_layers: bool
    repair: bool


class Run:
    """The dropping of blocks from one model.

    Args:
        model: is changed.
        ctx: of the pass.
        goal: what is to be reached.
        refusal: why the options have a block stay, empty where they do not.
    """

    def __init__(
        self, model: ir.Model, ctx: Context, goal: Goal, refusal: Callable[[Block], str]
    ) -> None:
        self._model = model
        self._ctx = ctx
        self._goal = goal
        self._refusal = refusal

    def units(self) -> list[tuple[Block, ...]]:
        """Return what may go at once, and log what may not."""
        free = []
        for block in blocks(self._model):
            reason = block.reason or self._refusal(block)
            if reason:
                self._ctx.skip(block.name, reason)
            else:
                free.append(block)
        return layers(free) if self._goal.whole_layers else [(b,) for b in free]

    def run(self) -> list[Gone]:
        """Drop; return what went, in order."""
        ctx = self._ctx
        found = self.units()
        if not found:
            return []
        if ctx.feeds is None or not len(ctx.feeds):
            for block in (b for u in found for b in u):
                ctx.skip(block.name, "what its loss does only data tells: optimize --data FILE.npz")
            return []
        feeds = batched(self._model, ctx.feeds, threads=ctx.target.threads)
        trials = Trials(self._model, feeds.some(_TRIAL_FEEDS), ctx.target)
        if not trials.wanted[0]:
            ctx.skip("model", "no output is of floating-point numbers: harm cannot be measured")
            return []
        gone = self._choose(self._cuts(found, feeds), trials)
        if not gone:
            return []
        fit_on = feeds if self._goal.repair and len(feeds) > 1 else None
        outcome = largest(self._model, gone, fit_on, trials, ctx, self._goal.limit)
        return self._told(gone, outcome)

    def _told(self, gone: Sequence[Gone], outcome: Outcome | None) -> list[Gone]:
        """Let the model be what came out, and say what did not go."""
        ctx, goal = self._ctx, self._goal
        left = gone if outcome is None else gone[_units(gone, outcome) :]
        for cut in (c for g in left for c in g.cuts):
            ctx.skip(cut.name, f"without it the error of the outputs is above {goal.limit:g}")
        if outcome is None:
            return []
        ctx.note("error", round(outcome.error, 4))
        ctx.note("error_without_repair", round(gone[_units(gone, outcome) - 1].error, 4))
        ctx.note("layers_fitted", outcome.fitted)
        self._model.graph = outcome.model.graph
        return list(outcome.gone)

    def _cuts(self, found: Sequence[tuple[Block, ...]], feeds: Feeds) -> list[tuple[Cut, ...]]:
        ctx = self._ctx
        seen = channels(
            self._model,
            {b.branch.name or "": b.axis for u in found for b in u},
            feeds,
            threads=ctx.target.threads,
            max_bytes=ctx.max_bytes,
        )
        means = {name: s.mean for name, s in seen.items()}
        return [tuple(cut_of(b, means.get(b.branch.name or "")) for b in u) for u in found]

    def _choose(self, units: Sequence[tuple[Cut, ...]], trials: Trials) -> list[Gone]:
        """Return units in the order in which they go; none where the goal is out of reach."""
        goal, ctx = self._goal, self._ctx
        if goal.kind == "count" and goal.amount > len(units):
            ctx.skip("model", f"{goal.amount:.0f} are to go, but only {len(units)} may")
            return []
        timed = goal.kind == "latency"
        cost = latency(self._model, units, ctx) if timed else macs(self._model)
        least = cost.left(c for u in units for c in u)
        if goal.kind in ("latency", "macs") and least > goal.amount:
            ctx.skip(
                "model",
                f"{least:.0%} are left without all that may go, {goal.amount:.0%} are asked for",
            )
            return []
        greedy = Greedy(self._model, trials, cost.gains)
        greedy.run(units, lambda g: self._enough(g, cost))
        return greedy.gone

    def _enough(self, greedy: Greedy, cost: Cost) -> bool:
        goal = self._goal
        if goal.kind == "error":
            most = _NOTHING_LEFT if goal.repair else goal.limit
            return most is not None and greedy.error > most
        if goal.kind == "count":
            return len(greedy.gone) >= goal.amount
        cuts = [c for g in greedy.gone for c in g.cuts]
        return bool(cuts) and cost.reached(goal.amount, cuts, greedy.now, self._ctx)


def _units(gone: Sequence[Gone], outcome: Outcome) -> int:
    """Return how many of the units went."""
    blocks_gone, count = len(outcome.gone), 0
    while blocks_gone > 0:
        blocks_gone -= len(gone[count].cuts)
        count += 1
    return count
