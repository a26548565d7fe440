"""Range on vectors of one element, which ONNX Runtime refuses as soon as it can see their shape."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from effdl.graph.shapes import Shapes
from effdl.graph.walk import all_nodes, is_op
from effdl.graph.weights import Names


def make_ranges_scalar(
    model: ir.Model, shapes: Shapes, touch: Callable[[ir.Node, str], None]
) -> int:
    """Give each Range the scalars that it asks for; returns the number of inputs that changed.

    Exporters write vectors of one element there. Such a model runs only while shape inference does
    not get that far, which every simplification of what stands before may change.
    """
    names: Names | None = None
    changes = 0
    for node in list(all_nodes(model)):
        if not is_op(node, "Range") or node.graph is None:
            continue
        for index, value in enumerate(node.inputs):
            if value is None or shapes.of(value) != (1,):
                continue
            names = names or Names(model)
            squeeze = ir.Node(
                "",
                "Squeeze",
                [value],
                name=names.fresh(f"{node.name or 'Range'}_scalar"),
                outputs=[ir.Value(name=names.fresh(f"{value.name}_scalar"))],
            )
            node.graph.insert_before(node, squeeze)
            node.replace_input_with(index, squeeze.outputs[0])
            touch(node, "its input is made a scalar")
            changes += 1
    return changes
