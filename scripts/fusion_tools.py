"""One job of ``compare_fusions.py`` in a process of its own: a tool on a model, or the judge of a result.

    python scripts/fusion_tools.py TOOL JOB      (JOB is JSON; one line of JSON comes out)

So a tool's crash, its caches and what it does to logging stay with it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import effdl

# isort: split
import numpy as np
import onnx
import onnxruntime as ort

Job = dict[str, Any]
ATTENTION = (
    "Attention",
    "MultiHeadAttention",
    "GroupQueryAttention",
    "PackedAttention",
    "PackedMultiHeadAttention",
    "DecoderMaskedMultiHeadAttention",
)


def run_effdl(job: Job) -> Job:
    """effdl with a preset or recipe, its gate on, as ``effdl optimize`` does it."""
    seconds = 0 if job["gate"] == "off" else 3
    options = effdl.RunOptions(
        threads=job["threads"], gate=job["gate"], bench_seconds=seconds, dims=job["dims"]
    )
    report = effdl.optimize(job["model"], job["recipe"], job["out"], options=options)
    kept = [p for p in report.passes if p.status == "changed"]
    return {"passes": {p.name: p.changes for p in kept}}


def run_transformers(job: Job) -> Job:
    """onnxruntime.transformers.optimizer with the model's own type and sizes and its default level."""
    from onnxruntime.transformers import optimizer

    sizes = (
        (0, 0) if job["family"] == "swin" else (job["heads"], job["hidden"])
    )  # they vary: found by it
    made = optimizer.optimize_model(
        job["model"], model_type=job["family"], num_heads=sizes[0], hidden_size=sizes[1]
    )
    made.save_model_to_file(job["out"])
    return {"fusions": {k: v for k, v in made.get_fused_operator_statistics().items() if v}}


def run_onnxscript(job: Job) -> Job:
    """optimize_for_ort of onnxscript."""
    import onnx_ir as ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    made, fusions = optimize_for_ort(ir.load(job["model"]))
    ir.save(made, job["out"])
    return {"fusions": {k: v for k, v in fusions.items() if v}}


def judge(job: Job) -> Job:
    """Attention nodes of a result, and its largest relative error against the untouched model by feed."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    before = ort.InferenceSession(job["model"], options)
    after = ort.InferenceSession(job["out"], options)
    graph = onnx.load(job["out"], load_external_data=False)
    nodes = [*graph.graph.node, *(n for f in graph.functions for n in f.node)]
    errors: list[float] = []
    for file in job["feeds"]:
        feed = typed(file, before)
        wanted = before.run(None, feed)
        names = {i.name for i in after.get_inputs()}
        got = after.run(None, {k: v for k, v in feed.items() if k in names})
        errors.append(max(relative(g, w) for g, w in zip(got, wanted, strict=True)))
    return {
        "attention": sum(n.op_type in ATTENTION for n in nodes),
        "nodes": len(graph.graph.node),
        "errors": errors,
    }


def typed(file: str, session: ort.InferenceSession) -> dict[str, np.ndarray]:
    """The arrays of a file in the types that a session takes."""
    kinds = {i.name: np.int32 if "int32" in i.type else None for i in session.get_inputs()}
    with np.load(file, allow_pickle=False) as arrays:
        return {k: arrays[k].astype(t or arrays[k].dtype) for k, t in kinds.items()}


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over the largest value; infinite where shape, NaN or infinity differ."""
    if got.shape != wanted.shape or (np.isfinite(got) != np.isfinite(wanted)).any():
        return float("inf")
    got, wanted = (np.where(np.isfinite(a), a, 0) for a in (got, wanted))
    return float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-12))


TOOLS: dict[str, Callable[[Job], Job]] = {
    "effdl": run_effdl,
    "transformers": run_transformers,
    "onnxscript": run_onnxscript,
    "judge": judge,
}


def main() -> None:
    job = json.loads(sys.argv[2])
    out = os.dup(1)
    os.dup2(2, 1)  # what a tool prints is talk
    start = time.perf_counter()
    told = TOOLS[sys.argv[1]](job)
    told["seconds"] = round(time.perf_counter() - start, 2)
    if "out" in job:
        told["bytes"] = Path(job["out"]).stat().st_size
    os.write(out, json.dumps(told).encode())


if __name__ == "__main__":
    main()
