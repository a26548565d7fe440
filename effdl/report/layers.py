"""What 8-bit integers would do to each layer of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerRow:
    """One place of the graph that could compute in 8 bits.

    Args:
        names: its nodes, the first of which does most of the work; ``op_type`` of that one.
        kind: number types of activations and weights, such as ``uint8 x int8``; empty for one that
            stays float.
        low, high: what the integers of its input stand for, None where they change from run to run.
        effect: relative error of the worst output when nothing else is 8-bit, None when not measured.
        before_ms, after_ms: of its kernels in float and in 8 bits; None when it was not found in the
            profile.
        decision: ``8-bit``, ``float: ...`` with the reason.
    """

    names: tuple[str, ...]
    op_type: str
    kind: str
    low: float | None
    high: float | None
    effect: float | None
    before_ms: float | None
    after_ms: float | None
    decision: str


@dataclass(frozen=True)
class LayersReport:
    """All layers of a model with 8-bit candidates.

    Args:
        path: the model.
        target: where it was measured; ``cpu`` its processor.
        form: ``static`` or ``dynamic``.
        reason: why these number types.
        source: where the inputs came from, ``real`` whether they are real.
        rows: in the graph's order.
        before_ms, after_ms: of an inference in float, and with all candidates in 8 bits.
        error: relative error of the worst output with all candidates in 8 bits; ``limit`` the one
            that the preset allows.
        left: how many nodes had better stay float for their time, and for their error.
    """

    path: str
    target: str
    cpu: str
    form: str
    reason: str
    source: str
    real: bool
    rows: tuple[LayerRow, ...]
    before_ms: float
    after_ms: float
    error: float
    limit: float
    left: tuple[int, int]
