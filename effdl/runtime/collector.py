"""Python's garbage collector, set for a process that holds a few large graphs."""

from __future__ import annotations

import gc


def collect_rarely() -> None:
    """Let the collector look at what is new only, and rarely.

    A model in memory is some hundred thousand objects that all live as long as it does. With the usual
    thresholds they are gone through again and again, which is a tenth of the time of the passes. Not too
    rarely: copies of a model that are given up hold weights until then. For our own processes; not for a
    program that imports effdl.
    """
    gc.set_threshold(20_000, 5, 10)
    gc.freeze()
