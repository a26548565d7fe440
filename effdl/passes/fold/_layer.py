"""The layers that can take an affine map into their weights, from either side.

The formulas are those of the ONNX operator reference: Conv and ConvTranspose (grouped), Gemm
``alpha * A' B' + beta * C``, MatMul, and BatchNormalization itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effdl.graph.walk import float_attr, int_attr, ints_attr, is_op, only_user, str_attr
from effdl.graph.weights import Names, add_initializer, constant, replace_weight, shared
from effdl.passes.fold._affine import (
    FLOATS,
    Affine,
    Declined,
    Floats,
    Numbers,
    batchnorm_parameters,
    narrow,
    narrow_bias,
    operands,
    spread_over_channels,
)

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")


@dataclass(frozen=True)
class Layer:
    """A layer with constant weights that is followed, or led, by an affine map.

    Args:
        node: Conv, ConvTranspose, Gemm, MatMul or BatchNormalization.
        bias_node: the node and input that hold the bias: ``node`` itself, or the Add after a MatMul.
        raw: its weights as they are stored; ``weight`` is the same in float64.
        bias: its bias, float64, None when it has none.
        channels: number of output channels; ``axis`` and ``rank`` say where they are in the output.
        inputs: number of input channels; they are on the same axis.
    """

    node: ir.Node
    bias_node: ir.Node | None
    bias_index: int
    raw: Numbers
    bias: Floats | None
    channels: int
    axis: int
    rank: int | None
    inputs: int

    @property
    def weight(self) -> Floats:
        """Its weights in float64."""
        return self.raw.astype(np.float64)

    def _vectors(self, affine: Affine, channels: int) -> tuple[Floats, Floats]:
        found = []
        for array in (affine.scale, affine.shift):
            if array.ndim and self.rank is None:
                raise Declined(f"the rank of what {_label(self.node)} gives is not known")
            vector = (
                spread_over_channels(array, self.axis, self.rank or 0, channels)
                if array.ndim
                else array
            )
            found.append(np.broadcast_to(vector, (channels,)))
        return found[0], found[1]

    def after(self, affine: Affine) -> tuple[Floats | None, Floats]:
        """Return weights and bias of this layer with ``affine`` applied to its output.

        The weights are None when they stay as they are.

        Raises:
            Declined: the map is not one number per channel.
        """
        scale, shift = self._vectors(affine, self.channels)
        bias = np.zeros(self.channels) if self.bias is None else self.bias
        if is_op(self.node, "Gemm"):
            bias = bias * float_attr(self.node, "beta", 1.0)
        weight = self._scaled(scale) if affine.scales else None
        return weight, bias * scale + shift

    def _scaled(self, scale: Floats) -> Floats:
        weight = self.weight
        rest = (1,) * (weight.ndim - 2)
        if is_op(self.node, "BatchNormalization"):
            return weight * scale
        if is_op(self.node, "Conv"):
            return weight * scale.reshape(-1, 1, *rest)
        if is_op(self.node, "ConvTranspose"):
            group = int_attr(self.node, "group", 1)
            inner = weight.shape[0] // group
            parts = weight.reshape(group, inner, *weight.shape[1:])
            return (parts * scale.reshape(group, 1, -1, *rest)).reshape(weight.shape)
        if is_op(self.node, "Gemm") and int_attr(self.node, "transB", 0):
            return weight * scale[:, None]
        return weight * scale[None, :]

    def before(self, affine: Affine) -> tuple[Floats, Floats]:
        """Return weights and bias of this layer with ``affine`` applied to its input.

        Raises:
            Declined: the map is not one number per channel, or shifts what the layer pads.
        """
        if affine.shifts and is_op(self.node, "Conv") and padded(self.node):
            raise Declined(f"{_label(self.node)} behind it pads with zeros, before which it shifts")
        if affine.shifts and is_op(self.node, "ConvTranspose"):
            raise Declined(f"{_label(self.node)} behind it spreads a shift unevenly")
        if is_op(self.node, "Gemm") and int_attr(self.node, "transA", 0):
            raise Declined(f"{_label(self.node)} behind it takes its input transposed")
        scale, shift = self._vectors(affine, self.inputs)
        weight = self.weight
        bias = np.zeros(self.channels) if self.bias is None else self.bias
        if is_op(self.node, "BatchNormalization"):
            _, _, mean, deviation = batchnorm_parameters(self.node)
            return weight * scale, bias + weight * (scale * mean - mean + shift) / deviation
        if is_op(self.node, "ConvTranspose"):
            return weight * scale.reshape(-1, *(1,) * (weight.ndim - 1)), bias
        if is_op(self.node, "Conv"):
            return self._before_conv(scale, shift, bias)
        alpha = float_attr(self.node, "alpha", 1.0) if is_op(self.node, "Gemm") else 1.0
        if is_op(self.node, "Gemm"):
            bias = bias * float_attr(self.node, "beta", 1.0)
            if int_attr(self.node, "transB", 0):
                return weight * scale[None, :], bias + alpha * (weight @ shift)
        return weight * scale[:, None], bias + alpha * (shift @ weight)

    def _before_conv(self, scale: Floats, shift: Floats, bias: Floats) -> tuple[Floats, Floats]:
        weight = self.weight
        inner = weight.shape[1]
        group = self.inputs // inner
        # Output channel o reads the input channels of its group, in order.
        rows = np.repeat(np.arange(group), weight.shape[0] // group)
        scales, shifts = (v.reshape(group, inner)[rows] for v in (scale, shift))
        rest = (1,) * (weight.ndim - 2)
        offset = (weight * shifts.reshape(*shifts.shape, *rest)).reshape(self.channels, -1).sum(1)
        return weight * scales.reshape(*scales.shape, *rest), bias + offset


def _label(node: ir.Node) -> str:
    return f"{node.op_type} '{node.name}'"


def padded(node: ir.Node) -> bool:
    """Whether a Conv adds a border of zeros."""
    return any(ints_attr(node, "pads")) or str_attr(node, "auto_pad", "NOTSET") in (
        "SAME_UPPER",
        "SAME_LOWER",
    )


def layer_ending_in(value: ir.Value) -> tuple[ir.Node, ir.Node | None] | None:
    """Return the layer that makes ``value`` and, for a MatMul, the Add of its bias in between."""
    maker = value.producer()
    if maker is None:
        return None
    if is_layer(maker):
        return maker, None
    if is_op(maker, "Add") and (found := operands(maker)) is not None:
        first = found[0].producer()
        if first is not None and is_op(first, "MatMul") and is_layer(first):
            return (first, maker) if only_user(found[0]) is maker else None
    return None


def layer_beginning_with(node: ir.Node) -> tuple[ir.Node, ir.Node | None] | None:
    """Return ``node`` as a layer with, for a MatMul, the Add of its bias behind it."""
    if not is_layer(node):
        return None
    if not is_op(node, "MatMul"):
        return node, None
    add = only_user(node.outputs[0])
    if add is None or not is_op(add, "Add") or add.graph is not node.graph:
        return node, None
    found = operands(add)
    return (node, add) if found is not None and _fits_as_bias(node, found[1]) else (node, None)


def _fits_as_bias(node: ir.Node, array: Numbers) -> bool:
    weight = constant(node.inputs[1])
    if weight is None or weight.ndim != 2:
        return False
    channels = weight.shape[1]
    return array.size in (1, channels) and array.shape[-1:] in ((), (1,), (channels,))


def is_layer(node: ir.Node) -> bool:
    """Whether ``node`` is a layer with weights; a product of two computed tensors is none."""
    return is_op(node, *LAYERS) and (
        not is_op(node, "MatMul") or constant(node.inputs[1]) is not None
    )


def layer_of(
    node: ir.Node, bias_add: ir.Node | None, rank: int | None, *, only_bias: bool = False
) -> Layer:
    """Return ``node`` as a Layer.

    Args:
        node: Conv, ConvTranspose, Gemm, MatMul or BatchNormalization.
        bias_add: for a MatMul, the Add with its bias, if there is one.
        rank: of what it gives; needed for MatMul and BatchNormalization, None when not known.
        only_bias: the weights will stay: they may be shared, or computed and then count as zeros.

    Raises:
        Declined: weights that are not constant, shared, or of no floating-point type.
    """
    if is_op(node, "BatchNormalization"):
        gamma, beta, _, _ = batchnorm_parameters(node)
        return Layer(node, node, 2, gamma, beta, gamma.size, 1, rank, gamma.size)
    value = node.inputs[1]
    weight = constant(value)
    if weight is None and only_bias:
        weight = _stand_in(value)
    if weight is None or value is None:
        raise Declined(f"the weight of {_label(node)} is not constant")
    if ir.DataType.from_numpy(weight.dtype) not in FLOATS:
        raise Declined(f"the weight of {_label(node)} is of type {weight.dtype}")
    if shared(value) and not only_bias:
        raise Declined(f"the weight of {_label(node)} has other users")
    if is_op(node, "MatMul"):
        return _matmul(node, bias_add, weight, rank)
    bias: Floats | None = None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        own = constant(node.inputs[2])
        if own is None:
            raise Declined(f"the bias of {_label(node)} is not constant")
        bias = own.astype(np.float64)
    inputs, channels = _channels(node, weight)
    if bias is not None and is_op(node, "Gemm"):
        if bias.ndim > 2 or (bias.size > 1 and bias.shape[-1] != channels):
            raise Declined(f"the bias of {_label(node)} is not one number per output")
        bias = bias.reshape(-1) if bias.size in (1, channels) else bias
    return Layer(node, node, 2, weight, bias, channels, 1, weight.ndim, inputs)


def _stand_in(value: ir.Value | None) -> Numbers | None:
    """Return zeros of the shape and type of a computed weight, None when these are not known."""
    if value is None or value.shape is None or value.dtype not in FLOATS:
        return None
    dims = [d for d in value.shape if isinstance(d, int) and d > 0]
    if len(dims) != len(value.shape) or len(dims) < 2:
        return None
    return np.broadcast_to(np.zeros((), value.dtype.numpy()), dims)


def _channels(node: ir.Node, weight: Numbers) -> tuple[int, int]:
    first, second = int(weight.shape[0]), int(weight.shape[1])
    if is_op(node, "ConvTranspose"):
        return first, second * int_attr(node, "group", 1)
    if is_op(node, "Conv"):
        return second * int_attr(node, "group", 1), first
    return (second, first) if int_attr(node, "transB", 0) else (first, second)


def _matmul(node: ir.Node, bias_add: ir.Node | None, weight: Numbers, rank: int | None) -> Layer:
    if weight.ndim != 2 or (rank is not None and rank < 2):
        raise Declined(f"the shapes of {_label(node)} are not known to be those of a layer")
    inputs, channels = weight.shape
    bias, index = None, 1
    if bias_add is not None:
        found = operands(bias_add)
        assert found is not None
        _, array, on_left = found
        bias, index = array.astype(np.float64).ravel(), 0 if on_left else 1
        last = array.shape[-1:] in ((), (1,), (channels,))
        if array.ndim > (1 if rank is None else rank) or bias.size not in (1, channels) or not last:
            raise Declined(f"the bias of {_label(node)} is not one number per output")
    axis = 0 if rank is None else rank - 1
    return Layer(node, bias_add, index, weight, bias, channels, axis, rank, inputs)


@dataclass(frozen=True)
class Update:
    """New weights of a layer, in its type, ready to be written.

    Args:
        layer: the layer.
        weight: its new weight, None when it keeps what it has.
        bias: its new bias, None when it keeps what it has.
    """

    layer: Layer
    weight: Numbers | None
    bias: Numbers | None

    @property
    def adds_node(self) -> bool:
        """Whether a MatMul gets a bias that it has no place for: an Add has to be made."""
        return self.bias is not None and self.layer.bias_node is None


def update(layer: Layer, weight: Floats | None, bias: Floats | None) -> Update:
    """Return the new weights of ``layer`` in its type; it keeps those that are None.

    Raises:
        Declined: they do not fit the type.
    """
    value = layer.node.inputs[1]
    like = constant(value)
    if like is None:
        like = _stand_in(value)
    assert like is not None
    new = None if weight is None else narrow(weight, like, _output_axis(layer, weight))
    return Update(layer, new, None if bias is None else narrow_bias(bias, like))


def _output_axis(layer: Layer, weight: Floats) -> int:
    node = layer.node
    if is_op(node, "Conv", "BatchNormalization"):
        return 0
    if is_op(node, "ConvTranspose"):
        return 1
    return 0 if is_op(node, "Gemm") and int_attr(node, "transB", 0) else weight.ndim - 1


def write(change: Update, names: Names) -> None:
    """Put the new weights into the graph."""
    layer, node = change.layer, change.layer.node
    if change.weight is not None:
        replace_weight(node, 1, change.weight, names)
    if change.bias is None:
        return
    if is_op(node, "Gemm"):
        node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
    owner, index = layer.bias_node, layer.bias_index
    assert isinstance(node.graph, ir.Graph)
    name = f"{node.name or node.op_type}_bias"
    if owner is None:
        _add_behind(node, add_initializer(node.graph, names, name, change.bias), names)
    elif index < len(owner.inputs) and owner.inputs[index] is not None:
        replace_weight(owner, index, change.bias, names)
    else:
        owner.resize_inputs(max(index + 1, len(owner.inputs)))
        owner.replace_input_with(index, add_initializer(node.graph, names, name, change.bias))


def _add_behind(node: ir.Node, bias: ir.Value, names: Names) -> None:
    """Put an Add of ``bias`` behind a MatMul."""
    old = node.outputs[0]
    add = ir.Node(
        "",
        "Add",
        [None, bias],
        name=names.fresh(f"{node.name or 'matmul'}_add"),
        outputs=[
            ir.Value(name=names.fresh(f"{old.name}_add"), type=old.type, shape=_copy(old.shape))
        ],
    )
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_after(node, add)
    new = add.outputs[0]
    if old.is_graph_output():
        old.name, new.name = new.name, old.name
        outputs = node.graph.outputs
        for k, output in enumerate(outputs):
            if output is old:
                outputs[k] = new
    for user, index in list(old.uses()):
        user.replace_input_with(index, new)
    add.replace_input_with(0, old)


def _copy(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else shape.copy()
