"""Run effdl over a large model and print time and peak memory of each run.

    python scripts/make_big_model.py /tmp/big.onnx --gb 3
    python scripts/measure_big.py /tmp/big.onnx

Every recipe runs in a process of its own (``effdl optimize``, no benchmark). Peak memory is what the
kernel accounts to that process as resident, memory-mapped pages of the model file included, so it
can be as large as the model although nothing is copied; the anonymous part (the heap) is sampled from
/proc where there is one. Results go into a temporary folder beside the model and are deleted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import effdl  # noqa: F401  (before onnxruntime: switches its telemetry off)

# isort: split
import numpy as np

from effdl.data.random import random_feeds
from effdl.graph.io import files_size, load

ALONE = "name: one-pass\ndescription: a quantizer alone\npasses: [%s]\n"
SAMPLES = 64
"""Random ones, for quantize_static."""
SAMPLE_SECONDS = 0.1
MIB = 1 << 20


@dataclass(frozen=True)
class Usage:
    """What one child process took.

    Args:
        code: its exit status.
        seconds: wall time.
        peak: largest resident set in bytes.
        heap: largest anonymous memory seen in bytes, 0 where /proc does not tell.
    """

    code: int
    seconds: float
    peak: int
    heap: int


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous resident memory of a process, 0 when it is not to be had."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return 0
    return 0


def run(command: list[str]) -> Usage:
    """Run a command to its end and return what it took."""
    start = time.perf_counter()
    child = subprocess.Popen(command)
    heap, done = 0, threading.Event()

    def sample() -> None:
        nonlocal heap
        while not done.wait(SAMPLE_SECONDS):
            heap = max(heap, anonymous_bytes(child.pid))

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    done.set()
    watcher.join()
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(child.returncode, time.perf_counter() - start, usage.ru_maxrss * unit, heap)


def write_samples(model: Path, goal: Path) -> None:
    """Write random samples of a model's inputs, along the first axis."""
    feeds = list(random_feeds(load(model), count=SAMPLES))
    np.savez(goal, **{name: np.concatenate([f[name] for f in feeds]) for name in feeds[0]})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path, help="an .onnx file")
    parser.add_argument("--effdl", default="effdl", help="the command (default: effdl)")
    args, extra = parser.parse_known_args()  # the rest goes to `effdl optimize`
    options = ["--quiet", "--bench-seconds", "0", *extra]
    before = files_size(args.model)
    print(f"{args.model.name}: {before / MIB:,.0f} MiB")
    print(
        f"{'recipe':<18}{'exit':>5}{'seconds':>9}{'peak MiB':>10}{'heap MiB':>10}{'after MiB':>11}"
    )
    worst = 0
    with tempfile.TemporaryDirectory(dir=args.model.parent, prefix="measure_big.") as folder:
        runs: list[tuple[str, str, list[str]]] = [("lossless", "lossless", [])]
        data = Path(folder) / "data.npz"
        write_samples(args.model, data)
        for name in ("quantize_dynamic", "quantize_static"):
            recipe = Path(folder) / f"{name}.yaml"
            recipe.write_text(ALONE % name)
            given = ["--data", str(data)] if name == "quantize_static" else []
            runs.append((name, str(recipe), given))
        for name, source, given in runs:
            out = Path(folder) / f"{name}.onnx"
            used = run(
                [
                    args.effdl,
                    "optimize",
                    str(args.model),
                    "-c",
                    source,
                    "-o",
                    str(out),
                    *options,
                    *given,
                ]
            )
            after = f"{files_size(out) / MIB:,.0f}" if out.exists() else "none"
            print(
                f"{name:<18}{used.code:>5}{used.seconds:>9.1f}{used.peak / MIB:>10,.0f}"
                f"{used.heap / MIB:>10,.0f}{after:>11}",
                flush=True,
            )
            worst = max(worst, abs(used.code))
    return min(worst, 1)


if __name__ == "__main__":
    sys.exit(main())
