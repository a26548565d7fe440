"""The pass ``fuse_layernorm``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import onnx_ir as ir

from effdl.graph.match import attempt, label, need, other, some, step
from effdl.graph.shapes import Shapes, infer
from effdl.graph.walk import all_nodes, function_nodes, is_op, opset, producer
from effdl.graph.weights import Names, constant
from effdl.passes.base import Context, NodePass
from effdl.passes.fuse._norm import (
    Norm,
    Quotient,
    divides,
    fit,
    inverse_root,
    mean_square,
    parameter,
    sizes,
    squares,
    trailing_axes,
    with_parameters,
)
from effdl.passes.fuse._replace import Replacer, self_contained


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
        in_functions = set(function_nodes(model))
        shapes = infer(model)
        found: list[tuple[ir.Node, Norm | str]] = []
        for node in anchors:
            if not squares(node.outputs[0]):
                continue
            match: Norm | str = attempt(_match, node, shapes)
            if opset(model) < self.min_opset:
                match = f"LayerNormalization came with opset 17, the model has {opset(model)}"
            elif node in in_functions and not isinstance(match, str):
                match = "it is inside a function of the model"
            found.append((node, match))
        _report(anchors, found, ctx)
        names, replacer = Names(model), Replacer(model)
        matches = [m for _, m in found if isinstance(m, Norm)]
        for match in matches:
            _replace(match, names, replacer, ctx)
        return len(matches)


def _report(
    anchors: Sequence[ir.Node], found: Sequence[tuple[ir.Node, Norm | str]], ctx: Context
) -> None:
    """Say why each anchor that is no part of a layer norm was left, once per layer norm."""
    for node, match in found:
        if isinstance(match, str):
            ctx.skip(node, match)
    told = {node.inputs[0] for node, _ in found}
    for node in anchors:
        if node.inputs[0] not in told:
            ctx.skip(node, "the difference from the mean is not squared")


def _replace(match: Norm, names: Names, replacer: Replacer, ctx: Context) -> None:
    last, graph = match.root.producer(), match.root.graph
    assert last is not None
    assert graph is not None
    dtype = match.x.dtype or (match.root.dtype or ir.DataType.FLOAT)
    scale = parameter(match.scale, match.size, dtype, graph, names, f"{last.name}_scale")
    inputs = [replacer.now(match.x), scale]
    if match.bias is not None:
        inputs.append(parameter(match.bias, match.size, dtype, graph, names, f"{last.name}_bias"))
    attributes = {"axis": -len(match.size), "epsilon": match.epsilon}
    node = ir.node("LayerNormalization", inputs, attributes)
    replacer.put(match, [node])
    ctx.touch(node, f"{len(match.nodes)} nodes -> LayerNormalization{match.given}")


def _is_centered(node: ir.Node) -> bool:
    """Whether ``node`` is x - ReduceMean(x)."""
    if not is_op(node, "Sub"):
        return False
    mean = producer(node.inputs[1], "ReduceMean")
    return mean is not None and mean.inputs[0] is node.inputs[0]


def _match(centered: ir.Node, shapes: Shapes) -> Norm:
    """Read the layer norm of which ``centered`` is x - mean."""
    x = some(centered.inputs[0], "it subtracts from nothing")
    dims = shapes.of(x)
    rank = None if dims is None else len(dims)
    mean = some(producer(centered.inputs[1]), "the mean is not computed")
    count = trailing_axes(mean, rank)
    found = squares(centered.outputs[0])
    need(len(found) == 1, f"'{centered.outputs[0].name}' is squared {len(found)} times")
    square = found[0]
    cast = square.inputs[0] is not centered.outputs[0]
    need(not cast, "a Cast stands between the difference and its square")
    variance, add, axes, epsilon = mean_square(square, rank)
    need(axes == count, "mean and variance are taken over different axes")
    size = sizes(x, count, shapes, "LayerNormalization")
    core = Norm(x, x, epsilon, size, (mean, centered, square, variance, add))
    core = _quotient(core, inverse_root(add.outputs[0], rank), centered, rank)
    full = with_parameters(core, rank or len(size), bias=True)
    self_contained(full, centered)
    return full


def _quotient(core: Norm, found: Quotient, centered: ir.Node, rank: int | None) -> Norm:
    """Add where the difference is divided by the root of the variance."""
    nodes = [*core.nodes, *found.nodes]
    if found.node is None:
        return _folded(core, nodes, found.value, None)
    if (
        is_op(found.node, "Mul")
        and found.power == -0.5
        and found.rest is not None
        and constant(found.rest) is not None
    ):
        return _folded(core, nodes, found.node.outputs[0], found.rest)
    user, rest = divides(found, "variance")
    if rest is not centered.outputs[0]:
        again = rest.producer()
        need(
            again is not None and _is_centered(again) and again.inputs[0] is core.x,
            f"{label(user)} divides '{rest.name}', not the difference from the mean",
        )
        assert again is not None
        mean = some(producer(again.inputs[1]), "the mean is not computed")
        need(trailing_axes(mean, rank) == len(core.size), "two means are taken over different axes")
        nodes += [again, mean]
    return replace(core, root=user.outputs[0], nodes=tuple(dict.fromkeys(nodes)))


def _folded(core: Norm, nodes: list[ir.Node], factor: ir.Value, scale: ir.Value | None) -> Norm:
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
            fits = array is not None and fit(array, core.size, len(core.size)) is not None
            need(fits, f"'{value.name}' is no constant of the normalized shape")
    nodes += [of_x, of_mean, shift, total]
    return replace(
        core, root=total.outputs[0], nodes=tuple(dict.fromkeys(nodes)), scale=scale, bias=bias
    )
