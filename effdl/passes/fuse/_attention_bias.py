"""Makes the bias that an attention node adds to its scores out of the terms an exporter added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from effdl.graph.insert import Builder
from effdl.graph.match import Mismatch, need, some
from effdl.graph.probes import Probes, Sizes
from effdl.graph.walk import is_op
from effdl.graph.weights import constant, scalar
from effdl.passes.fuse._attention_match import HUGE, LOWEST, Attention, Term, as_float32

_LOOK_BACK = 12
_MOVES = ("Reshape", "Unsqueeze", "Squeeze", "Transpose", "Expand", "Slice", "Gather", "Identity")


@dataclass(frozen=True)
class Way:
    """How a term gets the shape [B or 1, H or 1, S or 1, T or 1].

    Args:
        term: the term.
        sizes: its own shape, padded in front to the rank of the scores it is added to.
        kind: ``four`` it is so already, ``rows`` [B·H, S, T], ``shared`` [1, S, T] or [1, 1, H, S, T],
            ``windows`` [1, w, H, S, T] in a batch of b·w windows.
    """

    term: Term
    sizes: Sizes
    kind: str


def ways(found: Attention, probes: Probes) -> tuple[Way, ...]:
    """Return how each term of the bias is brought into shape.

    Raises:
        Mismatch: a term lies across batch and heads in a way that no attention node takes.
    """
    return tuple(_way(term, found, probes) for term in found.terms)


def _way(term: Term, found: Attention, probes: Probes) -> Way:
    name = f"the bias '{term.value.name}'"
    own = some(probes.of(term.value), f"the shape of {name} is unknown")
    rank = len(term.at[0])
    sizes = tuple((1,) * (rank - len(s)) + s for s in own)
    whole = list(zip(found.batch, found.queries, found.keys, strict=True))
    heads = found.heads
    match rank:
        case 4 if term.at == tuple((b, heads, s, t) for b, s, t in whole):
            return Way(term, sizes, "four")
        case 3 if term.at == tuple((b * heads, s, t) for b, s, t in whole):
            return Way(term, sizes, "shared" if all(s[0] == 1 for s in sizes) else "rows")
        case 5 if all(
            a[0] * a[1] == b and a[2:] == (heads, s, t)
            for a, (b, s, t) in zip(term.at, whole, strict=True)
        ):
            if all(s[:2] == (1, 1) for s in sizes):
                return Way(term, sizes, "shared")
            windows = {s[1] for s in term.at}
            need(
                all(s[0] == 1 for s in sizes) and len(windows) == 1,
                f"{name} differs from sample to sample and from window to window",
            )
            return Way(term, sizes, "windows")
    shape = list(term.at[0])
    raise Mismatch(f"{name} is added to scores of shape {shape}, not of [batch, heads, S, T]")


@dataclass
class Biases:
    """Makes biases, once for all attentions that share one.

    Args:
        builder: adds nodes to the graph.
        probes: shapes.
    """

    builder: Builder
    probes: Probes
    _made: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)

    def of(self, found: Attention, k: ir.Value, q: ir.Value) -> ir.Value | None:
        """Return the bias of ``found`` as [B or 1, H or 1, S, T], None when it has none.

        Args:
            found: the attention.
            k, q: what T and S are read from, [B, T, H·size] or [B, H, T, size].
        """
        if not found.terms:
            return None
        value, sizes = self._sum(ways(found, self.probes), found)
        goal = [(s, t) for s, t in zip(found.queries, found.keys, strict=True)]
        if [s[2:] for s in sizes] == goal:
            return value
        key = ("expand", value, found.queries, found.keys)
        if key not in self._made:
            one = self.builder.ints(1)
            shape = self.builder.concat(
                [one, one, self._size(q, found.queries), self._size(k, found.keys)]
            )
            self._made[key] = self.builder.op("Expand", [value, shape], value.name)
        return self._made[key]

    def _sum(self, parts: Sequence[Way], found: Attention) -> tuple[ir.Value, Sizes]:
        """Return the sum of terms and its shape at each probe.

        A mask chosen by Where hides what is further in: two of the lowest number would be -inf.
        """
        total, sizes = self._term(parts[-1], found)
        for way in reversed(parts[:-1]):
            value, own = self._term(way, found, as_mask=True)
            key = ("sum", total, value, way.term.number, way.term.masked)
            if key not in self._made:
                self._made[key] = self._added(way.term, total, value)
            total = self._made[key]
            sizes = tuple(np.broadcast_shapes(a, b) for a, b in zip(sizes, own, strict=True))
        return total, sizes

    def _added(self, term: Term, total: ir.Value, value: ir.Value) -> ir.Value:
        if term.number is None:
            return self.builder.op("Add", [total, value], value.name)
        return self._chosen(term, value, total)

    def _chosen(self, term: Term, mask: ir.Value, total: ir.Value) -> ir.Value:
        """Return ``total`` with the number of ``term`` where its mask says so."""
        assert term.number is not None
        low = self.builder.number(term.number)
        pair = [low, total] if term.masked else [total, low]
        return self.builder.op("Where", [mask, *pair], mask.name)

    def dead_rows(self, found: Attention) -> ir.Value | None:
        """Return a mask [B or 1, S or 1, 1] of the queries that give 0 since all keys are masked.

        None when there can be none.
        """
        if found.dead is None:
            return None
        low = _low_terms(found.terms, found.dead)
        if not low:
            return None
        found_ways = [_way(term, found, self.probes) for term in low]
        for_all = all(s[1] == 1 for way in found_ways for s in _four(way, found))
        need(for_all, "rows may be masked altogether, for each head in its own way")
        value, _ = self._sum(found_ways, found)
        key = ("dead", value, found.dead)
        if key not in self._made:
            build = self.builder
            best = build.reduce("ReduceMax", value, -1)
            if np.isinf(found.dead):
                gone = build.op("IsInf", [best], value.name, {"detect_positive": 0})
            else:
                gone = build.op("LessOrEqual", [best, build.number(found.dead)], value.name)
            self._made[key] = build.squeeze(gone, 1)
        return self._made[key]

    def _size(self, value: ir.Value, known: tuple[int, ...]) -> ir.Value:
        """Return how many rows ``value``, [B, rows, ...] or [B, H, rows, size], has, as a tensor [1]."""
        if len(set(known)) == 1:
            return self.builder.ints(known[0])
        key = ("size", value)
        if key not in self._made:
            sizes = self.probes.of(value)  # unknown where it was made here, [B, T, H·size]
            split = sizes is not None and len(sizes[0]) == 4
            self._made[key] = self.builder.size(value, 2 if split else 1)
        return self._made[key]

    def _term(self, way: Way, found: Attention, *, as_mask: bool = False) -> tuple[ir.Value, Sizes]:
        """Return a term in shape, as numbers or (a mask ``as_mask``) as it is, and its sizes."""
        term = way.term
        number = None if as_mask else term.number
        # Two towers may have batches of their own.
        own = (found.batch, found.heads) if way.kind in ("rows", "windows") else None
        key = ("term", term.value, number, term.masked, term.times, way.kind, own)
        if key not in self._made:
            value = term.value
            if number is not None:
                value = self._chosen(term, value, self.builder.number(0.0))
            elif term.times != 1.0:
                value = self.builder.op("Mul", [value, self.builder.number(term.times)], value.name)
            self._made[key] = self._in_shape(way, value, found)
        return self._made[key], _four(way, found)

    def _in_shape(self, way: Way, value: ir.Value, found: Attention) -> ir.Value:
        """Return ``value``, which has the shape of the term, as [B or 1, H or 1, S or 1, T or 1]."""
        build, name = self.builder, way.term.value.name
        own = self.probes.of(way.term.value)
        assert own is not None
        rank = len(way.sizes[0])
        missing = rank - len(own[0])
        if way.kind == "four" or (way.kind == "shared" and rank == 3):
            missing = 4 - len(own[0])
            return build.unsqueeze(value, range(missing)) if missing else value
        if way.kind == "shared":  # [1, 1, H, S, T]
            return (
                build.squeeze(value, 0)
                if missing == 0
                else (build.unsqueeze(value, range(missing - 1)) if missing > 1 else value)
            )
        value = build.unsqueeze(value, range(missing)) if missing else value
        last = [self._axis(value, way.sizes, a) for a in (-2, -1)]
        if way.kind == "rows":
            shape = build.concat([build.ints(-1), build.ints(found.heads), *last])
            return build.op("Reshape", [value, shape], name)
        batch = build.op(
            "Div", [build.size(found.q[0].value, 0), build.ints(way.term.at[0][1])], name
        )
        spread = build.concat([batch, *[build.ints(1)] * 4])
        wide = build.op("Expand", [value, spread], name)
        heads = way.sizes[0][2]
        shape = build.concat([build.ints(-1), build.ints(heads), *last])
        return build.op("Reshape", [wide, shape], name)

    def _axis(self, value: ir.Value, sizes: Sizes, axis: int) -> ir.Value:
        """Return the length of one axis as a tensor [1], a constant where it is one."""
        lengths = {s[axis] for s in sizes}
        if len(lengths) == 1:
            return self.builder.ints(next(iter(lengths)))
        return self.builder.size(value, len(sizes[0]) + axis)


def _four(way: Way, found: Attention) -> Sizes:
    """Return the shape of a term once it is [B or 1, H or 1, S or 1, T or 1]."""
    match way.kind, len(way.sizes[0]):
        case ("four", _):
            return way.sizes
        case ("shared", 3):
            return tuple((1, *s) for s in way.sizes)
        case ("shared", _):
            return tuple(s[1:] for s in way.sizes)
        case ("rows", _):
            pairs = zip(found.batch, way.sizes, strict=True)
            return tuple((b, found.heads, *s[1:]) for b, s in pairs)
    pairs = zip(found.batch, way.sizes, strict=True)
    return tuple((b, *s[2:]) for b, s in pairs)


def zero_when_masked(found: Attention) -> bool:
    """Whether a query gives 0 as soon as the bias of all its keys is LOWEST or less, or none can be."""
    low = _low_terms(found.terms, LOWEST)
    return not low or (found.dead == -np.inf and all(t.number == -np.inf for t in low))


def _lowest_of(term: Term) -> float:
    """Return a bound below what a term may hold, -inf where nothing is known of it."""
    if term.number is not None:
        return term.number
    return as_float32(_lowest(term.value, _LOOK_BACK) * term.times)


def _low_terms(terms: Sequence[Term], limit: float) -> list[Term]:
    """Return the parts of a bias that can make it as low as ``limit``, none where it cannot be."""
    low: list[Term] = []
    rest = 0.0
    for term in terms:
        parts = _low_parts(term, limit)
        low += parts
        rest += 0.0 if parts else min(_lowest_of(term), 0.0)
    return low if as_float32(rest) > limit else list(terms)


def _low_parts(term: Term, limit: float) -> list[Term]:
    """Return the summands of a term that may be as low as ``limit``; the others do not matter then."""
    if _lowest_of(term) > limit:
        return []
    node = term.value.producer()
    if term.number is not None or term.times != 1.0 or node is None:
        return [term]
    if is_op(node, "Where"):
        mask, yes, no = node.inputs
        for other, low, masked in ((yes, no, False), (no, yes, True)):
            number = scalar(low)
            chosen = number is not None and number <= limit < _lowest(other, _LOOK_BACK)
            if chosen and mask is not None:
                return [Term(mask, term.at, number=number, masked=masked)]
    if not is_op(node, "Add"):
        return [term]
    return _low_terms([Term(v, term.at) for v in node.inputs if v is not None], limit)


def _lowest(value: ir.Value | None, depth: int) -> float:
    """Follow a mask to the constants it is chosen from; anything computed may be anything."""
    array = constant(value)
    if value is None or (array is not None and array.dtype.kind not in "fiub"):
        return -np.inf
    if array is not None:
        return as_float32(float(array.min())) if array.size else 0.0
    if value.dtype is not None and not value.dtype.is_floating_point():
        return -HUGE  # integers and booleans, as numbers
    node = value.producer()
    if node is None or depth == 0:
        return -np.inf
    if is_op(node, "Where"):
        return min(_lowest(v, depth - 1) for v in node.inputs[1:])
    if is_op(node, "Concat"):
        return min(_lowest(v, depth - 1) for v in node.inputs)
    if is_op(node, "Cast", *_MOVES):
        return _lowest(node.inputs[0], depth - 1)
    if is_op(node, "Add"):
        return as_float32(sum(min(_lowest(v, depth - 1), 0.0) for v in node.inputs))
    if is_op(node, "Mul", "Sub"):
        # A few factors and terms of moderate size do not reach the end of the range.
        return -HUGE if _magnitude(value, depth) < HUGE else -np.inf
    return -np.inf


def _magnitude(value: ir.Value | None, depth: int) -> float:
    """Return how large the numbers of a mask can be, inf where nothing is known."""
    array = constant(value)
    if array is not None:
        return float(np.abs(array).max()) if array.size and array.dtype.kind in "fiub" else np.inf
    node = value.producer() if value is not None else None
    if node is None or depth == 0:
        return np.inf
    if is_op(node, "Cast"):
        kind = node.inputs[0].dtype if node.inputs[0] is not None else None
        if kind is not None and not kind.is_floating_point():
            return 1.0 if kind == ir.DataType.BOOL else 2.0**63
    if is_op(node, "Cast", *_MOVES):
        return _magnitude(node.inputs[0], depth - 1)
    sizes = [_magnitude(v, depth - 1) for v in node.inputs]
    if is_op(node, "Mul"):
        return float(np.prod(sizes))
    return sum(sizes) if is_op(node, "Add", "Sub") else np.inf
