"""effdl beside other quantizers for ONNX Runtime on real models: speed, accuracy, size; docs/quantizers.md.

    EFFDL_SHARED=... python scripts/compare_quantizers.py [--minilm FILE] [--only NAME ...] [--write FILE]

Every tool works in a process of its own on the same calibration data. The untouched model and all results
are then timed in one interleaved run (``effdl bench``: ORT_ENABLE_ALL, fresh processes, an interval), and
each is scored on samples that no tool has seen. Needs pillow and tokenizers; NNCF and onnxsim where they
are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import effdl  # noqa: F401  (before onnxruntime: switches its telemetry off)

# isort: split
import numpy as np
import onnxruntime as ort
from jobs import ask
from real_models import Row, rows
from sections import with_section

from effdl import api
from effdl.runtime.target import parse_target

TOOL_SCRIPT = Path(__file__).parent / "quantizer_tools.py"
TOOLS = ("effdl", "ort_minmax", "ort_entropy", "ort_percentile", "ort_dynamic", "nncf", "onnxsim")
TITLES = {
    "effdl": "effdl",
    "ort_minmax": "static minmax",
    "ort_entropy": "static entropy",
    "ort_percentile": "static percentile",
    "ort_dynamic": "dynamic",
    "nncf": "NNCF",
    "onnxsim": "onnxsim",
}
LIMIT = 900
"""Seconds that a tool may take for a model."""
Result = dict[str, Any]


def measured(row: Row, tools: Sequence[str], args: argparse.Namespace) -> Result:
    """All tools on one model."""
    with tempfile.TemporaryDirectory(prefix="effdl-quantizers-") as name:
        folder = Path(name)
        np.savez(folder / "data.npz", **row.calibration)
        np.savez(folder / "timing.npz", **row.timing)
        found: dict[str, Result] = {}
        for tool in tools:
            place = folder / tool
            place.mkdir()
            job = {
                "model": str(row.model),
                "out": str(place / "model.onnx"),
                "data": str(folder / "data.npz"),
                "batch": row.batch,
                "preset": row.preset,
                "threads": args.threads,
                "gate": args.gate,
                "reduce_range": not parse_target("cpu").int8_dot,
            }
            told = ask(TOOL_SCRIPT, tool, job, LIMIT)
            if "failed" not in told:
                try:
                    told["score"] = row.score(Path(job["out"]))
                    told["path"] = job["out"]
                except Exception as e:  # ONNX Runtime raises half a dozen unrelated classes
                    told = {"failed": f"does not run: {str(e)[:120]}"}
            found[tool] = told
        ready = [t for t in tools if "path" in found[t]]
        report = api.bench(
            row.model,
            *(found[t]["path"] for t in ready),
            data=folder / "timing.npz",
            threads=args.threads,
            seconds=args.seconds,
        )
        for tool, model in zip(ready, report.models[1:], strict=True):
            found[tool] |= {"ratio": model.ratio, "ci": model.ci, "verdict": model.verdict}
        return {
            "model": row.name,
            "metric": row.metric,
            "higher": row.higher,
            "ms": report.models[0].latency.median,
            "score": row.score(row.model),
            "bytes": row.model.stat().st_size,
            "cpu": report.cpu,
            "tools": found,
        }


def cell(result: Result, base: Result) -> str:
    """Speed, score and size of one result."""
    if "failed" in result:
        return "failed"
    half = (result["ci"][1] - result["ci"][0]) / 2
    share = result["bytes"] / base["bytes"]
    return f"{result['ratio']:.2f}±{half:.2f} {result['score']:.4f} {share:.2f}"


def page(results: Sequence[Result], tools: Sequence[str], threads: int) -> str:
    """The table of docs/quantizers.md and what stands below it."""
    lines = [
        f"Measured on {results[0]['cpu']}, ONNX Runtime {ort.__version__}, {threads} "
        f"thread{'s' if threads > 1 else ''}. A cell is: times as fast as the untouched model with its "
        "95 % interval, score, share of the file.",
        "",
        "| model | untouched | score | " + " | ".join(TITLES[t] for t in tools) + " |",
        "|---|---|---|" + "---|" * len(tools),
    ]
    failed: dict[str, list[str]] = {}
    for r in results:
        cells = [cell(r["tools"][t], r) for t in tools]
        head = [r["model"], f"{r['ms']:.3g} ms", f"{r['metric']} {r['score']:.4f}"]
        lines.append("| " + " | ".join([*head, *cells]) + " |")
        for tool in tools:
            why = r["tools"][tool].get("failed")
            if why:
                failed.setdefault(f"{TITLES[tool]}: {why}", []).append(r["model"])
    best = [
        max((r["tools"][t].get("ratio", 1.0) for t in tools if t != "effdl"), default=1.0)
        for r in results
    ]
    ours = [r["tools"]["effdl"].get("ratio", 1.0) for r in results]
    lines += [
        "",
        f"Geometric means: effdl {mean(ours):.2f}x; the fastest peer of each model {mean(best):.2f}x.",
    ]
    if failed:
        lines += ["", "What did not work:", ""]
        lines += [f"- {why} ({', '.join(names)})" for why, names in failed.items()]
    return "\n".join(lines)


def mean(ratios: Sequence[float]) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(ratios))))


ABOUT = """# Quantizers side by side

effdl's presets beside the quantizers that one finds for ONNX Runtime: `onnxruntime.quantization`, static in
QDQ form with its three ways to choose a range, and dynamic; NNCF; onnxsim. All get the same
calibration data and the settings that suit the processor: uint8 activations, int8 weights, one scale per
output channel, a reduced range where the processor has no 8-bit dot product. effdl runs as a user runs it,
with its gate: what is not faster, or not accurate enough, it takes back.

## Results
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minilm", type=Path, help="the MiniLM model; left out when not given")
    parser.add_argument("--only", nargs="*", help="models whose name contains one of these")
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="per model and result")
    parser.add_argument("--gate", default="each", help="effdl's gate: each, final or off")
    parser.add_argument("--write", type=Path, help="a page to write, docs/quantizers.md")
    args = parser.parse_args()
    optional = {"nncf", "onnxsim"}
    tools = [t for t in args.tools if t not in optional or importlib.util.find_spec(t)]
    results = []
    print(f"onnxruntime {version('onnxruntime')}, {', '.join(tools)}", flush=True)
    for name, make in rows(args.minilm).items():
        if args.only and not any(o in name for o in args.only):
            continue
        result = measured(make(), tools, args)
        results.append(result)
        said = [f"{TITLES[t]}: {cell(result['tools'][t], result)}" for t in tools]
        print(
            f"{name:<18}{result['ms']:>8.2f} ms {result['score']:.4f} | " + " | ".join(said),
            flush=True,
        )
        for tool in tools:
            told = result["tools"][tool]
            if "failed" in told:
                print(f"    {tool}: {told['failed']}", flush=True)
            for step, why in told.get("passes", {}).items():
                print(f"    {tool} {step} {why}", flush=True)
    if args.write and results:
        old = args.write.read_text() if args.write.exists() else ABOUT
        args.write.write_text(with_section(old, "quantizers", page(results, tools, args.threads)))


if __name__ == "__main__":
    main()
