"""One scale and zero point per tensor: ranges from statistics, shared where kernels need it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effdl.graph.walk import is_op, only_user
from effdl.passes.quantize._format import Format
from effdl.passes.quantize._select import (
    SAME_RANGE,
    WEIGHTED,
    Selection,
    clip_bounds,
)
from effdl.solve.quantize import affine_parameters

_MIX = 2.0
"""Concat inputs that others read too share the output's grid up to this ratio of ranges."""
_GEMM_ACTIVATIONS = (
    *("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "Softplus", "Softsign", "HardSigmoid"),
    *("Elu", "Selu", "ThresholdedRelu", "ScaledTanh", "ParametricSoftplus", "Affine"),
)
_FREE = (-math.inf, math.inf)


@dataclass(frozen=True)
class Grid:
    """The quantization of a tensor: real = (integer - zero_point) * scale."""

    scale: np.float32
    zero_point: int


@dataclass
class _Group:
    """Tensors with one grid: their common range, and what absorbed activations clip it to."""

    members: list[str]
    low: float
    high: float
    bounds: tuple[float, float]


def needs_output(node: ir.Node, chosen: Selection) -> bool:
    """Whether the node's result becomes 8-bit: MatMul and Gemm can also write float for free.

    Not a Gemm before an activation, nor a MatMul of matrices before an Add: ONNX Runtime would fuse
    those two, in float, before it looks at the integers, and dequantize the weights at every run.
    """
    if chosen.explicit:
        return False
    if not is_op(node, "MatMul", "Gemm") or chosen.consumers(chosen.output(node)):
        return True
    after = only_user(node.outputs[0])
    if is_op(node, "Gemm"):
        return is_op(after, *_GEMM_ACTIVATIONS)
    known = chosen.info.get(node.outputs[0].name or "")
    return is_op(after, "Add") and known is not None and known.rank == 2


def feeds_silu(value: ir.Value) -> bool:
    """Whether all that is done with ``value`` is x * sigmoid(x)."""
    users = [use.node for use in value.uses()]
    gates = [n for n in users if is_op(n, "Sigmoid")]
    products = [n for n in users if is_op(n, "Mul")]
    if value.is_graph_output() or len(users) != 2 or not gates or not products:
        return False
    return gates[0].outputs[0] in products[0].inputs


def quantized_values(chosen: Selection) -> list[ir.Value]:
    """Return every activation that gets a QuantizeLinear, in the graph's order."""
    found: dict[ir.Value, None] = {}
    for node in chosen.nodes:
        for index in chosen.reads(node):
            value = node.inputs[index]
            if value is not None:
                found[value] = None
        if needs_output(node, chosen):
            found[chosen.output(node)] = None
    return list(found)


def grids(
    chosen: Selection, ranges: Mapping[str, tuple[float, float]], form: Format
) -> dict[str, Grid]:
    """Return the grid of each tensor of ``ranges`` by name; tensors of one group share the object.

    Args:
        chosen: the nodes to quantize.
        ranges: (low, high) of each tensor of ``quantized_values``.
        form: the number format.
    """
    groups = _groups(chosen, ranges)
    made: dict[int, Grid] = {}
    for group in {id(g): g for g in groups.values()}.values():
        made[id(group)] = _grid(group, form)
    return {name: made[id(group)] for name, group in groups.items()}


def _groups(chosen: Selection, ranges: Mapping[str, tuple[float, float]]) -> dict[str, _Group]:
    groups = {n: _Group([n], low, high, _FREE) for n, (low, high) in ranges.items()}
    if chosen.explicit:
        return groups
    for node in chosen.nodes:
        bounds = clip_bounds(chosen.absorbed.get(node, node))
        name = chosen.output(node).name or ""
        if bounds is not None and name in groups:
            groups[name].bounds = bounds
    for node in chosen.nodes:
        if is_op(node, *SAME_RANGE) and node.inputs[0] is not None:
            _join(groups, node.inputs[0].name or "", node.outputs[0].name or "")
    for node in chosen.nodes:
        if is_op(node, "Concat"):
            for value in node.inputs:
                if value is not None:
                    _join_if_harmless(groups, value, node.outputs[0].name or "")
    return groups


def _join(groups: dict[str, _Group], first: str, second: str) -> None:
    a, b = groups[first], groups[second]
    if a is b:
        return
    a.members += b.members
    a.low, a.high = min(a.low, b.low), max(a.high, b.high)
    a.bounds = max(a.bounds[0], b.bounds[0]), min(a.bounds[1], b.bounds[1])
    for name in b.members:
        groups[name] = a


def _join_if_harmless(groups: dict[str, _Group], value: ir.Value, output: str) -> None:
    """Let a Concat input use the output's grid (a plain copy), unless others need its finer one."""
    a, b = groups[value.name or ""], groups[output]
    low, high = min(a.low, b.low), max(a.high, b.high)
    if any(low < g.bounds[0] or high > g.bounds[1] for g in (a, b)):
        return  # the absorbed Relu or Clip of one would not hold, or clip the other
    own = len(a.members) == 1 and len(list(value.uses())) == 1
    narrow = min(a.high - a.low, b.high - b.low)
    if own or high - low <= _MIX * narrow:
        _join(groups, output, value.name or "")


def _grid(group: _Group, form: Format) -> Grid:
    low, high = max(group.low, group.bounds[0]), min(group.high, group.bounds[1])
    dtype = form.activation_type
    scale, zero = affine_parameters(low, high, dtype, symmetric=form.symmetric_activations)
    info = np.iinfo(dtype)
    if group.bounds[1] < math.inf and info.max > zero:
        scale = min(scale, _below(group.bounds[1] / (info.max - zero)))
    if -math.inf < group.bounds[0] < 0 and zero > info.min:
        scale = min(scale, _below(-group.bounds[0] / (zero - info.min)))
    return Grid(scale, zero)


def _below(number: float) -> np.float32:
    """The float32 next to ``number`` that is not above it: the grid must not leave the clip."""
    rounded = np.float32(number)
    return rounded if float(rounded) <= number else np.nextafter(rounded, np.float32(0))


def weight_axis(node: ir.Node) -> int:
    """Return the axis of the output channels in the weight of a Conv, MatMul or Gemm."""
    if not is_op(node, *WEIGHTED):
        raise ValueError(f"{node.op_type} has no weight")
    transposed = node.attributes.get("transB")
    return 0 if is_op(node, "Conv") or (transposed is not None and transposed.as_int()) else 1
