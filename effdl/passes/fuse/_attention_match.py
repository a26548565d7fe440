"""Finds softmax(scale · Q K^T + bias) V in a graph, whatever way the heads are split and merged."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from effdl.graph.match import Mismatch, label, need, some
from effdl.graph.movement import factor
from effdl.graph.probes import Probes, Sizes
from effdl.graph.walk import int_attr, is_op
from effdl.graph.weights import constant, scalar
from effdl.passes.fuse._attention_heads import VIEWS, Heads, find_heads, merged, readers

HUGE = 1e30
"""A number below -HUGE swallows any score it is added to: masking by Add and by Where are the same."""
LOWEST = float(np.finfo(np.float32).min)
_MOST = 60


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
        lengths: nodes that ask for the length of an axis of ``final`` before it is made.
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
    lengths: Mapping[ir.Node, int] = field(default_factory=dict)


def as_float32(number: float) -> float:
    """Return what ``number`` is in float32, -inf or inf where it is beyond its range."""
    with np.errstate(over="ignore"):
        return float(np.float32(number))


def is_candidate(node: ir.Node) -> bool:
    """Whether ``node`` is a Softmax that weighs the rows of something, or ONNX's own Attention."""
    if is_op(node, "Attention"):
        return True
    if not is_op(node, "Softmax"):
        return False
    value, seen = node.outputs[0], 0
    while seen < 6:
        users = readers(value)
        if any(is_op(u, "MatMul") and u.inputs[0] is value for u in users):
            return True
        onward = [u for u in users if is_op(u, *VIEWS, "Where", "Dropout", "Cast")]
        if not onward:
            return False
        value, seen = onward[0].outputs[0], seen + 1
    return False


def match_attention(softmax: ir.Node, probes: Probes, opset: int) -> Attention:
    """Read the attention around ``softmax``.

    Args:
        softmax: the anchor.
        probes: shapes.
        opset: of the default domain, which says what a softmax without an axis is over.

    Raises:
        Mismatch: the first condition that does not hold, with the node's name.
    """
    sizes = some(
        probes.of(softmax.inputs[0]), f"the shape of the scores of {label(softmax)} is unknown"
    )
    # Before opset 13 the axes from `axis` on are taken together: the last one alone is the same.
    axis = int_attr(softmax, "axis", -1 if opset >= 13 else 1)
    need(axis in (-1, len(sizes[0]) - 1), f"{label(softmax)} is not over the last axis")
    product, scale, terms = _scores(softmax, probes)
    guarded, weighing = _weighing(softmax, probes)
    left, right, lead = _batched(product, probes)
    _, values, _ = _batched(weighing, probes)
    queries, keys = (
        tuple(s[axis] for s in probes.of(v) or ()) for v, axis in ((left, -2), (right, -1))
    )
    q = find_heads(left, probes, heads=None)
    heads = q[0].heads
    k = find_heads(right, probes, heads=heads, transposed=True)
    v = find_heads(values, probes, heads=heads, scaled=False)
    batch = tuple(n // heads for n in lead)
    context = weighing.outputs[0]
    final = merged(context, probes, heads, batch, queries, v[0].size)
    lengths = lengths_read(product.outputs[0], final, probes)
    closed_from(product.outputs[0], final, lengths)
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
        batch,
        heads,
        queries,
        keys,
        lengths,
    )


def _batched(product: ir.Node, probes: Probes) -> tuple[ir.Value, ir.Value, tuple[int, ...]]:
    """Return the operands of a product of as many matrices on both sides, and how many there are."""
    left, right = (some(v, f"{label(product)} lacks an operand") for v in product.inputs)
    a = some(probes.of(left), f"the shape of '{left.name}' is unknown")
    b = some(probes.of(right), f"the shape of '{right.name}' is unknown")
    need(
        all(len(x) >= 3 and x[:-2] == y[:-2] for x, y in zip(a, b, strict=True)),
        f"the operands of {label(product)} have different batches {list(a[0])} and {list(b[0])}",
    )
    return left, right, tuple(int(np.prod(s[:-2])) for s in a)


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
            need(by > 0, f"{label(node)} turns the scores round")
            times *= by
        elif is_op(node, "MatMul"):
            return node, times, terms
        elif is_op(node, "Add"):
            value, other = _sides(node)
            same = probes.of(value) == sizes
            need(same, f"{label(node)} makes the scores larger")
            terms.append(Term(other, sizes, times))
        elif is_op(node, "Where"):
            value, term = _masked(node, sizes, times)
            need(probes.of(value) == sizes, f"{label(node)} makes the scores larger")
            terms.append(term)
        elif is_op(node, *VIEWS):
            value = some(node.inputs[0], f"{label(node)} has no input")
            _keeps_rows(node, probes)
        else:
            raise Mismatch(f"the scores come from {label(node)}, no product of queries and keys")
    raise Mismatch(f"no product of queries and keys within {_MOST} nodes before {label(softmax)}")


