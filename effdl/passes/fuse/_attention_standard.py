"""Reads ONNX's own Attention (opset 23), whose other forms are often faster."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effdl.graph.match import label, need, some
from effdl.graph.probes import Probes, Sizes
from effdl.graph.walk import float_attr, int_attr
from effdl.passes.fuse._attention_heads import Heads, find_heads, merged
from effdl.passes.fuse._attention_match import LOWEST, Attention, Term, closed_from


def match_standard(node: ir.Node, probes: Probes) -> Attention:
    """Read an Attention of the default domain.

    Raises:
        Mismatch: it does more than the others can.
    """
    _plain(node)
    inputs = [*node.inputs, *[None] * 4][:4]
    values = [some(v, f"{label(node)} lacks an operand") for v in inputs[:3]]
    sizes = [some(probes.of(v), f"the shape of '{v.name}' is unknown") for v in values]
    ranks = {len(s[0]) for s in sizes}
    need(ranks in ({3}, {4}), f"the operands of {label(node)} have different ranks")
    ways: list[tuple[Heads, ...]]
    if ranks == {3}:
        counts = [int_attr(node, f"{n}_num_heads", 0) for n in ("q", "kv", "kv")]
        need(all(counts), f"{label(node)} does not say how many heads there are")
        ways = [
            (Heads(value, "flat", count, s[0][2] // count, 1.0),)
            for value, count, s in zip(values, counts, sizes, strict=True)
        ]
    else:
        count = sizes[0][0][1]
        ways = [find_heads(x, probes, heads=count, scaled=i < 2) for i, x in enumerate(values)]
    q, k, v = ways
    batch = tuple(s[0] for s in sizes[0])
    heads = q[0].heads
    queries, keys = (tuple(s[-2] for s in part) for part in sizes[:2])
    context = node.outputs[0]
    final = context
    if ranks == {4}:
        final = merged(context, probes, heads, batch, queries, v[0].size)
        closed_from(context, final)
    scale = float_attr(node, "scale", q[0].size ** -0.5) * q[0].scale * k[0].scale
    at = tuple((b, heads, s, t) for b, s, t in zip(batch, queries, keys, strict=True))
    terms = _mask(node, inputs[3], at, probes)
    return Attention(
        node, q, k, v, scale, terms, LOWEST, context, final, batch, heads, queries, keys
    )


def _plain(node: ir.Node) -> None:
    """Check that the node computes softmax(scale · Q K^T + mask) V and nothing more."""
    need(all(v is None for v in node.inputs[4:]), f"{label(node)} takes past keys and values")
    more = [o for o in node.outputs[1:] if o.uses() or o.is_graph_output()]
    need(not more, f"{label(node)} gives more than the context")
    need(int_attr(node, "is_causal", 0) == 0, f"{label(node)} masks what comes later by itself")
    need(float_attr(node, "softcap", 0.0) == 0, f"{label(node)} caps the scores")
    precision = int_attr(node, "softmax_precision", 0)
    need(precision in (0, int(ir.DataType.FLOAT)), f"{label(node)} asks for another precision")


def _mask(node: ir.Node, mask: ir.Value | None, at: Sizes, probes: Probes) -> tuple[Term, ...]:
    if mask is None:
        return ()
    own = some(probes.of(mask), f"the shape of '{mask.name}' is unknown")
    # A mask that is shorter than the keys is filled up; one of length 1 is not spread.
    need(
        all(m[-1:] == a[-1:] for m, a in zip(own, at, strict=True)),
        f"the mask of {label(node)} is shorter than the keys",
    )
    fits = all(np.broadcast_shapes(m, a) == a for m, a in zip(own, at, strict=True))
    need(fits, f"the mask of {label(node)} is larger than the scores")
    kinds = {s.dtype(mask) for s in probes.shapes}
    boolean = kinds == {ir.DataType.BOOL}
    need(boolean or kinds == {ir.DataType.FLOAT}, f"the type of '{mask.name}' is unknown")
    return (Term(mask, at, number=-np.inf) if boolean else Term(mask, at),)
