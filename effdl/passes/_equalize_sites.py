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
from effdl.passes.quantize._scaling import NORMS
from effdl.solve.equalize import Reader

_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
_ALIKE = ("Relu", "LeakyRelu", "PRelu", "Identity", *_POOLS)
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
        value = node.outputs[0]
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
        made, divided, moved = found
        if any(is_op(r, "Conv") != (made.axis == 1) or width(r) != made.channels for r in readers):
            continue
        biases = tuple(b for r in readers if (b := _bias_behind(r)) is not None)
        yield Site(value, made.axis, divided, moved, tuple(readers), biases)


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


@dataclass(frozen=True)
class _Made:
    """A layer that makes channels: along ``axis`` (1 of ``rank`` axes, or -1), from its ``slots``."""

    axis: int
    rank: int
    channels: int
    slots: tuple[Slot, ...]
    moved: Slot | None


def _source(value: ir.Value) -> tuple[_Made, tuple[Slot, ...], Slot | None] | None:
    """Return the layer that makes ``value``, the constants that take factors, the one that takes a shift."""
    added: list[Slot] = []
    shifts, pooled, moved = True, False, None
    at: ir.Value | None = value
    while True:
        node = at.producer() if at is not None else None
        if node is None or at is not node.outputs[0]:
            return None
        if at is not value and only_user(at) is None:
            return None
        if is_op(node, *_ALIKE):
            shifts = shifts and is_op(node, *_SHIFTED)
            pooled = pooled or is_op(node, *_POOLS)
            if is_op(node, "PRelu") and constant(node.inputs[1]) is None:
                return None
            at = node.inputs[0]
        elif is_op(node, "Add") and (slot := _added(node)) is not None:
            added.append(slot)
            moved = moved or (slot if shifts else None)
            at = node.inputs[1 - slot.index]
        else:
            break
    made = _layer(node)
    if made is None or (pooled and made.axis == -1) or not all(_fits(s, made) for s in added):
        return None
    return made, (*added, *made.slots), moved or (made.moved if shifts else None)


def _added(node: ir.Node) -> Slot | None:
    """Return the vector that an Add adds, with its axis counted from the end."""
    for index in (0, 1):
        array = _own(node, index)
        if array is not None and array.ndim and array.size == max(array.shape):
            return Slot(node, index, int(np.argmax(array.shape)) - array.ndim)
    return None


def _fits(slot: Slot, made: _Made) -> bool:
    """Whether a vector that is added lies along the channels."""
    array = constant(slot.node.inputs[slot.index])
    if array is None or array.size != made.channels:
        return False
    if made.axis == -1:
        return slot.axis == -1 and array.ndim <= 2
    return slot.axis == 1 - made.rank and array.ndim <= made.rank


def _layer(node: ir.Node) -> _Made | None:
    if is_op(node, *NORMS):
        slots = tuple(Slot(node, k, 0) for k in (1, 2) if len(node.inputs) > k and node.inputs[k])
        arrays = [_own(node, s.index) for s in slots]
        sizes = {a.size if a is not None and a.ndim == 1 else -1 for a in arrays}
        if len(sizes) != 1 or -1 in sizes or int_attr(node, "axis", -1) != -1:
            return None
        return _Made(-1, 0, sizes.pop(), slots, slots[1] if len(slots) > 1 else None)
    if not is_op(node, "Conv", "Gemm", "MatMul"):
        return None
    weight = _own(node, 1)
    if weight is None or (not is_op(node, "Conv") and weight.ndim != 2):
        return None
    at = 0 if is_op(node, "Conv") or int_attr(node, "transB", 0) else 1
    channels = int(weight.shape[at])
    slots, moved = (Slot(node, 1, at),), None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = _own(node, 2)
        if bias is None or bias.shape != (channels,):
            return None
        slots = (*slots, Slot(node, 2, 0))
        moved = slots[1] if float_attr(node, "beta", 1.0) == 1.0 else None
    return _Made(1 if is_op(node, "Conv") else -1, weight.ndim, channels, slots, moved)


def _bias_behind(node: ir.Node) -> Slot | None:
    """Return the constant that takes what a shift of a layer's input does, None where none can."""
    if is_op(node, "Conv") and (
        any(ints_attr(node, "pads")) or str_attr(node, "auto_pad", "NOTSET").startswith("SAME")
    ):
        return None
    blocks, groups = as_matrix(node)
    outputs = blocks.shape[1] * groups
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = _own(node, 2)
        plain = float_attr(node, "alpha", 1.0) == float_attr(node, "beta", 1.0) == 1.0
        fits = bias is not None and bias.shape == (outputs,)
        return Slot(node, 2, 0) if plain and fits else None
    after = only_user(node.outputs[0])
    if is_op(node, "MatMul") and after is not None and is_op(after, "Add"):
        slot = _added(after)
        array = constant(after.inputs[slot.index]) if slot is not None else None
        if slot is not None and array is not None and array.size == outputs and slot.axis == -1:
            return slot
    return None


def width(node: ir.Node) -> int:
    """Return how many channels a reader reads."""
    blocks, groups = as_matrix(node)
    return int(blocks.shape[2]) * groups


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
    blocks, _ = as_matrix(node)
    largest = np.maximum(blocks.max(3, initial=0.0), -blocks.min(3, initial=0.0))
    square = np.square(blocks, dtype=np.float32).sum((1, 3), dtype=np.float64).reshape(-1)
    return Reader(largest.astype(np.float32), square, blocks.shape[3])


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
