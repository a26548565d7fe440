"""Layers that read one value: what makes two of them the same but for their weights, and joining these."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.match import label, need, other, some
from effdl.graph.walk import MICROSOFT, float_attr, int_attr, ints_attr, is_op, only_user, str_attr
from effdl.graph.weights import constant, constant_tensor, scalar, shared

Array = npt.NDArray[Any]
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
LINEAR = ("MatMul", "Gemm")
_ELEMENTWISE = (
    *("Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "Tanh", "Softplus"),
    *("Softsign", "HardSwish", "Mish", "Gelu", "Clip"),
)
_CONTRIB = ("Gelu", "FastGelu", "QuickGelu")


@dataclass(frozen=True)
class Branch:
    """One layer that reads ``node.inputs[0]``.

    Args:
        node: MatMul, Gemm or Conv.
        kind: equal for layers that may become one.
        width: number of outputs: columns or channels.
        bias: its constant bias, None without one; ``bias_add`` the Add that holds that of a MatMul.
    """

    node: ir.Node
    kind: Hashable
    width: int
    bias: ir.Value | None = None
    bias_add: ir.Node | None = None

    @property
    def end(self) -> ir.Value:
        """The value that the layer makes, bias included."""
        return (self.bias_add or self.node).outputs[0]

    @property
    def weight(self) -> Array:
        """The weight as [inputs, outputs] of a MatMul or Gemm, [outputs, ...] of a Conv."""
        array = constant(self.node.inputs[1])
        assert array is not None
        return array.T if is_op(self.node, "Gemm") and int_attr(self.node, "transB", 0) else array

    def bias_numbers(self, dtype: np.dtype[Any]) -> Array:
        """One number per output: bias times beta, zeros without one."""
        array = constant(self.bias)
        if array is None:
            return np.zeros(self.width, dtype)
        beta = float_attr(self.node, "beta", 1.0) if is_op(self.node, "Gemm") else 1.0
        if beta != 1.0:
            array = (array.astype(np.float64) * beta).astype(dtype)
        return np.broadcast_to(array.ravel(), (self.width,))


def branch_of(node: ir.Node, rank: int | None) -> Branch:
    """Read a MatMul, Gemm or Conv.

    Args:
        node: the layer.
        rank: of its output, None when unknown.

    Raises:
        Mismatch: weights that are computed, shared or of no float type; a bias that is computed
            or differs by row; a transposed input; groups.
    """
    value = some(node.inputs[1], "it has no weight")
    weight = some(constant_tensor(value), "its weight is computed")
    need(weight.dtype in FLOATS, f"its weight is {weight.dtype.name.lower()}")
    need(not shared(value), "its weight has other users")
    shape = tuple(weight.shape.numpy())
    if is_op(node, "Conv"):
        return _conv(node, weight.dtype, shape)
    need(len(shape) == 2, f"its weight has {len(shape)} axes, not 2")
    if is_op(node, "MatMul"):
        bias, add = _bias_behind(node, shape[1], rank)
        return Branch(node, ("linear", weight.dtype, 1.0), shape[1], bias, add)
    need(int_attr(node, "transA", 0) == 0, "its input is transposed")
    width = shape[0] if int_attr(node, "transB", 0) else shape[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        tensor = some(constant_tensor(bias), "its bias is computed")
        by_row = tensor.size not in (1, width) or (
            tensor.size > 1 and tensor.shape.numpy()[-1] != width
        )
        need(not by_row, "its bias differs by row")
    return Branch(node, ("linear", weight.dtype, float_attr(node, "alpha", 1.0)), width, bias)


def _bias_behind(
    node: ir.Node, width: int, rank: int | None
) -> tuple[ir.Value | None, ir.Node | None]:
    """Return the constant with one number per output that an Add behind a MatMul adds, and the Add."""
    add = only_user(node.outputs[0])
    if add is None or not is_op(add, "Add") or add.graph is not node.graph:
        return None, None
    bias = other(add, node.outputs[0])
    tensor = constant_tensor(bias)
    if tensor is None:
        return None, None
    shape = tensor.shape.numpy()
    fits = shape[-1:] == (width,) and tensor.size == width
    fits &= len(shape) == 1 or (rank is not None and len(shape) <= rank)
    return (bias, add) if fits else (None, None)


def _conv(node: ir.Node, dtype: ir.DataType, shape: tuple[int, ...]) -> Branch:
    axes = len(shape) - 2
    need(axes >= 1, f"its weight has {len(shape)} axes")
    groups = int_attr(node, "group", 1)
    need(groups == 1, f"grouped convolution ({groups} groups)")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    need(bias is None or constant_tensor(bias) is not None, "its bias is computed")
    ones = (1,) * axes
    kind = (
        *("conv", dtype, shape[1:]),
        ints_attr(node, "strides", ones),
        ints_attr(node, "dilations", ones),
        ints_attr(node, "pads", (0,) * (2 * axes)),
        str_attr(node, "auto_pad", "NOTSET"),
    )
    return Branch(node, kind, shape[0], bias)


@dataclass(frozen=True)
class Joined:
    """The layer that stands for several: its operator, its constants, its attributes."""

    op_type: str
    weight: Array
    bias: Array | None
    attributes: tuple[ir.Attr, ...]


def join(branches: Sequence[Branch]) -> Joined:
    """Return the layer whose outputs are those of ``branches``, one behind the other."""
    first = branches[0].node
    weights = [b.weight for b in branches]
    dtype = weights[0].dtype
    biased = any(b.bias is not None for b in branches)
    bias = np.concatenate([b.bias_numbers(dtype) for b in branches]) if biased else None
    if is_op(first, "Conv"):
        return Joined("Conv", np.concatenate(weights, 0), bias, tuple(first.attributes.values()))
    gemms = [b.node for b in branches if is_op(b.node, "Gemm")]
    if not gemms:
        return Joined("MatMul", np.concatenate(weights, 1), bias, ())
    attributes = [a for a in gemms[0].attributes.values() if a.name == "alpha"]
    transposed = all(is_op(b.node, "Gemm") and int_attr(b.node, "transB", 0) for b in branches)
    if not transposed:
        return Joined("Gemm", np.concatenate(weights, 1), bias, tuple(attributes))
    attributes.append(ir.AttrInt64("transB", 1))
    return Joined("Gemm", np.concatenate([w.T for w in weights], 0), bias, tuple(attributes))


@dataclass(frozen=True)
class Activation:
    """What is done to a value before anything else, element by element.

    Args:
        kind: equal for activations that compute the same.
        nodes: the nodes, in order; the last one makes the result.
    """

    kind: Hashable
    nodes: tuple[ir.Node, ...]


def activation_of(value: ir.Value) -> Activation | None:
    """Return the activation that alone reads ``value``, None when there is none."""
    user = only_user(value)
    if user is None:
        return _silu(value)
    known = is_op(user, *_ELEMENTWISE) or is_op(user, *_CONTRIB, domain=MICROSOFT)
    made = value.producer()
    if not known or user.inputs[0] is not value or made is None or user.graph is not made.graph:
        return None
    numbers = [None if v is None else scalar(v) for v in user.inputs[1:]]
    if any(n is None and v is not None for n, v in zip(numbers, user.inputs[1:], strict=True)):
        return None
    settings = tuple(sorted((a.name, repr(a.value)) for a in user.attributes.values()))
    return Activation((user.domain, user.op_type, settings, tuple(numbers)), (user,))


def _silu(value: ir.Value) -> Activation | None:
    """x · sigmoid(x), which reads x twice."""
    made = value.producer()
    users = [u.node for u in value.uses()]
    gates = [n for n in users if is_op(n, "Sigmoid")]
    products = [n for n in users if is_op(n, "Mul")]
    if value.is_graph_output() or len(users) != 2 or not gates or not products or made is None:
        return None
    gate, product = gates[0], products[0]
    inside = gate.graph is product.graph is made.graph
    if not inside or only_user(gate.outputs[0]) is not product:
        return None
    return Activation("silu", (gate, product))


def describe(branches: Sequence[Branch]) -> str:
    """Return ``MatMul 'q', MatMul 'k' (384 and 384 outputs)`` for a message."""
    widths = " and ".join(str(b.width) for b in branches)
    return f"{', '.join(label(b.node) for b in branches)} ({widths} outputs)"


def output_axis(branches: Sequence[Branch]) -> int:
    """Return the axis of the outputs in what the layers make: the last one of MatMuls alone."""
    return -1 if all(is_op(b.node, "MatMul") for b in branches) else 1
