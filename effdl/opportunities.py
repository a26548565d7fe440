"""What every pass would find in a model, tried on copies."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from pydantic import ValidationError

from effdl import passes
from effdl.errors import EffdlError
from effdl.graph.scratch import scratch
from effdl.graph.walk import opset
from effdl.passes.base import Context, Pass, PassLog
from effdl.report import Opportunity
from effdl.runtime.target import parse_target


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
    return changes, "" if changes else _reason(ctx.log)


def _reason(log: PassLog) -> str:
    return log.skipped[0][1] if log.skipped else "nothing to do"
