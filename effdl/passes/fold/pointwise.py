"""The pass ``fold_pointwise``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effdl.graph.edit import can_forward, forward, has_reference, raise_ir_version, remove, roots
from effdl.graph.match import label
from effdl.graph.walk import float_attr, int_attr, is_op, nodes_in, only_user
from effdl.graph.weights import Names, add_initializer, constant, replace_weight, shared
from effdl.passes.base import Context, NodePass
from effdl.passes.fold._affine import (
    FLOATS,
    Declined,
    Floats,
    Numbers,
    narrow,
    narrow_bias,
    operands,
)
from effdl.passes.fold._window import conv_kernel, set_pads
from effdl.solve.convolve import bias_behind, in_a_row


class FoldPointwise(NodePass):
    """Fold two linear layers with nothing between them into one.

    What it does: a Conv whose result only another Conv reads, where the second does not pad (or the
    first is 1x1 without bias), becomes one Conv with the product of both kernels; the same for Gemm
    after Gemm and MatMul after MatMul, with their biases. Only where the product has no more weights
    than the two had, and so costs no more. It is computed in double precision and rounded once.

    When it helps: heads and adapters without an activation, linear bottlenecks, colour transforms
    before the first layer, LoRA-like products that were not merged.

    When it does not: a factorization (low_rank) is two layers because that is smaller; it stays. A
    1x1 with bias before a padded Conv is no single Conv at the border.

    Example:
        passes: [simplify, fold_batchnorm, fold_pointwise]
    """

    not_after: ClassVar[Mapping[str, str]] = {
        "quantize_*": "quantized weights cannot be multiplied"
    }

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of layers that went into another."""
        names, changes = Names(model), 0
        declined: dict[str, str] = {}
        for root, _, is_function in roots(model):
            for node in list(nodes_in(root)):
                if node.graph is None or not self.selected(node) or _second(node) is None:
                    continue
                try:
                    if is_function:
                        raise Declined("weights inside a function are not changed")
                    while (second := _second(node)) is not None:
                        _fold(node, second, names, ctx)
                        changes += 1
                except Declined as e:
                    declined[node.name or node.op_type] = str(e)
        for name, reason in declined.items():
            ctx.skip(name, reason)
        if changes:
            raise_ir_version(model)
            ctx.note("folded", changes)
        return changes

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Return the layers that only another layer reads."""
        nodes = nodes_in(model.graph)
        return [n.name or n.op_type for n in nodes if _second(n) is not None]


def _bias_add(node: ir.Node) -> ir.Node | None:
    """Return the Add of a constant behind a MatMul."""
    add = only_user(node.outputs[0])
    if add is None or not is_op(node, "MatMul") or not is_op(add, "Add"):
        return None
    return add if operands(add) is not None and add.graph is node.graph else None


def _second(node: ir.Node) -> ir.Node | None:
    """Return the layer of the same kind that alone reads ``node``."""
    if not is_op(node, "Conv", "Gemm", "MatMul") or constant(node.inputs[1]) is None:
        return None
    last = _bias_add(node) or node
    user = only_user(last.outputs[0])
    if user is None or not is_op(user, node.op_type) or user.inputs[0] is not last.outputs[0]:
        return None
    return user if constant(user.inputs[1]) is not None and user.graph is node.graph else None


def _fold(first: ir.Node, second: ir.Node, names: Names, ctx: Context) -> None:
    for node in (first, second):
        value = node.inputs[1]
        if value is None or shared(value):
            raise Declined(f"the weight of {label(node)} has other users")
        if has_reference(node):
            raise Declined(f"{label(node)} has attributes that are parameters")
    a, b = constant(first.inputs[1]), constant(second.inputs[1])
    assert a is not None
    assert b is not None
    if a.dtype != b.dtype or ir.DataType.from_numpy(a.dtype) not in FLOATS:
        raise Declined(f"the weights of {label(first)} and {label(second)} are of different types")
    if is_op(first, "Conv"):
        _fold_convs(first, second, names)
    elif is_op(first, "Gemm"):
        _fold_gemms(first, second, a, b, names)
    else:
        _fold_matmuls(first, second, a, b, names)
    ctx.touch(second, f"folded into {label(first)}")


def _need_fewer(product: Floats, a: Numbers, b: Numbers) -> None:
    if product.size > a.size + b.size:
        raise Declined("one layer in place of the two would have more weights")


def _grows(groups: tuple[int, int], a: Numbers, b: Numbers, taps: int) -> bool:
    """Whether the product would have more weights than both, without computing it."""
    group = int(np.gcd(*groups))
    inputs = a.shape[1] * groups[0] // group
    return bool(b.shape[0] * inputs * taps > a.size + b.size)


def _fold_convs(first: ir.Node, second: ir.Node, names: Names) -> None:
    a, bias_a = conv_kernel(first)
    b, bias_b = conv_kernel(second)
    if len(a.strides) != len(b.strides):
        raise Declined(f"{label(second)} is of another rank")
    if any((*b.begins, *b.ends)):
        if {*a.window, *a.strides} != {1} or any((*a.begins, *a.ends)):
            raise Declined(f"{label(second)} pads the result of {label(first)}")
        if bias_a is not None and bias_a.any():
            raise Declined(f"{label(second)} pads with zeros what {label(first)} adds a bias to")
    if any(g > 0 for g in b.gains):
        raise Declined(f"{label(second)} gives more positions than it reads")
    taps = int(np.prod(np.maximum(a.window, b.window)))
    if _grows((a.group, b.group), a.weight, b.weight, taps):
        raise Declined("one layer in place of the two would have more weights")
    whole = in_a_row(a, b)
    _need_fewer(whole.weight, a.weight, b.weight)
    like = constant(first.inputs[1])
    assert like is not None
    weight = narrow(whole.weight, like, 0)
    bias = bias_b
    if bias_a is not None and bias_a.any():
        bias = bias_behind(bias_a, b) + (0 if bias_b is None else bias_b)
    new_bias = None if bias is None else narrow_bias(bias, like)
    replace_weight(second, 1, weight, names)
    second.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", list(whole.window))
    second.attributes["dilations"] = ir.AttrInt64s("dilations", list(whole.dilations))
    second.attributes["strides"] = ir.AttrInt64s("strides", list(whole.strides))
    second.attributes["group"] = ir.AttrInt64("group", whole.group)
    set_pads(second, whole.begins, whole.ends)
    if new_bias is not None:
        _set_bias(second, new_bias, names)
    _take_input(first, second)


def _set_bias(node: ir.Node, bias: Numbers, names: Names) -> None:
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        replace_weight(node, 2, bias, names)
        return
    node.resize_inputs(3)
    assert isinstance(node.graph, ir.Graph)
    name = f"{node.name or node.op_type}_bias"
    node.replace_input_with(2, add_initializer(node.graph, names, name, bias))


def _take_input(first: ir.Node, second: ir.Node) -> None:
    second.replace_input_with(0, first.inputs[0])
    remove(first)


def _fold_gemms(first: ir.Node, second: ir.Node, a: Numbers, b: Numbers, names: Names) -> None:
    if int_attr(first, "transA", 0) or int_attr(second, "transA", 0):
        raise Declined("one of the two takes its input transposed")
    left, bias_a = _gemm(first, a)
    right, bias_b = _gemm(second, b)
    _need_fewer(np.broadcast_to(0.0, (left.shape[0], right.shape[1])), a, b)
    weight = narrow(left @ right, a, 1)
    bias = bias_b
    if bias_a is not None:
        moved = np.broadcast_to(bias_a, (*bias_a.shape[:-1], left.shape[1])) @ right
        bias = moved if bias_b is None else moved + bias_b
    new_bias = None if bias is None else narrow_bias(bias, a)
    replace_weight(second, 1, weight, names)
    if new_bias is not None:
        _set_bias(second, new_bias, names)
    for name in ("transB", "alpha", "beta"):
        second.attributes.pop(name, None)
    _take_input(first, second)


def _gemm(node: ir.Node, weight: Numbers) -> tuple[Floats, Floats | None]:
    """Return the matrix [inputs, outputs] and the bias that a Gemm stands for."""
    wide = weight.astype(np.float64) * float_attr(node, "alpha", 1.0)
    if int_attr(node, "transB", 0):
        wide = wide.T
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return wide, None
    bias = constant(node.inputs[2])
    if bias is None:
        raise Declined(f"the bias of {label(node)} is not constant")
    full = bias.astype(np.float64) * float_attr(node, "beta", 1.0)
    return wide, np.atleast_1d(full)


def _fold_matmuls(first: ir.Node, second: ir.Node, a: Numbers, b: Numbers, names: Names) -> None:
    if a.ndim != 2 or b.ndim != 2:
        raise Declined("the weights of one of the two are no matrix")
    _need_fewer(np.broadcast_to(0.0, (a.shape[0], b.shape[1])), a, b)
    wide = b.astype(np.float64)
    weight = narrow(a.astype(np.float64) @ wide, a, 1)
    add = _bias_add(first)
    if add is None:
        replace_weight(second, 1, weight, names)
        _take_input(first, second)
        return
    bias = _bias(add, a.shape[1]) @ wide
    after = _bias_add(second)
    if after is not None:
        own = operands(after)
        assert own is not None
        if not _is_bias(own[1], b.shape[1]):
            after = None  # the new bias is added before it
    if after is None:
        # the Add moves behind the product: MatMul, Add, MatMul -> MatMul, Add
        if not can_forward(second.outputs[0], add.outputs[0]):
            raise Declined(f"{label(second)} gives an output of the graph")
        data = operands(add)
        assert data is not None
        new_bias = narrow_bias(_with_axes(bias, data[1].ndim), a)
        replace_weight(first, 1, weight, names)
        replace_weight(add, 0 if data[2] else 1, new_bias, names)
        for value in (first.outputs[0], add.outputs[0]):
            value.shape = None  # the width is another one now
        if not forward(second.outputs[0], add.outputs[0]):
            raise AssertionError(f"{second.name}: the product cannot stand for it")
        remove(second)
        return
    found = operands(after)
    assert found is not None
    between = operands(add)
    assert between is not None
    axes = max(found[1].ndim, between[1].ndim)
    total = narrow_bias(_with_axes(bias + found[1].astype(np.float64).ravel(), axes), a)
    replace_weight(second, 1, weight, names)
    replace_weight(after, 0 if found[2] else 1, total, names)
    second.replace_input_with(0, first.inputs[0])
    remove(add)
    remove(first)


def _bias(add: ir.Node, channels: int) -> Floats:
    found = operands(add)
    assert found is not None
    if not _is_bias(found[1], channels):
        raise Declined(f"{label(add)} between them is not one number per channel")
    return np.broadcast_to(found[1].astype(np.float64).ravel(), (channels,))


def _is_bias(array: Numbers, channels: int) -> bool:
    return array.size in (1, channels) and array.shape[-1:] in ((), (1,), (channels,))


def _with_axes(bias: Floats, axes: int) -> Floats:
    """Give a bias the number of axes that its forerunner had, which the rank of the result may need."""
    return bias.reshape((1,) * (axes - 1) + bias.shape)
