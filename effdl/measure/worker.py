"""One model in one fresh process, timed on request: JSON lines on stdin, JSON lines on stdout.

Run as ``python worker.py``. The file stands alone (standard library, numpy, onnxruntime), so that it
can be sent to another machine. Commands, each one line with the key ``do``:

    hello                                       versions, process id, available providers
    load   model, providers, threads, feeds     opens the session and runs the first feed once
    block  runs or min_ms, start, cpu           times of single inferences in ns
    stats                                       peak resident memory
    quit

A refusal is ``{"error": KIND, "message": ...}`` with KIND one of ``command``, ``provider``, ``load``,
``input``, ``run``. The process ends when stdin does, so it never outlives whoever started it.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import time
from typing import Any, Callable  # noqa: UP035 (older Pythons)

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is loaded

import numpy as np
import onnxruntime as ort

_FATAL = 4
_MAX_RUNS = 1_000_000
_NUMPY = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
}


class Refusal(Exception):
    """An answer that is no result; ``kind`` as in the file's first lines."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def reset_peak() -> bool:
    """Make the peak of resident memory start again at what is resident now (Linux only)."""
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Return the peak of resident memory in bytes, 0 where the system does not tell."""
    try:
        with open("/proc/self/status") as f:
            for line in f:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # no /proc: macOS and Windows
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def this_cpu() -> int | None:
    """Return the number of the processor this thread runs on, None where that is not told."""
    try:
        with open("/proc/self/stat") as f:
            return int(f.read().rsplit(")", 1)[1].split()[36])
    except OSError:
        return None


def session_options(threads: int) -> ort.SessionOptions:
    """Return the options of every measured session; ``threads`` 0 is ONNX Runtime's own choice."""
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Pool threads spin between the operators of a run, as by default, but sleep as soon as the run
    # returns. Without the second key they go on spinning, on the core of the model whose turn is next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def pin(cpu: int) -> set[int] | None:
    """Keep this thread on one processor; returns where it could run before, None if not pinned."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    allowed = os.sched_getaffinity(0)
    if cpu not in allowed:
        return None
    os.sched_setaffinity(0, {cpu})
    return allowed


def read_feeds(files: list[dict[str, Any]]) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Read feeds, one .npz each: its arrays arr_0, arr_1... belong to ``names`` in order."""
    feeds = []
    for file in files:
        with np.load(file["path"], allow_pickle=False) as data:
            feeds.append({n: data[f"arr_{i}"] for i, n in enumerate(file["names"])})
    return feeds


def fit_feeds(
    session: ort.InferenceSession, feeds: list[dict[str, np.ndarray[Any, Any]]]
) -> list[str]:
    """Cast floats to the precision the model takes, in place in ``feeds``; returns what was cast."""
    ports = {p.name: p for p in session.get_inputs()}
    casts = {}
    for feed in feeds:
        for name in feed:
            if name not in ports:
                raise Refusal("input", f"it has no input '{name}' (inputs: {', '.join(ports)})")
        for name, port in ports.items():
            if name not in feed:
                raise Refusal("input", f"nothing is given for its input '{name}'")
            array = feed[name]
            if not _fits(array.shape, port.shape):
                shape = ", ".join("?" if d is None else str(d) for d in port.shape)
                raise Refusal(
                    "input",
                    f"its input '{name}' has shape [{shape}], given is {list(array.shape)}",
                )
            wanted = _NUMPY.get(port.type, port.type[7:-1])
            given = "string" if array.dtype.kind in "OU" else array.dtype.name
            if given == wanted:
                continue
            if not (given.startswith("float") and wanted in ("float16", "float32", "float64")):
                raise Refusal("input", f"its input '{name}' takes {wanted}, given is {given}")
            feed[name] = array.astype(wanted)
            casts[name] = f"input '{name}' cast from {given} to {wanted}"
    return list(casts.values())


def _fits(given: tuple[int, ...], wanted: list[Any]) -> bool:
    if len(given) != len(wanted):
        return False
    return all(g == w for g, w in zip(given, wanted) if isinstance(w, int))  # noqa: B905 (py3.8)


class Worker:
    """The state between commands: a session and its feeds."""

    def __init__(self) -> None:
        self.session: ort.InferenceSession | None = None
        self.feeds: list[dict[str, np.ndarray[Any, Any]]] = []
        self.baseline = 0

    def hello(self) -> dict[str, Any]:
        """Say what this process is."""
        return {
            "pid": os.getpid(),
            "python": platform.python_version(),
            "onnxruntime": ort.__version__,
            "numpy": np.__version__,
            "machine": platform.machine(),
            "providers": ort.get_available_providers(),
        }

    def load(
        self, model: str, providers: list[str], threads: int, feeds: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Open the model on the first of ``providers``, or nowhere, and run it once."""
        self.feeds = read_feeds(feeds)
        gc.collect()
        reset = reset_peak()
        self.baseline = peak_bytes()
        begin = time.perf_counter_ns()
        try:
            self.session = ort.InferenceSession(
                model, session_options(threads), providers=providers
            )
        except Exception as e:
            raise Refusal("load", str(e)) from e
        loaded = time.perf_counter_ns()
        actual = self.session.get_providers()
        if actual[0] != providers[0]:
            raise Refusal(
                "provider", f"asked for {providers[0]}, but the session runs on {actual[0]}"
            )
        casts = fit_feeds(self.session, self.feeds)
        first = self._times(1, 0.0, 0)[0]
        return {
            "load_ms": (loaded - begin) / 1e6,
            "first_ms": first / 1e6,
            "providers": actual,
            "casts": casts,
            "baseline_bytes": self.baseline,
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
        return {"baseline_bytes": self.baseline, "peak_bytes": peak_bytes()}

    def _times(self, runs: int, min_ms: float, start: int) -> list[int]:
        if self.session is None:
            raise Refusal("command", "no model is loaded")
        run, feeds, clock = self.session.run, self.feeds, time.perf_counter_ns
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


def answer(worker: Worker, line: str) -> dict[str, Any]:
    """Carry out one command; a refusal becomes an answer too."""
    try:
        options = json.loads(line)
        name = options.pop("do", "")
        commands: dict[str, Callable[..., dict[str, Any]]] = {
            "hello": worker.hello,
            "load": worker.load,
            "block": worker.block,
            "stats": worker.stats,
        }
        if name not in commands:
            raise Refusal("command", f"unknown command {name!r}")
        return commands[name](**options)
    except Refusal as e:
        return {"error": e.kind, "message": str(e)}
    except MemoryError:
        return {"error": "run", "message": "out of memory"}


def main() -> None:
    """Serve until ``quit`` or the end of stdin."""
    # Only answers may reach stdout: what libraries print there goes to stderr instead.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        worker = Worker()
        for line in sys.stdin:
            if not line.strip():
                continue
            if json.loads(line).get("do") == "quit":
                return
            replies.write(json.dumps(answer(worker, line)) + "\n")
            replies.flush()


if __name__ == "__main__":
    main()
