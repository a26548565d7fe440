"""One run of a model over feeds, with its outputs written to a file: for right or wrong, not for time."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort

from effdl.runtime.worker.outputs import pack
from effdl.runtime.worker.refusal import Refusal
from effdl.runtime.worker.session import fit_feeds, read_feeds, session_options


def run_model(
    model: str,
    providers: list[str],
    threads: int,
    feeds: list[dict[str, Any]],
    output: str,
    optimize: bool,
) -> dict[str, Any]:
    """Run every feed and write all outputs to ``output``; see ``worker.outputs`` for the form.

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
