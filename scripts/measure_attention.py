"""Which form of attention ONNX Runtime computes fastest on this machine, from hidden states to mixed values.

    python scripts/measure_attention.py [--threads 1 2] [--shape 1x128x12x32] [--seconds 2] [--json]

Every form is the same self-attention without its output projection: x [B, S, H*D] through the projections
of query, key and value (with bias) to [B, S, H*D]. The mask, where there is one, is an int64 input [B, S] as
models have it; each form makes from it what it needs. All forms of a cell are loaded in one process and take
turns in blocks whose order alternates; of a block the fastest run counts, with one thread by its processor
time, which other work disturbs less. Told are the median over turns of the time over that of ``eager`` in
the same turn, its 95 % interval, and the same when the projections alone (form ``projections``) are taken
off both. ``again`` is ``eager`` a second time: what it differs by is noise. A form that is wrong is told so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import effdl  # noqa: F401  (before onnxruntime: switches its telemetry off)

# isort: split
import numpy as np
import onnxruntime as ort
from attention_forms import Block, forms

SHAPES = ("1x128x12x32", "1x128x12x64", "1x197x12x64", "1x1500x6x64", "8x128x12x64")


def cell(
    shape: tuple[int, ...], mask: bool, causal: bool, threads: int, seconds: float
) -> dict[str, Any]:
    """Measure all forms of one shape in this process."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    rng = np.random.default_rng(1)
    batch, length, heads, size = shape
    feed = {"x": rng.standard_normal((batch, length, heads * size)).astype(np.float32)}
    if mask:
        feed["mask"] = np.ones((batch, length), np.int64)
        feed["mask"][:, -7:] = 0
    ready: dict[str, ort.InferenceSession] = {}
    notes: dict[str, str] = {}
    for form, opset in forms(mask, causal):
        block = Block(shape, mask, causal, opset)
        name = form.__name__
        try:
            session = ort.InferenceSession(block.model(form(block)), options)
            found = session.run(None, feed)[0]
        except Exception as error:  # a form that this version does not take is a line of the table
            notes[name] = str(error).splitlines()[0][-90:]
            continue
        ready[name] = session
        if name == "eager":
            wanted = found
        elif name != "projections":
            apart = float(np.abs(found - wanted).max() / np.abs(wanted).max())
            if not apart < 1e-4:
                notes[name] = f"wrong by {apart:.1e}"
    return {
        "times": timed(
            ready, feed, seconds, time.thread_time if threads == 1 else time.perf_counter
        ),
        "notes": notes,
    }


def timed(
    ready: dict[str, ort.InferenceSession],
    feed: dict[str, np.ndarray],
    seconds: float,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Fastest run of each block in milliseconds, per form one for each turn."""
    start = time.perf_counter()
    for session in ready.values():
        session.run(None, feed)
    once = (time.perf_counter() - start) / len(ready)
    runs = max(2, min(20, int(0.015 / once)))
    times: dict[str, list[float]] = {name: [] for name in ready}
    end, turn = time.perf_counter() + seconds * len(ready), 0
    while turn < 6 or time.perf_counter() < end:
        for name in list(ready)[:: -1 if turn % 2 else 1]:
            took = []
            for _ in range(runs + 1):
                before = clock()
                ready[name].run(None, feed)
                took.append((clock() - before) * 1e3)
            times[name].append(min(took[1:]))
        turn += 1
    return times


def told(times: dict[str, list[float]], name: str) -> tuple[float, float, float]:
    """Time over eager's with its 95 % interval over turns, and the same with the projections taken off."""
    eager, mine, base = (np.array(times[n]) for n in ("eager", name, "projections"))
    ratios = mine / eager
    middle = float(np.median(ratios))
    spread = float(np.quantile(ratios, 0.75) - np.quantile(ratios, 0.25))
    without = float(np.median(mine - base) / np.median(eager - base))
    return middle, 1.96 * 0.93 * spread / len(ratios) ** 0.5, without


def table(found: dict[str, Any]) -> str:
    """One cell in Markdown, the fastest form first."""
    times, notes = found["times"], found["notes"]
    base = float(np.median(times["eager"]))
    part = base - float(np.median(times["projections"]))
    lines = [
        "",
        f"**{found['name']}**: eager {base:.3f} ms, of which {part:.3f} attention",
        "",
        "| form | time / eager | ± | attention part / eager's |",
        "|---|---|---|---|",
    ]
    rows = {n: told(times, n) for n in times if n != "projections"}
    for name, (ratio, half, without) in sorted(rows.items(), key=lambda i: i[1]):
        lines.append(f"| {name} {notes.get(name, '')} | {ratio:.3f} | {half:.3f} | {without:.2f} |")
    lines += [f"| {n} | does not run: {why} | | |" for n, why in notes.items() if n not in times]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--shape", nargs="*", default=list(SHAPES), help="BxSxHxD")
    parser.add_argument(
        "--mask", nargs="*", default=["none", "padding"], help="none, padding, causal"
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="per form and cell")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--here", action="store_true", help="one cell, in this process")
    args = parser.parse_args()
    if args.here:
        shape = tuple(int(n) for n in args.shape[0].split("x"))
        kind = args.mask[0]
        found = cell(shape, "padding" in kind, "causal" in kind, args.threads[0], args.seconds)
        print(json.dumps(found))
        return
    cells = []
    for shape_text in args.shape:
        for kind in args.mask:
            for threads in args.threads:
                command = [
                    sys.executable,
                    __file__,
                    "--here",
                    "--shape",
                    shape_text,
                    "--mask",
                    kind,
                ]
                command += ["--threads", str(threads), "--seconds", str(args.seconds)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found = json.loads(done.stdout)
                found["name"] = f"{shape_text}, mask {kind}, {threads} thread(s)"
                cells.append(found)
                if not args.json:
                    print(table(found), flush=True)
    if args.json:
        print(json.dumps(cells))


if __name__ == "__main__":
    main()
