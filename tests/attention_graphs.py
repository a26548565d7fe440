"""Writes one attention block the way exporters do, in every mixture of their styles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from effdl.graph import io

HEADS, SIZE, WIDE, CHANNELS = 3, 4, 12, 5
LOW = float(np.finfo(np.float32).min)
Dim = int | str


@dataclass(frozen=True)
class Style:
    """How an exporter writes softmax(scale · Q K^T + bias) V.

    Args:
        source: how Q, K and V are made: ``separate``, ``plain`` (no biases), ``gemm``, ``split``,
            ``slice``, ``gather`` (timm), ``interleaved`` (GPT-NeoX), ``cross``, ``grouped`` (GQA).
        keys: K is transposed ``once``, ``twice``, or ``flat`` (through [-1, T, D]).
        scale: where the factor stands.
        mask: see ``_masked``.
        guard: NaN becomes 0 after the softmax.
        flat: ``bmm``: everything in [B·H, S, D]; ``view``: the mask is added in 4-D in between.
        merged: the context ends as ``3d``, ``2d`` or ``never``.
        value_size: of a head of V.
        batch, queries: dimensions of the input.
        extra: also graph outputs: ``scores``, ``weights``, ``present``, ``final``.
        opset: of the default domain.
    """

    source: str = "separate"
    keys: str = "once"
    scale: str = "scores"
    mask: str = "none"
    guard: bool = False
    flat: str = ""
    merged: str = "3d"
    value_size: int = SIZE
    batch: Dim = "B"
    queries: Dim = "S"
    extra: str = ""
    opset: int = 17
    dtype: int = TensorProto.FLOAT


@dataclass
class Graph:
    """A graph in the making; every operator returns the name of its output."""

    opset: int
    dtype: int = TensorProto.FLOAT
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: dict[str, tuple[int, Sequence[Dim]]] = field(default_factory=dict)
    outputs: dict[str, tuple[int, int]] = field(default_factory=dict)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node and return the name of its output, or of its outputs."""
        names = [f"{op_type.lower()}{len(self.nodes)}_{k}" for k in range(outputs)]
        name = f"{op_type}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, names, name, **attributes))
        return names[0] if outputs == 1 else names

    def const(self, array: Any, dtype: type = np.float32) -> str:
        name = f"c{len(self.weights)}"
        if dtype is np.float32:
            dtype = helper.tensor_dtype_to_np_dtype(self.dtype)
        self.weights.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def ints(self, *numbers: int) -> str:
        return self.const(numbers, np.int64)

    def random(self, *shape: int) -> str:
        return self.const(self.rng.standard_normal(shape) * 0.5)

    def input(self, name: str, shape: Sequence[Dim], dtype: int | None = None) -> str:
        self.inputs[name] = (self.dtype if dtype is None else dtype, shape)
        return name

    def output(self, name: str, rank: int) -> None:
        self.outputs[name] = (self.dtype, rank)

    def axes(self, op_type: str, x: str, *axes: int) -> str:
        if self.opset < 13:
            return str(self.op(op_type, x, axes=axes))
        return str(self.op(op_type, x, self.ints(*axes)))

    def split(self, x: str, sizes: Sequence[int], axis: int) -> list[str]:
        if self.opset < 13:
            return list(self.op("Split", x, outputs=len(sizes), axis=axis, split=sizes))
        return list(self.op("Split", x, self.ints(*sizes), outputs=len(sizes), axis=axis))

    def dim(self, x: str, axis: int) -> str:
        return str(self.op("Gather", self.op("Shape", x), self.ints(axis)))

    def reshape(self, x: str, *goal: int | str) -> str:
        """Reshape to numbers and names of vectors of one number."""
        if all(isinstance(g, int) for g in goal):
            return str(self.op("Reshape", x, self.ints(*(int(g) for g in goal))))
        parts = [self.ints(g) if isinstance(g, int) else g for g in goal]
        return str(self.op("Reshape", x, self.op("Concat", *parts, axis=0)))

    def layer(self, x: str, width: int, *, bias: bool = True, channels: int = CHANNELS) -> str:
        product = str(self.op("MatMul", x, self.random(channels, width)))
        return str(self.op("Add", self.random(width), product)) if bias else product

    def model(self) -> ir.Model:
        def info(name: str, dtype: int, shape: Sequence[Any]) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, dtype, shape)

        graph = helper.make_graph(
            self.nodes,
            "g",
            [info(n, d, s) for n, (d, s) in self.inputs.items()],
            [info(n, d, [None] * r) for n, (d, r) in self.outputs.items()],
            self.weights,
        )
        version = 8 if self.opset < 20 else 10
        imports = [helper.make_opsetid("", self.opset)]
        proto = helper.make_model(graph, opset_imports=imports, ir_version=version)
        return io.from_proto(proto, "attention", None)


