"""Writes an attention as one node: Attention or MultiHeadAttention of com.microsoft, or the standard one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from effdl.graph.insert import Attribute, Builder
from effdl.graph.match import Mismatch, label, need, some
from effdl.graph.probes import Probes
from effdl.graph.walk import float_attr, int_attr, is_op
from effdl.graph.weights import Array, constant, shared
from effdl.passes.fuse._attention_bias import Biases, lowest
from effdl.passes.fuse._attention_match import LOWEST, Attention, Heads

CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class Projection:
    """A layer x W + b with constant weights that makes Q, K or V.

    Args:
        x: its input, [B, S, C].
        weight: [C, N]; ``bias`` [N] or None.
    """

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None


@dataclass
class Writer:
    """Replaces attentions of one graph.

    Args:
        build: adds nodes.
        biases: makes what is added to the scores.
        spare: weights that may be packed; others have users besides the attention.
    """

    build: Builder
    biases: Biases
    _made: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)

    def write(self, found: Attention, form: str) -> tuple[str, ir.Value]:
        """Add the node that stands for ``found`` and return what it is and its result.

        Args:
            found: the attention.
            form: ``attention``, ``mha`` or ``onnx``; where the first does not fit, ``mha`` is taken.

        Raises:
            Mismatch: no form fits; nothing was added.
        """
        before = found.final.producer()
        assert before is not None
        self.build.before = before
        if form == "onnx":
            op_type, value = "Attention (ONNX)", self._standard(found)
        else:
            packed = self._packed(found) if form == "attention" else None
            op_type = "MultiHeadAttention" if packed is None else "Attention"
            value = self._multi_head(found) if packed is None else packed
        return op_type, self._shaped(found, value)

    def _standard(self, found: Attention) -> ir.Value:
        """The operator of ONNX: rows that are masked altogether give 0."""
        need(self.build.opset >= 23, "Attention came with opset 23")
        need(found.dead != LOWEST, f"{label(found.anchor)} is the standard operator already")
        need(
            all(lowest(t) > LOWEST for t in found.terms),
            "rows that are masked altogether give something, in the standard operator they give 0",
        )
        q, k, v = (self._flat(w) for w in (found.q, found.k, found.v))
        bias = self.biases.of(found, k, q)
        attributes: dict[str, Attribute] = {
            "q_num_heads": found.heads,
            "kv_num_heads": found.k[0].heads,
            "scale": found.scale,
        }
        inputs = [q, k, v] if bias is None else [q, k, v, bias]
        return self.build.op("Attention", inputs, found.anchor.name, attributes)

    def _multi_head(self, found: Attention) -> ir.Value:
        for ways in (found.k, found.v):
            _best(ways, found.heads)
        rows = self.biases.dead_rows(found)
        q = self._flat(found.q)
        k, v = self._keys_and_values(found)
        bias = self.biases.of(found, self._keyed(k), q)
        inputs: list[ir.Value | None] = [q, k, v]
        taken = self._take_biases(q, k, v)
        if taken is not None:
            inputs = list(taken)
        if bias is not None:
            inputs += [None] * (5 - len(inputs)) + [bias]
        attributes = self._attributes(found)
        value = self.build.op("MultiHeadAttention", inputs, found.anchor.name, attributes, CONTRIB)
        return self._without_dead(value, rows)

    def _packed(self, found: Attention) -> ir.Value | None:
        """Attention with the weights of Q, K and V in one matrix; None where it does not fit."""
        weights = self._packed_weights(found)
        if weights is None:
            return None
        rows = self.biases.dead_rows(found)
        x, weight, own = weights
        bias = self.biases.of(found, x, x)
        inputs: list[ir.Value | None] = [x, weight, own]
        if bias is not None:
            inputs += [None, None, bias]
        attributes = self._attributes(found)
        value = self.build.op("Attention", inputs, found.anchor.name, attributes, CONTRIB)
        return self._without_dead(value, rows)

    def _attributes(self, found: Attention) -> dict[str, Attribute]:
        return {"num_heads": found.heads, "scale": found.scale}

    def _without_dead(self, value: ir.Value, rows: ir.Value | None) -> ir.Value:
        """Return ``value`` with 0 where all keys of a query are masked."""
        if rows is None:
            return value
        return self.build.op("Where", [rows, self.build.number(0.0), value], value.name)

    def _shaped(self, found: Attention, value: ir.Value) -> ir.Value:
        """Return [B, S, H·size] in the shape of the value it stands for."""
        final = found.final
        rank = self.biases.probes.of(final)
        assert rank is not None
        width = rank[0][-1]
        if len(rank[0]) == 2:
            return self.build.op("Reshape", [value, self.build.ints(-1, width)], final.name)
        return value

    def _keys_and_values(self, found: Attention) -> tuple[ir.Value, ir.Value]:
        """Return K and V, both [B, T, H·size] or both [B, H, T, size]."""
        ways = (_best(found.k, found.heads), _best(found.v, found.heads))
        if any(w.layout == "bhsd" for w in ways):
            split = [_with(w, "bhsd") for w in (found.k, found.v)]
            if split[0] is not None and split[1] is not None:
                return split[0].value, split[1].value
        return self._flat((ways[0],)), self._flat((ways[1],))

    def _keyed(self, k: ir.Value) -> ir.Value:
        """Return a value whose axis 1 is the number of keys."""
        sizes = self.biases.probes.of(k)
        if sizes is None or len(sizes[0]) == 3:
            return k
        return self._cached(
            ("rows", k), lambda: self.build.op("Transpose", [k], k.name, {"perm": (0, 2, 1, 3)})
        )

    def _flat(self, ways: Sequence[Heads]) -> ir.Value:
        """Return an operand as [B, S, heads · size]."""
        way = ways[0]
        value, width = way.value, way.heads * way.size
        build = self.build
        match way.layout:
            case "flat":
                return value
            case "packed":
                return self._part(way, width)
            case "bshd":
                goal = build.ints(0, 0, width)
                return self._cached(
                    ("flat", value), lambda: build.op("Reshape", [value, goal], value.name)
                )
        turned = build.op("Transpose", [value], value.name, {"perm": (0, 2, 1, 3)})
        return build.op("Reshape", [turned, build.ints(0, 0, width)], value.name)

    def _part(self, way: Heads, width: int) -> ir.Value:
        """Return some columns of a tensor that holds more; all parts of one by a single Split."""
        value = way.value
        sizes = self.biases.probes.of(value)
        assert sizes is not None
        whole = sizes[0][2]
        if whole % width or way.offset % width:
            start, end, axis = (self.build.ints(i) for i in (way.offset, way.offset + width, 2))
            return self.build.op("Slice", [value, start, end, axis], value.name)
        count = whole // width
        key = ("part", value, width)
        if key not in self._made:
            inputs: list[ir.Value | None] = [value]
            attributes: dict[str, Attribute] = {"axis": 2}
            if self.build.opset >= 13:
                inputs.append(self.build.ints(*[width] * count))
            else:
                attributes["split"] = [width] * count
            self._made[key] = self.build.op("Split", inputs, value.name, attributes, outputs=count)
        split = self._made[key].producer()
        assert split is not None
        return split.outputs[way.offset // width]

    def _cached(self, key: tuple[object, ...], make: object) -> ir.Value:
        if key not in self._made:
            assert callable(make)
            self._made[key] = make()
        return self._made[key]

    def _take_biases(self, q: ir.Value, k: ir.Value, v: ir.Value) -> list[ir.Value] | None:
        """Return Q, K, V before their biases, and the biases as one vector, where that saves Adds."""
        layers = [projection(value) for value in (q, k, v)]
        if any(p is None for p in layers) or not any(
            p is not None and p.bias is not None for p in layers
        ):
            return None
        found = [p for p in layers if p is not None]
        if any(p.bias is not None and shared(p.bias) for p in found):
            return None
        products = []
        for value, layer in zip((q, k, v), found, strict=True):
            node = value.producer()
            assert node is not None
            product = node
            if layer.bias is not None:
                product = some(_product(node), f"{label(node)} has no product")
                if len(_users(value)) > 1:
                    return None
            products.append(product.outputs[0])
        vector = np.concatenate([_vector(p) for p in found])
        return [*products, self.build.constant(vector, f"{q.name}_biases")]

    def _packed_weights(
        self, found: Attention
    ) -> tuple[ir.Value, ir.Value, ir.Value | None] | None:
        """Return (x, weight [C, 3N], bias [3N]) where one input makes Q, K and V."""
        ways = (found.q[0], found.k[0], found.v[0])
        width = found.heads * ways[0].size
        if any(w.heads != found.heads or w.size != ways[0].size for w in ways):
            return None
        probes = self.biases.probes
        if all(w.layout == "packed" and w.value is ways[0].value for w in ways):
            layer = whole_projection(ways[0].value, probes)
            in_order = [w.offset for w in ways] == [0, width, 2 * width]
            if layer is None or not in_order or layer.weight.shape is None:
                return None
            if layer.weight.shape[1] != 3 * width:
                return None
            return layer.x, layer.weight, None if layer.bias is None else self._as_vector(layer)
        fits = all(w.layout in ("flat", "bshd") for w in ways)
        layers = [whole_projection(w.value, probes) if fits else None for w in ways]
        known = [p for p in layers if p is not None]
        if len(known) < 3 or len({p.x for p in known}) > 1 or any(shared(p.weight) for p in known):
            return None
        arrays = [constant(p.weight) for p in known]
        weight = np.concatenate([a for a in arrays if a is not None], axis=1)
        bias = None
        if any(p.bias is not None for p in known):
            bias = self.build.constant(
                np.concatenate([_vector(p) for p in known]), f"{found.anchor.name}_bias"
            )
        return known[0].x, self.build.constant(weight, f"{found.anchor.name}_weight"), bias

    def _as_vector(self, layer: Projection) -> ir.Value:
        assert layer.bias is not None
        array = constant(layer.bias)
        assert array is not None
        return (
            layer.bias
            if array.ndim == 1
            else self.build.constant(array.ravel(), f"{layer.bias.name}_flat")
        )


def whole_projection(value: ir.Value, probes: Probes) -> Projection | None:
    """Return the layer that makes ``value`` [B, S, ...], also where it works on [B·S, C] in between."""
    found = projection(value)
    node = value.producer()
    if found is not None or node is None or not is_op(node, "Reshape"):
        return found
    inner = node.inputs[0]
    flat = projection(inner) or _gemm(inner) if inner is not None and _lone(inner) else None
    before = flat.x.producer() if flat is not None else None
    if flat is None or before is None or not is_op(before, "Reshape") or before.inputs[0] is None:
        return None
    x = before.inputs[0]
    own, made, rows = probes.of(x), probes.of(value), probes.of(flat.x)
    if own is None or made is None or rows is None:
        return None
    same = all(
        len(a) == 3 and a[:2] == b[:2] and c == (a[0] * a[1], a[2])
        for a, b, c in zip(own, made, rows, strict=True)
    )
    return replace(flat, x=x) if same else None


def _gemm(value: ir.Value) -> Projection | None:
    """Return the layer that is a plain Gemm with a constant matrix."""
    node = value.producer()
    if node is None or not is_op(node, "Gemm") or len(node.inputs) < 2:
        return None
    plain = [float_attr(node, "alpha", 1.0), float_attr(node, "beta", 1.0)] == [1.0, 1.0]
    if not plain or int_attr(node, "transA", 0) or int_attr(node, "transB", 0):
        return None
    x, weight = node.inputs[:2]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return _constant_layer(x, weight, bias)


def projection(value: ir.Value) -> Projection | None:
    """Return the layer that makes ``value``, MatMul with or without Add; None for anything else."""
    node = value.producer()
    bias: ir.Value | None = None
    if is_op(node, "Add"):
        assert node is not None
        product = _product(node)
        if (
            product is None
            or len(_users(product.outputs[0])) > 1
            or product.outputs[0].is_graph_output()
        ):
            return None
        bias = next(v for v in node.inputs if v is not product.outputs[0])
        node = product
    if node is None or not is_op(node, "MatMul"):
        return None
    x, weight = node.inputs
    return _constant_layer(x, weight, bias)


def _constant_layer(
    x: ir.Value | None, weight: ir.Value | None, bias: ir.Value | None
) -> Projection | None:
    array = constant(weight)
    if x is None or weight is None or array is None or array.ndim != 2 or array.dtype != np.float32:
        return None
    if bias is not None:
        own = constant(bias)
        if own is None or own.size != array.shape[1] or own.shape[-1:] != (array.shape[1],):
            return None
    return Projection(x, weight, bias)


def _product(node: ir.Node) -> ir.Node | None:
    """Return the MatMul with a constant matrix that an Add adds a constant to."""
    for value, other in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        made = value.producer() if value is not None else None
        if made is not None and is_op(made, "MatMul") and constant(other) is not None:
            return made
    return None


def _lone(value: ir.Value) -> bool:
    """Whether one node reads ``value`` and it is no output."""
    return len(_users(value)) == 1 and not value.is_graph_output()


def _users(value: ir.Value) -> list[ir.Node]:
    return list(dict.fromkeys(u.node for u in value.uses()))


def _vector(layer: Projection) -> Array:
    weight = constant(layer.weight)
    assert weight is not None
    own = constant(layer.bias) if layer.bias is not None else None
    return np.zeros(weight.shape[1], weight.dtype) if own is None else own.ravel()


def _best(ways: Sequence[Heads], heads: int) -> Heads:
    """Return the first way that has as many heads as there are queries' heads."""
    for way in ways:
        if way.heads == heads:
            return way
    raise Mismatch(f"'{ways[0].value.name}' has {ways[0].heads} heads for {heads} of the queries")


def _with(ways: Sequence[Heads], layout: str) -> Heads | None:
    return next((w for w in ways if w.layout == layout), None)
