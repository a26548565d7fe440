"""Numbers as people read them."""

from __future__ import annotations

import math


def size(count: int | None) -> str:
    """``1.4 MB``: bytes in decimal units, ``-`` when unknown."""
    return "-" if count is None else _scaled(count, 1000, ("B", "kB", "MB", "GB", "TB"))


def count(number: int | None) -> str:
    """``3.5 M``: a count in decimal units, ``-`` when unknown."""
    return "-" if number is None else _scaled(number, 1000, ("", "k", "M", "G", "T")).strip()


def _scaled(number: float, base: int, units: tuple[str, ...]) -> str:
    step = 0
    while abs(number) >= base and step < len(units) - 1:
        number /= base
        step += 1
    digits = 0 if step == 0 else (2 if abs(number) < 10 else 1 if abs(number) < 100 else 0)
    return f"{number:.{digits}f} {units[step]}"


def milliseconds(value: float) -> str:
    """``0.123 ms`` with three significant digits."""
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def change(before: float | None, after: float | None) -> str:
    """``-74 %``, ``same`` or empty when it cannot be said."""
    if not before or after is None:
        return ""
    if before == after:
        return "same"
    share = after / before - 1
    return f"{share:+.1%}" if abs(share) < 0.1 else f"{share:+.0%}"


def score(value: float | None) -> str:
    """``0.9712``, ``-`` when there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def error(value: float | None) -> str:
    """``1.2e-03``, ``0`` or ``-`` when it was not measured."""
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"
