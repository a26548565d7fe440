"""Where factors per channel can go from one layer to the next, and what they do to the weights there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.graph.walk import float_attr, int_attr, ints_attr, is_op, only_user, str_attr
from effdl.graph.weights import Array, Names, constant, constant_tensor, replace_weight, shared
from effdl.solve.equalize import Reader

_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_ALIKE = (
    *("Relu", "LeakyRelu", "PRelu", "Identity"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"),
)
"""Ops f with f(x / s) = f(x) / s for positive s per channel."""
_SHIFTED = ("Identity", "GlobalAveragePool")
"""Those of them with f(x - z) = f(x) - z as well."""
Factors = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Slot:
    """A constant that holds numbers per channel: input ``index`` of ``node``, channels along ``axis``."""

    node: ir.Node
    index: int
    axis: int


@dataclass(frozen=True)
class Site:
    """A tensor between layers.

    Args:
        value: what the readers read, channels along ``axis``.
        divided: constants that make it, which take 1 / s.
        moved: the constant that takes a shift, None where none can.
        readers: layers whose weights take s.
        biases: constants that take the shift back, one for each reader; empty where one has none.
    """

    value: ir.Value
    axis: int
    divided: tuple[Slot, ...]
    moved: Slot | None
    readers: tuple[ir.Node, ...]
    biases: tuple[Slot, ...]

    @property
    def shiftable(self) -> bool:
        """Whether a shift can be taken and given back."""
        return self.moved is not None and len(self.biases) == len(self.readers)


def sites(graph: ir.Graph) -> Iterator[Site]:
    """Yield every place where factors can go through, in the graph's order."""
    for node in graph:
        for value in node.outputs:
            readers = [use.node for use in value.uses() if use.idx == 0]
            if (
                not readers
                or value.is_graph_output()
                or len(readers) != len(list(value.uses()))
                or not all(_is_reader(r) for r in readers)
            ):
                continue
            found = _source(value)
            if found is None:
                continue
            axis, divided, moved = found
            if any(is_op(r, "Conv") != (axis == 1) for r in readers):
                continue
            biases = [_bias_behind(r) for r in readers]
            yield Site(value, axis, divided, moved, tuple(readers), tuple(b for b in biases if b))


def _is_reader(node: ir.Node) -> bool:
    if not is_op(node, "Conv", "Gemm", "MatMul") or int_attr(node, "transA", 0):
        return False
    weight = _own(node, 1)
    return weight is not None and (is_op(node, "Conv") or weight.ndim == 2)


def _own(node: ir.Node, index: int) -> Array | None:
    """Return a float32 constant that nobody else reads."""
    value = node.inputs[index] if len(node.inputs) > index else None
    tensor = constant_tensor(value)
    if value is None or tensor is None or tensor.dtype != ir.DataType.FLOAT or shared(value):
        return None
    return constant(value)


def _source(value: ir.Value) -> tuple[int, tuple[Slot, ...], Slot | None] | None:
    """Return the axis of the channels, the constants that make ``value``, and the last one added."""
    slots: list[Slot] = []
    shifts, moved = True, None
    node = value.producer()
    while node is not None:
        if node is not value.producer() and only_user(node.outputs[0]) is None:
            return None
        if is_op(node, *_ALIKE):
            shifts = shifts and is_op(node, *_SHIFTED)
            if is_op(node, "PRelu") and constant(node.inputs[1]) is None:
                return None
            before = node.inputs[0]
        elif is_op(node, "Add") and (slot := _added(node)) is not None:
            slots.append(slot)
            moved = moved or (slot if shifts else None)
            before = node.inputs[1 - slot.index]
        else:
            break
        node = before.producer() if before is not None else None
    if node is None:
        return None
    made = _layer(node)
    if made is None or any(s.axis not in (made[0], -1) and made[0] == -1 for s in slots):
        return None
    axis, own = made
    if any(not _fits(s, axis) for s in slots):
        return None
    last = own[-1] if len(own) > 1 and shifts else None
    return axis, (*slots, *own), moved or last


def _added(node: ir.Node) -> Slot | None:
    for index in (0, 1):
        array = _own(node, index)
        if array is not None and array.ndim and array.size == max(array.shape):
            return Slot(node, index, int(np.argmax(array.shape)) - array.ndim)
    return None


def _fits(slot: Slot, axis: int) -> bool:
    """Whether a vector that is added lies along the channels: the last axis, or the second of four."""
    array = constant(slot.node.inputs[slot.index])
    if array is None or array.size == 1:
        return False
    return slot.axis == -1 if axis == -1 else slot.axis in (-2, -3, -4) and slot.axis != -1


