"""What layer norms and root-mean-square norms have in common: x, or x less its mean, by a root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from effdl.graph.match import keeps_rank, label, need, other, some, split_scalar, step
from effdl.graph.shapes import Shapes
from effdl.graph.walk import int_attr, ints_attr, is_op, only_user
from effdl.graph.weights import Array, Names, add_initializer, constant, scalar

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Norm:
    """A norm in the graph: ``root`` = x / sqrt(mean square + epsilon) · scale + bias.

    Args:
        size: the normalized shape, the last dimensions of x.
        scale, bias: the constants, None when the formula has none.
        nodes: everything that the new node stands for.
    """

    x: ir.Value
    root: ir.Value
    epsilon: float
    size: tuple[int, ...]
    nodes: tuple[ir.Node, ...]
    scale: ir.Value | None = None
    bias: ir.Value | None = None

    @property
    def given(self) -> str:
        """``" with scale and bias"`` for messages, as far as they are there."""
        parts = [n for n, v in (("scale", self.scale), ("bias", self.bias)) if v is not None]
        return f" with {' and '.join(parts)}" if parts else ""


def parameter(
    value: ir.Value | None,
    size: tuple[int, ...],
    dtype: ir.DataType,
    graph: ir.Graph,
    names: Names,
    base: str,
) -> ir.Value:
    """Return ``value`` when it has the shape of the normalized part, else a new constant that has."""
    if value is None:
        return add_initializer(graph, names, base, np.ones(size, dtype.numpy()))
    array = constant(value)
    assert array is not None
    if array.shape == size:
        return value
    full = fit(array, size, array.ndim)
    assert full is not None
    return add_initializer(graph, names, base, full)


def fit(array: Array, size: tuple[int, ...], rank: int) -> Array | None:
    """Return ``array`` in the shape ``size`` if multiplying by it keeps a value of ``rank`` so."""
    extra = array.ndim - len(size)
    if array.ndim > rank or any(d != 1 for d in array.shape[: max(extra, 0)]):
        return None
    inner = array.reshape(array.shape[max(extra, 0) :])
    padded = (1,) * (len(size) - inner.ndim) + inner.shape
    if any(d not in (1, n) for d, n in zip(padded, size, strict=True)):
        return None
    return np.broadcast_to(inner, size).copy()


def squares(value: ir.Value) -> list[ir.Node]:
    """Nodes that square ``value``, also behind a Cast."""
    found = []
    for use in value.uses():
        user = use.node
        if is_op(user, "Cast"):
            found += squares(user.outputs[0])
        elif is_square(user) and use.idx == 0:
            found.append(user)
    return list(dict.fromkeys(found))


def is_square(node: ir.Node) -> bool:
    """Whether ``node`` is Pow(v, 2) or Mul(v, v)."""
    if is_op(node, "Pow"):
        return scalar(node.inputs[1]) == 2
    return is_op(node, "Mul") and node.inputs[0] is node.inputs[1]


def mean_square(square: ir.Node, rank: int | None) -> tuple[ir.Node, ir.Node, int, float]:
    """Follow ``square`` to the mean plus epsilon.

    Returns:
        The ReduceMean, the Add, how many axes are reduced (the last ones), epsilon.

    Raises:
        Mismatch: the first condition that fails.
    """
    exponent = square.inputs[1]
    if square.op_type == "Pow" and exponent is not None:
        need(keeps_rank(exponent, rank), "the exponent may add a dimension")
    mean = step(square.outputs[0], "ReduceMean")
    count = trailing_axes(mean, rank)
    add = step(mean.outputs[0], "Add")
    operands = some(split_scalar(add), f"{label(add)} adds no single number: epsilon is missing")
    need(operands[0] is mean.outputs[0], "epsilon is computed")
    need(keeps_rank(operands[1], rank), "epsilon may add a dimension")
    epsilon = scalar(operands[1])
    need(epsilon is not None and epsilon >= 0, "epsilon is negative")
    assert epsilon is not None
    return mean, add, count, float(np.float32(epsilon))


def sizes(x: ir.Value, count: int, shapes: Shapes, name: str) -> tuple[int, ...]:
    """Return the last ``count`` dimensions of ``x``; they and its dtype must be known."""
    dtype = shapes.dtype(x)
    need(
        dtype in FLOATS,
        f"'{x.name}' is {dtype.name if dtype else 'of unknown type'}; {name} sums in float32",
    )
    dims = some(shapes.of(x), f"the shape of '{x.name}' is unknown")[-count:]
    known = tuple(d for d in dims if isinstance(d, int))
    need(len(known) == count, f"the size of the normalized axes of '{x.name}' is dynamic")
    return known


def trailing_axes(node: ir.Node, rank: int | None) -> int:
    """Return how many axes ``node`` reduces; they must be the last ones, and be kept as 1."""
    need(int_attr(node, "keepdims", 1) == 1, f"{label(node)} has keepdims=0")
    axes = ints_attr(node, "axes")
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is not None:
        array = some(constant(given), f"the axes of {label(node)} are computed")
        axes = tuple(int(a) for a in array.ravel())
    if not axes:
        need(int_attr(node, "noop_with_empty_axes", 0) == 0, f"{label(node)} reduces no axis")
        return some(rank, f"{label(node)} reduces all axes of a value of unknown rank")
    if any(a >= 0 for a in axes):
        dims = some(rank, f"the rank of the input of {label(node)} is unknown")
        axes = tuple(a - dims if a >= 0 else a for a in axes)
    last = sorted(axes) == list(range(-len(axes), 0))
    need(last, f"{label(node)} reduces axes {list(axes)}, which are not the last ones")
    return len(axes)


@dataclass(frozen=True)
class Quotient:
    """Where a value is divided by the root of its mean square, as ``inverse_root`` finds it.

    Args:
        node: the Div or Mul; None when the inverse root has two users.
        power: of mean square plus epsilon at ``value``: 0.5 or -0.5.
        value: what ``node`` divides by or multiplies with.
        rest: the other operand of ``node``.
        nodes: those on the way, ``node`` included.
    """

    node: ir.Node | None
    power: float
    value: ir.Value
    rest: ir.Value | None
    nodes: tuple[ir.Node, ...]


def inverse_root(value: ir.Value, rank: int | None) -> Quotient:
    """Follow mean square plus epsilon through Sqrt, Pow, Reciprocal and 1/· to where it divides.

    Raises:
        Mismatch: something else is done with it.
    """
    power, nodes = 1.0, list[ir.Node]()
    while True:
        if power == -0.5 and len(value.uses()) == 2 and not value.is_graph_output():
            return Quotient(None, power, value, None, tuple(nodes))
        user = step(value, "Sqrt", "Pow", "Reciprocal", "Div", "Mul")
        rest = other(user, value) if len(user.inputs) == 2 else None
        nodes.append(user)
        if user.op_type in ("Sqrt", "Reciprocal"):
            power *= 0.5 if user.op_type == "Sqrt" else -1.0
        elif user.op_type == "Pow":
            number = some(scalar(rest), f"the exponent of {label(user)} is computed")
            assert rest is not None
            need(rest is user.inputs[1] and keeps_rank(rest, rank), f"{label(user)} is no root")
            power *= number
        elif user.op_type == "Div" and value is user.inputs[1] and scalar(rest) == 1:
            power = -power
        else:
            return Quotient(user, power, value, rest, tuple(nodes))
        need(power in (0.5, -1.0, -0.5), f"{label(user)} makes the power {power:g}, not a root")
        value = user.outputs[0]


def divides(found: Quotient, what: str) -> tuple[ir.Node, ir.Value]:
    """Return the node that divides by the root, and what it divides.

    Raises:
        Mismatch: it does something else; ``what`` is the name of the mean square.
    """
    user, rest = found.node, found.rest
    if user is None or rest is None:
        twice = f"'{found.value.name}' has 2 users, the pattern has one"
        user = some(user, twice)
        rest = some(rest, twice)
    wanted = 0.5 if user.op_type == "Div" else -0.5
    need(found.power == wanted, f"{label(user)} does not divide by the square root of the {what}")
    need(
        user.op_type == "Mul" or user.inputs[1] is found.value,
        f"{label(user)} divides the root by something",
    )
    return user, rest


def with_parameters(norm: Norm, rank: int, *, bias: bool) -> Norm:
    """Add the scale, and the bias if wanted, that follow as constants of a fitting shape."""
    if norm.scale is None and norm.bias is None:
        norm = _with(norm, rank, "Mul", lambda n, v: replace(n, scale=v))
    if norm.bias is None and bias:
        norm = _with(norm, rank, "Add", lambda n, v: replace(n, bias=v))
    return norm


def _with(norm: Norm, rank: int, op_type: str, put: Callable[[Norm, ir.Value], Norm]) -> Norm:
    user = only_user(norm.root)
    if user is None or not is_op(user, op_type) or user.graph is not norm.nodes[0].graph:
        return norm
    value = other(user, norm.root)
    array = constant(value)
    if array is None or fit(array, norm.size, rank) is None:
        return norm
    return put(replace(norm, root=user.outputs[0], nodes=(*norm.nodes, user)), value)
