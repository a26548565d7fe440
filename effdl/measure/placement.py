"""Which execution provider runs what, and what that costs."""

from __future__ import annotations

from collections import Counter, defaultdict

from effdl.report import NodeTime, Placement, Profile

_WORTH = 0.01
"""Share of the time from which on it pays to do something about inserted nodes."""
_COPIES = ("MemcpyFromHost", "MemcpyToHost")


def placement(profile: Profile, wanted: str) -> Placement:
    """Return which nodes of a profile ran on which provider.

    Args:
        profile: of one model.
        wanted: the provider that was asked for.
    """
    ms: dict[str, float] = defaultdict(float)
    for node in profile.nodes:
        ms[node.provider] += node.ms
    inserted = [n for n in profile.nodes if is_inserted(n)]
    elsewhere = [n for n in profile.nodes if n.provider != wanted]
    lost = sum(n.ms for n in elsewhere)
    return Placement(
        path=profile.path,
        wanted=wanted,
        providers=dict(Counter(n.provider for n in profile.nodes).most_common()),
        ms=dict(ms),
        inserted=dict(Counter(n.op_type for n in inserted).most_common()),
        inserted_ms=sum(n.ms for n in inserted),
        fallback=tuple((title(n), n.op_type, n.provider) for n in elsewhere),
        fallback_share=lost / profile.kernel_ms if profile.kernel_ms else 0.0,
    )


def is_inserted(node: NodeTime) -> bool:
    """Whether ONNX Runtime put the node in."""
    return not node.origin or node.op_type in _COPIES


def title(node: NodeTime) -> str:
    """Return what a person calls the node: the model's own name for its main work."""
    return node.origin[0] if node.origin else node.name


def advice(found: Placement) -> tuple[str, ...]:
    """Return what to do about a placement, a sentence each."""
    said = []
    if found.fallback:
        ops = ", ".join(f"{c} {o}" for o, c in Counter(f[1] for f in found.fallback).most_common(4))
        said.append(
            f"{found.wanted} has no kernel for {ops} here, or leaves shape arithmetic to the CPU: "
            "simplify the model with fixed shapes (--dim), or rewrite these nodes"
        )
    copies = sum(found.inserted.get(op, 0) for op in _COPIES)
    if copies:
        said.append(
            f"{copies} copies between host and device stand at the borders: "
            "the fewer borders, the fewer copies"
        )
    if found.inserted_ms < _WORTH * sum(found.ms.values()):
        return tuple(said)
    reorders = sum(c for op, c in found.inserted.items() if op.startswith("Reorder"))
    if reorders > 2:
        said.append(
            f"{reorders} layout changes around the blocked convolutions: nodes between them that have "
            "no blocked form force these; quantize, fuse or fix the shapes of what lies between"
        )
    casts = found.inserted.get("Cast", 0)
    if casts:
        said.append(
            f"{casts} casts were put in, since {found.wanted} has no kernel for the type: "
            "leave these nodes in float32"
        )
    transposes = found.inserted.get("Transpose", 0)
    if transposes > 2:
        said.append(
            f"{transposes} transposes lead into and out of channels-last 8-bit kernels: "
            "float nodes between quantized ones force these"
        )
    return tuple(said)