def _layer(node: ir.Node) -> tuple[int, list[Slot]] | None:
    """Return the axis of a layer's channels and its constants, the bias last."""
    if is_op(node, *_NORMS):
        slots = [Slot(node, k, 0) for k in (1, 2) if len(node.inputs) > k and node.inputs[k]]
        arrays = [_own(node, s.index) for s in slots]
        if not slots or any(a is None or a.ndim != 1 for a in arrays):
            return None
        if int_attr(node, "axis", -1) != -1 or len([o for o in node.outputs if list(o.uses())]) > 1:
            return None
        return -1, slots
    if not is_op(node, "Conv", "Gemm", "MatMul"):
        return None
    weight = _own(node, 1)
    if weight is None or (not is_op(node, "Conv") and weight.ndim != 2):
        return None
    at = 0 if is_op(node, "Conv") or int_attr(node, "transB", 0) else 1
    slots = [Slot(node, 1, at)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = _own(node, 2)
        if bias is None or bias.ndim != 1 or bias.size != weight.shape[at]:
            return None
        slots.append(Slot(node, 2, 0))
    return 1 if is_op(node, "Conv") else -1, slots


def _bias_behind(node: ir.Node) -> Slot | None:
    """Return the constant that takes what a shift of a layer's input does, None where none can."""
    if is_op(node, "Conv") and (
        any(ints_attr(node, "pads")) or str_attr(node, "auto_pad", "NOTSET").startswith("SAME")
    ):
        return None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        weight, bias = constant(node.inputs[1]), _own(node, 2)
        plain = float_attr(node, "alpha", 1.0) == float_attr(node, "beta", 1.0) == 1.0
        fits = weight is not None and bias is not None and bias.ndim == 1
        return Slot(node, 2, 0) if plain and fits and bias is not None and bias.size > 1 else None
    after = only_user(node.outputs[0])
    if is_op(node, "MatMul") and after is not None and is_op(after, "Add"):
        slot = _added(after)
        if slot is not None and slot.axis == -1:
            return slot
    return None


def as_matrix(node: ir.Node) -> tuple[Array, int]:
    """Return a reader's weight as [groups, N / groups, C / groups, taps], and the groups."""
    weight = constant(node.inputs[1])
    assert weight is not None
    if not is_op(node, "Conv"):
        rows = weight if int_attr(node, "transB", 0) else weight.T
        return rows[None, :, :, None], 1
    groups = int_attr(node, "group", 1)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1), groups


def reader(node: ir.Node) -> Reader:
    """Return what a reader's weights are to the search for factors."""
    blocks, groups = as_matrix(node)
    size = np.abs(blocks.astype(np.float64))
    _, outputs, width, taps = blocks.shape
    largest = np.zeros((groups, outputs, groups, width))
    for k in range(groups):
        largest[k, :, k] = size[k].max(2, initial=0.0)
    square = np.square(size).sum((1, 3)).reshape(-1)
    return Reader(largest.reshape(groups * outputs, groups * width), square, taps)


def apply(site: Site, factors: Factors, shift: Factors, names: Names) -> None:
    """Write factors and shift into the constants around a site."""
    if site.moved is not None and shift.any():
        _change(site.moved, lambda a, along: a - shift.reshape(along), names)
        for node, bias in zip(site.readers, site.biases, strict=True):
            blocks, _ = as_matrix(node)
            parts = shift.reshape(blocks.shape[0], 1, blocks.shape[2], 1)
            back = (blocks.astype(np.float64) * parts).sum((2, 3)).reshape(-1)
            _change(bias, partial(_added_to, back), names)
    for slot in site.divided:
        _change(slot, lambda a, along: a / factors.reshape(along), names)
    for node in site.readers:
        blocks, groups = as_matrix(node)
        wide = blocks.astype(np.float64) * factors.reshape(groups, 1, blocks.shape[2], 1)
        weight = constant(node.inputs[1])
        assert weight is not None
        if is_op(node, "Conv"):
            made = wide.reshape(weight.shape)
        else:
            made = wide[0, :, :, 0] if int_attr(node, "transB", 0) else wide[0, :, :, 0].T
        replace_weight(node, 1, np.ascontiguousarray(made, np.float32), names)


def _added_to(back: Factors, array: Factors, along: list[int]) -> Factors:
    return array + back.reshape(along)


def _change(slot: Slot, edit: Callable[[Factors, list[int]], Factors], names: Names) -> None:
    array = constant(slot.node.inputs[slot.index])
    assert array is not None
    along = [1] * array.ndim
    along[slot.axis] = -1
    made = edit(array.astype(np.float64), along)
    replace_weight(slot.node, slot.index, np.asarray(made, np.float32), names)
