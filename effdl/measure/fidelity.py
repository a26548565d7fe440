"""Whether two models compute the same: outputs on the same feeds, compared as they come."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from effdl.data.feeds import Feed, Feeds
from effdl.errors import DataError, ModelError, UsageError, nearest
from effdl.report import CompareReport, OutputError
from effdl.runtime.session import Session, open_session
from effdl.runtime.target import Target

Array = npt.NDArray[Any]
Tolerance = Mapping[str, float] | float | None
TOLERANCE = {"float64": 1e-7, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
"""Relative tolerance by dtype; 8-bit floats have that of their 3 bits of mantissa."""
_FLOAT8 = 0.13
_GROSS = 0.1
_CHUNK = 1 << 20


def compare_outputs(
    reference: Sequence[Mapping[str, Any]],
    candidate: Sequence[Mapping[str, Any]],
    *,
    rtol: Tolerance = None,
    casts: bool = False,
) -> tuple[OutputError, ...]:
    """Compare the outputs of two models, run by run.

    A value is within tolerance when ``|d| <= rtol * max(|r|, rms)``, with r the reference's value and
    rms the root of the mean square of that output in that run: rounding in a sum is relative to its
    terms, so a value near zero cannot be held to its own size. Integers, booleans and strings have
    to be equal. NaN is equal to NaN, an infinity to the same infinity; both are left out of the sums.

    Args:
        reference: outputs by name, one mapping per run.
        candidate: the same of the other model.
        rtol: for all floating-point outputs, or by name (then integers too); by dtype where not given,
            see ``TOLERANCE``.
        casts: floats of another precision are compared by value; if not, that is a difference.

    Raises:
        UsageError: ``rtol`` names an output that is not there.
    """
    comparison = Comparison(rtol, casts=casts)
    for a, b in zip(reference, candidate, strict=True):
        comparison.add(a, b)
    return comparison.result()


class Comparison:
    """The comparison of two models while it goes on; keeps sums, not outputs.

    Args:
        rtol, casts: as in ``compare_outputs``.
    """

    def __init__(self, rtol: Tolerance = None, *, casts: bool = False) -> None:
        self._rtol = rtol
        self._casts = casts
        self._sums: dict[str, _Sums] = {}

    def add(self, reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> None:
        """Take the outputs of one run of each."""
        if isinstance(self._rtol, Mapping):
            for name in self._rtol:
                if name not in reference:
                    raise UsageError(f"no output '{name}'", hint=nearest(name, reference))
        for name in [*reference, *(n for n in candidate if n not in reference)]:
            sums = self._sums.setdefault(name, _Sums())
            if name not in candidate:
                sums.fail("the candidate has no such output")
            elif name not in reference:
                sums.fail("the reference has no such output")
            else:
                self._value(name, sums, reference[name], candidate[name])

    def result(self) -> tuple[OutputError, ...]:
        """Return what was found, one entry per output in the order of the reference."""
        return tuple(sums.error(name) for name, sums in self._sums.items())

    @property
    def cast_outputs(self) -> dict[str, str]:
        """Outputs of another precision than the reference's, with what they are."""
        return {name: sums.cast for name, sums in self._sums.items() if sums.cast}

    def _value(self, name: str, sums: _Sums, a: Any, b: Any) -> None:
        left, right = list(_leaves(a)), list(_leaves(b))
        if [kind for kind, _ in left] != [kind for kind, _ in right]:
            sums.fail(f"its structure is {_structure(b)}, was {_structure(a)}")
            return
        for (_, x), (_, y) in zip(left, right, strict=True):
            if x is not None and y is not None:
                self._array(name, sums, x, y)

    def _array(self, name: str, sums: _Sums, a: Array, b: Array) -> None:
        if a.shape != b.shape:
            sums.fail(f"its shape is {list(b.shape)}, was {list(a.shape)}")
            return
        if a.dtype.kind in "OSU" or b.dtype.kind in "OSU":
            if (a.dtype.kind in "OSU") != (b.dtype.kind in "OSU"):
                sums.fail(f"its dtype is {_dtype(b)}, was {_dtype(a)}")
            else:
                _compare_texts(sums, a, b)
            return
        if a.dtype != b.dtype:
            if not (self._casts and _is_float(a.dtype) and _is_float(b.dtype)):
                sums.fail(f"its dtype is {_dtype(b)}, was {_dtype(a)}")
                return
            sums.cast = f"{_dtype(b)}, was {_dtype(a)}"
        sums.tolerance = self._tolerance(name, a.dtype, b.dtype)
        _compare_numbers(sums, a, b)

    def _tolerance(self, name: str, a: np.dtype[Any], b: np.dtype[Any]) -> float:
        if isinstance(self._rtol, Mapping) and name in self._rtol:
            return self._rtol[name]
        if not _is_float(a):
            return 0.0
        if isinstance(self._rtol, float | int):
            return float(self._rtol)
        return max(TOLERANCE.get(d.name, _FLOAT8) for d in (a, b))


