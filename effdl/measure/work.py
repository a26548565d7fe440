"""What one inference of a model has to compute and to move, at the shapes of its feeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from effdl.data.feeds import Feed
from effdl.graph import io
from effdl.graph.cost import model_cost
from effdl.graph.dims import dims_of, input_dims, model_inputs
from effdl.graph.shapes import Shapes
from effdl.graph.walk import int_attr, is_op, only_user, producer
from effdl.graph.weights import constant_tensor

_INT8 = ("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")
_INT8_CONTRIB = (
    *("DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QAttention"),
    *("QGemm", "QLinearConv"),
)
_BETWEEN = ("Relu", "Clip", "Add")
"""What ONNX Runtime takes into a product, between it and the QuantizeLinear behind it."""


@dataclass(frozen=True)
class Work:
    """The work of one inference.

    Args:
        macs: multiply-accumulates, None when they cannot be counted.
        params: numbers held by weights.
        formats: share of the MACs in each number format: ``fp32``, ``fp16``, ``int8``.
        moved: bytes that have to move at the least: every weight once, the graph's inputs and
            outputs, and what goes into and comes out of each node with MACs. All other nodes are
            taken to be fused into these, so a real run moves more.
        resident: bytes in use at one time, roughly: the weights and the data of the largest node.
        batch: samples in one run, None when the inputs do not say.
    """

    macs: int | None
    params: int
    formats: Mapping[str, float] = field(default_factory=dict)
    moved: int = 0
    resident: int = 0
    batch: int | None = None


def work_of(path: Path, feeds: Sequence[Feed]) -> Work:
    """Return the mean work of one run of a model file over the feeds."""
    return model_work(io.load(path), feeds)


def model_work(model: ir.Model, feeds: Sequence[Feed]) -> Work:
    """Return the mean work of one run over the feeds.

    Args:
        model: the model; stays as it is.
        feeds: what it is run on: their shapes give the dynamic dimensions.
    """
    counts: dict[tuple[tuple[str, int], ...], int] = {}
    for feed in feeds:
        dims = tuple(sorted(feed_dims(model, feed).items()))
        counts[dims] = counts.get(dims, 0) + 1
    works = [(_work(model, dict(dims)), n) for dims, n in counts.items()]
    return _mean(works, batch_of(model, feeds[0]))


def feed_dims(model: ir.Model, feed: Feed) -> dict[str, int]:
    """Return the value of every dynamic dimension that a feed's shapes tell."""
    found: dict[str, int] = {}
    for name, value, axis in input_dims(model):
        array = feed.get(value.name or "")
        if array is not None and axis < array.ndim and array.shape[axis] > 0:
            found.setdefault(name, array.shape[axis])
    return found


def batch_of(model: ir.Model, feed: Feed) -> int | None:
    """Return the samples in one feed: the dimension called batch, else the first axis of all inputs.

    None where the inputs disagree, or where that axis has a fixed size that may mean anything.
    """
    given = {name: array.shape for name, array in feed.items()}
    named = {
        given[value.name or ""][axis]
        for name, value, axis in input_dims(model)
        if "batch" in name.lower() and axis < len(given.get(value.name or "", ()))
    }
    if named:
        return named.pop() if len(named) == 1 else None
    sizes = set()
    for value in model_inputs(model):
        shape = dims_of(value.shape)
        if not shape or not given.get(value.name or ""):
            continue
        size = given[value.name or ""][0]
        # A fixed size is the batch of an image [N, C, H, W]; elsewhere it may mean anything.
        if size != 1 and isinstance(shape[0], int) and len(shape) != 4:
            return None
        sizes.add(size)
    return sizes.pop() if len(sizes) == 1 else None


def _work(model: ir.Model, dims: Mapping[str, int]) -> Work:
    cost = model_cost(model, dims)
    shapes = cost.shapes
    formats: dict[str, float] = {}
    moved, largest = 0, 0
    for node in cost.per_node:
        if not node.macs or not node.times:
            continue
        kind = number_format(node.node, shapes)
        formats[kind] = formats.get(kind, 0) + node.macs * node.times
        data = sum(_bytes(v, shapes) for v in _activations(node.node))
        moved += data * node.times
        largest = max(largest, data)
    ports = [*model.graph.inputs, *model.graph.outputs]
    outside = sum(_bytes(v, shapes) for v in ports if v.name not in model.graph.initializers)
    weights = sum(cost.weight_bytes.values())
    total = sum(formats.values())
    return Work(
        macs=cost.macs,
        params=cost.params,
        formats={k: v / total for k, v in formats.items()} if total else {},
        moved=weights + outside + moved,
        resident=weights + max(largest, outside),
    )


def _mean(works: Sequence[tuple[Work, int]], batch: int | None) -> Work:
    total = sum(n for _, n in works)
    macs = [w.macs for w, _ in works if w.macs is not None]
    formats: dict[str, float] = {}
    for work, n in works:
        for kind, share in work.formats.items():
            formats[kind] = formats.get(kind, 0.0) + share * n / total
    return Work(
        macs=round(sum((w.macs or 0) * n for w, n in works) / total)
        if len(macs) == len(works)
        else None,
        params=works[0][0].params,
        formats=formats,
        moved=round(sum(w.moved * n for w, n in works) / total),
        resident=max(w.resident for w, _ in works),
        batch=batch,
    )


def number_format(node: ir.Node, shapes: Shapes) -> str:
    """Return the format in which a node multiplies: ``int8``, ``fp16`` or ``fp32``.

    A product counts as one of 8 bits when it is one by its operator, or when both of its operands
    come from DequantizeLinear: ONNX Runtime makes one of such a group.
    """
    if is_op(node, *_INT8) or is_op(node, *_INT8_CONTRIB, domain="com.microsoft"):
        return "int8"
    if is_op(node, "MatMulNBits", domain="com.microsoft"):
        return "int8" if int_attr(node, "accuracy_level", 0) == 4 else _float_format(node, shapes)
    operands = [v for v in node.inputs[:2] if v is not None]
    if len(operands) == 2 and all(producer(v, "DequantizeLinear") for v in operands):
        return "int8"
    return _float_format(node, shapes)


def _float_format(node: ir.Node, shapes: Shapes) -> str:
    return "fp16" if shapes.dtype(node.inputs[0]) == ir.DataType.FLOAT16 else "fp32"


def _activations(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what goes in and out of a node and is no weight, in its quantized form where it has one."""
    for value in {id(v): v for v in node.inputs if v is not None}.values():
        made = producer(value, "DequantizeLinear")
        source = made.inputs[0] if made is not None else value
        if source is not None and source.const_value is None and constant_tensor(source) is None:
            yield source
    for value in node.outputs:
        after = value
        while (user := only_user(after)) is not None and is_op(user, *_BETWEEN):
            after = user.outputs[0]
        yield user.outputs[0] if is_op(user, "QuantizeLinear") and user is not None else value


def _bytes(value: ir.Value, shapes: Shapes) -> int:
    shape, dtype = shapes.static(value), shapes.dtype(value)
    if shape is None or dtype is None or dtype == ir.DataType.STRING:
        return 0
    return math.ceil(math.prod(shape) * dtype.bitwidth / 8)
