"""The figures of one output, summed up over runs; no array is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from effdl.report import OutputError

Array = npt.NDArray[Any]
CHUNK = 1 << 20
"""Values that are widened to 64 bits at a time."""
_SUMS_TO_ONE = 1e-2
_TINY = float(np.finfo(np.float32).tiny)


@dataclass
class Sums:
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
    kl: float = 0.0
    kl_rows: int = 0
    axis: int | None = None
    distribution: bool = False
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
            kl=max(0.0, self.kl / self.kl_rows) if self.kl_rows else None,
        )


def compare_numbers(sums: Sums, a: Array, b: Array) -> None:
    """Take two arrays of one shape that can be subtracted."""
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    scale = _rms(flat_a) if sums.tolerance else 0.0
    # Below the smallest normal number the hardware may flush to zero.
    tiny = _TINY if is_float(a.dtype) and a.dtype != np.float64 else 0.0
    for begin in range(0, a.size, CHUNK):
        x, y = flat_a[begin : begin + CHUNK], flat_b[begin : begin + CHUNK]
        if not is_float(a.dtype) and not sums.tolerance and not np.array_equal(x, y):
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
        if is_float(a.dtype) or sums.tolerance:
            allowed = np.maximum(sums.tolerance * np.maximum(np.abs(x), scale), tiny)
            sums.equal &= bool((gap <= allowed).all())


def _compare_non_finite(sums: Sums, x: Array, y: Array) -> None:
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


def compare_texts(sums: Sums, a: Array, b: Array) -> None:
    """Take two arrays of texts of one shape.

    Every text counts as a number that is 1 in the reference, and 0 where the candidate differs.
    """
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
    for begin in range(0, flat.size, CHUNK):
        x = flat[begin : begin + CHUNK].astype(np.float64)
        x = x[np.isfinite(x)]
        total += float(x @ x)
        count += x.size
    return math.sqrt(total / count) if count else 0.0


def compare_classes(sums: Sums, a: Array, b: Array) -> None:
    """Take two arrays of one shape as scores of classes, if they have a class axis.

    Counts rows with the same largest class, and sums the Kullback-Leibler divergence
    sum(p * log(p / q)) of the candidate's q from the reference's p (Kullback, Leibler 1951) in nats.
    The first reference decides which axis it is, and whether its rows are distributions; if not, p and
    q are softmaxes. A class that the candidate gives nothing counts as the smallest normal float32.
    Rows that are not finite are left out.
    """
    if not (is_float(a.dtype) and is_float(b.dtype)):
        return
    first = sums.axis is None
    if first:
        sums.axis = class_axis(a)
    if sums.axis is None or a.ndim < 2 or not a.size:
        return
    classes = a.shape[sums.axis]
    x = np.moveaxis(a, sums.axis, -1).reshape(-1, classes)
    y = np.moveaxis(b, sums.axis, -1).reshape(-1, classes)
    if first:
        sums.distribution = _is_distribution(x)
    step = max(1, CHUNK // classes)
    for begin in range(0, len(x), step):
        p, q = (v[begin : begin + step].astype(np.float64) for v in (x, y))
        sums.hits += int(np.count_nonzero(p.argmax(-1) == q.argmax(-1)))
        sums.rows += len(p)
        finite = np.isfinite(p).all(-1) & np.isfinite(q).all(-1)
        log_p, log_q = (_log_rows(v[finite], sums.distribution) for v in (p, q))
        sums.kl += float((np.exp(log_p) * (log_p - log_q)).sum())
        sums.kl_rows += int(finite.sum())


def class_axis(array: Array) -> int | None:
    """Return the axis that holds the classes, None where none does.

    It is the last one; of four dimensions or more, as in [N, C, H, W], the second if it is no longer
    than the last. A single class is none.
    """
    if array.ndim < 2 or not array.size:
        return None
    axis = 1 if array.ndim >= 4 and array.shape[1] <= array.shape[-1] else array.ndim - 1
    return axis if array.shape[axis] >= 2 else None


def _is_distribution(rows: Array) -> bool:
    wide = rows[:CHUNK].astype(np.float64)
    return bool((wide >= 0).all() and (np.abs(wide.sum(-1) - 1) < _SUMS_TO_ONE).all())


def _log_rows(rows: Array, distribution: bool) -> Array:
    """Return the logarithms of distributions, or of the softmax of rows."""
    if distribution:
        positive = np.maximum(rows, _TINY)
        return np.asarray(np.log(positive / positive.sum(-1, keepdims=True)))
    shifted = rows - rows.max(-1, keepdims=True, initial=-math.inf)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of this type have fractions."""
    return dtype.kind == "f" or "float" in dtype.name  # ml_dtypes are of kind V
