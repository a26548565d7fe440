"""The pass ``fuse_layernorm``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effdl.graph.match import (
    attempt,
    closed,
    keeps_rank,
    label,
    need,
    other,
    some,
    split_scalar,
    step,
)
from effdl.graph.shapes import Shapes, infer
from effdl.graph.walk import all_nodes, int_attr, ints_attr, is_op, only_user, opset, producer
from effdl.graph.weights import Array, Names, add_initializer, constant, scalar
from effdl.passes.base import Context, NodePass

_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class _Match:
    """A layer norm: ``root`` = (x - mean) / sqrt(variance + epsilon) · scale + bias.

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


class FuseLayernorm(NodePass):
    """Replace a layer norm that an exporter wrote out by one LayerNormalization node.

    What it does: finds (x - mean) / sqrt(variance + epsilon), with or without scale and bias, over
    the last axes, in the forms that exporters write: Pow or Mul for the square; Div, Reciprocal or
    Pow for the root; the difference computed once or twice; scale folded into the root. Where the
    formula has no scale, the new node gets ones. A formula whose inner values are used elsewhere
    stays as it is.

    When it helps: fewer nodes; float16 conversion becomes safe, since the node sums in float32 where
    the written-out squares would overflow; runtimes that do not find the formula themselves.

    When it does not: ONNX Runtime fuses most of these forms when it loads a model, so its latency is
    about equal. LayerNormalization came with opset 17: run convert_opset before on older models.

    Example:
        passes: [{convert_opset: {at_least: 17}}, fuse_layernorm]
    """

    min_opset: ClassVar[int] = 17

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of layer norms fused."""
        anchors = [n for n in all_nodes(model) if _is_centered(n) and self.selected(n)]
        if not anchors:
            return 0
        in_functions = {n for f in model.functions.values() for n in f.all_nodes()}
        shapes = infer(model)
        found: list[tuple[ir.Node, _Match | str]] = []
        for node in anchors:
            if not _squares(node):
                continue
            match: _Match | str = attempt(_match, node, shapes)
            if opset(model) < self.min_opset:
                match = f"LayerNormalization came with opset 17, the model has {opset(model)}"
            elif node in in_functions and not isinstance(match, str):
                match = "it is inside a function of the model"
            found.append((node, match))
        _report(anchors, found, ctx)
        names, renewed = Names(model), dict[ir.Value, ir.Value]()
        matches = [m for _, m in found if isinstance(m, _Match)]
        for match in matches:
            _replace(match, names, renewed, ctx)
        return len(matches)


def _report(
    anchors: Sequence[ir.Node], found: Sequence[tuple[ir.Node, _Match | str]], ctx: Context
) -> None:
    """Say why each anchor that is no part of a layer norm was left, once per layer norm."""
    for node, match in found:
        if isinstance(match, str):
            ctx.skip(node, match)
    told = {node.inputs[0] for node, _ in found}
    for node in anchors:
        if node.inputs[0] not in told:
            ctx.skip(node, "the difference from the mean is not squared")


def _replace(match: _Match, names: Names, renewed: dict[ir.Value, ir.Value], ctx: Context) -> None:
    last, graph = match.root.producer(), match.root.graph
    assert last is not None
    assert graph is not None
    dtype = match.x.dtype or (match.root.dtype or ir.DataType.FLOAT)
    scale = _parameter(match.scale, match.size, dtype, graph, names, f"{last.name}_scale")
    inputs = [renewed.get(match.x, match.x), scale]
    if match.bias is not None:
        inputs.append(_parameter(match.bias, match.size, dtype, graph, names, f"{last.name}_bias"))
    node = ir.node(
        "LayerNormalization",
        inputs,
        {"axis": -len(match.size), "epsilon": match.epsilon},
        name=last.name,
    )
    ir.convenience.replace_nodes_and_values(
        graph, last, list(match.nodes), [node], [match.root], list(node.outputs)
    )
    renewed[match.root] = node.outputs[0]
    given = [n for n, v in (("scale", match.scale), ("bias", match.bias)) if v is not None]
    parts = f" with {' and '.join(given)}" if given else ""
    ctx.touch(node, f"{len(match.nodes)} nodes -> LayerNormalization{parts}")


def _parameter(
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
    full = _fit(array, size, array.ndim)
    assert full is not None
    return add_initializer(graph, names, base, full)


def _fit(array: Array, size: tuple[int, ...], rank: int) -> Array | None:
    """Return ``array`` in the shape ``size`` if multiplying by it keeps a value of ``rank`` so."""
    extra = array.ndim - len(size)
    if array.ndim > rank or any(d != 1 for d in array.shape[: max(extra, 0)]):
        return None
    inner = array.reshape(array.shape[max(extra, 0) :])
    padded = (1,) * (len(size) - inner.ndim) + inner.shape
    if any(d not in (1, n) for d, n in zip(padded, size, strict=True)):
        return None
    return np.broadcast_to(inner, size).copy()


def _is_centered(node: ir.Node) -> bool:
    """Whether ``node`` is x - ReduceMean(x)."""
    if not is_op(node, "Sub"):
        return False
    mean = producer(node.inputs[1], "ReduceMean")
    return mean is not None and mean.inputs[0] is node.inputs[0]


def _squares(node: ir.Node) -> list[ir.Node]:
    """Nodes that square the output of ``node``, also behind a Cast."""
    found = []
    for use in node.outputs[0].uses():
        user = use.node
        if is_op(user, "Cast"):
            found += _squares(user)
            continue
        power = is_op(user, "Pow") and use.idx == 0 and scalar(user.inputs[1]) == 2
        if power or (is_op(user, "Mul") and user.inputs[0] is user.inputs[1]):
            found.append(user)
    return list(dict.fromkeys(found))


def _match(centered: ir.Node, shapes: Shapes) -> _Match:
    """Read the layer norm of which ``centered`` is x - mean."""
    x = some(centered.inputs[0], "it subtracts from nothing")
    dims = shapes.of(x)
    rank = None if dims is None else len(dims)
    mean = some(producer(centered.inputs[1]), "the mean is not computed")
    count = _trailing_axes(mean, rank)
    squares = _squares(centered)
    need(len(squares) == 1, f"'{centered.outputs[0].name}' is squared {len(squares)} times")
    square = squares[0]
    cast = square.inputs[0] is not centered.outputs[0]
    need(not cast, "a Cast stands between the difference and its square")
    exponent = square.inputs[1]
    if square.op_type == "Pow" and exponent is not None:
        need(keeps_rank(exponent, rank), "the exponent may add a dimension")
    variance = step(square.outputs[0], "ReduceMean")
    need(_trailing_axes(variance, rank) == count, "mean and variance are taken over different axes")
    add = step(variance.outputs[0], "Add")
    operands = some(split_scalar(add), f"{label(add)} adds no single number: epsilon is missing")
    need(operands[0] is variance.outputs[0], "epsilon is computed")
    need(keeps_rank(operands[1], rank), "epsilon may add a dimension")
    epsilon = scalar(operands[1])
    need(epsilon is not None and epsilon >= 0, "epsilon is negative")
    assert epsilon is not None
    size = _size(x, count, shapes)
    nodes = [mean, centered, square, variance, add]
    core = _Match(x, x, float(np.float32(epsilon)), size, tuple(nodes))
    full = _with_parameters(_quotient(core, add.outputs[0], centered, rank), rank or len(size))
    closed(full.nodes, full.root)
    same = all(n.graph is centered.graph for n in full.nodes)
    need(same, "the formula reaches over the border of a subgraph")
    return full


def _size(x: ir.Value, count: int, shapes: Shapes) -> tuple[int, ...]:
    """Return the last ``count`` dimensions of ``x``; they and its dtype must be known."""
    dtype = shapes.dtype(x)
    need(
        dtype in _DTYPES,
        f"'{x.name}' is {dtype.name if dtype else 'of unknown type'}; LayerNormalization sums in float32",
    )
    dims = some(shapes.of(x), f"the shape of '{x.name}' is unknown")[-count:]
    known = tuple(d for d in dims if isinstance(d, int))
    need(len(known) == count, f"the size of the normalized axes of '{x.name}' is dynamic")
    return known


def _trailing_axes(node: ir.Node, rank: int | None) -> int:
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


def _quotient(core: _Match, value: ir.Value, centered: ir.Node, rank: int | None) -> _Match:
    """Follow variance + epsilon to where the difference is divided by its root."""
    power, nodes = 1.0, list(core.nodes)
    while True:
        if power == -0.5 and len(value.uses()) == 2 and not value.is_graph_output():
            return _folded(core, nodes, value, None)
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
            break
        need(power in (0.5, -1.0, -0.5), f"{label(user)} makes the power {power:g}, not a root")
        value = user.outputs[0]
    assert rest is not None
    if user.op_type == "Mul" and power == -0.5 and constant(rest) is not None:
        return _folded(core, nodes, user.outputs[0], rest)
    wanted = 0.5 if user.op_type == "Div" else -0.5
    need(power == wanted, f"{label(user)} does not divide by the square root of the variance")
    need(
        user.op_type == "Mul" or user.inputs[1] is value,
        f"{label(user)} divides the root by something",
    )
    if rest is not centered.outputs[0]:
        again = rest.producer()
        need(
            again is not None and _is_centered(again) and again.inputs[0] is core.x,
            f"{label(user)} divides '{rest.name}', not the difference from the mean",
        )
        assert again is not None
        mean = some(producer(again.inputs[1]), "the mean is not computed")
        need(
            _trailing_axes(mean, rank) == len(core.size), "two means are taken over different axes"
        )
        nodes += [again, mean]
    return replace(core, root=user.outputs[0], nodes=tuple(dict.fromkeys(nodes)))


def _folded(core: _Match, nodes: list[ir.Node], factor: ir.Value, scale: ir.Value | None) -> _Match:
    """Read x·f + (bias - mean·f) with f = scale / sqrt(variance + epsilon)."""
    mean = core.nodes[0].outputs[0]
    reason = f"'{factor.name}' does not multiply both the input and its mean"
    need(len(factor.uses()) == 2 and not factor.is_graph_output(), reason)
    users = {other(u.node, factor): u.node for u in factor.uses() if is_op(u.node, "Mul")}
    of_x, of_mean = some(users.get(core.x), reason), some(users.get(mean), reason)
    shift = step(of_mean.outputs[0], "Sub")
    need(shift.inputs[1] is of_mean.outputs[0], f"{label(shift)} does not subtract the mean")
    bias = some(shift.inputs[0], f"{label(shift)} subtracts from nothing")
    total = step(of_x.outputs[0], "Add")
    need(other(total, of_x.outputs[0]) is shift.outputs[0], f"{label(total)} adds no bias")
    for value in (scale, bias):
        array = constant(value)
        if value is not None:
            fits = array is not None and _fit(array, core.size, len(core.size)) is not None
            need(fits, f"'{value.name}' is no constant of the normalized shape")
    nodes += [of_x, of_mean, shift, total]
    return replace(
        core, root=total.outputs[0], nodes=tuple(dict.fromkeys(nodes)), scale=scale, bias=bias
    )


def _with_parameters(core: _Match, rank: int) -> _Match:
    """Add the scale and bias that follow, where they are constants of a fitting shape."""
    if core.scale is None and core.bias is None:
        user = only_user(core.root)
        value = _constant_operand(user, "Mul", core, rank)
        if user is not None and value is not None:
            core = replace(core, root=user.outputs[0], nodes=(*core.nodes, user), scale=value)
    if core.bias is None:
        user = only_user(core.root)
        value = _constant_operand(user, "Add", core, rank)
        if user is not None and value is not None:
            core = replace(core, root=user.outputs[0], nodes=(*core.nodes, user), bias=value)
    return core


def _constant_operand(
    user: ir.Node | None, op_type: str, core: _Match, rank: int
) -> ir.Value | None:
    if user is None or not is_op(user, op_type) or user.graph is not core.nodes[0].graph:
        return None
    value = other(user, core.root)
    array = constant(value)
    if array is None or _fit(array, core.size, rank) is None:
        return None
    return value
