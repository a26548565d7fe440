"""A milder step: the same pass, leaving alone the nodes that it hurt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from effdl.graph.walk import all_nodes
from effdl.passes.base import NodePass
from effdl.recipe import Step


def spare(step: Step, nodes: Sequence[str], model: ir.Model) -> Step | None:
    """Return the step with these nodes on its ignore list.

    Args:
        step: a step whose pass takes node patterns.
        nodes: their names; those that the model does not have are left out.
        model: the model before the pass.

    Returns:
        None when there is no such node.
    """
    assert isinstance(step.pass_, NodePass)
    have = {n.name for n in all_nodes(model) if n.name}
    names = [n for n in nodes if n in have]
    if not names:
        return None
    ignore = (*step.pass_.ignore, *(_pattern(n) for n in names))
    return replace(
        step,
        pass_=step.pass_.model_copy(update={"ignore": ignore}),
        options={**step.options, "ignore": list(ignore)},
    )


def spared(step: Step, milder: Step) -> str:
    """Name the nodes that ``milder`` leaves alone and ``step`` does not."""
    assert isinstance(step.pass_, NodePass)
    assert isinstance(milder.pass_, NodePass)
    names = milder.pass_.ignore[len(step.pass_.ignore) :]
    shown = ", ".join(names[:3])
    return f"{len(names)} nodes ({shown}{', ...' if len(names) > 3 else ''})"


def _pattern(name: str) -> str:
    """A pattern of the recipe that matches this name only."""
    return f"re:^{re.escape(name)}$" if re.search(r"[*?\[\]]|^re:", name) else name
