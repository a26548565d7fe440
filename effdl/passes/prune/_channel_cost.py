"""What a model costs as a function of the channels that its groups keep."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from effdl.graph.channels import Channels, Group
from effdl.graph.cost import model_cost
from effdl.graph.walk import int_attr, is_op
from effdl.graph.weights import constant_tensor
from effdl.solve.channel_plan import Cost

Axes = tuple[tuple[ir.Value, int], ...]
_MATRIX = ("MatMul", "Gemm")


class Terms:
    """Collects products of lengths of axes.

    Args:
        found: the channels of the model.
        groups: which of them may be removed.
    """

    def __init__(self, found: Channels, groups: Sequence[Group]) -> None:
        self._channels = found
        self._count = len(groups)
        self._group = np.full(len(found.units.frozen), -1, np.int64)
        self._size = np.array([len(g) for g in groups], np.float64)
        for number, group in enumerate(groups):
            self._group[group.units] = number
        self._terms: list[tuple[float, list[tuple[float, np.ndarray]]]] = []
        self._rest = 0.0

    def add(self, weight: float, axes: Axes) -> None:
        """Add ``weight`` times the share that is left of each axis."""
        shares = [s for value, axis in axes if (s := self._share(value, axis)) is not None]
        if shares:
            self._terms.append((weight, shares))
        else:
            self._rest += weight

    def _share(self, value: ir.Value, axis: int) -> tuple[float, np.ndarray] | None:
        units = self._channels.of(value, axis)
        if units is None:
            return None
        groups = self._group[units]
        if (groups < 0).all():
            return None
        counts = np.bincount(groups[groups >= 0], minlength=self._count) / len(units)
        return float((groups < 0).mean()), counts / self._size

    def cost(self) -> Cost:
        """Return the sum of what was added."""
        most = max((len(s) for _, s in self._terms), default=1)
        count = len(self._terms)
        fixed = np.ones((count, most))
        share = np.zeros((count, most, self._count))
        for k, (_, shares) in enumerate(self._terms):
            for j, (constant, counts) in enumerate(shares):
                fixed[k, j], share[k, j] = constant, counts
        return Cost(np.array([w for w, _ in self._terms]), fixed, share, self._rest)


def axes_of(node: ir.Node, found: Channels) -> list[tuple[float, Axes]]:
    """Return the axes whose lengths a node's work is proportional to, with shares of the work."""
    out = node.outputs[0]
    rank = len(found.axes.get(out, ()))
    x = node.inputs[0]
    if is_op(node, "LSTM", "GRU", "RNN") and x is not None and node.inputs[1] is not None:
        tensor = constant_tensor(node.inputs[1])
        inputs = int(tensor.shape.numpy()[2]) if tensor is not None else 1
        hidden = int_attr(node, "hidden_size", 1)
        share = inputs / (inputs + hidden)
        return [(share, ((out, 3), (x, 2))), (1 - share, ((out, 3), (out, 3)))]
    if is_op(node, "Conv", "ConvTranspose") and x is not None:
        whole = int_attr(node, "group", 1) == 1
        return [(1.0, ((out, 1), (x, 1)) if whole else ((out, 1),))]
    every = tuple((out, k) for k in range(rank))
    if is_op(node, *_MATRIX) and x is not None:
        axis = -2 if is_op(node, "Gemm") and int_attr(node, "transA", 0) else -1
        return [(1.0, (*every, (x, axis)))]
    return [(1.0, every)]


def macs(model: ir.Model, found: Channels, groups: Sequence[Group]) -> Cost:
    """Return the multiply-accumulates of one inference."""
    terms = Terms(found, groups)
    for cost in model_cost(model).per_node:
        work = (cost.macs or 0) * (cost.times or 0)
        for share, axes in axes_of(cost.node, found) if work else ():
            terms.add(share * work, axes)
    return terms.cost()


def params(found: Channels, groups: Sequence[Group]) -> Cost:
    """Return the numbers in all weights that have channels."""
    terms = Terms(found, groups)
    for value, axes in found.axes.items():
        tensor = constant_tensor(value)
        if tensor is not None:
            terms.add(float(tensor.size), tuple((value, k) for k in range(len(axes))))
    return terms.cost()
