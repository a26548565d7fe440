"""The pass ``fold_batchnorm``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.edit import forward, raise_ir_version, remove, roots
from effdl.graph.shapes import Shapes, infer
from effdl.graph.walk import is_op, only_user
from effdl.graph.weights import Names, add_initializer, constant, replace_weight
from effdl.passes.base import Context, NodePass
from effdl.passes.fold._affine import (
    Affine,
    Declined,
    Layer,
    layer_of,
    narrow,
    of_arithmetic,
    of_batchnorm,
    operands,
    padded,
    spread_over_channels,
)

Numbers = npt.NDArray[Any]
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ARITHMETIC = ("Add", "Sub", "Mul", "Div")


class FoldBatchnorm(NodePass):
    """Fold batch norms and per-channel scaling into the weights of the layer beside them.

    What it does: a BatchNormalization in inference form, or an Add, Sub, Mul or Div with a constant
    per channel, that follows a Conv, ConvTranspose, Gemm or MatMul becomes part of that layer's
    weights and bias. A batch norm before a Conv without padding is folded into it too. The weights
    are computed in double precision and rounded once.

    When it helps: before quantization, pruning and low-rank factorization, which must see the weights
    that are really used. The file becomes a little smaller.

    When it does not: ONNX Runtime folds most of these when it loads a model, so latency stays the
    same. A batch norm behind a branch, behind a shared weight or at the input of a padded Conv stays.

    Example:
        passes: [simplify, fold_batchnorm]
    """

    not_after: ClassVar[Mapping[str, str]] = {
        "quantize_*": "batch norms cannot be folded into quantized weights"
    }

    min_opset: ClassVar[int] = 7

    arithmetic: bool = True
    """Also fold Add, Sub, Mul and Div with a constant per channel."""

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of nodes folded."""
        folder = _Folder(self, model, ctx, Names(model))
        total = 0
        while changes := folder.sweep():
            total += changes
        for name, reason in folder.declined.items():
            ctx.skip(name, reason)
        if total:
            raise_ir_version(model)
            ctx.note("folded", total)
        return total

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Return the batch norms that may be looked at."""
        nodes = model.graph.all_nodes()
        return [n.name or n.op_type for n in nodes if is_op(n, "BatchNormalization")]


@dataclass
class _Folder:
    step: FoldBatchnorm
    model: ir.Model
    ctx: Context
    names: Names

    def __post_init__(self) -> None:
        self.declined: dict[str, str] = {}
        self._shapes: Shapes | None = None

    def sweep(self) -> int:
        """Go through all nodes once; a chain behind a layer folds in one sweep."""
        self.declined.clear()
        changes = 0
        for root, imports, is_function in roots(self.model):
            if imports.get("", imports.get("ai.onnx", 0)) < self.step.min_opset:
                continue
            for node in list(root.all_nodes()):
                if not self._wanted(node):
                    continue
                try:
                    if is_function:
                        raise Declined("weights inside a function are not changed")
                    changes += self._fold(node)
                except Declined as e:
                    self.declined[node.name or node.op_type] = str(e)
        return changes

    def _wanted(self, node: ir.Node) -> bool:
        if node.graph is None or not self.step.selected(node):
            return False
        if is_op(node, "BatchNormalization"):
            return True
        if not self.step.arithmetic or not is_op(node, *_ARITHMETIC):
            return False
        found = operands(node)
        return found is not None and self._layer_before(found[0]) is not None

    def _fold(self, node: ir.Node) -> int:
        if is_op(node, "BatchNormalization"):
            affine = of_batchnorm(node)
            data = node.inputs[0]
            found = self._layer_before(data)
            if found is None:
                return self._fold_forward(node, affine)
            layer = self._layer(*found)
            if layer.axis != 1:
                raise Declined("its channels are not those of the MatMul before it")
        else:
            arithmetic = operands(node)
            assert arithmetic is not None
            data, array, on_left = arithmetic
            found = self._layer_before(data)
            assert found is not None
            if self._is_bias(node, *found):
                return 0
            layer = self._layer(*found)
            numbers = spread_over_channels(array, layer.axis, layer.rank, layer.channels)
            map_ = of_arithmetic(node, numbers, on_left)
            if map_ is None:
                return 0
            affine = map_
        assert data is not None
        if only_user(data) is not node:
            raise Declined(f"'{data.name}', which it reads, is also read by others")
        return self._put_behind(layer, affine, node)

    def _layer_before(self, data: ir.Value | None) -> tuple[ir.Node, ir.Node | None] | None:
        """The layer that makes ``data`` and, for a MatMul, the Add of its bias in between."""
        maker = data.producer() if data is not None else None
        if maker is None:
            return None
        if is_op(maker, *_LAYERS):
            # A product of two computed tensors, as in attention, is no layer.
            return (maker, None) if not is_op(maker, "MatMul") or _weighted(maker) else None
        if is_op(maker, "Add") and (found := operands(maker)) is not None:
            first = found[0].producer()
            if first is not None and is_op(first, "MatMul") and _weighted(first):
                return (first, maker) if only_user(found[0]) is maker else None
        return None

    def _is_bias(self, node: ir.Node, layer: ir.Node, bias: ir.Node | None) -> bool:
        """Whether ``node`` is the bias of a MatMul, which has no other place for it."""
        return is_op(layer, "MatMul") and bias is None and is_op(node, "Add")

    def _layer(self, node: ir.Node, bias: ir.Node | None) -> Layer:
        rank = None
        if is_op(node, "MatMul"):
            self._shapes = self._shapes or infer(self.model)
            dims = self._shapes.of(node.outputs[0])
            rank = None if dims is None else len(dims)
        return layer_of(node, bias, rank)

    def _put_behind(self, layer: Layer, affine: Affine, node: ir.Node) -> int:
        if layer.node.graph is not node.graph:
            raise Declined(f"{layer.node.op_type} '{layer.node.name}' is in another graph")
        if max(affine.scale.size, affine.shift.size) not in (1, layer.channels):
            raise Declined("its channels are not those of the layer before it")
        weight, bias = layer.after(affine)
        last = layer.bias_node or layer.node
        if is_op(layer.node, "MatMul") and layer.bias_node is None and affine.shift.any():
            if not is_op(node, "BatchNormalization"):
                return 0
            self._store(layer, weight, None)
            self._become_add(node, bias, layer)
            return 1
        keeps_bias = layer.bias is None and not affine.shift.any()
        self._store(layer, weight, None if keeps_bias else bias)
        what = f"folded into {layer.node.op_type} '{layer.node.name}'"
        if not forward(node.outputs[0], last.outputs[0]):
            raise AssertionError(f"{node.name}: its only input cannot stand for it")
        remove(node)
        self.ctx.touch(node, what)
        return 1

    def _become_add(self, node: ir.Node, shift: Numbers, layer: Layer) -> None:
        """Turn a batch norm behind a MatMul without bias into the Add of that bias."""
        graph, old = node.graph, node.outputs[0]
        assert isinstance(graph, ir.Graph)
        like = constant(layer.node.inputs[1])
        assert like is not None
        value = add_initializer(
            graph, self.names, f"{node.name or 'batchnorm'}_bias", narrow(shift, like, 0)
        )
        add = ir.Node(
            "",
            "Add",
            [layer.node.outputs[0], value],
            name=self.names.fresh(f"{node.name or 'batchnorm'}_add"),
            outputs=[ir.Value(name=self.names.fresh(f"{old.name}_add"))],
        )
        add.outputs[0].type, add.outputs[0].shape = old.type, old.shape
        graph.insert_before(node, add)
        forward(old, add.outputs[0])
        remove(node)
        self.ctx.touch(node, f"folded into MatMul '{layer.node.name}' and an Add")

    def _fold_forward(self, node: ir.Node, affine: Affine) -> int:
        """Fold a batch norm into the Conv that reads it."""
        conv = only_user(node.outputs[0])
        maker = node.inputs[0].producer() if node.inputs[0] is not None else None
        source = maker.op_type if maker is not None else "an input"
        if conv is None or not is_op(conv, "Conv") or conv.inputs[0] is not node.outputs[0]:
            raise Declined(f"no layer to fold into: it reads {source} and feeds no single Conv")
        if conv.graph is not node.graph:
            raise Declined(f"Conv '{conv.name}' behind it is in another graph")
        if affine.shift.any() and padded(conv):
            raise Declined(f"Conv '{conv.name}' behind it pads with zeros, before which it shifts")
        layer = layer_of(conv, None, None)
        weight, bias = layer.before(affine)
        keeps_bias = layer.bias is None and not affine.shift.any()
        self._store(layer, weight, None if keeps_bias else bias)
        data = node.inputs[0]
        assert data is not None
        conv.replace_input_with(0, data)
        remove(node)
        self.ctx.touch(node, f"folded into Conv '{conv.name}' behind it")
        return 1

    def _store(self, layer: Layer, weight: Numbers, bias: Numbers | None) -> None:
        """Write weights and bias; nothing is written when either does not fit its type."""
        node = layer.node
        like = constant(node.inputs[1])
        assert like is not None
        axis = 0 if is_op(node, "Conv") else weight.ndim - 1
        if is_op(node, "ConvTranspose"):
            axis = 1
        elif is_op(node, "Gemm") and weight.shape[0] == layer.channels:
            axis = 0
        new_weight = narrow(weight, like, axis)
        new_bias = None if bias is None else _narrow_bias(bias, like)
        replace_weight(node, 1, new_weight, self.names)
        if new_bias is None:
            return
        owner, index = layer.bias_node or node, layer.bias_index
        if is_op(node, "Gemm"):
            node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        if index < len(owner.inputs) and owner.inputs[index] is not None:
            replace_weight(owner, index, new_bias, self.names)
            return
        owner.resize_inputs(max(index + 1, len(owner.inputs)))
        assert isinstance(node.graph, ir.Graph)
        name = f"{node.name or node.op_type}_bias"
        owner.replace_input_with(index, add_initializer(node.graph, self.names, name, new_bias))


def _narrow_bias(bias: Numbers, like: Numbers) -> Numbers:
    with np.errstate(over="ignore"):
        cast = bias.astype(like.dtype)
    if not np.isfinite(cast.astype(np.float64)).all():
        raise Declined(f"the folded bias overflows {like.dtype}")
    return cast


def _weighted(node: ir.Node) -> bool:
    return constant(node.inputs[1]) is not None
