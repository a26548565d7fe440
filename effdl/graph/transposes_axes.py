"""Operators that name axes, in another order of axes: reductions, slices, pads, concatenations, ..."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from effdl.graph.transposes import (
    Ask,
    Declined,
    Perm,
    Plan,
    axis_of,
    extended,
    moved,
    without,
)
from effdl.graph.walk import int_attr, ints_attr
from effdl.graph.weights import Array, Names, add_initializer, constant, replace_weight

Edit = Callable[[ir.Node, Names], None]


def put_input(index: int, array: Array) -> Edit:
    """Return the edit that gives input ``index`` the constant ``array``."""

    def edit(node: ir.Node, names: Names) -> None:
        if index < len(node.inputs) and node.inputs[index] is not None:
            replace_weight(node, index, array, names)
            return
        assert isinstance(node.graph, ir.Graph)
        node.resize_inputs(max(index + 1, len(node.inputs)))
        base = f"{node.name or node.op_type}_input_{index}"
        node.replace_input_with(index, add_initializer(node.graph, names, base, array))

    return edit


def put_copy(
    index: int,
    array: Array,
    key: tuple[ir.Value, Perm, int],
    copies: dict[tuple[ir.Value, Perm, int], ir.Value],
) -> Edit:
    """Return the edit that gives input ``index`` a constant that many nodes may need."""

    def edit(node: ir.Node, names: Names) -> None:
        assert isinstance(node.graph, ir.Graph)
        if key not in copies:
            base = f"{key[0].name}_transposed"
            copies[key] = add_initializer(node.graph, names, base, array)
        node.replace_input_with(index, copies[key])

    return edit


def put_int(name: str, number: int) -> Edit:
    """Return the edit that sets an integer attribute."""

    def edit(node: ir.Node, names: Names) -> None:
        node.attributes[name] = ir.AttrInt64(name, number)

    return edit


def put_ints(name: str, numbers: Sequence[int]) -> Edit:
    """Return the edit that sets a list of integers as an attribute."""

    def edit(node: ir.Node, names: Names) -> None:
        node.attributes[name] = ir.AttrInt64s(name, list(numbers))

    return edit


def edits(*parts: Edit | None) -> Edit | None:
    """Return one edit that does all ``parts``."""
    real = [p for p in parts if p is not None]

    def edit(node: ir.Node, names: Names) -> None:
        for part in real:
            part(node, names)

    return edit if real else None


def given_axes(ask: Ask, index: int, rank: int) -> tuple[int, ...] | None:
    """Return the axes named by the attribute or by input ``index``; None when none are named."""
    if "axes" in ask.node.attributes:
        axes = ints_attr(ask.node, "axes")
    elif ask.given(index):
        axes = tuple(int(a) for a in ask.array(index, "axes").ravel())
    else:
        return None
    if len({axis_of(a, rank) for a in axes}) < len(axes):
        raise Declined("it names an axis twice")
    return tuple(axis_of(a, rank) for a in axes)


def put_axes(ask: Ask, index: int, old: Sequence[int], new: Sequence[int]) -> Edit | None:
    """Return the edit that renames the axes, where they change."""
    if tuple(old) == tuple(new):
        return None
    if "axes" in ask.node.attributes:
        return put_ints("axes", new)
    like = constant(ask.node.inputs[index]) if ask.given(index) else None
    return put_input(index, np.array(new, np.int64 if like is None else like.dtype))


def one_tensor(ask: Ask, perm_in: Perm, perm_out: Perm, edit: Edit | None) -> Plan:
    """The plan of an operator with one tensor: the other inputs stay as they are."""
    others = (None,) * (len(ask.node.inputs) - 1)
    return Plan((perm_in, *others), (perm_out,) * len(ask.node.outputs), edit)


def reduction(ask: Ask) -> Plan:
    """Reduce*: keepdims 0 and 1, axes as an attribute or as an input, no axes for all."""
    ask.on_data()
    rank = len(ask.dims(0))
    axes = given_axes(ask, 1, rank)
    keep = int_attr(ask.node, "keepdims", 1)
    if not axes and int_attr(ask.node, "noop_with_empty_axes", 0):
        raise Declined("without axes it reduces nothing")
    named = axes if axes else tuple(range(rank))
    perm, out = _around(ask, named, bool(keep), rank)
    edit = put_axes(ask, 1, axes, sorted(moved(axes, perm))) if axes else None
    return one_tensor(ask, perm, out, _unless_sorted(axes, perm, edit))


def _unless_sorted(axes: Sequence[int] | None, perm: Perm, edit: Edit | None) -> Edit | None:
    """No edit where the same axes are reduced, in whatever order they are written."""
    return None if axes is not None and set(axes) == set(moved(axes, perm)) else edit


def _around(ask: Ask, axes: Sequence[int], keep: bool, rank: int) -> tuple[Perm, Perm]:
    """Orders before and after ``axes`` of the input go (or become 1, with ``keep``)."""
    if keep:
        return ask.perm, ask.perm
    if ask.output:
        return extended(ask.perm, axes), ask.perm
    return ask.perm, without(ask.perm, axes)


def arg_extreme(ask: Ask) -> Plan:
    """ArgMax and ArgMin."""
    rank = len(ask.dims(0))
    axis = ask.axis("axis", 0, rank)
    perm, out = _around(ask, [axis], bool(int_attr(ask.node, "keepdims", 1)), rank)
    return one_tensor(ask, perm, out, _put_axis(axis, perm))


def _put_axis(axis: int, perm: Perm) -> Edit | None:
    goal = moved([axis], perm)[0]
    return None if goal == axis else put_int("axis", goal)


def squeeze(ask: Ask) -> Plan:
    """Squeeze with its axes named."""
    ask.on_data()
    rank = len(ask.dims(0))
    axes = given_axes(ask, 1, rank)
    if axes is None:
        raise Declined("it does not say which axes it squeezes")
    perm, out = _around(ask, axes, False, rank)
    edit = put_axes(ask, 1, axes, sorted(moved(axes, perm)))
    return one_tensor(ask, perm, out, _unless_sorted(axes, perm, edit))


def unsqueeze(ask: Ask) -> Plan:
    """Unsqueeze: the new axes stay where they are when an order is asked of the input."""
    ask.on_data()
    count = len(ask.dims(0))
    named = ints_attr(ask.node, "axes") if "axes" in ask.node.attributes else None
    if named is None:
        named = tuple(int(a) for a in ask.array(1, "axes").ravel())
    rank = count + len(named)
    axes = tuple(axis_of(a, rank) for a in named)
    if ask.output:
        perm, out = without(ask.perm, axes), ask.perm
    else:
        perm, out = ask.perm, extended(ask.perm, axes)
    edit = put_axes(ask, 1, axes, sorted(moved(axes, out)))
    return one_tensor(ask, perm, out, _unless_sorted(axes, out, edit))


def one_axis(default: int | None) -> Callable[[Ask], Plan]:
    """Return the rule of operators whose tensors all have one order, and an attribute ``axis``."""

    def rule(ask: Ask) -> Plan:
        if default is None and "axis" not in ask.node.attributes:
            raise Declined("it does not say its axis")
        rank = len(ask.perm)
        axis = ask.axis("axis", default or 0, rank)
        node = ask.node
        inputs: tuple[Perm | None, ...] = (ask.perm,) * len(node.inputs)
        if node.op_type in ("Split", "TopK"):
            ask.on_data()
            inputs = (ask.perm, *(None,) * (len(node.inputs) - 1))
        return Plan(inputs, (ask.perm,) * len(node.outputs), _put_axis(axis, ask.perm))

    return rule


def softmax(ask: Ask) -> Plan:
    """Softmax, LogSoftmax, Hardmax; before opset 13 they work on all axes from ``axis`` on."""
    rank = len(ask.perm)
    old = ask.opset < 13
    axis = ask.axis("axis", 1 if old else -1, rank)
    goal = moved([axis], ask.perm)[0]
    if old and not axis == goal == rank - 1:
        raise Declined("before opset 13 it works on all axes behind its own")
    # ONNX Runtime transposes before and after a Softmax on an inner axis.
    hidden = 2 * (int(goal < rank - 1) - int(axis < rank - 1))
    edit = None if goal == axis else put_int("axis", goal)
    return Plan((ask.perm,), (ask.perm,), edit, hidden=hidden)


def slices(ask: Ask) -> Plan:
    """Slice, with attributes (opset 1) or inputs (opset 10)."""
    ask.on_data()
    node, rank = ask.node, len(ask.perm)
    axes = given_axes(ask, 3, rank)
    if axes is None:
        if "starts" in node.attributes:
            count = len(ints_attr(node, "starts"))
        else:
            starts = ask.dims(1)
            if len(starts) != 1 or not isinstance(starts[0], int):
                raise Declined("the number of axes it cuts is not known")
            count = starts[0]
        axes = tuple(range(count))
    goal = moved(axes, ask.perm)
    if goal == axes:
        edit = None
    elif "starts" in node.attributes:
        edit = put_ints("axes", goal)
    else:
        dtype = ask.dtype_of(node.inputs[1])
        if dtype not in (ir.DataType.INT32, ir.DataType.INT64):
            raise Declined("the type of its starts is not known")
        edit = put_input(3, np.array(goal, dtype.numpy()))
    return one_tensor(ask, ask.perm, ask.perm, edit)


def pads(ask: Ask) -> Plan:
    """Pad, with attributes (opset 2), inputs (opset 11) or inputs and axes (opset 18)."""
    ask.on_data()
    node, rank = ask.node, len(ask.perm)
    if ask.given(3):
        axes = given_axes(ask, 3, rank)
        assert axes is not None
        edit = put_axes(ask, 3, axes, moved(axes, ask.perm))
        return one_tensor(ask, ask.perm, ask.perm, edit)
    if ask.opset < 11:
        numbers = np.array(ints_attr(node, "pads"), np.int64)
    else:
        numbers = ask.array(1, "pads").astype(np.int64)
    if numbers.size != 2 * rank:
        raise Declined("its pads are not two for each axis")
    goal = numbers.reshape(2, rank)[:, list(ask.perm)].ravel()
    if (goal == numbers.ravel()).all():
        return one_tensor(ask, ask.perm, ask.perm, None)
    edit = put_ints("pads", [int(p) for p in goal]) if ask.opset < 11 else put_input(1, goal)
    return one_tensor(ask, ask.perm, ask.perm, edit)


def gather(ask: Ask) -> Plan:
    """Gather: the axes of the indices take the place of the one that is gathered from."""
    ask.on_data()
    rank, count = len(ask.dims(0)), len(ask.dims(1))
    axis = ask.axis("axis", 0, rank)
    # Each axis of the data as the axes of the output that it becomes.
    parts = [
        tuple(range(axis, axis + count)) if a == axis else (a if a < axis else a + count - 1,)
        for a in range(rank)
    ]
    if not ask.output:
        perm = ask.perm
        out = tuple(o for a in perm for o in parts[a])
    elif count == 0:
        perm, out = extended(ask.perm, [axis]), ask.perm
    else:
        perm, out = _whole(ask.perm, parts), ask.perm
    return one_tensor(ask, perm, out, _put_axis(axis, perm))


def _whole(perm: Perm, parts: Sequence[tuple[int, ...]]) -> Perm:
    """The order of ``parts`` in ``perm``, where each stays in one piece and in order."""
    order = [next(i for i, part in enumerate(parts) if a in part) for a in perm]
    firsts = tuple(dict.fromkeys(order))
    if tuple(a for i in firsts for a in parts[i]) != perm:
        raise Declined("the axes of its indices would be torn apart")
    return firsts


def per_axis(index: int, what: str, since: int) -> Callable[[Ask], Plan]:
    """Return the rule of Tile and Expand: input ``index`` has a constant number for each axis."""

    def rule(ask: Ask) -> Plan:
        ask.on_data()
        if ask.opset < since:
            raise Declined(f"opset {ask.opset} has another form of it")
        numbers, rank = ask.array(index, what).ravel(), len(ask.dims(0))
        if len(numbers) > rank or len(ask.perm) != rank:
            raise Declined("it adds axes")
        full = np.concatenate([np.ones(rank - len(numbers), numbers.dtype), numbers])
        goal = full[list(ask.perm)]
        edit = None if np.array_equal(goal, full) else put_input(index, goal)
        return one_tensor(ask, ask.perm, ask.perm, edit)

    return rule


def cumulative(ask: Ask) -> Plan:
    """CumSum: its axis is an input."""
    ask.on_data()
    axis = ask.array(1, "axis")
    old = axis_of(int(axis.reshape(())), len(ask.perm))
    goal = moved([old], ask.perm)[0]
    edit = None if goal == old else put_input(1, np.full(axis.shape, goal, axis.dtype))
    return one_tensor(ask, ask.perm, ask.perm, edit)
