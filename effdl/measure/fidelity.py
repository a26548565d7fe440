"""Whether two models compute the same: both run on the same feeds, their outputs compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from effdl.data.feeds import Feed, Feeds
from effdl.errors import DataError, ModelError, UsageError, nearest
from effdl.graph.io import load
from effdl.measure.fidelity_outputs import TOLERANCE, Comparison, Tolerance, compare_outputs
from effdl.measure.fidelity_sums import Array
from effdl.report import CompareReport
from effdl.runtime.session import Session, open_session
from effdl.runtime.target import Target

__all__ = ["TOLERANCE", "Comparison", "Tolerance", "compare", "compare_outputs", "fit", "same"]
_GROSS = 0.1
_SMALL = 1e-3
_NOISE = 10.0
"""How much more than the last bit of the inputs changes is still taken for rounding."""


def compare(
    reference: ir.Model | Path,
    candidate: ir.Model | Path,
    feeds: Feeds,
    *,
    target: Target | None = None,
    rtol: Tolerance = None,
    optimize: bool = True,
) -> CompareReport:
    """Run two models on the same feeds and compare their outputs; only sums are kept between feeds.

    A candidate that takes or gives floats of another precision gets the feeds cast, and is compared
    by value with the tolerance of the coarser type; the report's notes say so.

    Args:
        reference: the model that is right.
        candidate: the other one.
        feeds: inputs for the reference.
        target: where to run both; this machine's CPU when None.
        rtol: as in ``compare_outputs``.
        optimize: at ORT_ENABLE_ALL; False for both graphs as they are written.

    Raises:
        ModelError: one of them does not load or run, or the candidate takes other inputs.
        DataError: there are no feeds.
        UsageError: ``rtol`` names an output that is not there.
    """
    if len(feeds) == 0:
        raise DataError("there is no sample to compare on", where=feeds.source)
    first = _open(reference, target, optimize)
    second = _open(candidate, target, optimize)
    if isinstance(rtol, Mapping):
        outputs = [p.name for p in first.outputs]
        for name in rtol:
            if name not in outputs:
                raise UsageError(f"no output '{name}'", hint=nearest(name, outputs))
    comparison = Comparison(rtol, casts=True)
    notes: dict[str, None] = {}
    for feed in feeds:
        comparison.add(first.run(fit(feed, first)), second.run(fit(feed, second, notes)))
    for name, what in comparison.cast_outputs.items():
        notes[f"output '{name}' is {what}: compared by value"] = None
    errors = comparison.result()
    return CompareReport(
        reference=_title(reference),
        candidate=_title(candidate),
        feeds=len(feeds),
        source=feeds.source,
        real=feeds.real,
        equal=all(e.equal for e in errors),
        outputs=errors,
        notes=tuple(notes),
    )


def same(
    reference: ir.Model | Path,
    candidate: ir.Model | Path,
    feeds: Feeds,
    *,
    target: Target | None = None,
    rtol: Tolerance = None,
) -> tuple[bool, CompareReport]:
    """Whether a lossless step was lossless: equal as ONNX Runtime runs it, or at least as written.

    ONNX Runtime's own fusions may round differently on an equivalent graph. So outputs that differ
    by numbers, and not grossly (relative error up to 0.1), are compared again with optimization off;
    when they are equal there, the answer is yes and the report, then that of the second comparison,
    has a note with the relative error of the first. So it is when they differ there by little and by
    no more than rounding changes the outputs of the reference itself.

    Args, errors: as in ``compare``.
    """
    report = compare(reference, candidate, feeds, target=target, rtol=rtol)
    worst = max((e.rel_l2 for e in report.outputs), default=0.0)
    if report.equal or worst > _GROSS or report.notes:
        # A note says that a type of the interface changed: no lossless step does that.
        return report.equal and not report.notes, report
    try:
        plain = compare(reference, candidate, feeds, target=target, rtol=rtol, optimize=False)
    except ModelError as e:
        note = f"with optimization off it does not run: {e.message}"
        return False, dataclasses.replace(report, notes=(note,))
    if not plain.equal:
        if not _within_noise(reference, plain, feeds, target):
            return False, report
        note = (
            "differs no more than rounding changes the outputs of the model before it "
            f"(relative error {worst:.1e})"
        )
        return True, dataclasses.replace(plain, notes=(note,))
    note = (
        "equal as written; ONNX Runtime's own fusions round differently "
        f"(relative error {worst:.1e})"
    )
    return True, dataclasses.replace(plain, notes=(note,))


def _within_noise(
    reference: ir.Model | Path, plain: CompareReport, feeds: Feeds, target: Target | None
) -> bool:
    """Whether outputs differ as written by hardly more than rounding changes the reference itself.

    The last layer of some networks magnifies rounding, a sigmoid of large negative numbers for one:
    any other order of summation then shows. How much is seen by running the reference once with
    ONNX Runtime's fusions, and once with its inputs off by the last bit.
    """
    if any(e.reason for e in plain.outputs):
        return False
    optimized, written = (_open(reference, target, o) for o in (True, False))
    fused, shaken = Comparison(None), Comparison(None)
    rng = np.random.default_rng(0)
    for feed in feeds:
        fitted = fit(feed, written)
        outputs = written.run(fitted)
        fused.add(outputs, optimized.run(fitted))
        shaken.add(outputs, written.run({k: _last_bit(v, rng) for k, v in fitted.items()}))
    noise = [
        max(a.max_abs, b.max_abs) for a, b in zip(fused.result(), shaken.result(), strict=True)
    ]
    pairs = zip(plain.outputs, noise, strict=True)
    return all(e.equal or (e.rel_l2 < _SMALL and e.max_abs <= _NOISE * n) for e, n in pairs)


def _last_bit(array: Array, rng: np.random.Generator) -> Array:
    """Return floats changed in their last bit, up or down at random; other types as they are."""
    if array.dtype not in (np.float16, np.float32, np.float64):
        return array
    step = float(np.finfo(array.dtype).eps)
    return (array * (1 + step * rng.choice([-1.0, 1.0], array.shape))).astype(array.dtype)


def fit(feed: Feed, session: Session, notes: dict[str, None] | None = None) -> Feed:
    """Return ``feed`` with floats cast to the precision the session takes; casts go into ``notes``.

    Raises:
        ModelError: names the input that differs.
    """
    ports = {p.name: p for p in session.inputs}
    hint = f"its inputs: {', '.join(ports)}"
    for name in feed:
        if name not in ports:
            raise ModelError(f"the model has no input '{name}'", hint=hint)
    fitted: Feed = {}
    for name, port in ports.items():
        if name not in feed:
            raise ModelError(f"nothing is given for the model's input '{name}'")
        array = feed[name]
        if port.dtype is not None and port.dtype != array.dtype and _both_float(port.dtype, array):
            if notes is not None:
                notes[f"input '{name}' cast from {array.dtype.name} to {port.dtype.name}"] = None
            array = array.astype(port.dtype)
        fitted[name] = array
    return fitted


def _both_float(dtype: np.dtype[np.generic], array: Array) -> bool:
    return dtype.kind == "f" and array.dtype.kind == "f"


def _open(model: ir.Model | Path, target: Target | None, optimize: bool) -> Session:
    if isinstance(model, Path) and not model.is_file():
        load(model)  # says what is wrong in better words than ONNX Runtime
    try:
        return open_session(model, target, optimize=optimize)
    except ModelError as e:
        raise ModelError(e.message, hint=e.hint, where=e.where or _title(model)) from e


def _title(model: ir.Model | Path) -> str:
    return str(model) if isinstance(model, Path) else ""
