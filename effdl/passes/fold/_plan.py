"""Where an affine map can go: into the layers before it, or into all layers that read it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx_ir as ir

from effdl.graph.shapes import Shapes, infer
from effdl.graph.walk import int_attr, is_op, only_user
from effdl.graph.weights import constant
from effdl.passes.fold._affine import Affine, Declined, Floats, NoLayer
from effdl.passes.fold._carry import carries, downwards, upwards
from effdl.passes.fold._layer import (
    Layer,
    Update,
    is_layer,
    layer_beginning_with,
    layer_ending_in,
    layer_of,
    update,
)

_RANKS = {"Gemm": 2, "Flatten": 2}


class Planner:
    """Finds the layers that would take a map, without changing anything.

    Args:
        model: its shapes are inferred when they are first asked for.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._shapes: Shapes | None = None

    @property
    def shapes(self) -> Shapes:
        """The shapes of the model; folding changes none of them."""
        if self._shapes is None:
            self._shapes = infer(self._model)
        return self._shapes

    def rank(self, value: ir.Value | None) -> int | None:
        """Return the number of axes of ``value``, None when not known."""
        maker = value.producer() if value is not None else None
        if maker is not None and is_op(maker, *_RANKS):
            return _RANKS[maker.op_type]
        if maker is not None and is_op(maker, "Conv", "ConvTranspose"):
            weight = constant(maker.inputs[1])
            if weight is not None:
                return weight.ndim
        dims = self.shapes.of(value)
        return None if dims is None else len(dims)

    def back(self, value: ir.Value, affine: Affine, user: ir.Node) -> list[Update]:
        """Return what the layers that make ``value`` would become with ``affine`` behind them.

        Args:
            value: what the map changes.
            affine: the map.
            user: the node that reads ``value`` and is to go, or hands it on.

        Raises:
            NoLayer: something else makes it.
            Declined: a layer does, but cannot take the map.
        """
        maker = value.producer()
        source = maker.op_type if maker is not None else "an input"
        nothing = f"no layer to fold into: it reads {source}"
        found = layer_ending_in(value)
        if maker is None or (found is None and not _passes(maker)):
            raise NoLayer(nothing)
        if found is not None:
            layer = self._layer(*found, only_bias=not affine.scales)
            _same_graph(layer.node, user)
            if is_op(user, "BatchNormalization") and layer.axis != 1:
                raise Declined("its channels are not those of the MatMul before it")
            _alone(value, user)
            weight, bias = layer.after(affine)
            biased = layer.bias is not None or affine.shifts
            return [update(layer, weight, bias if biased else None)]
        if is_op(maker, "Concat", "Add"):
            return self._back_all(maker, value, affine, user)
        data = maker.inputs[0]
        assert data is not None
        try:
            moved = upwards(maker, affine, self.shapes)
        except Declined as e:
            raise NoLayer(nothing) from e
        deeper = self.back(data, moved, maker)
        _same_graph(maker, user)
        _alone(value, user)
        return deeper

    def _back_all(
        self, maker: ir.Node, value: ir.Value, affine: Affine, user: ir.Node
    ) -> list[Update]:
        """Go into every branch of a Concat or of a sum."""
        branches = [v for v in maker.inputs if v is not None]
        if is_op(maker, "Concat"):
            parts = self._split(maker, branches, affine)
        else:
            dims = [self.shapes.of(v) for v in (*branches, value)]
            if any(d is None or d != dims[-1] or None in d for d in dims):
                raise NoLayer("it reads a sum of values of unknown shapes")
            still = Affine(affine.scale, np.zeros(()))
            parts = [affine, *(still for _ in branches[1:])]
        found = [
            u for v, part in zip(branches, parts, strict=True) for u in self.back(v, part, maker)
        ]
        _same_graph(maker, user)
        _alone(value, user)
        return found

    def _split(self, concat: ir.Node, branches: list[ir.Value], affine: Affine) -> list[Affine]:
        rank = self.rank(concat.outputs[0])
        map_ = affine.full(rank)
        if rank is None:
            return [map_] * len(branches)
        axis = int_attr(concat, "axis", 0) % rank
        ends = [0]
        for branch in branches:
            dims = self.shapes.of(branch)
            size = dims[axis] if dims is not None else None
            ends.append(ends[-1] + size if isinstance(size, int) else -(10**9))
        parts = []
        for start, end in pairwise(ends):
            scale, shift = (_slice(a, axis, start, end, ends[-1]) for a in (map_.scale, map_.shift))
            parts.append(Affine(scale, shift))
        return parts

    def ahead(self, value: ir.Value, affine: Affine, node: ir.Node) -> list[Update]:
        """Return what all layers that read ``value`` would become with ``affine`` before them.

        Args:
            value: what is changed; nothing but layers may read it.
            affine: the map.
            node: the node that gives ``value``.

        Raises:
            NoLayer: something else reads it.
            Declined: a layer cannot take the map.
        """
        uses = list(value.uses())
        if value.is_graph_output() or not uses:
            raise NoLayer("it feeds an output of the graph")
        found: list[Update] = []
        for user, index in uses:
            if _scales(user, index, affine):
                _same_graph(user, node)
                found += self.ahead(user.outputs[0], affine.full(None), user)
                continue
            if index != 0 or not (is_layer(user) or carries(user)):
                raise NoLayer(f"it feeds {user.op_type}")
            _same_graph(user, node)
            if is_layer(user):
                found.append(self._into(user, affine))
                continue
            try:
                moved = downwards(user, affine, self.shapes)
            except Declined as e:
                raise NoLayer(str(e)) from e
            found += self.ahead(user.outputs[0], moved, user)
        return found

    def _into(self, node: ir.Node, affine: Affine) -> Update:
        found = layer_beginning_with(node)
        assert found is not None
        only_bias = not affine.scales and constant(node.inputs[1]) is not None
        layer = self._layer(*found, only_bias=only_bias)
        weight, bias = layer.before(affine)
        shifts = affine.shifts or is_op(node, "BatchNormalization")
        return update(layer, weight if affine.scales else None, bias if shifts else None)

    def _layer(self, node: ir.Node, bias: ir.Node | None, *, only_bias: bool) -> Layer:
        rank = None
        if is_op(node, "MatMul"):
            rank = self.rank(node.outputs[0])
        elif is_op(node, "BatchNormalization"):
            rank = self.rank(node.inputs[0])
        return layer_of(node, bias, rank, only_bias=only_bias)


