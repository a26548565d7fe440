"""effdl beside other fusers on exported transformers: layers fused, outputs, latency; docs/fusions.md.

    python scripts/compare_fusions.py FOLDER [--export] [--only NAME ...] [--recipe PRESET] [--threads 1 2]

FOLDER is what export_transformers.py makes (``--export`` makes it first; then torch and transformers are
needed). Every tool works in a process of its own, a result is judged in another one: attention nodes, and
outputs against the untouched model on two shapes. Then the untouched model and all results are timed by the
machinery of ``effdl bench`` in one run. Needs onnxscript; onnxruntime.transformers needs torch.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import effdl  # noqa: F401  (before onnxruntime: switches its telemetry off)

# isort: split
import numpy as np
import onnxruntime as ort
from fusion_tools import typed
from jobs import ask
from sections import with_section

from effdl.data.feeds import Feeds
from effdl.errors import ModelError
from effdl.graph import io
from effdl.measure.bench import bench
from effdl.recipe.shipped import preset_names
from effdl.runtime.target import parse_target

HERE = Path(__file__).parent
TOOL_SCRIPT = HERE / "fusion_tools.py"
TOOLS = ("effdl", "transformers", "onnxscript")
TITLES = {"effdl": "effdl", "transformers": "transformers", "onnxscript": "optimize_for_ort"}
PRESET = "transformer-fp32"
LIMIT = 600
"""Seconds that a tool may take for a model."""
WRONG = 1e-3
"""A relative error above it is a wrong output: rounding stays below 1e-5 here."""
Row = dict[str, Any]


def made_by(tool: str, entry: Row, args: argparse.Namespace, folder: Path, threads: int) -> Row:
    """One tool's result for one model, judged."""
    model = args.folder / entry["file"]
    out = folder / f"{model.stem}.{tool}.onnx"
    feeds = [str(f) for f in sorted(args.folder.glob(f"{entry['model']}.?.npz"))]
    job = {
        "model": str(model),
        "out": str(out),
        "feeds": feeds,
        "recipe": args.recipe,
        "gate": args.gate,
        "dims": dims(entry, feeds[0]),
        "threads": threads,
        **{k: entry[k] for k in ("family", "heads", "hidden")},
    }
    with alone(args.lock if tool == "effdl" and args.gate != "off" else None):
        told = ask(TOOL_SCRIPT, tool, job, LIMIT)
    if "failed" in told:
        return told
    judged = ask(TOOL_SCRIPT, "judge", job, LIMIT)
    told |= {"failed": f"result: {judged['failed']}"} if "failed" in judged else judged
    if "passes" in told:  # a fused form need not be one node
        told["attention"] = max(told.get("attention", 0), told["passes"].get("fuse_attention", 0))
    told["path"] = str(out)
    return told


@contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Hold a lock that other measurements on this machine respect, if one is named."""
    with ExitStack() as stack:
        if lock:
            file = stack.enter_context(lock.open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def dims(entry: Row, feed: str) -> dict[str, int]:
    """Sizes of the dynamic dimensions in a feed."""
    with np.load(feed, allow_pickle=False) as arrays:
        shapes = {name: arrays[name].shape for name in entry["inputs"]}
    axes = [pair for n, a in entry["inputs"].items() for pair in zip(a, shapes[n], strict=True)]
    return {name: size for name, size in axes if isinstance(name, str)}


def race(
    model: Path, feed: Path, rows: dict[str, Row], threads: int, seconds: float
) -> tuple[float, list[str]]:
    """Time the untouched model and every result that runs; adds ratios, returns milliseconds, warnings."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    feeds = Feeds([typed(str(feed), session)], feed.name, False)
    del session
    ready = []
    for name, row in rows.items():
        if "failed" not in row:
            try:
                io.load(Path(row["path"]))
                ready.append(name)
            except ModelError as e:  # ONNX Runtime runs it, ONNX does not know it
                row["failed"] = f"result: {e.message}"
    paths = [model, *(Path(rows[name]["path"]) for name in ready)]
    report = bench(paths, feeds, parse_target("cpu", threads), threads=threads, seconds=seconds)
    for name, result in zip(ready, report.models[1:], strict=True):
        rows[name] |= {"ratio": result.ratio, "ci": result.ci, "speed": result.verdict}
    return report.models[0].latency.median, list(report.warnings)


