"""How Q, K and V lie in the tensors they come from, and where the context is put together again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effdl.graph.match import Mismatch, label, need, some
from effdl.graph.movement import Origin, Positions, move, origins, positions
from effdl.graph.probes import Probes
from effdl.graph.walk import is_op

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
_ORDER = ("flat", "packed", "bshd", "bhsd", "grouped")
_MOST = 8


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


def find_heads(
    value: ir.Value,
    probes: Probes,
    *,
    heads: int | None,
    transposed: bool = False,
    scaled: bool = True,
) -> tuple[Heads, ...]:
    """Return the ways to take an operand [..., S, size], best first, all with one scale.

    Args:
        value: the operand.
        probes: shapes.
        heads: how many there must be; None for the queries, which say it.
        transposed: whether the operand is [..., size, S].
        scaled: whether a factor on the way may be left to the scale of the scores.

    Raises:
        Mismatch: it is no tensor split into heads.
    """
    found: dict[str, Heads] = {}
    for origin in origins(value, probes):
        arrays = positions(origin, probes)
        if arrays is None or (origin.scale != 1.0 and not scaled):
            break
        flat = [_rows(a, transposed) for a in arrays]
        sizes = probes.of(origin.value)
        assert sizes is not None
        way = _layout(origin, sizes, flat, heads)
        if way is None:
            continue
        key = "grouped" if heads is not None and way.heads != heads else way.layout
        # The farthest is taken, which leaves factors and copies on the way behind. [B·H, S, size]
        # looks like one head of a larger batch; the split into heads is further back.
        if key not in found or way.heads >= found[key].heads:
            found[key] = way
    need(bool(found), f"'{value.name}' is no tensor split into heads")
    most = max(w.heads for w in found.values())
    ways = [found[k] for k in _ORDER if k in found and (heads or found[k].heads == most)]
    return tuple(w for w in ways if w.scale == ways[0].scale)


def _rows(array: Positions, transposed: bool) -> Positions:
    """Return positions as [batch · heads, S, size]."""
    rows = array.reshape(-1, *array.shape[-2:])
    return rows.transpose(0, 2, 1) if transposed else rows


def _layout(
    origin: Origin, sizes: tuple[tuple[int, ...], ...], arrays: list[Positions], heads: int | None
) -> Heads | None:
    """Return how ``origin`` holds the heads, None when it does not."""
    size = arrays[0].shape[2]
    pairs = list(zip(arrays, sizes, strict=True))
    if len(sizes[0]) == 3:
        counts = {divmod(len(a), s[0]) for a, s in pairs}
        count, rest = next(iter(counts))
        if len(counts) > 1 or rest or count == 0 or heads not in (None, count):
            return None
        way = _columns(origin, pairs, count, size)
        # Queries that several heads share would make a larger batch than their tensor has.
        return way if way is None or heads is not None or way.heads == count else None
    if len(sizes[0]) != 4 or any(a.size != np.prod(s) or s[3] != size for a, s in pairs):
        return None
    for layout, axis, perm in (("bshd", 2, (0, 2, 1, 3)), ("bhsd", 1, (0, 1, 2, 3))):
        counts_ = {s[axis] for s in sizes}
        count = next(iter(counts_))
        as_long = all(a.shape[1] == s[3 - axis] for a, s in pairs)
        if len(counts_) == 1 and heads in (None, count) and as_long:
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


def readers(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read the elements of ``value``, not only its shape."""
    nodes = dict.fromkeys(u.node for u in value.uses())
    return [n for n in nodes if not is_op(n, "Shape", "Size")]


def merged(
    context: ir.Value,
    probes: Probes,
    heads: int,
    batch: tuple[int, ...],
    rows: tuple[int, ...],
    size: int,
) -> ir.Value:
    """Follow the context to where its heads stand side by side, [B, S, H·size] or [B·S, H·size].

    Args:
        context: [..., S, size] with batch and heads in front.
        probes: shapes.
        heads, size: how many heads there are and how wide.
        batch, rows: B and S at each probe.

    Raises:
        Mismatch: it is used before, or its heads never stand side by side.
    """
    sizes = some(probes.of(context), f"the shape of '{context.name}' is unknown")
    arrays = [np.arange(np.prod(s), dtype=np.int32).reshape(s) for s in sizes]
    goals = [
        np.arange(b * heads * s * size, dtype=np.int32)
        .reshape(b, heads, s, size)
        .transpose(0, 2, 1, 3)
        for b, s in zip(batch, rows, strict=True)
    ]
    value, wide = context, heads * size
    for _ in range(_MOST):
        if all(
            a.shape in ((b, s, wide), (b * s, wide)) and _same(a, goal)
            for a, goal, b, s in zip(arrays, goals, batch, rows, strict=True)
        ):
            return value
        users = [
            n for n in readers(value) if is_op(n, *VIEWS, "Transpose") and n.inputs[0] is value
        ]
        alone = len(users) == 1 and len(readers(value)) == 1 and not value.is_graph_output()
        need(alone, f"'{value.name}' is used before its heads are put side by side")
        value = users[0].outputs[0]
        arrays = some(move(value, arrays, probes), f"{label(users[0])} cannot be followed")
    raise Mismatch(f"the heads of '{context.name}' are not put side by side again")
