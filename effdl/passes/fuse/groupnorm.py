"""The pass ``fuse_groupnorm``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from effdl.graph.match import label, need, some, step
from effdl.graph.shapes import Shapes
from effdl.graph.walk import all_nodes, float_attr, int_attr, is_op, opset, producer
from effdl.graph.weights import Array, Names, add_initializer, constant
from effdl.passes.base import Context, NodePass
from effdl.passes.fuse._replace import replace_all, self_contained

_OPSET = 21
_EPSILON = 1e-5


@dataclass(frozen=True)
class _Group:
    """A group norm over (batch, channels, ...): ``scale`` and ``bias`` are one number a channel."""

    x: ir.Value
    root: ir.Value
    nodes: tuple[ir.Node, ...]
    groups: int
    epsilon: float
    scale: Array
    bias: Array
    rank: int


class FuseGroupnorm(NodePass):
    """Write group norms in the form that is fastest, or as the standard operator.

    What it does: with form plain, a GroupNormalization becomes Reshape, InstanceNormalization,
    Reshape, Mul and Add, as exporters wrote it before the operator came. With form onnx these five
    become GroupNormalization, which came with opset 21.

    When it helps: ONNX Runtime has no kernel of GroupNormalization and runs about fifteen nodes for it;
    the plain form takes about 0.6 of the time.

    When it does not: most exports are in the plain form already. Take onnx for other runtimes only.

    Example:
        passes: [fuse_groupnorm]
    """

    claims: ClassVar[frozenset[str]] = frozenset({"latency"})
    min_opset: ClassVar[int] = 13
    form: Literal["plain", "onnx"] = "plain"
    """plain writes the operator out; onnx makes it."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of group norms rewritten."""
        wanted = "GroupNormalization" if self.form == "plain" else "InstanceNormalization"
        anchors = [n for n in all_nodes(model) if is_op(n, wanted) and self.selected(n)]
        version, names = opset(model), Names(model)

        def match(anchor: ir.Node, shapes: Shapes) -> _Group | None:
            if self.form == "plain":
                return _operator(anchor, shapes, version)
            return _written(anchor, shapes, version)

        def make(found: _Group, now: Callable[[ir.Value], ir.Value]) -> list[ir.Node]:
            build = _plain if self.form == "plain" else _standard
            return build(found, now(found.x), names)

        return replace_all(model, ctx, anchors, match, make, _tell)


def _tell(found: _Group, nodes: Sequence[ir.Node]) -> str:
    if len(nodes) == 1:
        return f"{len(found.nodes)} nodes -> GroupNormalization"
    return "GroupNormalization -> InstanceNormalization between two Reshapes, Mul and Add"


def _operator(node: ir.Node, shapes: Shapes, version: int) -> _Group:
    """Read a GroupNormalization node."""
    need(version >= _OPSET, "before opset 21 scale and bias were one number a group")
    x = some(node.inputs[0], "it has no input")
    rank, channels = _layout(x, shapes)
    scale, bias = (
        some(constant(v), f"'{v.name if v else ''}' is computed") for v in node.inputs[1:3]
    )
    need(int_attr(node, "stash_type", 1) == 1, f"{label(node)} does not sum in float32")
    groups = int_attr(node, "num_groups", 0)
    fits = groups > 0 and channels % groups == 0 and scale.shape == bias.shape == (channels,)
    need(fits, f"scale and bias of {label(node)} are not one number a channel")
    epsilon = float_attr(node, "epsilon", _EPSILON)
    return _Group(x, node.outputs[0], (node,), groups, epsilon, scale, bias, rank)