def verdict(rows: dict[str, Row]) -> str:
    """How effdl stands to the untouched model and to the best peer that is right."""
    mine = rows.get("effdl", {})
    peers = [r for n, r in rows.items() if n != "effdl" and right(r) and "ci" in r]
    if not mine:
        return ""
    if not right(mine):
        return "no result" if "failed" in mine else "WRONG"
    if "ci" not in mine:
        return "not timed"
    if mine["speed"] == "slower":
        return "SLOWER"
    best = max(peers, key=lambda r: r["ratio"], default={"ci": (1.0, 1.0), "ratio": 1.0})
    if mine["ci"][0] > best["ci"][1]:
        return "ahead"
    return "behind" if mine["ci"][1] < best["ci"][0] else "level"


def right(row: Row) -> bool:
    """Whether a tool's result computes the same, texts that are nothing but padding aside."""
    return "failed" not in row and max(row["errors"][:2]) <= WRONG


def measured(args: argparse.Namespace) -> Iterator[Row]:
    """One row for each model and number of threads, as soon as it is known."""
    entries = json.loads((args.folder / "zoo.json").read_text())
    for entry in entries:
        if "failed" in entry or (args.only and not any(o in entry["file"] for o in args.only)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            kept: dict[str, Row] = {}
            for threads in args.threads:
                model = args.folder / entry["file"]
                rows = {}
                for tool in args.tools:
                    again = (
                        args.gate != "off" and tool == "effdl"
                    )  # its gate depends on the threads
                    if tool not in kept or again:
                        kept[tool] = made_by(tool, entry, args, Path(folder), threads)
                    rows[tool] = dict(kept[tool])
                feed = args.folder / f"{entry['model']}.0.npz"
                ms, warnings = 0.0, ["not timed"]
                if args.seconds:
                    with alone(args.lock):
                        ms, warnings = race(model, feed, rows, threads, args.seconds)
                yield {
                    "file": entry["file"],
                    "layers": entry["layers"],
                    "threads": threads,
                    "ms": ms,
                    "tools": rows,
                    "verdict": verdict(rows),
                    "warnings": warnings,
                }


def cell(row: Row) -> str:
    """Layers fused, outputs, ratio: at most 18 characters."""
    if "failed" in row:
        return "crashed" if "result:" not in row["failed"] else "does not run"
    outputs = ("ok*" if max(row["errors"]) > WRONG else "ok") if right(row) else "WRONG"
    if "ci" not in row:
        return f"{row['attention']:>2} {outputs}"
    half = (row["ci"][1] - row["ci"][0]) / 2
    return f"{row['attention']:>2} {outputs} {row['ratio']:.2f}±{half:.2f}"


def line(row: Row, tools: Sequence[str]) -> str:
    """One line of the terminal table."""
    cells = "".join(f" {cell(row['tools'][t]):<16}" for t in tools)
    name = row["file"].removesuffix(".onnx")
    return f"{name:<27}{row['layers']:>3} {row['threads']:>2} {row['ms']:>7.1f}{cells} {row['verdict']}"


def heading(tools: Sequence[str]) -> str:
    titles = "".join(f" {TITLES[t]:<16}" for t in tools)
    return f"{'model':<27}{'lay':>3} {'th':>2} {'ms':>7}{titles} verdict"


def page(rows: Sequence[Row], tools: Sequence[str], recipe: str) -> str:
    """The table of docs/fusions.md and what stands below it."""
    lines = [
        f"Measured on {cpu()}, ONNX Runtime {ort.__version__}, onnxscript {version('onnxscript')}, "
        f"effdl's recipe `{recipe}`. A cell is: attention layers fused, outputs, times as fast as the "
        "untouched model with its 95 % interval.",
        "",
        "| model | layers | threads | untouched | "
        + " | ".join(TITLES[t] for t in tools)
        + " | effdl is |",
        "|---|---|---|---|" + "---|" * (len(tools) + 1),
    ]
    failed: dict[str, list[str]] = {}
    for row in rows:
        cells = [cell(row["tools"][t]) for t in tools]
        name = row["file"].removesuffix(".onnx")
        head = [name, str(row["layers"]), str(row["threads"]), f"{row['ms']:.1f} ms"]
        lines.append("| " + " | ".join([*head, *cells, row["verdict"]]) + " |")
        for tool in tools:
            why = row["tools"][tool].get("failed")
            if why and row["threads"] == rows[0]["threads"]:
                failed.setdefault(f"{TITLES[tool]}: {why}", []).append(name)
    if failed:
        lines += ["", "What did not work:", ""]
        lines += [f"- {why} ({', '.join(names)})" for why, names in failed.items()]
    return "\n".join(lines)


ABOUT = """# Fusions: effdl beside the others

What a fusion is worth is what it makes faster. This page compares the preset for transformers with the
two tools that fuse transformers for ONNX Runtime: `onnxruntime.transformers.optimizer`, called with the
model's own type, number of heads and width and its default level, and onnxscript's `optimize_for_ort`.
The yardstick is the untouched model at ORT_ENABLE_ALL: what ONNX Runtime fuses itself when it loads a
model earns nothing here.

## The models

`scripts/export_transformers.py` makes them with torch and transformers: random weights of a fixed seed
(only minilm has its real ones), real widths and few layers, by both exporters, with dynamic batch and,
for texts, dynamic length and an attention mask. A name says model, exporter and attention code:
`torchscript` is the old exporter at opset 17 (`torchscript14`: at 14), `dynamo` the new one at opset 18
(`dynamo23`: at 23, where attention is one node of the standard already); `eager` and `sdpa` are
transformers' two ways to write attention. `bert_tf_google` and `bert_tf_keras` are written by hand as
tf2onnx writes BERT; `minilm_tool` is written by hand from the weights. Every file is checked against
torch on two shapes first.

## How it is measured

- Every tool runs in a process of its own. One that raises an error or dies has **crashed**; a result that
  ONNX Runtime does not load or run **does not run**.
- *Layers fused* counts Attention, MultiHeadAttention and GroupQueryAttention nodes of the result, of
  either domain; for effdl it is the number that `fuse_attention` reports where that is larger, since its
  fastest form need not be one node. 0 for effdl: found, but measured no faster and taken back.
- Outputs are compared with the untouched model's on two feeds: batch 1 at length 128 without padding, and
  batch 2 at length 17 where the second text is padded. They are **WRONG** when they differ by more than a
  thousandth of the largest value. `ok*`: they differ on a third feed, where one text is padded in front and
  one is nothing but padding (what a row that sees nothing becomes is often lost in a fusion).
- The untouched model and all results are timed in one run, as `effdl bench` does it: each in a process of
  its own, one computing at a time, in short blocks whose order alternates, on the same feed (batch 1),
  with fresh processes several times; ratios of medians with an interval that includes what processes
  differ by ([measurement.md](measurement.md)).
- effdl is *ahead* or *behind* where its interval and that of the best peer with right outputs do not
  overlap, else *level*; SLOWER is against the untouched model.

To run it again: `python scripts/compare_fusions.py FOLDER --export --write docs/fusions.md`.

## Results
"""


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="models of export_transformers.py")
    parser.add_argument("--export", action="store_true", help="make them first")
    parser.add_argument("--only", nargs="*", help="models whose file name contains one of these")
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=TOOLS)
    preset = PRESET if PRESET in preset_names() else "lossless"
    parser.add_argument("--recipe", default=preset, help="effdl's preset or recipe file")
    parser.add_argument("--gate", default="each", help="effdl's gate: each, final or off")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="per model, result and threads; 0: no timing"
    )
    parser.add_argument("--lock", type=Path, help="a file to lock while timing")
    parser.add_argument("--json", action="store_true", help="print rows as JSON, one a line")
    parser.add_argument("--write", type=Path, help="a page to write, docs/fusions.md")
    args = parser.parse_args()
    if args.export:
        command = [sys.executable, str(HERE / "export_transformers.py"), str(args.folder)]
        subprocess.run(command, check=True)
    rows = []
    if not args.json:
        print(heading(args.tools), flush=True)
    for row in measured(args):
        rows.append(row)
        print(json.dumps(row) if args.json else line(row, args.tools), flush=True)
    if args.write:
        old = args.write.read_text() if args.write.exists() else ABOUT
        args.write.write_text(with_section(old, "fusions", page(rows, args.tools, args.recipe)))


if __name__ == "__main__":
    main()
