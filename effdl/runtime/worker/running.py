"""One run of a model over feeds, with its outputs written to a file: for right or wrong, not for time."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime as ort

from effdl.runtime.worker.refusal import Refusal
from effdl.runtime.worker.session import fit_feeds, read_feeds, session_options

_STRUCTURE = "structure"


def run_model(
    model: str,
    providers: list[str],
    threads: int,
    feeds: list[dict[str, Any]],
    output: str,
    optimize: bool,
) -> dict[str, Any]:
    """Run every feed and write all outputs to ``output``; see ``pack`` for the form.

    Args:
        model: the file.
        providers: most wanted first; the session opens on the first or not at all.
        threads: intra-op threads.
        feeds: as ``session.read_feeds`` takes them.
        output: an ``.npz``.
        optimize: ORT_ENABLE_ALL; False for the graph as it is written.
    """
    loaded = read_feeds(feeds)
    options = session_options(threads)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(model, options, providers=providers)
    except Exception as e:
        raise Refusal("load", str(e)) from e
    got = session.get_providers()[0]
    if got != providers[0]:
        raise Refusal("provider", f"asked for {providers[0]}, but the session runs on {got}")
    casts = fit_feeds(session, loaded)
    names = [p.name for p in session.get_outputs()]
    try:
        runs = [dict(zip(names, session.run(None, feed))) for feed in loaded]  # noqa: B905 (py3.8)
    except Exception as e:
        raise Refusal("run", str(e)) from e
    try:
        pack(runs, output)
    except OSError as e:
        raise Refusal("file", f"outputs cannot be written there: {e.strerror or e}") from e
    return {"providers": session.get_providers(), "casts": casts, "runs": len(runs)}


def pack(runs: list[dict[str, Any]], output: str) -> None:
    """Write runs to an ``.npz``: every array numbered, and ``structure``, JSON that says which is what.

    Outputs may be arrays, lists, maps of numbers, or None; ``unpack`` gives them back.
    """
    arrays: list[Any] = []
    structure = [[[name, _node(value, arrays)] for name, value in run.items()] for run in runs]
    named: dict[str, Any] = {f"arr_{k}": array for k, array in enumerate(arrays)}
    named[_STRUCTURE] = np.frombuffer(json.dumps(structure).encode(), np.uint8)
    with open(output, "wb") as f:
        np.savez(f, **named)


def unpack(path: str) -> list[dict[str, Any]]:
    """Read what ``pack`` wrote: one mapping from output name to value per run, in the model's order."""
    with np.load(path, allow_pickle=False) as data:
        structure = json.loads(data[_STRUCTURE].tobytes())
        return [{name: _value(node, data) for name, node in run} for run in structure]


def _node(value: Any, arrays: list[Any]) -> dict[str, Any]:
    if value is None:
        return {"none": True}
    if isinstance(value, dict):
        return {"map": [[k, _node(v, arrays)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_node(v, arrays) for v in value]}
    if isinstance(value, (int, float, str)):
        return {"plain": value}
    array = np.asarray(value)
    texts = array.dtype.kind in "OU"
    arrays.append(array.astype(np.str_) if texts else array)
    return {"array": len(arrays) - 1, "texts": texts}


def _value(node: dict[str, Any], data: Any) -> Any:
    if "none" in node:
        return None
    if "map" in node:
        return {k: _value(v, data) for k, v in node["map"]}
    if "list" in node:
        return [_value(v, data) for v in node["list"]]
    if "plain" in node:
        return node["plain"]
    array = data[f"arr_{node['array']}"]
    return array.astype(object) if node["texts"] else array
