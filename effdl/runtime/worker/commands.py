"""The commands of a worker: each public method is one, see ``effdl.runtime.worker``."""

from __future__ import annotations

import gc
import os
import platform
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from effdl.runtime.machine import this_machine
from effdl.runtime.worker import files
from effdl.runtime.worker.binding import Bound, check_graph_feeds, why_not_bound
from effdl.runtime.worker.energy import POWERCAP, Meter, open_meter
from effdl.runtime.worker.nvml import Nvml, open_nvml
from effdl.runtime.worker.process import cache_bytes, peak_bytes, pin, reset_peak, this_cpu
from effdl.runtime.worker.refusal import Refusal
from effdl.runtime.worker.running import run_model
from effdl.runtime.worker.session import GPU, fallback, fit_feeds, open_on, read_feeds
from effdl.runtime.worker.tracing import assigned, event_cost, open_traced, read_profile

if TYPE_CHECKING:
    from collections.abc import Callable

    from effdl.runtime.worker.session import Feed

_MAX_RUNS = 1_000_000


class Worker:
    """The state between commands: a session and its feeds."""

    def __init__(self) -> None:
        self._session: ort.InferenceSession | None = None
        self._feeds: list[Feed] = []
        self._runs: list[Callable[[], Any]] = []  # one per feed
        self._baseline = 0
        self._meter = Meter(None, "no model is loaded")
        self._nvml: Nvml | None = None
        self._device_before: int | None = None

    def hello(self) -> dict[str, Any]:
        """Say what this process is."""
        return {
            "pid": os.getpid(),
            "python": platform.python_version(),
            "onnxruntime": ort.__version__,
            "numpy": np.__version__,
            "providers": ort.get_available_providers(),
            "machine": asdict(this_machine()),
            "cache_bytes": cache_bytes(),
            "system": f"{platform.system()} {platform.release()}",
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        }

    def run(
        self,
        model: str,
        providers: list[str],
        threads: int,
        feeds: list[dict[str, Any]],
        output: str,
        optimize: bool = True,
    ) -> dict[str, Any]:
        """Run every feed once and write the outputs to a file, see ``worker.running``."""
        return run_model(model, providers, threads, feeds, output, optimize)

    def room(self, path: str) -> dict[str, int]:
        """Return the free bytes of disk (where ``path`` is) and memory."""
        return files.room(path)

    def digest(self, path: str) -> dict[str, str]:
        """Return the SHA-256 of a file."""
        return files.digest(path)

    def place(self, source: str, goal: str) -> dict[str, str]:
        """Give a file a second name."""
        return files.place(source, goal)

    def remove(self, path: str) -> dict[str, str]:
        """Remove a file or a folder."""
        return files.remove(path)

    def load(
        self,
        model: str,
        providers: list[str],
        threads: int,
        feeds: list[dict[str, Any]],
        bind: str | None = None,
        cuda_graph: bool = False,
        powercap: str = POWERCAP,
    ) -> dict[str, Any]:
        """Open the model on the first of ``providers``, or nowhere, and run it once.

        On a GPU, or with ``bind``, inputs are copied to the device here and outputs stay there.
        """
        self._feeds = read_feeds(feeds)
        gpu = providers[0] in GPU
        self._nvml = open_nvml() if gpu else None
        self._device_before = self._nvml.used_bytes() if self._nvml else None
        gc.collect()
        reset = reset_peak()
        self._baseline = peak_bytes()
        begin = time.perf_counter_ns()
        try:
            self._session = open_on(model, providers, threads, cuda_graph)
        except Exception as e:
            raise Refusal("load", str(e)) from e
        loaded = time.perf_counter_ns()
        actual = self._session.get_providers()
        if actual[0] != providers[0]:
            raise Refusal(
                "provider", f"asked for {providers[0]}, but the session runs on {actual[0]}"
            )
        casts = fit_feeds(self._session, self._feeds)
        unbound = self._bind(self._session, bind or ("cuda" if gpu else None), cuda_graph)
        self._meter = open_meter(gpu, self._nvml, powercap)
        first = self._times(1, 0.0, 0)[0]
        return {
            "load_ms": (loaded - begin) / 1e6,
            "first_ms": first / 1e6,
            "providers": actual,
            "casts": casts,
            "baseline_bytes": self._baseline,
            "peak_bytes": peak_bytes(),
            "peak_reset": reset,
            "unbound": unbound,
            "fallback": fallback(self._session, actual[0]) if gpu else {},
        }

    def block(
        self, runs: int = 0, min_ms: float = 0.0, start: int = 0, cpu: int | None = None
    ) -> dict[str, Any]:
        """Time single inferences: ``runs`` of them, or as many as fill ``min_ms`` (at least one).

        The first takes feed number ``start`` (modulo their number), the next the one after it. With
        ``cpu`` the calling thread stays on that processor meanwhile, if the system lets it. Energy is
        counted over blocks of ``runs``; those that fill a time are warm-up.
        """
        allowed = pin(cpu) if cpu is not None else None
        try:
            if runs > 0:
                self._meter.begin()
            times = self._times(runs, min_ms, start)
            if runs > 0:
                self._meter.end(runs)
            return {"ns": times, "cpu": this_cpu()}
        finally:
            if allowed is not None:
                os.sched_setaffinity(0, allowed)

    def trace(
        self,
        model: str,
        providers: list[str],
        threads: int,
        feeds: list[dict[str, Any]],
        graph: str,
        prefix: str,
        probe: str,
    ) -> dict[str, Any]:
        """Open the model in a session that profiles; ``block`` then runs it, ``traced`` ends it.

        The graph as it will be run goes into the file ``graph``, the profile into ``prefix...``. What
        profiling itself costs is found with the model ``probe``, see ``tracing.event_cost``.
        """
        event_us = event_cost(probe, prefix)
        self._feeds = read_feeds(feeds)
        self._session, why = open_traced(model, providers, threads, graph, prefix)
        fit_feeds(self._session, self._feeds)
        self._bind(self._session, None, False)
        return {
            "graph": "" if why else graph,
            "why": why,
            "providers": self._session.get_providers(),
            "assigned": assigned(self._session),
            "event_us": event_us,
        }

    def traced(self, skip: int = 0, trim: bool = True) -> dict[str, Any]:
        """End profiling; return the mean time of every kernel over the runs after ``skip``."""
        if self._session is None:
            raise Refusal("command", "no model is loaded")
        path = self._session.end_profiling()
        self._session = None
        try:
            return read_profile(path, skip, trim)
        finally:
            os.remove(path)

    def stats(self) -> dict[str, Any]:
        """Return the peak of resident memory so far, and what it was before the model came.

        ``device_bytes`` is what this process has on the GPU, or else what the GPU's memory grew by
        since before the model came; ``energy_mj`` that of one inference, ``energy`` its source or why
        there is none.
        """
        return {
            "baseline_bytes": self._baseline,
            "peak_bytes": peak_bytes(),
            "device_bytes": self._device_bytes(),
            "energy_mj": self._meter.millijoule,
            "energy": self._meter.note,
        }

    def _bind(self, session: ort.InferenceSession, device: str | None, cuda_graph: bool) -> str:
        """Make what runs each feed; returns why data is copied in every run, if it is."""
        if cuda_graph:
            check_graph_feeds(session, self._feeds)
        why = why_not_bound(session) if device is not None else ""
        try:
            if device is None or why:
                self._runs = [partial(session.run, None, feed) for feed in self._feeds]
            else:
                self._runs = [Bound(session, feed, device, cuda_graph) for feed in self._feeds]
        except Exception as e:  # mostly: not enough memory on the device
            raise Refusal("run", str(e)) from e
        return why

    def _device_bytes(self) -> int | None:
        if self._nvml is None:
            return None
        mine = self._nvml.process_bytes(os.getpid())
        now = self._nvml.used_bytes()
        if mine is not None or now is None or self._device_before is None:
            return mine
        return max(0, now - self._device_before)

    def _times(self, runs: int, min_ms: float, start: int) -> list[int]:
        if self._session is None:
            raise Refusal("command", "no model is loaded")
        calls, clock = self._runs, time.perf_counter_ns
        count = len(calls)
        limit = runs if runs > 0 else _MAX_RUNS
        times: list[int] = []
        collecting = gc.isenabled()
        gc.disable()
        try:
            end = clock() + int(min_ms * 1e6)
            for i in range(limit):
                run = calls[(start + i) % count]
                begin = clock()
                run()
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
