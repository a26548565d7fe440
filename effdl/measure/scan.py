"""The same models at several numbers of threads and sizes of dynamic dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from effdl.report import BenchReport, BenchScan

Measure = Callable[[int, dict[str, int]], BenchReport]
"""Measures one cell, given threads and the values of the scanned dimensions."""


def scan(measure: Measure, threads: Sequence[int], dims: Mapping[str, Sequence[int]]) -> BenchScan:
    """Measure every combination; the last dimension varies fastest.

    Args:
        measure: measures one of them.
        threads: numbers of intra-op threads.
        dims: values by dimension name.
    """
    axes: dict[str, tuple[int, ...]] = {}
    if len(threads) > 1:
        axes["threads"] = tuple(threads)
    axes |= {name: tuple(values) for name, values in dims.items()}
    cells = [
        measure(count, dict(zip(dims, values, strict=True)))
        for count in threads
        for values in itertools.product(*dims.values())
    ]
    return BenchScan(axes, tuple(cells))
