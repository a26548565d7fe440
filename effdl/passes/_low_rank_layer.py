"""A layer as others see it that write it as a chain of thinner ones: its matrix, its places, its bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.bias import bias_of
from effdl.graph.dims import Dims
from effdl.graph.io import METADATA_PREFIX
from effdl.graph.shapes import Shapes
from effdl.graph.walk import float_attr, int_attr, ints_attr, is_op, producer
from effdl.graph.weights import Names, add_initializer, constant, constant_tensor, shared

Array = npt.NDArray[Any]
MARK = METADATA_PREFIX + "low_rank"
FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
LAYERS = ("MatMul", "Gemm", "Conv", "ConvTranspose")


@dataclass(frozen=True)
class Link:
    """One of the nodes that stand for a layer.

    Args:
        op_type: its operator, with ``attributes``.
        shape: of its weight.
        hidden: the shape of what it gives, None when unknown; of no interest for the last.
        left: the weight is its first input.
    """

    op_type: str
    attributes: dict[str, ir.Attr]
    shape: tuple[int, ...]
    hidden: Dims | None = None
    left: bool = False


@dataclass(frozen=True)
class Layer:
    """A node with a constant weight.

    Args:
        node: the node.
        matrix: [N, K]: outputs by the numbers in a row that it reads, as ``observe`` tells rows; of a
            ConvTranspose [N * places, C].
        outputs, inputs: channels; ``kernel`` the sizes of a convolution's window, empty for products.
        x, y: the shapes of input and output as declared, for the values between.
        read, written: positions of input and output; ``halfway`` those after a vertical kernel alone.
        shiftable: a constant can be added to each output.
    """

    node: ir.Node
    matrix: Array
    outputs: int
    inputs: int
    kernel: tuple[int, ...]
    x: Dims | None
    y: Dims | None
    read: int
    written: int
    halfway: int
    shiftable: bool

    @property
    def places(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one run."""
        at = self.read if is_op(self.node, "ConvTranspose") else self.written
        return self.outputs * self.inputs * self.places * at


def weight_index(node: ir.Node) -> int:
    """Return which input of a layer is its weight: a constant one, if any."""
    left = is_op(node, "MatMul") and constant_tensor(node.inputs[1]) is None
    return 0 if left and constant_tensor(node.inputs[0]) is not None else 1


def usable_weight(node: ir.Node, in_function: bool) -> tuple[ir.TensorProtocol | None, str]:
    """Return the constant weight of a node that can be split, or why not ('' for no candidate)."""
    if MARK in node.metadata_props:
        return None, "is a low-rank factor already"
    value = node.inputs[weight_index(node)]
    tensor = constant_tensor(value)
    if value is None or tensor is None:
        source = producer(value, "DequantizeLinear")
        if source is not None and constant_tensor(source.inputs[0]) is not None:
            return None, "its weight is quantized"
        return None, "" if is_op(node, "MatMul") else "its weight is computed or fed, not constant"
    reason = _refusal(node, tensor)
    if not reason and shared(value):
        reason = f"its weight '{value.name}' has other users"
    if not reason and in_function:
        reason = "inside a function, which holds no weights of its own: inline it first"
    if not reason and not np.isfinite(tensor.numpy().astype(np.float64)).all():
        reason = "its weight has infinities or NaN"
    return (None, reason) if reason else (tensor, "")


def _refusal(node: ir.Node, tensor: ir.TensorProtocol) -> str:
    """Return why a node with the constant weight ``tensor`` cannot be split, '' if it can."""
    rank = len(tensor.shape)
    if tensor.dtype not in FLOATS:
        return f"its weight is of type {tensor.dtype.name}, not a float"
    if is_op(node, "Conv", "ConvTranspose"):
        if int_attr(node, "group", 1) != 1:
            return f"grouped convolution ({int_attr(node, 'group', 1)} groups)"
        return "" if rank >= 3 else f"its weight has the unexpected shape {tensor.shape}"
    if rank != 2:
        return f"its weight has {rank} axes, not 2"
    if is_op(node, "Gemm") and int_attr(node, "transA", 0):
        return "its input is transposed (transA)"
    return ""


