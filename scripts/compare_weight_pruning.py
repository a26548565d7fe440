"""Accuracy and compressed size of networks with zeros in their weights, by every way to choose them.

Nothing is trained: 1,000 unlabelled images are all the data. Needs EFFDL_SHARED (CIFAR-10 networks) and
Pillow. Prints a Markdown table per model; docs/pruning.md.

    python scripts/compare_weight_pruning.py [--models cifar_vgg ...] [--sparsity 0.5 ...] [--write FILE]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from real_data import cifar_calibration, cifar_test, shared
from sections import with_section

from effdl.data.feeds import Feeds
from effdl.graph import io
from effdl.measure.size import zstd_size
from effdl.passes.base import Context, PassLog
from effdl.passes.prune.weights import PruneWeights
from effdl.runtime.session import open_session
from effdl.runtime.target import parse_target

WAYS: dict[str, dict[str, Any]] = {
    "magnitude, layer": {"method": "magnitude"},
    "magnitude, global": {"method": "magnitude", "scope": "global"},
    "magnitude, erk": {"method": "magnitude", "scope": "erk"},
    "wanda, layer": {"method": "wanda"},
    "obs, layer": {"method": "obs"},
    "obs, plan": {"method": "obs", "scope": "plan"},
    "admm, layer": {"method": "admm"},
    "admm, global": {"method": "admm", "scope": "global"},
    "admm, erk": {"method": "admm", "scope": "erk"},
    "admm, plan": {"method": "admm", "scope": "plan"},
}
_BATCH = 100


def accuracy(
    model: ir.Model, images: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]
) -> float:
    """Return the share of right answers in percent."""
    session = open_session(model)
    right = 0
    for start in range(0, len(images), _BATCH):
        scores = next(iter(session.run({"image": images[start : start + _BATCH]}).values()))
        right += int((np.argmax(scores, 1) == labels[start : start + _BATCH]).sum())
    return 100 * right / len(images)


def compressed(model: ir.Model) -> int:
    """Return the bytes of the file after zstd."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        io.save(model, path)
        return zstd_size(path)


def row(name: str, options: dict[str, Any], data: Any) -> str:
    """Prune one way and return the cells of the table: accuracy, size, seconds."""
    feeds, images, labels = data
    model = io.load(shared() / "models" / f"{name}.onnx")
    start = time.perf_counter()
    ctx = Context(target=parse_target("cpu"), feeds=feeds, log=PassLog())
    PruneWeights.model_validate(options).run(model, ctx)
    seconds = time.perf_counter() - start
    size = compressed(model) / 1e6
    return f"{accuracy(model, images, labels):.2f} ({size:.2f} MB, {seconds:.0f} s)"


def table(name: str, data: Any, args: argparse.Namespace) -> str:
    """Print and return the rows of one model."""
    model = io.load(shared() / "models" / f"{name}.onnx")
    untouched = f"{accuracy(model, *data[1:]):.2f} %, {compressed(model) / 1e6:.2f} MB after zstd"
    lines = [f"{name}, untouched {untouched}:", ""]
    lines += ["| zeros |" + "".join(f" {s:g} |" for s in args.sparsity)]
    lines += ["|---|" + "---|" * len(args.sparsity)]
    print("\n".join(lines), flush=True)
    for way in args.ways:
        cells = [row(name, {**WAYS[way], "sparsity": s}, data) for s in args.sparsity]
        lines.append(f"| {way} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    for method in ("magnitude", "wanda", "obs", "admm"):
        cell = row(name, {"method": method, "pattern": "n:m"}, data)
        lines.append(f"| {method}, 2:4 | {cell} |" + " |" * (len(args.sparsity) - 1))
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["cifar_resnet20", "cifar_vgg"])
    parser.add_argument("--sparsity", nargs="*", type=float, default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--ways", nargs="*", default=list(WAYS), help="rows of the table")
    parser.add_argument(
        "--test", type=int, default=10_000, help="images to test with, spread over all"
    )
    parser.add_argument("--batch", type=int, default=20, help="calibration images of a feed")
    parser.add_argument("--write", type=Path, help="the page where tables are renewed")
    args = parser.parse_args()
    images, labels = (a[:: len(a) // args.test] for a in cifar_test())
    calibration = cifar_calibration()
    batches = [calibration[i : i + args.batch] for i in range(0, len(calibration), args.batch)]
    data = (Feeds(tuple({"image": b} for b in batches), "cifar", True), images, labels)
    for name in args.models:
        made = table(name, data, args)
        if args.write:
            page = args.write.read_text(encoding="utf-8")
            args.write.write_text(with_section(page, f"weights {name}", made), encoding="utf-8")


if __name__ == "__main__":
    main()
