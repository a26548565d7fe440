"""Clips written in several ways: Clip, Min and Max, Relu and Min, HardSigmoid."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from effdl.graph.match import split_scalar
from effdl.graph.walk import float_attr, is_op
from effdl.graph.weights import scalar


@dataclass(frozen=True)
class Saturation:
    """``nodes[-1]`` makes clip(slope · value + shift, 0, high).

    Args:
        value: what is clipped.
        high: the upper bound.
        nodes: operands before users.
    """

    value: ir.Value
    high: float
    nodes: tuple[ir.Node, ...]
    slope: float = 1.0
    shift: float = 0.0


def saturation(node: ir.Node) -> Saturation | None:
    """Read ``node`` as a clip from zero to a positive number, None when it is none."""
    found: tuple[ir.Value, float | None, float | None, tuple[ir.Node, ...]] | None
    if is_op(node, "HardSigmoid"):
        value = node.inputs[0]
        if value is None:
            return None
        slope, shift = float_attr(node, "alpha", 0.2), float_attr(node, "beta", 0.5)
        return Saturation(value, 1.0, (node,), slope, shift)
    found = _bounded(node)
    if found is None:
        return None
    value, low, high, nodes = found
    if low is None or high is None:
        inner = value.producer()
        more = _bounded(inner) if inner is not None else None
        if inner is None or more is None:
            return None
        value = more[0]
        low = low if low is not None else more[1]
        high = high if high is not None else more[2]
        nodes = (*more[3], *nodes)
        both = (more[1] is None) != (more[2] is None)
        if not both:
            return None
    if low != 0 or high is None or not high > 0:
        return None
    return Saturation(value, high, nodes)


def _bounded(
    node: ir.Node,
) -> tuple[ir.Value, float | None, float | None, tuple[ir.Node, ...]] | None:
    """Return (value, low, high, nodes) of a node that bounds a value by constants on one side or both."""
    value = node.inputs[0] if node.inputs else None
    if is_op(node, "Relu") and value is not None:
        return value, 0.0, None, (node,)
    if is_op(node, "Min", "Max"):
        parts = split_scalar(node)
        if parts is None:
            return None
        number = scalar(parts[1])
        low, high = (number, None) if node.op_type == "Max" else (None, number)
        return parts[0], low, high, (node,)
    if not is_op(node, "Clip") or value is None:
        return None
    bounds = [_bound(node, k, name) for k, name in ((1, "min"), (2, "max"))]
    if any(b is _COMPUTED for b in bounds):
        return None
    low, high = (b if isinstance(b, float) else None for b in bounds)
    return (value, low, high, (node,)) if low is not None or high is not None else None


_COMPUTED = object()


def _bound(node: ir.Node, index: int, name: str) -> object:
    """Return a bound of a Clip: a number, None when it has none, _COMPUTED when it is no constant."""
    if name in node.attributes:
        return float_attr(node, name, 0.0)
    given = node.inputs[index] if len(node.inputs) > index else None
    if given is None:
        return None
    number = scalar(given)
    return _COMPUTED if number is None else number
