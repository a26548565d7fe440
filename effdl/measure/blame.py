"""Which operators made the difference between two profiles, and in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from effdl.measure.parts import in_names_of
from effdl.report import NodeTime, OpChange, Profile

OVERHEAD = "overhead between operators"
_RELATIVES = {
    "Conv": ("FusedConv", "QLinearConv", "ConvInteger", "NhwcConv", "NhwcFusedConv"),
    "ConvTranspose": ("ConvTransposeWithDynamicPads",),
    "MatMul": (
        *("Gemm", "FusedMatMul", "FusedGemm", "FusedMatMulActivation", "TransposeMatMul"),
        *("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul"),
        *("QGemm", "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "GemmFastGelu", "GemmFloat8"),
    ),
    "LSTM": ("DynamicQuantizeLSTM",),
    "Attention": ("QAttention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention"),
    "LayerNormalization": ("SkipLayerNormalization", "EmbedLayerNormalization"),
    "RMSNormalization": (*("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),),
    "Gelu": ("FastGelu", "BiasGelu"),
    "Softmax": ("QLinearSoftmax", "BiasSoftmax"),
    "Resize": ("Upsample",),
    "QuantizeLinear": ("DynamicQuantizeLinear",),
    "layout reorder": ("ReorderInput", "ReorderOutput"),
    "Memcpy": ("MemcpyFromHost", "MemcpyToHost"),
}
_KIND = {op: kind for kind, ops in _RELATIVES.items() for op in ops}
_MAIN = ("Conv", "ConvTranspose", "MatMul", "LSTM", "Attention")
"""What is fused into these is a small part of them; parts of other fused operators are compared whole."""
_SMALL = 0.05
_TOP = 3


def kind_of(op_type: str) -> str:
    """Return the name under which fused and quantized relatives of an op type are counted."""
    if op_type in _KIND:
        return _KIND[op_type]
    for prefix in ("QLinear", "Nhwc"):
        if op_type.startswith(prefix) and op_type != prefix:
            return op_type.removeprefix(prefix)
    return op_type


def changes(before: Profile, after: Profile) -> tuple[OpChange, ...]:
    """Compare two profiles by kind of operator, the largest change first.

    What the kernels do not account for comes as ``overhead between operators``: so the changes sum up
    to the difference of the two ``wall_ms``.
    """
    after = in_names_of(before, after)
    kinds = _kinds(before, after)
    sides = [_sums(p.nodes, kinds) for p in (before, after)]
    found = []
    for kind in dict.fromkeys([*sides[0], *sides[1]]):
        (count, ms, ops), (count2, ms2, ops2) = (s.get(kind, (0, 0.0, {})) for s in sides)
        became = tuple(sorted(ops2.keys() - ops)) if count and count2 else ()
        found.append(OpChange(kind, count, count2, ms, ms2, became))
    rest, rest2 = (max(0.0, p.wall_ms - p.kernel_ms) for p in (before, after))
    found.append(OpChange(OVERHEAD, 0, 0, rest, rest2))
    return tuple(sorted(found, key=lambda c: -abs(c.after_ms - c.before_ms)))


def _sums(
    nodes: Sequence[NodeTime], kinds: dict[int, str]
) -> dict[str, tuple[int, float, dict[str, None]]]:
    """Return nodes, time and op types per kind."""
    found: dict[str, tuple[int, float, dict[str, None]]] = {}
    for node in nodes:
        kind = kinds[id(node)]
        count, ms, ops = found.get(kind, (0, 0.0, {}))
        found[kind] = count + 1, ms + node.ms, {**ops, node.op_type: None}
    return found


def _kinds(before: Profile, after: Profile) -> dict[int, str]:
    """Return the kind of every node, by identity.

    Where one model has one node for what the other does in several (a Sigmoid and a Mul that are one
    QuickGelu), these are counted with it.
    """
    kinds = {id(n): _kind(n) for p in (before, after) for n in p.nodes}
    for one, other in ((before, after), (after, before)):
        whole: dict[str, str] = {}
        there = {kinds[id(n)] for n in other.nodes}
        for node in one.nodes:
            kind = whole.get(next(iter(node.origin), ""), kinds[id(node)])
            if len(node.origin) > 1 and kind not in there and kind not in _MAIN:
                kinds[id(node)] = kind
                whole.update(dict.fromkeys(node.origin, kind))
        for node in other.nodes:
            if node.origin and node.origin[0] in whole and kinds[id(node)] not in _MAIN:
                kinds[id(node)] = whole[node.origin[0]]
    return kinds


def _kind(node: NodeTime) -> str:
    kind = kind_of(node.op_type)
    return kind if node.origin or kind in _RELATIVES else f"inserted {kind}"


def explain(found: Sequence[OpChange]) -> str:
    """Say what made the difference, in one sentence without a final stop.

    The side that weighs more comes first; on each the three largest, none that is below 5 % of the
    largest change. Empty when there is nothing to say.
    """
    least = max((abs(_delta(c)) for c in found), default=0.0) * _SMALL
    seen = [c for c in found if abs(_delta(c)) > least]
    lost = sorted((c for c in seen if _delta(c) > 0), key=lambda c: -_delta(c))
    won = sorted((c for c in seen if _delta(c) < 0), key=_delta)
    parts = [_side(lost, "added"), _side(won, "saved")]
    if sum(_delta(c) for c in found) < 0:
        parts.reverse()
    return "; ".join(p for p in parts if p)


def _side(found: list[OpChange], verb: str) -> str:
    said = [
        f"{_who(c)} {verb if k == 0 else ''} {_ms(abs(_delta(c)))}".replace("  ", " ")
        for k, c in enumerate(found[:_TOP])
    ]
    return ", ".join(said)


def _who(change: OpChange) -> str:
    """``12 DequantizeLinear``, ``Conv``, ``104 QuickGelu now as 208 QLinearSigmoid and QLinearMul``."""
    if change.kind == OVERHEAD:
        return OVERHEAD
    new = change.after - change.before
    if not change.before or not change.after:
        return f"{max(change.before, change.after)} {change.kind}{'' if change.after else ' gone'}"
    if change.became and new > 0 and change.kind not in _MAIN:
        return f"{change.before} {change.kind} now as {change.after} {' and '.join(change.became)}"
    return f"{new} more {change.kind}" if new > 0 else change.kind


def _ms(value: float) -> str:
    digits = 2 if value >= 0.1 else 3
    return f"{value:.{digits}f} ms"


def _delta(change: OpChange) -> float:
    return change.after_ms - change.before_ms