def build(style: Style) -> ir.Model:
    """Write the block."""
    g = Graph(style.opset, style.dtype)
    x = g.input("x", [style.batch, style.queries, CHANNELS])
    q, k, v = _operands(g, style, x)
    if style.extra == "present":
        g.outputs.update({k: (style.dtype, 4), v: (style.dtype, 4)})
    if style.scale in ("both", "q"):
        q = g.op("Mul", q, g.const(SIZE ** (-0.25 if style.scale == "both" else -0.5)))
    if style.scale in ("both", "k"):
        k = g.op("Div", k, g.const([SIZE ** (0.25 if style.scale == "both" else 0.5)]))
    if style.flat:
        q, v = (g.reshape(a, -1, g.dim(a, 2), n) for a, n in ((q, SIZE), (v, style.value_size)))
        k = g.op("Transpose", g.reshape(k, -1, g.dim(k, 2), SIZE), perm=(0, 2, 1))
    else:
        k = _transposed(g, style, k)
    context = g.op("MatMul", _weights(g, style, g.op("MatMul", q, k)), v)
    _finish(g, style, context)
    return g.model()


def _weights(g: Graph, style: Style, scores: str) -> str:
    rank = 3 if style.flat else 4
    if style.scale == "scores":
        scores = g.op("Mul", g.const(SIZE**-0.5), scores)
    elif style.scale == "divided":
        scores = g.op("Div", scores, g.const(2.0))
    if style.flat == "view":
        rows = g.dim("x", 1)
        scores = _masked(g, style, g.reshape(scores, g.dim("x", 0), HEADS, rows, -1))
        scores = g.reshape(scores, -1, rows, g.dim(scores, 3))
    else:
        scores = _masked(g, style, scores)
    weights = str(g.op("Softmax", scores, axis=-1))
    if style.extra in ("scores", "weights"):
        g.output(scores if style.extra == "scores" else weights, rank)
    if style.guard:
        test = g.op("IsNaN", weights)
        weights = g.op("Where", test, g.const(0.0), weights)
    return weights


def _finish(g: Graph, style: Style, context: str) -> None:
    if style.merged == "never":
        g.output(g.op("Tanh", context), 3 if style.flat else 4)
        return
    if style.flat:
        context = g.reshape(context, g.dim("x", 0), HEADS, g.dim("x", 1), style.value_size)
    wide = HEADS * style.value_size
    context = g.op("Transpose", context, perm=(0, 2, 1, 3))
    two = style.merged == "2d"
    final = g.reshape(context, -1, wide) if two else g.reshape(context, 0, 0, wide)
    if style.extra == "final":
        g.output(final, 2 if two else 3)
    g.output(g.layer(final, CHANNELS, channels=wide), 2 if two else 3)


