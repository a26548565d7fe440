"""What passes would find in a model, tried on copies: all of them in short, or one in full."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from pydantic import ValidationError

from effdl import passes
from effdl.data.random import random_feeds
from effdl.errors import EffdlError, ModelError
from effdl.graph.channels import channels
from effdl.graph.clean import clean, name_nodes
from effdl.graph.scratch import scratch
from effdl.graph.walk import opset
from effdl.measure.verify import run_all
from effdl.passes.base import Context, Pass, PassLog
from effdl.recipe import Step
from effdl.recipe.patterns import match_patterns
from effdl.report import ChannelGroup, ExplainReport, Opportunity
from effdl.runtime.target import Target, parse_target


def opportunities(model: ir.Model) -> tuple[Opportunity, ...]:
    """Try each pass with its default options on a copy of ``model``; nothing is run or measured.

    Passes that need options to do anything (``set_shapes``) are left out.
    """
    found = []
    with scratch() as folder:
        for name in passes.names():
            cls = passes.get(name)
            try:
                step = cls()
            except ValidationError:  # it has a required option
                continue
            count, reason = _try(step, model, folder)
            found.append(Opportunity(name, cls.lossy, cls.needs_data, count, reason))
    return tuple(found)


def channel_groups(model: ir.Model) -> tuple[ChannelGroup, ...]:
    """Return the groups of channels of a model once it is cleaned up, as recipes do first."""
    twin = model.clone()
    name_nodes(twin)
    with scratch() as folder:
        _simplify(twin, parse_target("cpu"), folder)
    return tuple(
        ChannelGroup(
            g.name,
            len(g),
            g.width,
            tuple(n.name or n.op_type for n in g.makers),
            tuple(n.name or n.op_type for n in g.readers),
            g.reason,
        )
        for g in channels(twin).groups
    )


def explain(
    step: Step, model: ir.Model, path: str, target: Target, *, simplify: bool
) -> ExplainReport:
    """Try one pass on a copy of ``model`` and tell what it would do to each node, and why not.

    Args:
        step: the pass with its options.
        model: the model; stays as it is.
        path: what it is called in the report.
        target: where the result is to run.
        simplify: clean the copy up first, as recipes do; nodes that go are not in the report.

    Raises:
        RecipeError: a pattern of the step matches no node.
    """
    twin = model.clone()
    with scratch() as folder:
        if simplify:
            _simplify(twin, target, folder)
        match_patterns(step, model, twin)
        ctx = Context(target, None, 0, folder, PassLog())
        changes, reason = 0, step.pass_.too_old(twin)
        if not reason and step.pass_.needs_data:
            names = step.pass_.candidates(twin, ctx) or []
            known = dict(ctx.log.touched)
            ctx.log.touched.extend((n, "candidate") for n in names if n not in known)
            changes = len(names)
        elif not reason:
            changes = _run(step, model, twin, ctx)
    log = ctx.log
    if not changes and not reason:
        reason = "nothing in the model is a candidate" if not log.skipped else "no candidate fits"
    return ExplainReport(
        step.name,
        dict(step.options),
        path,
        simplify,
        changes,
        tuple(log.touched),
        tuple(log.skipped),
        reason,
    )


def _simplify(model: ir.Model, target: Target, folder: Path) -> None:
    """Clean a model up, as recipes do first."""
    passes.get("simplify")().run(model, Context(target, None, 0, folder, PassLog()))
    clean(model)


def _run(step: Step, model: ir.Model, twin: ir.Model, ctx: Context) -> int:
    try:
        return step.pass_.run(twin, ctx)
    except EffdlError:
        raise
    except Exception as e:
        try:
            here = parse_target("cpu")
            run_all(model, random_feeds(model, count=1, target=here), here)
        except EffdlError as why:  # the checker takes graphs that no runtime does
            raise ModelError(
                f"{step.name} fails on this model ({type(e).__name__}: {e}), which does not run as it is "
                f"either: {why.message}"
            ) from e
        raise


def _try(step: Pass, model: ir.Model, folder: Path) -> tuple[int, str]:
    ctx = Context(parse_target("cpu"), None, 0, folder, PassLog())
    have = opset(model)
    short = have and have < step.min_opset
    names = step.candidates(model, ctx)
    if names is not None:
        hint = f" after convert_opset to {step.min_opset}" if short and names else ""
        return len(names), _reason(ctx.log) if not names else hint
    if short:
        return 0, f"needs opset {step.min_opset}, the model has {have}"
    try:
        changes = step.run(model.clone(), ctx)
    except EffdlError as e:
        return 0, e.message
    except (
        Exception
    ) as e:  # graphs that the checker takes and no runtime does: the rest still counts
        return 0, f"failed: {type(e).__name__}: {e}"
    return changes, "" if changes else _reason(ctx.log)


def _reason(log: PassLog) -> str:
    return log.skipped[0][1] if log.skipped else "nothing to do"