def _passes(node: ir.Node) -> bool:
    if is_op(node, "Concat"):
        return len(node.inputs) > 0
    if is_op(node, "Add"):
        return (
            all(constant(v) is None for v in node.inputs) and node.inputs[0] is not node.inputs[1]
        )
    return carries(node)


def _scales(node: ir.Node, index: int, affine: Affine) -> bool:
    """Whether ``node`` multiplies or divides what it reads, and the map is one factor of it."""
    product = is_op(node, "Mul") or (is_op(node, "Div") and index == 0)
    one = affine.scale.ndim == 0 and not affine.shifts and affine.shift.ndim == 0
    return product and one and all(constant(v) is None for v in node.inputs)


def _slice(array: Floats, axis: int, start: int, end: int, total: int) -> Floats:
    if array.ndim == 0 or array.shape[axis] == 1:
        return array
    if start < 0 or array.shape[axis] != total:
        raise NoLayer("the sizes of what it concatenates are not known")
    part = array.take(range(start, end), axis)
    return part if part.size != 1 else part.reshape(())


def _same_graph(node: ir.Node, user: ir.Node) -> None:
    if node.graph is not user.graph:
        raise Declined(f"{node.op_type} '{node.name}' is in another graph")


def _alone(value: ir.Value, user: ir.Node) -> None:
    if only_user(value) is not user:
        raise Declined(f"'{value.name}', which it reads, is also read by others")