def _operands(g: Graph, style: Style, x: str) -> tuple[str, str, str]:
    """Return Q, K and V as [B, H, S, D]."""
    deep = (SIZE, SIZE, style.value_size)

    def split(a: str, heads: int = HEADS, size: int = SIZE) -> str:
        return str(g.op("Transpose", g.reshape(a, 0, 0, heads, size), perm=(0, 2, 1, 3)))

    match style.source:
        case "separate" | "plain":
            bias = style.source == "separate"
            q, k, v = (split(g.layer(x, HEADS * n, bias=bias), size=n) for n in deep)
        case "cross":
            other = g.input("other", [style.batch, "T", CHANNELS])
            sides = zip((x, other, other), deep, strict=True)
            q, k, v = (split(g.layer(a, HEADS * n), size=n) for a, n in sides)
        case "gemm":
            flat = g.reshape(x, -1, CHANNELS)
            lead = g.dim(x, 0), g.dim(x, 1)
            layers = [
                g.op("Gemm", flat, g.random(CHANNELS, HEADS * n), g.random(HEADS * n)) for n in deep
            ]
            q, k, v = (
                g.op("Transpose", g.reshape(a, *lead, HEADS, n), perm=(0, 2, 1, 3))
                for a, n in zip(layers, deep, strict=True)
            )
        case "split":
            q, k, v = (split(a) for a in g.split(g.layer(x, 3 * WIDE), [WIDE] * 3, -1))
        case "slice":
            whole = g.layer(x, 3 * WIDE)
            ends = (WIDE, 2 * WIDE, 2**63 - 1)
            q, k, v = (
                split(g.op("Slice", whole, g.ints(i * WIDE), g.ints(end), g.ints(-1)))
                for i, end in enumerate(ends)
            )
        case "gather":
            five = g.reshape(g.layer(x, 3 * WIDE), 0, 0, 3, HEADS, SIZE)
            five = g.op("Transpose", five, perm=(2, 0, 3, 1, 4))
            q, k, v = (g.op("Gather", five, g.const(i, np.int64), axis=0) for i in (0, 1, -1))
        case "interleaved":
            four = g.reshape(g.layer(x, 3 * WIDE), 0, 0, HEADS, 3 * SIZE)
            four = g.op("Transpose", four, perm=(0, 2, 1, 3))
            q, k, v = g.split(four, [SIZE] * 3, -1)
        case "grouped":
            q = split(g.layer(x, WIDE))
            goal = g.op(
                "Concat", g.dim(x, 0), g.ints(1), g.ints(HEADS), g.dim(x, 1), g.ints(SIZE), axis=0
            )
            k, v = (
                g.reshape(
                    g.op("Expand", g.axes("Unsqueeze", split(g.layer(x, SIZE), 1), 2), goal),
                    0,
                    HEADS,
                    g.dim(x, 1),
                    SIZE,
                )
                for _ in range(2)
            )
        case _:
            raise AssertionError(style.source)
    return q, k, v


def _transposed(g: Graph, style: Style, k: str) -> str:
    match style.keys:
        case "twice":
            return str(
                g.op("Transpose", g.op("Transpose", k, perm=(0, 2, 1, 3)), perm=(0, 2, 3, 1))
            )
        case "flat":
            flat = g.op("Transpose", g.reshape(k, -1, g.dim(k, 2), SIZE), perm=(0, 2, 1))
            return g.reshape(flat, g.dim(k, 0), HEADS, SIZE, g.dim(k, 2))
    return str(g.op("Transpose", k, perm=(0, 1, 3, 2)))


SHAPES: dict[str, list[str | int]] = {
    "b11t": ["B", 1, 1, "T"],
    "b1st": ["B", 1, "S", "T"],
    "bhst": ["B", HEADS, "S", "T"],
    "1hst": [1, HEADS, "S", "T"],
    "b1s1": ["B", 1, "S", 1],
    "hst": [HEADS, "S", "T"],
    "st": ["S", "T"],
    "t": ["T"],
    "number": [1, 1, 1],
}


def _given(g: Graph, style: Style, name: str, kind: str, dtype: int | None = None) -> str:
    keys: Dim = "T" if style.source == "cross" else style.queries
    named: dict[Dim, Dim] = {"B": style.batch, "S": style.queries, "T": keys}
    return g.input(name, [named.get(d, d) for d in SHAPES[kind]], dtype)