def layer_of(node: ir.Node, weight: Array, shapes: Shapes, sized: Shapes) -> Layer:
    """Return what there is to know of a node.

    Args:
        node: one that ``usable_weight`` accepts.
        weight: its weight.
        shapes: with the names of dynamic dimensions; ``sized`` with numbers in their place.
    """
    index = weight_index(node)
    value = node.inputs[1 - index]
    x, y = shapes.of(value), shapes.of(node.outputs[0])
    sized_x, sized_y = sized.of(value), sized.of(node.outputs[0])
    if is_op(node, "Conv", "ConvTranspose"):
        return _convolution(node, weight, (x, y), (sized_x, sized_y))
    flip = index == 1 and not (is_op(node, "Gemm") and int_attr(node, "transB", 0))
    matrix = weight.T if flip else weight
    axis = -1 if index == 1 or (x is not None and len(x) == 1) else -2
    positions = _product(_without(sized_x, axis))
    outputs, inputs = matrix.shape
    return Layer(
        node,
        matrix,
        outputs,
        inputs,
        (),
        x,
        y,
        positions,
        positions,
        positions,
        _shiftable(node, outputs),
    )


def _convolution(
    node: ir.Node, weight: Array, named: tuple[Dims | None, ...], sized: tuple[Dims | None, ...]
) -> Layer:
    transposed = is_op(node, "ConvTranspose")
    first, second, *sizes = weight.shape
    x, y = sized
    batch = _product(x[:1] if x else ())
    if x and y and all(isinstance(d, int) for d in (*x[2:], *y[2:])):
        read, written = batch * _product(x[2:]), batch * _product(y[2:])
        halfway = batch * _product((*y[2:3], *x[3:]))
    else:  # an output and its share of the input
        strides = ints_attr(node, "strides", (1,) * len(sizes))
        read, written = batch * math.prod(strides), batch
        halfway = batch * math.prod(strides[1:])
        if transposed:
            read, written, halfway = written, read, read
    matrix = (
        np.moveaxis(weight, 0, -1).reshape(-1, first) if transposed else weight.reshape(first, -1)
    )
    outputs, inputs = (second, first) if transposed else (first, second)
    return Layer(
        node,
        matrix,
        outputs,
        inputs,
        tuple(sizes),
        named[0],
        named[1],
        read,
        written,
        halfway,
        not transposed and _shiftable(node, outputs),
    )


def _shiftable(node: ir.Node, outputs: int) -> bool:
    """Whether there is a constant bias, or room for one."""
    if is_op(node, "MatMul"):
        return weight_index(node) == 1 and bias_of(node, outputs) is not None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return True
    array = constant(bias)
    if array is None or array.size != outputs:
        return False
    return array.shape[-1:] == (outputs,) and float_attr(node, "beta", 1.0) != 0


def _without(dims: Dims | None, axis: int) -> Dims:
    if not dims:
        return ()
    axis %= len(dims)
    return dims[:axis] + dims[axis + 1 :]


def _product(dims: Dims) -> int:
    """Multiply the known dimensions; unknown and empty ones count as 1."""
    return math.prod(d for d in dims if isinstance(d, int) and d > 0)