def _keeps_rows(view: ir.Node, probes: Probes) -> None:
    """Check that a view leaves rows and columns of the scores what they are."""
    a, b = probes.of(view.inputs[0]), probes.of(view.outputs[0])
    same = a is not None and b is not None and [s[-2:] for s in a] == [s[-2:] for s in b]
    need(same, f"{label(view)} mixes queries and keys")


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
                if all(i is not None and constant(i) is None for i in node.inputs):
                    return True
            elif is_op(node, "Mul", "Div", "Add", "Where", *VIEWS):
                below += [i for i in node.inputs if i is not None]
        level = below
    return False


def _masked(node: ir.Node, sizes: Sizes, times: float) -> tuple[ir.Value, Term]:
    """Return (scores, mask) of a Where that puts a huge negative number in place of scores.

    ``times`` is what the result is multiplied with later.
    """
    condition, yes, no = node.inputs
    assert condition is not None
    for scores, other, masked in ((yes, no, False), (no, yes, True)):
        number = scalar(other)
        if scores is None or number is None:
            continue
        number = as_float32(number * times)
        need(
            number <= -HUGE,
            f"{label(node)} masks with {number:g}, which is not so low that adding it is the same",
        )
        return scores, Term(condition, sizes, number=number, masked=masked)
    raise Mismatch(f"{label(node)} does not choose between the scores and a number")


def _weighing(softmax: ir.Node, probes: Probes) -> tuple[bool, ir.Node]:
    """Return whether NaN becomes 0 after the softmax, and the product with V."""
    value, guarded = softmax.outputs[0], False
    for _ in range(8):
        need(not value.is_graph_output(), f"the weights '{value.name}' are a graph output")
        users = readers(value)
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
        need(is_op(user, *VIEWS), f"the weights go to {label(user)}, not to a product with values")
        _keeps_rows(user, probes)
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


def lengths_read(start: ir.Value, final: ir.Value, probes: Probes) -> dict[ir.Node, int]:
    """Return the Shape nodes on the way to ``final`` that ask for the length of one of its axes."""
    sizes = probes.of(final)
    if sizes is None or len(sizes[0]) != 3:
        return {}
    found: dict[ir.Node, int] = {}
    seen, level = {start}, [start]
    while level and len(seen) < _MOST:
        value = level.pop()
        for node in dict.fromkeys(u.node for u in value.uses()):
            if is_op(node, "Shape"):
                first = int_attr(node, "start", 0)
                one = int_attr(node, "end", 0) == first + 1
                length = probes.axis(value, first) if one else None
                axis = next((a for a in (0, 1) if probes.axis(final, a) == length), None)
                if length is not None and axis is not None:
                    found[node] = axis
                continue
            more = [o for o in node.outputs if o is not final and o not in seen]
            seen.update(more)
            level += more
    return found


def closed_from(start: ir.Value, final: ir.Value, lengths: Collection[ir.Node] = ()) -> None:
    """Check that what is made of ``start`` leads to ``final`` only, apart from its ``lengths``.

    Raises:
        Mismatch: something else reads it.
    """
    seen: set[ir.Node] = set(lengths)
    level = [start]
    while level:
        value = level.pop()
        need(not value.is_graph_output(), f"'{value.name}' is also a graph output")
        for use in value.uses():
            node = use.node
            if node in seen:
                continue
            seen.add(node)
            need(len(seen) < _MOST, f"'{start.name}' is used far beyond the attention")
            level += [o for o in node.outputs if o is not final]
