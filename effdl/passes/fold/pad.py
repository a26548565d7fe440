"""The pass ``fold_pad``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effdl.graph.edit import remove, roots
from effdl.graph.match import label
from effdl.graph.walk import float_attr, int_attr, ints_attr, is_op, nodes_in, str_attr
from effdl.graph.weights import constant, constant_tensor
from effdl.passes.base import Context, NodePass
from effdl.passes.fold._affine import Declined
from effdl.passes.fold._window import Window, set_pads, window_of

_WEIGHTS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}
_ZERO_POINTS = {"ConvInteger": 2, "QLinearConv": 2}
_POOLS = ("AveragePool", "MaxPool")
_NEVER_NEGATIVE = ("Relu", "Sigmoid", "Abs", "Exp", "Softmax", "Sqrt", "HardSigmoid", "Softplus")
_ORDERED = ("MaxPool", "GlobalMaxPool", "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class _Border:
    """What a Pad puts around the spatial axes: widths, and the number it puts there."""

    begins: tuple[int, ...]
    ends: tuple[int, ...]
    number: float


class FoldPad(NodePass):
    """Fold a constant Pad into the padding of the convolutions and pools that read it.

    What it does: a Pad of the spatial axes with zeros becomes part of the padding of every Conv that
    reads it (with the zero point, of a ConvInteger or QLinearConv). Before an AveragePool without
    padding it becomes padding that is counted (count_include_pad). Before a MaxPool it is folded when
    it pads with the lowest number, or with zeros around numbers that are never negative.

    When it helps: exports of TensorFlow and of old PyTorch pad with nodes of their own, each of which
    copies its whole input.

    When it does not: ONNX Runtime folds a Pad before a Conv itself when it loads a model. A Pad that
    reflects or crops, one with computed widths, and one that anything else reads stay.

    Example:
        passes: [simplify, fold_pad]
    """

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of Pads folded."""
        changes = 0
        declined: dict[str, str] = {}
        while found := self._sweep(model, ctx, declined):
            changes += found
        for name, reason in declined.items():
            ctx.skip(name, reason)
        if changes:
            ctx.note("folded", changes)
        return changes

    def _sweep(self, model: ir.Model, ctx: Context, declined: dict[str, str]) -> int:
        changes = 0
        declined.clear()
        for root, imports, _ in roots(model):
            version = imports.get("", imports.get("ai.onnx", 0))
            for node in reversed(list(nodes_in(root))):
                if not is_op(node, "Pad") or node.graph is None or not self.selected(node):
                    continue
                try:
                    _fold(node, version, ctx)
                    changes += 1
                except Declined as e:
                    declined[node.name or node.op_type] = str(e)
        return changes

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Return the Pads."""
        return [n.name or n.op_type for n in nodes_in(model.graph) if is_op(n, "Pad")]


def _fold(pad: ir.Node, version: int, ctx: Context) -> None:
    padded, data = pad.outputs[0], pad.inputs[0]
    uses = list(padded.uses())
    if data is None or padded.is_graph_output() or not uses:
        raise Declined("it gives an output of the graph")
    new = {}
    for user, index in uses:
        readers = (*_WEIGHTS, *_POOLS)
        if index != 0 or not is_op(user, *readers):
            raise Declined(f"{label(user)} reads it, which has no padding of its own")
        if any(a.is_ref() for n in (pad, user) for a in n.attributes.values()):
            raise Declined("its attributes are parameters of a function")
        window = window_of(user, _WEIGHTS.get(user.op_type))
        border = _border(pad, version, len(window.sizes))
        new[user] = _joined(user, window, border, data, version)
    for user, (begins, ends) in new.items():
        if is_op(user, "AveragePool"):
            user.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
        set_pads(user, begins, ends)
        user.replace_input_with(0, data)
    remove(pad)
    ctx.touch(pad, "folded into " + ", ".join(label(user) for user in new))


def _border(pad: ir.Node, version: int, axes: int) -> _Border:
    """Read a Pad before a window of ``axes`` spatial axes, in any of its dialects."""
    if str_attr(pad, "mode", "constant") != "constant":
        raise Declined(f"it pads by mode {str_attr(pad, 'mode', 'constant')}")
    if version < 11:
        widths = ints_attr(pad, "pads") or ints_attr(pad, "paddings")
        number = float_attr(pad, "value", 0.0)
        along = tuple(range(axes + 2))
    else:
        widths = _integers(pad, 1)
        given = pad.inputs[2] if len(pad.inputs) > 2 else None
        value = np.zeros(1) if given is None else constant(given)
        if value is None or value.size != 1:
            raise Declined("the number it pads with is computed")
        number = float(value.reshape(()))
        named = len(pad.inputs) > 3 and pad.inputs[3] is not None
        along = _integers(pad, 3) if named else tuple(range(axes + 2))
    if len(widths) != 2 * len(along) or any(not -axes - 2 <= a < axes + 2 for a in along):
        raise Declined("its widths are not those of the axes")
    begins, ends = [0] * (axes + 2), [0] * (axes + 2)
    for k, axis in enumerate(along):
        begins[axis] += widths[k]
        ends[axis] += widths[k + len(along)]
    if any(w < 0 for w in (*begins, *ends)):
        raise Declined("it crops")
    if any((*begins[:2], *ends[:2])):
        raise Declined("it pads the batch or the channels")
    if not any((*begins, *ends)):
        raise Declined("it pads nothing")
    return _Border(tuple(begins[2:]), tuple(ends[2:]), number)


def _integers(node: ir.Node, index: int) -> tuple[int, ...]:
    array = constant(node.inputs[index]) if len(node.inputs) > index else None
    if array is None:
        raise Declined("how much it pads is computed")
    return tuple(int(n) for n in array.ravel())


def _joined(
    user: ir.Node, window: Window, border: _Border, data: ir.Value, version: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the padding of ``user`` that does both."""
    begins = tuple(a + b for a, b in zip(window.begins, border.begins, strict=True))
    ends = tuple(a + b for a, b in zip(window.ends, border.ends, strict=True))
    if is_op(user, *_POOLS):
        _need_pool(user, window, border, data, version)
        sizes = zip((*begins, *ends), window.sizes * 2, strict=True)
        if any(pad >= size for pad, size in sizes):
            raise Declined(f"{label(user)} would pad by its whole window")
        return begins, ends
    zero = 0.0
    if is_op(user, *_ZERO_POINTS):
        index = _ZERO_POINTS[user.op_type]
        given = user.inputs[index] if len(user.inputs) > index else None
        point = np.zeros(1) if given is None else constant(given)
        if point is None or point.size != 1:
            raise Declined(f"the zero point of {label(user)} is computed")
        zero = float(point.reshape(()))
    if border.number != zero:
        raise Declined(f"it pads with {border.number:g}, {label(user)} with {zero:g}")
    return begins, ends


