"""Node patterns of a step against a model."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from effdl.errors import RecipeError, nearest
from effdl.graph.walk import all_nodes
from effdl.passes.base import NodePass
from effdl.recipe.model import Step


def match_patterns(step: Step, *models: ir.Model) -> None:
    """Refuse a node pattern of ``step`` that names nothing in any of ``models``.

    Raises:
        RecipeError: with the nearest node name or op type.
    """
    for error in pattern_errors(step, *models):
        raise error


def pattern_errors(step: Step, *models: ir.Model) -> Iterator[RecipeError]:
    """Yield an error for each node pattern of ``step`` that names nothing in any of ``models``."""
    if not isinstance(step.pass_, NodePass):
        return
    for pattern in step.pass_.unmatched(models):
        nodes = [n for m in models for n in all_nodes(m)]
        names = {n.op_type for n in nodes} | {n.name for n in nodes if n.name}
        hint = nearest(pattern, names)
        if not hint.startswith("did you mean"):
            hint = "effdl inspect MODEL --nodes lists the names"
        yield RecipeError(
            f"{step.name}: the pattern '{pattern}' matches no node of the model",
            hint=hint,
            where=step.where,
        )
