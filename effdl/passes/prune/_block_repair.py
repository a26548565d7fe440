"""A model without blocks, with the layers that are left fitted to make up for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.graph.weights import Names
from effdl.passes._fit import fit, learnable
from effdl.passes.base import Context
from effdl.passes.prune._block_edit import Cut, drop, joins
from effdl.passes.prune._block_greedy import Gone
from effdl.passes.prune._channel_trial import Trials


@dataclass(frozen=True)
class Outcome:
    """A model that lost blocks.

    Args:
        gone: as it was done: without means where a layer before the block learned them.
        error: of its outputs.
        fitted: how many layers were fitted.
    """

    model: ir.Model
    gone: tuple[Gone, ...]
    error: float
    fitted: int = 0


def largest(
    model: ir.Model,
    gone: Sequence[Gone],
    feeds: Feeds | None,
    trials: Trials,
    ctx: Context,
    limit: float | None,
) -> Outcome | None:
    """Return what the model is without as many of the units as the limit allows, None where it allows none.

    Args:
        model: is not changed.
        gone: units in the order in which they go.
        feeds: to fit the layers on; None leaves them as they are.
        trials: measures the outputs.
        ctx: of the pass.
        limit: error of the outputs that is allowed; None for any.
    """
    best, low, high = None, 0, len(gone)
    count = high
    while low < high:
        outcome = without(model, gone[:count], feeds, trials, ctx)
        if limit is None or outcome.error <= limit:
            best, low = outcome, count
        else:
            high = count - 1
        count = (low + high + 1) // 2
    return best


def without(
    model: ir.Model, gone: Sequence[Gone], feeds: Feeds | None, trials: Trials, ctx: Context
) -> Outcome:
    """Return what a model is without blocks; it is not changed. See ``largest``."""
    plain = Outcome(_bare(model, gone, absorb=False).model, tuple(gone), gone[-1].error)
    if feeds is None:
        return plain
    plan = _bare(model, gone, absorb=True)
    fitted = fit(
        model,
        plan.model,
        {},
        feeds,
        threads=ctx.target.threads,
        max_bytes=ctx.max_bytes,
        changed=plan.changed,
        wanted=plan.wanted,
    )
    error = trials.error(plan.model)
    if not fitted or error >= plain.error:
        return plain
    return Outcome(plan.model, plan.gone, error, len(fitted))


@dataclass(frozen=True)
class _Bare:
    """A copy of a model without blocks.

    Args:
        gone: as it was done.
        changed: values that hold something else.
        wanted: what values should be like, see ``fit``.
    """

    model: ir.Model
    gone: tuple[Gone, ...]
    changed: frozenset[str]
    wanted: dict[str, str]


def _bare(model: ir.Model, gone: Sequence[Gone], *, absorb: bool) -> _Bare:
    """Take blocks out of a copy, with ``absorb`` without means where the layer before can learn them."""
    copy = model.clone()
    names, changed, wanted, done = Names(copy), set[str](), dict[str, str](), list[Gone]()
    for unit in gone:
        for cut in unit.cuts:
            join = joins(copy).get(cut.out)
            short = join.inputs[1 - cut.side] if join is not None else None
            changed.add((short.name or "") if short is not None else "")
            means = unit.means and not (absorb and _learnable(copy, cut))
            made = drop(copy, cut, names, mean=means)
            wanted |= {name: wanted.get(like, like) for name, like in made.items()}
            done.append(replace(unit, cuts=(cut,), means=means))
    return _Bare(copy, tuple(done), frozenset(changed | set(wanted)), wanted)


def _learnable(model: ir.Model, cut: Cut) -> bool:
    """Whether a layer before a block can learn to make its sum."""
    copy = model.clone()
    made = drop(copy, cut, Names(copy), mean=False)
    return bool(made) and not learnable(copy).isdisjoint(made)
