"""A session that writes down the time of every kernel, and what ONNX Runtime made of the graph."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from effdl.runtime.worker.refusal import Refusal
from effdl.runtime.worker.session import session_options

_KERNEL = "_kernel_time"
_OWNERS = ("If", "Loop", "Scan")
"""The time of these has that of running their bodies in it."""
_BODY = "SequentialExecutor::Execute"
"""One run of a graph: the model's, or a body's."""
_INLINE_BYTES = "1024"
_PROBE_RUNS = 100
_WEIGHTS = ".data"

if TYPE_CHECKING:
    Event = dict[str, Any]


def open_traced(
    model: str, providers: list[str], threads: int, graph: str, prefix: str
) -> tuple[ort.InferenceSession, str]:
    """Open a profiling session; returns it and why the graph could not be written, empty if it was.

    Args:
        graph: file that gets the graph as it will be run, without its larger weights.
        prefix: of the name of the profile.
    """
    if providers[0] != "CPUExecutionProvider":
        # Kernels of a GPU are started and left running; the profiler sees only the start, unless each
        # is waited for. Read when CUDA starts, so this process must not have used it before.
        os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    why = ""
    for target in (graph, ""):
        options = session_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = prefix
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if target:
            options.optimized_model_filepath = target
            name = "session.optimized_model_external_initializers"
            weights = os.path.basename(target) + _WEIGHTS
            options.add_session_config_entry(name + "_file_name", weights)
            options.add_session_config_entry(name + "_min_size_in_bytes", _INLINE_BYTES)
        try:
            session = ort.InferenceSession(model, options, providers=providers)
        except Exception as e:
            if not target:
                raise Refusal("load", str(e)) from e
            why = str(e)  # nodes that a provider compiled cannot be written
        else:
            if os.path.exists(graph + _WEIGHTS):  # as large as the model, and nobody reads it
                os.remove(graph + _WEIGHTS)
            return session, why
    raise AssertionError("the loop returns or raises")


def event_cost(model: str, prefix: str) -> float:
    """Return the microseconds by which the profiler overstates the time of a kernel.

    It writes down shapes and memory before it stops the clock, which takes longer than many kernels
    do, and drops fractions of a microsecond. Found from a chain of kernels that do next to nothing:
    what the profiler says of one, less the time that one takes without it.

    Args:
        model: such a chain, with one input ``x`` of one float.
        prefix: of the name of the profile.
    """
    feed = {"x": np.zeros(1, np.float32)}
    walls: list[int] = []
    options = session_options(1)
    plain = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    options = session_options(1)
    options.enable_profiling = True
    options.profile_file_prefix = prefix
    traced = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    for _ in range(_PROBE_RUNS):
        begin = time.perf_counter_ns()
        plain.run(None, feed)
        walls.append(time.perf_counter_ns() - begin)
        traced.run(None, feed)
    path = traced.end_profiling()
    try:
        told = read_profile(path, _PROBE_RUNS // 2, True)["nodes"]
    finally:
        os.remove(path)
    mean = float(sum(row["ms"] for row in told)) * 1000 / len(told)
    return max(0.0, mean - sorted(walls)[_PROBE_RUNS // 4] / 1000 / len(told))


def assigned(session: ort.InferenceSession) -> list[dict[str, Any]]:
    """Return the parts of the graph with their provider; empty where this version does not tell."""
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    if tell is None:
        return []
    return [
        {"provider": p.ep_name, "nodes": [[n.name, n.op_type, n.domain] for n in p.get_nodes()]}
        for p in tell()
    ]


def read_profile(path: str, skip: int, trim: bool) -> dict[str, Any]:
    """Return mean kernel times of the runs after the first ``skip``, in order of execution.

    Args:
        trim: leave out the fourth of the runs with the smallest total, and that with the largest.
    """
    events: list[Event] = json.loads(Path(path).read_text(encoding="utf-8", errors="replace"))
    kernels = [e for e in events if _is_kernel(e) or e["name"] == _BODY]
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")
    parts = _by_run(sorted(kernels, key=_nesting), runs)[skip:]
    parts = [p for p in parts if any(_is_kernel(e) for e in p)]
    if not parts:
        raise Refusal("run", "ONNX Runtime wrote no kernel times")
    timed = [list(zip(part, _own_times(part))) for part in parts]  # noqa: B905 (py3.8)
    if trim and len(timed) >= 4:
        timed.sort(key=lambda part: sum(us for event, us in part if _is_kernel(event)))
        quarter = len(timed) // 4
        timed = timed[quarter : len(timed) - quarter]
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for part in timed:
        for event, us in part:
            if not _is_kernel(event):
                continue
            row = rows.setdefault(_key(event), _row(event))
            row["ms"] += us / 1000 / len(timed)
            row["calls"] += 1 / len(timed)
    return {"nodes": list(rows.values()), "runs": len(timed)}


def _is_kernel(event: Event) -> bool:
    return event.get("cat") == "Node" and bool(event["name"].endswith(_KERNEL))


def _is_owner(event: Event) -> bool:
    return event["args"].get("op_name") in _OWNERS


def _nesting(event: Event) -> tuple[int, int, int]:
    """Order by time; who holds others comes before them."""
    rank = 0 if _is_owner(event) else 2 if _is_kernel(event) else 1
    return event["ts"], -event["dur"], rank


def _by_run(kernels: list[Event], runs: list[tuple[int, int]]) -> list[list[Event]]:
    parts: list[list[Event]] = [[] for _ in runs]
    k = 0
    for event in kernels:
        while k < len(runs) and event["ts"] >= runs[k][1]:
            k += 1
        if k < len(runs) and event["ts"] >= runs[k][0]:
            parts[k].append(event)
    return parts


def _own_times(events: list[Event]) -> list[float]:
    """Return the microseconds of each event, those of an If, Loop or Scan without its bodies'."""
    own = [float(e["dur"]) for e in events]
    open_: dict[int, list[int]] = {}
    for k, event in enumerate(events):
        stack = open_.setdefault(event["tid"], [])
        while stack and event["ts"] >= events[stack[-1]]["ts"] + events[stack[-1]]["dur"]:
            stack.pop()
        if stack and _is_owner(events[stack[-1]]):
            own[stack[-1]] -= event["dur"]
        if _is_owner(event) or not _is_kernel(event):
            stack.append(k)
    return [max(us, 0.0) for us in own]


def _key(event: Event) -> tuple[str, str, str]:
    args = event["args"]
    return event["name"], str(args.get("op_name", "")), str(args.get("node_index", ""))


def _row(event: Event) -> dict[str, Any]:
    args = event["args"]
    return {
        "name": event["name"][: -len(_KERNEL)],
        "op_type": str(args.get("op_name", "")),
        "index": str(args.get("node_index", "")),
        "provider": str(args.get("provider", "")),
        "shape": _shape(args.get("output_type_shape") or []),
        "ms": 0.0,
        "calls": 0.0,
    }


def _shape(outputs: list[dict[str, list[int]]]) -> str:
    for output in outputs[:1]:
        for dtype, dims in output.items():
            return f"{dtype}[{','.join(str(d) for d in dims)}]"
    return ""
