"""Neighbours that become one node: concats, slices, views on a single axis, reductions, Gemm inputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effdl.graph.edit import forward, has_reference, remove_if_unused
from effdl.graph.scope import Scope, put_in_place
from effdl.graph.walk import int_attr, ints_attr, is_op, only_user, producer
from effdl.graph.weights import Names, add_initializer, constant

_REDUCTIONS = """
ArgMax ArgMin ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
ReduceSum ReduceSumSquare
"""
_REDUCE = tuple(_REDUCTIONS.split())


def merge_concats(node: ir.Node, scope: Scope, names: Names | None) -> str:
    """Take in a Concat along the same axis, leave out what is empty, undo a Split."""
    if not is_op(node, "Concat") or "axis" not in node.attributes:
        return ""
    source = _whole(node, scope)
    if source is not None and forward(node.outputs[0], source):
        remove_if_unused(node)
        return "puts together what a Split took apart, removed"
    inputs: list[ir.Value | None] = []
    gone: list[ir.Node] = []
    for value in node.inputs:
        inner = producer(value, "Concat")
        if value is not None and _is_empty(value, node, scope):
            continue
        if inner is not None and only_user(value) is node and _same_axis(inner, node, scope):
            inputs += inner.inputs
            gone.append(inner)
        else:
            inputs.append(value)
    if not inputs or inputs == list(node.inputs):
        return ""
    _set_inputs(node, inputs)
    for inner in gone:
        remove_if_unused(inner)
    return "takes in the Concat before it" if gone else "without what is empty"


def _set_inputs(node: ir.Node, inputs: list[ir.Value | None]) -> None:
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def _is_empty(value: ir.Value, node: ir.Node, scope: Scope) -> bool:
    shape = scope.shapes.static(value)
    axis = int_attr(node, "axis", 0)
    return shape is not None and -len(shape) <= axis < len(shape) and shape[axis] == 0


def _same_axis(one: ir.Node, other: ir.Node, scope: Scope) -> bool:
    if has_reference(one):
        return False
    a, b = int_attr(one, "axis", 1), int_attr(other, "axis", 1)
    if a == b:
        return True
    rank = scope.rank(one.outputs[0])
    return rank is not None and a % rank == b % rank


def _whole(node: ir.Node, scope: Scope) -> ir.Value | None:
    """Return what was split when the parts come back in order, all of them."""
    split = producer(node.inputs[0], "Split") if node.inputs else None
    if split is None or list(node.inputs) != list(split.outputs) or has_reference(split):
        return None
    a, b = int_attr(split, "axis", 0), int_attr(node, "axis", 0)
    rank = scope.rank(node.outputs[0])
    same = a == b or (rank is not None and a % rank == b % rank)
    return split.inputs[0] if same else None


def merge_slices(node: ir.Node, scope: Scope, names: Names | None) -> str:
    """Slice(Slice(x)) along other axes, when all that reads the first is such a Slice."""
    before = producer(node.inputs[0], "Slice") if node.inputs else None
    if before is None or not is_op(node, "Slice") or names is None:
        return ""
    output, source = before.outputs[0], before.inputs[0]
    if output.is_graph_output() or source is None:
        return ""
    rank = scope.rank(source)
    first = _ranges(before, scope, rank)
    if first is None or any(_joined(first, u.node, scope, rank) is None for u in output.uses()):
        return ""
    if any(u.node.graph is not before.graph for u in output.uses()):
        return ""
    joined = _joined(first, node, scope, rank)
    assert joined is not None
    _write_ranges(node, source, joined, scope.opset, names)
    remove_if_unused(before)
    return "takes in the Slice before it"


Ranges = dict[int, tuple[int, int, int]]


def _ranges(node: ir.Node, scope: Scope, rank: int | None) -> Ranges | None:
    """Start, end and step by axis, when they are constant and axes count from the front."""
    if not is_op(node, "Slice") or has_reference(node):
        return None
    facts = scope.facts
    starts, ends = facts.ints(node, 1, "starts"), facts.ints(node, 2, "ends")
    if starts is None or ends is None or len(starts) != len(ends):
        return None
    axes: tuple[int, ...] | None = tuple(range(len(starts)))
    steps: tuple[int, ...] | None = (1,) * len(starts)
    if "axes" in node.attributes or (len(node.inputs) > 3 and node.inputs[3] is not None):
        axes = facts.ints(node, 3, "axes")
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        steps = facts.ints(node, 4, "steps")
    if axes is None or steps is None or not len(axes) == len(steps) == len(starts):
        return None
    if min(axes, default=0) < 0:
        if rank is None:
            return None
        axes = tuple(a % rank for a in axes)
    if len(set(axes)) != len(axes):
        return None
    return {a: (s, e, t) for a, s, e, t in zip(axes, starts, ends, steps, strict=True)}


def _joined(first: Ranges, node: ir.Node, scope: Scope, rank: int | None) -> Ranges | None:
    second = _ranges(node, scope, rank)
    if second is None:
        return None
    joined = dict(first)
    for axis, (start, end, step) in second.items():
        if axis not in first:
            joined[axis] = (start, end, step)
            continue
        one_start, one_end, one_step = first[axis]
        # Along one axis only plain ranges from the front are put one into the other.
        if (one_step, step) != (1, 1) or min(one_start, one_end, start, end) < 0:
            return None
        joined[axis] = (one_start + start, min(one_end, one_start + end), 1)
    return joined


def _write_ranges(
    node: ir.Node, source: ir.Value, ranges: Ranges, opset: int, names: Names
) -> None:
    axes = sorted(ranges)
    columns = [axes[:0], *zip(*(ranges[a] for a in axes), strict=True)]
    starts, ends, steps = (list(c) for c in columns[1:])
    ends = [min(e, (1 << 63) - 1) for e in ends]
    if opset < 10:
        node.replace_input_with(0, source)
        for name, numbers in (("starts", starts), ("ends", ends), ("axes", axes)):
            node.attributes[name] = ir.AttrInt64s(name, numbers)
        return
    assert node.graph is not None
    inputs: list[ir.Value | None] = [source]
    for name, numbers in (("starts", starts), ("ends", ends), ("axes", axes), ("steps", steps)):
        if name == "steps" and set(steps) == {1}:
            continue
        base = f"{node.name or 'Slice'}_{name}"
        inputs.append(add_initializer(node.graph, names, base, np.array(numbers, np.int64)))
    _set_inputs(node, inputs)


def merge_axes(node: ir.Node, scope: Scope, names: Names | None) -> str:
    """Two Unsqueeze, or two Squeeze, in a row; a Gather of one element that is made a vector."""
    what = _vector_gather(node, scope, names)
    before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if what or before is None or not is_op(node, "Unsqueeze", "Squeeze"):
        return what
    if not is_op(before, node.op_type) or only_user(before.outputs[0]) is not node:
        return ""
    squeezes = is_op(node, "Squeeze")
    rank = scope.rank(before.inputs[0]) if before.inputs[0] is not None else None
    first = _axes(before, scope, rank, squeezes=squeezes)
    middle = None
    if rank is not None and first is not None:
        middle = rank - len(first) if squeezes else rank + len(first)
    second = _axes(node, scope, middle, squeezes=squeezes)
    if (
        first is None
        or second is None
        or has_reference(before)
        or (scope.opset >= 13 and not names)
    ):
        return ""
    inner, outer = (second, first) if squeezes else (first, second)
    total = max([*inner, *outer]) + len(inner) + len(outer) + 1
    left = [a for a in range(total) if a not in outer]
    axes = sorted([*outer, *(left[a] for a in inner)])
    if scope.opset >= 13:
        assert names is not None
        assert node.graph is not None
        base = f"{node.name or node.op_type}_axes"
        value = add_initializer(node.graph, names, base, np.array(axes, np.int64))
        node.replace_input_with(1, value)
    else:
        node.attributes["axes"] = ir.AttrInt64s("axes", axes)
    node.replace_input_with(0, before.inputs[0])
    remove_if_unused(before)
    return f"takes in the {node.op_type} before it"


def _axes(
    node: ir.Node, scope: Scope, rank: int | None, *, squeezes: bool
) -> tuple[int, ...] | None:
    """Axes counted from the front, None where they are not given or that would need the rank."""
    axes = scope.facts.ints(node, 1, "axes")
    if not axes:
        return None
    if min(axes) < 0:
        if rank is None:
            return None
        full = rank if squeezes else rank + len(axes)
        axes = tuple(a % full for a in axes)
    return tuple(sorted(axes)) if len(set(axes)) == len(axes) else None


def _vector_gather(node: ir.Node, scope: Scope, names: Names | None) -> str:
    """Unsqueeze(Gather(v, 3)) of a vector v is Gather(v, [3])."""
    gather = producer(node.inputs[0], "Gather") if node.inputs else None
    if gather is None or not is_op(node, "Unsqueeze") or names is None or has_reference(gather):
        return ""
    if only_user(gather.outputs[0]) is not node or gather.graph is not node.graph:
        return ""
    index = constant(gather.inputs[1])
    data = gather.inputs[0]
    if index is None or index.ndim or data is None or scope.rank(data) != 1:
        return ""
    if scope.facts.ints(node, 1, "axes") not in ((0,), (-1,)):
        return ""
    assert gather.graph is not None
    base = f"{gather.name or 'Gather'}_indices"
    value = add_initializer(gather.graph, names, base, index.reshape(1).astype(np.int64))
    put_in_place(node, names, "Gather", [data, value], list(gather.attributes.values()))
    remove_if_unused(node)
    remove_if_unused(gather)
    return "the Gather before it gives a vector by itself"


def merge_reduction(node: ir.Node, scope: Scope, names: Names | None) -> str:
    """A reduction that keeps or drops its axes by itself needs no Squeeze or Unsqueeze behind it."""
    before = producer(node.inputs[0], *_REDUCE) if node.inputs else None
    if before is None or names is None or has_reference(before):
        return ""
    if not is_op(node, "Squeeze", "Unsqueeze"):
        return ""
    if only_user(before.outputs[0]) is not node or before.graph is not node.graph:
        return ""
    keeps = bool(int_attr(before, "keepdims", 1))
    if keeps != is_op(node, "Squeeze"):
        return ""
    rank = scope.rank(before.inputs[0]) if before.inputs[0] is not None else None
    if is_op(before, "ArgMax", "ArgMin"):
        reduced: tuple[int, ...] | None = (int_attr(before, "axis", 0),)
    else:
        reduced = scope.facts.ints(before, 1, "axes") if len(before.inputs) > 1 else None
        if "axes" in before.attributes:
            reduced = ints_attr(before, "axes")
    moved = scope.facts.ints(node, 1, "axes")
    if not reduced or not moved or not _equal_axes(reduced, moved, rank):
        return ""
    attributes = [a for a in before.attributes.values() if a.name != "keepdims"]
    attributes.append(ir.AttrInt64("keepdims", int(not keeps)))
    put_in_place(node, names, before.op_type, list(before.inputs), attributes)
    remove_if_unused(node)
    remove_if_unused(before)
    return f"the {before.op_type} before it does this by itself"


def _equal_axes(a: tuple[int, ...], b: tuple[int, ...], rank: int | None) -> bool:
    if min(*a, *b, 0) < 0:
        if rank is None or not rank:
            return sorted(a) == sorted(b) and max(*a, *b) < 0
        a, b = tuple(i % rank for i in a), tuple(i % rank for i in b)
    return sorted(a) == sorted(b)


def merge_into_gemm(node: ir.Node, scope: Scope, names: Names | None) -> str:
    """Gemm turns its first two inputs by itself, when all that reads the Transpose is such a Gemm."""
    if not is_op(node, "Gemm"):
        return ""
    for index, attribute in ((0, "transA"), (1, "transB")):
        turned = producer(node.inputs[index], "Transpose")
        if turned is None or has_reference(turned) or turned.inputs[0] is None:
            continue
        output = turned.outputs[0]
        if ints_attr(turned, "perm", (1, 0)) != (1, 0) or output.is_graph_output():
            continue
        if not all(is_op(u.node, "Gemm") and u.idx < 2 for u in output.uses()):
            continue
        flag = 1 - int_attr(node, attribute, 0)
        node.attributes[attribute] = ir.AttrInt64(attribute, flag)
        node.replace_input_with(index, turned.inputs[0])
        remove_if_unused(turned)
        return "turns its input by itself"
    return ""
