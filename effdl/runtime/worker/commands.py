"""The commands of a worker: each public method is one, see ``effdl.runtime.worker``."""

from __future__ import annotations

import gc
import os
import platform
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import onnxruntime as ort

from effdl.runtime.machine import this_machine
from effdl.runtime.worker.process import peak_bytes, pin, reset_peak, this_cpu
from effdl.runtime.worker.refusal import Refusal
from effdl.runtime.worker.session import Feed, fit_feeds, read_feeds, session_options

_MAX_RUNS = 1_000_000


class Worker:
    """The state between commands: a session and its feeds."""

    def __init__(self) -> None:
        self._session: ort.InferenceSession | None = None
        self._feeds: list[Feed] = []
        self._baseline = 0

    def hello(self) -> dict[str, Any]:
        """Say what this process is."""
        return {
            "pid": os.getpid(),
            "python": platform.python_version(),
            "onnxruntime": ort.__version__,
            "numpy": np.__version__,
            "providers": ort.get_available_providers(),
            "machine": asdict(this_machine()),
        }

    def load(
        self, model: str, providers: list[str], threads: int, feeds: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Open the model on the first of ``providers``, or nowhere, and run it once."""
        self._feeds = read_feeds(feeds)
        gc.collect()
        reset = reset_peak()
        self._baseline = peak_bytes()
        begin = time.perf_counter_ns()
        try:
            self._session = ort.InferenceSession(
                model, session_options(threads), providers=providers
            )
        except Exception as e:
            raise Refusal("load", str(e)) from e
        loaded = time.perf_counter_ns()
        actual = self._session.get_providers()
        if actual[0] != providers[0]:
            raise Refusal(
                "provider", f"asked for {providers[0]}, but the session runs on {actual[0]}"
            )
        casts = fit_feeds(self._session, self._feeds)
        first = self._times(1, 0.0, 0)[0]
        return {
            "load_ms": (loaded - begin) / 1e6,
            "first_ms": first / 1e6,
            "providers": actual,
            "casts": casts,
            "baseline_bytes": self._baseline,
            "peak_bytes": peak_bytes(),
            "peak_reset": reset,
        }

    def block(
        self, runs: int = 0, min_ms: float = 0.0, start: int = 0, cpu: int | None = None
    ) -> dict[str, Any]:
        """Time single inferences: ``runs`` of them, or as many as fill ``min_ms`` (at least one).

        The first takes feed number ``start`` (modulo their number), the next the one after it. With
        ``cpu`` the calling thread stays on that processor meanwhile, if the system lets it.
        """
        allowed = pin(cpu) if cpu is not None else None
        try:
            return {"ns": self._times(runs, min_ms, start), "cpu": this_cpu()}
        finally:
            if allowed is not None:
                os.sched_setaffinity(0, allowed)

    def stats(self) -> dict[str, Any]:
        """Return the peak of resident memory so far, and what it was before the model came."""
        return {"baseline_bytes": self._baseline, "peak_bytes": peak_bytes()}

    def _times(self, runs: int, min_ms: float, start: int) -> list[int]:
        if self._session is None:
            raise Refusal("command", "no model is loaded")
        run, feeds, clock = self._session.run, self._feeds, time.perf_counter_ns
        count = len(feeds)
        limit = runs if runs > 0 else _MAX_RUNS
        times: list[int] = []
        collecting = gc.isenabled()
        gc.disable()
        try:
            end = clock() + int(min_ms * 1e6)
            for i in range(limit):
                feed = feeds[(start + i) % count]
                begin = clock()
                run(None, feed)
                now = clock()
                times.append(now - begin)
                if runs <= 0 and now >= end:
                    break
        except Exception as e:
            raise Refusal("run", str(e)) from e
        finally:
            if collecting:
                gc.enable()
        return times