def _written(node: ir.Node, shapes: Shapes, version: int) -> _Group | None:
    """Read the group norm around an InstanceNormalization, None when it is no candidate."""
    split = producer(node.inputs[0], "Reshape")
    if split is None:
        return None
    need(version >= _OPSET, f"GroupNormalization came with opset 21, the model has {version}")
    x = some(split.inputs[0], "it has no input")
    rank, channels = _layout(x, shapes)
    ones, zeros = (constant(v) for v in node.inputs[1:3])
    plain = (
        ones is not None and zeros is not None and bool((ones == 1).all() and (zeros == 0).all())
    )
    need(plain, f"{label(node)} has a scale or bias of its own")
    assert ones is not None
    groups = ones.size
    target = constant(split.inputs[1])
    batch = (shapes.of(x) or (None,))[0]
    shape = None if target is None else [int(n) for n in target.ravel()]
    whole = shape is not None and shape[1:] == [groups, -1] and shape[0] in (0, batch)
    need(whole and channels % groups == 0, f"{label(split)} does not split '{x.name}' into groups")
    back = step(node.outputs[0], "Reshape")
    dims = shapes.of(x)
    same = dims is not None and None not in dims and shapes.of(back.outputs[0]) == dims
    need(same, f"{label(back)} does not give the shape of '{x.name}' back, as far as is known")
    scaled = step(back.outputs[0], "Mul")
    shifted = step(scaled.outputs[0], "Add")
    scale = _per_channel(scaled, back.outputs[0], channels, rank)
    bias = _per_channel(shifted, scaled.outputs[0], channels, rank)
    nodes = (split, node, back, scaled, shifted)
    epsilon = float_attr(node, "epsilon", _EPSILON)
    found = _Group(x, shifted.outputs[0], nodes, groups, epsilon, scale, bias, rank)
    self_contained(found, node)
    return found


def _layout(x: ir.Value, shapes: Shapes) -> tuple[int, int]:
    """Return rank and channels of a float32 value."""
    dtype, dims = shapes.dtype(x), some(shapes.of(x), f"the shape of '{x.name}' is unknown")
    name = dtype.name if dtype is not None else "of unknown type"
    need(dtype == ir.DataType.FLOAT, f"'{x.name}' is {name}: no InstanceNormalization kernel")
    need(len(dims) >= 3, f"'{x.name}' has {len(dims)} dimensions")
    channels = dims[1]
    if not isinstance(channels, int):
        need(False, f"the channels of '{x.name}' are dynamic")
        return len(dims), 0
    return len(dims), channels


def _per_channel(node: ir.Node, value: ir.Value, channels: int, rank: int) -> Array:
    """Return the constant that ``node`` applies to each channel of ``value``."""
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    array = some(constant(other), f"{label(node)} applies a computed value")
    wanted = (channels,) + (1,) * (rank - 2)
    fits = array.shape in (wanted, (1, *wanted))
    need(fits, f"{label(node)} does not apply one number a channel")
    return array.reshape(channels)


def _plain(found: _Group, x: ir.Value, names: Names) -> list[ir.Node]:
    graph, last = found.root.graph, found.root.producer()
    assert graph is not None
    assert last is not None
    base = last.name or "groupnorm"

    def new(name: str, array: Array) -> ir.Value:
        return add_initializer(graph, names, f"{base}_{name}", array)

    groups, column = found.groups, (-1,) + (1,) * (found.rank - 2)
    target = new("groups", np.array([0, groups, -1], np.int64))
    split = ir.node("Reshape", [x, target])
    ones, zeros = (
        new("ones", np.ones(groups, np.float32)),
        new("zeros", np.zeros(groups, np.float32)),
    )
    attributes = {"epsilon": found.epsilon}
    norm = ir.node("InstanceNormalization", [split.outputs[0], ones, zeros], attributes)
    shape = ir.node("Shape", [x])
    back = ir.node("Reshape", [norm.outputs[0], shape.outputs[0]])
    scale, bias = new("scale", found.scale.reshape(column)), new("bias", found.bias.reshape(column))
    scaled = ir.node("Mul", [back.outputs[0], scale])
    shifted = ir.node("Add", [scaled.outputs[0], bias])
    return [split, norm, shape, back, scaled, shifted]


def _standard(found: _Group, x: ir.Value, names: Names) -> list[ir.Node]:
    graph, last = found.root.graph, found.root.producer()
    assert graph is not None
    assert last is not None
    base = last.name or "groupnorm"
    scale, bias = (
        add_initializer(graph, names, f"{base}_{name}", array.copy())
        for name, array in (("scale", found.scale), ("bias", found.bias))
    )
    attributes = {"num_groups": found.groups, "epsilon": found.epsilon}
    return [ir.node("GroupNormalization", [x, scale, bias], attributes)]