@dataclass
class _Sums:
    """Running sums of one output."""

    tolerance: float = 0.0
    count: int = 0
    max_abs: float = 0.0
    total_abs: float = 0.0
    ref_sq: float = 0.0
    cand_sq: float = 0.0
    diff_sq: float = 0.0
    dot: float = 0.0
    hits: int = 0
    rows: int = 0
    equal: bool = True
    broken: bool = False
    cast: str = ""
    reasons: list[str] = field(default_factory=list)

    def fail(self, reason: str) -> None:
        """Note a difference that is no number."""
        self.equal = False
        self.broken = True
        if reason not in self.reasons:
            self.reasons.append(reason)

    def error(self, name: str) -> OutputError:
        """Turn the sums into figures; see OutputError for what they are on zeros."""
        ref, cand, diff = (math.sqrt(x) for x in (self.ref_sq, self.cand_sq, self.diff_sq))
        if self.broken:
            rel, sqnr = math.inf, -math.inf
        elif diff == 0:
            rel, sqnr = 0.0, math.inf
        else:
            rel = diff / ref if ref else math.inf
            sqnr = 20 * math.log10(ref / diff) if ref else -math.inf
        if ref and cand:
            cosine = max(-1.0, min(1.0, self.dot / ref / cand))
        else:
            cosine = 1.0 if ref == cand and not self.broken else 0.0
        return OutputError(
            name=name,
            max_abs=math.inf if self.broken else self.max_abs,
            mean_abs=math.inf if self.broken else self.total_abs / max(self.count, 1),
            rel_l2=rel,
            cosine=cosine,
            sqnr_db=sqnr,
            top1=self.hits / self.rows if self.rows else None,
            equal=self.equal,
            tolerance=self.tolerance,
            reason="; ".join(self.reasons[:3]),
        )


