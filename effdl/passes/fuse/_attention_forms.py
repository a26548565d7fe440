"""Writes an attention as one node: Attention or MultiHeadAttention of com.microsoft, or the standard one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from effdl.graph.insert import Attribute, Builder
from effdl.graph.match import attempt, label, need, some
from effdl.graph.weights import constant, shared
from effdl.passes.fuse._attention_bias import Biases, zero_when_masked
from effdl.passes.fuse._attention_heads import Heads
from effdl.passes.fuse._attention_match import LOWEST, Attention, closed_from
from effdl.passes.fuse._attention_projection import Projection, lone, projection, whole_projection

CONTRIB = "com.microsoft"


@dataclass
class Writer:
    """Replaces attentions of one graph.

    Args:
        build: adds nodes.
        biases: makes what is added to the scores.
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
        need(self.build.opset >= 23, "the standard Attention came with opset 23")
        need(found.dead != LOWEST, f"{label(found.anchor)} is the standard operator already")
        need(
            zero_when_masked(found),
            "rows that are masked altogether give something, in the standard operator they give 0",
        )
        counts = [{w.heads for w in operand} for operand in (found.k, found.v)]
        heads = min(counts[0] & counts[1], default=found.heads)  # one head of K for several of Q
        ways = (_best(found.q, found.heads), _best(found.k, heads), _best(found.v, heads))
        q, k, v = (self._flat((w,)) for w in ways)
        bias = self.biases.of(found, k, q)
        attributes: dict[str, Attribute] = {
            "q_num_heads": found.heads,
            "kv_num_heads": heads,
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
        inputs: list[ir.Value | None] = [q, k, v]
        taken = self._take_biases(q, k, v)
        if taken is not None:
            inputs, (q, k) = list(taken), taken[:2]
        bias = self.biases.of(found, k, q)
        if bias is not None:
            inputs += [None] * (5 - len(inputs)) + [bias]
        attributes = self._attributes(found)
        value = self.build.op("MultiHeadAttention", inputs, found.anchor.name, attributes, CONTRIB)
        return self._without_dead(value, rows)

    def _packed(self, found: Attention) -> ir.Value | None:
        """Attention with the weights of Q, K and V in one matrix; None where it does not fit."""
        layers = self._layers(found)
        if not layers:
            return None
        rows = self.biases.dead_rows(found)
        x, name = layers[0].x, found.anchor.name
        weight = layers[0].weight
        if len(layers) > 1:
            arrays = [a for p in layers if (a := constant(p.weight)) is not None]
            weight = self.build.constant(np.concatenate(arrays, axis=1), f"{name}_weight")
        # zeros where there is none: ONNX Runtime before 1.32 crashes without them on the CPU
        own = self.build.constant(np.concatenate([p.vector() for p in layers]), f"{name}_bias")
        bias = self.biases.of(found, x, x)
        inputs: list[ir.Value | None] = [x, weight, own]
        if bias is not None:
            inputs += [None, None, bias]
        attributes = self._attributes(found)
        value = self.build.op("Attention", inputs, name, attributes, CONTRIB)
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
        sizes = self._sizes(final)
        width = sizes[-1]
        if len(sizes) == 2:
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
        whole = self._sizes(value)[2]
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
        found = [p for p in (projection(value) for value in (q, k, v)) if p is not None]
        biased = [value for value, p in zip((q, k, v), found, strict=False) if p.bias is not None]
        if len(found) < 3 or not biased or not all(lone(value) for value in biased):
            return None
        if any(p.bias is not None and shared(p.bias) for p in found):
            return None
        if any(len(self._sizes(value)) != 3 for value in (q, k, v)):
            return None
        vector = np.concatenate([p.vector() for p in found])
        products = [p.product.outputs[0] for p in found]
        return [*products, self.build.constant(vector, f"{q.name}_biases")]

    def _layers(self, found: Attention) -> list[Projection]:
        """Return the one layer or the three that make Q, K and V of one input, else nothing."""
        packed = [w for ways in (found.q, found.k, found.v) if (w := _with(ways, "packed"))]
        ways = packed if len(packed) == 3 else [found.q[0], found.k[0], found.v[0]]
        width = found.heads * ways[0].size
        if any(w.heads != found.heads or w.size != ways[0].size for w in ways):
            return []
        probes = self.biases.probes
        if all(w.layout == "packed" and w.value is ways[0].value for w in ways):
            in_order = [w.offset for w in ways] == [0, width, 2 * width]
            layer = whole_projection(ways[0].value, probes) if in_order else None
            layers, wide = [layer], 3 * width
        else:
            fits = all(w.layout in ("flat", "bshd") for w in ways)
            layers, wide = (
                [whole_projection(w.value, probes) if fits else None for w in ways],
                width,
            )
        known = [p for p in layers if p is not None]
        if len(known) < len(layers) or len({p.x for p in known}) > 1:
            return []
        whole = all(p.columns == wide for p in known) and len(self._sizes(known[0].x)) == 3
        if not whole or (len(known) > 1 and any(shared(p.weight) for p in known)):
            return []
        # What reads Q, K or V as well would need the product a second time.
        alone = all(attempt(closed_from, w.value, found.final) is None for w in ways)
        return known if alone else []

    def _sizes(self, value: ir.Value) -> tuple[int, ...]:
        """Return the shape of ``value`` at the first probe."""
        sizes = self.biases.probes.of(value)
        assert sizes is not None
        return sizes[0]


def _best(ways: Sequence[Heads], heads: int) -> Heads:
    """Return the first way that has so many heads."""
    way = next((w for w in ways if w.heads == heads), None)
    return some(way, f"'{ways[0].value.name}' has {ways[0].heads} heads where {heads} are needed")


def _with(ways: Sequence[Heads], layout: str) -> Heads | None:
    return next((w for w in ways if w.layout == layout), None)