def _need_pool(
    user: ir.Node, window: Window, border: _Border, data: ir.Value, version: int
) -> None:
    if int_attr(user, "ceil_mode", 0):
        raise Declined(f"{label(user)} rounds its size up, which padding changes")
    if set(window.dilations) != {1}:
        raise Declined(f"{label(user)} is dilated: a window could lie in the padding")
    if is_op(user, "AveragePool"):
        if border.number != 0:
            raise Declined(f"it pads with {border.number:g}, {label(user)} with 0")
        if version < 7:
            raise Declined(f"{label(user)} of opset {version} does not count padding")
        if window.padded and not int_attr(user, "count_include_pad", 0):
            raise Declined(f"{label(user)} has padding of its own that it does not count")
        return
    if any(o.uses() or o.is_graph_output() for o in user.outputs[1:]):
        raise Declined(f"{label(user)} also gives indices, which padding moves")
    if not _is_lowest(border.number, data) and not (border.number == 0 and _never_negative(data)):
        raise Declined(
            f"it pads with {border.number:g} before {label(user)}, whose input may be lower"
        )


def _is_lowest(number: float, data: ir.Value) -> bool:
    """Whether no number of the type of ``data`` is lower."""
    if number == -np.inf:
        return True
    if data.dtype is None or not data.dtype.is_integer():
        lowest = {
            ir.DataType.FLOAT: float(np.finfo(np.float32).min),
            ir.DataType.FLOAT16: float(np.finfo(np.float16).min),
        }
        return data.dtype in lowest and number <= lowest[data.dtype]
    return number == (-(2 ** (data.dtype.bitwidth - 1)) if data.dtype.is_signed() else 0)


def _never_negative(value: ir.Value) -> bool:
    node = value.producer()
    while node is not None and is_op(node, *_ORDERED):
        before = node.inputs[0]
        node = before.producer() if before is not None else None
    if node is None:
        return False
    if is_op(node, "Clip"):
        tensor = constant_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
        low = float(tensor.numpy().reshape(())) if tensor is not None else None
        low = float_attr(node, "min", -1.0) if len(node.inputs) == 1 else low
        return low is not None and low >= 0
    return is_op(node, *_NEVER_NEGATIVE)
