"""Resize and Shape in another order of axes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from effdl.graph.transposes import Ask, Declined, Perm, Plan, inverse, moved
from effdl.graph.transposes_axes import Edit, edits, given_axes, one_tensor, put_input, put_ints
from effdl.graph.walk import int_attr, str_attr
from effdl.graph.weights import Names, add_initializer, constant, replace_weight

_SPATIAL = {2: 2, 3: 2, 4: 2, 5: 3}
"""Number of last axes that ONNX Runtime interpolates, by rank."""


def resize(ask: Ask) -> Plan:
    """Resize and Upsample, where ONNX Runtime has a kernel for the new order."""
    ask.on_data()
    node, rank = ask.node, len(ask.perm)
    dims = ask.dims(0)
    axes = given_axes(ask, len(node.inputs), rank)
    over = axes if axes is not None else tuple(range(rank))
    changes: list[Edit] = []
    scaled: set[int] = set()
    for index, width in _sizes(ask):
        numbers = ask.array(index, "sizes")
        if not numbers.size:
            continue
        if numbers.size != width * len(over):
            raise Declined("its sizes are not one for each axis")
        if width == 1:
            is_scale = numbers.dtype.kind == "f"
            scaled |= {
                a
                for a, n in zip(over, numbers.ravel(), strict=True)
                if (float(n) != 1 if is_scale else dims[a] != int(n))
            }
        goal = numbers.reshape(width, -1)[:, list(ask.perm)].ravel() if axes is None else numbers
        if not np.array_equal(goal, numbers):
            changes.append(put_input(index, goal))
    if "scales" in node.attributes:
        factors = [float(s) for s in node.attributes["scales"].as_floats()]
        if len(factors) != rank:
            raise Declined("its scales are not one for each axis")
        scaled |= {a for a, s in enumerate(factors) if s != 1}
        changes.append(_put_scales([factors[a] for a in ask.perm]))
    if str_attr(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        scaled = set(over)
    _has_kernel(ask, scaled)
    if axes is not None and moved(axes, ask.perm) != axes:
        changes.append(put_ints("axes", moved(axes, ask.perm)))
    return one_tensor(ask, ask.perm, ask.perm, edits(*changes))


def _sizes(ask: Ask) -> list[tuple[int, int]]:
    """Inputs that have numbers for each axis, and how many for each."""
    node = ask.node
    if node.op_type == "Upsample" or ask.opset < 11:
        slots = [(1, 1)]
    else:
        crop = str_attr(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize"
        slots = [(1, 2)] * crop + [(2, 1), (3, 1)]
    return [(i, width) for i, width in slots if ask.given(i)]


def _has_kernel(ask: Ask, scaled: set[int]) -> None:
    mode = str_attr(ask.node, "mode", "nearest")
    if mode == "nearest" or not scaled:
        return
    rank = len(ask.perm)
    first = rank - _SPATIAL.get(rank, 0)
    at = moved(sorted(scaled), ask.perm)
    if any(a < first for a in at):
        raise Declined(f"{mode} sizes are only changed on the last axes by ONNX Runtime")


def _put_scales(factors: Sequence[float]) -> Edit:
    def edit(node: ir.Node, names: Names) -> None:
        node.attributes["scales"] = ir.AttrFloat32s("scales", list(factors))

    return edit


def shape(ask: Ask) -> Plan:
    """Shape: it reads any order, and a Gather behind it restores its own."""
    if ask.output or ask.node.outputs[0].is_graph_output():
        raise Declined("its output is that of the graph or has no axes to move")
    node, rank = ask.node, len(ask.perm)
    at = inverse(ask.perm)
    end = node.attributes.get("end")
    picked = at[slice(int_attr(node, "start", 0), None if end is None else end.as_int())]
    free = _gather_behind(node, at, rank) if "start" not in node.attributes and not end else None
    if free is not None:
        return Plan((ask.perm,), (None,), free)
    return Plan((ask.perm,), (None,), _gather_order(picked), nodes=1)


def _gather_behind(node: ir.Node, at: Perm, rank: int) -> Edit | None:
    """Renumber in the Gather that is the only reader, where that has constant indices."""
    out = node.outputs[0]
    uses = list(out.uses())
    if out.is_graph_output() or len(uses) != 1:
        return None
    reader = uses[0].node
    indices = constant(reader.inputs[1]) if reader.op_type == "Gather" else None
    if (
        indices is None
        or reader.domain not in ("", "ai.onnx")
        or uses[0].idx != 0
        or reader.graph is not node.graph
        or int_attr(reader, "axis", 0) not in (0, -1)
        or any(not -rank <= int(i) < rank for i in indices.ravel())
    ):
        return None
    goal = np.array(at, indices.dtype)[indices.astype(np.int64) % rank]

    def edit(node: ir.Node, names: Names) -> None:
        replace_weight(reader, 1, np.asarray(goal), names)

    return edit


def _gather_order(picked: Sequence[int]) -> Edit:
    def edit(node: ir.Node, names: Names) -> None:
        graph, old = node.graph, node.outputs[0]
        assert isinstance(graph, ir.Graph)
        uses = list(old.uses())
        node.attributes.pop("start", None)
        node.attributes.pop("end", None)
        base = f"{node.name or 'Shape'}_order"
        order = add_initializer(graph, names, base, np.array(picked, np.int64))
        out = ir.Value(name=names.fresh(base), type=old.type, shape=old.shape)
        gather = ir.Node("", "Gather", [old, order], name=names.fresh(base), outputs=[out])
        graph.insert_after(node, gather)
        old.shape = None
        for use in uses:
            use.node.replace_input_with(use.idx, out)

    return edit
