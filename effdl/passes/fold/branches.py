"""The pass ``fold_branches``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effdl.graph.edit import can_forward, forward, raise_ir_version, remove, roots, unused
from effdl.graph.match import label
from effdl.graph.walk import is_op, nodes_in, only_user
from effdl.graph.weights import Names, add_initializer, constant, replace_weight, shared
from effdl.passes.base import Context, NodePass
from effdl.passes.fold._affine import Declined, Floats, batchnorm_parameters, narrow, narrow_bias
from effdl.passes.fold._window import conv_kernel, set_pads
from effdl.solve.convolve import Kernel, beside, identity


@dataclass(frozen=True)
class _Leaf:
    """One summand: what it is, and the input of which sum it is."""

    value: ir.Value
    user: ir.Node

    @property
    def maker(self) -> ir.Node | None:
        return self.value.producer()


class FoldBranches(NodePass):
    """Fold parallel convolutions of one input, whose results are summed, into one convolution.

    What it does: in an Add or Sum, Convs of the same input with the same strides, groups and result
    size become one Conv, smaller kernels set into the larger one; the input itself, or a batch norm
    of it, beside a Conv becomes a one in the kernel's middle. The kernel is computed in double
    precision and rounded once.

    When it helps: models of the RepVGG, MobileOne or ACNet kind that were exported as they were
    trained: each block becomes one convolution.

    When it does not: branches with different dilations, or with a batch norm that was not folded
    before (run fold_batchnorm first), or whose common window costs more than the branches do.

    Example:
        passes: [simplify, fold_batchnorm, fold_branches]
    """

    not_after: ClassVar[Mapping[str, str]] = {"quantize_*": "quantized weights cannot be added"}

    def run(self, model: ir.Model, ctx: Context) -> int:
        """Return the number of branches that went into another."""
        names, changes, declined = Names(model), 0, dict[str, str]()
        for root, imports, is_function in roots(model):
            if imports.get("", imports.get("ai.onnx", 0)) < 7:
                continue
            for node in reversed(list(nodes_in(root))):
                if node.graph is None or not _sums(node) or not self.selected(node):
                    continue
                if _sums(only_user(node.outputs[0])):
                    continue  # looked at from the last sum
                try:
                    changes += _fold(node, is_function, names, ctx, declined)
                except Declined as e:
                    declined[node.name or node.op_type] = str(e)
        for name, reason in declined.items():
            ctx.skip(name, reason)
        if changes:
            raise_ir_version(model)
            ctx.note("folded", changes)
        return changes

    def candidates(self, model: ir.Model, ctx: Context) -> list[str] | None:
        """Return the sums of convolutions."""
        sums = [n for n in nodes_in(model.graph) if _sums(n)]
        return [
            n.name or n.op_type
            for n in sums
            if any(is_op(v.producer(), "Conv") for v in n.inputs if v is not None)
        ]


def _sums(node: ir.Node | None) -> bool:
    return node is not None and is_op(node, "Add", "Sum") and len(node.inputs) > 1


def _leaves(node: ir.Node) -> Iterator[_Leaf]:
    """Yield the summands of a tree of sums."""
    for value in node.inputs:
        if value is None:
            continue
        maker = value.producer()
        inner = maker is not None and _sums(maker) and only_user(value) is node
        if maker is not None and inner and maker.graph is node.graph:
            yield from _leaves(maker)
        else:
            yield _Leaf(value, node)


def _fold(
    root: ir.Node, is_function: bool, names: Names, ctx: Context, declined: dict[str, str]
) -> int:
    groups: dict[ir.Value, list[_Leaf]] = {}
    leaves = list(_leaves(root))
    for leaf in leaves:
        if is_op(leaf.maker, "Conv") and leaf.maker is not None:
            source = leaf.maker.inputs[0]
            if source is not None and leaf.maker.graph is root.graph:
                groups.setdefault(source, []).append(leaf)
    changes = 0
    for source, convs in groups.items():
        bypass = [leaf for leaf in leaves if _bypasses(leaf, source, root)]
        if len(convs) + len(bypass) < 2:
            continue
        try:
            if is_function:
                raise Declined("weights inside a function are not changed")
            if not can_forward(root.outputs[0], convs[0].value):
                raise Declined("the sum gives an output of the graph")
            changes += _merge(convs, bypass, source, names, ctx)
        except Declined as e:
            declined[convs[0].value.name or root.op_type] = str(e)
    return changes


def _bypasses(leaf: _Leaf, source: ir.Value, root: ir.Node) -> bool:
    """Whether ``leaf`` is the input of the convolutions itself, or a batch norm of it."""
    if leaf.value is source:
        return True
    norm = leaf.maker
    same = norm is not None and is_op(norm, "BatchNormalization") and norm.graph is root.graph
    return same and norm is not None and norm.inputs[0] is source


def _merge(
    convs: list[_Leaf], bypass: list[_Leaf], source: ir.Value, names: Names, ctx: Context
) -> int:
    kernels, biases, types = [], [], set()
    for leaf in convs:
        conv = leaf.maker
        assert conv is not None
        weight = conv.inputs[1]
        if only_user(leaf.value) is not leaf.user:
            raise Declined(f"'{leaf.value.name}' is also read by others")
        if weight is None or shared(weight):
            raise Declined(f"the weight of {label(conv)} has other users")
        kernel, bias = conv_kernel(conv)
        kernels.append(kernel)
        biases.append(bias)
        types.add(weight.dtype)
    for leaf in bypass:
        kernel, bias = _one_tap(leaf, source, kernels[0])
        kernels.append(kernel)
        biases.append(bias)
    if len(types) > 1:
        raise Declined("the weights of its branches are of different types")
    total = beside(kernels)
    if total is None:
        raise Declined("its branches differ in stride, dilation, groups, channels or result size")
    taps = sum(int(np.prod(k.window)) for k in kernels[: len(convs)])
    if np.prod(total.window) > taps:
        raise Declined("the common window costs more than the branches do")
    given = [b for b in biases if b is not None]
    _write(convs, bypass, total, sum(given, np.zeros(())) if given else None, names, ctx)
    return len(convs) + len(bypass) - 1


def _one_tap(leaf: _Leaf, source: ir.Value, like: Kernel) -> tuple[Kernel, Floats | None]:
    """Return the input itself, or its batch norm, as a convolution."""
    axes = len(like.strides)
    outputs, inner = like.weight.shape[:2]
    if outputs != inner * like.group or set(like.strides) != {1}:
        raise Declined("the input is added to a convolution of other channels or strides")
    weight, bias = identity(outputs, like.group, axes), None
    norm = leaf.maker
    if leaf.value is not source and norm is not None:
        if only_user(leaf.value) is not leaf.user:
            raise Declined(f"'{leaf.value.name}' is also read by others")
        gamma, beta, mean, deviation = batchnorm_parameters(norm)
        if gamma.size != outputs:
            raise Declined(f"{label(norm)} has other channels")
        scale = gamma / deviation
        weight, bias = weight * scale.reshape(-1, 1, *(1,) * axes), beta - mean * scale
    ones, zeros = (1,) * axes, (0,) * axes
    return Kernel(weight, ones, ones, zeros, zeros, like.group), bias


def _write(
    convs: list[_Leaf],
    bypass: list[_Leaf],
    total: Kernel,
    bias: Floats | None,
    names: Names,
    ctx: Context,
) -> None:
    conv = convs[0].maker
    assert conv is not None
    like = constant(conv.inputs[1])
    assert like is not None
    weight = narrow(total.weight, like, 0)
    new_bias = None if bias is None else narrow_bias(bias, like)
    gone = [*convs[1:], *bypass]
    # The first convolution stays where it is: nothing it reads comes later than what it read.
    replace_weight(conv, 1, weight, names)
    conv.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", list(total.window))
    conv.attributes["dilations"] = ir.AttrInt64s("dilations", list(total.dilations))
    conv.attributes["strides"] = ir.AttrInt64s("strides", list(total.strides))
    set_pads(conv, total.begins, total.ends)
    if new_bias is not None:
        if len(conv.inputs) > 2 and conv.inputs[2] is not None:
            replace_weight(conv, 2, new_bias, names)
        else:
            conv.resize_inputs(3)
            assert isinstance(conv.graph, ir.Graph)
            name = f"{conv.name or 'conv'}_bias"
            conv.replace_input_with(2, add_initializer(conv.graph, names, name, new_bias))
    moved: dict[ir.Node, ir.Node] = {}
    for leaf in gone:
        _drop(leaf, moved)
        if leaf.maker is not None and unused(leaf.maker):
            remove(leaf.maker)
        ctx.touch(leaf.value.name or "", f"folded into {label(conv)}")


def _drop(leaf: _Leaf, moved: dict[ir.Node, ir.Node]) -> None:
    """Take one summand out of the sum that reads it; a sum of one value goes.

    Args:
        leaf: the summand.
        moved: sums that went, and where what they read has gone to; this adds to it.
    """
    node = leaf.user
    while node in moved:
        node = moved[node]
    index = next(k for k, v in enumerate(node.inputs) if v is leaf.value)
    rest = [v for k, v in enumerate(node.inputs) if k != index]
    for k, value in enumerate(rest):
        node.replace_input_with(k, value)
    node.resize_inputs(len(rest))
    if len(rest) > 1:
        return
    user, other = only_user(node.outputs[0]), rest[0]
    assert other is not None
    if not forward(node.outputs[0], other):
        raise AssertionError(f"{node.name}: the last summand cannot stand for it")
    remove(node)
    if user is not None:
        moved[node] = user
