"""Channels through layers: convolutions, products, norms, elementwise operators, reductions."""

from __future__ import annotations

import onnx_ir as ir

from effdl.graph.channels.labels import Ints
from effdl.graph.channels.trace import ALONG, IN, OUT, Rule, Trace, barrier, told
from effdl.graph.walk import int_attr, ints_attr
from effdl.graph.weights import constant, constant_tensor

_NARROW = 8
"""Groups of at most this many channels are removed whole; of wider ones, the same channels of each."""


def elementwise(trace: Trace, node: ir.Node) -> None:
    """Tie all inputs and outputs, aligned at the last axis; axes of length 1 are repeated."""
    for out in node.outputs:
        axes = trace.of(out)
        for value in node.inputs:
            if value is None:
                continue
            mine = trace.of(value)
            if len(mine) > len(axes):
                barrier(trace, node, told(node, "its shape is not known"))
                return
            sizes = trace.sizes(value)
            for k in range(1, len(mine) + 1):
                one = bool(sizes) and all(s[-k] == 1 for s in sizes)
                if not one:
                    trace.tie(mine[-k], axes[-k])


def first_input(trace: Trace, node: ir.Node) -> None:
    """Tie the first input with the first output; what else it reads are numbers."""
    trace.same(node.inputs[0], node.outputs[0])
    for out in node.outputs[1:]:
        trace.stop_value(out, told(node, "read as a mask"))


def spatial(trace: Trace, node: ir.Node) -> None:
    """Tie batch and channels; a window moves over the others."""
    spatial_only(trace, node)
    trace.tie(trace.axis(node.inputs[0], 1), trace.axis(node.outputs[0], 1))
    for out in node.outputs[1:]:
        trace.stop_value(out, told(node, "read as positions"))


def conv(trace: Trace, node: ir.Node) -> None:
    """Conv [N, C, ...] with weight [M, C / groups, ...]."""
    spatial_only(trace, node)
    x, w, y = node.inputs[0], node.inputs[1], node.outputs[0]
    groups = int_attr(node, "group", 1)
    into, out = trace.axis(x, 1), trace.axis(y, 1)
    rows, columns = trace.axis(w, 0), trace.axis(w, 1)
    trace.stop_value(w, told(node, "a kernel"), (0, 1))
    _per_channel(trace, node, 2, out)
    trace.tie(out, rows)
    if len(node.inputs) > 3:  # FusedConv adds it
        trace.same(node.inputs[3], y)
    if groups == 1:
        trace.role(node, 1, 0, OUT)
        trace.role(node, 1, 1, IN)
        trace.tie(into, columns)
        return
    if into is None or out is None or rows is None:
        barrier(trace, node, told(node, "its groups have one channel in all"))
        return
    wide, made = len(into) // groups, len(out) // groups
    if wide == 1:
        trace.labels.tie(into[:, None], out.reshape(groups, made))
        trace.role(node, 1, 0, ALONG)
        return
    ins, outs = into.reshape(groups, wide), out.reshape(groups, made)
    if wide <= _NARROW:
        trace.labels.tie(ins, ins[:, :1])
        trace.labels.tie(outs, ins[:, :1])
        trace.stop(columns, told(node, "a group stays whole"))
        trace.role(node, 1, 0, ALONG)
        return
    trace.role(node, 1, 0, OUT)
    trace.role(node, 1, 1, IN)
    trace.labels.tie(ins, ins[:1])
    trace.labels.tie(outs, outs[:1])
    if columns is not None:
        trace.labels.tie(ins[0], columns)


