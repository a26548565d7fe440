"""The measured session and the feeds it takes."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is loaded

import numpy as np
import onnxruntime as ort

from effdl.runtime.worker.refusal import Refusal

Feed = dict[str, np.ndarray[Any, Any]]
_FATAL = 4
_NUMPY = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
}


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


def read_feeds(files: list[dict[str, Any]]) -> list[Feed]:
    """Read feeds, one .npz each: its arrays arr_0, arr_1... belong to ``names`` in order."""
    feeds = []
    for file in files:
        with np.load(file["path"], allow_pickle=False) as data:
            feeds.append({n: data[f"arr_{i}"] for i, n in enumerate(file["names"])})
    return feeds


def fit_feeds(session: ort.InferenceSession, feeds: list[Feed]) -> list[str]:
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
