"""How far the outputs of two models are apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OutputError:
    """How far one graph output is from the reference, over all feeds.

    Args:
        max_abs: largest absolute difference; ``mean_abs`` the mean one.
        rel_l2: norm of the difference over the norm of the reference; 0 when nothing differs,
            infinite when the reference is all zeros or the outputs cannot be subtracted.
        cosine: cosine of the two outputs as one long vector; 1 when both are all zeros, 0 when one is.
        sqnr_db: signal to quantization-noise ratio in decibel, infinite when nothing differs.
        top1: share of samples with the same argmax over the last axis, None if that says nothing.
        equal: within the tolerance of the comparison.
        tolerance: the relative tolerance used.
        reason: why not equal, when it is no number (shape, dtype, NaN).
    """

    name: str
    max_abs: float
    mean_abs: float
    rel_l2: float
    cosine: float
    sqnr_db: float
    top1: float | None
    equal: bool
    tolerance: float
    reason: str = ""


@dataclass(frozen=True)
class CompareReport:
    """Two models on the same feeds.

    Args:
        feeds: how many; ``source`` says where they come from; ``real`` is False for random numbers.
        equal: all outputs are within tolerance.
    """

    reference: str
    candidate: str
    feeds: int
    source: str
    real: bool
    equal: bool
    outputs: tuple[OutputError, ...]
    notes: tuple[str, ...] = ()
