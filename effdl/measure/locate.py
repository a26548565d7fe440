"""Where two models part: the first tensor inside their graphs, and the steps that hurt the outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from effdl.data.feeds import Feeds
from effdl.errors import DataError, EffdlError
from effdl.graph import io
from effdl.measure.isolate import Say
from effdl.measure.parting import Search
from effdl.report import CompareReport, LocateReport, TensorError
from effdl.runtime.target import Target

MAX_BYTES = 256 << 20
"""Bytes of tensors that one run of both models may return."""
_MOSTLY = 0.7


def locate(
    reference: ir.Model | Path,
    candidate: ir.Model | Path,
    feeds: Feeds,
    target: Target | None = None,
    *,
    rtol: float | None = None,
    top: int | None = 10,
    optimize: bool = False,
    max_bytes: int = MAX_BYTES,
    progress: Say | None = None,
) -> LocateReport:
    """Find the first tensor at which two models part, and the steps that hurt the outputs most.

    Both run with the tensors that ``counterparts`` pairs as outputs, so many at a time as fit into
    ``max_bytes``. Quantized tensors are compared as the nodes behind them read them. A tensor that
    differs while all that follows from it agrees is not counted: it only means something else now.

    A step is what lies between such tensors. Its own error is what the candidate's nodes make of the
    reference's tensors, and what it does to the outputs is found by running the reference with that
    error added, once per step and feed (all steps on the first feed, the worst on all).

    Args:
        reference: the model that is right.
        candidate: the other one.
        feeds: inputs for the reference.
        target: where to run both; this machine's CPU when None.
        rtol: relative tolerance, by dtype when None, see ``compare_outputs``.
        top: how many steps, all when None, none (and nothing of that is run) when 0.
        optimize: at ORT_ENABLE_ALL, where fetching a tensor keeps ONNX Runtime from fusing around
            it; False: both graphs as they are written, where it changes nothing.
        max_bytes: see above.
        progress: told what is going on.

    Raises:
        ModelError: one of them does not load or run, or the candidate takes other inputs.
        DataError: there are no feeds.
    """
    if len(feeds) == 0:
        raise DataError("there is no sample to compare on", where=feeds.source)
    search = Search(
        _loaded(reference),
        _loaded(candidate),
        feeds,
        target,
        rtol,
        top,
        optimize,
        max_bytes,
        progress or _silent,
    )
    first, jumps, notes = search.find()
    return LocateReport(
        reference=str(reference) if isinstance(reference, Path) else "",
        candidate=str(candidate) if isinstance(candidate, Path) else "",
        feeds=len(feeds),
        source=feeds.source,
        real=feeds.real,
        first=first,
        jumps=jumps,
        compared=len(search.found),
        unmatched=search.unmatched,
        optimized=optimize,
        notes=notes,
    )


def with_location(
    report: CompareReport,
    reference: Path,
    candidate: Path,
    feeds: Feeds,
    target: Target,
    rtol: float | None,
    top: int,
    progress: Say | None = None,
) -> CompareReport:
    """Add to a comparison of outputs where inside the graphs the models part.

    Both run as they are written; where nothing differs then although the outputs do, as ONNX Runtime
    optimizes them. Args, errors: as in ``locate``.
    """

    def search(optimize: bool) -> LocateReport:
        return locate(
            reference,
            candidate,
            feeds,
            target,
            rtol=rtol,
            top=top,
            optimize=optimize,
            progress=progress,
        )

    found = search(optimize=False)
    if found.first is None and not report.equal:
        note = "as they are written nothing differs: it is ONNX Runtime's optimization that tells them apart"
        found = search(optimize=True)
        found = replace(found, notes=(note, *found.notes))
    return replace(report, located=found)


def worst(report: LocateReport, n: int) -> list[tuple[str, str, float]]:
    """Return the ``n`` nodes that hurt the outputs most: name, op type, and that error.

    The names are those of the reference; of a step that goes over several nodes, the last one. The
    error is that of the worst output when nothing else is the candidate's.
    """
    return [(j.node or j.tensor, j.op_type, j.effect or 0.0) for j in report.jumps[:n]]


def at_fault(report: LocateReport) -> list[str]:
    """Return the nodes whose being left as they were would help most, the worst first.

    These are the reference's nodes of each step of ``report.jumps``. Where the error comes mostly from
    rounding the step's result, also the nodes that read it: as long as one of them wants it
    quantized, it is rounded.
    """
    names: dict[str, None] = {}
    for jump in report.jumps:
        names |= dict.fromkeys(n for n in jump.nodes if n)
        if jump.unrounded is not None and jump.unrounded < _MOSTLY * (jump.alone or 0.0):
            names |= dict.fromkeys(n for n in jump.readers if n)
    return list(names)


def first_divergence(
    reference: ir.Model | Path,
    candidate: ir.Model | Path,
    feeds: Feeds,
    target: Target | None = None,
) -> str:
    """Say in one sentence where two models part; empty when it cannot be told.

    For the message of a check that failed: a model that does not run with its inner tensors as
    outputs is no second fault, so nothing is raised for it.
    """
    for optimize in (False, True):
        try:
            first = locate(reference, candidate, feeds, target, top=0, optimize=optimize).first
        except EffdlError:
            return ""
        if first is not None:
            return sentence(first)
    return ""


def sentence(first: TensorError) -> str:
    """Say where two models part: the tensor, the nodes that make it, and the jump of the error."""
    made = f"{first.op_type} '{first.node}'" if first.op_type else "a graph input"
    if (first.other_node, first.other_op) != (first.node, first.op_type) and first.other_op:
        made += f" (in the candidate {first.other_op} '{first.other_node}')"
    if first.reason:
        return f"first at '{first.tensor}', made by {made}: {first.reason}"
    before = max((e for _, e in first.inputs), default=0.0)
    return (
        f"first at '{first.tensor}', made by {made}: "
        f"relative error {first.error:.2g}, {before:.2g} in what it reads"
    )


def _silent(name: str, what: str) -> None:
    """Tell nobody."""


def _loaded(model: ir.Model | Path) -> ir.Model:
    return model if isinstance(model, ir.Model) else io.load(model)
