"""The measured session and the feeds it takes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is loaded

import numpy as np
import onnxruntime as ort

from effdl.runtime.worker.refusal import Refusal

if TYPE_CHECKING:
    Feed = dict[str, np.ndarray[Any, Any]]
CPU = "CPUExecutionProvider"
GPU = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
_ASSIGNMENT = "session.record_ep_graph_assignment_info"
_FATAL = 4
_FLOATS = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
}
NUMPY = {f"tensor({s}int{b})": f"{s}int{b}" for s in ("", "u") for b in (8, 16, 32, 64)}
"""The numpy type of each ONNX Runtime type that an array can hold, strings left out."""
NUMPY.update(_FLOATS)


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


def open_on(
    model: str, providers: list[str], threads: int, cuda_graph: bool = False
) -> ort.InferenceSession:
    """Open a model on the first of ``providers``; whether it did, the caller checks.

    Args:
        model: the file.
        providers: most wanted first.
        threads: intra-op threads.
        cuda_graph: record the GPU's work once and replay it, see ``worker.binding``.
    """
    options = session_options(threads)
    wanted: list[Any] = list(providers)
    if providers[0] != CPU:
        options.add_session_config_entry(_ASSIGNMENT, "1")
    if cuda_graph:
        key = (
            "trt_cuda_graph_enable" if providers[0].startswith("Tensorrt") else "enable_cuda_graph"
        )
        wanted[0] = (providers[0], {key: "1"})
    return ort.InferenceSession(model, options, providers=wanted)


def fallback(session: ort.InferenceSession, wanted: str) -> dict[str, dict[str, int]]:
    """Count the nodes that other providers than ``wanted`` run: by provider, then by op type.

    Empty also where ONNX Runtime is too old to tell. The session must have been opened to record it.
    """
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    found: dict[str, dict[str, int]] = {}
    for part in ask() if ask is not None else ():
        if part.ep_name != wanted:
            ops = found.setdefault(part.ep_name, {})
            for node in part.get_nodes():
                ops[node.op_type] = ops.get(node.op_type, 0) + 1
    return found


def read_feeds(files: list[dict[str, Any]]) -> list[Feed]:
    """Read feeds, one .npz each: its arrays arr_0, arr_1... belong to ``names`` in order.

    Where ``make`` stands in place of ``path`` the arrays are made here: each has a ``shape`` and a
    ``dtype``, and holds small numbers that repeat.
    """
    feeds = []
    for file in files:
        if "make" in file:
            feeds.append({n: _made(**m) for n, m in zip(file["names"], file["make"])})  # noqa: B905
            continue
        with np.load(file["path"], allow_pickle=False) as data:
            feeds.append({n: data[f"arr_{i}"] for i, n in enumerate(file["names"])})
    return feeds


def _made(shape: list[int], dtype: str) -> np.ndarray[Any, Any]:
    """Numbers between -1 and 1, or from 0 to 126: what they are does not change the time of a product."""
    kind = np.dtype(dtype)
    block = np.random.default_rng(0).integers(0, 127, 4093)
    if kind.kind == "f":
        block = block / 63 - 1  # type: ignore[assignment]
    return np.resize(block.astype(kind), shape)


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
            wanted = _FLOATS.get(port.type, port.type[7:-1])
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