def _compare_numbers(sums: _Sums, a: Array, b: Array) -> None:
    if _is_float(a.dtype) and a.ndim >= 2 and a.shape[-1] >= 2 and a.size:
        sums.hits += int(np.count_nonzero(_wide(a).argmax(-1) == _wide(b).argmax(-1)))
        sums.rows += a.size // a.shape[-1]
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    scale = _rms(flat_a) if sums.tolerance else 0.0
    # Below the smallest normal number the hardware may flush to zero.
    tiny = float(np.finfo(np.float32).tiny) if _is_float(a.dtype) and a.dtype != np.float64 else 0.0
    for begin in range(0, a.size, _CHUNK):
        x, y = flat_a[begin : begin + _CHUNK], flat_b[begin : begin + _CHUNK]
        if not _is_float(a.dtype) and not sums.tolerance and not np.array_equal(x, y):
            sums.equal = False  # 64-bit integers do not fit into the floats below
        x, y = x.astype(np.float64), y.astype(np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        if not finite.all():
            _compare_non_finite(sums, x[~finite], y[~finite])
            x, y = x[finite], y[finite]
        gap = np.abs(x - y)
        sums.count += x.size
        sums.total_abs += float(gap.sum())
        sums.max_abs = max(sums.max_abs, float(gap.max(initial=0.0)))
        sums.ref_sq += float(x @ x)
        sums.cand_sq += float(y @ y)
        sums.diff_sq += float(gap @ gap)
        sums.dot += float(x @ y)
        if _is_float(a.dtype) or sums.tolerance:
            allowed = np.maximum(sums.tolerance * np.maximum(np.abs(x), scale), tiny)
            sums.equal &= bool((gap <= allowed).all())


def _compare_non_finite(sums: _Sums, x: Array, y: Array) -> None:
    unlike = ~((x == y) | (np.isnan(x) & np.isnan(y)))
    if not unlike.any():
        return
    for test, word in ((np.isnan, "NaN"), (np.isinf, "infinite")):
        if (test(y) & ~test(x)).any():
            sums.fail(f"it is {word} where the reference is not")
        if (test(x) & ~test(y)).any():
            sums.fail(f"it is not {word} where the reference is")
    if (np.isinf(x) & np.isinf(y) & (x != y)).any():
        sums.fail("it is infinite with the other sign")


def _compare_texts(sums: _Sums, a: Array, b: Array) -> None:
    """Every text counts as a number that is 1 in the reference, and 0 where the candidate differs."""
    unlike = int(np.count_nonzero(a.astype(np.str_) != b.astype(np.str_)))
    sums.equal &= unlike == 0
    sums.count += a.size
    sums.total_abs += unlike
    sums.max_abs = max(sums.max_abs, float(unlike > 0))
    sums.ref_sq += a.size
    sums.cand_sq += a.size - unlike
    sums.diff_sq += unlike
    sums.dot += a.size - unlike


def _rms(flat: Array) -> float:
    total, count = 0.0, 0
    for begin in range(0, flat.size, _CHUNK):
        x = flat[begin : begin + _CHUNK].astype(np.float64)
        x = x[np.isfinite(x)]
        total += float(x @ x)
        count += x.size
    return math.sqrt(total / count) if count else 0.0


def _leaves(value: Any) -> Iterator[tuple[str, Array | None]]:
    """Flatten sequences and maps; each array comes with the path that leads to it."""
    match value:
        case None:
            yield "none", None
        case dict():
            yield f"map of {len(value)}", None
            for key in sorted(value, key=str):
                yield from ((f"{key!r}.{path}", leaf) for path, leaf in _leaves(value[key]))
        case list() | tuple():
            yield f"sequence of {len(value)}", None
            for k, item in enumerate(value):
                yield from ((f"{k}.{path}", leaf) for path, leaf in _leaves(item))
        case float():  # a map's values are 32-bit floats that came as Python's
            yield "value", np.asarray(value, np.float32)
        case _:
            yield "value", np.asarray(value)


def _structure(value: Any) -> str:
    kind = next(_leaves(value))[0]
    return "a tensor" if kind == "value" else "empty" if kind == "none" else f"a {kind}"


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or "float" in dtype.name  # ml_dtypes are of kind V


def _dtype(array: Array) -> str:
    return "string" if array.dtype.kind in "OSU" else array.dtype.name


def _wide(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array


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
    has a note with the relative error of the first.

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
        return False, report
    note = (
        "equal as written; ONNX Runtime's own fusions round differently "
        f"(relative error {worst:.1e})"
    )
    return True, dataclasses.replace(plain, notes=(note,))


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


def _both_float(dtype: np.dtype[Any], array: Array) -> bool:
    return dtype.kind == "f" and array.dtype.kind == "f"


def _open(model: ir.Model | Path, target: Target | None, optimize: bool) -> Session:
    try:
        return open_session(model, target, optimize=optimize)
    except ModelError as e:
        raise ModelError(e.message, hint=e.hint, where=e.where or _title(model)) from e


def _title(model: ir.Model | Path) -> str:
    return str(model) if isinstance(model, Path) else ""