def put_chain(
    layer: Layer,
    node: ir.Node,
    links: Sequence[Link],
    weights: Sequence[Array],
    shift: Array | None,
    names: Names,
    mark: str,
) -> list[ir.Node]:
    """Put the links where ``node`` was; its output keeps name, type and shape.

    Args:
        layer: what is known of the node, or of one that it is a copy of.
        node: is removed.
        links: in order; ``weights`` theirs.
        shift: [N], is added to the outputs, None for nothing.
        names: of the model.
        mark: what the new nodes are marked with.
    """
    graph, old = node.graph, node.inputs[weight_index(node)]
    tensor = constant_tensor(old)
    if graph is None or isinstance(graph, ir.Function) or old is None or tensor is None:
        raise ValueError(f"{node.name}: no node of a graph with a constant weight")
    dtype = tensor.numpy().dtype
    rest = list(node.inputs[2:])
    attributes = dict(links[-1].attributes)
    if shift is not None:
        rest, attributes = _shifted(layer, node, rest, attributes, shift.astype(np.float64), names)
    base = node.name or node.op_type
    value = node.inputs[1 - weight_index(node)]
    made: list[ir.Node] = []
    for k, (link, array) in enumerate(zip(links, weights, strict=True)):
        last = k == len(links) - 1
        letter = "abc"[k]
        weight = add_initializer(
            graph, names, f"{old.name}/lr_{letter}", np.ascontiguousarray(array).astype(dtype)
        )
        out = ir.Value()
        if not last:
            shape = ir.Shape(link.hidden) if link.hidden is not None else None
            name = names.fresh(f"{base}/lr_{letter}_output")
            out = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape)
        inputs = [weight, value] if link.left else [value, weight]
        made.append(
            ir.Node(
                node.domain,
                link.op_type,
                [*inputs, *(rest if last else ())],
                attributes if last else link.attributes,
                outputs=[out],
                name=names.fresh(f"{base}/lr_{letter}"),
                metadata_props={**node.metadata_props, MARK: mark},
            )
        )
        value = out
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], made, [node.outputs[0]], [made[-1].outputs[0]]
    )
    return made


def _shifted(
    layer: Layer,
    node: ir.Node,
    rest: list[ir.Value | None],
    attributes: dict[str, ir.Attr],
    shift: Array,
    names: Names,
) -> tuple[list[ir.Value | None], dict[str, ir.Attr]]:
    """Return the bias of the last link with ``shift`` in it; of a MatMul the Add behind takes it."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    dtype = constant_array(node.inputs[weight_index(node)]).dtype
    if is_op(node, "MatMul"):
        behind = bias_of(node, layer.outputs)
        assert behind is not None
        behind.shift(shift, names)
        return rest, attributes
    gemm = is_op(node, "Gemm")
    beta = float_attr(node, "beta", 1.0) if gemm else 1.0
    bias = rest[0] if rest else None
    if bias is None and gemm:
        beta = 1.0
        attributes = {k: v for k, v in attributes.items() if k != "beta"}
    total = shift * (float_attr(node, "alpha", 1.0) if gemm else 1.0) / beta
    if bias is not None:
        total = constant_array(bias).reshape(-1).astype(np.float64) + total
    return [add_initializer(graph, names, _bias_name(bias, node), total.astype(dtype))], attributes


def _bias_name(old: ir.Value | None, node: ir.Node) -> str:
    return f"{old.name if old is not None and old.name else node.name or node.op_type}/lr_bias"


def constant_array(value: ir.Value | None) -> Array:
    """Return what a value that is known to be constant holds."""
    array = constant(value)
    if array is None:
        raise ValueError("not a constant")
    return array


def with_axis(dims: Dims | None, axis: int, size: int) -> Dims | None:
    """Return a shape with another number at one axis."""
    if dims is None:
        return None
    found = list(dims)
    found[axis] = size
    return tuple(found)


def attributes_of(node: ir.Node, **other: Sequence[int] | int | None) -> dict[str, ir.Attr]:
    """Return the attributes of a node, some replaced, those that are None left out."""
    found = {k: v for k, v in node.attributes.items() if k not in other}
    for name, value in other.items():
        if isinstance(value, int):
            found[name] = ir.AttrInt64(name, value)
        elif value is not None:
            found[name] = ir.AttrInt64s(name, value)
    return found
