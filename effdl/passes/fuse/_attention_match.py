"""Finds softmax(scale · Q K^T + bias) V in a graph, whatever way the heads are split and merged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effdl.graph.match import Mismatch, label, need, some
from effdl.graph.movement import Origin, Positions, factor, move, origins, positions
from effdl.graph.probes import Probes, Sizes
from effdl.graph.walk import float_attr, int_attr, is_op
from effdl.graph.weights import scalar

HUGE = 1e30
"""A number below -HUGE swallows any score it is added to: masking by Add and by Where are the same."""
LOWEST = float(np.finfo(np.float32).min)
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
_FORWARD = (*_VIEWS, "Transpose")
_MOST = 60


@dataclass(frozen=True)
class Heads:
    """Where Q, K or V comes from.

    Args:
        value: the tensor.
        layout: ``flat`` [B, S, heads · size]; ``packed``: columns from ``offset`` of [B, S, more];
            ``bshd`` [B, S, heads, size]; ``bhsd`` [B, heads, S, size].
        heads, size: how many heads there are and how wide.
        scale: what the exporter multiplied it with on the way.
        offset: the first column, for ``packed``.
    """

    value: ir.Value
    layout: str
    heads: int
    size: int
    scale: float
    offset: int = 0


@dataclass(frozen=True)
class Term:
    """A part of the bias: ``times · value``, or ``number`` where the mask ``value`` is ``masked``.

    Args:
        value: numbers to add, or a boolean mask.
        at: the shape of the scores where it is added.
        times: factor, 1 for a mask.
        number: for a mask, what stands in place of the score: -HUGE or less.
        masked: for a mask, which of its values takes the score away.
    """

    value: ir.Value
    at: Sizes
    times: float = 1.0
    number: float | None = None
    masked: bool = False


@dataclass(frozen=True)
class Attention:
    """One attention of a graph.

    Args:
        anchor: the node it was found by.
        q, k, v: the operands, one or several ways to take each (best first).
        scale: of the scores, that of the operands included.
        terms: of the bias, innermost last.
        dead: a query gives 0 when the bias of all its keys is as low as this: -inf behind a guard
            against NaN, LOWEST in the kernel of the standard operator; None for no such rule.
        context: the output of the product with V, [B, H, S, size] in this order of elements.
        final: the output that takes the place of it all, [B, S, H·size] or [B·S, H·size].
        batch, heads, queries, keys: sizes at each probe.
    """

    anchor: ir.Node
    q: tuple[Heads, ...]
    k: tuple[Heads, ...]
    v: tuple[Heads, ...]
    scale: float
    terms: tuple[Term, ...]
    dead: float | None
    context: ir.Value
    final: ir.Value
    batch: tuple[int, ...]
    heads: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]


def is_candidate(node: ir.Node) -> bool:
    """Whether ``node`` is a Softmax that weighs the rows of something, or ONNX's own Attention."""
    if is_op(node, "Attention"):
        return True
    if not is_op(node, "Softmax"):
        return False
    value, seen = node.outputs[0], 0
    while seen < 6:
        users = _readers(value)
        if any(is_op(u, "MatMul") and u.inputs[0] is value for u in users):
            return True
        onward = [u for u in users if is_op(u, *_VIEWS, "Where", "Dropout", "Cast")]
        if not onward:
            return False
        value, seen = onward[0].outputs[0], seen + 1
    return False


