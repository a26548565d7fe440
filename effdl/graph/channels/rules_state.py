"""Channels through recurrent layers and fused attention."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effdl.graph.channels.labels import Ints
from effdl.graph.channels.trace import IN, OUT, Trace, barrier, told
from effdl.graph.walk import int_attr, ints_attr, is_op

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(trace: Trace, node: ir.Node) -> None:
    """LSTM, GRU and RNN: a hidden unit is a row of every gate and a column of the recurrence."""
    gates = _GATES[node.op_type]
    given: list[ir.Value | None] = [*node.inputs, *[None] * (8 - len(node.inputs))]
    x, w, r, *rest = given
    hidden = int_attr(node, "hidden_size", 0)
    weight, recurrence = trace.of(w), trace.of(r)
    odd = int_attr(node, "layout", 0) or rest[4] is not None or hidden < 2
    if odd or len(weight) != 3 or len(recurrence) != 3:
        barrier(trace, node, told(node, "a layout that is not followed"))
        return
    units = trace.labels.fresh(hidden)
    repeated = np.tile(units, gates)
    why = told(node, "its directions and states")
    trace.tie(weight[1], repeated)
    trace.tie(recurrence[1], repeated)
    trace.tie(recurrence[2], units)
    bias, _, state, cell = rest[:4]
    if bias is not None:
        trace.tie(trace.axis(bias, 1), np.tile(units, 2 * gates))
    for value in (state, cell, *node.outputs[1:]):
        if value is not None and trace.axis(value, -1) is not None:
            trace.tie(trace.axis(value, -1), units)
        trace.stop_value(value, why, (2,))
    out = node.outputs[0]
    if trace.axis(out, -1) is not None:
        trace.tie(trace.axis(out, -1), units)
    _follow(trace, x, out)
    trace.tie(trace.axis(x, 2), weight[2])
    trace.stop(weight[0], why)
    trace.role(node, 1, 1, OUT)
    trace.role(node, 1, 2, IN)
    trace.role(node, 2, 1, OUT)
    trace.role(node, 2, 2, IN)


def _follow(trace: Trace, x: ir.Value | None, out: ir.Value) -> None:
    """Time and batch of input and output [time, directions, batch, hidden]."""
    for k, j in ((0, 0), (1, 2)):
        trace.tie(trace.axis(x, k), trace.axis(out, j))


def packed_attention(trace: Trace, node: ir.Node) -> None:
    """com.microsoft.Attention: the weight [inputs, 3 heads x size] makes queries, keys and values."""
    x, w = node.inputs[0], node.inputs[1]
    heads = int_attr(node, "num_heads", 0)
    extra = [v for v in (*node.inputs[4:5], *node.outputs[1:]) if v is not None and v.name]
    sizes = ints_attr(node, "qkv_hidden_sizes")
    weight = trace.of(w)
    if (
        extra
        or not heads
        or len(weight) != 2
        or weight[1] is None
        or (sizes and len(set(sizes)) > 1)
    ):
        barrier(trace, node, told(node, "a form of attention that is not followed"))
        return
    units = _heads(trace, heads, weight[1].reshape(3, heads, -1))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        trace.tie(trace.axis(bias, 0), weight[1])
    _made(trace, node, units)
    trace.tie(trace.axis(x, 2), weight[0])
    _positions(trace, node, [x])
    trace.role(node, 1, 1, OUT)
    trace.role(node, 1, 0, IN)


def multi_head(trace: Trace, node: ir.Node) -> None:
    """com.microsoft.MultiHeadAttention of queries, keys and values [batch, length, heads x size]."""
    heads = int_attr(node, "num_heads", 0)
    q, k, v = (node.inputs[i] if len(node.inputs) > i else None for i in range(3))
    extra = [v for v in (*node.inputs[6:], *node.outputs[1:]) if v is not None and v.name]
    axes = [trace.axis(value, 2) for value in (q, k, v)]
    if extra or not heads or any(a is None or len(a) % heads for a in axes):
        barrier(trace, node, told(node, "a form of attention that is not followed"))
        return
    units = trace.labels.fresh(heads)
    for axis in axes:
        assert axis is not None
        trace.labels.tie(axis.reshape(heads, -1), units[:, None])
    bias = node.inputs[3] if len(node.inputs) > 3 else None
    if bias is not None:
        flat = trace.axis(bias, 0)
        joined = np.concatenate([a for a in axes if a is not None])
        trace.tie(flat, joined)
    _made(trace, node, units)
    _positions(trace, node, [q, k, v])


def standard_attention(trace: Trace, node: ir.Node) -> None:
    """Attention of ONNX (opset 23): heads are an axis, or packed with their size into the last one."""
    q, k, v = node.inputs[0], node.inputs[1], node.inputs[2]
    extra = [v for v in (*node.inputs[4:], *node.outputs[1:]) if v is not None and v.name]
    packed = len(trace.of(q)) == 3
    if packed:
        many, few = int_attr(node, "q_num_heads", 0), int_attr(node, "kv_num_heads", 0)
        axes = [trace.axis(value, 2) for value in (q, k, v)]
    else:
        axes = [trace.axis(value, 1) for value in (q, k, v)]
        many, few = (len(a) if a is not None else 0 for a in axes[:2])
    counts = (many, few, few)
    known = all(a is not None and n and len(a) % n == 0 for a, n in zip(axes, counts, strict=True))
    if extra or not known or many % few:
        barrier(trace, node, told(node, "a form of attention that is not followed"))
        return
    units = trace.labels.fresh(few)
    for axis in axes:
        assert axis is not None
        trace.labels.tie(axis.reshape(few, -1), units[:, None])
    out = trace.axis(node.outputs[0], 2 if packed else 1)
    if out is None or len(out) % few:
        barrier(trace, node, told(node, "its shape is not known"))
        return
    trace.labels.tie(out.reshape(few, -1), units[:, None])
    _positions(trace, node, [q, k, v] if packed else [])
    for value in (q, k, v, node.outputs[0]):
        trace.stop_value(value, told(node, "positions and sizes of heads"), (2 if packed else 1,))


def _heads(trace: Trace, heads: int, grouped: Ints) -> Ints:
    """Tie what belongs to a head, [parts, heads, size]; return a label for each head."""
    units = trace.labels.fresh(heads)
    trace.labels.tie(grouped, units[None, :, None])
    return units


def _made(trace: Trace, node: ir.Node, units: Ints) -> None:
    out = trace.axis(node.outputs[0], 2)
    if out is None or len(out) % len(units):
        trace.stop(units, told(node, "its shape is not known"))
        return
    trace.labels.tie(out.reshape(len(units), -1), units[:, None])


def _positions(trace: Trace, node: ir.Node, values: list[ir.Value | None]) -> None:
    """Freeze positions; masks and the like are not pruned along heads."""
    why = told(node, "positions")
    for value in values:
        trace.stop_value(value, why, (2,))
    trace.stop_value(node.outputs[0], why, (2,))
    first = 3 if is_op(node, "Attention", domain="com.microsoft") else 4
    if is_op(node, "Attention"):
        first = 3
    for value in node.inputs[first:]:
        trace.stop_value(value, told(node, "a mask or a bias of all heads"))
