"""What each repair of quantize_static is worth: the table "repairs" of docs/quantization.md.

    EFFDL_SHARED=... python scripts/compare_repairs.py [--only NAME ...] [--write]

Every way quantizes the same folded network with the same calibration data. Its error is the relative L2 error
of all outputs on samples that were not used, over all of them; nothing is left in float, nothing is timed.
Needs pillow.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import effdl

# isort: split
import numpy as np
import onnxruntime as ort
from real_models import Row, rows
from sections import with_section

PAGE = Path(__file__).parent.parent / "docs" / "quantization.md"
PREPARED = (
    *("simplify", "fold_transposes", "fold_pad", "fold_batchnorm", "fold_branches", "fold_affine"),
    {"convert_opset": {"at_least": 17}},
    "fuse_layernorm",
)
NAMES = (
    *("mobilenetv2_fp32", "squeezenet_fp32", "ultraface", "cifar_resnet20", "cifar_vgg"),
    *("digits_cnn", "digits_mlp"),
)
PLAIN = {"adaptive_rounding": False, "range_search": 0, "bias_correction": False}
WAYS: dict[str, tuple[bool, dict[str, Any]]] = {
    "none": (False, PLAIN),
    "bias": (False, PLAIN | {"bias_correction": True}),
    "bias, equalize": (True, PLAIN | {"bias_correction": True}),
    "bias, rounding": (False, {"range_search": 0}),
    "bias, equalize, rounding": (True, {"range_search": 0}),
    "all, with range search": (True, {}),
}
KEPT = 5
"""Every KEPT-th sample is for the error."""


def error(row: Row, made: Path, samples: dict[str, np.ndarray]) -> float:
    """Return the relative L2 error of all outputs together."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    sessions = [ort.InferenceSession(p, options) for p in (row.model, made)]
    change = total = 0.0
    for k in range(0, len(next(iter(samples.values()))), row.batch):
        feed = {name: a[k : k + row.batch] for name, a in samples.items()}
        for want, got in zip(*(s.run(None, feed) for s in sessions), strict=True):
            change += float(np.square(got.astype(np.float64) - want).sum())
            total += float(np.square(want.astype(np.float64)).sum())
    return float(np.sqrt(change / total))


def measured(row: Row, folder: Path) -> list[tuple[float, float]]:
    """Return error and seconds of every way."""
    count = len(next(iter(row.calibration.values())))
    apart = np.arange(count) % KEPT == KEPT - 1
    np.savez(folder / "data.npz", **{k: a[~apart] for k, a in row.calibration.items()})
    samples = {k: a[apart] for k, a in row.calibration.items()}
    found = []
    for even, options in WAYS.values():
        recipe = {
            "name": "repairs",
            "description": "one way of quantize_static",
            "passes": [*PREPARED, *(["equalize"] if even else []), {"quantize_static": options}],
        }
        start = time.perf_counter()
        run = effdl.RunOptions(gate="off", bench_seconds=0)
        effdl.optimize(row.model, recipe, folder / "q.onnx", data=folder / "data.npz", options=run)
        found.append((error(row, folder / "q.onnx", samples), time.perf_counter() - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    args = parser.parse_args()
    makers = rows(None)
    lines = ["| model | " + " | ".join(WAYS) + " |", "|---|" + "---|" * len(WAYS)]
    for name in args.only:
        with tempfile.TemporaryDirectory(prefix="effdl-repairs-") as folder:
            found = measured(makers[name](), Path(folder))
        cells = [f"{e:.4f} ({s:.0f} s)" for e, s in found]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    if args.write:
        PAGE.write_text(with_section(PAGE.read_text(), "repairs", "\n".join(lines)))


if __name__ == "__main__":
    main()
