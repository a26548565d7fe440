"""Integer weights of layers: made once, used by every draft of an 8-bit model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.walk import is_op
from effdl.graph.weights import constant, constant_tensor
from effdl.observe.moments import Moments
from effdl.passes.quantize._format import Format
from effdl.passes.quantize._grids import Grid, weight_axis
from effdl.passes.quantize._weights import with_weight
from effdl.solve.adaptive import adaptive_rounding, shrunk
from effdl.solve.quantize import (
    Float,
    Int,
    WeightMethod,
    bias_scale_floor,
    dequantize,
    mean_shift,
    quantize,
    weight_scales,
)

Shift = npt.NDArray[np.float64]


class LayerWeights:
    """Scales, integers and what rounding does to means.

    Args:
        form: the number format.
        per_channel: one scale per output channel.
        method: how a scale is chosen.
    """

    def __init__(self, form: Format, per_channel: bool, method: WeightMethod) -> None:
        self.form = form
        self._per_channel = per_channel
        self._method = method
        self._made: dict[Any, tuple[Any, Any]] = {}

    def scales(self, node: ir.Node, grid: Grid) -> Float:
        """Return the scales of a Conv, MatMul or Gemm: one per output channel, or one, 0-d.

        Args:
            node: the layer.
            grid: of its input.
        """
        tensor, axis, bias = self._tensor(node), self.axis(node), bias_of(node)
        guard = self.form.saturation_guard

        def make() -> Float:
            return with_weight(
                tensor,
                lambda w: weight_scales(w, axis, method=self._method, saturation_guard=guard),
            )

        scales: Float = self._once(tensor, ("scales", axis), make)
        floor = np.zeros(1, np.float32)
        if bias is not None and not self.form.explicit:
            floor = bias_scale_floor(bias, float(grid.scale))
        least = floor if self._per_channel else floor.max()
        result: Float = np.maximum(scales, least).astype(np.float32)
        return result

    def nearest(self, node: ir.Node, scales: Float) -> Int:
        """Return the weights rounded to nearest, in the layout of the float ones."""
        tensor, axis, kind = self._tensor(node), self.axis(node), self.form.weight_type
        zero = self.zero(scales)

        def make() -> Int:
            return with_weight(tensor, lambda w: quantize(w, scales, zero, kind, axis or 0))

        made: Int = self._once(tensor, ("nearest", axis, scales.tobytes()), make)
        return made

    def adaptive(self, node: ir.Node, scales: Float, seen: Moments, centred: bool) -> Int:
        """Return the weights rounded by what that does to the outputs of the layer.

        Args:
            node: the layer.
            scales: as ``scales`` gives them.
            seen: second moments of what it reads.
            centred: whether a bias, where there is one, takes the mean error back.
        """
        moved = centred and bias_of(node) is not None
        second = shrunk(seen.covariance if moved else seen.second, seen.rows)
        flip = weight_axis(node) == 1
        guard = self.form.saturation_guard

        def work(array: Float) -> Int:
            weight = array.T if flip else array.reshape(array.shape[0], -1)
            each = np.broadcast_to(scales, len(weight))
            q = adaptive_rounding(weight, each, second, saturation_guard=guard)
            return np.ascontiguousarray(q.T if flip else q.reshape(array.shape))

        q = with_weight(self._tensor(node), work)
        return (q + self.zero(scales).flat[0].astype(np.int16)).astype(self.form.weight_type)

    def shift(self, node: ir.Node, q: Int, scales: Float, mean: Shift) -> Shift:
        """Return by how much the rounding of the weights moves the mean of each output, [N].

        Args:
            node: the layer.
            q, scales: its weights.
            mean: of what it reads, [groups, K].
        """
        tensor, zero = self._tensor(node), self.zero(scales)
        flip = is_op(node, "Gemm") and weight_axis(node) == 1

        def work(weight: Float) -> Shift:
            change = dequantize(q, scales, zero, self.axis(node) or 0) - weight
            rows = change.T if flip else change.reshape(change.shape[0], -1)
            return mean_shift(rows, mean)

        key = ("shift", scales.tobytes(), id(q), id(mean))
        made, _ = self._once(tensor, key, lambda: (with_weight(tensor, work), (q, mean)))
        result: Shift = made
        return result

    def axis(self, node: ir.Node) -> int | None:
        """Return the axis of the scales, None for one scale."""
        return weight_axis(node) if self._per_channel else None

    def zero(self, scales: Float) -> npt.NDArray[np.integer[Any]]:
        """Return the zero points of weights with these scales."""
        kind = self.form.weight_type
        return np.full(scales.shape, 0 if kind == "int8" else 128, kind)

    def _tensor(self, node: ir.Node) -> ir.TensorProtocol:
        tensor = constant_tensor(node.inputs[1])
        assert tensor is not None
        return tensor

    def _once(self, tensor: ir.TensorProtocol, what: Any, make: Callable[[], Any]) -> Any:
        """Return what was made of a tensor before; it is held, so that its id stays its own."""
        key = (id(tensor), what)
        if key not in self._made:
            self._made[key] = (tensor, make())
        return self._made[key][1]


def bias_of(node: ir.Node) -> Float | None:
    """Return the bias of a layer, one number per output, None where it has none."""
    array = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    return None if array is None else array.reshape(-1).astype(np.float32)
