"""Which form and rank every layer gets: within an error, a ratio, or a budget of MACs or time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from effdl.passes._low_rank_forms import thinned
from effdl.passes._low_rank_layer import Layer
from effdl.passes._low_rank_survey import Option, Survey
from effdl.passes.base import Context
from effdl.solve.knapsack import knapsack

MOST_ERROR = 0.5
"""No layer of a plan for the whole model loses more than this share of its outputs' variance."""
_UNTIMED_SHARE = 0.6
"""Where nothing can be timed, a layer is replaced by what has at most this share of its MACs."""
_TIMED = 4
"""Ranks of a form that are timed."""


@dataclass(frozen=True)
class Candidate:
    """A layer with what it could be replaced by."""

    node: ir.Node
    layer: Layer
    options: Sequence[Option]


def describe(option: Option) -> str:
    """Return form and rank in a few words."""
    if len(option.ranks) == 1:
        return f"rank {option.ranks[0]} of {option.full[0]} ({option.how})"
    ranks = " and ".join(map(str, option.ranks))
    return f"ranks {ranks} of {' and '.join(map(str, option.full))} ({option.how})"


def slower(option: Option, ms: float, layer_ms: float) -> str:
    """Return why an option that was timed is declined."""
    return f"{describe(option)} would take {ms:.3g} ms, the layer takes {layer_ms:.3g}"


def gains(survey: Survey, layer: Layer, option: Option, least: float) -> str:
    """Return why an option does not gain enough time, an empty string when it does."""
    found = survey.times(layer, [option])
    if found is None:
        if option.macs <= _UNTIMED_SHARE * layer.macs:
            return ""
        part = option.macs / layer.macs
        return f"{describe(option)} has {part:.0%} of the MACs; not timed, {_UNTIMED_SHARE:.0%} would do"
    return "" if found[1] <= (1 - least) * found[0] else slower(option, found[1], found[0])


def fastest(survey: Survey, candidate: Candidate, least: float) -> tuple[Option | None, str]:
    """Return the fastest of the cheapest options of each form, or None and why none gains."""
    cheapest: dict[str, Option] = {}
    for option in candidate.options:
        kept = cheapest.get(option.kind)
        if kept is None or option.macs < kept.macs:
            cheapest[option.kind] = option
    options = sorted(cheapest.values(), key=lambda o: o.macs)
    found = survey.times(candidate.layer, options)
    if found is None:
        reason = gains(survey, candidate.layer, options[0], least)
        return (None, reason) if reason else (options[0], "")
    ms, best = min(zip(found[1:], options, strict=True), key=lambda pair: pair[0])
    if ms > (1 - least) * found[0]:
        return None, slower(best, ms, found[0])
    return best, ""


def within_macs(
    candidates: Sequence[Candidate],
    room: float,
    refused: Callable[[Candidate, Option], str],
    ctx: Context,
) -> dict[ir.Node, Option]:
    """Return the options with the least sum of errors whose MACs fit.

    Args:
        candidates: layers with their options.
        room: MACs for all of them together.
        refused: says why an option does not gain enough, an empty string when it does.
        ctx: told what was declined.
    """
    reasons: dict[ir.Node, str] = {}
    open_options = {c.node: _front(c.options) for c in candidates}
    while True:  # ends: what is refused is never looked at again
        prices = [[float(o.macs) for o in open_options[c.node]] for c in candidates]
        chosen = _cheapest_error(candidates, open_options, prices, room)
        before = sum(map(len, open_options.values()))
        for c in candidates:
            option = chosen.get(c.node)
            reason = refused(c, option) if option is not None else ""
            if option is None or not reason:
                continue
            reasons[c.node] = reason
            own = [
                o for o in open_options[c.node] if o.kind == option.kind and o.macs < option.macs
            ]
            if own and refused(c, own[0]):  # nor does the cheapest gain
                own = []
            open_options[c.node] = [o for o in open_options[c.node] if o.kind != option.kind] + own
        if sum(map(len, open_options.values())) == before:
            break
    for c in candidates:
        if c.node not in chosen:
            ctx.skip(c.node, reasons.get(c.node, "the plan spends no error on it"))
    return chosen


def within_time(
    candidates: Sequence[Candidate],
    survey: Survey,
    share: float,
    least: float,
    ctx: Context,
) -> dict[ir.Node, Option] | None:
    """Return the options with the least sum of errors that bring the model's time down to a share.

    None where nothing can be timed.
    """
    if not candidates:
        return {}
    told = survey.model_ms([c.layer for c in candidates])
    if told is None:
        return None
    parts = {c.node: ms / told[0] for c, ms in zip(candidates, told[1], strict=True)}
    kept: dict[ir.Node, list[Option]] = {}
    costs: dict[ir.Node, list[float]] = {}
    before: dict[ir.Node, float] = {}
    reasons: dict[ir.Node, str] = {}
    for c in candidates:
        options = _few(c.options)
        found = survey.times(c.layer, options)
        if found is None:
            return None
        before[c.node] = parts[c.node]
        scale = parts[c.node] / found[0]
        good = [
            (o, ms)
            for o, ms in zip(options, found[1:], strict=True)
            if ms <= (1 - least) * found[0]
        ]
        kept[c.node], costs[c.node] = [o for o, _ in good], [ms * scale for _, ms in good]
        if not good:
            ms, best = min(zip(found[1:], options, strict=True), key=lambda pair: pair[0])
            reasons[c.node] = slower(best, ms, found[0])
    room = sum(before.values()) - (1 - share)
    chosen = _cheapest_error(candidates, kept, [costs[c.node] for c in candidates], room, before)
    for c in candidates:
        if c.node not in chosen:
            ctx.skip(c.node, reasons.get(c.node, "the plan spends no error on it"))
    return chosen


def _cheapest_error(
    candidates: Sequence[Candidate],
    options: Mapping[ir.Node, Sequence[Option]],
    costs: Sequence[Sequence[float]],
    room: float,
    before: Mapping[ir.Node, float] | None = None,
) -> dict[ir.Node, Option]:
    """Return the options taken; where even the cheapest are too much, those."""
    whole = [before[c.node] if before else float(c.layer.macs) for c in candidates]
    errors = [[0.0, *(o.error for o in options[c.node])] for c in candidates]
    prices = [[w, *cost] for w, cost in zip(whole, costs, strict=True)]
    taken = knapsack(errors, prices, room)
    if taken is None:
        taken = [min(range(len(p)), key=p.__getitem__) for p in prices]
    return {c.node: options[c.node][k - 1] for c, k in zip(candidates, taken, strict=True) if k}


def _front(options: Sequence[Option]) -> list[Option]:
    """Return the options of each form that no cheaper one of it beats, within the greatest error."""
    kept: list[Option] = []
    best: dict[str, float] = {}
    for option in sorted(options, key=lambda o: (o.macs, o.error)):
        if option.error < best.get(option.kind, MOST_ERROR):
            best[option.kind] = option.error
            kept.append(option)
    return kept


def _few(options: Sequence[Option]) -> list[Option]:
    """Return some of the best options of each form, from cheap to exact."""
    found: list[Option] = []
    front = _front(options)
    for kind in dict.fromkeys(o.kind for o in front):
        own = [o for o in front if o.kind == kind]
        found += [own[k] for k in thinned(range(len(own)), _TIMED)]
    return found
