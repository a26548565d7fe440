"""Operators that their neighbours make simpler: conditions, limits, factors, zero states, Expand."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from effdl.graph.edit import has_reference, remove_if_unused
from effdl.graph.scope import Scope, covers
from effdl.graph.walk import is_op, only_user, producer
from effdl.graph.weights import Array, Names, add_initializer, constant

_BROADCASTING = """
Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Mul Or Pow Sub Where Xor
"""
BROADCAST = tuple(_BROADCASTING.split())
_STATES = {"GRU": (5,), "LSTM": (5, 6), "RNN": (5,)}
_LARGE = 1e4
"""Factors up to this, and down to its inverse, are multiplied: nothing near overflow comes of it."""
_MOST = 1 << 16


def swap_where(node: ir.Node, scope: Scope, names: Names | None) -> str:
    """Where(Not(c), a, b) is Where(c, b, a)."""
    negation = producer(node.inputs[0], "Not") if is_op(node, "Where") else None
    if negation is None or only_user(negation.outputs[0]) is not node:
        return ""
    condition, a, b = negation.inputs[0], node.inputs[1], node.inputs[2]
    for index, value in enumerate((condition, b, a)):
        node.replace_input_with(index, value)
    remove_if_unused(negation)
    return "its branches swapped instead of the Not before it"


def merge_clips(node: ir.Node, scope: Scope, names: Names | None) -> str:
    """Clip(Clip(x)) with limits that overlap is one Clip."""
    before = producer(node.inputs[0], "Clip") if is_op(node, "Clip") else None
    if before is None or only_user(before.outputs[0]) is not node or names is None:
        return ""
    first, second = _limits(before, scope.opset), _limits(node, scope.opset)
    if first is None or second is None or has_reference(before) or node.graph is None:
        return ""
    low = max(first[0], second[0])
    high = min(first[1], second[1])
    if low > high:
        return ""
    if scope.opset < 11:
        for name, limit in (("min", low), ("max", high)):
            if not math.isinf(limit):
                node.attributes[name] = ir.AttrFloat32(name, limit)
    else:
        dtype = scope.shapes.dtype(before.inputs[0])
        if dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE):
            return ""
        for index, limit in ((1, low), (2, high)):
            if math.isinf(limit):
                continue
            array = np.array(limit, dtype.numpy())
            value = add_initializer(node.graph, names, f"{node.name or 'Clip'}_limit", array)
            if index >= len(node.inputs):
                node.resize_inputs(index + 1)
            node.replace_input_with(index, value)
    node.replace_input_with(0, before.inputs[0])
    remove_if_unused(before)
    return "takes in the Clip before it"


def _limits(node: ir.Node, opset: int) -> tuple[float, float] | None:
    found = []
    for index, name, default in ((1, "min", -math.inf), (2, "max", math.inf)):
        if opset < 11:
            attribute = node.attributes.get(name)
            found.append(default if attribute is None else attribute.as_float())
            continue
        if index >= len(node.inputs) or node.inputs[index] is None:
            found.append(default)
            continue
        array = constant(node.inputs[index])
        if array is None or array.size != 1 or math.isnan(float(array.reshape(()))):
            return None
        found.append(float(array.reshape(())))
    return found[0], found[1]


def merge_factors(node: ir.Node, scope: Scope, names: Names | None) -> str:
    """(x * a) * b with constants is x * (a * b): one rounding less."""
    if not is_op(node, "Mul") or names is None or scope.opset < 7 or node.graph is None:
        return ""
    outer = _factor(node)
    before = producer(outer[0], "Mul") if outer is not None else None
    if before is None or outer is None or only_user(before.outputs[0]) is not node:
        return ""
    inner = _factor(before)
    if inner is None or has_reference(before) or inner[1].dtype != outer[1].dtype:
        return ""
    source, a, b = inner[0], inner[1], outer[1]
    rank = scope.rank(source)
    if rank is None or (a.size > 1 and b.size > 1) or max(a.ndim, b.ndim) > rank:
        return ""
    if max(a.size, b.size) > _MOST or not (_moderate(a) and _moderate(b)):
        return ""
    product = (a.astype(np.float64) * b.astype(np.float64)).astype(a.dtype)
    value = add_initializer(node.graph, names, f"{node.name or 'Mul'}_factor", product)
    node.replace_input_with(0, source)
    node.replace_input_with(1, value)
    remove_if_unused(before)
    return "takes in the factor before it"


def _factor(node: ir.Node) -> tuple[ir.Value, Array] | None:
    for data, other in ((0, 1), (1, 0)):
        array, value = constant(node.inputs[other]), node.inputs[data]
        if array is not None and value is not None and array.dtype in (np.float32, np.float64):
            return (value, array) if constant(value) is None else None
    return None


def _moderate(array: Array) -> bool:
    size = np.abs(array.astype(np.float64))
    return bool(np.all((size <= _LARGE) & (size >= 1 / _LARGE)))


def drop_zero_states(node: ir.Node, scope: Scope, names: Names | None) -> str:
    """LSTM, GRU and RNN start from zeros when no initial state is given."""
    dropped = False
    for index in _STATES.get(node.op_type, ()) if is_op(node, *_STATES) else ():
        if index < len(node.inputs) and _is_zero(node.inputs[index]):
            maker = node.inputs[index]
            node.replace_input_with(index, None)
            if maker is not None and (made_by := maker.producer()) is not None:
                remove_if_unused(made_by)
            dropped = True
    return "starts from zeros by itself" if dropped else ""


def _is_zero(value: ir.Value | None) -> bool:
    array = constant(value)
    if array is not None:
        return bool(array.size and array.size <= _MOST and not np.any(array))
    node = producer(value, "ConstantOfShape", "Expand")
    if node is None or has_reference(node):
        return False
    if is_op(node, "Expand"):
        return _is_zero(node.inputs[0])
    fill = node.attributes.get("value")
    return fill is None or not np.any(fill.as_tensor().numpy())


def skip_expand(node: ir.Node, scope: Scope, names: Names | None) -> str:
    """An Expand is not needed where the operator behind it broadcasts to that shape anyway."""
    if not is_op(node, *BROADCAST) or scope.opset < 7:
        return ""
    for index, value in enumerate(node.inputs):
        expand = producer(value, "Expand")
        if expand is None or value is None or only_user(value) is not node:
            continue
        goal, source = scope.facts.dims(value), expand.inputs[0]
        others = [scope.facts.dims(v) for k, v in enumerate(node.inputs) if k != index]
        if goal is None or source is None or not any(covers(o, goal) for o in others):
            continue
        node.replace_input_with(index, source)
        remove_if_unused(expand)
        return "broadcasts by itself, without the Expand before it"
    return ""
