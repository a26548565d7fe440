"""What fits into float16: constants, and activations on calibration data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.graph.walk import is_op, opset
from effdl.graph.weights import Array, Names, add_initializer
from effdl.passes.convert._float16_slots import FLOAT, NEUTRAL
from effdl.runtime.session import open_session

LARGEST = 65504.0
"""The largest finite float16."""
MASK = 1e8
"""Constants at least this large that are added to or selected into scores are attention masks."""


def to_half(array: Array, max_finite: float) -> npt.NDArray[np.float16]:
    """Return ``array`` in float16; finite numbers outside the range become ±``max_finite``."""
    if over(array):
        array = np.where(np.isinf(array), array, np.clip(array, -max_finite, max_finite))
    return array.astype(np.float16)


def over(array: Array) -> bool:
    """Whether a finite number of ``array`` is outside the range of float16."""
    if array.size == 0:
        return False
    size = _magnitude(array)
    return bool(size.max() > LARGEST) and bool(np.any(size[np.isfinite(size)] > LARGEST))


def lost(array: Array) -> tuple[int, int]:
    """Return how many numbers of ``array`` are not zero, and how many of them become zero."""
    nonzero = np.count_nonzero(array)
    # half the smallest float16, 2**-24, rounds to even: to zero
    kept = np.count_nonzero(_magnitude(array) > 2.0**-25)
    return int(nonzero), int(nonzero - kept)


def _magnitude(array: Array) -> npt.NDArray[np.floating[Any]]:
    return np.abs(array.astype(np.float32, copy=False))


def constant_fault(node: ir.Node, index: int, array: Array, name: str) -> str | None:
    """Return why the constant at input ``index`` forces ``node`` to stay float32, None if it need not.

    A bound of Clip, Min or Max, and a mask (one huge number, everything else 0 or 1), may be moved
    to the end of the range without changing what the node is for.
    """
    if array.dtype.kind != "f":
        return None
    if over(array) and not _is_bound(node, index) and not is_mask(node, index, array):
        worst = float(np.max(_magnitude(array[np.isfinite(array)])))
        return f"the constant '{name}' holds {worst:g}, float16 ends at {LARGEST:g}"
    nonzero, vanished = lost(array)
    if nonzero and vanished == nonzero:
        return f"the constant '{name}' would become 0 in float16"
    return None


def _is_bound(node: ir.Node, index: int) -> bool:
    return is_op(node, "Min", "Max") or (is_op(node, "Clip") and index > 0)


def is_mask(node: ir.Node, index: int, array: Array) -> bool:
    """Whether the constant is a mask: one huge or infinite number, everything else 0 or 1."""
    numbers = array.astype(np.float32, copy=False)
    big = numbers[_magnitude(array) > LARGEST]
    rest = numbers[_magnitude(array) <= LARGEST]
    if big.size == 0 or np.any(np.abs(big) < MASK) or np.any((rest != 0) & (rest != 1)):
        return False
    if is_op(node, "Add", "Mul"):
        return bool(np.all(big < 0))
    if is_op(node, "Sub"):
        return index == 1 and bool(np.all(big > 0))
    return is_op(node, *NEUTRAL)


def largest(
    model: ir.Model, values: Iterable[ir.Value], masks: set[ir.Value], feeds: Feeds
) -> dict[ir.Value, float]:
    """Return the largest magnitude of each value over all feeds, in the float32 model on the CPU.

    Only the maxima leave the session, so memory does not grow with the activations.

    Args:
        model: left as it is.
        values: float32 values of the main graph.
        masks: those in which numbers of at least ``MASK`` are masks and do not count.
        feeds: samples.
    """
    wanted = list(dict.fromkeys(values))
    twin = model.clone()
    twins = dict(zip(model.graph.inputs, twin.graph.inputs, strict=True))
    for node, other in zip(model.graph, twin.graph, strict=True):
        twins.update(zip(node.outputs, other.outputs, strict=True))
    twin.ir_version = max(twin.ir_version, 4)  # before, initializers had to be graph inputs
    names = Names(twin)
    flat = add_initializer(twin.graph, names, "flat", np.array([-1], np.int64))
    zero = add_initializer(twin.graph, names, "zero", np.zeros(1, np.float32))
    limit = add_initializer(twin.graph, names, "mask", np.array(MASK, np.float32))
    can_select = opset(model) >= 9
    maxima = []
    for value in wanted:
        nodes = [ir.node("Reshape", [twins[value], flat])]
        # the zero keeps the maximum of an empty value defined
        nodes.append(ir.node("Concat", [nodes[-1].outputs[0], zero], {"axis": 0}))
        nodes.append(ir.node("Abs", [nodes[-1].outputs[0]]))
        if value in masks and can_select:
            nodes.append(ir.node("Less", [nodes[-1].outputs[0], limit]))
            nodes.append(ir.node("Where", [nodes[-1].outputs[0], nodes[-2].outputs[0], zero]))
        nodes.append(ir.node("ReduceMax", [nodes[-1].outputs[0]], {"keepdims": 0}))
        for node in nodes:
            node.outputs[0].name = names.fresh("largest")
        twin.graph.extend(nodes)
        result = nodes[-1].outputs[0]
        result.type, result.shape = ir.TensorType(FLOAT), ir.Shape(())
        maxima.append(result)
    twin.graph.outputs[:] = maxima
    session = open_session(twin)
    found = np.zeros(len(wanted))
    for feed in feeds:
        # NaN stays: it fits nowhere
        found = np.maximum(found, [float(m) for m in session.run(feed).values()])
    return {v: float(m) for v, m in zip(wanted, found, strict=True)}
