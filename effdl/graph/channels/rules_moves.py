"""Channels through operators that only move numbers: Reshape, Transpose, Concat, Split and their like."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir

from effdl.graph.channels.shape_inputs import wanted_shape
from effdl.graph.channels.trace import Trace, barrier, told
from effdl.graph.walk import int_attr, ints_attr, is_op
from effdl.graph.weights import constant

_LARGEST = 1 << 24
Vector = tuple[int, ...]
Part = tuple[list[int], list[int]]


def reshape(trace: Trace, node: ir.Node) -> None:
    """Follow the axes that a Reshape, Flatten, Squeeze or Unsqueeze keeps, merges and splits."""
    x, y = node.inputs[0], node.outputs[0]
    before, after = _dims(trace, x), _dims(trace, y)
    if before is None or after is None:
        barrier(trace, node, told(node, "its shape is not known"))
        return
    if is_op(node, "Reshape") and wanted_shape(trace.probes, node) is None:
        barrier(trace, node, told(node, "its shape is computed: simplify the model first"))
        return
    parts = _factors(before, after)
    if parts is None:
        barrier(trace, node, told(node, "it mixes axes"))
        return
    for ins, outs in parts:
        _fold(trace, node, [i for i in ins if set(before[i]) != {1}], outs, before, after)


def _dims(trace: Trace, value: ir.Value | None) -> list[Vector] | None:
    sizes = trace.sizes(value) if value is not None else ()
    if not sizes:
        return None
    wide = sizes * (len(trace.probes.shapes) if len(sizes) == 1 else 1)
    return [tuple(s[k] for s in wide) for k in range(len(sizes[0]))]


def _factors(before: list[Vector], after: list[Vector]) -> list[Part] | None:
    """Return which axes become which: the finest groups of neighbours with equal products."""
    found: list[Part] = []
    i = j = 0
    while i < len(before) or j < len(after):
        ins: list[int] = []
        outs: list[int] = []
        left = right = np.ones(len((before or after)[0]), np.int64)
        while True:
            if i < len(before) and (not ins or (left < right).all()):
                ins.append(i)
                left = left * np.array(before[i])
                i += 1
            elif j < len(after) and (not outs or (left > right).all()):
                outs.append(j)
                right = right * np.array(after[j])
                j += 1
            elif (left == right).all():
                break
            else:
                return None
            if ins and outs and (left == right).all():
                break
        found.append((ins, outs))
    return found


def _fold(
    trace: Trace,
    node: ir.Node,
    ins: list[int],
    outs: list[int],
    before: list[Vector],
    after: list[Vector],
) -> None:
    """Tie the axis of each side that takes the channels; the other axes of a group stay."""
    x, y = node.inputs[0], node.outputs[0]
    outs = [o for o in outs if set(after[o]) != {1}]
    if len(ins) == len(outs) == 1:
        trace.tie(trace.axis(x, ins[0]), trace.axis(y, outs[0]))
        return
    sources = [trace.axis(x, i) for i in ins]
    goals = [trace.axis(y, o) for o in outs]
    why = told(node, "it is folded with another axis")
    static = all(a is not None for a in (*sources, *goals))
    if not static or not sources or not goals or prod(before[i][0] for i in ins) > _LARGEST:
        for axis in (*sources, *goals):
            trace.stop(axis, why)
        return
    choices = len(sources) * len(goals)
    trace.splits[node] = max(trace.splits.get(node, 1), choices)
    from_, to = divmod(trace.choices.get(node, 0) % choices, len(goals))
    flat = np.arange(prod(before[i][0] for i in ins))
    there = np.unravel_index(flat, tuple(before[i][0] for i in ins))[from_]
    here = np.unravel_index(flat, tuple(after[o][0] for o in outs))[to]
    source, goal = sources[from_], goals[to]
    assert source is not None
    assert goal is not None
    trace.labels.tie(source[there], goal[here])
    for k, axis in enumerate(sources):
        if k != from_:
            trace.stop(axis, why)
    for k, axis in enumerate(goals):
        if k != to:
            trace.stop(axis, why)


def transpose(trace: Trace, node: ir.Node) -> None:
    """Tie each axis with where it goes."""
    x, y = node.inputs[0], node.outputs[0]
    rank = len(trace.of(x))
    if not rank or len(trace.of(y)) != rank:
        barrier(trace, node, told(node, "its shape is not known"))
        return
    perm = ints_attr(node, "perm") or tuple(range(rank))[::-1]
    for k, source in enumerate(perm):
        trace.tie(trace.axis(x, source), trace.axis(y, k))


def concat(trace: Trace, node: ir.Node) -> None:
    """The joined axis is that of the inputs, one after the other."""
    y = node.outputs[0]
    axis = int_attr(node, "axis", 0)
    whole, at = trace.axis(y, axis), 0
    for value in node.inputs:
        sizes = trace.sizes(value) if value is not None else ()
        if not sizes or whole is None or len({s[axis] for s in sizes}) > 1:
            barrier(trace, node, told(node, "joined along a dynamic axis"))
            return
        trace.same(value, y, (axis,))
        length = sizes[0][axis]
        part, mine = whole[at : at + length], trace.axis(value, axis)
        if length > 1:
            trace.tie(mine, part)
        elif length == 1:
            trace.stop(part, told(node, "one of the joined parts has one channel"))
        at += length


def split(trace: Trace, node: ir.Node) -> None:
    """The outputs take the axis of the input apart."""
    x = node.inputs[0]
    axis = int_attr(node, "axis", 0)
    whole, at = trace.axis(x, axis), 0
    for value in node.outputs:
        sizes = trace.sizes(value)
        if not sizes or whole is None or len({s[axis] for s in sizes}) > 1:
            barrier(trace, node, told(node, "taken apart along a dynamic axis"))
            return
        trace.same(x, value, (axis,))
        length = sizes[0][axis]
        part, mine = whole[at : at + length], trace.axis(value, axis)
        if length > 1:
            trace.tie(mine, part)
        else:
            trace.stop(part, told(node, "a part with one channel"))
        at += length


def slice_(trace: Trace, node: ir.Node) -> None:
    """A part of an axis, at places that are told."""
    x, y = node.inputs[0], node.outputs[0]
    ranges = slice_ranges(node, len(trace.of(x)))
    if ranges is None or len(trace.of(x)) != len(trace.of(y)):
        barrier(trace, node, told(node, "where it begins and ends is computed"))
        return
    for k in range(len(trace.of(x))):
        a, b = trace.axis(x, k), trace.axis(y, k)
        if k not in ranges:
            trace.tie(a, b)
            continue
        start, end, step = ranges[k]
        if a is None or step != 1:
            trace.stop(a, told(node, "every other number of it is taken"))
            trace.stop(b, told(node, "a part of a dynamic axis"))
            continue
        part = a[slice(start, end)]
        if b is None:
            trace.stop(part, told(node, "one channel is taken"))
        else:
            trace.tie(part, b)


def slice_ranges(node: ir.Node, rank: int) -> dict[int, tuple[int, int, int]] | None:
    """Return (start, end, step) of each axis that a Slice cuts; None where they are computed."""
    if "starts" in node.attributes:
        starts, ends = ints_attr(node, "starts"), ints_attr(node, "ends")
        axes, steps = ints_attr(node, "axes") or tuple(range(len(starts))), (1,) * len(starts)
    else:
        arrays = [constant(v) if v is not None else None for v in node.inputs[1:]]
        given = [
            None if a is None else tuple(int(i) for i in a.reshape(-1))
            for a in (*arrays, None, None)
        ]
        if given[0] is None or given[1] is None:
            return None
        computed = any(
            v is not None and a is None for v, a in zip(node.inputs[1:], arrays, strict=True)
        )
        if computed:
            return None
        starts, ends = given[0], given[1]
        axes = given[2] or tuple(range(len(starts)))
        steps = given[3] or (1,) * len(starts)
    if not rank:
        return None
    return {a % rank: (s, e, t) for a, s, e, t in zip(axes, starts, ends, steps, strict=True)}


def gather(trace: Trace, node: ir.Node) -> None:
    """Rows of a table, or channels by number."""
    x, where, y = node.inputs[0], node.inputs[1], node.outputs[0]
    before, after = trace.of(x), trace.of(y)
    if not before:
        barrier(trace, node, told(node, "its shape is not known"))
        return
    axis = int_attr(node, "axis", 0) % len(before)
    places = len(trace.of(where))
    if len(after) != len(before) - 1 + places:
        barrier(trace, node, told(node, "its shape is not known"))
        return
    others = [k for k in range(len(before)) if k != axis]
    goals = [*range(axis), *range(axis + places, len(after))]
    for k, g in zip(others, goals, strict=True):
        trace.tie(before[k], after[g])
    indices = constant(where)
    source, goal = before[axis], after[axis] if places == 1 else None
    if indices is not None and places == 1 and source is not None and goal is not None:
        trace.labels.tie(source[indices.reshape(-1)], goal)
        return
    trace.stop(source, told(node, "read by number"))
    for k in range(places):
        if indices is None:
            trace.tie(trace.axis(where, k), after[axis + k])
        else:
            trace.stop(after[axis + k], told(node, "read by number"))


def expand(trace: Trace, node: ir.Node) -> None:
    """Repeated axes stay; the others are tied."""
    x, y = node.inputs[0], node.outputs[0]
    before, after = trace.of(x), trace.of(y)
    sizes, larger = trace.sizes(x) if x is not None else (), trace.sizes(y)
    if not sizes or not larger or wanted_shape(trace.probes, node) is None:
        barrier(trace, node, told(node, "its shape is computed: simplify the model first"))
        return
    for k in range(1, len(after) + 1):
        one = k > len(before) or all(s[-k] == 1 for s in sizes)
        if one:
            trace.stop(after[-k], told(node, "it is repeated along it"))
        else:
            trace.tie(before[-k], after[-k])


def tile_or_pad(trace: Trace, node: ir.Node) -> None:
    """Tie the axes whose length stays; the others are repeated or padded."""
    x, y = node.inputs[0], node.outputs[0]
    if len(node.inputs) > 1 and constant(node.inputs[1]) is None:
        barrier(trace, node, told(node, "how far is computed"))
        return
    _where_equal(trace, node, x, y)


def resize(trace: Trace, node: ir.Node) -> None:
    """Tie the axes whose length stays."""
    computed = [
        v
        for v in node.inputs[1:]
        if v is not None and v.name and constant(v) is None and not v.is_initializer()
    ]
    if computed:
        barrier(trace, node, told(node, "how far is computed: simplify the model first"))
        return
    _where_equal(trace, node, node.inputs[0], node.outputs[0])


def _where_equal(trace: Trace, node: ir.Node, x: ir.Value | None, y: ir.Value) -> None:
    before, after = _dims(trace, x), _dims(trace, y)
    if before is None or after is None or len(before) != len(after):
        barrier(trace, node, told(node, "its shape is not known"))
        return
    for k, (a, b) in enumerate(zip(before, after, strict=True)):
        mine, other = trace.axis(x, k), trace.axis(y, k)
        if a == b:
            trace.tie(mine, other)
            continue
        trace.stop(mine, told(node, "its length changes"))
        trace.stop(other, told(node, "its length changes"))


def shape(trace: Trace, node: ir.Node) -> None:
    """Who reads a length as a number must go on reading it."""
    x = node.inputs[0]
    read: set[int] = set()
    rank = len(trace.of(x))
    start = int_attr(node, "start", 0)
    for use in node.outputs[0].uses():
        indices = constant(use.node.inputs[1]) if is_op(use.node, "Gather") else None
        if indices is None or node.outputs[0].is_graph_output():
            read = set(range(rank))
            break
        read |= {(int(i) + start) % rank for i in indices.reshape(-1)} if rank else set()
    for k in read:
        trace.stop(trace.axis(x, k), told(node, "its length is read as a number"))
