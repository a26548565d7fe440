"""The outputs of two models, compared as they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from effdl.errors import UsageError, nearest
from effdl.measure.fidelity_sums import (
    Array,
    Sums,
    compare_classes,
    compare_numbers,
    compare_texts,
    is_float,
)
from effdl.report import OutputError

Tolerance = Mapping[str, float] | float | None
TOLERANCE = {"float64": 1e-7, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
"""Relative tolerance by dtype; 8-bit floats have that of their 3 bits of mantissa."""
_FLOAT8 = 0.13


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
        classes: also what needs classes, top-1 agreement and KL divergence.
    """

    def __init__(
        self, rtol: Tolerance = None, *, casts: bool = False, classes: bool = True
    ) -> None:
        self._rtol = rtol
        self._casts = casts
        self._classes = classes
        self._sums: dict[str, Sums] = {}

    def add(self, reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> None:
        """Take the outputs of one run of each."""
        if isinstance(self._rtol, Mapping):
            for name in self._rtol:
                if name not in reference:
                    raise UsageError(f"no output '{name}'", hint=nearest(name, reference))
        for name in [*reference, *(n for n in candidate if n not in reference)]:
            sums = self._sums.setdefault(name, Sums())
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

    def _value(self, name: str, sums: Sums, a: Any, b: Any) -> None:
        left, right = list(_leaves(a)), list(_leaves(b))
        if [kind for kind, _ in left] != [kind for kind, _ in right]:
            sums.fail(f"its structure is {_structure(b)}, was {_structure(a)}")
            return
        for (_, x), (_, y) in zip(left, right, strict=True):
            if x is not None and y is not None:
                self._array(name, sums, x, y)

    def _array(self, name: str, sums: Sums, a: Array, b: Array) -> None:
        if a.shape != b.shape:
            sums.fail(f"its shape is {list(b.shape)}, was {list(a.shape)}")
            return
        if a.dtype.kind in "OSU" or b.dtype.kind in "OSU":
            if (a.dtype.kind in "OSU") != (b.dtype.kind in "OSU"):
                sums.fail(f"its dtype is {_dtype(b)}, was {_dtype(a)}")
            else:
                compare_texts(sums, a, b)
            return
        if a.dtype != b.dtype:
            if not (self._casts and is_float(a.dtype) and is_float(b.dtype)):
                sums.fail(f"its dtype is {_dtype(b)}, was {_dtype(a)}")
                return
            sums.cast = f"{_dtype(b)}, was {_dtype(a)}"
        sums.tolerance = self._tolerance(name, a.dtype, b.dtype)
        compare_numbers(sums, a, b)
        if self._classes:
            compare_classes(sums, a, b)

    def _tolerance(self, name: str, a: np.dtype[Any], b: np.dtype[Any]) -> float:
        if isinstance(self._rtol, Mapping) and name in self._rtol:
            return self._rtol[name]
        if not is_float(a):
            return 0.0
        if isinstance(self._rtol, float | int):
            return float(self._rtol)
        return max(TOLERANCE.get(d.name, _FLOAT8) for d in (a, b))


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


def _dtype(array: Array) -> str:
    return "string" if array.dtype.kind in "OSU" else array.dtype.name