def conv_transpose(trace: Trace, node: ir.Node) -> None:
    """ConvTranspose [N, C, ...] with weight [C, M / groups, ...]."""
    spatial_only(trace, node)
    x, w, y = node.inputs[0], node.inputs[1], node.outputs[0]
    groups = int_attr(node, "group", 1)
    into, out = trace.axis(x, 1), trace.axis(y, 1)
    rows, columns = trace.axis(w, 0), trace.axis(w, 1)
    trace.stop_value(w, told(node, "a kernel"), (0, 1))
    _per_channel(trace, node, 2, out)
    if groups == 1:
        trace.role(node, 1, 0, IN)
        trace.role(node, 1, 1, OUT)
        trace.tie(into, rows)
        trace.tie(out, columns)
        return
    trace.stop(columns, told(node, "a group stays whole"))
    trace.tie(into, rows)
    if into is None or out is None or len(into) != groups:
        barrier(trace, node, told(node, "a grouped ConvTranspose"))
        return
    trace.role(node, 1, 0, ALONG)
    trace.labels.tie(into[:, None], out.reshape(groups, -1))


def spatial_only(trace: Trace, node: ir.Node) -> None:
    """Tie the batch, freeze what a window moves over, leave the channels to the caller."""
    x, y = node.inputs[0], node.outputs[0]
    why = told(node, "a window moves over it")
    trace.stop_value(x, why, (0, 1))
    trace.stop_value(y, why, (0, 1))
    trace.tie(trace.axis(x, 0), trace.axis(y, 0))


def _per_channel(trace: Trace, node: ir.Node, index: int, out: Ints | None) -> None:
    """Tie a vector at an input with the channels."""
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is not None:
        trace.tie(trace.axis(value, -1), out)


def batch_norm(trace: Trace, node: ir.Node) -> None:
    """Numbers per channel, axis 1; instance norms take statistics over the axes behind it."""
    spatial(trace, node)
    channels = trace.axis(node.inputs[0], 1)
    for index in range(1, len(node.inputs)):
        _per_channel(trace, node, index, channels)
    for out in node.outputs[1:]:
        trace.stop_value(out, told(node, "statistics of a training graph"))


def layer_norm(trace: Trace, node: ir.Node) -> None:
    """Tie the axes before the normalized ones, freeze the others."""
    x, y = node.inputs[0], node.outputs[0]
    rank = len(trace.of(x))
    first = int_attr(node, "axis", -1) % rank if rank else 0
    normed = range(first, rank)
    trace.same(x, y, normed)
    why = told(node, "its mean and variance are taken over all of them")
    for value in (x, y):
        trace.stop_value(value, why, range(first))
    for value in (*node.inputs[1:], *node.outputs[1:]):
        trace.stop_value(value, why)


def along_axis(default: int) -> Rule:
    """Return the rule of an operator that mixes the numbers along one axis."""

    def rule(trace: Trace, node: ir.Node) -> None:
        x, y = node.inputs[0], node.outputs[0]
        rank = len(trace.of(x))
        if not rank:
            return
        axis = int_attr(node, "axis", default) % rank
        trace.same(x, y, (axis,))
        why = told(node, "it mixes the numbers along it")
        trace.stop(trace.axis(x, axis), why)
        trace.stop(trace.axis(y, axis), why)

    return rule


def reduce(trace: Trace, node: ir.Node) -> None:
    """Tie what is not summed over."""
    x, y = node.inputs[0], node.outputs[0]
    rank = len(trace.of(x))
    axes: tuple[int, ...] | None = ints_attr(node, "axes") or None
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        array = constant(node.inputs[1])
        if array is None:
            barrier(trace, node, told(node, "its axes are computed"))
            return
        axes = tuple(int(a) for a in array.reshape(-1)) or None
    if axes is None:
        axes = () if int_attr(node, "noop_with_empty_axes", 0) else tuple(range(rank))
    if not rank:
        return
    summed = {a % rank for a in axes}
    why = told(node, "it sums over it")
    keep, at = bool(int_attr(node, "keepdims", 1)), 0
    for k in range(rank):
        if k in summed:
            trace.stop(trace.axis(x, k), why)
            at += keep
            continue
        trace.tie(trace.axis(x, k), trace.axis(y, at))
        at += 1


