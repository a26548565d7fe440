"""Shapes that nodes are told as numbers: what they say, and how they are written for other lengths."""

from __future__ import annotations

import onnx_ir as ir

from effdl.graph.probes import Probes
from effdl.graph.walk import int_attr, is_op
from effdl.graph.weights import constant


def wanted_shape(probes: Probes, node: ir.Node) -> list[int] | None:
    """Return the shape that a Reshape or Expand makes, as constants of a Reshape could say it.

    0 stands for the length of the same axis of the input, -1 for what is left; a computed shape that
    cannot be said so is None.
    """
    told = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if told is not None:
        numbers = [int(n) for n in told.reshape(-1)]
        if is_op(node, "Reshape") and int_attr(node, "allowzero", 0) and 0 in numbers:
            return None
        return numbers
    if not is_op(node, "Reshape"):
        return None
    before, after = probes.of(node.inputs[0]), probes.of(node.outputs[0])
    if before is None or after is None:
        return None
    found: list[int] = []
    for k in range(len(after[0])):
        lengths = [s[k] for s in after]
        if len(set(lengths)) == 1 and lengths[0] > 0:
            found.append(lengths[0])
        elif k < len(before[0]) and lengths == [s[k] for s in before]:
            found.append(0)
        else:
            found.append(-1)
    return found if found.count(-1) <= 1 else None