def match_attention(softmax: ir.Node, probes: Probes) -> Attention:
    """Read the attention around ``softmax``.

    Raises:
        Mismatch: the first condition that does not hold, with the node's name.
    """
    sizes = some(
        probes.of(softmax.inputs[0]), f"the shape of the scores of {label(softmax)} is unknown"
    )
    rank = len(sizes[0])
    axis = int_attr(softmax, "axis", -1)
    need(axis in (-1, rank - 1), f"{label(softmax)} is not over the last axis")
    product, scale, terms = _scores(softmax, probes)
    guarded, weighing = _weighing(softmax)
    left, right = product.inputs[0], product.inputs[1]
    values = weighing.inputs[1]
    assert left is not None
    assert right is not None
    assert values is not None
    a = some(probes.of(left), f"the shape of '{left.name}' is unknown")
    b = some(probes.of(right), f"the shape of '{right.name}' is unknown")
    need(
        all(len(x) >= 3 and x[:-2] == y[:-2] for x, y in zip(a, b, strict=True)),
        f"the operands of {label(product)} have different batches {list(a[0])} and {list(b[0])}",
    )
    queries, keys = tuple(s[-2] for s in a), tuple(s[-1] for s in b)
    q = _heads(left, probes, transposed=False, heads=None)
    heads = q[0].heads
    k = _heads(right, probes, transposed=True, heads=heads)
    v = _heads(values, probes, transposed=False, heads=heads)
    context = weighing.outputs[0]
    lead = tuple(int(np.prod(s[:-2])) // heads for s in a)
    final = _merged(context, probes, heads, lead, queries, v[0].size)
    _closed(product, final)
    return Attention(
        softmax,
        q,
        k,
        v,
        scale * q[0].scale * k[0].scale,
        tuple(terms),
        -np.inf if guarded else None,
        context,
        final,
        lead,
        heads,
        queries,
        keys,
    )


def match_standard(node: ir.Node, probes: Probes) -> Attention:
    """Read ONNX's own Attention (opset 23), whose other forms are often faster.

    Raises:
        Mismatch: it does more than the others can.
    """
    inputs = [*node.inputs, *[None] * 4][:4]
    need(all(v is None for v in node.inputs[4:]), f"{label(node)} takes past keys and values")
    more = [o for o in node.outputs[1:] if o.uses() or o.is_graph_output()]
    need(not more, f"{label(node)} gives more than the context")
    need(int_attr(node, "is_causal", 0) == 0, f"{label(node)} masks what comes later by itself")
    need(float_attr(node, "softcap", 0.0) == 0, f"{label(node)} caps the scores")
    precision = node.attributes.get("softmax_precision")
    need(
        precision is None or precision.as_int() in (0, int(ir.DataType.FLOAT)),
        f"{label(node)} asks for another precision",
    )
    values = [some(v, f"{label(node)} lacks an operand") for v in inputs[:3]]
    sizes = [some(probes.of(v), f"the shape of '{v.name}' is unknown") for v in values]
    ranks = {len(s[0]) for s in sizes}
    need(ranks in ({3}, {4}), f"the operands of {label(node)} have different ranks")
    if ranks == {3}:
        counts = [int_attr(node, f"{n}_num_heads", 0) for n in ("q", "kv", "kv")]
        need(all(counts), f"{label(node)} does not say how many heads there are")
        ways: list[tuple[Heads, ...]] = [
            (Heads(value, "flat", count, s[0][2] // count, 1.0),)
            for value, count, s in zip(values, counts, sizes, strict=True)
        ]
    else:
        count = sizes[0][0][1]
        ways = [_heads(x, probes, transposed=False, heads=count) for x in values]
    q, k, v = ways
    lead = tuple(s[0] for s in sizes[0])
    heads, size = q[0].heads, q[0].size
    queries, keys = (tuple(s[-2] for s in part) for part in sizes[:2])
    context = node.outputs[0]
    final = context
    if ranks == {4}:
        final = _merged(context, probes, heads, lead, queries, v[0].size)
        _closed(node, final)
    terms: tuple[Term, ...] = ()
    mask = inputs[3]
    if mask is not None:
        at = tuple((b, heads, s, t) for b, s, t in zip(lead, queries, keys, strict=True))
        own = some(probes.of(mask), f"the shape of '{mask.name}' is unknown")
        fits = all(np.broadcast_shapes(m, a) == a for m, a in zip(own, at, strict=True))
        need(fits, f"the mask of {label(node)} is shorter than the keys")
        boolean = {s.dtype(mask) for s in probes.shapes} == {ir.DataType.BOOL}
        terms = (Term(mask, at, number=-np.inf) if boolean else Term(mask, at),)
    own_scale = float_attr(node, "scale", 0.0) or size**-0.5
    scale = own_scale * q[0].scale * k[0].scale
    return Attention(
        node, q, k, v, scale, terms, LOWEST, context, final, lead, heads, queries, keys
    )


def _scores(softmax: ir.Node, probes: Probes) -> tuple[ir.Node, float, list[Term]]:
    """Go back from the softmax to the product of Q and K; return it, the factor and the bias."""
    value = some(softmax.inputs[0], f"{label(softmax)} has no input")
    times, terms = 1.0, list[Term]()
    for _ in range(_MOST):
        node = some(value.producer(), f"'{value.name}' is an input, no product of queries and keys")
        sizes = some(probes.of(value), f"the shape of '{value.name}' is unknown")
        number = factor(node, probes)
        if number is not None:
            value, by = number
            times *= by
        elif is_op(node, "MatMul"):
            return node, times, terms
        elif is_op(node, "Add"):
            value, other = _sides(node)
            same = probes.of(value) == sizes
            need(same, f"{label(node)} makes the scores larger")
            terms.append(Term(other, sizes, times))
        elif is_op(node, "Where"):
            value, term = _masked(node, sizes)
            need(probes.of(value) == sizes, f"{label(node)} makes the scores larger")
            terms.append(term)
        elif is_op(node, *_VIEWS):
            value = some(node.inputs[0], f"{label(node)} has no input")
        else:
            raise Mismatch(f"the scores come from {label(node)}, no product of queries and keys")
    raise Mismatch(f"no product of queries and keys within {_MOST} nodes before {label(softmax)}")


def _sides(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Return (scores, bias) of an Add."""
    a, b = node.inputs[0], node.inputs[1]
    assert a is not None
    assert b is not None
    first, second = _leads_to_product(a), _leads_to_product(b)
    need(first or second, f"no operand of {label(node)} is a product of queries and keys")
    need(not (first and second), f"{label(node)} adds two products of computed values")
    return (a, b) if first else (b, a)


def _leads_to_product(value: ir.Value) -> bool:
    """Whether ``value`` is a product of two computed values, up to factors, biases and views."""
    level = [value]
    for _ in range(8):
        below = []
        for v in level:
            node = v.producer()
            if node is None:
                continue
            if is_op(node, "MatMul"):
                if all(i is not None and i.producer() is not None for i in node.inputs):
                    return True
            elif is_op(node, "Mul", "Div", "Add", "Where", *_VIEWS):
                below += [i for i in node.inputs if i is not None]
        level = below
    return False


def _masked(node: ir.Node, sizes: Sizes) -> tuple[ir.Value, Term]:
    """Return (scores, mask) of a Where that puts a huge negative number in place of scores."""
    condition, yes, no = node.inputs
    assert condition is not None
    for scores, other, masked in ((yes, no, False), (no, yes, True)):
        number = scalar(other)
        if scores is None or number is None:
            continue
        need(
            number <= -HUGE,
            f"{label(node)} masks with {number:g}, which is not so low that adding it is the same",
        )
        return scores, Term(condition, sizes, number=number, masked=masked)
    raise Mismatch(f"{label(node)} does not choose between the scores and a number")


def _readers(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read the elements of ``value``, not only its shape."""
    nodes = dict.fromkeys(u.node for u in value.uses())
    return [n for n in nodes if not is_op(n, "Shape", "Size")]


def _weighing(softmax: ir.Node) -> tuple[bool, ir.Node]:
    """Return whether NaN becomes 0 after the softmax, and the product with V."""
    value, guarded = softmax.outputs[0], False
    for _ in range(8):
        need(not value.is_graph_output(), f"the weights '{value.name}' are a graph output")
        users = _readers(value)
        test = next((u for u in users if is_op(u, "IsNaN")), None)
        if len(users) == 2 and test is not None:
            choice = next(u for u in users if u is not test)
            need(_is_guard(choice, test, value), f"{label(choice)} reads the weights too")
            guarded, value = True, choice.outputs[0]
            continue
        need(len(users) == 1, f"'{value.name}' has {len(users)} users, the pattern has one")
        user = users[0]
        if is_op(user, "MatMul"):
            need(user.inputs[0] is value, f"{label(user)} takes the weights on the right")
            return guarded, user
        need(is_op(user, *_VIEWS), f"the weights go to {label(user)}, not to a product with values")
        value = user.outputs[0]
    raise Mismatch(f"no product with values after {label(softmax)}")


def _is_guard(choice: ir.Node, test: ir.Node, value: ir.Value) -> bool:
    """Whether ``choice`` is Where(IsNaN(value), 0, value)."""
    return (
        is_op(choice, "Where")
        and choice.inputs[0] is test.outputs[0]
        and scalar(choice.inputs[1]) == 0
        and choice.inputs[2] is value
    )


def _heads(
    value: ir.Value, probes: Probes, *, transposed: bool, heads: int | None
) -> tuple[Heads, ...]:
    """Return the ways to take an operand [..., S, size] (or [..., size, S]), best first."""
    found: dict[str, Heads] = {}
    for origin in origins(value, probes):
        arrays = positions(origin, probes)
        if arrays is None:
            break
        flat = [_rows(a, transposed) for a in arrays]
        sizes = probes.of(origin.value)
        assert sizes is not None
        way = _layout(origin, sizes, flat, heads)
        if way is None:
            continue
        key = "grouped" if heads is not None and way.heads != heads else way.layout
        # [B·H, S, size] looks like one head of a larger batch; the split into heads is further back.
        if key not in found or (heads is None and way.heads > found[key].heads):
            found[key] = way
    if heads is None and found:
        most = max(w.heads for w in found.values())
        found = {k: w for k, w in found.items() if w.heads == most}
    order = ("flat", "packed", "bshd", "bhsd", "grouped")
    need(bool(found), f"'{value.name}' is no tensor split into heads")
    return tuple(found[k] for k in order if k in found)


def _rows(array: Positions, transposed: bool) -> Positions:
    """Return positions as [batch · heads, S, size]."""
    rows = array.reshape(-1, *array.shape[-2:])
    return rows.transpose(0, 2, 1) if transposed else rows


def _layout(
    origin: Origin, sizes: Sizes, arrays: list[Positions], heads: int | None
) -> Heads | None:
    """Return how ``origin`` holds the heads, None when it does not."""
    size = arrays[0].shape[2]
    pairs = list(zip(arrays, sizes, strict=True))
    if len(sizes[0]) == 3:
        counts = {divmod(len(a), s[0]) for a, s in pairs}
        count, rest = next(iter(counts))
        if len(counts) > 1 or rest or count == 0 or heads not in (None, count):
            return None
        return _columns(origin, pairs, count, size)
    if len(sizes[0]) != 4 or any(a.size != np.prod(s) or s[3] != size for a, s in pairs):
        return None
    for layout, axis, perm in (("bshd", 2, (0, 2, 1, 3)), ("bhsd", 1, (0, 1, 2, 3))):
        counts_ = {s[axis] for s in sizes}
        count = next(iter(counts_))
        if len(counts_) == 1 and heads in (None, count):
            ways = (np.arange(a.size, dtype=np.int32).reshape(s).transpose(perm) for a, s in pairs)
            if all(_same(a, way) for (a, _), way in zip(pairs, ways, strict=True)):
                return Heads(origin.value, layout, count, size, origin.scale)
    return None


def _same(a: Positions, b: Positions) -> bool:
    return a.size == b.size and bool(np.array_equal(a, b.reshape(a.shape)))


def _columns(
    origin: Origin, pairs: list[tuple[Positions, tuple[int, ...]]], count: int, size: int
) -> Heads | None:
    """Return the heads as columns of [B, S, width]: all of them, some, or each for several heads."""
    start, width = int(pairs[0][0][0, 0, 0]), pairs[0][1][2]
    own = min(count, width // size)
    if own == 0 or count % own or start + own * size > width:
        return None
    for array, (batch, rows, wide) in pairs:
        if wide != width or array.shape[1] != rows:
            return None
        whole = np.arange(batch * rows * wide, dtype=np.int32).reshape(batch, rows, wide)
        part = whole[..., start : start + own * size]
        split = part.reshape(batch, rows, own, size).transpose(0, 2, 1, 3)
        if not _same(array, np.repeat(split, count // own, axis=1)):
            return None
    layout = "flat" if width == own * size else "packed"
    return Heads(origin.value, layout, own, size, origin.scale, start)


def _merged(
    context: ir.Value,
    probes: Probes,
    heads: int,
    batch: tuple[int, ...],
    rows: tuple[int, ...],
    size: int,
) -> ir.Value:
    """Follow the context to where its heads stand side by side, [B, S, H·size] or [B·S, H·size]."""
    sizes = some(probes.of(context), f"the shape of '{context.name}' is unknown")
    arrays = [np.arange(np.prod(s), dtype=np.int32).reshape(s) for s in sizes]
    value = context
    for _ in range(8):
        wide = heads * size
        goals = [
            np.arange(b * heads * s * size, dtype=np.int32)
            .reshape(b, heads, s, size)
            .transpose(0, 2, 1, 3)
            for b, s in zip(batch, rows, strict=True)
        ]
        merged = all(
            a.shape in ((b, s, wide), (b * s, wide)) and _same(a, goal)
            for a, goal, b, s in zip(arrays, goals, batch, rows, strict=True)
        )
        if merged:
            return value
        users = [n for n in _readers(value) if is_op(n, *_FORWARD) and n.inputs[0] is value]
        alone = len(users) == 1 and len(_readers(value)) == 1 and not value.is_graph_output()
        need(alone, f"'{value.name}' is used before its heads are put side by side")
        value = users[0].outputs[0]
        arrays = some(move(value, arrays, probes), f"{label(users[0])} cannot be followed")
    raise Mismatch(f"the heads of '{context.name}' are not put side by side again")


def _closed(product: ir.Node, final: ir.Value) -> None:
    """Check that scores and weights lead to ``final`` only."""
    seen: set[ir.Node] = set()
    level = [product.outputs[0]]
    while level:
        value = level.pop()
        need(not value.is_graph_output(), f"'{value.name}' is also a graph output")
        for use in value.uses():
            node = use.node
            if node in seen:
                continue
            seen.add(node)
            need(len(seen) < _MOST, f"'{product.outputs[0].name}' is used far beyond the attention")
            level += [o for o in node.outputs if o is not final]
