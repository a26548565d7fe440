"""How far the outputs of two models are apart."""

from __future__ import annotations

from dataclasses import dataclass

from effdl.report.machine import Place


@dataclass(frozen=True)
class OutputError:
    """How far one graph output is from the reference, over all feeds.

    Args:
        max_abs: largest absolute difference; ``mean_abs`` the mean one.
        rel_l2: norm of the difference over the norm of the reference; 0 when nothing differs,
            infinite when the reference is all zeros or the outputs cannot be subtracted.
        cosine: cosine of the two outputs as one long vector; 1 when both are all zeros, 0 when one is.
        sqnr_db: signal to quantization-noise ratio in decibel, infinite when nothing differs.
        top1: share of samples with the same argmax over the class axis (the last one; of an image
            [N, C, H, W] the second), None if that says nothing.
        equal: within the tolerance of the comparison.
        tolerance: the relative tolerance used.
        reason: why not equal, when it is no number (shape, dtype, NaN).
        kl: Kullback-Leibler divergence of the candidate's class distribution from the reference's in
            nats, mean over the samples; the softmax of an output that is no distribution yet; None
            where there is no class axis.
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
    kl: float | None = None


@dataclass(frozen=True)
class TensorError:
    """How far one tensor inside the graph is from the reference, over all feeds.

    Args:
        tensor: its name in the reference; ``node`` and ``op_type`` what makes it there, both empty
            for a graph input.
        other: its name in the candidate; ``other_node`` and ``other_op`` what makes it there.
        error: relative L2 error as the nodes behind it read it, that is after it was rounded.
        max_abs: largest absolute difference.
        tolerance: the relative tolerance by dtype; ``equal`` whether every value is within it.
        inputs: the nearest tensors before it that could be compared, with their errors.
        nodes: the reference's nodes between ``inputs`` and here; ``readers`` those that read it.
        alone: the error of this step alone: the candidate's nodes from ``inputs`` to here, fed with
            the reference's tensors; ``unrounded`` that before the result was rounded to its
            quantized type, None where it is not rounded.
        effect: the error of the worst graph output if nothing but this step were the candidate's.
            None, like ``alone``, when not measured.
        reason: why not equal, when it is no number (shape, dtype, NaN).
    """

    tensor: str
    node: str
    op_type: str
    other: str
    other_node: str
    other_op: str
    error: float
    max_abs: float
    tolerance: float
    equal: bool
    inputs: tuple[tuple[str, float], ...]
    nodes: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    alone: float | None = None
    unrounded: float | None = None
    effect: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class LocateReport:
    """Where inside the graph two models part.

    Args:
        feeds, source, real: as in ``CompareReport``.
        first: the first tensor in the order of the reference's graph that is beyond tolerance, None
            when none is.
        jumps: the steps that hurt the outputs most by themselves, most first.
        compared: tensors with a counterpart; ``unmatched`` those without.
        optimized: run at ORT_ENABLE_ALL; False: both graphs as they are written.
        notes: what was left out.
    """

    reference: str
    candidate: str
    feeds: int
    source: str
    real: bool
    first: TensorError | None
    jumps: tuple[TensorError, ...]
    compared: int
    unmatched: int
    optimized: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CompareReport:
    """Two models on the same feeds.

    Args:
        feeds: how many; ``source`` says where they come from; ``real`` is False for random numbers.
        equal: all outputs are within tolerance.
        located: where inside the graph they part, None when that was not asked for.
        place: where the candidate ran, None for this process. In a ``ThereReport`` the reference ran
            here when it is the same model, otherwise at the same place.
    """

    reference: str
    candidate: str
    feeds: int
    source: str
    real: bool
    equal: bool
    outputs: tuple[OutputError, ...]
    notes: tuple[str, ...] = ()
    located: LocateReport | None = None
    place: Place | None = None


@dataclass(frozen=True)
class ThereReport:
    """Whether a target computes what this machine computes.

    Args:
        target: as it was asked for: ``ssh:pi4``, ``arm-emulated``.
        here: the processor that computed the reference.
        equal: every model computes there what it computes here.
        results: a comparison per machine or core and per model; with two models also the candidate
            against the reference, both there, which decides nothing: they may differ and both be right.
    """

    target: str
    here: str
    equal: bool
    results: tuple[CompareReport, ...]