def _masked(g: Graph, style: Style, scores: str) -> str:
    """Add a mask: a shape of SHAPES, or a way to make one."""
    if style.mask == "none":
        return scores
    if style.mask.startswith("where"):
        return _chosen(g, style, scores)
    low: str
    match style.mask:
        case "two":
            scores = g.op("Add", scores, _given(g, style, "m", "b11t"))
            low = _given(g, style, "m2", "st")
        case "scaled":
            both = g.op("Add", scores, _given(g, style, "m", "b11t"))
            return str(g.op("Mul", both, g.const(0.5)))
        case "integers":
            m = g.op("Cast", _given(g, style, "m", "b11t", TensorProto.INT64), to=style.dtype)
            low = g.op("Mul", g.op("Sub", g.const(1.0), m), g.const(-1e4))
        case "low" | "inf":
            low = _where(
                g, _flags(g, style, "m", "b1st"), 0.0, LOW if style.mask == "low" else -np.inf
            )
        case "low_and_low":
            parts = (
                _where(g, _flags(g, style, n, k), 0.0, LOW)
                for n, k in (("m", "b11t"), ("m2", "st"))
            )
            low = g.op("Add", *parts)
        case "inf_and_bias":
            inf = _where(g, _flags(g, style, "m"), 0.0, -np.inf)
            low = g.op("Add", _given(g, style, "m2", "1hst"), inf)
        case shape:
            low = _given(g, style, "m", shape)
    return str(g.op("Add", scores, low))


def _chosen(g: Graph, style: Style, scores: str) -> str:
    """Put numbers in place of scores."""
    match style.mask:
        case "where_inf":
            return _where(g, _flags(g, style, "m"), scores, -np.inf)
        case "where_low":
            return _where(g, _flags(g, style, "m", "b1st"), scores, LOW)
        case "where_swapped":
            return _where(g, str(g.op("Not", _flags(g, style, "m"))), LOW, scores)
        case "where_mild":
            return _where(g, _flags(g, style, "m"), scores, -1e4)
        case "where_where":
            inner = _where(g, _flags(g, style, "m2", "st"), scores, LOW)
            return _where(g, _flags(g, style, "m"), inner, LOW)
        case "where_scaled":
            low = _where(g, _flags(g, style, "m"), scores, -np.inf)
            return str(g.op("Mul", low, g.const(0.5)))
        case "where_over_add":
            inner = g.op("Add", scores, _given(g, style, "m2", "1hst"))
            return _where(g, _flags(g, style, "m", "st"), inner, LOW)
        case "where_under_add":
            low = _where(g, _flags(g, style, "m", "st"), scores, LOW)
            return str(g.op("Add", _given(g, style, "m2", "1hst"), low))
    raise AssertionError(style.mask)


def _flags(g: Graph, style: Style, name: str, kind: str = "b11t") -> str:
    return _given(g, style, name, kind, TensorProto.BOOL)


def _where(g: Graph, condition: str, yes: str | float, no: str | float) -> str:
    pair = (g.const(v) if isinstance(v, float) else v for v in (yes, no))
    return str(g.op("Where", condition, *pair))


def feed(model: ir.Model, sizes: dict[str, int], *, dead: bool, seed: int = 0) -> dict[str, Any]:
    """Return inputs; masks take some keys away, with ``dead`` all keys of the first sample or row."""
    rng = np.random.default_rng(seed)
    given = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
        match value.dtype:
            case ir.DataType.BOOL:
                array = rng.random(shape) < 0.7
                array[..., :1] = True
                if dead and shape[0] > 0:
                    array[0] = False
            case ir.DataType.INT64:
                array = (rng.random(shape) < 0.7).astype(np.int64)
            case _:
                assert value.dtype is not None
                array = rng.standard_normal(shape).astype(value.dtype.numpy())
        given[str(value.name)] = array
    return given
