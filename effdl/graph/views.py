"""Chains of operators that only change the shape: Reshape, Flatten, Squeeze, Unsqueeze."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effdl.graph.edit import can_forward, forward, has_reference, remove_if_unused
from effdl.graph.folding import freed_bytes
from effdl.graph.shapes import Shapes
from effdl.graph.walk import int_attr, is_op, only_user
from effdl.graph.weights import Names, add_initializer, constant

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_REVERSE = {"Squeeze": "Unsqueeze", "Unsqueeze": "Squeeze"}


def merge_views(node: ir.Node, shapes: Shapes, names: Names) -> str:
    """Merge ``node`` with the shape operator before it; return what was done, "" for nothing."""
    before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if before is None or not (is_op(node, *VIEWS) and is_op(before, *VIEWS)):
        return ""
    source = before.inputs[0]
    if source is None or has_reference(before):
        return ""
    if _undoes(node, before, shapes) and forward(node.outputs[0], source):
        remove_if_unused(node)
        remove_if_unused(before)
        return f"undoes the {before.op_type} before it, both removed"
    if only_user(before.outputs[0]) is not node:
        return ""
    if _rewire(node, source):
        remove_if_unused(before)
        return f"takes in the {before.op_type} before it"
    goal = _goal(shapes, node.outputs[0])
    if goal is None or _cost(node, goal) > freed_bytes(node):
        return ""
    return _replace(node, before, source, goal, names)


def _undoes(node: ir.Node, before: ir.Node, shapes: Shapes) -> bool:
    source = before.inputs[0]
    shape = shapes.static(source)
    if shape is not None and shape == shapes.static(node.outputs[0]):
        return True
    if not is_op(before, _REVERSE.get(node.op_type, "")):
        return False
    one, other = _axes(node), _axes(before)
    return one is not None and one == other


def _axes(node: ir.Node) -> tuple[int, ...] | None:
    attribute = node.attributes.get("axes")
    if attribute is not None:
        axes = tuple(attribute.as_ints())
    else:
        array = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if array is None:
            return None
        axes = tuple(int(i) for i in array.ravel())
    # Mixed signs would need the rank to be compared.
    return tuple(sorted(axes)) if len({a < 0 for a in axes}) == 1 else None


def _rewire(node: ir.Node, source: ir.Value) -> bool:
    """Let a Reshape to a constant shape without zeros read ``source``: it needs only the elements."""
    if not is_op(node, "Reshape") or len(node.inputs) < 2:
        return False
    goal = constant(node.inputs[1])
    if goal is None or (0 in goal and not int_attr(node, "allowzero", 0)):
        return False
    node.replace_input_with(0, source)
    return True


def _goal(shapes: Shapes, output: ir.Value) -> tuple[int, ...] | None:
    dims = shapes.of(output)
    if dims is None or 0 in dims:
        return None
    goal = tuple(d if isinstance(d, int) else -1 for d in dims)
    return goal if goal.count(-1) <= 1 else None


def _cost(node: ir.Node, goal: tuple[int, ...]) -> int:
    name = len(f"{node.name or node.op_type}_shape")
    parts = [node.name, node.outputs[0].name, "Reshape"]
    return 8 * len(goal) + 24 + 2 * name + sum(len(p or "") + 2 for p in parts) + 8


def _replace(
    node: ir.Node, before: ir.Node, source: ir.Value, goal: tuple[int, ...], names: Names
) -> str:
    graph, old = node.graph, node.outputs[0]
    assert graph is not None
    what = f"{before.op_type} and {node.op_type} became one Reshape"
    shape = add_initializer(
        graph, names, f"{node.name or node.op_type}_shape", np.array(goal, np.int64)
    )
    merged = ir.Node(
        "",
        "Reshape",
        [source, shape],
        name=names.fresh(f"{node.name or node.op_type}_reshape"),
        outputs=[
            ir.Value(name=names.fresh(old.name or "reshaped"), type=old.type, shape=old.shape)
        ],
    )
    graph.insert_before(node, merged)
    assert can_forward(old, merged.outputs[0])
    forward(old, merged.outputs[0])
    remove_if_unused(node)
    remove_if_unused(before)
    return what
