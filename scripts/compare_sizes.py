"""How small a file gets at float speed: docs/sizes.md.

    EFFDL_SHARED=... python scripts/compare_sizes.py [--only NAME ...] [--seconds 5] [--write]

The ladder original, prune_weights, cluster_weights, pack, each on top of the last; beside it what the peers
of the same run give: float16 storage and 8 bits by onnxruntime. Calibration data are unlabelled, at most
1,000 samples, nothing is trained. All files of a model are timed in one interleaved run of effdl bench.
Needs pillow.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import effdl

# isort: split
import numpy as np
import onnx
import onnx_ir as ir
from onnxruntime.transformers.float16 import convert_float_to_float16
from real_data import cifar_calibration
from real_models import Row, rows
from results import peer
from sections import with_section

from effdl import api
from effdl.graph import io
from effdl.graph.weights import weight_tensors
from effdl.render.numbers import size
from effdl.solve.entropy import entropy_bits

PAGE = Path(__file__).parent.parent / "docs" / "sizes.md"
LARGE = 1024
"""Numbers from which a constant counts for the entropy."""
Step = str | dict[str, dict[str, Any]]
SAMPLES = 500
FIRST: tuple[Step, ...] = ("simplify", "fold_batchnorm")
THIN: Step = {"prune_channels": {"params": 0.5}}
SETTINGS: dict[str, dict[str, Any]] = {
    "cifar_vgg": {"bits": 3, "error": 0.042},
    "cifar_resnet20": {"bits": 4, "error": 0.06},
    "digits_cnn": {"bits": 4, "error": 0.05},
    "digits_mlp": {"bits": 4, "error": 0.05},
}


@dataclass
class Made:
    """A file and what it is."""

    what: str
    path: Path
    failed: str = ""


def ladder(name: str) -> list[tuple[str, int, tuple[Step, ...]]]:
    """Return what every rung is, from which file it is made (0: the original), and its passes."""
    clustered: Step = {"cluster_weights": SETTINGS[name]}
    told = ", ".join(f"{k} {v}" for k, v in SETTINGS[name].items())
    return [
        ("pack (lossless)", 0, (*FIRST, "pack")),
        (f"cluster_weights, {told}", 0, (*FIRST, clustered)),
        ("cluster_weights, pack", 2, ("pack", "strip_metadata")),
        ("prune_channels, params 0.5", 0, (*FIRST, THIN)),
        ("prune_channels, cluster_weights, pack", 4, (clustered, "pack", "strip_metadata")),
    ]


def made(row: Row, folder: Path) -> list[Made]:
    """Write every file of one model."""
    cifar = "cifar" in row.name
    data = {k: cifar_calibration()[:SAMPLES] if cifar else a for k, a in row.calibration.items()}
    np.savez(folder / "calib.npz", **data)
    found = [Made("original", row.model)]
    for k, (what, source, passes) in enumerate(ladder(row.name)):
        goal = folder / f"{k}.onnx"
        recipe = {
            "name": "sizes",
            "description": what,
            "objective": "size",
            "passes": list(passes),
        }
        run = effdl.RunOptions(gate="off", bench_seconds=0)
        effdl.optimize(found[source].path, recipe, goal, data=folder / "calib.npz", options=run)
        found.append(Made(what, goal))
        print(f"{row.name}: {what}", flush=True)
    half = folder / "half.onnx"
    halved = ir.from_proto(convert_float_to_float16(onnx.load(row.model), keep_io_types=True))
    halved.graph.sort()  # the peer puts its Casts last
    ir.save(halved, half)
    found.append(Made("float16 (onnxruntime.transformers)", half))
    eight = folder / "eight.onnx"
    found.append(Made("8 bits (onnxruntime quantize_static)", eight, peer(row, eight, folder)))
    return found


def entropy_bytes(path: Path) -> float:
    """Return the bytes of the large constants by the entropy of the values of each."""
    bits = 0.0
    for tensor in weight_tensors(io.load(path)):
        if tensor.size >= LARGE:
            bits += entropy_bits(np.unique(tensor.numpy(), return_counts=True)[1])
    return bits / 8


def table(row: Row, seconds: float) -> list[str]:
    """Return the lines of one model."""
    with tempfile.TemporaryDirectory(prefix="effdl-sizes-") as name:
        folder = Path(name)
        files = made(row, folder)
        works = [f for f in files if not f.failed]
        np.savez(folder / "timing.npz", **row.timing)
        report = api.bench(
            *(f.path for f in works), data=folder / "timing.npz", threads=1, seconds=seconds
        )
        first = report.models[0]
        lines = []
        for file, m in zip(works, report.models, strict=True):
            ratio = f"{m.ratio:.2f} [{m.ci[0]:.2f}, {m.ci[1]:.2f}]" if file is not works[0] else "1"
            lines.append(
                f"| {row.name if file is works[0] else ''} | {file.what} | {size(m.file_bytes)} "
                f"| {size(m.zstd_bytes)} | {first.zstd_bytes / m.zstd_bytes:.1f} "
                f"| {size(round(entropy_bytes(file.path)))} "
                f"| {row.metric} {row.score(file.path):.4f} | {ratio} |"
            )
            print(lines[-1], flush=True)
        lines += [f"| | {f.what} | failed: {f.failed} | | | | | |" for f in files if f.failed]
        return lines


HEAD = """\
# The smallest file at float speed

`cluster_weights` lets the weights of a layer share a few values, `pack` stores which of them each weight
has, in a few bits that compress to their entropy. ONNX Runtime puts the weights together once, when it loads
the model, and computes in float: the latency is that of the original, and so is the memory.

Written by `scripts/compare_sizes.py`: every line is a file made by the passes named (after `simplify` and
`fold_batchnorm`), without training, with at most 500 unlabelled samples. zstd is at level 3; smaller is
how many times the compressed file is smaller than the compressed original; entropy is what the values of
the large constants take, one by one; the speed-up is against the original (above 1: faster), all files in
one interleaved run, one thread, with its 95 % confidence interval.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    makers = rows(None)
    lines = [
        "| model | file | bytes | zstd | smaller | entropy | score | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in args.only:
        lines += table(makers[name](), args.seconds)
    body = "\n".join(lines)
    print(body)
    if args.write:
        page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else HEAD
        PAGE.write_text(with_section(page, "sizes", body), encoding="utf-8")


if __name__ == "__main__":
    main()