def matmul(trace: Trace, node: ir.Node) -> None:
    """MatMul with or without a constant side; batch axes are repeated where one has length 1."""
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    left, right, out = trace.of(a), trace.of(b), trace.of(y)
    if len(left) < 2 or len(right) < 2 or len(out) != max(len(left), len(right)):
        barrier(trace, node, told(node, "a product with a vector, or of unknown shape"))
        return
    trace.tie(left[-2], out[-2])
    trace.tie(right[-1], out[-1])
    for value, axes in ((a, left), (b, right)):
        sizes = trace.sizes(value) if value is not None else ()
        for k in range(3, len(axes) + 1):
            if not all(s[-k] == 1 for s in sizes):
                trace.tie(axes[-k], out[-k])
    _contract(trace, node, left[-1], right[-2])
    trace.role(node, 1, -2, IN)
    trace.role(node, 1, -1, OUT)
    trace.role(node, 0, -1, IN)
    trace.role(node, 0, -2, OUT)


def gemm(trace: Trace, node: ir.Node) -> None:
    """Gemm: A [M, K] B [K, N] + C, each of A and B possibly transposed."""
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    if len(trace.of(a)) != 2 or len(trace.of(b)) != 2 or len(trace.of(y)) != 2:
        barrier(trace, node, told(node, "its shape is not known"))
        return
    t_a, t_b = int_attr(node, "transA", 0), int_attr(node, "transB", 0)
    trace.tie(trace.axis(a, t_a), trace.axis(y, 0))
    trace.tie(trace.axis(b, 1 - t_b), trace.axis(y, 1))
    _contract(trace, node, trace.axis(a, 1 - t_a), trace.axis(b, t_b))
    c = node.inputs[2] if len(node.inputs) > 2 else None
    if c is not None:
        for k in range(1, len(trace.of(c)) + 1):
            if trace.axis(c, -k) is not None:  # one of length 1 is repeated
                trace.tie(trace.axis(c, -k), trace.axis(y, -k))
    trace.role(node, 1, t_b, IN)
    trace.role(node, 1, 1 - t_b, OUT)


def _contract(trace: Trace, node: ir.Node, left: Ints | None, right: Ints | None) -> None:
    trace.tie(left, right)
    constants = [v for v in node.inputs[:2] if constant_tensor(v) is not None]
    if len(constants) != 1:
        why = told(node, "two activations are multiplied along it")
        trace.stop(left, why)
        trace.stop(right, why)


def depth_to_space(trace: Trace, node: ir.Node) -> None:
    """[N, C b b, H, W] to [N, C, H b, W b]: a channel takes b b of them along."""
    spatial_only(trace, node)
    into, out = trace.axis(node.inputs[0], 1), trace.axis(node.outputs[0], 1)
    side = int_attr(node, "blocksize", 1) ** 2
    if into is None or out is None:
        trace.stop(into, told(node, "all of it becomes one channel"))
        return
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() == "CRD":
        trace.labels.tie(into.reshape(len(out), side), out[:, None])
    else:
        trace.labels.tie(into.reshape(side, len(out)), out[None])


def space_to_depth(trace: Trace, node: ir.Node) -> None:
    """[N, C, H, W] to [N, b b C, H / b, W / b]."""
    spatial_only(trace, node)
    into, out = trace.axis(node.inputs[0], 1), trace.axis(node.outputs[0], 1)
    if into is None or out is None:
        trace.stop(out, told(node, "made of one channel"))
        return
    trace.labels.tie(out.reshape(-1, len(into)), into[None])


def quantize(trace: Trace, node: ir.Node) -> None:
    """QuantizeLinear and DequantizeLinear: scale and zero point may be one number per channel."""
    trace.same(node.inputs[0], node.outputs[0])
    rank = len(trace.of(node.inputs[0]))
    if not rank:
        return
    axis = int_attr(node, "axis", 1) % rank
    for value in node.inputs[1:]:
        if value is None:
            continue
        if len(trace.of(value)) == 1 and trace.axis(value, 0) is not None:
            trace.tie(trace.axis(value, 0), trace.axis(node.inputs[0], axis))
        elif len(trace.of(value)) > 1:
            barrier(trace, node, told(node, "scales of blocks"))
            return
